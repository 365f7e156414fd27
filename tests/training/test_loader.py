"""The block loader, and the parts of the data and model base classes that need no Trainer."""

import copy
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import NonFiniteError, ToyError
from lightning_toys.nets import Network
from lightning_toys.training.configuration import as_dataclass, check_seeds
from lightning_toys.training.data import MAX_BLOCK, ToyDataModule, block_steps
from lightning_toys.training.loader import CHUNK_ROWS, SHUFFLE_BLOCK, Block, BlockLoader, OneBatch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.optimization import clip_per_replica

SEEDS = [3, 0, 12]
N = 10


def table(seeds: Sequence[int] = SEEDS, n: int = N) -> tuple[Tensor, Tensor]:
    """Rows that say which replica and point they are: 100 seed + point, and that as two columns."""
    a = torch.stack([torch.arange(n).double() + 100 * s for s in seeds]).unsqueeze(-1)
    return a, torch.cat([a, -a], dim=-1)


def loader(
    max_steps: int = 40,
    block: int = 7,
    batch: int = 4,
    seeds: Sequence[int] = SEEDS,
    rank: int = 0,
    world_size: int = 1,
    n: int = N,
) -> BlockLoader:
    return BlockLoader(table(seeds, n), seeds, batch, max_steps, block, rank, world_size)


def steps(source: BlockLoader) -> dict[int, Tensor]:
    """Return every step's rows (R, B) of the first column."""
    return {s: b.batch(s).columns[0][..., 0] for b in source for s in range(b.start, b.stop)}


