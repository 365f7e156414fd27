"""What chains do on q(a, s'): draws, scores and targets at each noise level, in closed form or learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.mirror_descent.affine import covariance_root, reverse_kernel
from lightning_toys.mirror_descent.batched_cholesky import clamped_cholesky, lower_times
from lightning_toys.mirror_descent.energy import EnergyNet, grad_without_autocast
from lightning_toys.mirror_descent.joint import NoiseLevel
from lightning_toys.mirror_descent.joint_distribution import Tilted
from lightning_toys.mirror_descent.kernels import Noise, Target, gaussian_target, times_standard_normal
from lightning_toys.mirror_descent.tilt import Reward, TiltedAction, tilt

Array = NDArray[np.float64]


def affine_map(A: Array, x: Tensor, b: Array | None = None) -> Tensor:
    """Return A x + b for x (2, ...), A (2, 2) and b (2,); the numbers of A and b are taken as Python floats."""
    rows = [x[0] * float(row[0]) + x[1] * float(row[1]) for row in A]
    if b is not None:
        rows = [row + float(c) for row, c in zip(rows, b, strict=True)]
    return torch.stack(rows)


def refresh(noise: Noise, level: NoiseLevel, a: Tensor) -> Tensor:
    """Draw s' (B,) given actions a (B,) at a level of the linear-Gaussian problem."""
    return torch.add(noise.normal()[0] * math.sqrt(level.v) + level.c, a, alpha=level.rho)


def sample_prior(noise: Noise, level: NoiseLevel) -> Tensor:
    """Draw actions (B,) of the untilted distribution at a level of the linear-Gaussian problem."""
    return noise.normal()[0] * math.sqrt(level.C[0, 0]) + float(level.m[0])


