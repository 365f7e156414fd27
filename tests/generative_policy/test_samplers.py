"""Samples of a density alone: weights, integrals and effective sizes against closed forms; each wrong version fails."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy import (
    AnnealedMala,
    Checkerboard,
    GaussianPolicy,
    ImportanceResampling,
    Mixture,
    MixtureData,
    Sampler,
    Target,
    ThreeModes,
)
from lightning_toys.generative_policy.gaussian import tanh_gaussian_log_prob
from lightning_toys.generative_policy.gaussian_policy import exact_metrics
from lightning_toys.generative_policy.samplers import (
    Pool,
    effective_size,
    mala_move,
    next_beta,
    sampled_entropy,
    systematic_resampling,
)
from lightning_toys.training.noise import keyed_generator

SAMPLERS: dict[str, Sampler] = {"importance": ImportanceResampling(2**16), "annealed": AnnealedMala(2000)}


class Bump(Target):
    """exp(-|x - m|^2 / (2 s^2)), not normalised: its integral is (2 pi s^2)^(D/2), all of it within the bounds."""

    normalised = False

    def __init__(self, dim: int = 2, std: float = 0.1, bounds: tuple[float, float] = (-1.0, 1.0)) -> None:
        self.dim, self.std, self.bounds = dim, std, bounds

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * ((x - 0.1) / self.std).square().sum(-1)

    @property
    def log_z(self) -> float:
        return self.dim * (0.5 * math.log(2 * math.pi) + math.log(self.std))


class Faulty(Target):
    """What a class of somebody's own may get wrong."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def log_prob(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1)
        return {
            "nan": square.log() * 0 / 0,
            "empty": torch.where(square < 9, -torch.inf, square),
            "shape": square.unsqueeze(-1),
            "batch": square - square.mean(),
            "graph": square.detach(),
        }[self.fault]


def normals(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/samplers/{name}").standard_normal(shape))


@pytest.mark.parametrize("name", SAMPLERS)
def test_modes_and_integral_of_a_mixture(name: str) -> None:
    """Within four errors of an independent sample of the effective size; the modes' widths too."""
    target = ThreeModes(0.05)
    found = SAMPLERS[name].draw(target, 3, "test")
    weights, mode = found.log_weights.exp(), target.nearest(found.points)[0]
    assert weights.sum().item() == pytest.approx(1)
    shares = torch.zeros(3).double().index_add(0, mode, weights)
    errors = (target.mode_weights * (1 - target.mode_weights) / found.effective).sqrt()
    assert ((shares - target.mode_weights).abs() < 4 * errors).all()
    assert found.effective > 200
    assert abs(found.log_z) < 4 / math.sqrt(found.effective)
    within = weights @ (found.points - target.means[mode]).square().sum(-1)
    assert within.item() == pytest.approx(2 * 0.05**2, rel=5 / math.sqrt(found.effective))
    assert abs(sampled_entropy(found, target) - target.entropy()) < 5 / math.sqrt(found.effective)


@pytest.mark.parametrize(("name", "dim"), [("importance", 1), ("importance", 3), ("annealed", 1), ("annealed", 6)])
def test_integral_of_a_density_that_is_not_normalised(name: str, dim: int) -> None:
    """The bounds' volume counts: they are 3 wide here; a factor of it forgotten is log 3 = 1.1 for each coordinate."""
    target = Bump(dim, 0.2, (-1.5, 1.5))
    found = SAMPLERS[name].draw(target, 0, "test")
    assert found.effective > 100
    assert abs(found.log_z - target.log_z) < 4 / math.sqrt(found.effective)
    entropy = dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.2))
    assert abs(sampled_entropy(found, target) - entropy) < 4 * math.sqrt(dim / found.effective)


def test_the_effective_size_is_that_of_the_error() -> None:
    """Squared errors of a mode's weight over w (1 - w) / effective, 40 seeds: 1 on average (99.9 %: .45 to 1.85)."""
    target = Mixture([[-0.5], [0.5]], 0.1, [1, 2])
    for sampler in (ImportanceResampling(400), AnnealedMala(400)):
        scores = []
        for seed in range(40):
            found = sampler.draw(target, seed, "test")
            share = float(found.log_weights.exp()[found.points[:, 0] > 0].sum())
            scores.append((share - 2 / 3) ** 2 / (2 / 9 / found.effective))
        assert 0.3 < np.mean(scores) < 1.85, type(sampler).__name__
        assert 0.2 * 400 < found.effective < 400


def test_draws_are_keyed() -> None:
    for sampler in (ImportanceResampling(500), AnnealedMala(300)):
        first, again, stream, seed = (
            sampler.draw(Bump(), s, name).points for s, name in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))
        )
        assert torch.equal(first, again)
        assert not (first == stream).any()
        assert not (first == seed).any()


