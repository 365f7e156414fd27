import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy.couplings import Independent, OptimalTransport
from lightning_toys.generative_policy.mixture import (
    Checkerboard,
    EightGaussians,
    Mixture,
    Target,
    ThreeModes,
    TwoMoons,
    rice_mean,
)
from lightning_toys.generative_policy.quadrature import normal_rule
from lightning_toys.training.noise import keyed_generator

N = 40_000


def blurred() -> Mixture:
    """Three overlapping components of different weights and widths, two of them one mode."""
    return Mixture([[0.0, 0.3], [0.2, -0.1], [-0.4, 0.0]], [0.2, 0.1, 0.3], [1, 2, 3], modes=[1, 0, 1])


MIXTURES: dict[str, Mixture] = {
    "blurred": blurred(),
    "one": Mixture([[0.3, -0.2]], 0.4),
    "three": ThreeModes(0.15),
    "eight": EightGaussians(std=0.1),
}
TARGETS: dict[str, Target] = {**MIXTURES, "moons": TwoMoons(), "board": Checkerboard()}


@cache
def entropy_of(name: str) -> float:
    return TARGETS[name].entropy()


def f64(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(name: str, n: int = N) -> tuple[Tensor, Tensor]:
    g = keyed_generator(0, 0, f"test/mixture/{name}")
    return torch.from_numpy(g.random(n)), torch.from_numpy(g.standard_normal((n, 2)))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def integral(target: Target, edge: float, n: int) -> tuple[float, float]:
    """The integrals of p and -p log p over [-edge, edge]^2, by midpoints."""
    line = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 * edge - edge
    log_p = torch.cat([target.log_prob(torch.cartesian_prod(part, line)) for part in line.split(50)])
    area, p = (2 * edge / n) ** 2, log_p.exp()
    return area * p.sum().item(), -area * torch.where(p > 0, p * log_p, 0.0).sum().item()


# densities


@pytest.mark.parametrize("name", MIXTURES)
def test_log_prob_is_scipys(name: str) -> None:
    m, x = MIXTURES[name], 0.6 * noise("points", 200)[1]
    parts = zip(m.weights.numpy(), m.means.numpy(), m.stds.numpy(), strict=True)
    density = sum(w * stats.multivariate_normal.pdf(x.numpy(), mu, s**2) for w, mu, s in parts)
    torch.testing.assert_close(m.log_prob(x).exp(), torch.from_numpy(density), rtol=1e-10, atol=1e-300)
    assert m.log_prob(x.view(2, 100, 2)).shape == (2, 100)


def test_log_prob_keeps_its_digits_far_out() -> None:
    """One narrow component: -log(2 pi s^2) - d^2 / (2 s^2), hundreds of standard deviations away."""
    x = torch.tensor([[0.9, -0.8]])
    square = ((x.double() - f64([0.3, 0.1])) ** 2).sum().item()
    found = Mixture([[0.3, 0.1]]).log_prob(x)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(-math.log(2 * math.pi * 0.02**2) - square / (2 * 0.02**2), rel=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_density_integrates_to_one_and_entropy_is_its_integral(name: str) -> None:
    target = TARGETS[name]
    # midpoints are exact to all digits once two of them fit into a standard deviation
    edge, n = {"blurred": (2.5, 250), "one": (3.0, 80), "moons": (0.96, 150)}.get(name, (1.7, 240))
    mass, entropy = integral(target, 1.0 if name == "board" else edge, n)
    assert mass == pytest.approx(1, abs=1e-8)
    # the quadrature of overlapping components of unlike widths converges slowest
    assert entropy_of(name) == pytest.approx(
        entropy, abs={"blurred": 2e-3, "three": 2e-5, "eight": 1e-5}.get(name, 1e-7)
    )


@pytest.mark.parametrize("dim", [1, 2, 3, 6])
def test_normal_rule_is_the_normal_distributions(dim: int) -> None:
    """Moments up to the fourth, a cosine, and the kink of |xi|; the Sobol points of six dimensions to .001."""
    xi, w = normal_rule(dim)
    assert xi.shape == (len(w), dim)
    assert w.sum().item() == pytest.approx(1, abs=1e-12)
    exact = 1e-9 if dim < 4 else 2e-3
    for i in range(dim):
        x = xi[:, i]
        for f, wanted in ((x, 0.0), (x**2, 1.0), (x**4, 3.0), (torch.cos(x), math.exp(-0.5))):
            assert (w @ f).item() == pytest.approx(wanted, abs=exact * max(1, wanted**2)), i
        if i:
            assert (w @ (x * xi[:, 0])).item() == pytest.approx(0, abs=exact)
        spacing = {1: 1e-3, 2: 0.06, 3: 0.3}.get(dim, 0.0)
        kink = spacing**2 * 0.8 / 12 * 1.01 + 1e-3 * (dim > 3)
        assert (w @ (x - 0.3).abs()).item() == pytest.approx(
            2 * stats.norm.pdf(0.3) + 0.3 * (2 * stats.norm.cdf(0.3) - 1), abs=2 * kink + 1e-9
        )


@pytest.mark.parametrize("name", ["three", "eight", "stds"])
def test_entropy_of_modes_that_are_apart(name: str) -> None:
    """H(weights) + sum_i w_i (1 + log 2 pi s_i^2)."""
    targets = {
        "three": ThreeModes(),
        "eight": EightGaussians(),
        "stds": Mixture([[0, 0.5], [0.5, 0]], [0.02, 0.03], [1, 3]),
    }
    m = targets[name]
    w, s = m.weights.numpy(), m.stds.numpy()
    closed = float(-(w * np.log(w)).sum() + (w * (1 + np.log(2 * np.pi * s**2))).sum())
    assert m.entropy() == pytest.approx(closed, abs=1e-9)
    if name == "three":
        assert m.entropy() == pytest.approx(-3.897, abs=5e-4)


# samples


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_have_the_components_frequencies_means_and_stds(name: str) -> None:
    m = MIXTURES[name]
    # the same place in every component of a narrow copy tells which one a uniform chose
    narrow = Mixture(m.means.tolist(), 1e-6, m.weights.tolist())
    u, e = noise(name)
    x = m.sample(u, e)
    which = narrow.nearest(narrow.sample(u, e))[0]
    assert which.bincount(minlength=len(m.weights)).min() > 100
    for i, (w, mu, s) in enumerate(zip(m.weights.tolist(), m.means, m.stds.tolist(), strict=True)):
        chosen = x[which == i]
        n = len(chosen)
        assert abs(n / N - w) < 5 * math.sqrt(w * (1 - w) / N) + 1e-12
        assert ((chosen.mean(0) - mu).abs() < 5 * s / math.sqrt(n)).all()
        assert ((chosen.std(0) / s - 1).abs() < 5 / math.sqrt(2 * n)).all()
    assert m.sample(u.float(), e.float()).dtype == torch.float32


@pytest.mark.parametrize("name", TARGETS)
def test_samples_have_the_targets_scale_entropy_and_mode_weights(name: str) -> None:
    target = TARGETS[name]
    n = 10_000
    x = target.sample(*noise(f"scale {name}", n))
    square = (x - x.mean(0)).square().mean(1)
    assert abs(square.mean().item() - target.scale**2) < 5 * square.std().item() / math.sqrt(n)
    surprise = -target.log_prob(x)
    # quadrature, and float32 on the board
    assert abs(surprise.mean().item() - entropy_of(name)) < 5 * surprise.std().item() / math.sqrt(n) + 1e-6
    assert target.mode_weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_uniform_runs_through_the_components_in_order() -> None:
    m = ThreeModes(1e-3)
    u = f64([0.0, 0.38, 0.40, 0.71, 0.73, 1 - 1e-9])  # the edges are 1.4 / 3.6 and 2.6 / 3.6
    which = m.nearest(m.sample(u, torch.zeros(6, 2).double()))[0]
    assert which.tolist() == [0, 0, 1, 1, 2, 2]
    close(m.sample(u, torch.ones(6, 2).double()), m.means[which] + 1e-3)


# the velocity


@pytest.mark.parametrize("sigma_min", [0.0, 0.2])
@pytest.mark.parametrize("name", MIXTURES)
def test_marginal_velocity_is_that_of_the_score(name: str, sigma_min: float) -> None:
    """E[e | z] = -b grad log p_t(z) and z = (1 - t) E[x | z] + b E[e | z], with p_t written anew."""
    m = MIXTURES[name]
    z = (0.8 * noise("places", 60)[1]).requires_grad_()
    for time in (0.05, 0.3, 0.7, 0.95):
        b = time + sigma_min * (1 - time)
        spread = (((1 - time) * m.stds) ** 2 + b**2).sqrt()
        marginal = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(m.weights),
            torch.distributions.Independent(
                torch.distributions.Normal((1 - time) * m.means, spread.unsqueeze(1).expand(-1, 2)), 1
            ),
        )
        (score,) = torch.autograd.grad(marginal.log_prob(z).sum(), z)
        e = -b * score
        x = (z - b * e) / (1 - time)
        t = torch.full((60, 1), time, dtype=torch.float64)
        close(m.marginal_velocity(z, t, sigma_min).detach(), ((1 - sigma_min) * e - x).detach(), 1e-10)


def test_marginal_velocity_at_the_ends() -> None:
    m, z = blurred(), 0.5 * noise("ends", 50)[1]
    one, zero = torch.ones(50, 1).double(), torch.zeros(50, 1).double()
    # pure noise says nothing of x; a clean sample says nothing of e
    close(m.marginal_velocity(z, one), z - m.weights @ m.means)
    close(m.marginal_velocity(z, one, 0.3), 0.7 * z - m.weights @ m.means)
    close(m.marginal_velocity(z, zero), -z)
    # what is below sigma_min is blurred like the data
    inside = Mixture([[0.0, 0.0]], 0.3).marginal_velocity(z, zero, 0.4)
    close(inside, (0.6 * 0.4 - 0.3**2) / (0.3**2 + 0.4**2) * z)


def test_marginal_velocity_broadcasts_times() -> None:
    m, z = blurred(), noise("broadcast", 12)[1].view(3, 4, 2)
    t = f64([0.2, 0.5, 0.8]).view(3, 1, 1)
    found = m.marginal_velocity(z, t)
    assert found.shape == (3, 4, 2)
    for i in range(3):
        close(found[i], m.marginal_velocity(z[i], t[i].expand(4, 1)))


# modes


def test_nearest_counts_in_the_components_own_standard_deviations() -> None:
    m = Mixture([[0.0, 0.0], [1.0, 0.0]], [0.1, 0.4], modes=[1, 0])
    mode, distance = m.nearest(f64([[0.3, 0.0], [0.0, 0.2], [1.0, 0.8], [0.15, 0.0]]))
    # .3 is nearer to the first centre but three of its deviations away, .7 / .4 of the second's
    assert mode.tolist() == [0, 1, 0, 1]
    close(distance, f64([0.7 / 0.4, 2.0, 2.0, 1.5]))


def test_modes_group_components() -> None:
    m = blurred()
    close(m.mode_weights, f64([2.0, 4.0]) / 6)
    assert m.nearest(m.means)[0].tolist() == [1, 0, 1]
    close(ThreeModes().mode_weights, f64([1.4, 1.2, 1.0]) / 3.6)


def test_threshold_shares_are_those_of_modes_that_are_apart() -> None:
    m = ThreeModes()
    _, distance = m.nearest(m.sample(*noise("shares")))
    assert m.tail_fractions == pytest.approx({3: math.exp(-4.5), 5: math.exp(-12.5), 10: math.exp(-50)}, rel=1e-9)
    assert list(EightGaussians().tail_fractions) == list(Mixture([[0.0]]).tail_fractions) == [3, 5, 10]
    assert TwoMoons().tail_fractions == blurred().tail_fractions == {}  # not those of components that overlap
    for k, share in m.tail_fractions.items():
        found = (distance > k).double().mean().item()
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / N) + 1e-12