class JointModel:
    """The distribution q of (a, s') at every noise level. Chains are along the last axis B.

    What is not said otherwise here is that of the linear-Gaussian problem. Others have levels and tilts of their own
    (:class:`joint_distribution.Level`, :class:`joint_distribution.Tilted`), and rows (d, B) in place of one.

    Attributes:
        exact: whether this is the linear-Gaussian closed form, for which samplers may use the Gaussians' coefficients.
        linear: whether its levels are those of the linear-Gaussian problem, exact or learned.
        normalised: whether :meth:`log_density` has the right constant at every level.
    """

    exact: bool
    linear: bool = True
    normalised: bool = False

    def measured_from(self, origin: Array) -> JointModel:
        """Return the same distribution of pairs that are measured from a clean origin (2,)."""
        raise NotImplementedError

    def tilt(self, level: Any, reward: Reward, beta: float) -> Tilted:
        """Return q(a, s') exp(beta Q(a)) / Z at a level."""
        return tilt(level, reward, beta)

    def draw(self, noise: Noise, level: Any) -> Tensor:
        """Draw x (D, B) of the untilted distribution at a level."""
        return affine_map(covariance_root(level.C), noise.normal(2), level.m)

    def draw_action(self, noise: Noise, level: Any) -> Tensor:
        """Draw actions (d_a, B) of the untilted distribution at a level."""
        return sample_prior(noise, level).unsqueeze(0)

    def draw_state(self, noise: Noise, level: Any, a: Tensor) -> Tensor:
        """Draw s' (d_s, B) given actions a (d_a, B) at a level."""
        return refresh(noise, level, a[0]).unsqueeze(0)

    def draw_reverse(self, noise: Noise, noisy: Any, cleaner: Any, x: Tensor) -> Tensor:
        """Draw x (D, B) at a cleaner level given x at a noisy one: exactly, by the untilted reverse kernel."""
        kernel = reverse_kernel(noisy, cleaner)
        return affine_map(kernel.A, x, kernel.b) + affine_map(covariance_root(kernel.D), noise.normal(2))

    def log_density(self, level: Any, x: Tensor) -> Tensor:
        """Return log q (B,) at x (D, B), up to a constant of each level unless :attr:`normalised`."""
        raise NotImplementedError

    def soft_value_gradient(self, level: Any, rule: Any, x: Tensor) -> Tensor:
        """Return the gradient (D, B) in x of log E[exp(lambda Q(a_0)) | x], for the rule that is Doob's h-transform."""
        G, g = rule.affine_term(level, rule.lambda_scale)
        return affine_map(G, x, g)

    def action_target(self, tilted: Any) -> Target:
        """Return the target q(a) exp(beta Q(a)) of actions (d_a, B)."""
        raise NotImplementedError

    def joint_target(self, tilted: Any) -> Target:
        """Return the target q(a, s') exp(beta Q(a)) of (a, u) (2, B), u = (s' - rho a - c) / sqrt(v)."""
        raise NotImplementedError

    def action_score(self, tilted: Any) -> Callable[[Tensor], Tensor]:
        """Return the gradient of :meth:`action_target`'s log density, a function of (d_a, B) to (d_a, B)."""
        target = self.action_target(tilted)
        return lambda a: target(a)[1]

    def score(self, level: Any, x: Tensor) -> Tensor:
        """Return the gradient (D, B) of log q at x (D, B)."""
        raise NotImplementedError

    def score_and_jacobian(self, level: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score S (D, B) at x (D, B) and its Jacobian H (D, D, B), H[i, j] = dS_i / dx_j."""
        raise NotImplementedError


class ExactModel(JointModel):
    """The closed form of q."""

    exact = True

    def measured_from(self, origin: Array) -> ExactModel:
        """See :meth:`JointModel.measured_from`: its coefficients are the level's."""
        return self

    def action_target(self, tilted: TiltedAction) -> Target:
        """See :meth:`JointModel.action_target`."""
        return gaussian_target(tilted.mu, tilted.tau)

    def joint_target(self, tilted: TiltedAction) -> Target:
        """See :meth:`JointModel.joint_target`: a and u are independent."""
        return times_standard_normal(gaussian_target(tilted.mu, tilted.tau))

    def action_score(self, tilted: TiltedAction) -> Callable[[Tensor], Tensor]:
        """See :meth:`JointModel.action_score`."""
        mu, tau = tilted.mu, tilted.tau
        return lambda a: (mu - a) * tau

    def score(self, level: NoiseLevel, x: Tensor) -> Tensor:
        """See :meth:`JointModel.score`: -C^-1 (x - m)."""
        return affine_map(-level.precision, x, level.precision @ level.m)

    def score_and_jacobian(self, level: NoiseLevel, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`JointModel.score_and_jacobian`: the Jacobian is -C^-1."""
        H = torch.from_numpy(-level.precision).to(x)
        return self.score(level, x), H.unsqueeze(-1).expand(2, 2, x.shape[-1])


class LearnedModel(JointModel):
    """One replica of a learned energy.

    s' | a, where a sampler draws it, is still that of the known dynamics; along its mean s' = rho a + c the joint
    density is q(a) times a constant, which is how the energy of (a, s') gives that of the action.

    Args:
        net: an :class:`EnergyNet` of one replica.
        mean: the clean mean (2,) of pairs as the net knows them, where those given are measured from an origin.
    """

    exact = False

    def __init__(self, net: EnergyNet, mean: Array | None = None) -> None:
        self.net, self.mean = net, mean

    def measured_from(self, origin: Array) -> LearnedModel:
        """See :meth:`JointModel.measured_from`; the origin is the mean of the pairs."""
        return LearnedModel(self.net, origin)

    def net_inputs(self, level: NoiseLevel, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the net's inputs for x (2, B): the points (1, B, 2) and their abar (1, B, 1)."""
        if self.mean is not None:
            offset = level.abar**0.5 * self.mean - level.m
            x = x + torch.from_numpy(offset).to(x).unsqueeze(-1)
        rows = x.T.unsqueeze(0)
        return rows, torch.full_like(rows[..., :1], level.abar)

    def log_density(self, level: NoiseLevel, x: Tensor) -> Tensor:
        """Return log q (B,) up to a constant, with its graph, at x (2, B)."""
        return self.net.log_density(*self.net_inputs(level, x))[0]

    def autograd_target(self, tilted: TiltedAction, to_pair: Callable[[Tensor], Tensor]) -> Target:
        """Return the target log q(to_pair(x)) + beta Q(x_0), ``to_pair`` a map of x (D, B) to (a, s') (2, B)."""
        A, b = tilted.beta * tilted.Q.A, tilted.beta * tilted.Q.b

        def target(x: Tensor) -> tuple[Tensor, Tensor]:
            with grad_without_autocast(x.device.type):
                x = x.detach().requires_grad_(True)
                log_p = self.log_density(tilted.level, to_pair(x)) + b * x[0] - 0.5 * A * x[0].square()
                (gradient,) = torch.autograd.grad(log_p.sum(), x)
            return log_p.detach(), gradient

        return target

    def action_target(self, tilted: TiltedAction) -> Target:
        """See :meth:`JointModel.action_target`."""
        rho, c = tilted.level.rho, tilted.level.c
        return self.autograd_target(tilted, lambda a: torch.cat([a, rho * a + c]))

    def joint_target(self, tilted: TiltedAction) -> Target:
        """See :meth:`JointModel.joint_target`."""
        rho, c, std = tilted.level.rho, tilted.level.c, tilted.level.v**0.5
        return self.autograd_target(tilted, lambda y: torch.stack([y[0], rho * y[0] + c + std * y[1]]))

    def score(self, level: NoiseLevel, x: Tensor) -> Tensor:
        """See :meth:`JointModel.score`."""
        return self.net.score(*self.net_inputs(level, x))[0].T

    def score_and_jacobian(self, level: NoiseLevel, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`JointModel.score_and_jacobian`."""
        with grad_without_autocast(x.device.type):
            x = x.detach().requires_grad_(True)
            (S,) = torch.autograd.grad(self.log_density(level, x).sum(), x, create_graph=True)
            rows = [torch.autograd.grad(S[i].sum(), x, retain_graph=i == 0)[0] for i in range(2)]
        return S.detach(), torch.stack(rows)

    def draw_reverse(self, noise: Noise, noisy: Any, cleaner: Any, x: Tensor) -> Tensor:
        """See :meth:`JointModel.draw_reverse`: the Gaussian with the energy's first two Tweedie moments."""
        S, H = self.score_and_jacobian(noisy, x)
        g2 = noisy.abar / cleaner.abar
        mean: Tensor = (x + (1 - g2) * S) / math.sqrt(g2)
        return mean + lower_times(clamped_cholesky(H, 1 - g2, (1 - g2) / g2), noise.normal(2))
