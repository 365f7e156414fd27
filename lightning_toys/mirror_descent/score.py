"""A learned energy of the noised joint law, its score, and how it is trained.

The network gives log q(x; abar) up to a constant of each level, so that Metropolis and Hastings' ratio comes with it:

    log q = -|z|^2 / 2 - abar z . (M(abar) z + f(z, abar)) / 2,
    z = (x - sqrt(abar) mean) / sqrt(abar std^2 + 1 - abar),

with mean and std those of the training data, one coordinate at a time. At abar = 0 it is right as it stands; what has
to be learned is how the coordinates depend on each other. The product with z is an energy head as in Du et al. (2023,
arXiv 2302.11552). M, a small network of the level alone, gives each level its best Gaussian; f, a network of both, the
rest. Without M the network has to make straight lines out of bent ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.mirror_descent.joint import Joint
from lightning_toys.nets import ConditionalNet, ReplicaLinear

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)  # at which the score is judged
SPAN = 4.0  # decades of 1 - abar that half of the training's levels cover


def stretched(abar: Tensor) -> Tensor:
    """Return a coordinate of the noise level that resolves the clean end: log(1 - abar + .01) / 2 + 1."""
    return torch.log(1 - abar + 1e-2).mul(0.5).add(1.0)


@contextmanager
def whole_gradients(kind: str) -> Iterator[None]:
    """Keep gradients, and no autocast: what is made of energies and scores are small differences of large numbers.

    Args:
        kind: the device's type.
    """
    with torch.enable_grad(), torch.autocast(kind, enabled=False):
        yield


class LevelMatrix(nn.Module):
    """M of (stretched level, sqrt(1 - abar)): two hidden layers, R replicas.

    Args:
        seeds: one seed a replica.
        hidden: width.
    """

    def __init__(self, seeds: Sequence[int], hidden: int = 32) -> None:
        super().__init__()
        self.first = ReplicaLinear(seeds, "level.first", 2, hidden)
        self.hidden = ReplicaLinear(seeds, "level.hidden", hidden, hidden)
        self.last = ReplicaLinear(seeds, "level.last", hidden, 4)

    def forward(self, level: Tensor) -> Tensor:
        """Map (R, B, 2) to (R, B, 2, 2)."""
        out: Tensor = self.last(F.silu(self.hidden(F.silu(self.first(level)))))
        return out.view(*out.shape[:-1], 2, 2)


class EnergyScore(nn.Module):
    """See the head of this file; R replicas.

    Args:
        net: f of (z, stretched level, sqrt(1 - abar)).
        matrix: M of the level.
        mean: of the training data (2,).
        std: of the training data (2,).
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, net: ConditionalNet, matrix: LevelMatrix, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net, self.matrix = net, matrix
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("variance", torch.tensor(std).square())

    def log_density(self, x: Tensor, abar: Tensor) -> Tensor:
        """Return log q (R, B) up to a constant of each level; x (R, B, 2), abar (R, B, 1)."""
        z = (x - abar.sqrt() * self.mean.to(x)) / (abar * self.variance.to(x) + 1 - abar).sqrt()
        level, sigma = stretched(abar), (1 - abar).sqrt()
        # a product of two numbers each, not a batch of matrices of four
        linear = (self.matrix(torch.cat([level, sigma], -1)) * z.unsqueeze(-2)).sum(-1)
        f: Tensor = linear + self.net(z, level, sigma)
        return -0.5 * (z * (z + abar * f)).sum(-1)

    def score(self, x: Tensor, abar: Tensor, graph: bool = False) -> Tensor:
        """Return the gradient of log q in x (R, B, 2), with its graph if asked for."""
        with whole_gradients(x.device.type):
            x = x.detach().requires_grad_(True)
            total = self.log_density(x, abar).sum()
            (out,) = torch.autograd.grad(total, x, create_graph=graph)
        return out


def one_replica(net: EnergyScore, r: int) -> EnergyScore:
    """Return a frozen copy of replica r alone."""
    out = copy.deepcopy(net).requires_grad_(False)
    for p in out.parameters():
        p.data = p.data[r : r + 1].clone()
    return out


def training_levels(offset: Tensor, batch_size: int) -> Tensor:
    """Return levels abar (R, B, 1), even rows uniform in abar, odd ones in log(1 - abar) over four decades.

    Args:
        offset: uniforms (R, 1, 1) that shift the evenly spaced places.
        batch_size: B.
    """
    row = torch.arange(batch_size, device=offset.device).view(1, -1, 1)
    flat = row % 2 == 0
    place = (row // 2 + offset) / torch.where(flat, (batch_size + 1) // 2, max(1, batch_size // 2))
    # in single precision a place can round to 1, where there is no noise to match
    return torch.where(flat, place, 1 - 10 ** (-SPAN * place)).clamp_max(1 - 10**-SPAN)


def level_weights(abar: Tensor) -> Tensor:
    """Return the weight (R, B) of each row's loss, 1 / (abar + .1)^2; abar (R, B, 1).

    An error of M and f moves the score by abar times as much, so that without weights they are hardly learned at the
    noisy levels, where the score would then be the worst. Any weight that is a function of the level keeps the optimum.
    """
    return (abar[..., 0] + 0.1).pow(-2)


def denoising_losses(net: EnergyScore, x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Return denoising score matching's loss of each row (R, B), less what no weight changes.

    |S(x) + eps / sigma|^2 / 2 - |eps|^2 / (2 sigma^2) at x = sqrt(abar) x_0 + sigma eps (Vincent 2011), averaged over
    eps and -eps: the target's variance 1 / sigma^2 cancels between the two, and as sigma -> 0 what is left is implicit
    score matching with Hutchinson's trace. At best it is -E|S|^2 / 2.
    """
    sigma = (1 - abar).sqrt()
    e = torch.cat([eps, -eps], 1)
    x = torch.cat([abar.sqrt() * x0] * 2, 1) + torch.cat([sigma, sigma], 1) * e
    S = net.score(x, torch.cat([abar, abar], 1), graph=True)
    losses = (S * (0.5 * S + e / torch.cat([sigma, sigma], 1))).sum(-1)
    return losses.view(len(losses), 2, -1).mean(1)


@torch.no_grad()
def relative_error(net: EnergyScore, joint: Joint, abar: float, z: Tensor) -> Tensor:
    """Return sqrt(E|S - score|^2 / E|score|^2) of each replica (R,) at a level.

    Args:
        net: the energy.
        joint: gives the exact score.
        abar: the level.
        z: standard normals (n, 2), from which the level's draws are made.
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
