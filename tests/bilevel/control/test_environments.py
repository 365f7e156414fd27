import inspect
import io
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_toys.bilevel.control.cartpole import CartPole
from lightning_toys.bilevel.control.environments import Disturbance, Environments, Transition, reset_seed
from lightning_toys.bilevel.control.episodes import RandomPolicy, check_repeatable, render_episode, rollout, write_gif
from lightning_toys.bilevel.control.gymnasium_environments import GymnasiumEnvironments, make_environments, vectoriser
from lightning_toys.errors import ToyError

NONE = Disturbance()
BOTH = Disturbance(distractors=3, drift=5.0, drift_period=40, drift_width=4.0)


def balance(seen: np.ndarray) -> np.ndarray:
    """Push under the pole: lasts 500 steps and more."""
    return np.asarray(0.1 * seen[..., 0] + 0.3 * seen[..., 1] + 2 * seen[..., 2] + seen[..., 3] > 0, dtype=np.int64)


def actions(environments: Environments, rng: np.random.Generator, noise: float) -> np.ndarray:
    random = rng.integers(environments.num_actions, size=environments.shape)
    if not isinstance(environments, CartPole):
        return random
    return np.where(rng.random(environments.shape) < noise, random, balance(environments.observation))


def assert_same(a: Transition, b: Transition, where: str = "") -> None:
    for name, x, y in zip(Transition._fields, a, b, strict=True):
        assert x.dtype == y.dtype, f"{where}/{name}"
        assert np.array_equal(x, y), f"{where}/{name}"


def part(t: Transition, r: slice, c: slice) -> Transition:
    return Transition(*(x[r, c] for x in t))


def test_cartpole_is_gymnasiums_to_the_last_bit() -> None:
    """Observations, rewards, both ends and resets of several hundred episodes, long ones among them."""
    seeds, copies, rng = [0, 3, 2**40], 3, np.random.default_rng(0)
    ours = make_environments("CartPole-v1", seeds, "train", copies)
    assert isinstance(ours, CartPole)
    theirs = [[gymnasium.make("CartPole-v1") for _ in range(copies)] for _ in seeds]
    number = np.zeros(ours.shape, dtype=int)
    for r, c in np.ndindex(ours.shape):
        first, _ = theirs[r][c].reset(seed=reset_seed(seeds[r], "train", c, 0))
        assert np.array_equal(ours.observation[r, c], first)
    episodes, ends = 0, set()
    for t in range(3000):
        a = actions(ours, rng, 1.0 if t < 1500 else 0.0)
        step = ours.step(a)
        for r, c in np.ndindex(ours.shape):
            seen, reward, terminated, truncated, _ = theirs[r][c].step(int(a[r, c]))
            assert np.array_equal(step.next_observation[r, c], seen)
            assert step.reward[r, c] == reward
            assert bool(step.terminated[r, c]) is terminated
            assert bool(step.truncated[r, c]) is truncated
            if terminated or truncated:
                number[r, c] += 1
                seen, _ = theirs[r][c].reset(seed=reset_seed(seeds[r], "train", c, int(number[r, c])))
                ends.add((terminated, truncated))
            assert np.array_equal(ours.observation[r, c], seen)
        episodes += len(ours.finished_episodes)
    assert episodes > 500
    assert ends == {(True, False), (False, True)}


def test_cartpole_against_gymnasiums_vector_environment() -> None:
    """The physics step by step: theirs resets one step later, and from one generator for all."""
    theirs = gymnasium.make_vec("CartPole-v1", num_envs=6, vectorization_mode="vector_entry_point")
    shown, _ = theirs.reset(seed=0)
    vector: Any = theirs.unwrapped
    ours = CartPole([0, 1, 2], "train", 2, NONE)
    rng, compared = np.random.default_rng(0), 0
    for _ in range(300):
        ours.physics = vector.state.copy().reshape(4, 3, 2)
        a = rng.integers(2, size=6)
        live = ~vector.prev_done
        shown, reward, terminated, _, _ = theirs.step(a)
        step = ours.step(a.reshape(3, 2))
        assert np.array_equal(step.next_observation.reshape(6, 4)[live], shown[live])
        assert np.array_equal(step.reward.reshape(6)[live], reward[live])
        assert np.array_equal(step.terminated.reshape(6)[live], terminated[live])
        compared += int(live.sum())
    assert compared > 1500
    theirs.close()


