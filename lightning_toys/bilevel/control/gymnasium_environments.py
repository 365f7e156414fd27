"""Environments of gymnasium, stepped in a loop: numbered actions, and a vector or a number (one-hot) to observe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.control.cartpole import CARTPOLE, CartPole
from lightning_toys.bilevel.control.environments import Disturbance, Environments
from lightning_toys.errors import ToyError, did_you_mean, require


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
        """See :meth:`Environments.load_state_dict`.

        Raises:
            ToyError: the stored actions do not lead to the stored observation.
        """
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
    """Return gymnasium, imported.

    Raises:
        ToyError: it is not installed; says how to get it.
    """
    try:
        import gymnasium
    except ImportError:
        raise ToyError("bilevel's control needs gymnasium; give pip install 'lightning-toys[control]'") from None
    return gymnasium


def make_gymnasium(name: str, render_mode: str | None = None) -> Any:
    """Return a gymnasium environment.

    Raises:
        ToyError: there is none of that name, or it cannot be made; says why.
    """
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
    """Return the length of an observation and the number of actions.

    A numbered observation (Discrete) is as long as there are of them, see :func:`vectoriser`.

    Raises:
        ToyError: the spaces are of other kinds.
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
