"""The training objectives, and how each predicts (its readouts).

Symbols: c (R, B, 1) the condition, x1 = f(c) (R, B, D) the target, x0 (R, B, D) the start of the path, t ~ U(0, 1)
(R, B, 1), x_t = (1 - t) x0 + t x1. An objective returns residuals; the module turns them into L1 or L2 losses. A
readout turns (c, x0) into a prediction of x1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
        times: how many independent uniform times a row of t has.
        extra_conditions: columns that the objective puts beside c when it calls the network.
        x0_distribution: that of x0 in training, unless ``--model.x0`` is given.
    """

    with_time: bool
    samples_time = False
    times = 1
    extra_conditions = 0
    x0_distribution: X0Distribution = "gaussian"

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """Return the terms of the loss, each prediction - target (R, B, D); the loss is the sum of their norms."""
        raise NotImplementedError

    def of_replicas(self, replicas: Sequence[int], count: int) -> Objective:
        """Return what gives the :meth:`residuals` of some of a run's replicas: this, unless it keeps something of each.

        Args:
            replicas: their places among the run's, from 0; a trial of a run of one asks for ``[0, 0]``.
            count: of the run's replicas.
        """
        return self

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


MIPForm = Literal["published", "path", "paper"]


@dataclass(frozen=True)
class MIPInputs:
    """What mip's network is given as x.

    Attributes:
        first: x0 (R, B, D) to the first step's input, in training and in readouts.
        second: (first input, a0, t*) to the second readout step's input.
    """

    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor, Tensor, float], Tensor]


def unchanged(x0: Tensor) -> Tensor:
    """Return x0."""
    return x0


MIP_FORMS: dict[MIPForm, MIPInputs] = {
    "published": MIPInputs(unchanged, lambda start, a0, t: a0),
    "path": MIPInputs(unchanged, lambda start, a0, t: (1 - t) * start + t * a0),
    "paper": MIPInputs(torch.zeros_like, lambda start, a0, t: t * a0),
}


class MIP(Objective):
    """Minimal iterative policy (Pan et al. 2025, arXiv 2512.01809): l(f(x0, c, 0), x1) + l(f(x_t*, c, t*), x1).

    Read out in two steps: a0 = f(x0, c, 0), then f of an input made of a0, at t*.

    Args:
        t_star: t*, the second step's time.
        form: ``published`` starts from x0 and feeds a0 as it is to the second step, as the public toy code does;
            ``path`` feeds it (1 - t*) x0 + t* a0, the point that it was trained at; ``paper`` starts from zeros and
            feeds it t* a0. ``published`` and ``path`` are trained alike, and each reads out the other's second step
            too.

    Raises:
        ToyError: t* is not between 0 and 1, or there is no such form.
    """

    with_time = True

    def __init__(self, t_star: float = 0.9, form: MIPForm = "published"):
        require(0 < t_star < 1, f"--model.t_star: {t_star} is not allowed; give a number between 0 and 1")
        require(
            form in MIP_FORMS,
            f"--model.mip_form: {form!r} is not allowed; give one of {', '.join(MIP_FORMS)}"
            f"{did_you_mean(str(form), MIP_FORMS)}",
        )
        self.t_star, self.form = t_star, form

    def first_input(self, x0: Tensor) -> Tensor:
        """Return the first step's input x (R, B, D): x0, or zeros in the paper's form."""
        return MIP_FORMS[self.form].first(x0)

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
        """Return the second step's prediction f(x, c, t*), (R, B, D), x as the form makes it of a0."""
        return self.second_step_of(MIP_FORMS[self.form], net, c, x0)

    def second_step_of(self, inputs: MIPInputs, net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
        """Return the second step's prediction (R, B, D) with the input of any form."""
        a0 = self.first_step(net, c, x0).to(x0)  # autocast hands half precision back
        x = inputs.second(self.first_input(x0), a0, self.t_star)
        out: Tensor = net(x, c, expand_time(x0, self.t_star))
        return out

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`."""
        return self.readouts([], [])[0]

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`: both steps, and the second steps of the forms that are trained alike."""
        found = [Readout("two-step", self.second_step), Readout("one-step", self.first_step)]
        for name, inputs in MIP_FORMS.items():
            if name != self.form and inputs.first is MIP_FORMS[self.form].first:
                found.append(Readout(f"two-step-{name}", partial(self.second_step_of, inputs)))
        return found


class MIPOneStep(Objective):
    """mip's loss with a network that is not given t, l(f(x0, c), x1) + l(f(x_t*, c), x1); read out by f(x0, c).

    The public toy code's ``mip_one_step_integrate``: a network of its own, not the first step of :class:`MIP`'s.

    Args:
        t_star: t*, where on the path the second term lies.

    Raises:
        ToyError: t* is not between 0 and 1.
    """

    with_time = False

    def __init__(self, t_star: float = 0.9):
        require(0 < t_star < 1, f"--model.t_star: {t_star} is not allowed; give a number between 0 and 1")
        self.t_star = t_star

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        return [net(x0, c) - x1, net(interpolate(x0, x1, expand_time(x1, self.t_star)), c) - x1]

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`."""
        return Readout("one-step", lambda net, c, x0: net(x0, c))

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        return [self.readout("euler", 1)]


def make_objective(mode: Mode, t_star: float, mip_form: MIPForm) -> Objective:
    """Return the objective of that name; mip's settings are checked for every mode.

    Raises:
        ToyError: there is no such mode, or ``t_star`` is not between 0 and 1.
    """
    mip, one_step = MIP(t_star, mip_form), MIPOneStep(t_star)
    objectives: dict[str, Callable[[], Objective]] = {
        "regression": Regression,
        "flow": Flow,
        "straight_flow": StraightFlow,
        "mip": lambda: mip,
        "mip_one_step": lambda: one_step,
    }
    allowed = ", ".join(objectives)
    require(
        mode in objectives,
        f"--model.mode: {mode!r} is not allowed; give one of {allowed}{did_you_mean(str(mode), objectives)}",
    )
    return objectives[mode]()
