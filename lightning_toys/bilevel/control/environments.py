"""Environments side by side: one a replica (times copies), stepped together, each a pure function of its seed.

Episode e of copy c of the replica with seed s starts with a reset seed that is keyed by (s, stream, c, e). So replica r
of many is the solo run of its seed, bit for bit, and a checkpoint holds no generator's state.

cartpole.py has CartPole-v1 over all environments at once; gymnasium_environments.py steps every other environment in a
loop, and makes either by its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.checks import number_in
from lightning_toys.errors import WHOLE, bounded, check_settings, require
from lightning_toys.training.noise import NoiseStream, keyed_generator

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
            centre that drifts, else 0. 0 is off: the reward is gymnasium's.
        drift_shape: ``sine``, the centre is ``drift * sin(2 pi t / drift_period)``; or ``linear``, it goes from -drift
            to drift within ``drift_period`` steps, and stays there (OFBO's non-stationary reward).
        drift_period: environment steps from one swing of the centre to the next, or of the way.
        drift_width: degrees, half the band's width. An episode ends at 12 degrees.

    Raises:
        ToyError: a value is not allowed.

    >>> Disturbance(drift=6.0, drift_period=8).centre(2)
    6.0
    >>> [Disturbance(drift=6.0, drift_shape="linear", drift_period=8).centre(t) for t in (0, 2, 8, 20)]
    [-6.0, -3.0, 6.0, 6.0]
    """

    distractors: int = 0
    drift: float = 0.0
    drift_shape: str = "sine"
    drift_period: int = 10_000
    drift_width: float = 6.0

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.disturbance.")
        flag = "--model.disturbance"
        n, period, width = self.distractors, self.drift_period, self.drift_width
        number_in(f"{flag}.distractors", n, lambda x: 0 <= x <= 10_000 and x == int(x), "an integer from 0 to 10000")
        number_in(f"{flag}.drift", self.drift, lambda x: 0 <= x < 12, "degrees from 0 to below 12")
        shape = self.drift_shape
        require(shape in ("sine", "linear"), f"{flag}.drift_shape: {shape!r} is not allowed; give sine or linear")
        bounded(f"{flag}.drift_period", period, 1, WHOLE)
        number_in(f"{flag}.drift_width", width, lambda x: 0 < x <= 24, "degrees above 0, at most 24")

    def centre(self, step: int) -> float:
        """Return the middle of the rewarded band of angles at environment step ``step``, in degrees."""
        if self.drift_shape == "linear":
            return self.drift * (2 * min(1.0, step / self.drift_period) - 1)
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
