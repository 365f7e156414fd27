"""The cosine path's parametrisations at the exact network, and the authors' MIP against its loss written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression.parametrisations import (
    AuthorsMIP,
    CosinePath,
    VPrediction,
    XPrediction,
    on_cosine_path,
)
from lightning_toys.nets import ConditionalNet, Network

R, N, D = 2, 7, 3


def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    c, t = (torch.rand(R, N, 1, generator=g, dtype=torch.float64) for _ in range(2))
    x1, x0 = (torch.randn(R, N, D, generator=g, dtype=torch.float64) for _ in range(2))
    return c, x1, x0, t


class Knowing(ConditionalNet):
    """Knows x1, and answers with it, or with the w that leads there."""

    def __init__(self, x1: Tensor, angular: bool) -> None:
        super().__init__()
        self.x1, self.angular = x1, angular

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        assert t is not None
        a = t * (math.pi / 2)
        return (self.x1 - a.sin() * x) / a.cos() if self.angular else self.x1


def test_the_path_and_its_derivative() -> None:
    _, x1, x0, t = draw()
    x, w = on_cosine_path(x0, x1, t)
    h = 1e-6
    ahead, behind = on_cosine_path(x0, x1, t + h)[0], on_cosine_path(x0, x1, t - h)[0]
    torch.testing.assert_close(w, (ahead - behind) / (2 * h) / (math.pi / 2), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(on_cosine_path(x0, x1, torch.zeros_like(t))[0], x0)
    torch.testing.assert_close(x.square() + w.square(), x0.square() + x1.square())  # a rotation


@pytest.mark.parametrize("nfe", [1, 2, 4, 9])
@pytest.mark.parametrize(("objective", "angular"), [(VPrediction(), True), (XPrediction(), False)])
def test_exact_networks_have_no_residual_and_end_at_the_target(objective: CosinePath, angular: bool, nfe: int) -> None:
    c, x1, x0, t = draw()
    net = Knowing(x1, angular)
    (residual,) = objective.residuals(net, c, x1, x0, t)
    assert residual.abs().max() < 1e-9
    torch.testing.assert_close(objective.readout("euler", nfe).sample(net, c, x0), x1)
    assert [r.name for r in objective.readouts(["euler"], [1, nfe])] == ["ddim-1", f"ddim-{nfe}"]
    (other,) = objective.residuals(Knowing(x1 + 1, angular), c, x1, x0, t)
    assert other.abs().min() > 0.5


def test_one_network_says_the_same_in_both_parametrisations() -> None:
    c, _, x0, t = draw()
    net = Network(hidden=8, layers=2).build([0, 1], D, 1, True).double()
    x = x0
    w = XPrediction().angular_velocity(net, x, c, t)
    a = t * (math.pi / 2)
    torch.testing.assert_close(a.sin() * x + a.cos() * w, net(x, c, t))


def test_the_authors_loss() -> None:
    """Their loss is the mean over rows of (|.| / t*)^2 + (|.| / (1 - t*))^2, norms over the outputs."""
    c, x1, z, t = draw()
    net = Network(hidden=8, layers=2).build([0, 1], D, 1, True).double()
    star = 0.9
    terms = AuthorsMIP(star).residuals(net, c, x1, z, t)
    ours = sum((r.detach().square().sum((1, 2)) for r in terms), torch.zeros(()))
    for r in range(R):
        theirs = 0.0
        for n in range(N):
            inputs = ((torch.zeros(1, 1, D).double(), 0.0), (x1[r, n] + (1 - star) * z[r, n], star))
            times = [torch.full((R, 1, 1), at, dtype=torch.float64) for _, at in inputs]
            pairs = zip(inputs, times, strict=True)
            at = [net(x.expand(R, 1, D), c[:, n : n + 1], s)[r, 0].detach() for (x, _), s in pairs]
            first, second = (torch.linalg.vector_norm(a - x1[r, n]) for a in at)
            theirs += float((first / star) ** 2 + (second / (1 - star)) ** 2)
        assert ours[r].item() == pytest.approx(theirs, rel=1e-12)


def test_the_authors_readouts() -> None:
    c, _, x0, _ = draw()
    net = Network(hidden=8, layers=2).build([0, 1], D, 1, True).double()
    zeros, at_zero, at_star = torch.zeros_like(x0), torch.zeros_like(c), torch.full_like(c, 0.8)
    a0 = net(zeros, c, at_zero)
    found = {r.name: r.sample(net, c, x0) for r in AuthorsMIP(0.8).readouts([], [])}
    torch.testing.assert_close(found["one-step"], a0)
    torch.testing.assert_close(found["two-step"], net(0.8 * a0, c, at_star))
    unscaled = AuthorsMIP(0.8, "unscaled").readout("euler", 1).sample(net, c, x0)
    torch.testing.assert_close(unscaled, net(a0, c, at_star))
    assert not torch.allclose(unscaled, found["two-step"])


def test_t_star_outside_is_refused() -> None:
    with pytest.raises(ToyError, match=r"--model.objective.t_star: 1.0"):
        AuthorsMIP(1.0)
