"""The training objectives, and how each predicts (its readouts).

Symbols: c (R, B, 1) the condition, x1 = f(c) (R, B, D) the target, x0 (R, B, D) the start of the path, t ~ U(0, 1)
(R, B, 1), x_t = (1 - t) x0 + t x1. An objective returns residuals; the module turns them into L1 or L2 losses. A
readout turns (c, x0) into a prediction of x1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_toys.errors import did_you_mean, require
from lightning_toys.flows import EVALUATIONS_PER_STEP, Solver, integrate, integrate_rows, interpolate, straight_step
from lightning_toys.nets import ConditionalNet

X0Distribution = Literal["zeros", "gaussian"]
Mode = Literal["regression", "flow", "straight_flow", "mip", "mip_one_step"]


@dataclass(frozen=True)
class Readout:
    """One way to predict from a trained network.

    Attributes:
        name: as in the metrics' names, ``euler-9`` in ``l2@zeros/euler-9``.
        sample: (net, c (R, B, C), x0 (R, B, D)) to the prediction of x1 (R, B, D).
        counted: the same, with the evaluations of the network that each prediction took, (R, B); None where they are
            the same for all.
    """

    name: str
    sample: Callable[[ConditionalNet, Tensor, Tensor], Tensor]
    counted: Callable[[ConditionalNet, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def expand_time(x: Tensor, t: Tensor | float) -> Tensor:
    """Return the time t, a number or a tensor that broadcasts, as a column (R, B, 1) for x (R, B, D)."""
    return torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)


class Objective:
    """A training objective; of somebody's own, ``--model.objective mine.XPrediction``.

    A subclass sets ``with_time`` and gives :meth:`residuals` and :meth:`readout`. All tensors keep the replica axis,
    the first.

    Attributes:
        with_time: whether the network is given t.
        samples_time: whether :meth:`residuals` use t.
        x0_distribution: that of x0 in training, unless ``--model.x0`` is given.
    """

    with_time: bool
    samples_time = False
    x0_distribution: X0Distribution = "gaussian"

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """Return the terms of the loss, each prediction - target (R, B, D); the loss is the sum of their norms."""
        raise NotImplementedError

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """Return the configured readout, whose errors are ``l1`` and ``l2``; arguments as :func:`integrate`."""
        raise NotImplementedError

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """Return every readout of one checkpoint, for all solvers and numbers of function evaluations.

        By default :meth:`readout` for each solver and number that it can spend, each name once.
        """
        pairs = [(s, n) for s in solvers for n in nfes if n % EVALUATIONS_PER_STEP.get(s, 1) == 0]
        return list({way.name: way for way in (self.readout(s, n) for s, n in pairs)}.values())


class Regression(Objective):
    """Regression, l(f(x0, c), x1) with x0 = 0; the module may train it with Gaussian x0."""

    with_time = False
    x0_distribution: X0Distribution = "zeros"

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        return [net(x0, c) - x1]

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`."""
        return Readout("direct", lambda net, c, x0: net(x0, c))

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        return [self.readout("euler", 1)]


