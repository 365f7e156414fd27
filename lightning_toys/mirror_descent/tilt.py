"""Rewards of the linear-Gaussian problem, and its action tilted by exp(beta Q). All is Gaussian, so all is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import LARGEST, ToyError, bounded, require
from lightning_toys.mirror_descent.joint import Array, NoiseLevel
from lightning_toys.mirror_descent.joint_distribution import ActionFunction, Tilted


class NoIntegralError(ToyError):
    """q(a) exp(beta Q(a)) has no integral."""


@dataclass(frozen=True)
class Quadratic(ActionFunction):
    """A quadratic const + b x - A x^2 / 2 of a scalar."""

    A: float
    b: float
    const: float

    def __call__(self, x: float) -> float:
        """Return the value at x."""
        return self.const + self.b * x - 0.5 * self.A * x * x

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.value`, for actions (1, ...)."""
        return self.const + self.b * a[0] - 0.5 * self.A * a[0].square()

    def gradient(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.gradient`."""
        return self.b - self.A * a

    def scaled(self, beta: float) -> Quadratic:
        """See :meth:`ActionFunction.scaled`."""
        return Quadratic(beta * self.A, beta * self.b, beta * self.const)

    def smoothed(self, scale: float, variance: float, beta: float) -> Quadratic:
        """See :meth:`ActionFunction.smoothed`."""
        smoothing = 1 + scale * self.A * variance
        return Quadratic(beta * self.A / smoothing, beta * self.b / smoothing, beta * self.const)

    def about(self, origin: float) -> Quadratic:
        """Return the same function of x - origin.

        >>> Quadratic(2.0, 1.0, 0.5).about(3.0)(0.25) == Quadratic(2.0, 1.0, 0.5)(3.25)
        True
        """
        return Quadratic(self.A, self.b - self.A * origin, self(origin))


@dataclass(frozen=True)
class QuadraticForm(ActionFunction):
    """A quadratic const + b . a - a . A a / 2 of an action of any dimension.

    Attributes:
        A: symmetric matrix (d_a, d_a).
        b: vector (d_a,).
        const: the value at 0.
    """

    A: Array
    b: Array
    const: float

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.value`."""
        A, b = torch.from_numpy(self.A).to(a), torch.from_numpy(self.b).to(a)
        inner: Tensor = a * (b.view(-1, *[1] * (a.dim() - 1)) - 0.5 * torch.tensordot(A, a, 1))
        return self.const + inner.sum(0)

    def gradient(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.gradient`."""
        A, b = torch.from_numpy(self.A).to(a), torch.from_numpy(self.b).to(a)
        out: Tensor = b.view(-1, *[1] * (a.dim() - 1)) - torch.tensordot(A, a, 1)
        return out

    def scaled(self, beta: float) -> QuadraticForm:
        """See :meth:`ActionFunction.scaled`."""
        return QuadraticForm(beta * self.A, beta * self.b, beta * self.const)

    def smoothed(self, scale: float, variance: float, beta: float) -> QuadraticForm:
        """See :meth:`ActionFunction.smoothed`: A and b times (I + scale variance A)^-1."""
        K = np.linalg.inv(np.eye(len(self.b)) + scale * variance * self.A)
        return QuadraticForm(beta * K @ self.A, beta * K @ self.b, beta * self.const)


class Reward:
    """What actions are tilted towards: a base class for rewards of your own, given by class_path.

    Q depends on a alone, so that the tilt leaves s' | a unchanged. A reward gives one method or both:
    :meth:`action_value`, Q as a quadratic at every noise level, which the linear-Gaussian problem needs (a negative
    curvature is fine as long as q(a) exp(beta Q(a)) has an integral), and :meth:`value`, any function of clean actions,
    for the problems of :class:`MixtureSampling`; there :meth:`quadratic` says that closed forms hold.
    """

    def action_value(self, level: NoiseLevel) -> Quadratic:
        """Return the action value Q(a) at a noise level, whose s' | a is N(level.rho a + level.c, level.v)."""
        raise ToyError(
            f"--model.reward: {type(self).__name__} is not allowed here, it has no action_value; "
            "give ActionValue, StateReward or QuadraticReward, or take MixtureSampling with --data GaussianMixture"
        )

    def value(self, a: Tensor) -> Tensor:
        """Return Q (...) at clean actions a (d_a, ...)."""
        raise ToyError(
            f"--model.reward: {type(self).__name__} is not allowed here, it has no value(a); "
            "give ActionValue, QuadraticReward, Quartic or Step"
        )

    def quadratic(self, action_dim: int) -> QuadraticForm | None:
        """Return Q as a quadratic of so many actions where it is one; None: closed forms are not known."""
        return None

    def log_mean_exp(self, a: Tensor, std: float, scale: float) -> tuple[Tensor, Tensor] | None:
        """Return log E exp(scale Q(a + std z)) (...) at one-dimensional actions a (...), and its derivative in a.

        None, the default, leaves both to quadrature.
        """
        return None

    @property
    def breakpoints(self) -> Sequence[float]:
        """Actions at which Q or its derivative jumps, for quadrature."""
        return ()

    @property
    def curvature(self) -> float:
        """A typical -Q'', by which the step sizes of Metropolis-Hastings samplers are reduced; not below 0."""
        return 0.0

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

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`Reward.value`: with several coordinates, the same for each."""
        return -0.5 * self.q_a * (a - self.mu_q).square().sum(0)

    def quadratic(self, action_dim: int) -> QuadraticForm:
        """See :meth:`Reward.quadratic`."""
        b = np.full(action_dim, self.q_a * self.mu_q)
        return QuadraticForm(self.q_a * np.eye(action_dim), b, -0.5 * self.q_a * self.mu_q**2 * action_dim)

    @property
    def curvature(self) -> float:
        """See :attr:`Reward.curvature`."""
        return self.q_a


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
class TiltedAction(Tilted):
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

    def log_weight(self, a: Tensor) -> Tensor:
        """See :meth:`Tilted.log_weight`: without Q's constant."""
        return self.beta * (self.Q.b - 0.5 * self.Q.A * a[0]) * a[0]

    @property
    def log_weight_offset(self) -> float:
        """See :attr:`Tilted.log_weight_offset`."""
        return self.beta * self.Q.const

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

    >>> from lightning_toys.mirror_descent.joint import LinearGaussianJoint
    >>> target = tilt(LinearGaussianJoint().clean, StateReward(), beta=1.5)
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
