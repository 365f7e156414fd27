"""Guidance rules: the term added to the joint score at each level so that the reverse process heads for the target.

Here each is affine in x = (a, s'): G x + g.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import Array
from lightning_toys.mirror_descent.joint import Joint, NoiseLevel, noised
from lightning_toys.mirror_descent.model import JointModel, affine_map
from lightning_toys.mirror_descent.tilt import Reward, tilt


class GuidanceRule(ABC):
    """What is added to the score: a base class for rules of your own, given by class_path to :class:`Predictor`.

    Attributes:
        name: part of the names of the samplers that use it; the class's name if left out.
        evaluates_reward: whether each step evaluates Q, which is counted.

    Args:
        joint: the clean distribution.
        reward: the reward.
        lambda_scale: lambda, the tilt that is wanted at the clean end.
    """

    name: str = ""
    evaluates_reward: bool = True

    def __init__(self, joint: Joint, reward: Reward, lambda_scale: float) -> None:
        self.joint, self.reward, self.lambda_scale = joint, reward, lambda_scale

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """Return G (2, 2) and g (2,): the rule adds G x + g to the score at a level where the schedule says beta."""

    def guided_score(self, model: JointModel, level: NoiseLevel, beta: float, x: Tensor) -> Tensor:
        """Return the guided score (2, B) of a model, exact or learned, at x (2, B)."""
        G, g = self.affine_term(level, beta)
        return model.score(level, x) + affine_map(G, x, g)


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

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`."""
        return np.zeros((2, 2)), np.zeros(2)


class ProductOfExperts(GuidanceRule):
    """beta grad_a Q_k(a): Q of the noised action as if it were clean (Hinton 2002)."""

    name = "poe"

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`."""
        Q = self.reward.action_value(level)
        return action_gradient(beta * Q.A, beta * Q.b)


class TweedieGuidance(GuidanceRule):
    """A rule that adds grad_x (b a_0 - A a_0^2 / 2) at the Tweedie mean a_0 = E[a_0 | x]."""

    @abstractmethod
    def coefficients(self, level: NoiseLevel, beta: float) -> tuple[float, float]:
        """Return A and b."""

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`."""
        A, b = self.coefficients(level, beta)
        J, j = tweedie_mean(level)
        row = J[:1]  # d a_0 / d x
        return -A * row.T @ row, row[0] * (b - A * j[0])

    def guided_score(self, model: JointModel, level: NoiseLevel, beta: float, x: Tensor) -> Tensor:
        """See :meth:`GuidanceRule.guided_score`: with the model's own estimate of a_0."""
        S, a0, gradient = tweedie_action(model, level, x)[:3]
        A, b = self.coefficients(level, beta)
        return S + gradient * (b - A * a0)


def tweedie_action(model: JointModel, level: NoiseLevel, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a model's score S (2, B) at x (2, B), a_0 = E[a_0 | x] (B,), its gradient (2, B), and S's Jacobian."""
    S, H = model.score_and_jacobian(level, x)
    noise_variance, scale = 1 - level.abar, level.abar**0.5
    row = noise_variance * H[0]
    gradient = torch.stack([1 + row[0], row[1]]) / scale
    return S, (x[0] + noise_variance * S[0]) / scale, gradient, H


class DiffusionPosteriorSampling(TweedieGuidance):
    """DPS (Chung et al. 2023, arXiv 2209.14687): beta grad_x Q(E[a_0 | x]), Q at the clean level."""

    name = "dps"

    def coefficients(self, level: NoiseLevel, beta: float) -> tuple[float, float]:
        """See :meth:`TweedieGuidance.coefficients`."""
        Q = self.reward.action_value(self.joint.clean)
        return beta * Q.A, beta * Q.b


class TrainingFreeGuidance(TweedieGuidance):
    """TFG's variance guidance (Ye et al. 2024, arXiv 2409.15761): beta / lambda grad log E exp(lambda Q(a_0 + s z)).

    Here a_0 = E[a_0 | x], z is standard normal and s^2 = 1 - abar: the smoothing that TFG estimates by samples is in
    closed form. Its mean guidance and its recurrence are left out, and the gradient is added to the score.
    """

    name = "tfg"

    def coefficients(self, level: NoiseLevel, beta: float) -> tuple[float, float]:
        """See :meth:`TweedieGuidance.coefficients`."""
        Q = self.reward.action_value(self.joint.clean)
        smoothing = 1 + self.lambda_scale * Q.A * (1 - level.abar)
        return beta * Q.A / smoothing, beta * Q.b / smoothing


class HTransform(GuidanceRule):
    """Doob's h-transform: the score of the noised target less that of the noised joint. Exact; knows the target.

    See Denker et al. 2024 (arXiv 2406.01781).
    """

    name = "h_transform"

    def affine_term(self, level: NoiseLevel, beta: float) -> tuple[Array, Array]:
        """See :meth:`GuidanceRule.affine_term`; ``beta`` is not used."""
        tilted = tilt(self.joint.clean, self.reward, self.lambda_scale)
        target = noised(self.joint.with_action_marginal(tilted.mu, 1 / tilted.tau), level.abar)
        return level.precision - target.precision, target.precision @ target.m - level.precision @ level.m