@pytest.mark.parametrize("disturbance", [NONE, Disturbance(distractors=3)])
def test_both_classes_agree(disturbance: Disturbance) -> None:
    fast = CartPole([0, 1], "train", 2, disturbance)
    slow = GymnasiumEnvironments("CartPole-v1", [0, 1], "train", 2, disturbance)
    rng = np.random.default_rng(0)
    for _ in range(400):
        a = actions(fast, rng, 0.7)
        assert_same(fast.step(a), slow.step(a))
        assert np.array_equal(fast.observation, slow.observation)
        assert fast.finished_episodes == slow.finished_episodes


@pytest.mark.parametrize(
    ("name", "disturbance"),
    [("CartPole-v1", NONE), ("CartPole-v1", BOTH), ("Acrobot-v1", NONE), ("MountainCar-v0", Disturbance(2))],
)
def test_a_replica_of_many_is_the_solo_run(name: str, disturbance: Disturbance) -> None:
    """And a copy of many the copy of few. Episodes end meanwhile."""
    seeds, rng, ended = [7, 8, 9], np.random.default_rng(0), 0
    many = make_environments(name, seeds, "train", 2, disturbance)
    solo = [make_environments(name, [s], "train", 1, disturbance) for s in seeds]
    for _ in range({"CartPole-v1": 60, "Acrobot-v1": 510}.get(name, 210)):
        a = actions(many, rng, 1.0)
        step = many.step(a)
        ended += len(many.finished_episodes)
        for r, one in enumerate(solo):
            assert_same(one.step(a[r : r + 1, :1]), part(step, slice(r, r + 1), slice(1)), str(r))
            assert np.array_equal(one.observation[0, 0], many.observation[r, 0])
    assert ended
    assert len(np.unique(many.observation[..., 0])) == 6  # none the twin of another


def test_streams_see_other_episodes() -> None:
    first = [make_environments("CartPole-v1", [0], stream).observation for stream in ("train", "evaluate")]
    assert not np.isin(first[0], first[1]).any()
    starts = [reset_seed(s, n, c, e) for s in range(9) for n in "ab" for c in range(3) for e in range(9)]
    assert len(set(starts)) == len(starts)
    assert min(starts) >= 0


def test_a_transition_ends_where_the_episode_does_and_the_next_begins_anew() -> None:
    one = make_environments("CartPole-v1", [0], "train")
    push = np.ones((1, 1), dtype=np.int64)
    seen = one.observation
    for _ in range(50):
        step = one.step(push)
        assert np.array_equal(step.observation, seen)  # of the episode before the step
        assert not step.truncated.any()
        seen = one.observation
        if step.terminated[0, 0]:
            break
        assert np.array_equal(seen, step.next_observation)
    assert abs(step.next_observation[0, 0, 2]) > 12 * math.pi / 180
    assert np.abs(seen).max() <= 0.05
    (episode,) = one.finished_episodes
    assert (episode.replica, episode.copy, episode.number) == (0, 0, 0)
    assert episode.total_reward == episode.length == one.steps
    one.step(push)
    assert one.finished_episodes == []


def test_what_a_step_returned_is_not_written_to() -> None:
    one = make_environments("CartPole-v1", [0, 1], "train", 2, BOTH)
    steps, kept = [], []
    rng = np.random.default_rng(0)
    for _ in range(60):
        steps.append(one.step(actions(one, rng, 1.0)))
        kept.append(Transition(*(x.copy() for x in steps[-1])))
    for a, b in zip(steps, kept, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    ("name", "disturbance"),
    [("CartPole-v1", NONE), ("CartPole-v1", BOTH), ("Acrobot-v1", Disturbance(2)), ("MountainCar-v0", NONE)],
)
@pytest.mark.parametrize("before", [0, 37, 230])
def test_a_state_goes_on_bit_for_bit(name: str, disturbance: Disturbance, before: int) -> None:
    rng = np.random.default_rng(0)

    def fresh() -> Environments:
        return make_environments(name, [0, 5], "train", 2, disturbance)

    straight = fresh()
    for _ in range(before):
        straight.step(actions(straight, rng, 1.0))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = fresh()
    resumed.step(actions(resumed, rng, 1.0))  # whatever it did before is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert np.array_equal(straight.observation, resumed.observation)
    for _ in range(220):
        a = actions(straight, rng, 1.0)
        assert_same(straight.step(a), resumed.step(a))
        assert np.array_equal(straight.observation, resumed.observation)
        assert straight.finished_episodes == resumed.finished_episodes
    assert resumed.steps == before + 220


