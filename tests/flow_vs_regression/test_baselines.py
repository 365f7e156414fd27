import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline, interp1d
from torch import Tensor

from lightning_toys.flow_vs_regression.baselines import (
    BASELINES,
    baseline_predictions,
    cubic_spline,
    gaussian_process,
    linear,
    nearest,
    zero,
)
from lightning_toys.flow_vs_regression.targets import Piecewise, Trigonometric
from lightning_toys.training.noise import keyed_generator


def grid(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64).unsqueeze(1)


def points(n: int = 12, outputs: int = 3) -> tuple[np.ndarray, np.ndarray]:
    g = keyed_generator(0, 0, "test/references")
    return np.sort(g.random(n)), g.standard_normal((n, outputs))


AT = np.linspace(-0.1, 1.1, 301)


def test_known_errors_on_the_default_target() -> None:
    target, c, at = Trigonometric(), grid(50), grid(100_000)
    rows = baseline_predictions(c, target(c), at, 0.0)
    rmse = {name: (row[0, 0] - target(at)).square().mean().sqrt().item() for name, row in rows.items()}
    assert rmse["zero"] == pytest.approx(0.9260, abs=5e-5)
    assert rmse["linear"] == pytest.approx(0.003297, abs=5e-7)
    assert rmse["cubic_spline"] == pytest.approx(9.0e-6, abs=5e-8)
    assert rmse["nearest"] > 10 * rmse["linear"]
    assert rmse["gaussian_process"] < rmse["cubic_spline"]
    assert list(rows) == ["zero", "nearest", "linear", "cubic_spline", "gaussian_process"]


def test_zero() -> None:
    assert not zero(*points(), AT, 0.0).any()
    assert zero(*points(), AT, 0.0).shape == (301, 3)


def test_nearest_by_hand() -> None:
    c, x1 = np.array([0.0, 0.25, 1.0]), np.array([[1.0], [2.0], [3.0]])
    at = np.array([-1, 0, 0.124, 0.125, 0.126, 0.25, 0.624, 0.625, 0.626, 1, 2])  # .125 and .625 lie half way
    assert nearest(c, x1, at, 0.0)[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_nearest_is_the_point_of_least_distance() -> None:
    c, x1 = points()
    expected = x1[np.abs(AT[:, None] - c).argmin(1)]
    np.testing.assert_array_equal(nearest(c, x1, AT, 0.0), expected)


def test_linear_is_scipys_and_constant_outside() -> None:
    c, x1 = points()
    inside = (c[0] <= AT) & (c[-1] >= AT)
    np.testing.assert_allclose(linear(c, x1, AT, 0.0)[inside], interp1d(c, x1, axis=0)(AT[inside]), atol=1e-12)
    np.testing.assert_array_equal(linear(c, x1, np.array([-5.0, 5.0]), 0.0), x1[[0, -1]])


def test_cubic_spline_is_scipys_and_exact_on_cubics() -> None:
    c, x1 = points()
    np.testing.assert_array_equal(cubic_spline(c, x1, AT, 0.0), CubicSpline(c, x1, bc_type="not-a-knot")(AT))
    cubic = (2 * c**3 - c**2 + 3)[:, None]
    np.testing.assert_allclose(cubic_spline(c, cubic, AT, 0.0)[:, 0], 2 * AT**3 - AT**2 + 3, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in BASELINES if n != "zero"])
def test_baselines_pass_through_the_points(name: str) -> None:
    target, c = Trigonometric(dim=2), grid(20)
    found = baseline_predictions(c, target(c), c, 0.0)[name][0, 0]
    torch.testing.assert_close(found, target(c), rtol=0, atol=1e-4 if name == "gaussian_process" else 1e-12)


def test_gaussian_process_smooths_noise_alone() -> None:
    """With the noise known it stays off the points and nearer to the truth than any interpolation of them."""
    target, c, at = Trigonometric(), grid(50), grid(300)
    noisy = target(c) + 0.2 * torch.from_numpy(keyed_generator(0, 0, "test/noise").standard_normal((50, 1)))
    rows = baseline_predictions(c, noisy, at, 0.2)
    rmse = {name: (row[0, 0] - target(at)).square().mean().sqrt().item() for name, row in rows.items()}
    assert rmse["gaussian_process"] < 0.15
    assert rmse["gaussian_process"] < 0.8 * min(rmse["linear"], rmse["cubic_spline"], rmse["nearest"])


def test_gaussian_process_is_repeatable_and_quiet_on_undersampled_targets() -> None:
    target, c, at = Piecewise(frequency_rule="published"), grid(50), grid(100)
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    a, b = (gaussian_process(c[:, 0].numpy(), target(c).numpy(), at[:, 0].numpy(), 0.0) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (100, 8)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[arg-type]


def test_unsorted_points_and_grids() -> None:
    c, x1 = (torch.from_numpy(a) for a in points())
    shuffle = torch.from_numpy(keyed_generator(0, 0, "test/shuffle").permutation(12))
    turned = torch.arange(40).flip(0)
    at = grid(40)
    straight = baseline_predictions(c[:, None], x1, at, 0.0)
    shuffled = baseline_predictions(c[shuffle, None], x1[shuffle], at[turned], 0.0)
    for name, row in straight.items():
        assert row.shape == (1, 1, 40, 3)
        torch.testing.assert_close(shuffled[name][:, :, turned], row, rtol=0, atol=1e-9)


def test_three_points_have_no_cubic_spline() -> None:
    for n, has in ((3, False), (4, True)):
        c, x1 = (torch.from_numpy(a) for a in points(n))
        assert ("cubic_spline" in baseline_predictions(c[:, None], x1, grid(10), 0.0)) is has
