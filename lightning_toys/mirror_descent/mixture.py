"""Gaussian mixtures of action and next state: noise levels, marginals, conditionals and quadratic tilts, all exact.

With x = (a, s') ~ sum_j w_j N(m_j, C_j), the action first:

- noised, sqrt(abar) x + sqrt(1 - abar) eps has the same weights, sqrt(abar) m_j and abar C_j + (1 - abar) I;
- tilted by exp(const + b . a - a . A a / 2), component j keeps its form with precision C_j^-1 + A, and its weight is
  multiplied by the Gaussian integral of the tilt, Z_j; Z = sum_j w_j Z_j.

The tilt depends on a alone: s' | a is unchanged, and so is the probability of each component given x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lightning_toys.mirror_descent.joint import Array
from lightning_toys.mirror_descent.joint_distribution import ActionFunction, JointDistribution, Level
from lightning_toys.mirror_descent.rewards import RewardFunction
from lightning_toys.mirror_descent.tilt import NoIntegralError, QuadraticForm


@dataclass(frozen=True)
class Mixture(Level):
    """sum_j w_j N(m_j, C_j) of x = (a, s') at a noise level.

    Attributes:
        weights: w (J,), of sum 1.
        means: m (J, D).
        covariances: C (J, D, D).
        action_dim: d_a, the first coordinates.
        abar: alpha-bar of the level, 1 is clean.
    """

    weights: Array
    means: Array
    covariances: Array
    action_dim: int
    abar: float = 1.0

    @property
    def dim(self) -> int:
        """D, coordinates of x."""
        return int(self.means.shape[1])

    @cached_property
    def distributions(self) -> dict[tuple[int, float], Any]:
        """Tilted distributions that were computed, by reward and inverse temperature, with the reward."""
        return {}

    @cached_property
    def precisions(self) -> Array:
        """C_j^-1 (J, D, D)."""
        P: Array = np.linalg.inv(self.covariances).astype(np.float64)
        return P

    @cached_property
    def whitening(self) -> Array:
        """W_j (J, D, D), lower triangular, with W_j C_j W_j' = I."""
        W: Array = np.linalg.inv(np.linalg.cholesky(self.covariances)).astype(np.float64)
        return W

    @cached_property
    def log_constants(self) -> Array:
        """log w_j less log((2 pi)^(D/2) |C_j|^(1/2)) (J,)."""
        with np.errstate(divide="ignore"):  # a weight may be 0
            log_w = np.log(self.weights)
        out: Array = log_w - 0.5 * np.linalg.slogdet(self.covariances)[1] - 0.5 * self.dim * math.log(2 * math.pi)
        return out

    @cached_property
    def mean(self) -> Array:
        """E x (D,)."""
        out: Array = self.weights @ self.means
        return out

    @cached_property
    def covariance(self) -> Array:
        """Cov x (D, D)."""
        away = self.means - self.mean
        within = np.einsum("j,jde->de", self.weights, self.covariances)
        out: Array = within + np.einsum("j,jd,je->de", self.weights, away, away)
        return out

    @cached_property
    def actions(self) -> Mixture:
        """The marginal of the action, (a) alone."""
        d = self.action_dim
        return Mixture(self.weights, self.means[:, :d], self.covariances[:, :d, :d], d, self.abar)

    @cached_property
    def gains(self) -> Array:
        """G_j (J, d_s, d_a): E[s' | a, j] = m_s + G_j (a - m_a)."""
        d, C = self.action_dim, self.covariances
        out: Array = C[:, d:, :d] @ np.linalg.inv(C[:, :d, :d])
        return out

    @cached_property
    def residual_covariances(self) -> Array:
        """Cov(s' | a, j) (J, d_s, d_s)."""
        d, C = self.action_dim, self.covariances
        out: Array = C[:, d:, d:] - self.gains @ C[:, :d, d:]
        return out

    def noised(self, abar: float) -> Mixture:
        """Return the distribution of sqrt(abar) x + sqrt(1 - abar) eps, x from this one, which is clean."""
        covariances = abar * self.covariances + (1 - abar) * np.eye(self.dim)
        return Mixture(self.weights, math.sqrt(abar) * self.means, covariances, self.action_dim, abar)

    def tilted(self, Q: QuadraticForm) -> tuple[Mixture, float]:
        """Return q(x) exp(Q(a)) / Z, and log Z.

        Raises:
            NoIntegralError: there is no integral.
        """
        d = self.action_dim
        A, b = np.zeros((self.dim, self.dim)), np.zeros(self.dim)
        A[:d, :d], b[:d] = Q.A, Q.b
        precisions = self.precisions + A
        lowest = float(np.linalg.eigvalsh(precisions).min())
        if lowest <= 0:
            raise NoIntegralError(
                "--model.reward: a negative curvature is not allowed with --model.lambda_scale: "
                f"q(a) exp(lambda Q(a)) has no integral (precision {lowest:.3g}); give a smaller lambda_scale"
            )
        C: Array = np.linalg.inv(precisions).astype(np.float64)
        linear = np.einsum("jde,je->jd", self.precisions, self.means)
        m = np.einsum("jde,je->jd", C, linear + b)
        exponent = 0.5 * np.einsum("jd,jd->j", m, linear + b) - 0.5 * np.einsum("jd,jd->j", self.means, linear)
        log_det = np.linalg.slogdet(C)[1] - np.linalg.slogdet(self.covariances)[1]
        with np.errstate(divide="ignore"):
            log_w = np.log(self.weights) + 0.5 * log_det + exponent
        log_z = float(np.logaddexp.reduce(log_w))
        return Mixture(np.exp(log_w - log_z), m, C, d, self.abar), log_z + Q.const

    def value_of(self, reward: Any) -> ActionFunction:
        """See :meth:`Level.value_of`: Q of a clean action."""
        form: ActionFunction | None = reward.quadratic(self.action_dim)
        return RewardFunction(reward) if form is None else form

    def log_components(self, x: Array) -> Array:
        """Return log w_j N(x; m_j, C_j) (J, n) at points x (n, D)."""
        y = np.einsum("jde,jne->jnd", self.whitening, x[None] - self.means[:, None])
        out: Array = self.log_constants[:, None] - 0.5 * np.square(y).sum(-1)
        return out

    def log_density(self, x: Array) -> Array:
        """Return log q (n,) at points x (n, D)."""
        out: Array = np.logaddexp.reduce(self.log_components(x), axis=0)
        return out

    def responsibilities(self, x: Array) -> Array:
        """Return the probability of each component given x (n, J), at points x (n, D)."""
        log_n = self.log_components(x)
        out: Array = np.exp(log_n - np.logaddexp.reduce(log_n, axis=0)).T
        return out

    def sample(self, z: Array, component: Array) -> Array:
        """Return points (n, D), given standard normals z (n, D) and the component of each (n,)."""
        roots = np.linalg.cholesky(self.covariances)
        out: Array = self.means[component] + np.einsum("nde,ne->nd", roots[component], z)
        return out


class GaussianMixtureJoint(JointDistribution):
    """The joint distribution that is a Gaussian mixture.

    >>> joint = GaussianMixtureJoint(Mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None], action_dim=1))
    >>> joint.level(0.3).covariances.tolist()  # white noise of variance 1 stays what it is
    [[[1.0, 0.0], [0.0, 1.0]]]

    Args:
        clean: the mixture.
    """

    def __init__(self, clean: Mixture) -> None:
        self.mixture = clean
        self.action_dim, self.dim = clean.action_dim, clean.dim
        self.levels: dict[float, Mixture] = {1.0: clean}

    @property
    def clean(self) -> Mixture:
        """See :attr:`JointDistribution.clean`."""
        return self.mixture

    def level(self, abar: float) -> Mixture:
        """See :meth:`JointDistribution.level`."""
        if abar not in self.levels:
            self.levels[abar] = self.mixture.noised(abar)
        return self.levels[abar]

    @property
    def coordinates(self) -> list[str]:
        """Names of the coordinates: ``a`` and ``s'``, or ``a1``, ``a2``, ... where there are several."""
        out = []
        for name, n in (("a", self.action_dim), ("s'", self.dim - self.action_dim)):
            out += [name] if n == 1 else [f"{name}{i + 1}" for i in range(n)]
        return out
