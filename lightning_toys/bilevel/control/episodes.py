"""Whole episodes: in every environment at once, or rendered frame by frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lightning_toys.bilevel.control.environments import FLOAT32_CPU, Disturbance, Environments
from lightning_toys.bilevel.control.gymnasium_environments import GymnasiumEnvironments, make_environments, one_line
from lightning_toys.errors import ToyError, require
from lightning_toys.training.noise import NoiseStream, uniform


def rollout(
    environments: Environments,
    policy: Callable[[np.ndarray], np.ndarray],
    episode: int = 0,
    drift_step: int | None = None,
    limit: int = 10_000,
) -> tuple[np.ndarray, np.ndarray]:
    """Roll out episode number ``episode`` in every environment.

    Args:
        environments: reset here.
        policy: observations (R, copies, obs) to actions (R, copies).
        episode: which one; the result is a function of it.
        drift_step: environment step that the drift is held at; None lets it run from 0.
        limit: steps after which an episode counts as it is.

    Returns:
        Undiscounted sums of rewards, and lengths in steps, each (R, copies).
    """
    environments.reset(episode)
    totals, lengths = np.zeros(environments.shape), np.zeros(environments.shape, dtype=np.int64)
    for _ in range(limit):
        environments.step(policy(environments.observation), drift_step)
        for e in environments.finished_episodes:
            if e.number == episode:
                totals[e.replica, e.copy], lengths[e.replica, e.copy] = e.total_reward, e.length
        if (environments.episodes > episode).all():
            return totals, lengths
    running = environments.episodes == episode
    return np.where(running, environments.totals, totals), np.where(running, environments.lengths, lengths)


def uniform_actions(u: np.ndarray, num_actions: int) -> np.ndarray:
    """Map uniforms in [0, 1), float64, of any shape to actions with equal probabilities."""
    return np.minimum((u * num_actions).astype(np.int64), num_actions - 1)


class RandomPolicy:
    """The uniform random policy; its draws are keyed by seed, stream and step.

    Args:
        environments: whose seeds, copies and actions are meant.
    """

    def __init__(self, environments: Environments) -> None:
        self.num_actions, self.steps = environments.num_actions, 0
        stream = f"{environments.stream}/random"
        self.noise = NoiseStream(environments.seeds, stream, (environments.copies,), uniform)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Return the next step's actions (R, copies), whatever the observation."""
        u = self.noise.at(self.steps, FLOAT32_CPU).numpy().astype(np.float64)
        self.steps += 1
        return uniform_actions(u, self.num_actions)


class SampledPolicy:
    """Draws actions from a policy's probabilities; its draws are keyed by seed, stream and step.

    Args:
        environments: whose seeds, copies and actions are meant.
        probabilities: observations (R, copies, obs) to probabilities (R, copies, A).
    """

    def __init__(self, environments: Environments, probabilities: Callable[[np.ndarray], np.ndarray]) -> None:
        self.probabilities, self.steps, self.last = probabilities, 0, environments.num_actions - 1
        self.noise = NoiseStream(environments.seeds, f"{environments.stream}/policy", (environments.copies,), uniform)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Return the next step's actions (R, copies) at observations (R, copies, obs)."""
        u = self.noise.at(self.steps, FLOAT32_CPU).numpy().astype(np.float64)
        self.steps += 1
        below = self.probabilities(observation).cumsum(-1) < u[..., None]
        actions: np.ndarray = np.minimum(below.sum(-1), self.last)
        return actions


def render_episode(
    name: str,
    policy: Callable[[np.ndarray], int],
    seed: int,
    disturbance: Disturbance | None = None,
    limit: int = 10_000,
) -> list[np.ndarray]:
    """Roll out one episode and return its frames, (height, width, 3) uint8: the first before any step.

    Args:
        name: of a registered environment of gymnasium.
        policy: an observation (obs,) to an action.
        seed: of the replica; the episode is number 0 of the stream ``"record"``.
        disturbance: distractors are observed; the drift changes no frame.
        limit: most steps.

    Raises:
        ToyError: the environment cannot be drawn, for want of pygame, say.
    """
    # pygame greets on standard output, and would look for a screen
    for variable, value in (("PYGAME_HIDE_SUPPORT_PROMPT", "1"), ("SDL_VIDEODRIVER", "dummy")):
        os.environ.setdefault(variable, value)
    environments = GymnasiumEnvironments(name, [seed], "record", 1, disturbance or Disturbance(), "rgb_array")
    try:
        environments.frames.append(environments.envs[0][0].render())
    except Exception as error:  # a missing pygame, say, in as many ways as there are environments
        environments.close()
        raise ToyError(f"--model.env: {name!r} cannot be drawn: {one_line(error)}") from error
    while not environments.finished_episodes and environments.steps < limit:
        environments.step(np.array([[policy(environments.observation[0, 0])]]))
    environments.close()
    return environments.frames


def write_gif(frames: Sequence[np.ndarray], path: str | Path, fps: float = 50.0) -> None:
    """Write frames (height, width, 3) uint8 as a looping GIF, which counts time in hundredths of a second.

    Raises:
        ToyError: there are no frames.
    """
    from PIL import Image

    require(len(frames) > 0, "an animation without pictures cannot be written")
    first, *rest = [Image.fromarray(f).quantize(256, Image.Quantize.FASTOCTREE) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=max(20, round(1000 / fps)), loop=0)


def check_repeatable(name: str, disturbance: Disturbance | None = None, limit: int = 200) -> None:
    """Play an episode twice from one seed, with the same actions, and refuse an environment that plays it differently.

    Such a one draws from a generator that its reset does not seed, or keeps something over its resets. A run of it
    could not be resumed, and no replica would be the solo run.

    Args:
        name: of the environment.
        disturbance: what is put on top.
        limit: steps after which an episode is taken to be the same.

    Raises:
        ToyError: names the environment and the step.
    """
    environments = make_environments(name, [0], "check", 1, disturbance)
    policy, plays = RandomPolicy(environments), []
    for _ in range(2):
        environments.reset()
        policy.steps, play = 0, [environments.observation.copy()]
        while len(play) <= 4 * limit and not environments.finished_episodes:
            step = environments.step(policy(environments.observation))
            play += [step.next_observation, step.reward, step.terminated, step.truncated]
        plays.append(play)
    environments.close()
    one, two = plays
    same = [np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(one, two, strict=False)]
    at = next((i for i, equal in enumerate(same) if not equal), len(same))
    require(
        at == len(one) == len(two),
        f"--model.env: {name!r} is not allowed: an episode played twice from one seed differs at step {-(-at // 4)}; "
        "let it draw from self.np_random alone, and begin anew at reset(seed=...)",
    )