def assert_same(a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
    assert a.keys() == b.keys()
    for s in a:
        assert torch.equal(a[s], b[s])


def test_every_pass_is_a_permutation_and_the_last_batch_is_kept() -> None:
    found = steps(loader(max_steps=300))
    assert [found[s].shape[1] for s in range(6)] == [4, 4, 2, 4, 4, 2]
    orders = []
    for p in range(100):
        seen = torch.cat([found[3 * p + k] for k in range(3)], dim=1)
        for r, seed in enumerate(SEEDS):
            assert sorted((seen[r] - 100 * seed).tolist()) == list(range(N))
            orders.append(tuple((seen[r] - 100 * seed).tolist()))
    assert len(set(orders)) == 300  # of 10! orders: no pass is repeated, and replicas differ


def test_first_places_are_uniform() -> None:
    """Each point comes first in a tenth of 3 x 640 passes, within 5 SE."""
    first = loader().permutations(0, 640)[:, :, 0].flatten()
    counts = np.bincount(first, minlength=N)
    assert np.abs(counts - 192).max() < 5 * np.sqrt(1920 * 0.1 * 0.9)


def test_columns_stay_together() -> None:
    for block in loader():
        for s in range(block.start, block.stop):
            a, b = block.batch(s).columns
            assert torch.equal(b, torch.cat([a, -a], dim=-1))


def test_steps_per_pass_and_exact_fits() -> None:
    assert loader().steps_per_pass == 3
    assert loader(batch=5).steps_per_pass == 2
    assert loader(batch=50).steps_per_pass == 1
    assert {x.shape[1] for x in steps(loader(batch=5)).values()} == {5}
    assert {x.shape[1] for x in steps(loader(batch=50)).values()} == {N}


def test_blocks_start_and_stop_at_multiples_and_at_max_steps() -> None:
    assert [(b.start, b.stop) for b in loader(max_steps=17, block=7)] == [(0, 7), (7, 14), (14, 17)]
    assert [(b.start, b.stop) for b in loader(max_steps=14, block=7)] == [(0, 7), (7, 14)]
    with pytest.raises(RuntimeError, match="the loader is at step 0 of 0, and more steps are asked for"):
        list(loader(max_steps=0))
    assert set(steps(loader(max_steps=17))) == set(range(17))


@pytest.mark.parametrize("block", [1, 2, 3, 5, 50, 1000])
def test_batches_do_not_depend_on_the_block(block: int) -> None:
    assert_same(steps(loader(max_steps=250, block=block)), steps(loader(max_steps=250, block=7)))


@pytest.mark.parametrize("at", [0, 1, 6, 7, 100, 191, 192, 193])
def test_resume_at_any_step(at: int) -> None:
    """192 steps are 64 passes: the shuffles' own block ends there."""
    assert SHUFFLE_BLOCK * 3 == 192
    whole, resumed = steps(loader(max_steps=250)), loader(max_steps=250)
    resumed.load_state_dict({"next_step": at})
    assert_same(steps(resumed), {s: x for s, x in whole.items() if s >= at})


def test_state_dict_round_trip() -> None:
    first = loader(max_steps=100, block=7)
    iterator = iter(first)
    done: dict[int, Tensor] = {}
    for _ in range(4):
        block = next(iterator)
        done |= {s: block.batch(s).columns[0][..., 0] for s in range(block.start, block.stop)}
    state = copy.deepcopy(first.state_dict())
    assert state == {"next_step": 28}
    second = loader(max_steps=100, block=10)  # other blocks from here on
    second.load_state_dict(state)
    blocks = [(b.start, b.stop) for b in second]
    assert blocks[0] == (28, 30)
    second.load_state_dict(state)
    assert_same(done | steps(second), steps(loader(max_steps=100)))
    assert second.state_dict() == {"next_step": 100}
    with pytest.raises(RuntimeError, match="100 of 100"):
        list(second)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shares_of_the_ranks_make_the_batch(world_size: int) -> None:
    """5 ranks on batches of 4 and 2: some have no row."""
    whole = steps(loader())
    ranks = [list(loader(rank=r, world_size=world_size)) for r in range(world_size)]
    for blocks in zip(*ranks, strict=True):
        assert len({(b.start, b.stop) for b in blocks}) == 1
        for s in range(blocks[0].start, blocks[0].stop):
            batches = [b.batch(s) for b in blocks]
            assert torch.equal(torch.cat([b.columns[0][..., 0] for b in batches], dim=1), whole[s])
            at = 0
            for b in batches:
                rows = b.columns[0].shape[1]
                assert (b.first, b.total) == (at, whole[s].shape[1])
                assert rows - whole[s].shape[1] // world_size in (0, 1)
                at += rows


def test_max_steps_cuts_and_changes_nothing_before() -> None:
    whole = steps(loader(max_steps=40))
    assert_same(steps(loader(max_steps=11)), {s: whole[s] for s in range(11)})


def test_a_replica_of_many_is_the_solo_loader() -> None:
    many = steps(loader(max_steps=200))
    for r, seed in enumerate(SEEDS):
        solo = steps(loader(max_steps=200, seeds=[seed]))
        for s in many:
            assert torch.equal(many[s][r], solo[s][0])


def test_permutations_do_not_depend_on_where_they_start() -> None:
    whole = loader().permutations(0, 200)
    for first, passes in ((0, 1), (63, 1), (63, 2), (64, 64), (100, 100), (1, 130)):
        np.testing.assert_array_equal(loader().permutations(first, passes), whole[:, first : first + passes])


def test_orders_are_those_of_a_whole_block_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are drawn at a time, the numbers are those of SHUFFLE_BLOCK passes drawn together."""
    rows = np.tile(np.arange(N), (SHUFFLE_BLOCK, 1))
    expected = np.stack([keyed_generator(s, 1, "shuffle").permuted(rows, axis=1) for s in SEEDS])
    for chunk in (1, 3 * N, 10**6):
        monkeypatch.setattr("lightning_toys.training.loader.CHUNK_ROWS", chunk)
        source = loader()
        for k in (0, 1, 5, 2, 63):  # the third was dropped: it is drawn again
            np.testing.assert_array_equal(source.permutations(SHUFFLE_BLOCK + k, 1)[:, 0], expected[:, k])


def test_a_short_run_on_many_rows_draws_and_gathers_what_it_uses() -> None:
    n = CHUNK_ROWS + 1
    source = loader(max_steps=3, block=50, n=n)
    (block,) = list(source)
    assert source.streams is not None
    assert source.streams.next == 1
    assert [x.shape[1:3] for x in block.columns] == [(1, 12)] * 2
    whole = loader(max_steps=n, block=50, n=n).permutations(0, 1)[:, 0]
    for s in range(3):
        rows = block.batch(s).columns[0][..., 0]
        assert torch.equal(
            rows, table(n=n)[0][torch.arange(3)[:, None], torch.from_numpy(whole[:, 4 * s : 4 * s + 4]), 0]
        )


def test_length_is_never_reached() -> None:
    assert len(loader(max_steps=40)) >= 40
    assert len(loader(max_steps=0)) >= 1


def test_bad_batch_size() -> None:
    for make in (lambda: loader(batch=0), lambda: ToyDataModule(0)):
        with pytest.raises(ToyError, match=r"--data\.batch_size: 0 "):
            make()


def test_one_batch() -> None:
    batch = torch.arange(3)
    assert [torch.equal(b, batch) for b in OneBatch(batch)] == [True]
    assert len(OneBatch(batch)) == 1


def test_block_steps_divide_every_interval() -> None:
    assert block_steps() == MAX_BLOCK == 50
    assert block_steps(100) == 50
    assert block_steps(1000, 75) == 25
    assert block_steps(60) == 30
    assert block_steps(97) == 1
    assert block_steps(7) == 7
    for a in range(1, 121):
        for b in (1, 12, 100, 250):
            divisors = [d for d in range(1, 51) if a % d == 0 and b % d == 0]
            assert block_steps(a, b) == max(divisors)


# ToyModule


def test_check_seeds() -> None:
    assert check_seeds((4, 0, 9)) == [4, 0, 9]
    assert json.dumps(check_seeds([np.int64(3), 5])) == "[3, 5]"
    for bad in ([], [1, -2], [3, 5, 3], [True], [1, 2.0], ["a"]):
        with pytest.raises(ToyError, match=r"--model\.seeds") as error:
            check_seeds(bad)
        assert str(bad) in str(error.value)


def test_options_given_as_plain_values() -> None:
    assert as_dataclass(Network, {"hidden": 3}) == Network(hidden=3)
    assert as_dataclass(Network, None, Network(hidden=5)).hidden == 5
    for given, says in (
        (
            {"hiden": 3},
            "Network: a setting 'hiden' is not allowed; give some of kind, .*; did you mean 'hidden'",
        ),
        ({3: 3}, "Network: a setting 3 is not allowed"),
        ("film", "Network: 'film' is not allowed; give a Network, or a dict of kind, hidden, "),
    ):
        with pytest.raises(ToyError, match=says):
            as_dataclass(Network, given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"lr": 0.0}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": "x"}, "ema_decay"),
        ({"lr": True}, "lr"),
        ({"compile": "false"}, "compile"),
        ({"lr_decay": "Cosine"}, "lr_decay"),
        ({"ema_decay": 0.0}, "ema_decay"),
        ({"seeds": [1, 1]}, "seeds"),
    ],
)
def test_bad_values_name_the_flag(values: dict[str, float], flag: str) -> None:
    with pytest.raises(ToyError, match=rf"--model\.{flag}: "):
        ToyModule(**{"seeds": [0], **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 100.0])
def test_clip_per_replica_is_torchs_for_each(max_norm: float) -> None:
    """Gradient norms about 1, 10 and 100: some clipped, some not."""
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.2, 2.0, 20.0], dtype=torch.float64)
    shapes = [(3, 4, 5), (3, 1, 5), (3, 6)]
    parameters = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes] + [nn.Parameter(torch.zeros(3, 2))]
    for p in parameters[:3]:
        p.grad = torch.randn(p.shape, generator=g).double() * scale.view(-1, *[1] * (p.dim() - 1))
    solo = [[nn.Parameter(p.detach()[r].clone()) for p in parameters[:3]] for r in range(3)]
    for r in range(3):
        for p, q in zip(parameters, solo[r], strict=False):
            assert p.grad is not None
            q.grad = p.grad[r].clone()
        nn.utils.clip_grad_norm_(solo[r], max_norm)
    clip_per_replica(parameters, max_norm)
    assert parameters[3].grad is None
    for r in range(3):
        for p, q in zip(parameters, solo[r], strict=False):
            assert p.grad is not None
            torch.testing.assert_close(p.grad[r], q.grad, rtol=1e-12, atol=0)


def test_clipping_one_replica_leaves_the_others_alone() -> None:
    p = nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.tensor([[torch.inf, 0.0, 0.0], [0.1, 0.2, 0.3]])
    clip_per_replica([p], 1.0)
    assert torch.equal(p.grad[1], torch.tensor([0.1, 0.2, 0.3]))


def with_net(seeds: Sequence[int] = (0, 1, 2)) -> ToyModule:
    module = ToyModule(seeds)
    module.net = Network(hidden=4, layers=1).build(seeds, 1, 1, False)
    return module


def test_keep_best_keeps_each_replicas_own_best() -> None:
    module = with_net()
    module.best_net = module.shadow()
    history = []
    for scores in ([3.0, 1.0, 2.0], [2.0, 5.0, float("nan")], [2.5, 1.0, 1.0]):
        with torch.no_grad():
            for p in module.net.parameters():
                p += 1
        history.append([p.detach().clone() for p in module.net.parameters()])
        module.keep_best(torch.tensor(scores))
    assert module.best_score.tolist() == [2.0, 1.0, 1.0]
    for i, kept in enumerate(module.best_net.parameters()):
        assert not kept.requires_grad
        for r, when in enumerate([1, 0, 2]):
            assert torch.equal(kept[r], history[when][i][r])


def test_keep_best_without_a_copy_does_nothing() -> None:
    module = with_net()
    module.keep_best(torch.zeros(3))
    assert module.best_score.isinf().all()


def test_weights_that_are_not_finite_are_named_by_seed() -> None:
    module = with_net([5, 7, 9])
    module.check_finite_weights()
    with torch.no_grad():
        next(module.net.parameters())[1].view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"seeds \[7\]"):
        module.check_finite_weights()


def test_a_block_knows_its_passes() -> None:
    block = loader().block(7, 14)  # passes 2, 3 and 4
    assert isinstance(block, Block)
    assert (block.first_pass, block.columns[0].shape) == (2, (3, 3, N, 1))
    assert loader().block(7, 12).columns[0].shape == (3, 2, N, 1)  # step 12 would open pass 4
