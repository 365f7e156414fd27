import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression.data import InterpolationData
from lightning_toys.flow_vs_regression.targets import (
    DEFAULT_MAX_FREQUENCY,
    Piecewise,
    Projected,
    Rotation,
    Target,
    Trigonometric,
    primes,
    random_projector,
)
from lightning_toys.training.noise import keyed_generator


def grid(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64).unsqueeze(1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_primes() -> None:
    assert primes(10) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    sieve = [n for n in range(2, 1000) if all(n % d for d in range(2, n))]
    assert primes(len(sieve)) == sieve
    assert primes(0) == []


# trigonometric sums


def test_default_formula() -> None:
    c = grid(1001)
    expected = (2 * c + 0.3).sin() + (5 * c + 0.7).cos() + (11 * c + 1.3).sin()
    close(Trigonometric()(c), expected, 1e-14)
    assert Trigonometric()(c).dtype == torch.float64


def test_default_rms_on_a_dense_grid() -> None:
    rms = Trigonometric()(grid(100_000)).square().mean().sqrt().item()
    assert rms == pytest.approx(0.9260, abs=5e-5)


def test_default_is_exact_for_single_precision_input() -> None:
    c = grid(101).float()
    close(Trigonometric()(c), Trigonometric()(c.double()), 0)


def test_frequencies_and_phases_run_through_the_primes_row_by_row() -> None:
    target = Trigonometric(dim=2, components=2, frequency_rule="published")
    # m = dK + j, omega = p_2m, phi = p_(2m+1) / 10
    assert target.omega.tolist() == [[2, 5], [11, 17]]
    close(target.phi, torch.tensor([[0.3, 0.7], [1.3, 1.9]], dtype=torch.float64), 1e-15)
    c = grid(11)
    expected = torch.cat(
        [(2 * c + 0.3).sin() + (5 * c + 0.7).cos(), (11 * c + 1.3).sin() + (17 * c + 1.9).cos()], dim=1
    )
    close(target(c), expected, 1e-14)


def test_published_rule_reaches_709() -> None:
    target = Trigonometric(dim=8, components=8, frequency_rule="published")
    assert target.highest_frequency == 709
    assert target.omega.flatten().tolist() == primes(128)[::2]


def test_nyquist_rule_scales_all_frequencies_by_one_number() -> None:
    bounded = Trigonometric(dim=8, components=8)
    published = Trigonometric(dim=8, components=8, frequency_rule="published")
    assert bounded.highest_frequency == pytest.approx(DEFAULT_MAX_FREQUENCY, rel=1e-15)
    close(bounded.omega / published.omega, torch.full((8, 8), DEFAULT_MAX_FREQUENCY / 709, dtype=torch.float64), 1e-15)
    assert torch.equal(bounded.phi, published.phi)
    assert Trigonometric(dim=8, components=8, max_frequency=20.0).highest_frequency == pytest.approx(20, rel=1e-15)


def test_nyquist_rule_leaves_low_frequencies_alone() -> None:
    assert torch.equal(Trigonometric().omega, Trigonometric(frequency_rule="published").omega)
    assert torch.equal(Trigonometric(max_frequency=11.0).omega, Trigonometric().omega)
    assert pytest.approx(49 * math.pi / 2, abs=0.05) == DEFAULT_MAX_FREQUENCY


def test_a_target_of_ones_own_needs_no_frequency(capsys: pytest.CaptureFixture[str]) -> None:
    class Square(Target):
        dim = 1

        def __call__(self, c: Tensor) -> Tensor:
            return c.double().square()

    InterpolationData(Square(), num_train=2).setup("fit")
    assert capsys.readouterr().err == ""
    InterpolationData(Trigonometric(), num_train=2).setup("fit")
    assert "the target has frequencies up to 11.0, and 2 points" in capsys.readouterr().err


def test_inverse_frequency_weights() -> None:
    target = Trigonometric(weights="inverse_freq")
    c = grid(101)
    close(target(c), (2 * c + 0.3).sin() / 2 + (5 * c + 0.7).cos() / 5 + (11 * c + 1.3).sin() / 11, 1e-14)


def test_inverse_weights_belong_to_the_scaled_frequencies() -> None:
    target = Trigonometric(dim=8, components=8, weights="inverse_freq")
    close(target.w * target.omega, torch.ones(8, 8, dtype=torch.float64), 1e-15)


@pytest.mark.parametrize("flag", ["frequency_seed", "phase_seed", "weight_seed"])
def test_each_seed_draws_its_own_part_only(flag: str) -> None:
    part = {"frequency_seed": "omega", "phase_seed": "phi", "weight_seed": "w"}[flag]
    base = Trigonometric(dim=2, components=4)
    drawn = [Trigonometric(dim=2, components=4, **{flag: seed}) for seed in (0, 1)]  # type: ignore[arg-type]
    again = Trigonometric(dim=2, components=4, **{flag: 0})  # type: ignore[arg-type]
    for name in ("omega", "phi", "w"):
        values = [getattr(t, name) for t in (base, *drawn)]
        assert torch.equal(getattr(again, name), values[1])
        if name == part:
            assert not torch.equal(values[0], values[1])
            assert not torch.equal(values[1], values[2])
        else:
            assert torch.equal(values[0], values[1])


def test_drawn_frequencies_are_distinct_primes() -> None:
    drawn = Trigonometric(dim=2, components=8, frequency_rule="published", frequency_seed=3).omega.flatten().tolist()
    assert len(set(drawn)) == 16
    assert set(drawn) <= set(primes(32))
    assert drawn != sorted(drawn)


def test_drawn_phases_and_weights_fill_their_ranges() -> None:
    target = Trigonometric(dim=20, components=50, phase_seed=0, weight_seed=0)
    phi, w = target.phi.flatten(), target.w.flatten()
    n = phi.numel()
    assert phi.min() >= 0
    assert phi.max() < 2 * math.pi
    assert abs(phi.mean().item() - math.pi) < 5 * 2 * math.pi / math.sqrt(12 * n)
    assert w.abs().max() < 1
    assert abs(w.mean().item()) < 5 * 2 / math.sqrt(12 * n)
    assert abs(w.square().mean().item() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


def test_weight_seed_multiplies_the_inverse_frequencies() -> None:
    both = Trigonometric(weights="inverse_freq", weight_seed=5)
    drawn = Trigonometric(weight_seed=5)
    close(both.w, drawn.w / drawn.omega, 1e-15)


# projectors


@pytest.mark.parametrize(("dim", "rank", "seed"), [(8, 2, 0), (8, 3, 7), (5, 5, 1), (3, 1, 2)])
def test_projector(dim: int, rank: int, seed: int) -> None:
    P, basis = random_projector(dim, rank, seed)
    close(P @ P, P)
    close(P, P.T)
    assert P.trace().item() == pytest.approx(rank, abs=1e-12)
    close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    A = keyed_generator(seed, 0, "target/projector").standard_normal((dim, rank))
    close(P, torch.from_numpy(A @ np.linalg.inv(A.T @ A) @ A.T), 1e-11)


def test_projected_is_the_projection_of_the_same_sums() -> None:
    target, c = Projected(rank=2, projection_seed=4), grid(101)
    close(target(c), Trigonometric(dim=8, components=3)(c) @ target.projector.T)
    assert torch.linalg.matrix_rank(target(c)) == 2
    close(target(c) @ target.projector, target(c))
    assert not torch.allclose(Projected(projection_seed=5)(c), target(c))


# piecewise projections


def test_piecewise_projects_on_its_interval() -> None:
    target = Piecewise(intervals=10, rank=3, projection_seed=2)
    sums = Trigonometric(dim=8, components=8)
    for i in range(10):
        c = torch.tensor([[i / 10 + 0.05]], dtype=torch.float64)
        P, _ = random_projector(8, 3, 2 + i)
        close(target(c), sums(c) @ P.T)
        close(target.projectors[i], P, 0)


@pytest.mark.parametrize("intervals", [2, 3, 7, 10])
def test_piecewise_edges(intervals: int) -> None:
    target = Piecewise(intervals=intervals, boundary_width=0.01)
    for i in range(intervals):
        edge = i / intervals
        around = torch.tensor([[edge - 1e-9], [edge], [edge + 1e-9]], dtype=torch.float64)
        assert target.interval(around).tolist() == [max(i - 1, 0), i, i]
    last = torch.tensor([[1 - 1e-9], [1.0]], dtype=torch.float64)
    assert target.interval(last).tolist() == [intervals - 1, intervals - 1]


def test_piecewise_at_one_uses_the_last_projector() -> None:
    target, c = Piecewise(), torch.ones(1, 1, dtype=torch.float64)
    close(target(c), target.sums(c) @ target.projectors[-1])


def test_piecewise_jumps_at_an_edge() -> None:
    target = Piecewise()
    left, right = target(torch.tensor([[0.3 - 1e-9], [0.3]], dtype=torch.float64))
    assert (left - right).norm() > 0.1


def test_boundary_projectors_span_both_sides() -> None:
    target = Piecewise(intervals=4, rank=3, projection_seed=1, boundary_width=0.1)
    spans = target.boundary_projectors()
    assert spans.shape == (3, 8, 8)
    for i, Q in enumerate(spans):
        close(Q @ Q, Q)
        assert Q.trace().item() == pytest.approx(6, abs=1e-10)
        close(Q @ target.bases[i], target.bases[i])
        close(Q @ target.bases[i + 1], target.bases[i + 1])


def test_boundary_projectors_of_large_ranks_span_everything() -> None:
    spans = Piecewise(intervals=3, dim=4, components=2, rank=3, boundary_width=0.1).boundary_projectors()
    close(spans, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), 1e-10)


def test_boundary_projectors_of_subspaces_that_meet() -> None:
    target = Piecewise(intervals=2, rank=3, boundary_width=0.1)
    shared, (Q0, Q1) = target.bases[0][:, :1], target.bases
    target.bases = [Q0, torch.linalg.qr(torch.cat([shared, Q1[:, :2]], dim=1)).Q]
    (span,) = target.boundary_projectors()
    assert span.trace().item() == pytest.approx(5, abs=1e-10)
    close(span @ span, span)
    target.bases = [Q0, Q0]
    close(target.boundary_projectors()[0], Q0 @ Q0.T)


# rotations


@pytest.mark.parametrize("size", [2, 3])
def test_rotation_is_a_sum_of_scaled_unit_vectors(size: int) -> None:
    target, c = Rotation(size=size, seed=3), grid(51)
    v = target.directions(c)
    assert v.shape == (51, 8, size)
    close(v.norm(dim=-1), torch.ones(51, 8, dtype=torch.float64))
    assert target.dim == 8 * size
    close(target(c).view(51, 8, size), target.constant_amplitudes[:, None] * v)
    first = torch.zeros(size, dtype=torch.float64)
    first[0] = 1
    close(v[0], first.expand(8, -1))  # c = 0
    close(v[:, 0], first.expand(51, -1))  # alpha_0 = 0


def test_rotation_of_the_plane_is_cos_and_sin() -> None:
    target, c = Rotation(size=2), grid(51)
    alpha = torch.tensor([6.28 * k / 7 for k in range(8)], dtype=torch.float64)
    close(target.directions(c), torch.stack([(alpha * c).cos(), (alpha * c).sin()], dim=-1))


def test_rotation_in_space_is_rodrigues_formula() -> None:
    target, c = Rotation(size=3, seed=1), grid(21)
    axis = keyed_generator(1, 0, "target/axis").standard_normal(3)
    k = torch.from_numpy(axis / np.linalg.norm(axis))
    e = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    angle = (target.alpha * c).unsqueeze(-1)
    expected = e * angle.cos() + torch.linalg.cross(k, e) * angle.sin() + k * (k @ e) * (1 - angle.cos())
    close(target.directions(c), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_rotation_generator_gives_orthogonal_matrices(size: int) -> None:
    A = Rotation(size=size, seed=5).generator
    close(A, -A.T, 0)
    Q = torch.linalg.matrix_exp(1.7 * A)
    close(Q @ Q.T, torch.eye(size, dtype=torch.float64))
    assert torch.linalg.det(Q).item() == pytest.approx(1, abs=1e-12)


def test_rotation_amplitudes() -> None:
    assert Rotation(seed=0).constant_amplitudes.abs().max() < 1
    assert not torch.equal(Rotation(seed=0).constant_amplitudes, Rotation(seed=1).constant_amplitudes)
    target, c = Rotation(amplitude="trigonometric", terms=2), grid(51)
    w = Trigonometric(dim=8, components=2)(c)
    close(target(c).view(51, 8, 2), w.unsqueeze(-1) * target.directions(c))
    assert target.highest_frequency == pytest.approx(6.28 + Trigonometric(dim=8, components=2).highest_frequency)
    assert Rotation().highest_frequency == pytest.approx(6.28)


# errors


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: Trigonometric(dim=0), "dim"),
        (lambda: Trigonometric(components=0), "components"),
        (lambda: Trigonometric(max_frequency=0.0), "max_frequency"),
        (lambda: Trigonometric(frequency_seed=-1), "frequency_seed"),
        (lambda: Trigonometric(phase_seed=-1), "phase_seed"),
        (lambda: Trigonometric(weight_seed=-1), "weight_seed"),
        (lambda: Projected(rank=0), "rank"),
        (lambda: Projected(rank=9), "rank"),
        (lambda: Projected(projection_seed=-1), "projection_seed"),
        (lambda: Piecewise(rank=9), "rank"),
        (lambda: Piecewise(intervals=1), "intervals"),
        (lambda: Piecewise(boundary_width=0.0), "boundary_width"),
        (lambda: Piecewise(boundary_width=0.051), "boundary_width"),
        (lambda: Piecewise(projection_seed=-1), "projection_seed"),
        (lambda: Rotation(size=4), "size"),
        (lambda: Rotation(components=0), "components"),
        (lambda: Rotation(amplitude="trigonometric", terms=0), "terms"),
        (lambda: Rotation(seed=-1), "seed"),
    ],
)
def test_bad_values_name_the_flag(make: Callable[[], Target], flag: str) -> None:
    with pytest.raises(ToyError, match=rf"--data\.target\.{flag}\b") as error:
        make()
    assert "\n" not in str(error.value)
