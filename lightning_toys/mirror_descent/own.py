"""Samplers, schedules and rewards of somebody's own: a trial of what they give, before any work."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import REPEATS, bounded, require
from lightning_toys.mirror_descent.guidance import GuidanceRule
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.joint_distribution import JointDistribution, without_rows
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.problem import Cost
from lightning_toys.mirror_descent.resampling import Resampling
from lightning_toys.mirror_descent.sampler import Draws, Sampler
from lightning_toys.mirror_descent.schedules import Schedule
from lightning_toys.mirror_descent.steering import Potential
from lightning_toys.mirror_descent.tilt import QuadraticForm, Reward
from lightning_toys.training.own_classes import attempt, is_own, shape_of

FLAG = "--model.samplers"
LEAST_LEVEL = 0.05  # abar, of the levels at which a schedule is asked
LEVELS = 11


def has_own_parts(sampler: Sampler) -> bool:
    """Whether a sampler is of somebody's own class, or works by a rule, potential or resampling that is."""
    parts = [v for v in vars(sampler).values() if isinstance(v, GuidanceRule | Potential | Resampling)]
    return any(is_own(part) for part in (sampler, *parts))


@torch.no_grad()
def check_sampler(name: str, sampler: Sampler) -> None:
    """Hold a sampler of somebody's own to its contract, see :class:`Sampler`, by one block of chains.

    Args:
        name: the sampler's.
        sampler: of the run's own problem.

    Raises:
        ToyError: names the sampler and what is wrong.
    """
    if not has_own_parts(sampler):
        return
    where = f"{FLAG}: {name}"
    cost = attempt(f"{where}.cost", sampler.cost)
    require(
        isinstance(cost, Cost) and cost.total >= 1,
        f"{where}.cost gives {cost!r}; give a Cost(prior, score, value, refresh) of one evaluation or more"[:300],
    )
    noise = Noise([(0, 0)], "own/trial", torch.zeros((), dtype=torch.get_default_dtype()))
    draws = attempt(f"{where}.draw", lambda: sampler.draw(noise))
    require(isinstance(draws, Draws), f"{where}.draw gives {type(draws).__name__}; give Draws(a, s)")
    joint = sampler.problem.joint
    for part, coordinates in (("a", joint.action_dim), ("s", joint.dim - joint.action_dim)):
        require_shape(f"{where}.draw: {part}", getattr(draws, part), coordinates)
    for part, axes in (("accepted", 2), ("squared_jumps", 2), ("trace", 3), ("states", 3)):
        found = getattr(draws, part)
        fits = found is None or (isinstance(found, Tensor) and found.dim() == axes and found.shape[1] == 1)
        require(
            fits,
            f"{where}.draw: {part} is {shape_of(found)} of one block of chains; give (steps, 1"
            f"{', chains' if axes == 3 else ''}), or None",
        )


def check_schedule(schedule: Schedule) -> None:
    """Hold a schedule of somebody's own to its contract: a finite number at every level.

    Raises:
        ToyError: names the class and what is wrong.
    """
    if not is_own(schedule):
        return
    where = f"--model.schedule: {type(schedule).__name__}"
    for abar in np.linspace(LEAST_LEVEL, 1.0, LEVELS).tolist():
        found = attempt(f"{where}.fraction", partial(schedule.fraction, abar, LEAST_LEVEL))
        number = isinstance(found, int | float) or (isinstance(found, Tensor) and found.numel() == 1)
        require(
            number and math.isfinite(found),
            f"{where}.fraction at abar = {abar:.3g} gives {found!r}; give a finite number"[:300],
        )
    bounded(f"{where}.final_steps", schedule.final_steps, 0, REPEATS)


def check_reward(reward: Reward, joint: JointDistribution) -> None:
    """Hold a reward of somebody's own to its contract on a joint distribution, see :class:`Reward`.

    Raises:
        ToyError: names the class and what is wrong.
    """
    if not is_own(reward):
        return
    where = f"--model.reward: {type(reward).__name__}"
    if isinstance(joint, LinearGaussianJoint):  # what it gives there is held to be a quadratic where it is used
        attempt(f"{where}.action_value", lambda: reward.action_value(joint.clean))
        return
    a = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).expand(joint.action_dim, -1).clone()
    value = attempt(f"{where}.value", lambda: reward.value(a))
    fits = isinstance(value, Tensor) and tuple(value.shape) == (5,)
    require(fits, f"{where}.value of actions {tuple(a.shape)} is {shape_of(value)}; give a tensor (5,)")
    form = attempt(f"{where}.quadratic", lambda: reward.quadratic(joint.action_dim))
    fits = form is None or isinstance(form, QuadraticForm)
    require(fits, f"{where}.quadratic gives {type(form).__name__}; give a QuadraticForm, or None")
    jumps = attempt(f"{where}.breakpoints", lambda: [float(p) for p in reward.breakpoints])
    require(bool(np.all(np.isfinite(jumps))), f"{where}.breakpoints: {jumps} is not allowed; give finite numbers"[:300])
    bounded(f"{where}.curvature", attempt(f"{where}.curvature", lambda: reward.curvature), 0.0)


def require_shape(where: str, found: Any, coordinates: int) -> None:
    """Refuse what is no tensor of a block's actions or states."""
    fits = isinstance(found, Tensor) and found.dim() in (1, 2) and tuple(found.shape)[-1:] == (BLOCK_SIZE,)
    if fits:
        rows = without_rows(found)
        fits = (rows.shape[0] if rows.dim() == 2 else 1) == coordinates
    wanted = (BLOCK_SIZE,) if coordinates == 1 else (coordinates, BLOCK_SIZE)
    require(fits, f"{where} is {shape_of(found)} of one block of chains; give a tensor {wanted}, as noise.normal() is")
