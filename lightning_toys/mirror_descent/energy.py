"""A learned energy of the noised joint distribution, its score, and its training by denoising score matching.

The network gives log q(x; abar) up to a constant of each level, and with it Metropolis-Hastings ratios:

    log q = -|z|^2 / 2 - abar z . (M(abar) z + f(z, abar)) / 2,
    z = (x - sqrt(abar) mean) / sqrt(abar std^2 + 1 - abar),

with mean and std those of the training data, one coordinate at a time. At abar = 0 it is exact without training; what
has to be learned is how the coordinates depend on each other. The product with z is an energy head as in Du et al.
(2023, arXiv 2302.11552). M, a small network of the level alone, gives each level its best Gaussian; f, a network of z
and the level, gives the rest. Without M the linear score has to be fitted by a nonlinear network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.nets import ConditionalNet, ReplicaLinear

EVALUATION_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)  # abar at which the score is evaluated
NOISE_DECADES = 4.0  # decades of 1 - abar that half of the training levels cover


def level_embedding(abar: Tensor) -> Tensor:
    """Return log(1 - abar + .01) / 2 + 1, of abar's shape: a coordinate of the level that resolves the clean end."""
    return torch.log(1 - abar + 1e-2).mul(0.5).add(1.0)


@contextmanager
def grad_without_autocast(device_type: str) -> Iterator[None]:
    """Enable gradients and disable autocast: energies and scores enter as small differences of large numbers.

    Args:
        device_type: such as ``"cpu"``.
    """
    with torch.enable_grad(), torch.autocast(device_type, enabled=False):
        yield


class LevelMatrix(nn.Module):
    """M(abar), of the level's embedding and sqrt(1 - abar): two hidden layers, R replicas.

    Args:
        seeds: one seed a replica.
        hidden: width of the hidden layers.
    """

    def __init__(self, seeds: Sequence[int], hidden: int = 32) -> None:
        super().__init__()
        self.first = ReplicaLinear(seeds, "level.first", 2, hidden)
        self.hidden = ReplicaLinear(seeds, "level.hidden", hidden, hidden)
        self.last = ReplicaLinear(seeds, "level.last", hidden, 4)

    def forward(self, level: Tensor) -> Tensor:
        """Map (embedding, sqrt(1 - abar)) (R, B, 2) to M (R, B, 2, 2)."""
        out: Tensor = self.last(F.silu(self.hidden(F.silu(self.first(level)))))
        return out.view(*out.shape[:-1], 2, 2)


