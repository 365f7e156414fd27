"""Environments side by side: one a replica (times copies), stepped together, each a pure function of its seed.

Episode e of copy c of the replica with seed s starts with a reset seed that is keyed by (s, stream, c, e). So replica r
of many is the solo run of its seed, bit for bit, and a checkpoint holds no generator's state.

CartPole-v1 has NumPy physics over all environments at once (Barto, Sutton & Anderson 1983, as gymnasium writes them, to
the last bit); every other environment of gymnasium with numbered actions and a vector to observe is stepped in a loop.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import ToyError, did_you_mean, require
from lightning_toys.training.noise import NoiseStream, keyed_generator

CARTPOLE = "CartPole-v1"
MEMORY = 0.9  # of a distractor, per environment step
SEGMENT = 2**32  # distractor steps set apart for each restart
LIKE = torch.empty(0)


class Transition(NamedTuple):
    """What one step did, arrays (R, copies, ...) that nobody writes to afterwards.

    Attributes:
        observation: float32, before the step.
        action: int64.
        reward: float32.
        next_observation: float32, what the step led to: never the first observation of the episode after.
        terminated: bool; the task is over, and no value follows.
        truncated: bool; the time limit cut the episode, and values go on.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Episode(NamedTuple):
    """An episode that ended: where, its number, the undiscounted sum of its rewards, and its steps."""

    replica: int
    copy: int
    number: int
    total: float
    length: int


@dataclass
class Disturbance:
    """What is put on top of a task.

    Args:
        distractors: further observed numbers that have nothing to do with the task: x' = .9 x + sqrt(1 - .81) noise, of
            variance 1, going on over the ends of episodes.
        drift: degrees; CartPole's reward is 1 only where the pole's angle after the step is within ``drift_width`` of a
            centre ``drift * sin(2 pi t / drift_period)``, else 0. 0 is off: the reward is gymnasium's.
        drift_period: environment steps from one swing of the centre to the next.
        drift_width: degrees, half the band's width. An episode ends at 12 degrees.
    """

    distractors: int = 0
    drift: float = 0.0
    drift_period: int = 10_000
    drift_width: float = 6.0

    def __post_init__(self) -> None:
        flag = "--model.disturbance"
        n, period, width = self.distractors, self.drift_period, self.drift_width
        require(0 <= n <= 10_000, f"{flag}.distractors: {n} is not allowed; give an integer from 0 to 10000")
        require(0 <= self.drift < 12, f"{flag}.drift: {self.drift} is not allowed; give degrees from 0 to below 12")
        require(period >= 1, f"{flag}.drift_period: {period} is not allowed; give an integer >= 1")
        require(0 < width <= 24, f"{flag}.drift_width: {width} is not allowed; give degrees above 0, at most 24")

    def centre(self, clock: int) -> float:
        """Return the middle of the rewarded band of angles at environment step ``clock``, in degrees."""
        return self.drift * math.sin(2 * math.pi * clock / self.drift_period)


def reset_seed(seed: int, stream: str, copy: int, episode: int) -> int:
    """Return what an episode is reset with."""
    return int(keyed_generator(seed, episode, f"{stream}/reset/{copy}").integers(2**31 - 1))


