import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.flow_vs_regression.baselines import baseline_predictions
from lightning_toys.flow_vs_regression.metrics import (
    boundary_profile,
    compute_metrics,
    explained_variance,
    interval_matrix,
    off_subspace_ratio,
    pointwise_errors,
    principal_axes,
    rotation_profile,
    subspace_alignment,
)
from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation, Target, Trigonometric
from lightning_toys.training.noise import keyed_generator


def grid(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64).unsqueeze(1)


def gaussian(*shape: int, stream: str = "test/metrics") -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, stream).standard_normal(shape))


def orthonormal(dim: int, rank: int, stream: str = "test/basis") -> Tensor:
    return torch.linalg.qr(gaussian(dim, dim, stream=stream)).Q[:, :rank]


def as_prediction(f: Tensor) -> Tensor:
    return f[None, None]


def values(t: Tensor) -> list[float]:
    out: list[float] = t.flatten().tolist()
    return out


# pointwise errors


def test_errors_by_hand() -> None:
    """Errors 3, 4 (first output) and 0, -1 (second): l2 is the root of the mean square, not its square."""
    truth = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    prediction = truth + torch.tensor([[3.0, 0.0], [4.0, -1.0]], dtype=torch.float64)
    found = pointwise_errors(as_prediction(prediction), truth)
    expected = {
        "l1": 2.0,
        "l2": math.sqrt(26 / 4),
        "l1_dim0": 3.5,
        "l2_dim0": math.sqrt(12.5),
        "l1_dim1": 0.5,
        "l2_dim1": math.sqrt(0.5),
    }
    assert {k: pytest.approx(v.item(), rel=1e-14) for k, v in found.items()} == expected


def test_errors_keep_replicas_and_average_draws() -> None:
    truth = gaussian(7, 2)
    error = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64).view(3, 2, 1, 1)
    found = pointwise_errors(truth + error, truth)
    assert values(found["l1"]) == pytest.approx([2, 2, 0])
    assert values(found["l2"]) == pytest.approx([math.sqrt(5), 2, 0])


def test_one_output_has_no_columns_of_its_own() -> None:
    assert set(pointwise_errors(gaussian(1, 1, 5, 1), gaussian(5, 1))) == {"l1", "l2"}


# subspaces


def test_principal_axes_are_numpys_right_singular_vectors() -> None:
    points = gaussian(2, 40, 5) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64) + 7
    axes, s = principal_axes(points)
    for i in range(2):
        centred = points[i].numpy() - points[i].numpy().mean(0)
        _, expected, vt = np.linalg.svd(centred, full_matrices=False)
        np.testing.assert_allclose(s[i], expected, rtol=1e-10)
        np.testing.assert_allclose(np.abs((axes[i].numpy() * vt.T).sum(0)), 1, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_alignment_is_numpys(rank: int) -> None:
    points = gaussian(60, 5) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64) + 7
    U = orthonormal(5, rank)
    _, _, vt = np.linalg.svd(points.numpy() - points.numpy().mean(0), full_matrices=False)
    V = vt[:rank].T
    expected = np.linalg.norm(V @ V.T - (U @ U.T).numpy())
    assert subspace_alignment(points, U).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_alignment_of_equal_and_orthogonal_spans(rank: int) -> None:
    Q = orthonormal(8, 8)
    U, W = Q[:, :rank], Q[:, rank : 2 * rank]
    coordinates = gaussian(50, rank)
    offset = Q[:, -1] * 3  # centring takes it out
    assert subspace_alignment(coordinates @ U.T + offset, U).item() == pytest.approx(0, abs=1e-10)
    assert subspace_alignment(coordinates @ W.T + offset, U).item() == pytest.approx(math.sqrt(2 * rank), abs=1e-10)


@pytest.mark.parametrize("theta", [0.1, 0.7, 1.3])
def test_alignment_of_a_line_at_an_angle(theta: float) -> None:
    U = orthonormal(4, 2)
    line = math.cos(theta) * U[:, 0] + math.sin(theta) * U[:, 1]
    found = subspace_alignment(gaussian(30, 1) * line, U[:, :1])
    assert found.item() == pytest.approx(math.sqrt(2) * math.sin(theta), abs=1e-10)


def test_explained_variance() -> None:
    Q = orthonormal(4, 4)
    coordinates = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]], dtype=torch.float64)
    points = coordinates @ Q[:, :2].T + 5
    assert explained_variance(points, 1).item() == pytest.approx(0.9, abs=1e-12)  # 18 / (18 + 2)
    assert explained_variance(points, 2).item() == pytest.approx(1, abs=1e-12)
    s = np.linalg.svd(gaussian(60, 5).numpy() - gaussian(60, 5).numpy().mean(0), compute_uv=False)
    assert explained_variance(gaussian(60, 5), 2).item() == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.1, 0.7, -1.3e6])
