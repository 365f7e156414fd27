"""Integrated flows: samples and likelihoods against closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_toys.generative_policy.flow_ode import flow_log_prob, flow_sample
from lightning_toys.generative_policy.mixture import Mixture
from lightning_toys.training.noise import keyed_generator


def noise(name: str, n: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, name).standard_normal((n, 2)))


def wide() -> Mixture:
    return Mixture([[0.4, 0.1], [-0.5, -0.3]], [0.2, 0.3], [1.0, 2.0])


def exact(m: Mixture, sign: float = 1.0):  # type: ignore[no-untyped-def]
    """Return the marginal velocity and its divergence by autograd."""

    def both(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = z.detach().requires_grad_(True)
            v = m.marginal_velocity(y, t)
            div = sum(torch.autograd.grad(v[..., i].sum(), y, retain_graph=True)[0][..., i] for i in range(2))
        return v.detach(), sign * torch.as_tensor(div)[..., None].detach()

    return both


def test_gaussian_flow_map_is_affine() -> None:
    """For data N(m, d^2 I) the flow takes e to m + d e; Euler's error falls like 1/n."""
    m = Mixture([[0.3, -0.2]], [0.25])
    e = noise("e", 50)
    true = m.means[0] + 0.25 * e
    assert (flow_sample(m.marginal_velocity, e, "dopri5", 1, 1e-8) - true).abs().max() < 1e-6
    errors = [(flow_sample(m.marginal_velocity, e, "euler", n) - true).abs().max() for n in (64, 128, 256)]
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


def test_likelihood_is_the_mixtures() -> None:
    """The exact flow's log-likelihood is the target's; a divergence of the wrong sign is far off."""
    m, x = wide(), 0.6 * noise("x", 60)
    true = m.log_prob(x)
    assert (flow_log_prob(exact(m), x, 1e-8) - true).abs().max() < 1e-4
    assert (flow_log_prob(exact(m, -1.0), x, 1e-8) - true).abs().mean() > 0.5


def test_likelihood_integrates_to_one() -> None:
    """On a grid, of a flow that is not the target's: a bent version of the velocity."""
    m = wide()
    base = exact(m)

    def bent(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        v, div = base(z, t)
        return v + 0.3 * torch.sin(z), div + 0.3 * torch.cos(z).sum(-1, keepdim=True)

    line = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    density = flow_log_prob(bent, grid, 1e-6).exp()
    cell = float(line[1] - line[0]) ** 2
    assert math.isclose(float(density.sum()) * cell, 1.0, abs_tol=2e-3)
    assert (density - m.log_prob(grid).exp()).abs().max() > 0.05


def test_times_stay_within_the_path() -> None:
    """An adaptive solver looks past the end of the interval, where a velocity may not be defined."""
    seen: list[float] = []

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        seen.extend((float(t.min()), float(t.max())))
        return z * torch.log(t + 0.005)

    assert flow_sample(velocity, noise("e", 5), "dopri5", 1).isfinite().all()
    assert min(seen) >= 0.0
    assert max(seen) <= 1.0
