"""Baselines for points in any dimension: what a table's rows say without a network.

Each maps points c (N, C), already scaled so that distances make sense, and their values x1 (N, D) to predictions (M, D)
at c_eval (M, C). The values may be noisy, by how much is not known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import QhullError, cKDTree
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import Tensor

from lightning_toys.flow_vs_regression.baselines import MAX_GP_FIT, cubic_spline, linear, predicted_in_chunks

MOST_SIMPLEX_POINTS = {2: 100_000, 3: 20_000, 4: 2000, 5: 300, 6: 100}  # a triangulation of more takes minutes
MOST_GP_POINTS = 2000  # a posterior costs the cube of their number

Predictor = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray | None]


def mean(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray) -> np.ndarray:
    """Predict the mean value.

    >>> mean(np.zeros((2, 3)), np.array([[1.0], [3.0]]), np.zeros((1, 3))).tolist()
    [[2.0]]
    """
    return np.broadcast_to(x1.mean(0), (c_eval.shape[0], x1.shape[1])).copy()


def nearest(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray) -> np.ndarray:
    """Predict the value of the nearest point, by Euclidean distance.

    >>> nearest(np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[5.0], [7.0]]), np.array([[0.9, 0.3]])).tolist()
    [[7.0]]
    """
    found = cKDTree(c).query(c_eval)[1]
    return np.asarray(x1[found])


def interpolated(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray) -> np.ndarray | None:
    """Interpolate linearly on the simplices of a Delaunay triangulation; outside the hull, the nearest point's value.

    In one dimension these are straight lines between the points. None where there are too many points for a
    triangulation, too few, or they lie in a plane of lower dimension.
    """
    dim = c.shape[1]
    if dim == 1:
        return linear(c[:, 0], x1, c_eval[:, 0], 0.0)
    if not dim + 1 <= c.shape[0] <= MOST_SIMPLEX_POINTS.get(dim, 0):
        return None
    try:
        found = np.asarray(LinearNDInterpolator(c, x1)(c_eval))
    except QhullError:
        return None
    outside = np.isnan(found).any(1)
    if outside.any():
        found[outside] = nearest(c, x1, c_eval[outside])
    return found


def spline(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray) -> np.ndarray | None:
    """Interpolate by a cubic spline; None of fewer than four points, and in more than one dimension."""
    if c.shape[1] > 1 or c.shape[0] < 4:
        return None
    return cubic_spline(c[:, 0], x1, np.clip(c_eval[:, 0], c[0, 0], c[-1, 0]), 0.0)


def gaussian_process(c: np.ndarray, x1: np.ndarray, c_eval: np.ndarray) -> np.ndarray:
    """Predict the posterior mean of a Gaussian process, RBF kernel with a length for each input, and white noise.

    The kernel is fitted by marginal likelihood on at most 100 points, the posterior is that of at most 2000, evenly
    spread over the rows; all outputs share the kernel.
    """
    lengths = RBF(np.ones(c.shape[1]), (1e-2, 1e2))
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * lengths + WhiteKernel(1e-2, (1e-8, 1e1))
    fit, kept = (-(-c.shape[0] // most) for most in (MAX_GP_FIT, MOST_GP_POINTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound is an answer: an input is unused
        model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0)
        model.fit(c[::fit], x1[::fit])
        model = GaussianProcessRegressor(model.kernel_, normalize_y=True, optimizer=None)
        model.fit(c[::kept], x1[::kept])
    return predicted_in_chunks(model, c_eval, x1.shape[1])


BASELINES: dict[str, Predictor] = {
    "mean": mean,
    "nearest": nearest,
    "linear": interpolated,
    "cubic_spline": spline,
    "gaussian_process": gaussian_process,
}


def without_repeats(c: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each different point once, sorted, with the mean of its values.

    >>> c, x1 = without_repeats(np.array([[1.0], [0.0], [1.0]]), np.array([[2.0], [5.0], [4.0]]))
    >>> c.tolist(), x1.tolist()
    ([[0.0], [1.0]], [[5.0], [3.0]])
    """
    points, place = np.unique(c, axis=0, return_inverse=True)
    place = place.reshape(-1)
    values = np.zeros((points.shape[0], x1.shape[1]))
    np.add.at(values, place, x1)
    return points, values / np.bincount(place)[:, None]


def scattered_predictions(c: Tensor, x1: Tensor, c_eval: Tensor) -> dict[str, Tensor]:
    """Return every baseline's predictions that there is, by name.

    Args:
        c: points (N, C), in any order.
        x1: their values (N, D).
        c_eval: points to predict at (M, C).

    Returns:
        name to (1, 1, M, D), float64, with the axes (R, K) of a network's predictions.
    """
    rows, at = (c.double().numpy(), x1.double().numpy()), c_eval.double().numpy()
    different = without_repeats(*rows)
    out = {}
    for name, predict in BASELINES.items():
        found = predict(*(rows if name in ("mean", "gaussian_process") else different), at)
        if found is not None:
            out[name] = torch.from_numpy(found)[None, None]
    return out