@pytest.mark.parametrize("points", [50, 1000])
def test_a_constant_has_no_subspace(value: float, points: int) -> None:
    constant = torch.full((points, 3), value, dtype=torch.float64)
    constant[:, 1] *= 0.7
    assert subspace_alignment(constant, orthonormal(3, 2)).isnan()
    assert explained_variance(constant, 2).isnan()


def test_a_small_variation_of_a_large_constant_has_a_subspace() -> None:
    U = orthonormal(3, 1)
    points = 1.0 + 1e-6 * gaussian(100, 1) @ U.T
    assert subspace_alignment(points, U).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(points, 1).item() == pytest.approx(1, abs=1e-6)


def test_off_subspace_ratio() -> None:
    P = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    f = torch.tensor([[2.0, 0.0], [0.0, -3.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert values(off_subspace_ratio(f, P))[:3] == pytest.approx([0, 1, 0.8], abs=1e-15)
    assert off_subspace_ratio(f, P)[3].isnan()
    assert values(off_subspace_ratio(5 * f, P))[:3] == pytest.approx([0, 1, 0.8], abs=1e-15)


def test_off_subspace_ratio_is_the_sine_of_the_angle_to_the_subspace() -> None:
    U, f = orthonormal(6, 3), gaussian(4, 9, 6)
    cosine = (f @ U).norm(dim=-1) / f.norm(dim=-1)
    torch.testing.assert_close(off_subspace_ratio(f, U @ U.T), (1 - cosine**2).sqrt(), rtol=0, atol=1e-12)


# piecewise targets


def test_interval_matrix_vanishes_on_the_diagonal_of_the_truth_alone() -> None:
    target, c = Piecewise(), grid(1000)
    matrix = interval_matrix(as_prediction(target(c)), c, target)[0]
    off_diagonal = matrix[~torch.eye(10, dtype=torch.bool)]
    assert matrix.shape == (10, 10)
    assert matrix.diagonal().max() < 1e-12
    assert off_diagonal.min() > 0.1


def test_interval_matrix_rows_are_intervals_and_columns_projectors() -> None:
    target, c = Piecewise(intervals=4, boundary_width=0.1), grid(400)
    f = target.sums(c) @ target.projectors[2]  # in the third subspace everywhere
    matrix = interval_matrix(as_prediction(f), c, target)[0]
    assert matrix[:, 2].max() < 1e-12
    assert matrix[:, [0, 1, 3]].min() > 0.1
    inside = (c.squeeze(1) >= 0.25) & (c.squeeze(1) < 0.5)
    expected = off_subspace_ratio(f[inside], target.projectors[3]).mean().item()
    assert matrix[1, 3].item() == pytest.approx(expected, abs=1e-12)


def test_interval_matrix_averages_draws_and_keeps_replicas() -> None:
    target, c = Piecewise(intervals=2, boundary_width=0.1), grid(40)
    f = gaussian(3, 2, 40, 8)
    whole = interval_matrix(f, c, target)
    parts = torch.stack([torch.cat([interval_matrix(f[r : r + 1, k : k + 1], c, target) for k in range(2)]).mean(0)
                         for r in range(3)])  # fmt: skip
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)


def test_linear_interpolation_stays_within_the_spans_at_boundaries() -> None:
    """A fact about the published target: boundary points mix two neighbouring subspaces, and nothing else."""
    target, c = Piecewise(frequency_rule="published"), grid(1000)
    rows = baseline_predictions(grid(50), target(grid(50)), c, 0.0)
    scalars, arrays = compute_metrics(rows["linear"], target(c), c, target)
    assert arrays["boundary_profile"].shape == (1, 9)
    assert arrays["boundary_profile"].max() < 1e-12
    assert scalars["boundary"].item() < 1e-12
    assert scalars["off_subspace"].item() > 0.01
    # negative control: a neighbour's boundary, and a curve that knows no subspace
    shifted = boundary_profile(rows["linear"].roll(100, dims=2), c, target)
    assert shifted.min() > 0.01
    assert compute_metrics(target.sums(c)[None, None], target(c), c, target)[0]["boundary"].item() > 0.1


def test_boundary_profile_looks_no_farther_than_its_width() -> None:
    target, c = Piecewise(intervals=4, boundary_width=0.05), grid(1001)
    bad = target.sums(c)
    distance = (c - torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).abs().min(1, keepdim=True).values
    f = torch.where(distance <= 0.05 + 1e-9, target(c), bad)
    assert boundary_profile(as_prediction(f), c, target).max() < 1e-12
    f = torch.where(distance <= 0.045, target(c), bad)
    assert boundary_profile(as_prediction(f), c, target).min() > 0.01


# rotations


def rotated(f: Tensor, theta: float) -> Tensor:
    R = torch.tensor([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]], dtype=torch.float64)
    return (f.unflatten(-1, (-1, 2)) @ R.T).flatten(-2)


@pytest.mark.parametrize("size", [2, 3])
def test_rotation_profile_of_the_truth(size: int) -> None:
    target, c = Rotation(size=size), grid(200)
    cosine, across = rotation_profile(as_prediction(target(c)), c, target)
    torch.testing.assert_close(cosine, torch.ones(1, 8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(across, torch.zeros(1, 8, dtype=torch.float64), rtol=0, atol=1e-12)
    flipped, _ = rotation_profile(as_prediction(-3 * target(c)), c, target)  # sign and length do not count
    torch.testing.assert_close(flipped, cosine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("theta", [0.2, 1.0, math.pi / 2, 2.5])
def test_rotation_profile_of_a_rotated_truth(theta: float) -> None:
    target, c = Rotation(), grid(200)
    cosine, across = rotation_profile(as_prediction(rotated(target(c), theta)), c, target)
    torch.testing.assert_close(cosine, torch.full_like(cosine, abs(math.cos(theta))), rtol=0, atol=1e-12)
    torch.testing.assert_close(across, torch.full_like(across, abs(math.sin(theta))), rtol=0, atol=1e-12)


def test_rotation_scores() -> None:
    target, c = Rotation(components=4), grid(100)
    f = target(c).clone()
    f[:, 2:4] = rotated(f[:, 2:4], 0.3)
    f[:, 6:8] = rotated(f[:, 6:8], 0.9)
    scalars, arrays = compute_metrics(as_prediction(f), target(c), c, target)
    cosines, sines = [1, math.cos(0.3), 1, math.cos(0.9)], [0, math.sin(0.3), 0, math.sin(0.9)]
    assert values(arrays["rotation_cosine"]) == pytest.approx(cosines, abs=1e-12)
    assert values(arrays["rotation_perpendicular"]) == pytest.approx(sines, abs=1e-12)
    assert scalars["cosine"].item() == pytest.approx(sum(cosines) / 4)
    assert scalars["cosine_min"].item() == pytest.approx(math.cos(0.9))
    assert scalars["perpendicular"].item() == pytest.approx(sum(sines) / 4)
    assert scalars["perpendicular_max"].item() == pytest.approx(math.sin(0.9))


# all together


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (Trigonometric(), set()),
        (Projected(), {"subspace_alignment", "explained_variance", "off_subspace"}),
        (Piecewise(), {"off_subspace", "boundary"}),
        (Rotation(), {"cosine", "cosine_min", "perpendicular", "perpendicular_max"}),
    ],
    ids=["trigonometric", "projected", "piecewise", "rotation"],
)
def test_score_of_truth_and_of_zero(target: Target, names: set[str]) -> None:
    c = grid(1000)
    truth = target(c)
    best = {"subspace_alignment": 0, "explained_variance": 1, "off_subspace": 0, "boundary": 0, "cosine": 1,
            "cosine_min": 1, "perpendicular": 0, "perpendicular_max": 0, "l1": 0, "l2": 0}  # fmt: skip
    scalars, _ = compute_metrics(truth.expand(3, 2, -1, -1), truth, c, target)
    assert {k for k in scalars if "_dim" not in k} == names | {"l1", "l2"}
    for name, v in scalars.items():
        assert v.shape == (3,)
        assert values(v) == pytest.approx([best[name.split("_dim")[0]]] * 3, abs=1e-7)
    zero, _ = compute_metrics(torch.zeros(1, 1, 1000, target.dim), truth, c, target)
    assert zero["l2"].item() == pytest.approx(truth.square().mean().sqrt().item(), abs=1e-12)
    assert all(zero[name].isnan() for name in names)


def test_score_of_projected_by_its_parts() -> None:
    target, c = Projected(), grid(100)
    f = gaussian(2, 3, 100, 8) + target(c)
    scalars, _ = compute_metrics(f, target(c), c, target)
    for r in range(2):
        alignment = np.mean([subspace_alignment(f[r, k], target.basis).item() for k in range(3)])
        explained = np.mean([explained_variance(f[r, k], 2).item() for k in range(3)])
        assert scalars["subspace_alignment"][r].item() == pytest.approx(alignment, abs=1e-10)
        assert scalars["explained_variance"][r].item() == pytest.approx(explained, abs=1e-10)
        assert scalars["off_subspace"][r].item() == pytest.approx(
            off_subspace_ratio(f[r], target.projector).mean().item()
        )
