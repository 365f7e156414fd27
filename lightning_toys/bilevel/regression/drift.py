"""How the stream's mean moves, and the best that a fixed window of weights can do about it.

With an inner problem that is solved exactly, the outer loss under normalised weights w on the lags 1..W is on average

    J(w) = (1/d) E_t (m(t) - sum_k w_k m(t - k))^2 + sigma^2 (1 + |w|^2),

a quadratic form on the simplex: its minimum is the oracle that the learned weights are compared with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import nnls

from lightning_toys.bilevel.checks import MOST_Y, number_in, numbers
from lightning_toys.errors import ToyError, bounded, check_settings, require

Array = np.ndarray
ESTIMATED_TIMES = 10_000  # 0, 1, ... that the moments of a drift which gives its mean alone are estimated over
CHUNK = 1000  # of those times at once


class Drift:
    """m(t), the distance that the stream's mean has moved at time t, in units of y; t, in steps, may be negative.

    A drift of one's own gives :meth:`mean`. The moments that the baselines are made of are then estimated over the
    times 0 to 9999, within which it should have shown all that it does; closed forms are better, and may be given too.
    """

    def mean(self, t: Array) -> Array:
        """Return m at integer times t (any shape), float64."""
        raise NotImplementedError

    def lag_moments(self, window: int) -> Array:
        """Return E_t (m(t) - m(t - k)) (m(t) - m(t - l)) for lags k, l = 1..window: (window, window)."""
        total, lags = np.zeros((window, window)), np.arange(1, window + 1)
        for start in range(0, ESTIMATED_TIMES, CHUNK):
            t = np.arange(start, start + CHUNK)
            gaps = self.mean(t)[:, None] - self.mean(t[:, None] - lags)
            total += gaps.T @ gaps
        return total / ESTIMATED_TIMES

    @property
    def power(self) -> float:
        """E_t m(t)^2; NaN where it grows without bound."""
        return float(np.mean(np.square(self.mean(np.arange(ESTIMATED_TIMES)))))


def check_drift(drift: Drift) -> None:
    """Refuse a drift that cannot be a stream's mean, before anything is made of it.

    Raises:
        ToyError: names the class, the method and what it has to return.
    """
    t, lags, name = np.arange(-8, 8).reshape(4, 4), 3, type(drift).__name__
    call: Callable[[], Array]
    for method, call, shape, wanted in (
        ("mean", lambda: drift.mean(t), t.shape, "m at integer times of any shape, negative ones too"),
        ("lag_moments", lambda: drift.lag_moments(lags), (lags, lags), "a symmetric matrix, lags by lags"),
    ):
        try:
            found = np.asarray(call(), dtype=np.float64)
        except Exception as error:  # of somebody else's code
            said = " ".join(str(error).split()) or "not given"
            raise ToyError(
                f"--data.drift: {name}.{method} fails ({type(error).__name__}: {said}); give {wanted}"
            ) from error
        fits = found.shape == shape and bool(np.isfinite(found).all())
        fits = fits and (method == "mean" or np.allclose(found, found.T))
        require(
            fits, f"--data.drift: {name}.{method} returns {str(found.tolist())[:60]} of {found.shape}; give {wanted}"
        )


def require_finite(flag: str, value: float) -> None:
    """Raise a ToyError that names ``--data.drift.FLAG`` unless single precision can square ``value``."""
    bounded(f"--data.drift.{flag}", value, -MOST_Y, MOST_Y)


@dataclass(frozen=True)
class Sine(Drift):
    """m(t) = amplitude sin(omega t).

    Args:
        amplitude: beta, in units of y.
        omega: angle of one time step, in radians; the period is 2 pi / omega steps.

    Raises:
        ToyError: a value is not allowed.
    """

    amplitude: float = 10.0
    omega: float = 0.2

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--data.drift.")
        require_finite("amplitude", self.amplitude)
        number_in("--data.drift.omega", self.omega, lambda x: 0 < x <= math.pi, "radians a step, in (0, pi]")

    def mean(self, t: Array) -> Array:
        """See :meth:`Drift.mean`."""
        out: Array = self.amplitude * np.sin(self.omega * t)
        return out

    def lag_moments(self, window: int) -> Array:
        """See :meth:`Drift.lag_moments`: the mean over the phase."""
        k = np.arange(1, window + 1)
        c = np.cos(self.omega * k)
        out: Array = self.power * (1 - c[:, None] - c[None, :] + np.cos(self.omega * (k[:, None] - k[None, :])))
        return out

    @property
    def power(self) -> float:
        """See :attr:`Drift.power`."""
        return self.amplitude**2 / 2


@dataclass(frozen=True)
class SwitchingSine(Drift):
    """m(t) = amplitude sin(phase(t)), whose angle per step changes: ``hold`` steps of each, one after the other.

    The phase has no jumps. No fixed weights are the best at all times.

    Args:
        amplitude: in units of y.
        omegas: angles of one time step, in radians, one after the other; after the last the first again.
        hold: time steps of each.

    Raises:
        ToyError: a value is not allowed.
    """

    amplitude: float = 10.0
    omegas: Sequence[float] = (0.2, 0.3)
    hold: int = 250

    def __post_init__(self) -> None:
        require_finite("amplitude", self.amplitude)
        for omega in numbers("--data.drift.omegas", self.omegas, "angle"):
            bounded("--data.drift.omegas", omega, 0.0, math.pi, above=True)
        bounded("--data.drift.hold", self.hold, 1, 10_000)

    def phase(self, t: Array) -> Array:
        """Return the phase in radians at integer times t (any shape); it is 0 at t = 0."""
        omegas = np.asarray(self.omegas, dtype=np.float64)
        piece, step = np.divmod(np.asarray(t), self.hold)
        rounds, place = np.divmod(piece, len(omegas))
        before = np.concatenate([[0.0], np.cumsum(omegas)])  # of the pieces of a round, over hold
        out: Array = self.hold * (rounds * before[-1] + before[place]) + omegas[place] * step
        return out

    def mean(self, t: Array) -> Array:
        """See :meth:`Drift.mean`."""
        out: Array = self.amplitude * np.sin(self.phase(t))
        return out

    def lag_moments(self, window: int) -> Array:
        """See :meth:`Drift.lag_moments`: the mean over one round of the angles, and over the phase at its start."""
        total = np.zeros((window, window))
        t, lags = np.arange(self.hold * len(self.omegas)), np.arange(1, window + 1)
        for part in np.array_split(t, -(-len(t) // CHUNK)):
            turned = self.phase(part)[:, None] - self.phase(part[:, None] - lags)
            c, s = np.cos(turned), np.sin(turned)
            # E sin(p) sin(p - a) = cos(a) / 2 for a phase p that is anywhere
            total += len(part) - c.sum(0)[:, None] - c.sum(0)[None, :] + c.T @ c + s.T @ s
        out: Array = self.power * total / len(t)
        return out

    @property
    def power(self) -> float:
        """See :attr:`Drift.power`."""
        return self.amplitude**2 / 2


@dataclass(frozen=True)
class Linear(Drift):
    """m(t) = slope t.

    Args:
        slope: alpha, in units of y a time step.

    Raises:
        ToyError: it is not allowed.
    """

    slope: float = 0.1

    def __post_init__(self) -> None:
        require_finite("slope", self.slope)

    def mean(self, t: Array) -> Array:
        """See :meth:`Drift.mean`."""
        return self.slope * t

    def lag_moments(self, window: int) -> Array:
        """See :meth:`Drift.lag_moments`."""
        k = np.arange(1, window + 1)
        out: Array = self.slope**2 * np.outer(k, k)
        return out

    @property
    def power(self) -> float:
        """See :attr:`Drift.power`: without bound."""
        return math.nan


@dataclass(frozen=True)
class Piecewise(Drift):
    """m(t) is constant at one level after the other, and starts again after the last.

    Args:
        levels: in units of y.
        hold: time steps at each level.

    Raises:
        ToyError: a value is not allowed.
    """

    levels: Sequence[float] = (10.0, -10.0, 0.0)
    hold: int = 50

    def __post_init__(self) -> None:
        for level in numbers("--data.drift.levels", self.levels, "level"):
            require_finite("levels", level)
        bounded("--data.drift.hold", self.hold, 1, 10_000)

    def mean(self, t: Array) -> Array:
        """See :meth:`Drift.mean`."""
        out: Array = np.asarray(self.levels, dtype=np.float64)[(np.asarray(t) // self.hold) % len(self.levels)]
        return out

    def lag_moments(self, window: int) -> Array:
        """See :meth:`Drift.lag_moments`: the mean over one round of the levels."""
        t = np.arange(self.hold * len(self.levels))
        gaps = self.mean(t)[:, None] - self.mean(t[:, None] - np.arange(1, window + 1))
        out: Array = gaps.T @ gaps / len(t)
        return out

    @property
    def power(self) -> float:
        """See :attr:`Drift.power`."""
        return float(np.mean(np.square(self.levels)))


def simplex_minimum(form: Array) -> Array:
    """Return the w >= 0 (W,) of sum 1 that minimises w' Q w, Q (W, W) positive semidefinite.

    On the simplex, Q w is constant where w > 0 and no less elsewhere. Those are, but for w's scale, the conditions of
    min |R w|^2 + (1 - sum w)^2 over w >= 0 with Q = R'R: non-negative least squares, which scipy solves exactly.

    >>> simplex_minimum(np.diag([1.0, 3.0])).round(12).tolist()
    [0.75, 0.25]
    """
    values, vectors = np.linalg.eigh(form)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    # rows of like size; the scale of w is free
    root = root / max(np.sqrt(max(values.max(), 0.0)), np.finfo(np.float64).tiny)
    w, _ = nnls(np.vstack([root, np.ones(len(form))]), np.append(np.zeros(len(form)), 1.0))
    out: Array = w / w.sum()
    return out


class WindowLoss(ABC):
    """J(w) = constant + w' Q w of weights w on the simplex, W lags: the outer loss under an exact inner solver."""

    constant: float
    window: int

    @property
    @abstractmethod
    def quadratic_form(self) -> Array:
        """Q (W, W)."""

    @property
    @abstractmethod
    def no_tracking(self) -> float:
        """The outer loss of a predictor that never moves; NaN where it grows without bound."""

    def loss(self, weights: Array) -> Array:
        """Return J (...) of weights (..., W), which are divided by their sum first; NaN where that is 0."""
        total = weights.sum(-1, keepdims=True)
        w = np.divide(weights, total, out=np.full(weights.shape, np.nan), where=total > 0)
        out: Array = self.constant + np.einsum("...k,kl,...l->...", w, self.quadratic_form, w)
        return out

    def oracle(self) -> Array:
        """Return the weights (W,) that minimise J."""
        return simplex_minimum(self.quadratic_form)

    def references(self) -> dict[str, float]:
        """Return J of the oracle, of equal weights, of lag 1 alone, and of no tracking."""
        lag_1, uniform = np.eye(self.window)[0], np.full(self.window, 1 / self.window)
        return {
            "oracle": float(self.loss(self.oracle())),
            "uniform": float(self.loss(uniform)),
            "lag_1": float(self.loss(lag_1)),
            "no_tracking": self.no_tracking,
        }