class EnergyNet(nn.Module):
    """log q(x; abar) and its score, for R replicas; the formula is at the head of this file.

    Args:
        net: f of (z, level embedding, sqrt(1 - abar)).
        matrix: M of the level; None: f alone.
        mean: mean of the training data (2,).
        std: standard deviation of the training data (2,).
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self, net: ConditionalNet, matrix: LevelMatrix | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net, self.matrix = net, matrix
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("variance", torch.tensor(std).square())

    def log_density(self, x: Tensor, abar: Tensor) -> Tensor:
        """Return log q (R, B) up to a constant of each level, for x (R, B, 2) and abar (R, B, 1)."""
        z = (x - abar.sqrt() * self.mean.to(x)) / (abar * self.variance.to(x) + 1 - abar).sqrt()
        embedding, sigma = level_embedding(abar), (1 - abar).sqrt()
        if self.matrix is None:
            f: Tensor = self.net(z, embedding, sigma)
        else:  # a product of two numbers each, not a batch of matrices of four
            linear = (self.matrix(torch.cat([embedding, sigma], -1)) * z.unsqueeze(-2)).sum(-1)
            f = linear + self.net(z, embedding, sigma)
        return -0.5 * (z * (z + abar * f)).sum(-1)

    def score(self, x: Tensor, abar: Tensor, create_graph: bool = False) -> Tensor:
        """Return the gradient (R, B, 2) of log q at x (R, B, 2) and abar (R, B, 1).

        Args:
            x: points (a, s').
            abar: their levels.
            create_graph: keep the graph, to differentiate the score by the weights.
        """
        with grad_without_autocast(x.device.type):
            x = x.detach().requires_grad_(True)
            total = self.log_density(x, abar).sum()
            (out,) = torch.autograd.grad(total, x, create_graph=create_graph)
        return out


def extract_replica(net: EnergyNet, r: int) -> EnergyNet:
    """Return a frozen copy of replica r alone, with a replica axis of length 1."""
    out = copy.deepcopy(net).requires_grad_(False)
    for p in out.parameters():
        p.data = p.data[r : r + 1].clone()
    return out


def training_levels(offset: Tensor, batch_size: int) -> Tensor:
    """Return levels abar (R, B, 1), even rows uniform in abar, odd ones in log(1 - abar) over four decades.

    Args:
        offset: uniforms (R, 1, 1) that shift the evenly spaced quantiles.
        batch_size: B.
    """
    row = torch.arange(batch_size, device=offset.device).view(1, -1, 1)
    even = row % 2 == 0
    quantile = (row // 2 + offset) / torch.where(even, (batch_size + 1) // 2, max(1, batch_size // 2))
    # in single precision a quantile can round to 1, where there is no noise to match
    return torch.where(even, quantile, 1 - 10 ** (-NOISE_DECADES * quantile)).clamp_max(1 - 10**-NOISE_DECADES)


def level_weights(abar: Tensor) -> Tensor:
    """Return the weight (R, B) of each row's loss, 1 / (abar + .1)^2, for abar (R, B, 1).

    An error of M or f changes the score by abar times as much: without weights they are hardly learned at the noisy
    levels, and the score is worst there. Any weight that depends on the level alone keeps the optimum.
    """
    return (abar[..., 0] + 0.1).pow(-2)


def denoising_losses(net: EnergyNet, x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Return the denoising score matching loss of each row (R, B), without the term that no weight changes.

    |S(x) + eps / sigma|^2 / 2 - |eps|^2 / (2 sigma^2) at x = sqrt(abar) x_0 + sigma eps (Vincent 2011), averaged over
    eps and -eps (antithetic): the regression target's variance 1 / sigma^2 cancels between the two, and as sigma -> 0
    the loss becomes implicit score matching with Hutchinson's trace estimate. Its minimum is -E|S|^2 / 2.

    Args:
        net: the energy.
        x0: clean pairs (R, B, 2).
        eps: standard normals (R, B, 2).
        abar: levels (R, B, 1), below 1.
    """
    sigma = (1 - abar).sqrt()
    both = torch.cat([eps, -eps], 1)
    x = torch.cat([abar.sqrt() * x0] * 2, 1) + torch.cat([sigma, sigma], 1) * both
    S = net.score(x, torch.cat([abar, abar], 1), create_graph=True)
    losses = (S * (0.5 * S + both / torch.cat([sigma, sigma], 1))).sum(-1)
    return losses.view(len(losses), 2, -1).mean(1)


@torch.no_grad()
def score_relative_error(net: EnergyNet, joint: LinearGaussianJoint, abar: float, z: Tensor) -> Tensor:
    """Return the score's relative error, sqrt(E|S - score|^2 / E|score|^2), of each replica (R,) at a level.

    Args:
        net: the energy.
        joint: gives the exact score.
        abar: the level.
        z: standard normals (n, 2), which are turned into samples of the level.
    """
    with torch.autocast(z.device.type, enabled=False):
        level = joint.level(abar)
        m, C, P = (torch.from_numpy(v).to(z) for v in (level.m, level.C, level.precision))
        x = m + z @ torch.linalg.cholesky(C).T
        exact = (m - x) @ P
        replicas = next(net.parameters()).shape[0]
        rows = x.expand(replicas, -1, -1)
        found = net.score(rows, torch.full_like(rows[..., :1], abar))
        error: Tensor = ((found - exact).square().sum((1, 2)) / exact.square().sum()).sqrt()
        return error
