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


def straight_step(x: Tensor, f: Tensor, s: float, t: float) -> Tensor:
    """Move x from time s to t, s <= t <= 1, s < 1, on the line to the predicted end point f (shaped as x).

    x <- ((1 - t) x + (t - s) f) / (1 - s), the exact solution of dx/dt = (f - x) / (1 - t) at fixed f.
    """
    return ((1 - t) * x + (t - s) * f) / (1 - s)
