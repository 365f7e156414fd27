"""Probability paths and the integration of dx/dt = v(x, t) from t = 0 to t = 1.

torchdiffeq does the integration, behind one knob: ``nfe``, the number of times the network is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchdiffeq import odeint

from lightning_toys.errors import REPEATS, bounded, require

Solver = Literal["euler", "midpoint", "rk4", "dopri5"]
EVALUATIONS_PER_STEP = {"euler": 1, "midpoint": 2, "rk4": 4}


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x0 + t x1, the straight path of rectified flow (arXiv 2209.03003, arXiv 2210.02747).

    x0 and x1 have any shape, and t broadcasts against it.

    >>> interpolate(torch.zeros(2), torch.tensor([4.0, 8.0]), torch.tensor(0.25)).tolist()
    [1.0, 2.0]
    """
    return torch.lerp(x0, x1, t)


MOST_STEPS = 10_000  # of an adaptive solver, which would go on for days where weights have blown up


def check_nfe(solver: str, nfe: int, flag: str = "--model.evaluation.nfe") -> None:
    """Refuse an ``nfe`` that is below 1, or no multiple of a fixed-step solver's evaluations per step.

    Raises:
        ToyError: as said; it names ``flag``.
    """
    bounded(flag, nfe, 1, REPEATS)
    if solver in EVALUATIONS_PER_STEP:
        each = EVALUATIONS_PER_STEP[solver]
        require(
            nfe % each == 0,
            f"{flag}: {nfe} is not allowed with {solver}; give a multiple of {each} (one step costs so)",
        )


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    solver: Solver = "euler",
    nfe: int = 1,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> Tensor:
    """Integrate dx/dt = velocity(t, x) over [0, 1] and return x(1), shaped as x0.

    Args:
        velocity: function of the time t, a scalar tensor, and the state x, that returns dx/dt shaped as x.
        x0: state at t = 0, any shape.
        solver: ``euler``, ``midpoint`` and ``rk4`` (the 3/8 rule) take nfe / {1, 2, 4} equal steps; ``dopri5`` picks
            its own steps to meet ``rtol`` and ``atol`` and leaves ``nfe`` unused; where ten thousand do not do, x(1) is
            NaN.
        nfe: number of evaluations of ``velocity``.
        rtol: relative tolerance of ``dopri5``.
        atol: absolute tolerance of ``dopri5``.

    Raises:
        ToyError: ``nfe`` is no positive multiple of the solver's evaluations per step.

    Example:
        Two Euler steps of dx/dt = x: (1 + 1/2)^2.

        >>> integrate(lambda t, x: x, torch.ones(1), "euler", nfe=2).item()
        2.25
    """
    ends = torch.tensor([0.0, 1.0], device=x0.device, dtype=x0.dtype)
    if solver == "dopri5":
        try:
            options = {"max_num_steps": MOST_STEPS}
            out: Tensor = odeint(velocity, x0, ends, method="dopri5", rtol=rtol, atol=atol, options=options)
        except AssertionError:  # steps became too small, or too many: the velocity is not finite, or wild
            return torch.full_like(x0, torch.nan)
        return out[-1]
    check_nfe(solver, nfe)
    steps = nfe // EVALUATIONS_PER_STEP[solver]

    # torchdiffeq's own `step_size` rounds 1 / (1/n) up to n + 1 steps for some n; the grid itself cannot.
    def grid(func: object, y0: object, t: object) -> Tensor:
        return torch.linspace(0.0, 1.0, steps + 1, device=x0.device, dtype=x0.dtype)

    out = odeint(velocity, x0, ends, method=solver, options={"grid_constructor": grid})
    return out[-1]


# Dormand and Prince (1980): times, weights of the stages before each, and the error's weights (5th less 4th order)
STAGE_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGE_WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR_WEIGHTS = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
FIRST_STEP = 0.05  # of the unit interval; error control mends it
LONGEST_STEP = 0.25  # where a ReLU network is linear for a while, a row sees no error, and would jump over its kinks


def weighted(stages: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Return the sum of stages by their weights; both are as many."""
    out = torch.zeros_like(stages[0])
    for k, w in zip(stages, weights, strict=True):
        if w:
            out = out + w * k
    return out


def integrate_rows(
    velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, rtol: float = 1e-4, atol: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Integrate dx/dt = velocity(t, x) over [0, 1] by Dormand and Prince's method, each row with steps of its own.

    A row is what lies along the last axis, and its result does not depend on the other rows: neither on other replicas
    nor on how points are cut into pieces. No step goes beyond t = 1.

    Args:
        velocity: function of the times t (..., 1), one a row, and the states x (..., D), that returns dx/dt (..., D).
        x0: states at t = 0, (..., D).
        rtol: relative tolerance, of the root mean square over a row's entries.
        atol: absolute tolerance, likewise.

    Returns:
        x(1), shaped as x0, NaN in rows that ten thousand steps do not bring there; and the number of evaluations of
        ``velocity`` that each row took, (...), float64.

    Example:
        >>> x, evaluations = integrate_rows(lambda t, x: x, torch.ones(1, 1, dtype=torch.float64))
        >>> round(x.item(), 3), int(evaluations.item()) % 6
        (2.718, 1)
    """
    x, t = x0, torch.zeros_like(x0[..., :1])
    step = torch.full_like(t, FIRST_STEP)
    first = velocity(t, x)
    evaluations = torch.ones(x0.shape[:-1], dtype=torch.float64, device=x0.device)
    lost = torch.zeros_like(t, dtype=torch.bool)
    for _ in range(MOST_STEPS):
        active = (t < 1) & ~lost
        if not bool(active.any()):
            return torch.where(lost, torch.nan, x), evaluations
        h = torch.where(active, torch.minimum(step, 1 - t), 0.0)
        last = active & (step >= 1 - t)
        stages = [first]
        for at, weights in zip(STAGE_TIMES, STAGE_WEIGHTS, strict=True):
            y = x + h * weighted(stages, weights)
            stages.append(velocity(t + at * h, y))
        evaluations = evaluations + 6 * active[..., 0]
        error = h * weighted(stages, ERROR_WEIGHTS)
        size = atol + rtol * torch.maximum(x.abs(), y.abs())
        ratio = (error / size).square().mean(-1, keepdim=True).sqrt().detach()
        accepted = active & (ratio <= 1)  # NaN is not
        x = torch.where(accepted, y, x)
        first = torch.where(accepted, stages[-1], first)
        t = torch.where(accepted, torch.where(last, 1.0, t + h), t)
        factor = (0.9 * ratio.clamp_min(1e-10) ** -0.2).clamp(0.2, 10.0)
        factor = torch.where(ratio.isfinite(), torch.where(accepted, factor.clamp_min(1.0), factor), 0.2)
        step = torch.where(active, (h * factor).clamp_max(LONGEST_STEP), step)
        lost = lost | (active & (step < 1e-7))  # the velocity is not finite there, or wild
    return torch.where(t < 1, torch.nan, x), evaluations


def straight_step(x: Tensor, f: Tensor, s: float, t: float) -> Tensor:
    """Move x from time s to t, s <= t <= 1, s < 1, on the line to the predicted end point f (shaped as x).

    x <- ((1 - t) x + (t - s) f) / (1 - s), the exact solution of dx/dt = (f - x) / (1 - t) at fixed f.
    """
    return ((1 - t) * x + (t - s) * f) / (1 - s)