def test_a_state_is_a_copy() -> None:
    one = make_environments("CartPole-v1", [0], "train", 1, BOTH)
    state = one.state_dict()
    kept = {k: v.clone() for k, v in state.items()}
    for _ in range(30):
        one.step(np.ones((1, 1)))
    assert all(torch.equal(state[k], kept[k]) for k in kept)


def test_a_state_of_other_environments_is_refused() -> None:
    state = make_environments("CartPole-v1", [0, 1], "train").state_dict()
    with pytest.raises(ToyError, match=r"episodes is \(2, 1\), where \(3, 1\) is wanted"):
        make_environments("CartPole-v1", [0, 1, 2], "train").load_state_dict(state)


class Wilful(gymnasium.Env[np.ndarray, np.int64]):
    """Its noise does not come from its reset seed."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    shared = np.random.default_rng(0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.shared.random(1, dtype=np.float32), 0.0, False, False, {}


@pytest.fixture
def wilful() -> Iterator[str]:
    gymnasium.register("Wilful-v0", Wilful)
    yield "Wilful-v0"
    del gymnasium.registry["Wilful-v0"]


def test_an_environment_that_cannot_be_played_again_is_not_resumed(wilful: str) -> None:
    one = make_environments(wilful, [0], "train")
    one.step(np.zeros((1, 1)))
    with pytest.raises(ToyError, match=r"--model\.env: Wilful-v0 cannot be resumed"):
        make_environments(wilful, [0], "train").load_state_dict(one.state_dict())


def test_distractors_are_noise_of_their_own_that_outlasts_episodes() -> None:
    one = make_environments("CartPole-v1", [0, 1], "train", 2, Disturbance(distractors=5))
    plain = make_environments("CartPole-v1", [0, 1], "train", 2)
    assert one.observation_size == 9
    rng, rows = np.random.default_rng(0), []
    for _ in range(5000):
        a = actions(one, rng, 1.0)
        step, bare = one.step(a), plain.step(a)
        assert np.array_equal(step.next_observation[..., :4], bare.next_observation)
        assert np.array_equal(step.reward, bare.reward)
        rows.append(one.observation[..., 4:])
        assert np.array_equal(rows[-1], step.next_observation[..., 4:])
    x = np.stack(rows).reshape(5000, 20).astype(float)
    samples = x.size * (1 - 0.9) / (1 + 0.9)  # independent ones
    assert abs(x.mean()) < 5 / math.sqrt(samples)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / (x.size * (1 - 0.81) / (1 + 0.81)))
    noise = (x[1:] - 0.9 * x[:-1]) / math.sqrt(0.19)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.size)
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / math.sqrt(noise.size)
    between = np.corrcoef(noise.T) - np.eye(20)  # replicas, copies, dimensions
    assert np.abs(between).max() < 5 / math.sqrt(5000)
    # the first is of the stationary distribution
    first = make_environments("CartPole-v1", range(500), "x", 1, Disturbance(4)).observation[..., 4:].astype(float)
    assert abs(first.var() - 1) < 5 * math.sqrt(2 / 2000)


def test_the_rewarded_band_moves() -> None:
    d = Disturbance(drift=6.0, drift_period=8, drift_width=3.0)
    assert [round(d.centre(t), 9) for t in (0, 2, 4, 6, 8)] == [0, 6, 0, -6, 0]
    one = CartPole([0, 1], "train", 1, d)
    rng, seen = np.random.default_rng(0), set()
    for t in range(400):
        for clock in (None, 2, 6):
            at = t if clock is None else clock
            before, a = one.state_dict(), actions(one, rng, 1.0)
            step = one.step(a, clock)
            degrees = (
                np.degrees(one.physics[2]) if not one.finished_episodes else np.degrees(step.next_observation[..., 2])
            )
            away = np.abs(degrees - 6 * math.sin(2 * math.pi * at / 8))
            assert np.array_equal(step.reward, (away < 3).astype(np.float32))
            seen |= set(zip(step.reward.ravel().tolist(), [clock] * 2, strict=True))
            if clock is not None:
                one.load_state_dict(before)
        if one.steps == t:  # the last was undone
            one.step(a)
    assert len(seen) == 6
    ofbo = Disturbance(drift=4.283, drift_shape="linear", drift_period=200_000, drift_width=7.721)
    centres = [ofbo.centre(t) for t in (0, 100_000, 200_000, 300_000)]
    ends = [(c - ofbo.drift_width, c + ofbo.drift_width) for c in centres]
    expected = [(-0.2095, 0.06), (-0.13475, 0.13475), (-0.06, 0.2095), (-0.06, 0.2095)]  # radians, of its trainer.py
    assert np.radians(ends) == pytest.approx(np.array(expected), abs=2e-5)
    still = make_environments("CartPole-v1", [0], "train", 1, Disturbance(drift=0.0, drift_width=1e-9))
    assert all((still.step(np.ones((1, 1))).reward == 1).all() for _ in range(30))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPole-v7", r"--model\.env: 'CartPole-v7' is not allowed; .* did you mean 'CartPole-v1'\?"),
        ("Pendulum-v1", r"--model\.env: 'Pendulum-v1' is not allowed: it takes Box.*; give one that takes Discrete"),
        ("Blackjack-v1", r"'Blackjack-v1' is not allowed: .* shows Tuple.*; give one"),
        ("no_such_package:X-v0", r"'no_such_package:X-v0' cannot be made: .*; give"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ToyError, match=message) as caught:
        make_environments(name, [0], "train")
    assert "\n" not in str(caught.value)


class Shifted(Wilful):
    action_space = gymnasium.spaces.Discrete(2, start=1)


class Named(Wilful):
    observation_space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Box(-1, 1, (1,))})  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Shifted, Named])
def test_actions_from_one_and_dictionaries_are_refused(kind: type[Wilful]) -> None:
    gymnasium.register("Strange-v0", kind)
    try:
        with pytest.raises(ToyError, match="'Strange-v0' is not allowed: it takes"):
            make_environments("Strange-v0", [0], "train")
    finally:
        del gymnasium.registry["Strange-v0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distractors": -1}, r"--model\.disturbance\.distractors: -1 is not allowed"),
        ({"drift": 12.0}, r"--model\.disturbance\.drift: 12\.0 is not allowed"),
        ({"drift": float("nan")}, r"--model\.disturbance\.drift: nan is not allowed"),
        ({"drift_shape": "saw"}, r"--model\.disturbance\.drift_shape: 'saw' is not allowed; give sine or linear"),
        ({"drift_period": 0}, r"--model\.disturbance\.drift_period: 0 is not allowed"),
        ({"drift_width": 0.0}, r"--model\.disturbance\.drift_width: 0\.0 is not allowed"),
    ],
)
def test_bad_disturbances_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ToyError, match=message):
        Disturbance(**options)


def test_only_cartpole_drifts() -> None:
    with pytest.raises(
        ToyError, match=r"--model\.disturbance\.drift: 5\.0 is not allowed with --model\.env Acrobot-v1"
    ):
        make_environments("Acrobot-v1", [0], "train", 1, BOTH)


def test_a_missing_gymnasium_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ToyError, match=r"pip install 'lightning-toys\[control\]'"):
        make_environments("Acrobot-v1", [0], "train")
    with pytest.raises(ToyError, match=r"pip install 'lightning-toys\[control\]'"):
        render_episode("CartPole-v1", lambda seen: 0, 0)
    make_environments("CartPole-v1", [0], "train").step(np.zeros((1, 1)))  # needs none


def test_importing_imports_no_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)  # importing it fails
    assert "CartPole" in runpy.run_path(str(inspect.getsourcefile(make_environments)))


def test_an_evaluation_is_a_function_of_its_number() -> None:
    environments = make_environments("CartPole-v1", [0, 1, 2], "evaluate", 10, Disturbance(2))
    assert rollout(environments, balance)[0].min() > 100  # the policy can

    def poor(seen: np.ndarray) -> np.ndarray:
        # looks at the distractors too
        return np.asarray(seen[..., 2] + 0.03 * seen[..., 4] > 0, dtype=np.int64)

    first, lengths = rollout(environments, poor, 3)
    assert first.shape == (3, 10)
    assert np.array_equal(first, lengths)
    assert len(np.unique(first)) > 3
    other, _ = rollout(environments, poor, 4)
    assert not np.array_equal(first, other)
    assert np.array_equal(rollout(environments, poor, 3)[0], first)
    alone = make_environments("CartPole-v1", [1], "evaluate", 2, Disturbance(2))
    assert np.array_equal(rollout(alone, poor, 3)[0], first[1:2, :2])
    # one by one, by hand
    alone.reset(3)
    totals = np.zeros(2)
    while (alone.episodes == 3).any():
        running = alone.episodes[0] == 3
        totals += running * alone.step(poor(alone.observation)).reward[0]
    assert np.array_equal(totals, first[1, :2])


def test_random_actions() -> None:
    """Every action as often, keyed by seed and step; CartPole's known return, far above that of one action for ever."""
    seeds = [4, 1]

    def drawn(seeds: list[int], copies: int = 3) -> np.ndarray:
        policy = RandomPolicy(make_environments("Acrobot-v1", seeds, "test", copies))
        return np.stack([policy(np.empty(0)) for _ in range(2000)])

    actions = drawn(seeds)
    assert np.array_equal(actions, drawn(seeds))
    assert np.array_equal(actions[:, 1:], drawn([1]))
    share = np.bincount(actions.ravel(), minlength=3) / actions.size
    assert np.abs(share - 1 / 3).max() < 5 * (2 / 9 / actions.size) ** 0.5
    environments = make_environments("CartPole-v1", list(range(8)), "test", 100)
    totals, lengths = rollout(environments, RandomPolicy(environments))
    # 20 000 episodes of gymnasium's own environment, with numpy's draws, have mean 22.2 and deviation 11.9
    assert abs(totals.mean() - 22.2) < 4 * 11.9 / totals.size**0.5
    assert np.array_equal(totals, lengths)
    left, _ = rollout(environments, lambda x: np.zeros(x.shape[:2], dtype=np.int64))
    assert left.mean() < 10