def test_share_within_a_standard_deviation() -> None:
    """1 - e^-1/2 in the plane; components that overlap have a nearer one: .666 of TwoMoons'."""
    assert ThreeModes().share_within(1) == pytest.approx(1 - math.exp(-0.5))
    assert Mixture([[0.0]]).share_within(1) == pytest.approx(0.6827, abs=1e-4)
    assert TwoMoons().share_within(1) == pytest.approx(0.666, abs=0.008)
    assert Checkerboard().share_within(1) == 1


def test_weights_inside_the_box() -> None:
    """A mode centred on an edge has half of its mass inside, one on a corner a quarter."""
    m = Mixture([[0.0, 1.0], [1.0, -1.0], [0.0, 0.0], [0.2, 0.0]], 0.02, [1, 1, 1, 1], modes=[0, 1, 2, 2])
    close(m.weights_inside(), f64([0.125, 0.0625, 0.5]), 1e-12)
    close(ThreeModes().weights_inside(), ThreeModes().mode_weights, 1e-12)
    wide = Mixture([[0.3]], 1.0)
    assert wide.weights_inside().item() == pytest.approx(stats.norm.cdf(0.7) - stats.norm.cdf(-1.3))
    close(Checkerboard().weights_inside(), Checkerboard().mode_weights)


