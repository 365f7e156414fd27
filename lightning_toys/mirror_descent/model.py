"""What samplers know of q(a, s') at each noise level: the exact law, or a learned energy of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.mirror_descent.joint import Level
from lightning_toys.mirror_descent.kernels import Target, gaussian, with_standard_normal
from lightning_toys.mirror_descent.score import EnergyScore, whole_gradients
from lightning_toys.mirror_descent.tilt import Tilted

Array = NDArray[np.float64]


def linear(A: Array, x: Tensor, b: Array | None = None) -> Tensor:
    """Return A x + b for x (2, B) and an A (2, 2) of numbers."""
    rows = [x[0] * float(row[0]) + x[1] * float(row[1]) for row in A]
    if b is not None:
        rows = [row + float(c) for row, c in zip(rows, b, strict=True)]
    return torch.stack(rows)


class Model:
    """The law q of (a, s') at every level."""

    exact: bool

    def action(self, at: Tilted) -> Target:
        """Return the target q(a) exp(beta Q(a)) of actions (1, B)."""
        raise NotImplementedError

    def joint(self, at: Tilted) -> Target:
        """Return the target q(a, s') exp(beta Q(a)) of (a, u) (2, B), u = (s' - rho a - c) / sqrt(v)."""
        raise NotImplementedError

    def pull(self, at: Tilted) -> Callable[[Tensor], Tensor]:
        """Return the gradient of :meth:`action`'s log density: (1, B) to (1, B)."""
        target = self.action(at)
        return lambda a: target(a)[1]

    def score(self, level: Level, x: Tensor) -> Tensor:
        """Return the gradient of log q at x (2, B)."""
        raise NotImplementedError

    def score_and_slopes(self, level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score (2, B) and its derivatives H (2, 2, B), H[i, j] = dS_i / dx_j."""
        raise NotImplementedError


class ExactModel(Model):
    """The law itself."""

    exact = True

    def action(self, at: Tilted) -> Target:
        """See :meth:`Model.action`."""
        return gaussian(at.mu, at.tau)

    def joint(self, at: Tilted) -> Target:
        """See :meth:`Model.joint`: the two are independent."""
        return with_standard_normal(gaussian(at.mu, at.tau))

    def pull(self, at: Tilted) -> Callable[[Tensor], Tensor]:
        """See :meth:`Model.pull`."""
        mu, tau = at.mu, at.tau
        return lambda a: (mu - a) * tau

    def score(self, level: Level, x: Tensor) -> Tensor:
        """See :meth:`Model.score`."""
        return linear(-level.precision, x, level.precision @ level.m)

    def score_and_slopes(self, level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Model.score_and_slopes`."""
        H = torch.from_numpy(-level.precision).to(x)
        return self.score(level, x), H.unsqueeze(-1).expand(2, 2, x.shape[-1])


class LearnedModel(Model):
    """One replica of a learned energy.

    s' | a, where a sampler draws it, is still the known dynamics'; along its mean s' = rho a + c the joint law is q(a)
    times a constant, which is how the energy of the pair gives that of the action.

    Args:
        net: an :class:`EnergyScore` of one replica.
    """

    exact = False

    def __init__(self, net: EnergyScore) -> None:
        self.net = net

    @staticmethod
    def rows(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the energy takes for x (2, B): places (1, B, 2) and their level (1, B, 1)."""
        rows = x.T.unsqueeze(0)
        return rows, torch.full_like(rows[..., :1], level.abar)

    def log_density(self, level: Level, x: Tensor) -> Tensor:
        """Return log q (B,) up to a constant, with its graph, at x (2, B)."""
        return self.net.log_density(*self.rows(level, x))[0]

    def differentiated(self, at: Tilted, pair: Callable[[Tensor], Tensor]) -> Target:
        """Return the target log q(pair(x)) + beta Q(x_0)."""
        A, b = at.beta * at.Q.A, at.beta * at.Q.b

        def target(x: Tensor) -> tuple[Tensor, Tensor]:
            with whole_gradients(x.device.type):
                x = x.detach().requires_grad_(True)
                log_p = self.log_density(at.level, pair(x)) + b * x[0] - 0.5 * A * x[0].square()
                (gradient,) = torch.autograd.grad(log_p.sum(), x)
            return log_p.detach(), gradient

        return target

    def action(self, at: Tilted) -> Target:
        """See :meth:`Model.action`."""
        rho, c = at.level.rho, at.level.c
        return self.differentiated(at, lambda a: torch.cat([a, rho * a + c]))

    def joint(self, at: Tilted) -> Target:
        """See :meth:`Model.joint`."""
        rho, c, std = at.level.rho, at.level.c, at.level.v**0.5
        return self.differentiated(at, lambda y: torch.stack([y[0], rho * y[0] + c + std * y[1]]))

    def score(self, level: Level, x: Tensor) -> Tensor:
        """See :meth:`Model.score`."""
        return self.net.score(*self.rows(level, x))[0].T

    def score_and_slopes(self, level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Model.score_and_slopes`."""
        with whole_gradients(x.device.type):
            x = x.detach().requires_grad_(True)
            (S,) = torch.autograd.grad(self.log_density(level, x).sum(), x, create_graph=True)
            rows = [torch.autograd.grad(S[i].sum(), x, retain_graph=i == 0)[0] for i in range(2)]
        return S.detach(), torch.stack(rows)