def test_an_evaluation_is_cut_at_its_limit() -> None:
    environments = make_environments("CartPole-v1", [0], "evaluate", 2)
    assert np.array_equal(rollout(environments, balance, limit=30)[0], [[30, 30]])


def test_an_evaluation_may_hold_the_drift_still() -> None:
    d = Disturbance(drift=11.0, drift_period=4000, drift_width=2.0)
    environments = make_environments("CartPole-v1", [0], "evaluate", 3, d)
    centred, _ = rollout(environments, balance, drift_step=0)
    shifted, lengths = rollout(environments, balance, drift_step=1000)
    assert (centred > 0.9 * lengths).all()
    assert (shifted < 0.1 * lengths).all()


@pytest.mark.parametrize(("name", "limit", "frames"), [("CartPole-v1", 10_000, None), ("MountainCar-v0", 5, 6)])
def test_an_episode_is_recorded(name: str, limit: int, frames: int | None, tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def policy(observation: np.ndarray) -> int:
        seen.append(observation)
        return int(observation[-1] > -9)  # always 1

    pictures = render_episode(name, policy, 3, Disturbance(2), limit)
    assert len(pictures) == len(seen) + 1
    assert frames in (None, len(pictures))
    assert seen[0].shape == ((6,) if name == "CartPole-v1" else (4,))
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in pictures)
    assert not np.array_equal(pictures[0], pictures[-1])
    if name == "CartPole-v1":
        same = make_environments(name, [3], "record", 1, Disturbance(2))
        for observation in seen:
            assert np.array_equal(same.observation[0, 0], observation)
            same.step(np.ones((1, 1)))
        assert same.finished_episodes  # the pictures end where the episode does
    write_gif(pictures, tmp_path / "a.gif", fps=25)
    with Image.open(tmp_path / "a.gif") as gif:
        total = 0
        for i in range(gif.n_frames):  # type: ignore[attr-defined]
            gif.seek(i)
            total += gif.info["duration"]
        assert total == 40 * len(pictures)  # Pillow draws equal pictures once, for longer
        last = np.asarray(gif.convert("RGB")).astype(int)
    assert last.shape == pictures[-1].shape
    assert np.abs(last - pictures[-1]).mean() < 2


