"""Training-free baselines: interpolations of the same training points.

Each maps points c (N,), sorted, and their values x1 (N, D) to predictions (M, D) at c_eval (M,); ``noise`` is the known
standard deviation of the values' noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import Tensor

MAX_GP_FIT = 100
MAX_KERNEL = 2**21  # entries of the kernel matrix that are held at a time: 16 MiB, of which a few copies are made
Interpolator = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


def zero(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray, noise: float) -> np.ndarray:
    """Predict 0."""
    return np.zeros((c_eval.size, x1.shape[1]))


def nearest(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray, noise: float) -> np.ndarray:
    """Predict the value of the nearest training point (of two equally near ones, the left).

    >>> nearest(np.array([0.0, 1.0]), np.array([[5.0], [7.0]]), np.array([0.4, 0.5, 0.6]), 0.0).ravel().tolist()
    [5.0, 5.0, 7.0]
    """
    right = np.clip(np.searchsorted(c, c_eval), 1, c.size - 1)
    take_left = c_eval - c[right - 1] <= c[right] - c_eval
    return x1[np.where(take_left, right - 1, right)]


def linear(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray, noise: float) -> np.ndarray:
    """Interpolate linearly; constant beyond the outermost points (``numpy.interp``)."""
    return np.stack([np.interp(c_eval, c, column) for column in x1.T], axis=1)


def cubic_spline(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray, noise: float) -> np.ndarray:
    """Interpolate by ``scipy.interpolate.CubicSpline`` with not-a-knot ends; needs four points."""
    return np.asarray(CubicSpline(c, x1)(c_eval))


def gaussian_process(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray, noise: float) -> np.ndarray:
    """Predict the posterior mean of scikit-learn's Gaussian process, RBF kernel fitted by marginal likelihood.

    One kernel for all outputs. With noisy values a white kernel is fitted too. Beyond 100 points the kernel is fitted
    on every n-th point, at most 100, and the posterior on all of them. The same points are fitted once in a process.
    """
    model = fitted_process(c.tobytes(), x1.tobytes(), x1.shape[1], noise)
    return predicted_in_chunks(model, c_eval[:, None], x1.shape[1])


def predicted_in_chunks(model: GaussianProcessRegressor, at: np.ndarray, dim: int) -> np.ndarray:
    """Return a fitted process's posterior mean (M, dim) at points (M, C), some at a time: 1000 points and 100 000
    wanted three gigabytes at once.
    """
    rows = max(1, MAX_KERNEL // len(model.X_train_))
    parts = [np.asarray(model.predict(at[i : i + rows])).reshape(-1, dim) for i in range(0, len(at), rows)]
    return np.concatenate(parts)


@lru_cache(maxsize=64)  # a fit takes a hundred predictions' time, and the cells of a sweep share their data
def fitted_process(points: bytes, values: bytes, dim: int, noise: float) -> GaussianProcessRegressor:
    """Return the fitted process of points (N,) and values (N, ``dim``), both the bytes of float64."""
    c, x1 = np.frombuffer(points), np.frombuffer(values).reshape(-1, dim)
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(0.1, (1e-3, 1e1))
    if noise > 0:
        kernel = kernel + WhiteKernel(noise**2, (1e-8, 1e1))
    model = GaussianProcessRegressor(kernel, alpha=1e-10, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    every = -(-c.size // MAX_GP_FIT)
    with warnings.catch_warnings():
        # a length scale at its bound is an answer here (undersampled targets), not a fault
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(c[::every, None], x1[::every])
        if every > 1:
            model = GaussianProcessRegressor(model.kernel_, alpha=1e-10, normalize_y=True, optimizer=None)
            model.fit(c[:, None], x1)
    return model


BASELINES: dict[str, Interpolator] = {
    "zero": zero,
    "nearest": nearest,
    "linear": linear,
    "cubic_spline": cubic_spline,
    "gaussian_process": gaussian_process,
}


def baseline_predictions(c: Tensor, x1: Tensor, c_eval: Tensor, noise: float) -> dict[str, Tensor]:
    """Return every baseline's predictions, by name.

    Args:
        c: training points (N, 1), in any order.
        x1: their values (N, D).
        c_eval: points to predict at (M, 1).
        noise: standard deviation of the noise in x1.

    Returns:
        name to (1, 1, M, D), float64, with the axes (R, K) of a network's predictions; no ``cubic_spline`` of fewer
        than four points.
    """
    order = c.squeeze(-1).argsort()
    points, values, grid = (t.double().numpy() for t in (c.squeeze(-1)[order], x1[order], c_eval.squeeze(-1)))
    out = {}
    for name, interpolate in BASELINES.items():
        if name == "cubic_spline" and points.size < 4:
            continue  # not-a-knot ends need four points
        out[name] = torch.from_numpy(interpolate(points, values, grid, noise))[None, None]
    return out