def test_deconvolved_and_noise_are_the_target() -> None:
    m = blurred()
    narrow = m.deconvolved(0.06)
    close(narrow.stds.square() + 0.06**2, m.stds.square())
    close(narrow.mode_weights, m.mode_weights)
    assert narrow.means.tolist() == m.means.tolist()
    u, z = noise("deconvolved")
    again = narrow.sample(u, z) + 0.06 * noise("deconvolved more")[1]
    own = m.sample(u, z)
    for f in (m.log_prob, lambda x: x[:, 0] ** 2):
        value, wanted = f(again), f(own)
        assert abs(value.mean() - wanted.mean()) < 5 * math.sqrt(2) * value.std() / math.sqrt(N)
    for target, std in ((m, 0.1), (m, 0.5), (Checkerboard(), 0.01)):
        with pytest.raises(ToyError, match="convolved with N"):
            target.deconvolved(std)


# other numbers of dimensions


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_in_other_dimensions(dim: int) -> None:
    """Density, entropy, tails, distances and the velocity, against scipy and closed forms."""
    g = keyed_generator(0, dim, "test/mixture/dims")
    means = 0.5 * g.standard_normal((3, dim))
    m = Mixture(means.tolist(), [0.2, 0.3, 0.25], [1, 2, 3])
    assert m.dim == dim
    x = g.standard_normal((50, dim))
    density = sum(
        w * stats.multivariate_normal.pdf(x, mu, s**2)
        for w, mu, s in zip(m.weights.numpy(), means, m.stds.numpy(), strict=True)
    )
    torch.testing.assert_close(m.log_prob(torch.from_numpy(x)).exp(), torch.from_numpy(density), rtol=1e-9, atol=1e-300)
    u, z = torch.from_numpy(g.random(N)), torch.from_numpy(g.standard_normal((N, dim)))
    y = m.sample(u, z)
    surprise = -m.log_prob(y)
    assert abs(surprise.mean().item() - m.entropy()) < 5 * surprise.std().item() / math.sqrt(N) + 2e-3
    far = Mixture([[0.0] * dim, [0.5] * dim], 0.02)
    assert far.entropy() == pytest.approx(math.log(2) + dim * 0.5 * math.log(2 * math.pi * math.e * 0.02**2), abs=1e-9)
    assert far.tail_fractions[3] == pytest.approx(stats.chi2.sf(9, dim))
    points = x[:3]
    for k, wanted in enumerate(m.mean_distance(points)):
        found = np.linalg.norm(points[k] - y.numpy(), axis=1)
        assert abs(found.mean() - wanted) < 5 * found.std() / math.sqrt(N)
    t = torch.full((50, 1), 0.4, dtype=torch.float64)
    q = torch.from_numpy(x).requires_grad_()
    spread = ((0.6 * m.stds) ** 2 + 0.16).sqrt()
    p_t = Mixture((0.6 * m.means).tolist(), spread.tolist(), m.weights.tolist())
    (score,) = torch.autograd.grad(p_t.log_prob(q).sum(), q)
    e = -0.4 * score
    close(m.marginal_velocity(q, t).detach(), (e - (q - 0.4 * e) / 0.6).detach(), 1e-9)
    if dim > 1:
        pair = m.marginal((0, dim - 1))
        close(pair.means, m.means[:, [0, dim - 1]])
        assert pair.dim == 2


