import copy
import io
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from lightning_toys.bilevel.control.gymnasium_environments import make_environments
from lightning_toys.bilevel.control.replay import Batch, ReplayBuffer, uniform_float64
from lightning_toys.errors import ToyError
from lightning_toys.training.noise import keyed_generator


def filled(seeds: list[int], capacity: int, count: int, tensors: bool = False, obs: int = 3) -> ReplayBuffer:
    """A replay whose entry t of replica r tells t and r."""
    replay = ReplayBuffer(seeds, obs, capacity)
    for t in range(count):
        s = np.array([[1000 * seed + t] * obs for seed in seeds], dtype=np.float32)
        a, terminated = np.array([(t + seed) % 300 for seed in seeds]), np.array([t % 7 == seed for seed in seeds])
        rows = (s, a, s[:, 0] / 8, s + 0.5, terminated)
        replay.add(*(torch.from_numpy(x) for x in rows) if tensors else rows)
    return replay


def assert_rows_are_whole(batch: Batch, seeds: list[int]) -> None:
    """Each drawn row is one transition, of the right replica."""
    s = torch.tensor(seeds)[:, None]
    t = (batch.observation[..., 0] - 1000 * s).long()
    assert torch.equal(batch.observation, (1000 * s + t)[..., None].expand_as(batch.observation).float())
    assert torch.equal(batch.next_observation, batch.observation + 0.5)
    assert torch.equal(batch.action, (t + s) % 300)
    assert torch.equal(batch.reward, batch.observation[..., 0] / 8)
    assert torch.equal(batch.not_terminated, (t % 7 != s).float())


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [4, 1, 2, 3]), (11, [8, 9, 10, 7])])
def test_the_oldest_gives_way(count: int, kept: list[int], tensors: bool) -> None:
    replay = filled([0, 2], 4, count, tensors)
    assert (replay.added, replay.size) == (count, len(kept))
    assert replay.transitions.observation[:, :, 0].tolist() == [kept, [2000 + t for t in kept]]
    assert_rows_are_whole(replay.transitions, [0, 2])


def test_a_draw_has_whole_rows_in_the_dtypes_that_are_wanted() -> None:
    seeds = [0, 2, 5]
    batch = filled(seeds, 50, 70).sample(9, 256)
    assert_rows_are_whole(batch, seeds)
    assert {x.dtype for x in batch} == {torch.float32, torch.int64}
    assert batch.action.dtype == torch.int64
    assert batch.observation.shape == batch.next_observation.shape == (3, 256, 3)
    assert batch.reward.shape == batch.action.shape == batch.not_terminated.shape == (3, 256)
    assert {0.0, 1.0} == set(batch.not_terminated.flatten().tolist())
    assert (batch.observation[..., 0].amin(1) - 1000 * torch.tensor(seeds) >= 20).all()  # the first 20 have gone