def test_an_animation_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToyError, match="without pictures"):
        write_gif([], tmp_path / "a.gif")


@pytest.mark.parametrize("broken", [{}, {"FORCES": -CartPole.FORCES}, {"TAU": CartPole.TAU * (1 + 1e-7)}])
def test_the_bitwise_check_sees_wrong_physics(broken: dict[str, Any]) -> None:
    """Negative control: a force that pushes the other way; a time step off by a ten-millionth."""
    ours, theirs = CartPole([0], "train", 1, NONE), GymnasiumEnvironments("CartPole-v1", [0], "train", 1, NONE)
    vars(ours).update(broken)
    same = True
    for _ in range(100):
        a = balance(theirs.observation)
        same &= np.array_equal(ours.step(a).next_observation, theirs.step(a).next_observation)
    assert same is not bool(broken)


# numbered observations, and environments that no seed repeats


def test_a_numbered_observation_is_a_one_hot_vector() -> None:
    environments = make_environments("FrozenLake-v1", [0, 4], "train")
    assert environments.observation_size == 16
    assert environments.num_actions == 4
    theirs = gymnasium.make("FrozenLake-v1")
    number, _ = theirs.reset(seed=reset_seed(4, "train", 0, 0))
    for action in (2, 2, 1, 1, 0, 2):
        assert environments.observation[1, 0].tolist() == np.eye(16)[number].tolist()
        number, _, over, _, _ = theirs.step(action)
        transition = environments.step(np.full((2, 1), action))
        assert transition.next_observation[1, 0].argmax() == number
        if over:
            break
    shifted = vectoriser(gymnasium.spaces.Discrete(3, start=5))
    assert shifted(np.int64(6)).tolist() == [0, 1, 0]
    first = shifted(5)
    first[0] = 7  # nobody's write reaches the next one
    assert shifted(5).tolist() == [1, 0, 0]


