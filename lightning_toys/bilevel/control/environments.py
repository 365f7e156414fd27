"""Environments side by side: one a replica (times copies), stepped together, each a pure function of its seed.

Episode e of copy c of the replica with seed s starts with a reset seed that is keyed by (s, stream, c, e). So replica r
of many is the solo run of its seed, bit for bit, and a checkpoint holds no generator's state.

CartPole-v1 has NumPy physics over all environments at once (Barto, Sutton & Anderson 1983, as gymnasium writes them, to
the last bit); every other environment of gymnasium with numbered actions is stepped in a loop, if it shows a vector, or
a number, which becomes a one-hot vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import WHOLE, ToyError, bounded, did_you_mean, require
from lightning_toys.training.noise import NoiseStream, keyed_generator

CARTPOLE = "CartPole-v1"
DISTRACTOR_AUTOCORRELATION = 0.9  # per environment step
DISTRACTOR_STEPS = 2**32  # reserved for each reset
FLOAT32_CPU = torch.empty(0)


class Transition(NamedTuple):
    """One step of every environment, arrays (R, copies, ...) that are not written to afterwards.

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
    """An episode that ended.

    Attributes:
        replica: r.
        copy: c.
        number: e, counted from 0 for each replica and copy.
        total_reward: undiscounted sum of its rewards.
        length: its steps.
    """

    replica: int
    copy: int
    number: int
    total_reward: float
    length: int


@dataclass
class Disturbance:
    """Distractors and a drifting reward, put on top of a task.

    Args:
        distractors: further observed numbers that have nothing to do with the task: x' = .9 x + sqrt(1 - .81) noise, of
            variance 1, going on over the ends of episodes.
        drift: degrees; CartPole's reward is 1 only where the pole's angle after the step is within ``drift_width`` of a
            centre ``drift * sin(2 pi t / drift_period)``, else 0. 0 is off: the reward is gymnasium's.
        drift_period: environment steps from one swing of the centre to the next.
        drift_width: degrees, half the band's width. An episode ends at 12 degrees.

    Raises:
        ToyError: a value is not allowed.

    >>> Disturbance(drift=6.0, drift_period=8).centre(2)
    6.0
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
        bounded(f"{flag}.drift_period", period, 1, WHOLE)
        require(0 < width <= 24, f"{flag}.drift_width: {width} is not allowed; give degrees above 0, at most 24")

    def centre(self, step: int) -> float:
        """Return the middle of the rewarded band of angles at environment step ``step``, in degrees."""
        return self.drift * math.sin(2 * math.pi * step / self.drift_period)


def reset_seed(seed: int, stream: str, copy: int, episode: int) -> int:
    """Return the seed that episode ``episode`` of a replica's copy is reset with, below 2^31 - 1."""
    return int(keyed_generator(seed, episode, f"{stream}/reset/{copy}").integers(2**31 - 1))


