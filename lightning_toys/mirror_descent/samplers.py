"""Samplers at the clean level: importance reweighting, independence-MH, ULA, MALA, Gibbs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent import affine
from lightning_toys.mirror_descent.affine import Affine, Law
from lightning_toys.mirror_descent.joint import Level
from lightning_toys.mirror_descent.kernels import BLOCK, Noise, State, independence, mala, start, ula
from lightning_toys.mirror_descent.problem import Cost, World

WATCHED = 64  # chains of a block whose path is kept
GROUP = 2**12  # draws that importance weighs against each other
COUNTED = 1024  # chains of a block that acceptance and jumps are averaged over


@dataclass
class Draws:
    """What a sampler made of some blocks of chains, side by side.

    Attributes:
        a: actions (B,).
        s: next states (B,).
        accepted: mean acceptance of each step in each block (T, blocks), or none.
        path: actions of each block's watched chains at every step (T, blocks, W), or none.
        jumps: mean squared jump of the action in each step and block (T, blocks), or none.
        extra: other numbers, by name: one of each independent group of chains, block by block.
    """

    a: Tensor
    s: Tensor
    accepted: Tensor | None = None
    path: Tensor | None = None
    jumps: Tensor | None = None
    extra: dict[str, list[float]] | None = None


class Sampler:
    """One way of drawing (a, s') from the tilted law.

    Args:
        world: the question.
    """

    name: str
    watched = WATCHED
    independent = True  # whether draws are independent of each other
    stationary = False  # whether its path is that of one kernel, which R-hat and ESS are about

    def __init__(self, world: World) -> None:
        self.world = world

    def draw(self, noise: Noise) -> Draws:
        """Return draws of as many blocks as the noise has."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """Return the evaluations to one sample."""
        raise NotImplementedError

    def law(self) -> Law | None:
        """Return the law of the draws where it is Gaussian and so known exactly, correct or not."""
        return None


def refresh(noise: Noise, level: Level, a: Tensor) -> Tensor:
    """Draw s' | a at a level."""
    return torch.add(noise.normal()[0] * math.sqrt(level.v) + level.c, a, alpha=level.rho)


def exact_law(world: World) -> Law:
    """Return the tilted law."""
    return Law(world.tilted_joint.m, world.tilted_joint.C)


def from_prior(noise: Noise, level: Level) -> Tensor:
    """Draw actions (B,) of the untilted law at a level."""
    return noise.normal()[0] * math.sqrt(level.C[0, 0]) + float(level.m[0])


class Watch:
    """Notes what the chains of each block do.

    Args:
        watched: chains of a block whose path is kept.
        blocks: how many blocks lie side by side.
    """

    def __init__(self, watched: int, blocks: int) -> None:
        self.kept, self.watched, self.blocks = max(watched, COUNTED), watched, blocks
        self.accepted: list[Tensor] = []
        self.path: list[Tensor] = []

    def note(self, before: Tensor, after: Tensor, accepted: Tensor | None = None) -> None:
        """Note one step of the actions (B,)."""
        if not self.path:
            self.path.append(self.some(before, self.kept))
        self.path.append(self.some(after, self.kept))
        if accepted is not None:
            self.accepted.append(self.some(accepted, COUNTED))

    def some(self, x: Tensor, n: int) -> Tensor:
        """Return a copy of what belongs to each block's first n chains (blocks, n)."""
        return x.view(self.blocks, -1)[:, :n].clone()

    def draws(self, a: Tensor, s: Tensor) -> Draws:
        """Return the block's draws with what was noted."""
        accepted = torch.stack(self.accepted).mean(-1) if self.accepted else None
        path = torch.stack(self.path)
        jumps = path[..., :COUNTED].diff(dim=0).square().mean(-1)
        return Draws(a, s, accepted, path[1:, :, : self.watched] if self.watched else None, jumps)


class Importance(Sampler):
    """Draws from q, weighted by exp(beta Q) and resampled systematically, in groups of 4096; exact as a group grows."""

    name = "importance"
    independent = False

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        world = self.world
        clean, Q, beta = world.joint.clean, world.target.Q, world.strength
        a = from_prior(noise, clean)
        s = refresh(noise, clean, a)
        log_w = beta * (Q.b * a - 0.5 * Q.A * a * a)
        log_w = log_w.double().view(-1, GROUP)
        weight = torch.softmax(log_w, -1)
        kept = systematic(weight, noise.uniforms_of_groups(BLOCK // GROUP))
        kept = (kept + GROUP * torch.arange(len(kept), device=kept.device)[:, None]).ravel()
        extra = {
            "ess_fraction": (1 / (weight.square().sum(-1) * GROUP)).tolist(),
            "log_z": (torch.logsumexp(log_w, -1) - math.log(GROUP) + beta * Q.const).tolist(),
        }
        return Draws(a[kept], s[kept], extra=extra)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        return Cost(prior=1, value=1, refresh=1)


def systematic(weight: Tensor, uniform: Tensor) -> Tensor:
    """Return the indices (groups, N) that systematic resampling keeps in each group, index i about N weight_i times.

    Args:
        weight: (groups, N), each row of sum 1.
        uniform: one of each group (groups,).
    """
    n = weight.shape[-1]
    places = (torch.arange(n, dtype=weight.dtype, device=weight.device) + uniform.to(weight)[:, None]) / n
    return torch.searchsorted(weight.cumsum(-1), places).clamp_(max=n - 1)


class IndependenceMH(Sampler):
    """Proposals from q, taken with probability min(1, exp(beta (Q(a') - Q(a))))."""

    name = "independence_mh"
    stationary = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        world, watch = self.world, Watch(self.watched, noise.blocks)
        clean, Q, beta = world.joint.clean, world.target.Q, world.strength

        def value(x: Tensor) -> tuple[Tensor, Tensor]:
            return beta * (Q.b * x[0] - 0.5 * Q.A * x[0].square()), torch.zeros_like(x)

        state = start(from_prior(noise, clean).unsqueeze(0), value)
        for _ in range(world.settings.mcmc_steps):
            proposal = start(from_prior(noise, clean).unsqueeze(0), value)
            before = state
            state, info = independence(noise, state, proposal, proposal.log_p - state.log_p)
            watch.note(before.x[0], state.x[0], info.accepted)
        return watch.draws(state.x[0], refresh(noise, clean, state.x[0]))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.world.settings.mcmc_steps + 1
        return Cost(prior=n, value=n, refresh=1)


class ULA(Sampler):
    """Unadjusted Langevin steps on the tilted action, from q; biased: variance (1 / tau) / (1 - eta tau / 2)."""

    name = "ula"
    stationary = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        world, watch = self.world, Watch(self.watched, noise.blocks)
        eta = world.settings.ula_step
        x, pull = from_prior(noise, world.joint.clean).unsqueeze(0), world.model.pull(world.target)
        for _ in range(world.settings.mcmc_steps):
            before = x
            x = ula(noise, x, pull(x), eta)
            watch.note(before[0], x[0])
        return watch.draws(x[0], refresh(noise, world.joint.clean, x[0]))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.world.settings.mcmc_steps
        return Cost(prior=1, score=n, value=n, refresh=1)

    def law(self) -> Law:
        """See :meth:`Sampler.law`."""
        world = self.world
        law = Law(world.joint.clean.m, world.joint.clean.C)
        step = langevin(world.target.mu, world.target.tau, world.settings.ula_step)
        for _ in range(world.settings.mcmc_steps):
            law = law.after(step)
        return law.after(affine.refresh(world.joint.clean))


def langevin(mu: float, tau: float, eta: float, extra: float = 0.0) -> Affine:
    """Return the ULA step on N(mu, 1 / tau) in the action, its gradient with noise of variance ``extra``."""
    A = np.diag([1 - eta * tau, 1.0])
    return Affine(A, np.array([eta * tau * mu, 0.0]), np.diag([2 * eta + eta**2 * extra, 0.0]))


class MALA(Sampler):
    """Metropolis-adjusted Langevin steps on the tilted action, from q."""

    name = "mala"
    stationary = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        world, watch = self.world, Watch(self.watched, noise.blocks)
        law = world.model.action(world.target)
        eta = world.settings.mala_step / world.target.tau
        state: State = start(from_prior(noise, world.joint.clean).unsqueeze(0), law)
        for _ in range(world.settings.mcmc_steps):
            before = state
            state, info = mala(noise, state, law, eta)
            watch.note(before.x[0], state.x[0], info.accepted)
        return watch.draws(state.x[0], refresh(noise, world.joint.clean, state.x[0]))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.world.settings.mcmc_steps + 1
        return Cost(prior=1, score=n, value=n, refresh=1)


class Gibbs(Sampler):
    """s' | a, then a | s' of the tilted joint: precision tau + alpha^2 / sigma_sprime^2."""

    name = "gibbs"
    stationary = True

    @property
    def posterior_precision(self) -> float:
        """Precision of a | s'."""
        joint = self.world.joint
        return self.world.target.tau + joint.alpha**2 / joint.sigma_sprime**2

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        world, watch, joint, target = self.world, Watch(self.watched, noise.blocks), self.world.joint, self.world.target
        tau = self.posterior_precision
        a = from_prior(noise, joint.clean)
        for _ in range(world.settings.mcmc_steps):
            before = a
            s = refresh(noise, joint.clean, a)
            pull = joint.alpha / joint.sigma_sprime**2 / tau
            a = noise.normal()[0] / math.sqrt(tau) + (s - joint.shift) * pull + target.tau * target.mu / tau
            watch.note(before, a)
        return watch.draws(a, refresh(noise, joint.clean, a))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.world.settings.mcmc_steps
        return Cost(prior=1, score=n, value=n, refresh=n + 1)

    def law(self) -> Law:
        """See :meth:`Sampler.law`."""
        world, joint, target = self.world, self.world.joint, self.world.target
        tau = self.posterior_precision
        pull = joint.alpha / joint.sigma_sprime**2 / tau
        drawn = Affine(
            np.array([[0.0, pull], [0.0, 1.0]]),
            np.array([target.tau * target.mu / tau - pull * joint.shift, 0.0]),
            np.diag([1 / tau, 0.0]),
        )
        law = Law(joint.clean.m, joint.clean.C)
        for _ in range(world.settings.mcmc_steps):
            law = law.after(affine.refresh(joint.clean)).after(drawn)
        return law.after(affine.refresh(joint.clean))
