"""What chains do on a Gaussian mixture: draws, densities, scores, targets. Chains are along the last axis B."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.mirror_descent.joint_distribution import ActionFunction, Tilted
from lightning_toys.mirror_descent.kernels import Noise, Target
from lightning_toys.mirror_descent.mixture import Mixture
from lightning_toys.mirror_descent.model import JointModel
from lightning_toys.mirror_descent.rewards import SmoothedReward
from lightning_toys.mirror_descent.tilt import NoIntegralError, Reward
from lightning_toys.mirror_descent.truth import Truth, truth_of


def like(v: NDArray[Any], x: Tensor) -> Tensor:
    """Return an array as a tensor with the dtype and device of x."""
    return torch.from_numpy(np.ascontiguousarray(v)).to(x)


def component_scores(q: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log w_j N(x; m_j, C_j) (J, B), and the gradients of the logarithms (J, D, B), at x (D, B)."""
    W = like(q.whitening, x)
    y = W @ (x.unsqueeze(0) - like(q.means, x).unsqueeze(-1))
    log_n = like(q.log_constants, x).unsqueeze(-1) - 0.5 * y.square().sum(1)
    return log_n, -(W.transpose(1, 2) @ y)


def mixture_log_density(q: Mixture, x: Tensor) -> Tensor:
    """Return log q (B,) at x (D, B)."""
    return torch.logsumexp(component_scores(q, x)[0], 0)


