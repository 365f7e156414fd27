"""Guidance rules: the term added to the joint score at each level so that the reverse process heads for the target.

In the linear-Gaussian problem each is affine in x = (a, s'): G x + g.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent.affine import Array
from lightning_toys.mirror_descent.joint import NoiseLevel, noised
from lightning_toys.mirror_descent.joint_distribution import ActionFunction
from lightning_toys.mirror_descent.model import JointModel, affine_map
from lightning_toys.mirror_descent.tilt import Reward, tilt


class GuidanceRule:
    """What is added to the score: a base class for rules of your own, given by class_path to :class:`Predictor`.

    A rule gives :meth:`affine_term`, which holds in the linear-Gaussian problem and makes its exact distribution known
    there, or :meth:`guided_score`, which holds in every problem, or both.

    Attributes:
        name: part of the names of the samplers that use it; the class's name if left out.
        evaluates_reward: whether each step evaluates Q, which is counted.
        uses_beta: whether the rule depends on the schedule's beta, which a guidance scale is a factor of.

    Args:
        joint: the clean distribution, a :class:`joint_distribution.JointDistribution`.
        reward: the reward.
        lambda_scale: lambda, the tilt that is wanted at the clean end.
    """

    name: str = ""
    evaluates_reward: bool = True
    uses_beta: bool = True

    def __init__(self, joint: Any, reward: Reward, lambda_scale: float) -> None:
        self.joint, self.reward, self.lambda_scale = joint, reward, lambda_scale

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """Return G (2, 2) and g (2,): the rule adds G x + g to the score at a level where the schedule says beta."""
        raise ToyError(f"--model.samplers: the rule {self.name} is not allowed here, it has no affine_term")

    def guided_score(self, model: JointModel, level: Any, beta: float, x: Tensor) -> Tensor:
        """Return the guided score (D, B) of a model, exact or learned, at x (D, B)."""
        G, g = self.affine_term(level, beta)
        return model.score(level, x) + affine_map(G, x, g)

    @property
    def is_affine(self) -> bool:
        """Whether :meth:`affine_term` is given."""
        return type(self).affine_term is not GuidanceRule.affine_term

    @property
    def is_general(self) -> bool:
        """Whether :meth:`guided_score` is given."""
        return type(self).guided_score is not GuidanceRule.guided_score


def action_gradient(A: float, b: float) -> tuple[Array, Array]:
    """Return G (2, 2) and g (2,) of the gradient in x of b a - A a^2 / 2."""
    return np.array([[-A, 0.0], [0.0, 0.0]]), np.array([b, 0.0])


def tweedie_mean(level: NoiseLevel) -> tuple[Array, Array]:
    """Return J (2, 2) and j (2,) of E[x_0 | x] = J x + j = (x + (1 - abar) score) / sqrt(abar) (Efron 2011)."""
    scale, noise_variance = np.sqrt(level.abar), 1 - level.abar
    J = (np.eye(2) - noise_variance * level.precision) / scale
    return J, noise_variance * level.precision @ level.m / scale


class Unguided(GuidanceRule):
    """Adds nothing: the reverse process of the joint distribution itself."""

    name = "none"
    evaluates_reward = False
    uses_beta = False

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`."""
        return np.zeros((2, 2)), np.zeros(2)

    def guided_score(self, model: JointModel, level: Any, beta: float, x: Tensor) -> Tensor:
        """See :meth:`GuidanceRule.guided_score`."""
        return model.score(level, x)