def test_a_move_leaves_the_density_as_it_is() -> None:
    """N(.1, s^2) to the power beta has the variance s^2 / beta; without the acceptance it would grow by a quarter."""
    target, beta, n = Bump(2, 0.1), 0.5, 20_000
    std = 0.1 / math.sqrt(beta)
    x = 0.1 + std * normals("start", n, 2)
    state = (x, target.log_prob(x), -(x - 0.1) / 0.01)
    shares = []
    for k in range(3):
        noise, uniform = normals(f"noise {k}", n, 2), torch.special.ndtr(normals(f"uniform {k}", n))
        *moved, accepted = mala_move(target, beta, torch.full((2,), std).double(), state, noise, uniform)
        state = tuple(moved)
        shares.append(accepted)
    assert 0.5 < min(shares) < max(shares) < 0.99
    error = math.sqrt(2 / (2 * n))
    assert (state[0] - 0.1).square().mean().item() == pytest.approx(std**2, rel=4 * error)
    assert (state[0] - x).square().mean() > 0.3 * std**2  # and it moves
    torch.testing.assert_close(state[1], target.log_prob(state[0]))


def test_moves_keep_to_the_bounds() -> None:
    """A flat density on [-1, 1]: the variance stays 1/3, nothing leaves."""

    class Flat(Target):
        dim = 1

        def log_prob(self, x: Tensor) -> Tensor:
            return 0 * x.sum(-1)

    n = 20_000
    x = 2 * torch.special.ndtr(normals("flat", n, 1)) - 1
    state: tuple[Tensor, Tensor, Tensor] = (x, torch.zeros(n).double(), torch.zeros(n, 1).double())
    for k in range(3):
        noise, uniform = normals(f"flat {k}", n, 1), torch.special.ndtr(normals(f"flat u {k}", n))
        *moved, accepted = mala_move(Flat(), 1.0, torch.full((1,), 0.7).double(), state, noise, uniform)
        state = tuple(moved)  # type: ignore[assignment]
        assert 0.5 < accepted < 0.9
    assert state[0].abs().max() <= 1
    assert state[0].square().mean().item() == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / n))


def test_levels_keep_their_share_effective() -> None:
    value = 50 * normals("value", 1000)
    beta = next_beta(value, 0.0, 0.9)
    assert 0 < beta < 1
    assert effective_size((beta * value).log_softmax(0)) / 1000 == pytest.approx(0.9, abs=0.002)
    later = next_beta(value, 0.01, 0.9)
    assert later - 0.01 == pytest.approx(beta, rel=0.01)  # the step is what counts
    assert next_beta(torch.zeros(10).double(), 0.3, 0.9) == 1
    holes = torch.cat([value, torch.full((1000,), -torch.inf).double()])
    assert next_beta(holes, 0.0, 0.9) == pytest.approx(beta)


def test_systematic_resampling_is_off_by_less_than_one() -> None:
    w = torch.special.ndtr(normals("weights", 50))
    w = w / w.sum()
    counts = []
    for u in (0.0, 0.25, 0.5, 0.75, 0.999):
        count = torch.bincount(systematic_resampling(w, u), minlength=50).double()
        assert ((count - 50 * w).abs() < 1).all()
        counts.append(count)
    assert not torch.equal(counts[0], counts[2])


def test_a_pool_gives_points_by_weight() -> None:
    pool = Pool(np.arange(4.0)[:, None], np.array([1.0, 2.0, 0.0, 1.0]))
    drawn = pool.at((np.arange(1000) + 0.5) / 1000)[:, 0]
    assert np.bincount(drawn.astype(int), minlength=4).tolist() == [250, 500, 0, 250]
    even = Pool(np.arange(5.0)[:, None]).at((np.arange(1000) + 0.5) / 1000)[:, 0]
    assert np.bincount(even.astype(int)).tolist() == [200] * 5


@pytest.mark.parametrize(
    ("fault", "sampler", "says"),
    [
        ("nan", AnnealedMala(100), "Faulty.log_prob is NaN or inf within its bounds"),
        ("empty", ImportanceResampling(100), "Faulty has no density at any of 100 points of its bounds"),
        ("graph", AnnealedMala(100), "Faulty.log_prob is not differentiable; give --data.sampler ImportanceResampling"),
    ],
)
def test_densities_that_cannot_be_sampled(fault: str, sampler: Sampler, says: str) -> None:
    with pytest.raises(ToyError) as caught:
        sampler.draw(Faulty(fault), 0, "test")
    assert says in str(caught.value)


def test_targets_that_break_the_contract() -> None:
    class Neither(Target):
        pass

    class Inverted(Bump):
        def __init__(self) -> None:
            super().__init__(bounds=(1.0, -1.0))

    for target, says in (
        (Neither(), "--data.target: Neither has neither log_prob nor sample"),
        (Inverted(), "--data.target: Inverted.bounds: (1.0, -1.0) is not allowed"),
        (Faulty("shape"), "Faulty.log_prob of x (2, 5, 2) gives (2, 5, 1); give a tensor (2, 5)"),
        (Faulty("batch"), "Faulty.log_prob: what a row gives depends on the other rows"),
        (Faulty("x"), "Faulty.log_prob fails: KeyError: 'x'"),
    ):
        with pytest.raises(ToyError) as caught:
            MixtureData(target)
        assert says in str(caught.value)
    with pytest.raises(ToyError, match=r"--data\.target: Checkerboard is not allowed, the reverse KL needs a density"):
        GaussianPolicy().measure(MixtureData(Checkerboard()))