def test_rice_mean_in_other_dimensions() -> None:
    """On a line it is the folded normal's; from the formula of all dimensions, the plane's."""
    offset, std = np.array([0.0, 0.3, 2.0]), np.array([0.5, 0.2, 1.0])
    folded = std * math.sqrt(2 / math.pi) * np.exp(-(offset**2) / (2 * std**2)) + offset * (
        1 - 2 * stats.norm.cdf(-offset / std)
    )
    assert rice_mean(offset, std, 1) == pytest.approx(folded, rel=1e-12)
    for dim in (3, 6):
        assert rice_mean(0.0, 2.0, dim) == pytest.approx(2 * stats.chi.mean(dim), rel=1e-12)
        assert rice_mean(50.0, 0.02, dim) == pytest.approx(50 + (dim - 1) * 0.02**2 / 100, rel=1e-12)


def test_eight_gaussians() -> None:
    m = EightGaussians(0.6, 0.05)
    close(m.means.norm(dim=1), torch.full((8,), 0.6, dtype=torch.float64))
    gaps = (m.means - m.means.roll(1, 0)).norm(dim=1)
    close(gaps, torch.full((8,), 2 * 0.6 * math.sin(math.pi / 8), dtype=torch.float64))
    assert m.scale == pytest.approx(math.sqrt(0.6**2 / 2 + 0.05**2))
    assert len(m.mode_weights) == 8
    x, c = noise("turn", 20)[1], math.sqrt(0.5)
    turned = 0.5 * x @ f64([[c, c], [-c, c]])
    close(m.log_prob(turned), m.log_prob(0.5 * x), 1e-9)