def test_a_numbered_observation_resumes() -> None:
    one, two = (make_environments("FrozenLake-v1", [3], "train") for _ in range(2))
    for action in (2, 1, 0, 1, 2):
        one.step(np.array([[action]]))
    two.load_state_dict(one.state_dict())
    for action in (1, 2, 1):
        a, b = (e.step(np.array([[action]])) for e in (one, two))
        assert np.array_equal(a.next_observation, b.next_observation)


class Restless(gymnasium.Env):  # type: ignore[type-arg]
    """Its wind is not of its seed: of a generator for all, or of how often it was reset."""

    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (1,)), gymnasium.spaces.Discrete(2)

    def __init__(self, wind: str = "none") -> None:
        self.wind, self.resets = wind, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.resets = 0, self.resets + 1
        return self.np_random.normal(size=1), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        blows = self.t >= 3
        winds = {
            "none": 0.0,
            "global": np.random.normal() * blows,
            "resets": 0.1 * self.resets * blows,
        }
        return self.np_random.normal(size=1) + winds[self.wind], 1.0, self.t == 9, False, {}


@pytest.mark.parametrize("wind", ["none", "global", "resets"])
def test_an_environment_that_no_seed_repeats_is_found(wind: str) -> None:
    name = f"Restless{wind}-v0"
    gymnasium.register(name, entry_point=lambda: Restless(wind))
    try:
        if wind == "none":
            check_repeatable(name)
            check_repeatable(name, Disturbance(2))
        else:
            with pytest.raises(ToyError, match=rf"--model.env: '{name}' is not allowed: .* differs at step 3; let it"):
                check_repeatable(name)
    finally:
        del gymnasium.registry[name]


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1", "FrozenLake-v1"])
def test_environments_that_their_seed_repeats(name: str) -> None:
    check_repeatable(name)
