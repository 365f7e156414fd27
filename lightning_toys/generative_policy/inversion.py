"""Densities of one-step maps a = f(e), e ~ N(0, I), by the change of variables."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_toys.generative_policy.meanflow import AverageVelocity, log_det, one_step_jacobian
from lightning_toys.training.noise import keyed_generator

STARTS = 24  # of Newton's method, for each action
ITERATIONS = 40
APART = 1e-2  # solutions closer than this are one


class Inverse(NamedTuple):
    """What a one-step map does to reach an action.

    Attributes:
        log_prob: log q(a) (R, B): the sum over the noises found that the map sends to a; -inf where there is none.
        solutions: how many there are (R, B); 1 where the map is one to one as far as was found.
    """

    log_prob: Tensor
    solutions: Tensor


@torch.no_grad()
def invert(u: AverageVelocity, a: Tensor, state: Tensor) -> Inverse:
    """Solve e - u(e, 0, 1; state) = a for e, and sum N(e; 0, I) / |det df/de| over the solutions.

    By Newton's method with a line search from the same 24 normal starts for each action, the first at 0. A density is
    exact where every solution is found: a map with folds sends several noises to one action.

    Args:
        u: the average velocity.
        a: actions (R, B, D).
        state: states (R, B, S); S = 0 for a policy without one.
    """
    R, B, D = a.shape
    starts = torch.from_numpy(keyed_generator(0, 0, "inversion/starts").standard_normal((STARTS, D))).to(a)
    starts[0] = 0.0
    e = starts.expand(R, B, STARTS, D).reshape(R, B * STARTS, D)
    goal = a.unsqueeze(2).expand(R, B, STARTS, D).reshape(R, B * STARTS, D)
    at = state.unsqueeze(2).expand(R, B, STARTS, state.shape[-1]).reshape(R, B * STARTS, -1)
    zero = torch.zeros_like(e[..., :1])

    def error(e: Tensor) -> Tensor:
        velocity: Tensor = u(e, zero, zero + 1, at)[0]
        return e - velocity - goal

    now = error(e)
    tiny = 1e-6 * torch.eye(D).to(e)
    for _ in range(ITERATIONS):
        # of a singular Jacobian no step is finite: that start stays where it is, and the others go on
        step = torch.linalg.solve_ex(one_step_jacobian(u, e, at) + tiny, now.unsqueeze(-1)).result.squeeze(-1)
        # no longer than one: far from a solution the slope says little
        step = step / step.norm(dim=-1, keepdim=True).clamp(min=1.0)
        best, kept = now, e
        for scale in (1.0, 0.5, 0.1):
            trial = e - scale * step
            found = error(trial)
            better = (found.norm(dim=-1) < best.norm(dim=-1)).unsqueeze(-1)
            best, kept = torch.where(better, found, best), torch.where(better, trial, kept)
        e, now = kept, best
    tolerance = 1e-9 if e.dtype == torch.float64 else 1e-4
    solved = (now.norm(dim=-1) < tolerance).reshape(R, B, STARTS)
    log_abs, _ = log_det(u, e, at)
    density = (-0.5 * e.square().sum(-1) - 0.5 * D * math.log(2 * math.pi) - log_abs).reshape(R, B, STARTS)
    e = e.reshape(R, B, STARTS, D)
    same = (e.unsqueeze(3) - e.unsqueeze(2)).norm(dim=-1) < APART
    earlier = torch.ones(STARTS, STARTS, dtype=torch.bool, device=e.device).tril(-1)
    new = solved & ~(same & earlier & solved.unsqueeze(2)).any(-1)
    return Inverse(density.masked_fill(~new, -torch.inf).logsumexp(-1), new.sum(-1))