class ProductOfExperts(GuidanceRule):
    """beta grad_a Q_k(a): Q of the noised action as if it were clean (Hinton 2002)."""

    name = "poe"

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`."""
        Q = self.reward.action_value(level)
        return action_gradient(beta * Q.A, beta * Q.b)

    def guided_score(self, model: JointModel, level: Any, beta: float, x: Tensor) -> Tensor:
        """See :meth:`GuidanceRule.guided_score`."""
        d = self.joint.action_dim
        gradient = level.value_of(self.reward).scaled(beta).gradient(x[:d])
        return model.score(level, x) + torch.cat([gradient, torch.zeros_like(x[d:])])


class TweedieGuidance(GuidanceRule, ABC):
    """A rule that adds the gradient in x of a function of the Tweedie mean a_0 = E[a_0 | x]."""

    @abstractmethod
    def twist(self, level: Any, beta: float) -> ActionFunction:
        """Return the function of a_0."""

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`: the function is b a_0 - A a_0^2 / 2."""
        f: Any = self.twist(level, beta)
        J, j = tweedie_mean(level)
        row = J[:1]  # d a_0 / d x
        return -f.A * row.T @ row, row[0] * (f.b - f.A * j[0])

    def guided_score(self, model: JointModel, level: Any, beta: float, x: Tensor) -> Tensor:
        """See :meth:`GuidanceRule.guided_score`: with the model's own estimate of a_0."""
        S, a0, J, _ = tweedie_action(model, level, x, self.joint.action_dim)
        return S + chain_rule(J, self.twist(level, beta).gradient(a0))


def chain_rule(J: Tensor, gradient: Tensor) -> Tensor:
    """Return J' gradient (D, ...) for J (d_a, D, ...) and a gradient (d_a, ...)."""
    out = J[0] * gradient[0]
    for row, g in zip(J[1:], gradient[1:], strict=True):
        out = out + row * g
    return out


def tweedie_action(model: JointModel, level: Any, x: Tensor, d: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a model's score S (D, B) at x (D, B), a_0 = E[a_0 | x] (d, B), its Jacobian (d, D, B), and S's (D, D, B).

    Args:
        model: the model.
        level: the noise level.
        x: points.
        d: coordinates of the action.
    """
    S, H = model.score_and_jacobian(level, x)
    noise_variance, scale = 1 - level.abar, level.abar**0.5
    J = noise_variance * H[:d]
    for i in range(d):
        J[i, i] += 1
    return S, (x[:d] + noise_variance * S[:d]) / scale, J / scale, H


class DiffusionPosteriorSampling(TweedieGuidance):
    """DPS (Chung et al. 2023, arXiv 2209.14687): beta grad_x Q(E[a_0 | x]), Q at the clean level."""

    name = "dps"

    def twist(self, level: Any, beta: float) -> ActionFunction:
        """See :meth:`TweedieGuidance.twist`."""
        function: ActionFunction = self.joint.clean.value_of(self.reward).scaled(beta)
        return function


class TrainingFreeGuidance(TweedieGuidance):
    """TFG's variance guidance (Ye et al. 2024, arXiv 2409.15761): beta / lambda grad log E exp(lambda Q(a_0 + s z)).

    Here a_0 = E[a_0 | x], z is standard normal and s^2 = 1 - abar: the smoothing that TFG estimates by samples is in
    closed form. Its mean guidance and its recurrence are left out, and the gradient is added to the score.
    """

    name = "tfg"

    def twist(self, level: Any, beta: float) -> ActionFunction:
        """See :meth:`TweedieGuidance.twist`."""
        Q: ActionFunction = self.joint.clean.value_of(self.reward)
        return Q.smoothed(self.lambda_scale, 1 - level.abar, beta)


class HTransform(GuidanceRule):
    """Doob's h-transform: the score of the noised target less that of the noised joint. Exact; knows the target.

    See Denker et al. 2024 (arXiv 2406.01781).
    """

    name = "h_transform"
    uses_beta = False

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`; ``beta`` is not used."""
        tilted = tilt(self.joint.clean, self.reward, self.lambda_scale)
        target = noised(self.joint.with_action_marginal(tilted.mu, 1 / tilted.tau), level.abar)
        return level.precision - target.precision, target.precision @ target.m - level.precision @ level.m

    def guided_score(self, model: JointModel, level: Any, beta: float, x: Tensor) -> Tensor:
        """See :meth:`GuidanceRule.guided_score`; ``beta`` is not used."""
        return model.score(level, x) + model.soft_value_gradient(level, self, x)