def test_particles_of_each_use_and_replica_are_their_own() -> None:
    data = MixtureData(Bump(), sampler=AnnealedMala(200))
    assert data.particles(0, "training") is data.particles(0, "training")
    keys = ((0, "training"), (0, "evaluation/target"), (1, "training"))
    points = [data.particles(s, name).points for s, name in keys]
    assert not any(torch.equal(a, b) for a, b in zip(points, points[1:] + points[:1], strict=True))
    x, _ = data.pairs(data.target, data.coupling, [0, 1])(3, 5)
    assert x.shape == (2, 2, 256, 2)
    for r in (0, 1):  # each replica draws from its own
        own = set(map(tuple, data.particles(r, "training").points.float().tolist()))
        assert set(map(tuple, x[r].reshape(-1, 2).tolist())) <= own
    alone, _ = data.pairs(data.target, data.coupling, [1])(4, 5)
    assert torch.equal(alone[0, 0], x[1, 1])
    assert data.scale == pytest.approx(0.1, rel=0.2)
    (z,) = data.log_z([0]) or [math.nan]
    assert abs(z - data.target.log_z) < 0.5  # type: ignore[attr-defined]


def test_a_density_that_is_not_normalised_is_told() -> None:
    """Only where it says that it is: the integral of the bump is exp(-2.8)."""

    class Forgotten(Bump):
        normalised = True

    with pytest.warns(UserWarning, match=r"Forgotten\.log_prob integrates to exp\(-2\.\d*\).*set normalised = False"):
        MixtureData(Forgotten(), sampler=ImportanceResampling(2**12)).particles(0, "training")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MixtureData(Bump(), sampler=ImportanceResampling(2**12)).particles(0, "training")
        MixtureData(ThreeModes(0.05), sampler=ImportanceResampling(2**14)).particles(0, "training")


# both routes


class TanhGaussian(Target):
    """The distribution of tanh(mu + sigma xi) times a constant: the reverse KL of a tanh-Gaussian can be 0."""

    normalised = False
    MU, SIGMA = (0.4, -0.6), (0.3, 0.5)

    def log_prob(self, x: Tensor) -> Tensor:
        mu, sigma = (torch.tensor(v, dtype=x.dtype) for v in (self.MU, self.SIGMA))
        inside = x.clamp(-1 + 1e-6, 1 - 1e-6)
        return tanh_gaussian_log_prob(inside, mu, sigma.log()) + 2.0


@pytest.mark.parametrize(
    ("divergence", "sampler"),
    [("reverse_kl", None), ("forward_kl", AnnealedMala(4000)), ("forward_kl", ImportanceResampling(2**15))],
)
def test_both_routes_find_the_closed_form(divergence: str, sampler: Sampler | None) -> None:
    """By the gradient through the action, and by the likelihood of sampled actions: the same mu and sigma.

    The second within the error of its samples. LBFGS on the policies' own losses, in double precision.
    """
    policy = GaussianPolicy([0], "free", divergence=divergence)  # type: ignore[arg-type]
    data = MixtureData(TanhGaussian(), sampler=sampler)
    policy.sizes = policy.measure(data)
    policy.configure_model()
    policy.double()
    if divergence == "reverse_kl":
        arguments, loss_of = (normals("xi", 1, 4000, 2), data.target, 4000), policy.losses
        error = 0.05
    else:
        x = data.sample(0, 4000, "evaluation/target")[None]
        arguments, loss_of = (x, 4000), policy.likelihood_losses  # type: ignore[assignment]
        error = 4 / math.sqrt(min(4000, data.particles(0, "evaluation/target").effective))
    optimizer = torch.optim.LBFGS(policy.net.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss_of(*arguments).sum()  # type: ignore[arg-type]
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    mu, log_sigma = (p.detach()[0, 0] for p in policy.mu_log_sigma(policy.net))
    sigma = torch.tensor(TanhGaussian.SIGMA)
    assert ((mu - torch.tensor(TanhGaussian.MU)).abs() < error * sigma).all()
    assert ((log_sigma.exp() / sigma - 1).abs() < error).all()
    # exact_metrics: the integral is e^2, which kl adds; forgotten, the divergence would be -2
    found = exact_metrics(mu[None, None], log_sigma[None, None], data.target, [2.0])
    assert -1e-6 < found["kl"].item() < 2 * error**2
    assert "kl" not in exact_metrics(mu[None, None], log_sigma[None, None], data.target)