def log_density_and_score(q: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log q (B,) and its gradient (D, B) at x (D, B)."""
    log_n, g = component_scores(q, x)
    return torch.logsumexp(log_n, 0), (torch.softmax(log_n, 0).unsqueeze(1) * g).sum(0)


def component_of(uniform: Tensor, probability: Tensor) -> Tensor:
    """Return the component (B,) that a uniform (B,) picks by probabilities (J, B), each column of sum 1."""
    return (uniform >= probability.cumsum(0)[:-1]).sum(0)


def pick(values: Tensor, component: Tensor) -> Tensor:
    """Return values[component] (..., B) for values (J, ..., B) and a component (B,)."""
    index = component.view(1, *[1] * (values.dim() - 2), -1).expand(1, *values.shape[1:])
    return values.gather(0, index)[0]


@dataclass(frozen=True)
class MixtureTilt(Tilted):
    """q(a, s') exp(beta Q(a)) / Z of a mixture at one noise level.

    Attributes:
        level: the mixture.
        beta: inverse temperature of the tilt.
        Q: the action value.
        reward: that gives it.
    """

    level: Mixture
    beta: float
    Q: ActionFunction
    reward: Reward

    @cached_property
    def truth(self) -> Truth:
        """What is known of it exactly; kept by the level, since quadrature takes a while."""
        return self.truth_at(self.beta)

    def truth_at(self, beta: float) -> Truth:
        """Return what is known of the same tilt at another inverse temperature."""
        key = (id(self.reward), beta)
        if key not in self.level.distributions:
            self.level.distributions[key] = (self.reward, truth_of(self.level, self.reward, beta))
        distribution: Truth = self.level.distributions[key][1]
        return distribution

    @cached_property
    def tau(self) -> float:
        """See :attr:`Tilted.tau`: the largest precision of a component's action, and beta times Q's curvature."""
        largest = float(np.linalg.eigvalsh(self.level.actions.precisions).max())
        return largest + self.beta * self.reward.curvature

    def log_weight(self, a: Tensor) -> Tensor:
        """See :meth:`Tilted.log_weight`."""
        return self.beta * self.Q.value(a)

    @property
    def log_weight_offset(self) -> float:
        """See :attr:`Tilted.log_weight_offset`."""
        return 0.0

    @property
    def log_z(self) -> float:
        """See :attr:`Tilted.log_z`."""
        return self.truth.log_z

    @cached_property
    def importance_ess_fraction(self) -> float:
        """See :attr:`Tilted.importance_ess_fraction`."""
        try:
            doubled = self.truth_at(2 * self.beta)
        except NoIntegralError:
            return 0.0
        return math.exp(2 * self.log_z - doubled.log_z)


class MixtureModel(JointModel):
    """The closed form of a Gaussian mixture."""

    exact = False
    linear = False
    normalised = True

    def tilt(self, level: Mixture, reward: Reward, beta: float) -> MixtureTilt:
        """See :meth:`JointModel.tilt`."""
        return MixtureTilt(level, beta, level.value_of(reward), reward)

    def draw(self, noise: Noise, level: Mixture) -> Tensor:
        """See :meth:`JointModel.draw`: a component by a uniform, then its Gaussian."""
        z = noise.normal(level.dim)
        probability = like(level.weights, z).unsqueeze(-1).expand(-1, z.shape[-1])
        j = component_of(noise.uniform()[0], probability)
        spread = like(np.linalg.cholesky(level.covariances), z) @ z
        return pick(like(level.means, z).unsqueeze(-1) + spread, j)

    def draw_action(self, noise: Noise, level: Mixture) -> Tensor:
        """See :meth:`JointModel.draw_action`."""
        return self.draw(noise, level.actions)

    def draw_state(self, noise: Noise, level: Mixture, a: Tensor) -> Tensor:
        """See :meth:`JointModel.draw_state`: a component by its probability given a, then its Gaussian given a."""
        d_s = level.dim - level.action_dim
        j = component_of(noise.uniform()[0], torch.softmax(component_scores(level.actions, a)[0], 0))
        z = noise.normal(d_s)
        d = level.action_dim
        away = a.unsqueeze(0) - like(level.means[:, :d], a).unsqueeze(-1)
        mean = like(level.means[:, d:], a).unsqueeze(-1) + like(level.gains, a) @ away
        spread = like(np.linalg.cholesky(level.residual_covariances), a) @ z
        return pick(mean + spread, j)

    def draw_reverse(self, noise: Noise, noisy: Mixture, cleaner: Mixture, x: Tensor) -> Tensor:
        """See :meth:`JointModel.draw_reverse`: a component by its probability given x, then its Gaussian's kernel."""
        log_n, _ = component_scores(noisy, x)
        j = component_of(noise.uniform()[0], torch.softmax(log_n, 0))
        g = math.sqrt(noisy.abar / cleaner.abar)
        gains = g * cleaner.covariances @ noisy.precisions
        covariances = cleaner.covariances - g * gains @ cleaner.covariances
        offsets = cleaner.means - np.einsum("jde,je->jd", gains, noisy.means)
        mean = like(gains, x) @ x + like(offsets, x).unsqueeze(-1)
        roots = like(np.linalg.cholesky(covariances), x)
        return pick(mean + roots @ noise.normal(len(x)), j)

    def log_density(self, level: Mixture, x: Tensor) -> Tensor:
        """See :meth:`JointModel.log_density`."""
        return mixture_log_density(level, x)

    def soft_value_gradient(self, level: Mixture, rule: Any, x: Tensor) -> Tensor:
        """See :meth:`JointModel.soft_value_gradient`.

        Of a quadratic, the score of the noised target less that of q. Else, of one action, a_0 given x is a mixture of
        Gaussians with means mu_j(x): E[exp(lambda Q) | x] = sum_j r_j(x) E exp(lambda Q(mu_j + std_j z)).
        """
        clean: Mixture = rule.joint.clean
        target: MixtureTilt = self.tilt(clean, rule.reward, rule.lambda_scale)
        if target.truth.mixture is not None:
            noised = target.truth.mixture.noised(level.abar)
            return log_density_and_score(noised, x)[1] - log_density_and_score(level, x)[1]
        if level.abar == 1.0:
            gradient = target.Q.scaled(rule.lambda_scale).gradient(x[:1])
            return torch.cat([gradient, torch.zeros_like(x[1:])])
        log_n, scores = component_scores(level, x)
        log_r, S = torch.log_softmax(log_n, 0), (torch.softmax(log_n, 0).unsqueeze(1) * scores).sum(0)
        gains = math.sqrt(level.abar) * clean.covariances[:, :1] @ level.precisions  # (J, 1, D)
        variances = clean.covariances[:, 0, 0] - math.sqrt(level.abar) * np.einsum(
            "jd,jd->j", gains[:, 0], clean.covariances[:, 0]
        )
        away = x.unsqueeze(0) - like(level.means, x).unsqueeze(-1)
        mean = like(clean.means[:, :1], x).unsqueeze(-1) + like(gains, x) @ away  # (J, 1, B)
        logs, grads = zip(
            *(
                SmoothedReward(rule.reward, rule.lambda_scale, math.sqrt(v), 1.0).logarithm(m)
                for v, m in zip(variances.tolist(), mean, strict=True)
            ),
            strict=True,
        )
        share = torch.softmax(log_r + torch.stack(logs), 0).unsqueeze(1)
        own = scores - S + like(gains, x).transpose(1, 2) * torch.stack(grads).unsqueeze(1)
        return (share * own).sum(0)

    def action_target(self, tilted: MixtureTilt) -> Target:
        """See :meth:`JointModel.action_target`."""
        actions, Q = tilted.level.actions, tilted.Q.scaled(tilted.beta)

        def target(a: Tensor) -> tuple[Tensor, Tensor]:
            log_q, score = log_density_and_score(actions, a)
            return log_q + Q.value(a), score + Q.gradient(a)

        return target

    def action_score(self, tilted: MixtureTilt) -> Callable[[Tensor], Tensor]:
        """See :meth:`JointModel.action_score`."""
        target = self.action_target(tilted)
        return lambda a: target(a)[1]

    def score(self, level: Mixture, x: Tensor) -> Tensor:
        """See :meth:`JointModel.score`."""
        return log_density_and_score(level, x)[1]

    def score_and_jacobian(self, level: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`JointModel.score_and_jacobian`: H = sum_j r_j (g_j g_j' - C_j^-1) - S S'."""
        log_n, g = component_scores(level, x)
        r = torch.softmax(log_n, 0)
        S = (r.unsqueeze(1) * g).sum(0)
        H = torch.einsum("jb,jdb,jeb->deb", r, g, g) - torch.tensordot(like(level.precisions, x), r, ([0], [0]))
        return S, H - S.unsqueeze(0) * S.unsqueeze(1)
