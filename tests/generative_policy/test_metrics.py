"""Measures of samples, checked against closed forms, scipy's distances and scaling; wrong versions must fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.special import digamma
from torch import Tensor

from lightning_toys.generative_policy.metrics import (
    compute_metrics,
    energy_distance,
    knn_entropy,
    mean_pairwise_distance,
    mode_metrics,
    sliced_w2,
)
from lightning_toys.generative_policy.mixture import Checkerboard, Mixture, ThreeModes, TwoMoons, rice_mean
from lightning_toys.generative_policy.samplers import Pool
from lightning_toys.generative_policy.target import Target
from lightning_toys.training.noise import keyed_generator


def normals(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/metrics/{name}").standard_normal(shape))


def drawn(target: Mixture | Checkerboard, n: int, seed: int = 0) -> Tensor:
    generator = keyed_generator(seed, 0, "test/metrics/target")
    return target.sample(torch.from_numpy(generator.random(n)), torch.from_numpy(generator.standard_normal((n, 2))))


# modes


def test_modes_counted_by_hand() -> None:
    """Five samples at chosen distances, in standard deviations of .02, from modes with weights 7/18, 6/18, 5/18."""
    target = ThreeModes(0.02)
    away = [(0, 2.9), (0, 3.1), (1, 5.1), (2, 10.1), (2, 0.0)]
    x = torch.stack([target.means[i] + torch.tensor([0.6, 0.8]).double() * 0.02 * d for i, d in away])
    found = mode_metrics(x, target)
    assert [found[f"weight_mode{i}"] for i in range(3)] == pytest.approx([0.4, 0.2, 0.4])
    assert found["tv"] == pytest.approx((abs(0.4 - 7 / 18) + abs(0.2 - 6 / 18) + abs(0.4 - 5 / 18)) / 2)
    assert [found[f"off{k}"] for k in (3, 5, 10)] == pytest.approx([0.6, 0.4, 0.2])
    # mode 0: both samples, at 2.9 and 3.1 along one direction; mode 2: the one at 10.1 is too far to count
    assert found["bias_mode0"] == pytest.approx(3.0)
    assert found["std_mode0"] == pytest.approx(math.sqrt((0.2 * 0.6) ** 2 / 4 + (0.2 * 0.8) ** 2 / 4))
    assert "std_mode1" not in found  # one sample has no width
    assert "std_mode2" not in found


def test_modes_of_the_targets_own_samples() -> None:
    target, n = ThreeModes(0.02), 40_000
    found = mode_metrics(drawn(target, n), target)
    assert found["tv"] < 4 * math.sqrt(0.5 / n)
    for k in (3, 5):
        p = math.exp(-(k**2) / 2)
        assert abs(found[f"off{k}"] - p) < 5 * math.sqrt(p / n) + 1e-9
    for i in range(3):
        assert found[f"bias_mode{i}"] < 5 / math.sqrt(n / 4)
        assert found[f"std_mode{i}"] == pytest.approx(1, abs=0.03)


def test_a_mode_of_many_components_has_no_width_of_its_own() -> None:
    target = TwoMoons()
    found = mode_metrics(drawn(target, 500), target)
    assert {"weight_mode0", "weight_mode1"} <= found.keys()
    assert "weight_mode2" not in found
    assert not any(k.startswith(("bias", "std")) for k in found)


# energy distance


@pytest.mark.parametrize("n", [7, 1500])  # 1500: more than one chunk of the distance matrix
def test_mean_pair_distance_is_scipys(n: int) -> None:
    x = normals("pairs", n, 2)
    assert mean_pairwise_distance(x) == pytest.approx(pdist(x.numpy()).mean(), rel=1e-12)


def test_energy_distance_between_gaussians() -> None:
    """Two isotropic Gaussians: 2 E|X - Y| - E|X - X'| - E|Y - Y'|, each the mean of a Rice distribution; unbiased."""
    s, t, d = 0.3, 0.2, 0.4
    target = Mixture([[d, 0.0]], t)
    wanted = float(2 * rice_mean(d, math.hypot(s, t)) - rice_mean(0, s * math.sqrt(2)) - rice_mean(0, t * math.sqrt(2)))
    values = np.array([energy_distance(s * normals(f"energy{i}", 20, 2), target, torch.empty(0)) for i in range(800)])
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - wanted) < 4 * error
    assert abs(values.mean() - wanted / 2) > 10 * error
    # with the zeros of a sample's distance from itself counted, the mean would be off by E|X - X'| / n
    assert float(rice_mean(0, s * math.sqrt(2))) / 20 > 4 * error


def test_energy_distance_of_a_target_without_closed_form() -> None:
    board = Checkerboard()
    x, y = 0.5 * normals("board", 40, 2), drawn(board, 30)
    wanted = 2 * cdist(x.numpy(), y.numpy()).mean() - pdist(x.numpy()).mean() - pdist(y.numpy()).mean()
    assert energy_distance(x, board, y) == pytest.approx(wanted, abs=1e-8)


def test_energy_distance_of_the_target_from_itself_is_nothing() -> None:
    target = ThreeModes(0.02)
    values = np.array([energy_distance(drawn(target, 300, s), target, torch.empty(0)) for s in range(60)])
    assert abs(values.mean()) < 4 * values.std(ddof=1) / math.sqrt(60)
    assert (values < 0).any()  # no bias: some lie below


def test_energy_distance_of_particles_drawn_with_replacement() -> None:
    """E|Y - Y'| of a pool of 40 is 1.13 s without pairs of one particle; their zeros would take a fortieth off."""

    class Density(Target):
        normalised = False

        def log_prob(self, x: Tensor) -> Tensor:
            return -0.5 * x.square().sum(-1)

    found = []
    for i in range(40):
        g = keyed_generator(i, 0, "test/pooled")
        pool = Pool(g.standard_normal((40, 1)))
        found.append([torch.from_numpy(pool.at(g.random(400))) for _ in range(2)])
    values = np.array([mean_pairwise_distance(y, pooled=True) for y, _ in found])
    wanted, error = 2 / math.sqrt(math.pi), values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - wanted) < 3 * error
    for y, x in found:  # with the zeros it is lower by a fortieth
        kept, zeros = (mean_pairwise_distance(y, pooled=v) for v in (True, False))
        assert zeros / kept == pytest.approx(1 - 1 / 40, abs=0.004)
        both = energy_distance(x, Density(), y, pooled=True)
        once = energy_distance(x, Density(), y)
        assert once - both == pytest.approx(mean_pairwise_distance(x, pooled=True) - mean_pairwise_distance(x))
    assert mean_pairwise_distance(torch.zeros(5, 2).double(), pooled=True) == 0
    # a policy that collapsed has equal samples, which are its own
    assert mean_pairwise_distance(torch.zeros(5, 2).double()) == 0


