"""Rewards, and the action's distribution tilted by exp(beta Q). Everything is Gaussian, so everything is exact."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lightning_toys.errors import LARGEST, ToyError, bounded, require
from lightning_toys.mirror_descent.joint import Array, NoiseLevel


@dataclass(frozen=True)
class Quadratic:
    """A quadratic const + b x - A x^2 / 2 of a scalar."""

    A: float
    b: float
    const: float

    def __call__(self, x: float) -> float:
        """Return the value at x."""
        return self.const + self.b * x - 0.5 * self.A * x * x

    def about(self, origin: float) -> Quadratic:
        """Return the same function of x - origin.

        >>> Quadratic(2.0, 1.0, 0.5).about(3.0)(0.25) == Quadratic(2.0, 1.0, 0.5)(3.25)
        True
        """
        return Quadratic(self.A, self.b - self.A * origin, self(origin))


class Reward(ABC):
    """What actions are tilted towards: a base class for rewards of your own, given by class_path.

    Samplers and closed forms need Q as a quadratic at every noise level. It depends on a alone, so that the tilt leaves
    s' | a unchanged. A negative curvature A is fine as long as q(a) exp(beta Q(a)) has an integral.
    """

    @abstractmethod
    def action_value(self, level: NoiseLevel) -> Quadratic:
        """Return the action value Q(a) at a noise level, whose s' | a is N(level.rho a + level.c, level.v)."""
        raise NotImplementedError

    @property
    def state_weight(self) -> float:
        """w >= 0: with one draw of s' in place of its mean, dQ/da has the noise -w rho (s' - E[s' | a])."""
        return 0.0