class Environments(ABC):
    """R x copies environments of one kind.

    An environment whose episode ended is reset within the same :meth:`step`. ``observation`` (R, copies, obs), float32,
    is what the next action is chosen on; ``finished`` are the episodes that the last step ended; ``steps`` counts from
    the (re)start.

    Args:
        seeds: one seed a replica.
        stream: name of the use, such as ``"train"``; other names see other episodes.
        copies: environments of each replica. Copy c is the same whatever their number.
        disturbance: what is put on top.
        task_size: numbers that the task itself shows.
        actions: number of actions.
    """

    def __init__(
        self, seeds: Sequence[int], stream: str, copies: int, disturbance: Disturbance, task_size: int, actions: int
    ) -> None:
        self.seeds, self.stream, self.copies, self.disturbance = tuple(seeds), stream, copies, disturbance
        self.actions, self.shape = actions, (len(self.seeds), copies)
        self.observation_size = task_size + disturbance.distractors
        shape = (disturbance.distractors,)
        self._noise = [NoiseStream(self.seeds, f"{stream}/distractors/{c}", shape) for c in range(copies)]
        self.restart()

    @abstractmethod
    def begin(self, replica: int, copy: int, seed: int) -> np.ndarray:
        """Reset one environment and return what it shows, (task_size,)."""

    @abstractmethod
    def advance(self, action: np.ndarray, clock: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take one step everywhere; return new arrays: shown float32, reward float32, terminated, truncated bool."""

    def close(self) -> None:
        """Let go of what the environments hold on to."""
        return

    def restart(self, episode: int = 0) -> None:
        """Begin episode number ``episode`` everywhere, whatever happened before."""
        self.origin, self.steps, self.finished = episode, 0, list[Episode]()
        self.episodes = np.full(self.shape, episode, dtype=np.int64)
        self.lengths = np.zeros(self.shape, dtype=np.int64)
        self.totals = np.zeros(self.shape)
        self.distraction = self._draw()  # the first is of the stationary law
        self.observation = np.stack([[self._begin(r, c) for c in range(self.shape[1])] for r in range(self.shape[0])])

    def step(self, action: np.ndarray, clock: int | None = None) -> Transition:
        """Take one step in every environment.

        Args:
            action: (R, copies), from 0 to ``actions`` - 1.
            clock: environment step that the drift is taken at; counted from the restart where it is not given.
        """
        action = np.asarray(action, dtype=np.int64)
        assert action.shape == self.shape, f"actions {action.shape}, where {self.shape} are wanted"
        before, self.finished = self.observation, []
        shown, reward, terminated, truncated = self.advance(action, self.steps if clock is None else clock)
        self.steps += 1
        self.lengths += 1
        self.totals += reward
        if self._noise[0].shape[0]:
            self.distraction = MEMORY * self.distraction + math.sqrt(1 - MEMORY**2) * self._draw()
            shown = np.concatenate([shown, self.distraction], axis=-1)
        self.observation = shown
        over = terminated | truncated
        if over.any():
            self.observation = shown.copy()
            for r, c in np.argwhere(over).tolist():
                number, total, length = int(self.episodes[r, c]), float(self.totals[r, c]), int(self.lengths[r, c])
                self.finished.append(Episode(r, c, number, total, length))
                self.episodes[r, c] += 1
                self.lengths[r, c] = self.totals[r, c] = 0
                self.observation[r, c] = self._begin(r, c)
        return Transition(before, action, reward, shown, terminated, truncated)

    def _begin(self, r: int, c: int) -> np.ndarray:
        seed = reset_seed(self.seeds[r], self.stream, c, int(self.episodes[r, c]))
        return np.concatenate([self.begin(r, c, seed), self.distraction[r, c]], dtype=np.float32)

    def _draw(self) -> np.ndarray:
        """Draw the distractors' noise of the present step, (R, copies, distractors)."""
        if not self.disturbance.distractors:
            return np.empty((*self.shape, 0), dtype=np.float32)
        return np.stack([n.at(self.origin * SEGMENT + self.steps, LIKE).numpy() for n in self._noise], axis=1)

    def state(self) -> dict[str, Tensor]:
        """Return all that :meth:`load` needs to go on bit for bit: plain tensors, no generator."""
        arrays = {k: getattr(self, k) for k in ("episodes", "lengths", "totals", "distraction", "observation")}
        where = torch.tensor([self.origin, self.steps])
        return {k: torch.from_numpy(v.copy()) for k, v in arrays.items()} | {"where": where}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of environments with the same seeds, stream and copies."""
        for name in ("episodes", "lengths", "totals", "distraction", "observation"):
            there, wanted = tuple(state[name].shape), getattr(self, name).shape
            require(there == wanted, f"the stored environments' {name} is {there}, where {wanted} is wanted")
            setattr(self, name, state[name].cpu().numpy().copy())
        self.origin, self.steps = (int(x) for x in state["where"].tolist())
        self.finished = []


class CartPole(Environments):
    """CartPole-v1: gymnasium's own numbers, all environments in one go.

    ``physics`` (4, R, copies), float64: the cart's position (m) and velocity, the pole's angle (rad) and velocity.
    """

    LIMIT, EDGE, FALL = 500, 2.4, 12 * 2 * math.pi / 360
    GRAVITY, POLE, TOTAL, LENGTH, MOMENT, TAU = 9.8, 0.1, 0.1 + 1.0, 0.5, 0.1 * 0.5, 0.02  # LENGTH: half the pole's
    FORCE = np.array([-10.0, 10.0])

    def __init__(self, seeds: Sequence[int], stream: str, copies: int, disturbance: Disturbance) -> None:
        self.physics = np.zeros((4, len(seeds), copies))
        super().__init__(seeds, stream, copies, disturbance, 4, 2)

    def begin(self, replica: int, copy: int, seed: int) -> np.ndarray:
        """See :meth:`Environments.begin`."""
        start = np.random.Generator(np.random.PCG64(seed)).uniform(-0.05, 0.05, size=4)
        self.physics[:, replica, copy] = start
        return start

    def advance(self, action: np.ndarray, clock: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`Environments.advance`."""
        _, v, theta, omega = self.physics
        cos, sin = np.cos(theta), np.sin(theta)
        # the order of the operations is gymnasium's, so that the rounding is too
        push = (self.FORCE[action] + self.MOMENT * np.square(omega) * sin) / self.TOTAL
        turn = (self.GRAVITY * sin - cos * push) / (self.LENGTH * (4.0 / 3.0 - self.POLE * np.square(cos) / self.TOTAL))
        pull = push - self.MOMENT * turn * cos / self.TOTAL
        new = np.empty_like(self.physics)
        new[0], new[1], new[2], new[3] = v, pull, omega, turn
        new *= self.TAU
        new += self.physics
        self.physics = new
        terminated = (np.abs(new[0]) > self.EDGE) | (np.abs(new[2]) > self.FALL)
        shown = new.transpose(1, 2, 0).astype(np.float32, order="C")
        if self.disturbance.drift:
            off = np.abs(np.degrees(new[2]) - self.disturbance.centre(clock))
            reward = (off < self.disturbance.drift_width).astype(np.float32)
        else:
            reward = np.ones(self.shape, dtype=np.float32)
        return shown, reward, terminated, self.lengths + 1 >= self.LIMIT

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Environments.state`."""
        return super().state() | {"physics": torch.from_numpy(self.physics.copy())}

    def load(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Environments.load`."""
        super().load(state)
        self.physics = state["physics"].cpu().numpy().copy()


class Gymnasium(Environments):
    """Environments of gymnasium in a loop.

    Their insides cannot be stored in general. What is stored is the actions since each reset: :meth:`load` plays them
    again, and checks that they lead to the stored observation.

    Args:
        name: of a registered environment.
        seeds: see :class:`Environments`.
        stream: see :class:`Environments`.
        copies: see :class:`Environments`.
        disturbance: see :class:`Environments`.
        render_mode: passed to ``gymnasium.make``.
    """

    def __init__(
        self,
        name: str,
        seeds: Sequence[int],
        stream: str,
        copies: int,
        disturbance: Disturbance,
        render_mode: str | None = None,
    ) -> None:
        self.name = name
        first = made(name, render_mode)
        size, actions = spaces_of(name, first)
        rest = (made(name, render_mode) for _ in range(len(seeds) * copies - 1))
        flat = [first, *rest]
        self.frames: list[np.ndarray] = []  # drawn where there is a render_mode
        self.members = [flat[i * copies : (i + 1) * copies] for i in range(len(seeds))]
        self.history: list[list[list[int]]] = [[[] for _ in range(copies)] for _ in seeds]
        super().__init__(seeds, stream, copies, disturbance, size, actions)

    def begin(self, replica: int, copy: int, seed: int) -> np.ndarray:
        """See :meth:`Environments.begin`."""
        self.history[replica][copy] = []
        return np.asarray(self.members[replica][copy].reset(seed=seed)[0], dtype=np.float32)

    def advance(self, action: np.ndarray, clock: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`Environments.advance`."""
        shown, reward, terminated, truncated = [], [], [], []
        for r, members in enumerate(self.members):
            for c, member in enumerate(members):
                a = int(action[r, c])
                self.history[r][c].append(a)
                outcome = member.step(a)
                if member.render_mode is not None:  # here, since a reset within the step would draw the next episode
                    self.frames.append(member.render())
                shown.append(np.asarray(outcome[0], dtype=np.float32))
                reward.append(outcome[1])
                terminated.append(outcome[2])
                truncated.append(outcome[3])
        return (
            np.stack(shown).reshape(*self.shape, -1),
            np.array(reward, dtype=np.float32).reshape(self.shape),
            np.array(terminated, dtype=bool).reshape(self.shape),
            np.array(truncated, dtype=bool).reshape(self.shape),
        )

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Environments.state`; the actions are padded with -1."""
        history = np.full((*self.shape, int(self.lengths.max())), -1, dtype=np.int32)
        for r, c in np.ndindex(self.shape):
            history[r, c, : len(self.history[r][c])] = self.history[r][c]
        return super().state() | {"history": torch.from_numpy(history)}

    def load(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Environments.load`."""
        super().load(state)
        for r, c in np.ndindex(self.shape):
            shown = self._begin(r, c)[: self.observation_size - self.disturbance.distractors]
            for a in state["history"][r, c, : int(self.lengths[r, c])].tolist():
                self.history[r][c].append(a)
                shown = np.asarray(self.members[r][c].step(a)[0], dtype=np.float32)
            require(
                np.array_equal(shown, self.observation[r, c, : shown.size], equal_nan=True),
                f"--model.env: {self.name} cannot be resumed: its episodes are no function of their reset seed",
            )

    def close(self) -> None:
        """See :meth:`Environments.close`."""
        for members in self.members:
            for member in members:
                member.close()


def gymnasium_package() -> ModuleType:
    """Import gymnasium, or say how to get it."""
    try:
        import gymnasium
    except ImportError:
        raise ToyError("bilevel's control needs gymnasium; give pip install 'lightning-toys[control]'") from None
    return gymnasium


def made(name: str, render_mode: str | None = None) -> Any:
    """Return a gymnasium environment; every way in which it cannot be made is the user's to mend."""
    gymnasium = gymnasium_package()
    allowed = "give a gymnasium environment with numbered actions and a vector to observe, such as CartPole-v1"
    known = list(gymnasium.registry)
    if name not in known and ":" not in name:  # "package:Name-v0" is looked up by importing the package
        raise ToyError(f"--model.env: {name!r} is not allowed; {allowed}{did_you_mean(name, known)}")
    try:
        # not every environment takes a render_mode
        return gymnasium.make(name, disable_env_checker=True, **({"render_mode": render_mode} if render_mode else {}))
    except Exception as error:  # what a constructor may raise is anybody's guess
        raise ToyError(f"--model.env: {name!r} cannot be made: {reason(error)}; {allowed}") from error


def reason(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def spaces_of(name: str, environment: Any) -> tuple[int, int]:
    """Return the number of observed numbers and of actions, or refuse the environment."""
    from gymnasium.spaces import Box, Discrete

    seen, done = environment.observation_space, environment.action_space
    fits = isinstance(done, Discrete) and done.start == 0 and isinstance(seen, Box) and len(seen.shape) == 1
    if not fits:
        environment.close()
        raise ToyError(
            f"--model.env: {name!r} is not allowed: it takes {done} and shows {seen}; "
            "give one that takes Discrete actions from 0 and shows a Box of one dimension, such as CartPole-v1"
        )
    return int(seen.shape[0]), int(done.n)


def make_environments(
    name: str, seeds: Sequence[int], stream: str, copies: int = 1, disturbance: Disturbance | None = None
) -> Environments:
    """Return R x copies environments, started.

    Args:
        name: ``CartPole-v1``, or another registered environment of gymnasium.
        seeds: one seed a replica.
        stream: name of the use; other names see other episodes.
        copies: environments of each replica.
        disturbance: distractors and drift; None for none.
    """
    disturbance = disturbance or Disturbance()
    if name == CARTPOLE:
        return CartPole(seeds, stream, copies, disturbance)
    environments = Gymnasium(name, seeds, stream, copies, disturbance)
    drift = disturbance.drift
    require(
        drift == 0, f"--model.disturbance.drift: {drift} is not allowed with --model.env {name}; give 0, or {CARTPOLE}"
    )
    return environments
