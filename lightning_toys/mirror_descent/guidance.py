"""Guidance rules: what is added to the joint score at a level so that the reverse process heads for the tilted law.

Each is affine in x = (a, s') here: G x + g.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import Array
from lightning_toys.mirror_descent.joint import Joint, Level, noised
from lightning_toys.mirror_descent.model import Model, linear
from lightning_toys.mirror_descent.tilt import Reward, tilt


class Rule:
    """A guidance rule.

    Args:
        joint: the clean law.
        reward: the reward.
        strength: lambda, the tilt that is wanted at the clean end.
    """

    name: str

    def __init__(self, joint: Joint, reward: Reward, strength: float) -> None:
        self.joint, self.reward, self.strength = joint, reward, strength

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """Return G (2, 2) and g (2,): the rule adds G x + g to the score at a level where the schedule says beta."""
        raise NotImplementedError

    def guided(self, model: Model, level: Level, beta: float, x: Tensor) -> Tensor:
        """Return the guided score of a model, exact or learned, at x (2, B)."""
        G, g = self.added(level, beta)
        return model.score(level, x) + linear(G, x, g)


def on_action(A: float, b: float) -> tuple[Array, Array]:
    """Return the gradient b - A a of a quadratic of the action."""
    return np.array([[-A, 0.0], [0.0, 0.0]]), np.array([b, 0.0])


def tweedie(level: Level) -> tuple[Array, Array]:
    """Return J, j of E[x_0 | x] = J x + j = (x + (1 - abar) score) / sqrt(abar) (Efron 2011)."""
    scale, left = np.sqrt(level.abar), 1 - level.abar
    return (np.eye(2) - left * level.precision) / scale, left * level.precision @ level.m / scale


class Unguided(Rule):
    """Adds nothing: the reverse process of the joint law itself."""

    name = "none"

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """See :meth:`Rule.added`."""
        return np.zeros((2, 2)), np.zeros(2)


class ProductOfExperts(Rule):
    """beta grad_a Q_k(a): Q of the noised action as if it were clean."""

    name = "poe"

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """See :meth:`Rule.added`."""
        Q = self.reward.action_value(level)
        return on_action(beta * Q.A, beta * Q.b)


class ThroughTweedie(Rule):
    """A rule that adds grad_x (b a_0 - A a_0^2 / 2) at a_0 = E[a_0 | x]."""

    def coefficients(self, level: Level, beta: float) -> tuple[float, float]:
        """Return A and b."""
        raise NotImplementedError

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """See :meth:`Rule.added`."""
        A, b = self.coefficients(level, beta)
        J, j = tweedie(level)
        row = J[:1]  # d a_0 / d x
        return -A * row.T @ row, row[0] * (b - A * j[0])

    def guided(self, model: Model, level: Level, beta: float, x: Tensor) -> Tensor:
        """See :meth:`Rule.guided`: with the model's own estimate of a_0."""
        S, a0, row = tweedie_of(model, level, x)[:3]
        A, b = self.coefficients(level, beta)
        return S + row * (b - A * a0)


def tweedie_of(model: Model, level: Level, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a model's score S (2, B), a_0 = E[a_0 | x] (B,), its gradient in x (2, B), and S's derivatives."""
    S, H = model.score_and_slopes(level, x)
    left, scale = 1 - level.abar, level.abar**0.5
    row = left * H[0]
    row = torch.stack([1 + row[0], row[1]]) / scale
    return S, (x[0] + left * S[0]) / scale, row, H


class PosteriorSampling(ThroughTweedie):
    """DPS (Chung et al. 2022): beta grad_x Q(E[a_0 | x]), Q at the clean level."""

    name = "dps"

    def coefficients(self, level: Level, beta: float) -> tuple[float, float]:
        """See :meth:`ThroughTweedie.coefficients`."""
        Q = self.reward.action_value(self.joint.clean)
        return beta * Q.A, beta * Q.b


class TrainingFree(ThroughTweedie):
    """TFG's variance guidance (Ye et al. 2024): beta / lambda times grad log E exp(lambda Q(a_0 + s z)).

    Here a_0 = E[a_0 | x], z is standard normal and s^2 = 1 - abar: the smoothing that TFG estimates by samples is in
    closed form. Its mean guidance and its recurrence are left out, and the gradient is added to the score.
    """

    name = "tfg"

    def coefficients(self, level: Level, beta: float) -> tuple[float, float]:
        """See :meth:`ThroughTweedie.coefficients`."""
        Q = self.reward.action_value(self.joint.clean)
        less = 1 + self.strength * Q.A * (1 - level.abar)
        return beta * Q.A / less, beta * Q.b / less


class HTransform(Rule):
    """Doob's h-transform: the score of the noised tilted law less that of the noised joint. Exact; knows the answer."""

    name = "h_transform"

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """See :meth:`Rule.added`; the schedule has no say."""
        wanted = tilt(self.joint.clean, self.reward, self.strength)
        target = noised(self.joint.with_action(wanted.mu, 1 / wanted.tau), level.abar)
        return level.precision - target.precision, target.precision @ target.m - level.precision @ level.m


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Unguided, ProductOfExperts, PosteriorSampling, TrainingFree, HTransform)
}