def test_indices_are_the_keyed_uniforms() -> None:
    """The layout is part of every run's results: blocks of 64 steps of float64 uniforms, times what is filled."""
    replay = filled([3, 4], 100, 37)
    for step in (0, 63, 64, 1000):
        for r, seed in enumerate([3, 4]):
            u = keyed_generator(seed, step // 64, "replay").random((64, 16))[step % 64]
            drawn = replay.sample(step, 16).observation[r, :, 0] - 1000 * seed
            assert np.array_equal(drawn, np.floor(u * 37))


def test_draws_do_not_depend_on_the_order_they_are_made_in() -> None:
    steps = [5, 700, 6, 64, 63, 5]
    a, b = filled([0, 1], 40, 30), filled([0, 1], 40, 30)
    forward = {s: a.sample(s, 8).reward for s in steps}
    backward = {s: b.sample(s, 8).reward for s in reversed(steps)}
    assert all(torch.equal(forward[s], backward[s]) for s in steps)
    assert len({tuple(x.flatten().tolist()) for x in forward.values()}) == 5
    assert not torch.equal(a.sample(5, 8, "other").reward, forward[5])
    assert torch.equal(a.sample(5, 8).reward, forward[5])


def test_a_replica_of_many_draws_as_alone() -> None:
    many, alone = filled([4, 5, 6], 40, 55), filled([5], 40, 55)
    for step in (0, 1, 200):
        assert all(torch.equal(x[1:2], y) for x, y in zip(many.sample(step, 32), alone.sample(step, 32), strict=True))


def test_every_row_is_as_likely() -> None:
    """Chi-squared over 90 rows at a level of 1e-4; and serial independence of the draws."""
    n = 90
    replay = filled([0], 100, n, obs=1)
    index = torch.stack([replay.sample(s, 256).observation[0, :, 0] for s in range(200)]).long()
    counts = torch.bincount(index.flatten(), minlength=n)
    assert counts.numel() == n
    assert chisquare(counts.numpy()).pvalue > 1e-4
    z = (index.double() - (n - 1) / 2) / math.sqrt((n * n - 1) / 12)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(z.numel())
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / math.sqrt(z.numel())


def test_the_largest_uniform_draws_the_last_row() -> None:
    """floor(u n) < n at any n; in single precision a row of 200 000 is drawn 1.2 % more often than another."""
    u = np.nextafter(1.0, 0.0)
    powers = 2 ** np.arange(2, 31)
    sizes = np.concatenate([np.arange(1, 3000), powers - 1, powers, powers + 1])
    assert (np.floor(u * sizes) == sizes - 1).all()
    x = uniform_float64(keyed_generator(0, 0, "x"), (1000,))
    assert x.dtype == np.float64
    assert (x * 2**24 % 1 != 0).all()  # finer than single precision
    width = np.diff(np.ceil(np.arange(200_001) * 2**24 / 200_000))  # single-precision uniforms to each row
    assert set(width) == {83, 84}


def test_a_checkpoint_goes_on_bit_for_bit_and_grows_with_what_is_kept() -> None:
    for count in (0, 7, 40, 61):
        straight = nn.ModuleDict({"replay": filled([0, 2], 40, count)})
        file = io.BytesIO()
        torch.save(straight.state_dict(), file)
        assert file.tell() < 3000 + min(count, 40) * 2 * 9 * 4
        file.seek(0)
        resumed = nn.ModuleDict({"replay": filled([0, 2], 40, 23)})  # what it held before is forgotten
        resumed.load_state_dict(torch.load(file, weights_only=True))
        a, b = straight["replay"], resumed["replay"]
        assert isinstance(a, ReplayBuffer)
        assert isinstance(b, ReplayBuffer)
        assert torch.equal(a.rows, b.rows)
        for t in range(50):
            row = [np.full((2, 3), t), np.array([1, 2]), np.array([t, t]), np.full((2, 3), -t), np.array([0, 1])]
            a.add(*row)
            b.add(*row)
            assert all(torch.equal(x, y) for x, y in zip(a.sample(t, 8), b.sample(t, 8), strict=True))
        assert torch.equal(a.rows, b.rows)


def test_a_state_is_a_copy() -> None:
    replay = filled([0], 10, 5)
    state = replay.state_dict()
    kept = state["rows"].clone()
    replay.add(np.zeros((1, 3)), np.zeros(1), np.zeros(1), np.zeros((1, 3)), np.zeros(1))
    replay.rows.zero_()
    assert torch.equal(state["rows"], kept)
    assert int(state["added"]) == 5


def test_what_does_not_fit_is_refused() -> None:
    replay = filled([0], 10, 5)
    with pytest.raises(ToyError, match=r"--data\.capacity: 20 is not allowed; the stored replay keeps 10"):
        ReplayBuffer([0], 3, 20).load_state_dict(replay.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for rows: \(1, 5, 9\), where \(1, 5, 11\) is wanted"):
        ReplayBuffer([0], 4, 10).load_state_dict(replay.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        replay.load_state_dict({})
    with pytest.raises(ToyError, match=r"--data\.capacity: 0 is not allowed"):
        ReplayBuffer([0], 3, 0)
    with pytest.raises(AssertionError, match="nothing to draw"):
        ReplayBuffer([0], 3, 5).sample(0, 4)


def test_it_is_a_module_like_others() -> None:
    replay = filled([0, 2], 10, 8)
    assert list(replay.parameters()) == []
    double = copy.deepcopy(replay).double()
    assert double.sample(3, 16).reward.dtype == torch.float64
    assert torch.equal(double.sample(3, 16).reward.float(), replay.sample(3, 16).reward)
    assert replay.to("meta").sample(3, 16).observation.device.type == "meta"


def test_steps_of_environments_are_stored_copy_after_copy() -> None:
    environments = make_environments("CartPole-v1", [0, 1, 2], "train", 2)
    replay = ReplayBuffer([0, 1, 2], environments.observation_size, 64)
    rng = np.random.default_rng(0)
    steps = [environments.step(rng.integers(2, size=(3, 2))) for _ in range(30)]
    for step in steps:
        replay.store(step)
    kept = replay.transitions
    assert replay.size == 60
    for i, name in enumerate(("observation", "action", "reward", "next_observation")):
        column = np.concatenate([getattr(s, name) for s in steps], axis=1)
        assert np.array_equal(kept[i].numpy(), column), name
    ends = np.concatenate([s.terminated for s in steps], axis=1)
    assert ends.any()
    assert np.array_equal(kept.not_terminated.numpy(), 1 - ends)


def test_a_time_limit_is_no_termination() -> None:
    environments = make_environments("MountainCar-v0", [0], "train")
    replay = ReplayBuffer([0], 2, 300)
    for _ in range(200):
        step = environments.step(np.zeros((1, 1)))
        replay.store(step)
    assert step.truncated.all()
    assert (replay.transitions.not_terminated == 1).all()