# sliced Wasserstein distance


def test_sliced_w2_of_a_shift_and_of_a_scale() -> None:
    """A shift d moves every projection by d cos: |d| / sqrt 2. A scale a: |a - 1| times the rms projection."""
    x = normals("sliced", 300, 2)
    d = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert sliced_w2(x + d, x) == pytest.approx(0.5 / math.sqrt(2), rel=1e-12)
    assert sliced_w2(1.5 * x, x) == pytest.approx(0.5 * math.sqrt(float(x.square().sum(1).mean()) / 2), rel=1e-12)
    # order does not matter, and a pairing by row would see a difference
    mixed = x[torch.from_numpy(keyed_generator(0, 0, "test/metrics/order").permutation(300))]
    assert sliced_w2(mixed, x) < 1e-12
    assert (mixed - x).square().mean() > 0.1


def test_sliced_w2_is_symmetric() -> None:
    x, y = normals("one", 50, 2), 0.2 * normals("two", 50, 2)
    assert sliced_w2(x, y) == pytest.approx(sliced_w2(y, x), rel=1e-12)


# entropy


@pytest.mark.parametrize("k", [1, 5])
def test_knn_entropy_is_kozachenko_and_leonenkos(k: int) -> None:
    """psi(n) - psi(k) + log(pi) + (2 / n) sum log r_k, with r_k from scipy's distances."""
    x = normals("knn", 200, 2).numpy()
    r = np.sort(cdist(x, x), axis=1)[:, k]  # column 0 is the point itself
    wanted = digamma(200) - digamma(k) + math.log(math.pi) + 2 * np.log(r).mean()
    assert knn_entropy(x, k) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("k", [1, 5])
def test_knn_entropy_of_a_gaussian(k: int) -> None:
    values = np.array([knn_entropy(0.02 * normals(f"gaussian{k}{i}", 4000, 2).numpy(), k) for i in range(20)])
    wanted = 1 + math.log(2 * math.pi) + 2 * math.log(0.02)
    assert values.mean() == pytest.approx(wanted, abs=0.02)


def test_knn_entropy_of_equal_samples_is_far_below_any_density() -> None:
    value = knn_entropy(np.zeros((50, 2)), 5)
    assert math.isfinite(value)
    assert value < -1000


# all of them


def test_score_uses_the_pairs_and_neighbours_that_it_is_given() -> None:
    target = ThreeModes(0.02)
    x, y = drawn(target, 400, 1), drawn(target, 400, 2)
    found = compute_metrics(x, target, y, 100, 3)
    assert found["energy_distance"] == energy_distance(x[:100], target, y[:100])
    assert found["sliced_w2"] == sliced_w2(x, y)
    assert found["entropy_knn"] == knn_entropy(x.numpy(), 3)
    assert found["tv"] == mode_metrics(x, target)["tv"]
