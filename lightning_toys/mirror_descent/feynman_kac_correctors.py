"""Feynman-Kac correctors (Skreta et al. 2025, arXiv 2503.02819): guided particles whose weights pay for the guidance.

With q_k the density of level k and V_k = beta_k Q_k, the rewards as product of experts has them, the intermediate
targets are q_k(a, s') exp(V_k(a)). In time h = log abar the reverse SDE of q is dx = (x / 2 + S) dh + dW, S its score
(see :mod:`reverse_process`). Their reward-tilted SDE takes half of the gradient,

    dx = (x / 2 + S + grad V / 2) dh + dW,    d log w = (dV / dh + grad V . (x / 2 + S / 2)) dh,

which the Fokker-Planck equation of q exp(V) gives. Here a step solves the linear drift exactly: with g = exp(h / 2),
x <- g x + 2 (g - 1) (S + grad V / 2) + N(0, (g^2 - 1) I), and log w grows by
V_(k + 1)(g x) - V_k(x) + (g - 1) grad V . S at the old x. Its error falls with the number of levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import Array, propagate
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample, check_mean
from lightning_toys.mirror_descent.joint import Gaussian
from lightning_toys.mirror_descent.kernels import Noise
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.resampling import Resampling, Systematic
from lightning_toys.mirror_descent.reverse_process import sde_step
from lightning_toys.mirror_descent.steering import ParticleSteering


class FeynmanKacCorrectors(ParticleSteering):
    """Reward-tilted Feynman-Kac correctors (Skreta et al. 2025): ``sde_poe`` at half its scale, and weights.

    Levels are those of ``smc_K``. In the linear-Gaussian problem the distribution of infinitely many particles is known
    at any number of levels. It tends to the target's as they grow.

    Args:
        problem: the sampling problem; the last level's beta is lambda, whatever its schedule says.
        resampling: the scheme's class.
    """

    name = "fkc"

    def __init__(self, problem: Problem, resampling: Callable[[], Resampling] = Systematic) -> None:
        super().__init__(problem, resampling)
        abars = [level.abar for level in self.levels]
        betas = [problem.lambda_scale * problem.schedule.fraction(x, abars[0]) for x in abars[:-1]]
        self.tilts: list[Any] = [
            level.value_of(problem.reward).scaled(beta)
            for level, beta in zip(self.levels, [*betas, problem.lambda_scale], strict=True)
        ]

    def growth(self, k: int) -> float:
        """Return g = sqrt(abar' / abar) of step k."""
        return math.sqrt(self.levels[k + 1].abar / self.levels[k].abar)

    def first_weights(self, x: Tensor, runs: int) -> tuple[Tensor, Sequence[Tensor]]:
        """See :meth:`ParticleSteering.first_weights`: there is no memory."""
        return self.tilts[0].value(x[: self.problem.joint.action_dim].double()).view(runs, -1), ()

    def advance(
        self, noise: Noise, k: int, x: Tensor, memory: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """See :meth:`ParticleSteering.advance`."""
        level, d, g = self.levels[k], self.problem.joint.action_dim, self.growth(k)
        S = self.problem.model.score(level, x)
        gradient = self.tilts[k].gradient(x[:d])
        wide = x[:d].double()
        log_g = self.tilts[k + 1].value(g * wide) - self.tilts[k].value(wide)
        log_g = log_g + (g - 1) * (gradient * S[:d]).sum(0).double()
        step = sde_step(level.abar, self.levels[k + 1].abar)
        guided = torch.cat([S[:d] + 0.5 * gradient, S[d:]])
        x = torch.add(step.x_scale * x, guided, alpha=step.score_scale)
        x = torch.add(x, noise.normal(len(x)), alpha=math.sqrt(step.variance))
        return x, log_g.view(-1, self.group), ()

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        return Cost(prior=1, score=self.steps, value=self.steps + 1)

    @cached_property
    def limit(self) -> tuple[Gaussian, float] | None:
        """The distribution of infinitely many particles at these levels, and log Z; None where it is not known."""
        if not self.problem.model.exact:
            return None
        first = self.tilts[0]
        found = weighed(self.levels[0], np.diag([first.A, 0.0]), np.array([first.b, 0.0]))
        log_z = first.const
        for k in range(self.steps):
            if found is None:
                return None
            x, gained = found
            log_z += gained
            level, V, W, g = self.levels[k], self.tilts[k], self.tilts[k + 1], self.growth(k)
            P, c = level.precision, g - 1
            row, shift = P[0], float(P[0] @ level.m)  # S_1 = shift - row . x
            M = np.diag([g * g * W.A - V.A, 0.0])
            M[0] -= c * V.A * row
            M[:, 0] -= c * V.A * row
            n = np.array([g * W.b - V.b - c * V.A * shift, 0.0]) - c * V.b * row
            log_z += W.const - V.const + c * V.b * shift
            found = weighed(x, M, n)
            if found is None:
                return None
            x, gained = found
            log_z += gained
            step = sde_step(level.abar, self.levels[k + 1].abar)
            x = propagate(x, step.affine(np.diag([-0.5 * V.A, 0.0]) - P, P @ level.m + np.array([0.5 * V.b, 0.0])))
            found = x, 0.0
        assert found is not None
        return found[0], log_z

    def exact_distribution(self) -> Gaussian | None:
        """See :meth:`Sampler.exact_distribution`: of infinitely many particles."""
        return None if self.limit is None else self.limit[0]

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """See :meth:`Sampler.own_checks`: Z at these levels, where it is known: its estimate has no bias from that."""
        if self.limit is None:
            return []
        log_z = self.problem.tilted.log_z
        found = [math.exp(v - log_z) for x in samples for v in (x.extra or {})["log_z"]]
        return [check_mean(self.name, "Z / exact Z", math.exp(self.limit[1] - log_z), found)]


def weighed(x: Gaussian, M: Array, n: Array) -> tuple[Gaussian, float] | None:
    """Return N(m, C) exp(n . x - x . M x / 2) / Z, and log Z; None where there is no integral."""
    P = np.linalg.inv(x.C) + M
    if np.linalg.eigvalsh(P).min() <= 0:
        return None
    C: Array = np.linalg.inv(P).astype(np.float64)
    b = np.linalg.solve(x.C, x.m)
    m: Array = C @ (b + n)
    log_det = np.linalg.slogdet(C)[1] - np.linalg.slogdet(x.C)[1]
    return Gaussian(m, C), float(0.5 * (log_det + m @ (b + n) - x.m @ b))
