"""The linear-Gaussian joint distribution of action a and next state s', and its noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_toys.errors import LARGEST, bounded
from lightning_toys.mirror_descent.joint_distribution import ActionFunction, JointDistribution, Level

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """N(m, C) of x = (a, s'). Its conditional is s' | a ~ N(rho a + c, v).

    Attributes:
        m: mean (2,).
        C: covariance (2, 2).
    """

    m: Array
    C: Array

    @property
    def rho(self) -> float:
        """Slope of E[s' | a]."""
        return float(self.C[0, 1] / self.C[0, 0])

    @property
    def c(self) -> float:
        """Intercept of E[s' | a] = rho a + c."""
        return float(self.m[1] - self.rho * self.m[0])

    @property
    def v(self) -> float:
        """Var(s' | a)."""
        return float(self.C[1, 1] - self.C[0, 1] ** 2 / self.C[0, 0])

    @cached_property
    def precision(self) -> Array:
        """C^-1 (2, 2); the score is -C^-1 (x - m)."""
        P: Array = np.linalg.inv(self.C).astype(np.float64)
        return P


@dataclass(frozen=True)
class NoiseLevel(Gaussian, Level):
    """The joint distribution at one noise level: m = sqrt(abar) mu_0, C = abar C_0 + (1 - abar) I.

    Attributes:
        abar: alpha-bar, the fraction of signal variance, in [0, 1]; 1 is clean.
    """

    abar: float

    def value_of(self, reward: Any) -> ActionFunction:
        """See :meth:`Level.value_of`: a quadratic of one action."""
        value: ActionFunction = reward.action_value(self)
        return value


@dataclass(frozen=True)
class LinearGaussianJoint(JointDistribution):
    """a ~ N(mu_a, sigma_a^2), s' | a ~ N(alpha a + d s + mu_eps, sigma_sprime^2), at a fixed state s.

    >>> LinearGaussianJoint(alpha=2.0).clean.C.tolist()
    [[1.0, 2.0], [2.0, 4.25]]

    Attributes:
        mu_a: mean of the action.
        sigma_a: its standard deviation.
        alpha: slope of the next state on the action.
        sigma_sprime: standard deviation of the next state given the action.
        d: slope of the next state on the state.
        s: the state.
        mu_eps: mean of the dynamics' noise.

    Raises:
        ToyError: a standard deviation is not above 0, or a number is not finite.
    """

    mu_a: float = 0.0
    sigma_a: float = 1.0
    alpha: float = 1.0
    sigma_sprime: float = 0.5
    d: float = 0.0
    s: float = 0.0
    mu_eps: float = 0.0

    action_dim = 1
    dim = 2

    def __post_init__(self) -> None:
        for name in ("sigma_a", "sigma_sprime"):
            value = getattr(self, name)
            bounded(f"--data.{name}", value, 0.0, above=True)
        for name in ("mu_a", "alpha", "d", "s", "mu_eps"):
            value = getattr(self, name)
            bounded(f"--data.{name}", value, -LARGEST)

    @property
    def shift(self) -> float:
        """E[s' | a] - alpha a = d s + mu_eps."""
        return self.d * self.s + self.mu_eps

    def with_action_marginal(self, mean: float, variance: float) -> NoiseLevel:
        """Return the clean joint distribution with N(mean, variance) as the action's marginal; s' | a is unchanged."""
        m = np.array([mean, self.alpha * mean + self.shift])
        C = np.array(
            [
                [variance, self.alpha * variance],
                [self.alpha * variance, self.alpha**2 * variance + self.sigma_sprime**2],
            ]
        )
        return NoiseLevel(m, C, 1.0)

    @cached_property
    def clean(self) -> NoiseLevel:
        """The joint distribution without noise."""
        return self.with_action_marginal(self.mu_a, self.sigma_a**2)

    @property
    def centre(self) -> Array:
        """See :attr:`JointDistribution.centre`: the mean."""
        return self.clean.m

    def level(self, abar: float) -> NoiseLevel:
        """Return the distribution of sqrt(abar) x_0 + sqrt(1 - abar) eps, abar in [0, 1]."""
        return noised(self.clean, abar)


def noised(clean: NoiseLevel, abar: float) -> NoiseLevel:
    """Return the distribution of sqrt(abar) x + sqrt(1 - abar) eps, x from the clean one and eps ~ N(0, I)."""
    return NoiseLevel(math.sqrt(abar) * clean.m, abar * clean.C + (1 - abar) * np.eye(2), abar)


def gaussian_kl(m: ArrayLike, C: ArrayLike, target_m: ArrayLike, target_C: ArrayLike) -> float:
    """Return KL(N(m, C) || N(target_m, target_C)) in nats, for means () or (n,) and covariances () or (n, n).

    >>> gaussian_kl(1.0, 1.0, 0.0, 1.0)
    0.5
    """
    difference: Array = np.atleast_1d(np.asarray(m, np.float64) - np.asarray(target_m, np.float64))
    C, target_C = (np.atleast_2d(np.asarray(x, np.float64)) for x in (C, target_C))
    P = np.linalg.inv(target_C)
    log_ratio = np.linalg.slogdet(target_C)[1] - np.linalg.slogdet(C)[1]
    return float(0.5 * (np.trace(P @ C) - len(difference) + difference @ P @ difference + log_ratio))