class Environments(ABC):
    """R x copies environments of one kind.

    An environment whose episode ended is reset within the same :meth:`step`. ``observation`` (R, copies, obs), float32,
    is what the next action is chosen on; ``finished_episodes`` are those that the last step ended; ``steps`` counts
    from the reset.

    Args:
        seeds: one seed a replica.
        stream: name of the use, such as ``"train"``; other names see other episodes.
        copies: environments of each replica. Copy c is the same whatever their number.
        disturbance: what is put on top.
        task_observation_size: numbers that the task itself lets be observed.
        num_actions: number of actions.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        stream: str,
        copies: int,
        disturbance: Disturbance,
        task_observation_size: int,
        num_actions: int,
    ) -> None:
        self.seeds, self.stream, self.copies, self.disturbance = tuple(seeds), stream, copies, disturbance
        self.num_actions, self.shape = num_actions, (len(self.seeds), copies)
        self.observation_size = task_observation_size + disturbance.distractors
        shape = (disturbance.distractors,)
        self._noise_streams = [NoiseStream(self.seeds, f"{stream}/distractors/{c}", shape) for c in range(copies)]
        self.reset()

    @abstractmethod
    def reset_one(self, replica: int, copy: int, seed: int) -> np.ndarray:
        """Reset one environment and return its first observation, (task_observation_size,).

        Must be a function of ``seed`` alone.

        Args:
            replica: r.
            copy: c.
            seed: keyed by the replica's seed, stream, copy and episode, see :func:`reset_seed`.
        """

    @abstractmethod
    def step_all(self, action: np.ndarray, drift_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Take one step in every environment, with no reset and no distractors.

        Args:
            action: (R, copies), int64.
            drift_step: environment step at which a drifting reward is taken.

        Returns:
            New arrays: observation (R, copies, task_observation_size) and reward (R, copies), float32; terminated and
            truncated (R, copies), bool.
        """

    def close(self) -> None:
        """Release what the environments hold, such as windows."""
        return

    def reset(self, episode: int = 0) -> None:
        """Begin episode number ``episode`` in every environment, whatever happened before."""
        self.first_episode, self.steps, self.finished_episodes = episode, 0, list[Episode]()
        self.episodes = np.full(self.shape, episode, dtype=np.int64)
        self.lengths = np.zeros(self.shape, dtype=np.int64)
        self.totals = np.zeros(self.shape)
        self.distraction = self._distractor_noise()  # the first has the stationary distribution
        self.observation = np.stack(
            [[self._first_observation(r, c) for c in range(self.shape[1])] for r in range(self.shape[0])]
        )

    def step(self, action: np.ndarray, drift_step: int | None = None) -> Transition:
        """Take one step in every environment, and reset those whose episode ended.

        Args:
            action: (R, copies), from 0 to ``num_actions`` - 1.
            drift_step: environment step that the drift is taken at; counted from the reset where it is not given.
        """
        action = np.asarray(action, dtype=np.int64)
        assert action.shape == self.shape, f"actions {action.shape}, where {self.shape} are wanted"
        previous, self.finished_episodes = self.observation, []
        observation, reward, terminated, truncated = self.step_all(
            action, self.steps if drift_step is None else drift_step
        )
        self.steps += 1
        self.lengths += 1
        self.totals += reward
        if self._noise_streams[0].shape[0]:
            rho = DISTRACTOR_AUTOCORRELATION
            self.distraction = rho * self.distraction + math.sqrt(1 - rho**2) * self._distractor_noise()
            observation = np.concatenate([observation, self.distraction], axis=-1)
        self.observation = observation
        done = terminated | truncated
        if done.any():
            self.observation = observation.copy()
            for r, c in np.argwhere(done).tolist():
                number, length = int(self.episodes[r, c]), int(self.lengths[r, c])
                self.finished_episodes.append(Episode(r, c, number, float(self.totals[r, c]), length))
                self.episodes[r, c] += 1
                self.lengths[r, c] = self.totals[r, c] = 0
                self.observation[r, c] = self._first_observation(r, c)
        return Transition(previous, action, reward, observation, terminated, truncated)

    def _first_observation(self, r: int, c: int) -> np.ndarray:
        seed = reset_seed(self.seeds[r], self.stream, c, int(self.episodes[r, c]))
        return np.concatenate([self.reset_one(r, c, seed), self.distraction[r, c]], dtype=np.float32)

    def _distractor_noise(self) -> np.ndarray:
        """Draw the distractors' noise of the present step, (R, copies, distractors)."""
        if not self.disturbance.distractors:
            return np.empty((*self.shape, 0), dtype=np.float32)
        step = self.first_episode * DISTRACTOR_STEPS + self.steps
        return np.stack([n.at(step, FLOAT32_CPU).numpy() for n in self._noise_streams], axis=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what :meth:`load_state_dict` needs to go on bit for bit: tensors by name, no generator."""
        arrays = {k: getattr(self, k) for k in ("episodes", "lengths", "totals", "distraction", "observation")}
        where = torch.tensor([self.first_episode, self.steps])
        return {k: torch.from_numpy(v.copy()) for k, v in arrays.items()} | {"where": where}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of environments with the same seeds, stream and copies.

        Raises:
            ToyError: the shapes differ, or the episodes are no function of their reset seed.
        """
        for name in ("episodes", "lengths", "totals", "distraction", "observation"):
            stored, expected = tuple(state[name].shape), getattr(self, name).shape
            require(stored == expected, f"the stored environments' {name} is {stored}, where {expected} is wanted")
            setattr(self, name, state[name].cpu().numpy().copy())
        self.first_episode, self.steps = (int(x) for x in state["where"].tolist())
        self.finished_episodes = []


class CartPole(Environments):
    """CartPole-v1 (Barto, Sutton & Anderson 1983), vectorised: gymnasium's own numbers to the last bit.

    ``physics`` (4, R, copies), float64: the cart's position (m) and velocity, the pole's angle (rad) and velocity.
    """

    MAX_STEPS, X_THRESHOLD, THETA_THRESHOLD = 500, 2.4, 12 * 2 * math.pi / 360
    # gymnasium's masspole, total_mass, length (half the pole's), polemass_length, tau and force_mag
    GRAVITY, POLE_MASS, TOTAL_MASS, LENGTH, POLE_MASS_LENGTH, TAU = 9.8, 0.1, 0.1 + 1.0, 0.5, 0.1 * 0.5, 0.02
    FORCES = np.array([-10.0, 10.0])

    def __init__(self, seeds: Sequence[int], stream: str, copies: int, disturbance: Disturbance) -> None:
        self.physics = np.zeros((4, len(seeds), copies))
        super().__init__(seeds, stream, copies, disturbance, 4, 2)

    def reset_one(self, replica: int, copy: int, seed: int) -> np.ndarray:
        """See :meth:`Environments.reset_one`."""
        start = np.random.Generator(np.random.PCG64(seed)).uniform(-0.05, 0.05, size=4)
        self.physics[:, replica, copy] = start
        return start

    def step_all(self, action: np.ndarray, drift_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`Environments.step_all`."""
        _, v, theta, omega = self.physics
        cos, sin = np.cos(theta), np.sin(theta)
        # the order of the operations is gymnasium's, so that the rounding is too
        temp = (self.FORCES[action] + self.POLE_MASS_LENGTH * np.square(omega) * sin) / self.TOTAL_MASS
        theta_acc = (self.GRAVITY * sin - cos * temp) / (
            self.LENGTH * (4.0 / 3.0 - self.POLE_MASS * np.square(cos) / self.TOTAL_MASS)
        )
        x_acc = temp - self.POLE_MASS_LENGTH * theta_acc * cos / self.TOTAL_MASS
        new = np.empty_like(self.physics)
        new[0], new[1], new[2], new[3] = v, x_acc, omega, theta_acc
        new *= self.TAU
        new += self.physics
        self.physics = new
        terminated = (np.abs(new[0]) > self.X_THRESHOLD) | (np.abs(new[2]) > self.THETA_THRESHOLD)
        observation = new.transpose(1, 2, 0).astype(np.float32, order="C")
        if self.disturbance.drift:
            distance = np.abs(np.degrees(new[2]) - self.disturbance.centre(drift_step))
            reward = (distance < self.disturbance.drift_width).astype(np.float32)
        else:
            reward = np.ones(self.shape, dtype=np.float32)
        return observation, reward, terminated, self.lengths + 1 >= self.MAX_STEPS

    def state_dict(self) -> dict[str, Tensor]:
        """See :meth:`Environments.state_dict`."""
        return super().state_dict() | {"physics": torch.from_numpy(self.physics.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Environments.load_state_dict`."""
        super().load_state_dict(state)
        self.physics = state["physics"].cpu().numpy().copy()


class GymnasiumEnvironments(Environments):
    """Any environment of gymnasium with discrete actions and a vector or a number to observe, stepped in a loop.

    Their inner state cannot be stored in general. What is stored is the actions since each reset:
    :meth:`load_state_dict` plays them again, and checks that they lead to the stored observation.

    Args:
        name: of a registered environment.
        seeds: see :class:`Environments`.
        stream: see :class:`Environments`.
        copies: see :class:`Environments`.
        disturbance: see :class:`Environments`.
        render_mode: passed to ``gymnasium.make``; if given, ``frames`` holds a picture of each step.

    Raises:
        ToyError: there is no such environment, it cannot be made, or its spaces do not fit.
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
        first = make_gymnasium(name, render_mode)
        size, actions = space_sizes(name, first)
        self.to_vector = vectoriser(first.observation_space)
        rest = (make_gymnasium(name, render_mode) for _ in range(len(seeds) * copies - 1))
        flat = [first, *rest]
        self.frames: list[np.ndarray] = []  # drawn where there is a render_mode
        self.envs = [flat[i * copies : (i + 1) * copies] for i in range(len(seeds))]
        self.history: list[list[list[int]]] = [[[] for _ in range(copies)] for _ in seeds]
        super().__init__(seeds, stream, copies, disturbance, size, actions)

    def reset_one(self, replica: int, copy: int, seed: int) -> np.ndarray:
        """See :meth:`Environments.reset_one`."""
        self.history[replica][copy] = []
        return self.to_vector(self.envs[replica][copy].reset(seed=seed)[0])

    def step_all(self, action: np.ndarray, drift_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`Environments.step_all`."""
        observation, reward, terminated, truncated = [], [], [], []
        for r, envs in enumerate(self.envs):
            for c, env in enumerate(envs):
                a = int(action[r, c])
                self.history[r][c].append(a)
                outcome = env.step(a)
                if env.render_mode is not None:  # here, since a reset within the step would draw the next episode
                    self.frames.append(env.render())
                observation.append(self.to_vector(outcome[0]))
                reward.append(outcome[1])
                terminated.append(outcome[2])
                truncated.append(outcome[3])
        return (
            np.stack(observation).reshape(*self.shape, -1),
            np.array(reward, dtype=np.float32).reshape(self.shape),
            np.array(terminated, dtype=bool).reshape(self.shape),
            np.array(truncated, dtype=bool).reshape(self.shape),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """See :meth:`Environments.state_dict`; the actions are padded with -1."""
        history = np.full((*self.shape, int(self.lengths.max())), -1, dtype=np.int32)
        for r, c in np.ndindex(self.shape):
            history[r, c, : len(self.history[r][c])] = self.history[r][c]
        return super().state_dict() | {"history": torch.from_numpy(history)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Environments.load_state_dict`."""
        super().load_state_dict(state)
        for r, c in np.ndindex(self.shape):
            observation = self._first_observation(r, c)[: self.observation_size - self.disturbance.distractors]
            for a in state["history"][r, c, : int(self.lengths[r, c])].tolist():
                self.history[r][c].append(a)
                observation = self.to_vector(self.envs[r][c].step(a)[0])
            require(
                np.array_equal(observation, self.observation[r, c, : observation.size], equal_nan=True),
                f"--model.env: {self.name} cannot be resumed: its episodes are no function of their reset seed",
            )

    def close(self) -> None:
        """See :meth:`Environments.close`."""
        for envs in self.envs:
            for env in envs:
                env.close()


def import_gymnasium() -> ModuleType:
    """Return gymnasium, imported; a ToyError says how to get it."""
    try:
        import gymnasium
    except ImportError:
        raise ToyError("bilevel's control needs gymnasium; give pip install 'lightning-toys[control]'") from None
    return gymnasium


def make_gymnasium(name: str, render_mode: str | None = None) -> Any:
    """Return a gymnasium environment; a ToyError says why it cannot be made."""
    gymnasium = import_gymnasium()
    allowed = "give a gymnasium environment with numbered actions and a vector to observe, such as CartPole-v1"
    known = list(gymnasium.registry)
    if name not in known and ":" not in name:  # "package:Name-v0" is looked up by importing the package
        raise ToyError(f"--model.env: {name!r} is not allowed; {allowed}{did_you_mean(name, known)}")
    try:
        # not every environment takes a render_mode
        return gymnasium.make(name, disable_env_checker=True, **({"render_mode": render_mode} if render_mode else {}))
    except Exception as error:  # what a constructor may raise is anybody's guess
        raise ToyError(f"--model.env: {name!r} cannot be made: {one_line(error)}; {allowed}") from error


def one_line(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def space_sizes(name: str, environment: Any) -> tuple[int, int]:
    """Return the length of an observation and the number of actions; a ToyError if the spaces are of other kinds.

    A numbered observation (Discrete) is as long as there are of them, see :func:`vectoriser`.
    """
    from gymnasium.spaces import Box, Discrete

    observations, actions = environment.observation_space, environment.action_space
    discrete = isinstance(actions, Discrete) and actions.start == 0
    vector = isinstance(observations, Box) and len(observations.shape) == 1
    numbered = isinstance(observations, Discrete)
    if not (discrete and (vector or numbered)):
        environment.close()
        raise ToyError(
            f"--model.env: {name!r} is not allowed: it takes {actions} and shows {observations}; "
            "give one that takes Discrete actions from 0 and shows a Box of one dimension, as CartPole-v1, or a number"
        )
    return int(observations.n if numbered else observations.shape[0]), int(actions.n)


def vectoriser(space: Any) -> Callable[[Any], np.ndarray]:
    """Return what makes a float32 vector of an observation: itself, or for a numbered one its one-hot vector."""
    from gymnasium.spaces import Discrete

    if not isinstance(space, Discrete):
        return lambda observation: np.asarray(observation, dtype=np.float32)
    rows, start = np.eye(int(space.n), dtype=np.float32), int(space.start)
    return lambda observation: rows[int(observation) - start].copy()


def make_environments(
    name: str, seeds: Sequence[int], stream: str, copies: int = 1, disturbance: Disturbance | None = None
) -> Environments:
    """Return R x copies environments, reset to episode 0.

    Args:
        name: ``CartPole-v1``, or another registered environment of gymnasium.
        seeds: one seed a replica.
        stream: name of the use; other names see other episodes.
        copies: environments of each replica.
        disturbance: distractors and drift; None for none.

    Raises:
        ToyError: there is no such environment, its spaces do not fit, or a drift is asked of one that has none.

    >>> environments = make_environments("CartPole-v1", seeds=[0, 1, 2], stream="train")
    >>> environments.observation.shape
    (3, 1, 4)
    >>> environments.step(np.zeros((3, 1))).reward.tolist()
    [[1.0], [1.0], [1.0]]
    """
    disturbance = disturbance or Disturbance()
    if name == CARTPOLE:
        return CartPole(seeds, stream, copies, disturbance)
    environments = GymnasiumEnvironments(name, seeds, stream, copies, disturbance)
    drift = disturbance.drift
    require(
        drift == 0, f"--model.disturbance.drift: {drift} is not allowed with --model.env {name}; give 0, or {CARTPOLE}"
    )
    return environments