@dataclass(frozen=True)
class ExactLoss(WindowLoss):
    """J(w) of a drift: the expected outer loss of fixed weights under an exact inner solver.

    Attributes:
        drift: m(t).
        window: W, the largest lag.
        outputs: d.
        sigma: standard deviation of the noise on one output.

    >>> {k: round(v, 2) for k, v in ExactLoss(Sine(), window=60, outputs=3, sigma=1.0).references().items()}
    {'oracle': 1.17, 'uniform': 19.25, 'lag_1': 2.66, 'no_tracking': 17.67}
    """

    drift: Drift
    window: int
    outputs: int
    sigma: float

    @property
    def constant(self) -> float:  # type: ignore[override]
        """sigma^2, the noise of the present."""
        return self.sigma**2

    @cached_property
    def quadratic_form(self) -> Array:
        """Q (W, W) of J(w) = sigma^2 + w' Q w on the simplex."""
        return self.drift.lag_moments(self.window) / self.outputs + self.sigma**2 * np.eye(self.window)

    @property
    def no_tracking(self) -> float:
        """See :attr:`WindowLoss.no_tracking`: h = f*."""
        return self.sigma**2 + self.drift.power / self.outputs


class EmpiricalLoss(WindowLoss):
    """J(w) of a stream that was observed: each point is predicted by its own past under w.

        J(w) = mean over times, points and outputs of (y_t - sum_k w_k y_{t-k})^2

    on the simplex, which for y = f* + drift + noise is :class:`ExactLoss` in the mean. No tracking is the variance of y
    over time.

    Args:
        y: the stream (T, N, d), T above W.
        window: W.
    """

    constant = 0.0

    def __init__(self, y: Array, window: int) -> None:
        self.y, self.window = y.reshape(len(y), -1), window

    @cached_property
    def quadratic_form(self) -> Array:
        """Q (W, W): means of (y_t - y_{t-k}) (y_t - y_{t-l})."""
        w, n = self.window, len(self.y) - self.window
        total = np.zeros((w, w))
        for column in self.y.T:
            past = np.lib.stride_tricks.sliding_window_view(column[:-1], w)[:, ::-1]  # lag 1 first
            gaps = column[w:, None] - past
            total += gaps.T @ gaps
        return total / (n * self.y.shape[1])

    @property
    def no_tracking(self) -> float:
        """See :attr:`WindowLoss.no_tracking`."""
        return float(self.y.var(0).mean())