def test_two_moons() -> None:
    m = TwoMoons()
    close(m.mode_weights, f64([0.5, 0.5]))
    close(m.weights @ m.means, torch.zeros(2).double())
    # a half turn maps one onto the other
    x = m.sample(*noise("moons", 500))
    close(m.log_prob(-x), m.log_prob(x), 1e-9)
    mode, _ = m.nearest(x)
    assert torch.equal(m.nearest(-x)[0], 1 - mode)
    # radii of 1/2 around their centres, the upper one's above
    for k, centre, side in ((0, [-0.25, -0.125], 1), (1, [0.25, 0.125], -1)):
        away = m.means[m.modes == k] - f64(centre)
        close(away.norm(dim=1), torch.full((64,), 0.5, dtype=torch.float64))
        assert (side * away[:, 1] > 0).all()
    assert m.means.abs().max() < 0.76


# distances


def test_rice_mean() -> None:
    offset, std = np.array([0.0, 0.01, 0.5, 2.0, 40.0]), np.array([0.3, 0.5, 0.5, 0.1, 0.02])
    wanted = [stats.rice.mean(o / s, scale=s) for o, s in zip(offset[:3], std[:3], strict=True)]
    assert rice_mean(offset, std)[:3] == pytest.approx(wanted, rel=1e-9)
    # far out the mean is offset + std^2 / (2 offset)
    assert rice_mean(offset, std)[3:] == pytest.approx(offset[3:] + std[3:] ** 2 / (2 * offset[3:]), rel=1e-5)
    assert rice_mean(0.0, 1.0) == pytest.approx(math.sqrt(math.pi / 2))


@pytest.mark.parametrize("name", MIXTURES)
def test_mean_distances_by_monte_carlo(name: str) -> None:
    m = MIXTURES[name]
    y, other = (m.sample(*noise(f"{part} {name}")).numpy() for part in ("distance", "other"))
    x = np.array([[0.0, 0.0], [0.3, -0.2], [-0.7, 0.9]])
    for k, wanted in enumerate(m.mean_distance(x)):
        found = np.linalg.norm(x[k] - y, axis=1)
        assert abs(found.mean() - wanted) < 5 * found.std() / math.sqrt(N)
    found = np.linalg.norm(y - other, axis=1)
    assert abs(found.mean() - m.mean_self_distance()) < 5 * found.std() / math.sqrt(N)


# the board


