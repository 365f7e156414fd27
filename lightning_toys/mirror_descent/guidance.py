"""Guidance rules: what is added to the joint score at a level so that the reverse process heads for the tilted law.

Each is affine in x = (a, s') here: G x + g.
"""

from __future__ import annotations

import numpy as np

from lightning_toys.mirror_descent.affine import Array
from lightning_toys.mirror_descent.joint import Joint, Level, noised
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


class PosteriorSampling(Rule):
    """DPS (Chung et al. 2022): beta grad_x Q(E[a_0 | x]), Q at the clean level."""

    name = "dps"

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """See :meth:`Rule.added`."""
        Q = self.reward.action_value(self.joint.clean)
        return through_tweedie(level, beta * Q.A, beta * Q.b)


class TrainingFree(Rule):
    """TFG's variance guidance (Ye et al. 2024): beta / lambda times grad log E exp(lambda Q(a_0 + s z)).

    Here a_0 = E[a_0 | x], z is standard normal and s^2 = 1 - abar: the smoothing that TFG estimates by samples is in
    closed form. Its mean guidance and its recurrence are left out, and the gradient is added to the score.
    """

    name = "tfg"

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """See :meth:`Rule.added`."""
        Q = self.reward.action_value(self.joint.clean)
        less = 1 + self.strength * Q.A * (1 - level.abar)
        return through_tweedie(level, beta * Q.A / less, beta * Q.b / less)


class HTransform(Rule):
    """Doob's h-transform: the score of the noised tilted law less that of the noised joint. Exact; knows the answer."""

    name = "h_transform"

    def added(self, level: Level, beta: float) -> tuple[Array, Array]:
        """See :meth:`Rule.added`; the schedule has no say."""
        wanted = tilt(self.joint.clean, self.reward, self.strength)
        target = noised(self.joint.with_action(wanted.mu, 1 / wanted.tau), level.abar)
        return level.precision - target.precision, target.precision @ target.m - level.precision @ level.m


def through_tweedie(level: Level, A: float, b: float) -> tuple[Array, Array]:
    """Return the gradient in x of b a_0 - A a_0^2 / 2 at a_0 = E[a_0 | x]."""
    J, j = tweedie(level)
    row = J[:1]  # d a_0 / d x
    return -A * row.T @ row, row[0] * (b - A * j[0])


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Unguided, ProductOfExperts, PosteriorSampling, TrainingFree, HTransform)
}