class Flow(Objective):
    """Flow matching, l(v(x_t, c, t), x1 - x0) (Lipman et al. 2022), read out by integrating dx/dt = v."""

    with_time = True
    samples_time = True

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        return [net(interpolate(x0, x1, t), c, t) - (x1 - x0)]

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`."""

        def sample(net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
            return integrate(lambda t, x: net(x, c, expand_time(x, t)), x0, solver, nfe)

        def counted(net: ConditionalNet, c: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
            return integrate_rows(lambda t, x: net(x, c, t), x0)

        if solver == "dopri5":
            return Readout("dopri5", lambda net, c, x0: counted(net, c, x0)[0], counted)
        return Readout(f"{solver}-{nfe}", sample)

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`; an nfe that a solver cannot spend exactly is left out for it."""
        pairs: list[tuple[Solver, int]] = [
            (s, n) for s in solvers if s != "dopri5" for n in nfes if n % EVALUATIONS_PER_STEP[s] == 0
        ]
        if "dopri5" in solvers:
            pairs.append(("dopri5", 1))
        return [self.readout(s, n) for s, n in pairs]


class StraightFlow(Objective):
    """Prediction of the path's end point without time, l(f(x_t, c), x1); read out by :func:`straight_step`."""

    with_time = False
    samples_time = True

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        return [net(interpolate(x0, x1, t), c) - x1]

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`; ``nfe`` affine steps, the ODE solver is not used."""

        def sample(net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
            x = x0
            for i in range(nfe):
                x = straight_step(x, net(x, c), i / nfe, (i + 1) / nfe)
            return x

        return Readout(f"affine-{nfe}", sample)

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        return [self.readout("euler", n) for n in nfes]


class MIP(Objective):
    """Minimal iterative policy (Pan et al. 2025, arXiv 2512.01809): l(f(x0, c, 0), x1) + l(f(x_t*, c, t*), x1).

    Read out in two steps, a0 = f(x0, c, 0) and then f(x_t*, c, t*) with x_t* on the line from x0 to a0.

    Args:
        t_star: t*, the second step's time.
        form: ``published`` starts both terms from x0 and feeds (1 - t*) x0 + t* a0 to the second step; ``paper``
            starts the first from zeros and feeds t* a0.
        one_step: take the first step's prediction for the configured readout.

    Raises:
        ToyError: t* is not between 0 and 1.
    """

    with_time = True

    def __init__(self, t_star: float = 0.9, form: Literal["published", "paper"] = "published", one_step: bool = False):
        require(0 < t_star < 1, f"--model.t_star: {t_star} is not allowed; give a number between 0 and 1")
        self.t_star, self.form, self.one_step = t_star, form, one_step

    def first_input(self, x0: Tensor) -> Tensor:
        """Return the first step's input x (R, B, D): x0, or zeros in the paper's form."""
        return torch.zeros_like(x0) if self.form == "paper" else x0

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        t_star = expand_time(x1, self.t_star)
        first = net(self.first_input(x0), c, torch.zeros_like(t_star))
        return [first - x1, net(interpolate(x0, x1, t_star), c, t_star) - x1]

    def first_step(self, net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
        """Return a0 = f(x0, c, 0), (R, B, D)."""
        start = self.first_input(x0)
        out: Tensor = net(start, c, expand_time(start, 0.0))
        return out

    def second_step(self, net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
        """Return f(x_t*, c, t*), (R, B, D), with x_t* on the line from the first step's input to a0."""
        t_star = expand_time(x0, self.t_star)
        a0 = self.first_step(net, c, x0).to(x0)  # autocast hands half precision back
        out: Tensor = net(interpolate(self.first_input(x0), a0, t_star), c, t_star)
        return out

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`."""
        return self.readouts([], [])[0]

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        both = [Readout("two-step", self.second_step), Readout("one-step", self.first_step)]
        return both[::-1] if self.one_step else both


def make_objective(mode: Mode, t_star: float, mip_form: Literal["published", "paper"]) -> Objective:
    """Return the objective of that name; mip's settings are checked for every mode.

    Raises:
        ToyError: there is no such mode, or ``t_star`` is not between 0 and 1.
    """
    mip = MIP(t_star, mip_form, one_step=mode == "mip_one_step")
    objectives: dict[str, Callable[[], Objective]] = {
        "regression": Regression,
        "flow": Flow,
        "straight_flow": StraightFlow,
        "mip": lambda: mip,
        "mip_one_step": lambda: mip,
    }
    allowed = ", ".join(objectives)
    require(
        mode in objectives,
        f"--model.mode: {mode!r} is not allowed; give one of {allowed}{did_you_mean(str(mode), objectives)}",
    )
    return objectives[mode]()
