"""What is exactly known of a tilted mixture: closed forms under quadratic rewards, adaptive quadrature under others.

Whatever the reward, the tilt is a function of a alone. The probability of component j given x is therefore that of q,
and the tilted distribution is sum_j w'_j p_j(a) q_j(s' | a): only integrals over the action are needed, of one
dimension where the action has one coordinate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from scipy import integrate
from scipy import stats as scipy_stats

from lightning_toys.errors import ToyError, require
from lightning_toys.mirror_descent.joint import Array
from lightning_toys.mirror_descent.mixture import Mixture
from lightning_toys.mirror_descent.tilt import NoIntegralError, QuadraticForm, Reward
from lightning_toys.training.noise import keyed_generator

SCAN = 40.0  # standard deviations of every component that are searched for mass
DEPTH = 80.0  # nats below the largest density where integrals end
GRID_POINTS = 8001  # of tables: quantiles, and draws
MIN_TABLE = 601  # points of the table of a next state's distribution function, or more:
POINTS_PER_STD = 16.0  # to the narrowest component's standard deviation given the action
MAX_ERROR = 1e-6  # of quadrature, beyond which a reward is refused


class Truth(ABC):
    """A distribution of x = (a, s') whose s' | a is that of q, and its exact moments.

    Attributes:
        prior: q, untilted and clean.
        weights: probability of each component (J,).
        mean: E x (D,).
        covariance: Cov x (D, D).
        mean_reward: E Q(a).
        log_z: log Z of the tilt; NaN of a distribution that is no tilt.
        error: bound on the moments' error, 0 of closed forms.
        mixture: the distribution, where it is a Gaussian mixture.
    """

    prior: Mixture
    weights: Array
    mean: Array
    covariance: Array
    mean_reward: float
    log_z: float
    error: float = 0.0
    mixture: Mixture | None = None

    @abstractmethod
    def cdf(self, i: int, x: Array) -> Array:
        """Return the distribution function of coordinate i at points x (n,)."""

    @abstractmethod
    def draw(self, seed: int, n: int) -> Array:
        """Return n independent draws (n, D), keyed by the seed."""

    @property
    def source(self) -> str:
        """Where the numbers come from."""
        return "closed form" if self.error == 0 else f"adaptive quadrature, error below {self.error:.1g}"

    @cached_property
    def tables(self) -> list[tuple[Array, Array]]:
        """Points and distribution function of each coordinate, for :meth:`quantiles`."""
        out = []
        for i in range(self.prior.dim):
            centre, std = self.mean[i], math.sqrt(self.covariance[i, i])
            x = np.linspace(centre - 9 * std, centre + 9 * std, GRID_POINTS)
            out.append((x, self.cdf(i, x)))
        return out

    def quantiles(self, i: int, n: int) -> Array:
        """Return the quantiles of coordinate i at (k + 1/2) / n (n,)."""
        x, F = self.tables[i]
        out: Array = np.interp((np.arange(n) + 0.5) / n, F, x)
        return out

    def conditional_cdf(self, x: Array) -> Array:
        """Return P(S_i <= s'_i | a) of each next state's coordinate (n, d_s), at x (n, D): uniform where s' | a is q's.

        The coordinates' own marginals given a: of several they are dependent.
        """
        q, d = self.prior, self.prior.action_dim
        r = q.actions.responsibilities(x[:, :d])
        mean = q.means[:, None, d:] + np.einsum("jsa,jna->jns", q.gains, x[None, :, :d] - q.means[:, None, :d])
        std = np.sqrt(np.einsum("jss->js", q.residual_covariances))
        out: Array = np.einsum("nj,jns->ns", r, scipy_stats.norm.cdf((x[None, :, d:] - mean) / std[:, None]))
        return out


class ClosedForm(Truth):
    """A mixture tilted by a quadratic.

    Args:
        prior: q.
        Q: the quadratic.
        beta: the tilt's inverse temperature.
    """

    def __init__(self, prior: Mixture, Q: QuadraticForm, beta: float) -> None:
        self.prior = prior
        self.mixture, self.log_z = prior.tilted(Q.scaled(beta))
        self.weights, self.mean, self.covariance = self.mixture.weights, self.mixture.mean, self.mixture.covariance
        d = prior.action_dim
        m, C = self.mean[:d], self.covariance[:d, :d]
        self.mean_reward = float(Q.const + Q.b @ m - 0.5 * (np.trace(Q.A @ C) + m @ Q.A @ m))

    def cdf(self, i: int, x: Array) -> Array:
        """See :meth:`Truth.cdf`."""
        assert self.mixture is not None
        m, std = self.mixture.means[:, i], np.sqrt(self.mixture.covariances[:, i, i])
        out: Array = self.weights @ scipy_stats.norm.cdf((x[None] - m[:, None]) / std[:, None])
        return out

    def draw(self, seed: int, n: int) -> Array:
        """See :meth:`Truth.draw`."""
        assert self.mixture is not None
        generator = keyed_generator(seed, 0, "truth")
        z, u = generator.standard_normal((n, self.prior.dim)), generator.random(n)
        return self.mixture.sample(z, component_indices(u[:, None], self.weights[None]))


def component_indices(u: Array, probability: Array) -> Array:
    """Return the component (n,) that uniforms u (n, 1) pick by probabilities (n or 1, J)."""
    out: Array = (u >= probability.cumsum(1)[:, :-1]).sum(1)
    return out


class OneAction(Truth):
    """A distribution whose action has one coordinate and a density on a grid, s' | a that of q.

    Args:
        prior: q.
        reward: gives Q.
        grid: increasing actions (n,).
        density: there (n,), up to a factor.
    """

    def __init__(self, prior: Mixture, reward: Reward, grid: Array, density: Array) -> None:
        self.prior, self.grid, self.log_z = prior, grid, math.nan
        cells = np.diff(grid)
        cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * cells)])
        self.density, self.cumulative = density / cumulative[-1], cumulative / cumulative[-1]
        mass = np.zeros(len(grid))  # of the trapezoidal rule
        mass[1:] += 0.5 * cells
        mass[:-1] += 0.5 * cells
        self.mass = mass * self.density
        r = prior.actions.responsibilities(grid[:, None])
        powers = np.stack([np.ones_like(grid), grid, np.square(grid)])
        Q = reward_values(reward, grid)
        # where the density is 0, Q may be anything
        self.set_moments((powers * self.mass) @ r, float((self.mass * np.where(self.mass > 0, Q, 0.0)).sum()))

    def set_moments(self, integrals: Array, mean_reward: float) -> None:
        """Set the moments, given the integrals (3, J) of 1, a and a^2 over each component."""
        q = self.prior
        one, first, second = integrals
        G, R = q.gains[:, :, 0], q.residual_covariances  # (J, d_s), (J, d_s, d_s)
        c = q.means[:, 1:] - G * q.means[:, :1]  # E[s' | a, j] = c + G a
        self.weights, self.mean_reward = one, mean_reward
        self.mean = np.concatenate([[first.sum()], one @ c + first @ G])
        ss = np.einsum("j,jst->st", one, R + c[:, :, None] * c[:, None, :])
        cross = c[:, :, None] * G[:, None, :]
        ss += np.einsum("j,jst->st", first, cross + cross.transpose(0, 2, 1))
        ss += np.einsum("j,jst->st", second, G[:, :, None] * G[:, None, :])
        raw = np.empty((q.dim, q.dim))
        raw[0, 0], raw[1:, 1:] = second.sum(), ss
        raw[0, 1:] = raw[1:, 0] = first @ c + second @ G
        self.covariance = raw - np.outer(self.mean, self.mean)

    def cdf(self, i: int, x: Array) -> Array:
        """See :meth:`Truth.cdf`: by linear interpolation of the action's, by the trapezoidal rule of a next state's."""
        if i == 0:
            out: Array = np.interp(x, self.grid, self.cumulative)
            return out
        q, seen = self.prior, np.flatnonzero(self.mass > 1e-12)
        # some points together, at their mean: of second order in their distance
        starts = np.arange(0, len(seen), max(1, len(seen) // 1000))
        mass = np.add.reduceat(self.mass[seen], starts)
        a = np.add.reduceat(self.mass[seen] * self.grid[seen], starts) / mass
        shares = q.actions.responsibilities(a[:, None]) * mass[:, None]
        mean = q.means[:, i] + q.gains[:, i - 1, 0] * (a[:, None] - q.means[:, 0])
        std = np.sqrt(q.residual_covariances[:, i - 1, i - 1])
        # a table, then between its points: the function is smooth on the scale of the narrowest component
        points = max(MIN_TABLE, math.ceil(POINTS_PER_STD * (x[-1] - x[0]) / float(std.min())))
        at = x if points >= len(x) else np.linspace(x[0], x[-1], points)
        F = np.array([(shares * scipy_stats.norm.cdf((t - mean) / std)).sum() for t in at])
        out = np.interp(x, at, F / shares.sum())
        return out

    def draw(self, seed: int, n: int) -> Array:
        """See :meth:`Truth.draw`: the action by its inverse distribution function, then s' given it."""
        q, generator = self.prior, keyed_generator(seed, 0, "truth")
        u, z = generator.random((n, 2)), generator.standard_normal((n, q.dim - 1))
        a = np.interp(u[:, 0], self.cumulative, self.grid)[:, None]
        j = component_indices(u[:, 1:], q.actions.responsibilities(a))
        mean = q.means[j, 1:] + q.gains[j, :, 0] * (a - q.means[j, :1])
        return np.concatenate([a, mean + np.einsum("nst,nt->ns", np.linalg.cholesky(q.residual_covariances)[j], z)], 1)


def reward_values(reward: Reward, a: Array) -> Array:
    """Return Q (n,) at actions a (n,) of one coordinate.

    Raises:
        ToyError: they are no finite numbers, or not one an action.
    """
    found = reward.value(torch.from_numpy(np.ascontiguousarray(a)).unsqueeze(0))
    fits = isinstance(found, torch.Tensor) and found.shape == a.shape
    require(
        fits and bool(torch.isfinite(found).all()),
        f"--model.reward: {type(reward).__name__} is not allowed, its value of actions of shape {(1, len(a))} is "
        f"{'of shape ' + str(tuple(getattr(found, 'shape', ()))) if not fits else 'not finite'}; "
        f"give {(len(a),)} finite numbers",
    )
    out: Array = found.detach().double().numpy()
    return out


class Quadrature(OneAction):
    """A mixture of one action tilted by any reward, its moments by adaptive Gauss-Kronrod quadrature (scipy).

    Args:
        prior: q.
        reward: gives Q.
        beta: the tilt's inverse temperature.

    Raises:
        NoIntegralError: there is no integral.
        ToyError: it is not found to ``MAX_ERROR``.
    """

    def __init__(self, prior: Mixture, reward: Reward, beta: float) -> None:
        actions = prior.actions
        m, std = actions.means[:, 0], np.sqrt(actions.covariances[:, 0, 0])
        scan = np.linspace(float((m - SCAN * std).min()), float((m + SCAN * std).max()), GRID_POINTS)

        def logs(a: Array) -> Array:
            """Return log w_j N_j(a) + beta Q(a) (J, n)."""
            return actions.log_components(a[:, None]) + beta * reward_values(reward, a)

        total = np.logaddexp.reduce(logs(scan), axis=0)
        top, seen = float(total.max()), np.flatnonzero(total > total.max() - DEPTH)
        name = type(reward).__name__
        if seen[0] == 0 or seen[-1] == len(scan) - 1:
            raise NoIntegralError(
                f"--model.reward: {name} is not allowed with --model.lambda_scale: q(a) exp(beta Q(a)) has no "
                f"integral between {scan[0]:.3g} and {scan[-1]:.3g}; give a smaller lambda_scale"
            )
        low, high = float(scan[seen[0] - 1]), float(scan[seen[-1] + 1])

        def integrand(a: float) -> Array:
            at = np.array([a])
            one = np.exp(logs(at)[:, 0] - top)
            Q = float(reward_values(reward, at)[0])
            return np.concatenate([one, one * a, one * a * a, [one.sum() * Q]])

        points = sorted({p for p in (*reward.breakpoints, *m.tolist()) if low < p < high})
        found, error = integrate.quad_vec(
            integrand, low, high, epsabs=1e-12, epsrel=1e-11, norm="max", limit=20_000, points=points
        )
        J = len(m)
        z = float(found[:J].sum())
        self_error = max(1e-15, 4 * float(error) / z)
        require(
            z > 0 and self_error < MAX_ERROR,
            f"--model.reward: {name} is not allowed, quadrature of q(a) exp(beta Q(a)) is only known to "
            f"{self_error:.1g}; name its jumps in breakpoints",
        )
        # both sides of each jump are points of the grid
        jumps = [p + d for p in reward.breakpoints for d in (-1e-9, 1e-9) if low < p < high]
        grid = np.unique(np.concatenate([np.linspace(low, high, GRID_POINTS), jumps]))
        super().__init__(prior, reward, grid, np.exp(np.logaddexp.reduce(logs(grid), axis=0) - top))
        self.log_z = math.log(z) + top
        integrals = found[: 3 * J].reshape(3, J) / z
        self.set_moments(integrals, float(found[-1]) / z)
        self.error = self.moments_error(self_error, integrals)

    def moments_error(self, error: float, integrals: Array) -> float:
        """Return a bound on the error of all moments, given that of the integrals (3, J) over Z, and of Z over itself.

        A ratio m of integrals is off by error (1 + |m|). Moments of s' = c + G a are sums of those of a with factors of
        at most (1 + |c| + |G|)^2, and a covariance subtracts a product of means: twice the mean times its error more.
        """
        q = self.prior
        c = np.abs(q.means[:, 1:] - q.gains[:, :, 0] * q.means[:, :1])
        factor = float(np.square(1 + c + np.abs(q.gains[:, :, 0])).max())
        largest = max(1.0, float(np.abs(integrals).sum(1).max()), abs(self.mean_reward))
        return error * factor * (1 + largest) * (1 + 2 * float(np.abs(self.mean).max()))


def truth_of(prior: Mixture, reward: Reward, beta: float) -> Truth:
    """Return what is known of q(a, s') exp(beta Q(a)) / Z.

    Raises:
        ToyError: Q is no quadratic, and the action has several coordinates; or there is no integral.
    """
    form = reward.quadratic(prior.action_dim)
    if form is not None:
        return ClosedForm(prior, form, beta)
    if prior.action_dim != 1:
        raise ToyError(
            f"--model.reward: {type(reward).__name__} is not allowed with --data.action_dim {prior.action_dim}, the "
            "exact distribution is known by quadrature over one action; give action_dim 1, ActionValue or "
            "QuadraticReward"
        )
    return Quadrature(prior, reward, beta)
