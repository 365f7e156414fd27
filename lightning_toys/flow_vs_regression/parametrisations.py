"""The same flow in other parametrisations, by the cosine path, and the minimal iterative policy of its authors.

Symbols as in ``objectives.py``. The cosine path is x_t = sin(a) x1 + cos(a) x0 with a = pi t / 2 (Nichol and Dhariwal
2021); its derivative by the angle is w = cos(a) x1 - sin(a) x0. x1 and w give each other: x1 = sin(a) x_t + cos(a) w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_toys.errors import check_settings, require
from lightning_toys.flow_vs_regression.objectives import Objective, Readout, expand_time
from lightning_toys.flows import Solver
from lightning_toys.nets import ConditionalNet


def on_cosine_path(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t and its derivative by the angle, w, (R, B, D) each.

    >>> x, w = on_cosine_path(torch.tensor([3.0]), torch.tensor([5.0]), torch.tensor([1.0]))
    >>> [round(float(y), 6) for y in (x, w)]
    [5.0, -3.0]
    """
    a = t * (math.pi / 2)
    return a.sin() * x1 + a.cos() * x0, a.cos() * x1 - a.sin() * x0


class CosinePath(Objective):
    """A flow on the cosine path, read out by rotating x by equal angles, the deterministic DDIM step."""

    with_time = True
    samples_time = True

    def angular_velocity(self, net: ConditionalNet, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """Return the network's w, (R, B, D)."""
        raise NotImplementedError

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`; ``nfe`` rotations, the ODE solver is not used."""

        def sample(net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
            x, turn = x0, math.pi / 2 / nfe
            for k in range(nfe):
                w = self.angular_velocity(net, x, c, expand_time(x, k / nfe)).to(x0)
                x = math.cos(turn) * x + math.sin(turn) * w
            return x

        return Readout(f"ddim-{nfe}", sample)

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        return [self.readout("euler", n) for n in nfes]


class VPrediction(CosinePath):
    """v-prediction (Salimans and Ho 2022, arXiv 2202.00512): l(net(x_t, c, t), w), with w of their sign reversed."""

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        x, w = on_cosine_path(x0, x1, t)
        return [net(x, c, t) - w]

    def angular_velocity(self, net: ConditionalNet, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """See :meth:`CosinePath.angular_velocity`."""
        out: Tensor = net(x, c, t)
        return out


class XPrediction(CosinePath):
    """x-prediction: l(net(x_t, c, t), x1), the data themselves; w = (x1 - sin(a) x_t) / cos(a)."""

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`."""
        x, _ = on_cosine_path(x0, x1, t)
        return [net(x, c, t) - x1]

    def angular_velocity(self, net: ConditionalNet, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """See :meth:`CosinePath.angular_velocity`; not to be asked at t = 1."""
        a = t * (math.pi / 2)
        out: Tensor = (net(x, c, t) - a.sin() * x) / a.cos()
        return out


class AuthorsMIP(Objective):
    """The minimal iterative policy as its authors train it (Pan et al. 2025, arXiv 2512.01809, and their code).

    |f(0, c, 0) - x1|^2 / t*^2 + |f(x1 + (1 - t*) z, c, t*) - x1|^2 / (1 - t*)^2 with z ~ N(0, I). Read out in two
    steps, a0 = f(0, c, 0) and then f(t* a0, c, t*), as in the paper, or f(a0, c, t*), as the code does by default. With
    ``--model.loss l1`` the weights are the roots of these.

    Args:
        t_star: t*, the second step's time.
        second: what the second step is fed, ``scaled`` by t* or ``unscaled``.

    Raises:
        ToyError: a setting is not allowed.
    """

    with_time = True

    def __init__(self, t_star: float = 0.9, second: Literal["scaled", "unscaled"] = "scaled"):
        check_settings(AuthorsMIP, locals(), "--model.objective.")
        require(0 < t_star < 1, f"--model.objective.t_star: {t_star} is not allowed; give a number between 0 and 1")
        self.t_star, self.factor = t_star, t_star if second == "scaled" else 1.0

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`; z is the draw of x0."""
        noisy = x1 + (1 - self.t_star) * x0
        first = net(torch.zeros_like(x1), c, expand_time(x1, 0.0)) - x1
        second = net(noisy, c, expand_time(x1, self.t_star)) - x1
        return [first / self.t_star, second / (1 - self.t_star)]

    def first_step(self, net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
        """Return a0, (R, B, D); it depends on no draw."""
        out: Tensor = net(torch.zeros_like(x0), c, expand_time(x0, 0.0))
        return out

    def second_step(self, net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
        """Return the second step's prediction, (R, B, D)."""
        a0 = self.first_step(net, c, x0).to(x0)
        out: Tensor = net(self.factor * a0, c, expand_time(x0, self.t_star))
        return out

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """See :meth:`Objective.readout`."""
        return self.readouts([], [])[0]

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """See :meth:`Objective.readouts`."""
        return [Readout("two-step", self.second_step), Readout("one-step", self.first_step)]