class ActionValue(Reward):
    """Q(a) = -q_a / 2 (a - mu_q)^2, at every level.

    Args:
        q_a: curvature, not below 0; 0 tilts nothing.
        mu_q: optimum.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(self, q_a: float = 1.0, mu_q: float = 1.5) -> None:
        bounded("--model.reward.q_a", q_a, 0.0)
        bounded("--model.reward.mu_q", mu_q, -LARGEST)
        self.q_a, self.mu_q = q_a, mu_q

    def action_value(self, level: NoiseLevel) -> Quadratic:
        """See :meth:`Reward.action_value`."""
        return Quadratic(self.q_a, self.q_a * self.mu_q, -0.5 * self.q_a * self.mu_q**2)


class StateReward(Reward):
    """R(a, s') = -(r_wa (a - r_a)^2 + r_ws (s' - r_s)^2) / 2, and Q(a) = E[R(a, s') | a].

    Args:
        r_wa: weight of the action's term, not below 0.
        r_a: optimal action.
        r_ws: weight of the next state's term, not below 0; with both weights 0 nothing is tilted.
        r_s: optimal next state.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(self, r_wa: float = 1.0, r_a: float = 1.5, r_ws: float = 1.0, r_s: float = 1.0) -> None:
        for name, value in (("r_wa", r_wa), ("r_ws", r_ws)):
            bounded(f"--model.reward.{name}", value, 0.0)
        for name, value in (("r_a", r_a), ("r_s", r_s)):
            bounded(f"--model.reward.{name}", value, -LARGEST)
        self.r_wa, self.r_a, self.r_ws, self.r_s = r_wa, r_a, r_ws, r_s

    def action_value(self, level: NoiseLevel) -> Quadratic:
        """See :meth:`Reward.action_value`: the mean over s' ~ N(rho a + c, v)."""
        rho, c, v = level.rho, level.c, level.v
        A = self.r_wa + self.r_ws * rho**2
        b = self.r_wa * self.r_a + self.r_ws * rho * (self.r_s - c)
        const = -0.5 * (self.r_wa * self.r_a**2 + self.r_ws * ((c - self.r_s) ** 2 + v))
        return Quadratic(A, b, const)

    @property
    def state_weight(self) -> float:
        """See :attr:`Reward.state_weight`: dR/da through s' = rho a + c + noise has -r_ws rho (s' - r_s) in it."""
        return self.r_ws


class ShiftedReward(Reward):
    """A reward of pairs (a, s') that are measured from an origin.

    Args:
        reward: the reward of the pairs themselves.
        origin: (a, s') of the clean pairs' origin (2,); at a noise level it is sqrt(abar) of it.
    """

    def __init__(self, reward: Reward, origin: Array) -> None:
        self.reward, self.origin = reward, origin

    def action_value(self, level: NoiseLevel) -> Quadratic:
        """See :meth:`Reward.action_value`."""
        origin = math.sqrt(level.abar) * self.origin
        there = NoiseLevel(level.m + origin, level.C, level.abar)
        return quadratic_of(self.reward, there).about(float(origin[0]))

    @property
    def state_weight(self) -> float:
        """See :attr:`Reward.state_weight`."""
        return self.reward.state_weight


def quadratic_of(reward: Reward, level: NoiseLevel) -> Quadratic:
    """Return a reward's action value at a level.

    Raises:
        ToyError: it is no quadratic.
    """
    Q = reward.action_value(level)
    fits = all(isinstance(getattr(Q, k, None), int | float) for k in ("A", "b", "const"))
    if not fits or not all(math.isfinite(x) for x in (Q.A, Q.b, Q.const)):
        given = f"{type(Q).__name__} {Q!r}"[:80]
        raise ToyError(
            f"--model.reward: {type(reward).__name__} is not allowed, its action_value at abar = {level.abar:.3g} "
            f"is {given}; closed forms need a Quadratic(A, b, const) of finite numbers"
        )
    return Q


@dataclass(frozen=True)
class TiltedAction:
    """pi(a) proportional to q(a) exp(beta Q(a)) at one noise level: N(mu, 1 / tau).

    Attributes:
        level: the joint distribution that is tilted; s' | a is unchanged.
        beta: inverse temperature of the tilt.
        Q: the action value.
    """

    level: NoiseLevel
    beta: float
    Q: Quadratic

    @property
    def tau(self) -> float:
        """Precision of the tilted action."""
        return float(1 / self.level.C[0, 0] + self.beta * self.Q.A)

    @property
    def mu(self) -> float:
        """Mean of the tilted action."""
        return float((self.level.m[0] / self.level.C[0, 0] + self.beta * self.Q.b) / self.tau)

    @property
    def log_z(self) -> float:
        """log Z = log E_q exp(beta Q(a))."""
        tau_q = float(1 / self.level.C[0, 0])
        exponent = 0.5 * (self.tau * self.mu**2 - tau_q * float(self.level.m[0]) ** 2)
        return 0.5 * math.log(tau_q / self.tau) + exponent + self.beta * self.Q.const

    @property
    def importance_ess_fraction(self) -> float:
        """Effective sample size of importance weights w = exp(beta Q) per sample of q: (E w)^2 / E w^2.

        It is 0 where w has no variance.
        """
        doubled = TiltedAction(self.level, 2 * self.beta, self.Q)
        if doubled.tau <= 0:
            return 0.0
        return math.exp(2 * self.log_z - doubled.log_z)


def tilt(level: NoiseLevel, reward: Reward, beta: float) -> TiltedAction:
    """Return q(a) exp(beta Q(a)) / Z at a noise level.

    >>> from lightning_toys.mirror_descent.joint import Joint
    >>> target = tilt(Joint().clean, StateReward(), beta=1.5)
    >>> target.mu, target.tau
    (0.9375, 4.0)

    Raises:
        ToyError: Q is no quadratic, or the tilt has no integral.
    """
    tilted = TiltedAction(level, beta, quadratic_of(reward, level))
    require(
        tilted.tau > 0,
        f"--model.reward: {type(reward).__name__} is not allowed with --model.lambda_scale: at abar = {level.abar:.3g} "
        f"q(a) exp(beta Q(a)) has no integral (precision {tilted.tau:.3g}); give a smaller lambda_scale",
    )
    return tilted