@pytest.mark.parametrize("cells", [2, 4, 8])
def test_checkerboard(cells: int) -> None:
    board = Checkerboard(cells)
    side = 2 / cells
    assert len(board.corners) == cells**2 // 2
    assert board.entropy() == pytest.approx(math.log(2))
    x = board.sample(*noise(f"board {cells}"))
    place = ((x.numpy() + 1) / side).astype(int)
    assert x.abs().max() <= 1
    assert (place.sum(1) % 2 == 0).all()
    log_p = board.log_prob(x)
    close(log_p, torch.full_like(log_p, -math.log(2)), 1e-7)
    assert torch.isneginf(board.log_prob(x + f64([side, 0.0]))).all()
    mode, out = board.nearest(x)
    assert (out == 0).all()
    close(mode.bincount(minlength=cells**2 // 2) / N, board.mode_weights.float(), 5 * math.sqrt(2 / cells**2 / N))
    inner = (x - board.corners[mode]) / side  # uniform on the square
    assert ((inner.mean(0) - 0.5).abs() < 5 * math.sqrt(1 / 12 / N)).all()
    assert ((inner.square().mean(0) - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / N)).all()


def test_checkerboard_distance_outside() -> None:
    mode, out = Checkerboard(2).nearest(f64([[0.1, -0.3], [1.3, 1.4], [-1.2, -0.5]]))
    assert mode.tolist() == [0, 1, 0]
    close(out, f64([0.1, 0.5, 0.2]) / 0.02)


# bad arguments


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"means": []}, "means"),
        ({"means": [[0.0, 1.0], [2.0]]}, "means"),
        ({"stds": [0.1]}, "stds"),
        ({"stds": 0.0}, "stds"),
        ({"stds": [0.1, -0.1]}, "stds"),
        ({"stds": [0.1, 1e39]}, "stds"),  # infinite in single precision
        ({"means": [[0.0, 1.0], [2.0, -1e10]]}, "means"),
        ({"means": [[0.0, 1.0], [float("nan"), 0.0]]}, "means"),
        ({"weights": [1.0]}, "weights"),
        ({"weights": [1.0, 0.0]}, "weights"),
        ({"modes": [0]}, "modes"),
        ({"modes": [0, 2]}, "modes"),
        ({"modes": [-1, 0]}, "modes"),
    ],
)
def test_bad_mixtures_name_the_flag(values: dict[str, list[float]], flag: str) -> None:
    with pytest.raises(ToyError, match=rf"--data\.target\.{flag}: "):
        Mixture(**{"means": [[0.0, 0.0], [1.0, 1.0]], **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("cells", [3, 0, -2, 1])
def test_a_board_with_an_odd_edge_is_refused(cells: int) -> None:
    with pytest.raises(ToyError, match=rf"--data\.target\.cells: {cells} "):
        Checkerboard(cells)


# couplings


def batch(rows: int) -> tuple[np.ndarray, np.ndarray]:
    g = keyed_generator(0, rows, "test/couplings")
    x, e = g.standard_normal((2, rows, 2)).astype(np.float32)
    return 0.5 * x + 0.3, e


def cost(x: np.ndarray, e: np.ndarray) -> float:
    return float(np.square(x.astype(float) - e).sum())


def test_independent_leaves_the_noise_alone() -> None:
    x, e = batch(10)
    assert np.array_equal(Independent().pair(x, e), e)


@pytest.mark.parametrize("size", [2, 4, 64])
def test_optimal_transport_permutes_within_groups_and_costs_no_more(size: int) -> None:
    x, e = batch(8 * size)
    paired = OptimalTransport(size).pair(x, e)
    assert paired.dtype == np.float32
    for k in range(0, 8 * size, size):
        group = slice(k, k + size)
        assert sorted(map(tuple, paired[group])) == sorted(map(tuple, e[group]))
        assert cost(x[group], paired[group]) <= cost(x[group], e[group]) + 1e-6
    assert cost(x, paired) < 0.9 * cost(x, e)


@pytest.mark.parametrize("size", [4, 5])
def test_optimal_transport_is_the_best_of_all_permutations(size: int) -> None:
    x, e = batch(30 * size)
    paired = OptimalTransport(size).pair(x, e)
    greedy_loses = 0
    for k in range(0, 30 * size, size):
        a, b = x[k : k + size], e[k : k + size]
        best = min(cost(a, b[list(order)]) for order in itertools.permutations(range(size)))
        assert cost(a, paired[k : k + size]) == pytest.approx(best, rel=1e-5)
        left, greedy = list(b), 0.0
        for row in a:
            nearest = min(range(len(left)), key=lambda i: cost(row, left[i]))
            greedy += cost(row, left.pop(nearest))
        greedy_loses += greedy > best + 1e-3
    assert greedy_loses > 5  # the batches tell the two apart


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_group_of_less_than_two_is_refused(size: int) -> None:
    with pytest.raises(ToyError, match=rf"--data\.coupling\.size: {size} "):
        OptimalTransport(size)
