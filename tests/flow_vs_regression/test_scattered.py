"""Baselines in any dimension, against closed forms, brute force and each other."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from lightning_toys.flow_vs_regression.baselines import gaussian_process as process_in_1d
from lightning_toys.flow_vs_regression.scattered import (
    MOST_SIMPLEX_POINTS,
    gaussian_process,
    interpolated,
    mean,
    nearest,
    scattered_predictions,
    spline,
    without_repeats,
)
from lightning_toys.training.noise import keyed_generator


def points(n: int, dim: int, index: int = 0) -> np.ndarray:
    return keyed_generator(0, index, f"test/scattered/{dim}").random((n, dim))


def plane(c: np.ndarray) -> np.ndarray:
    return np.stack([1 + c @ np.arange(1, c.shape[1] + 1), -c[:, 0]], axis=1)


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_linear_interpolation_is_exact_for_planes_within_the_hull(dim: int) -> None:
    corners = np.stack(np.meshgrid(*[[0.0, 1.0]] * dim), axis=-1).reshape(-1, dim)
    c = without_repeats(np.vstack([corners, points(30, dim)]), np.zeros((30 + 2**dim, 1)))[0]
    at = points(50, dim, 1)
    found = interpolated(c, plane(c), at)
    assert found is not None
    np.testing.assert_allclose(found, plane(at), atol=1e-9)
    outside = at + 3.0
    beyond = interpolated(c, plane(c), outside)
    assert beyond is not None
    np.testing.assert_allclose(beyond, nearest(c, plane(c), outside), atol=1e-12)
    assert np.abs(beyond - plane(outside)).max() > 1


def test_what_cannot_be_triangulated_is_left_out() -> None:
    line = np.stack([np.arange(9.0), np.arange(9.0)], axis=1)
    assert interpolated(line, plane(line), line) is None
    assert interpolated(points(3, 4), np.zeros((3, 1)), points(2, 4)) is None
    many = MOST_SIMPLEX_POINTS[6] + 1
    assert interpolated(points(many, 6), np.zeros((many, 1)), points(2, 6)) is None
    assert interpolated(points(40, 7), np.zeros((40, 1)), points(2, 7)) is None
    found = scattered_predictions(*map(torch.from_numpy, (line, plane(line), line)))
    assert list(found) == ["mean", "nearest", "gaussian_process"]


def test_nearest_by_brute_force_and_mean() -> None:
    c, at = points(40, 3), points(60, 3, 1)
    x1 = plane(c)
    closest = ((at[:, None] - c) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(nearest(c, x1, at), x1[closest])
    np.testing.assert_allclose(mean(c, x1, at), np.tile(x1.mean(0), (60, 1)))


def test_repeated_points_are_one_with_their_mean() -> None:
    c = np.array([[0.0], [1.0], [0.0], [2.0], [1.0], [0.0], [3.0]])
    x1 = np.array([[1.0], [5.0], [2.0], [7.0], [6.0], [6.0], [8.0]])
    rows = scattered_predictions(*map(torch.from_numpy, (c, x1, np.array([[0.0], [0.5], [1.0], [9.0]]))))
    assert rows["linear"].flatten().tolist() == [3.0, 4.25, 5.5, 8.0]
    assert rows["nearest"].flatten().tolist() == [3.0, 3.0, 5.5, 8.0]
    assert rows["cubic_spline"].flatten()[[0, 2, 3]].tolist() == pytest.approx([3.0, 5.5, 8.0])  # not beyond the ends
    assert rows["mean"][0, 0, 0, 0] == pytest.approx(x1.mean())
    assert spline(points(9, 2), np.zeros((9, 1)), points(2, 2)) is None


def test_gaussian_process_finds_a_smooth_function_and_the_idle_input() -> None:
    c, at = points(80, 3), points(50, 3, 1) * 0.8 + 0.1

    def f(c: np.ndarray) -> np.ndarray:
        return np.stack([np.sin(3 * c[:, 0]) * np.cos(2 * c[:, 1]), c[:, 1] ** 2], axis=1)

    found = gaussian_process(c, f(c), at)
    rmse = np.sqrt(((found - f(at)) ** 2).mean())
    assert rmse < 0.02
    linear = interpolated(c, f(c), at)
    assert linear is not None
    assert rmse < 0.3 * np.sqrt(((linear - f(at)) ** 2).mean())
    moved = at.copy()
    moved[:, 2] += 0.05  # nothing depends on it
    np.testing.assert_allclose(gaussian_process(c, f(c), moved), found, atol=0.01)


def test_the_process_is_asked_some_points_at_a_time() -> None:
    """1000 points and many wanted, in less memory than one kernel matrix of both; the posterior is the same."""
    c = np.linspace(0, 1, 1000)
    x1 = np.sin(6 * c)[:, None]
    at = np.linspace(0, 1, 20_001)
    process_in_1d(c, x1, at[:2], 0.0)  # fitted, and kept
    tracemalloc.start()
    found = process_in_1d(c, x1, at, 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * 20_001 * 8
    assert found.shape == (20_001, 1)
    np.testing.assert_allclose(found[::5000], process_in_1d(c, x1, at[::5000], 0.0), atol=1e-9)
    np.testing.assert_allclose(found[:, 0], np.sin(6 * at), atol=1e-4)
