"""Samplers at the clean level: importance resampling, independence-MH, ULA, MALA, Gibbs; and what samplers share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent import affine
from lightning_toys.mirror_descent.affine import AffineStep, propagate
from lightning_toys.mirror_descent.joint import Gaussian, NoiseLevel
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise, State, independence_mh, init_state, mala, ula
from lightning_toys.mirror_descent.problem import Cost, Problem

NUM_TRACED = 64  # chains of a block whose trace is kept
NUM_MONITORED = 1024  # chains of a block that acceptance rate and squared jumps are averaged over
IMPORTANCE_GROUP = 2**12  # draws that are resampled together by their importance weights


@dataclass
class Draws:
    """What a sampler drew in some blocks of chains, side by side.

    Attributes:
        a: actions (B,).
        s: next states (B,).
        accepted: acceptance rate of each step in each block (T, blocks), or None.
        trace: actions of each block's traced chains after every step (T, blocks, W), or None.
        squared_jumps: mean squared jump of the action in each step and block (T, blocks), or None.
        extra: other numbers, by name: one for each independent group of chains, block by block.
    """

    a: Tensor
    s: Tensor
    accepted: Tensor | None = None
    trace: Tensor | None = None
    squared_jumps: Tensor | None = None
    extra: dict[str, list[float]] | None = None


class Sampler:
    """A way of drawing (a, s') from the tilted target. Chains are along the last axis B, in blocks of ``BLOCK_SIZE``.

    Attributes:
        name: by which ``--model.samplers`` chooses it, and part of the key of its noise.
        num_traced: chains of a block whose trace is kept.
        independent: whether draws are independent of each other.
        stationary: whether all steps are of one Markov kernel, as R-hat and ESS assume.

    Args:
        problem: the sampling problem.
    """

    name: str
    num_traced = NUM_TRACED
    independent = True
    stationary = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def draw(self, noise: Noise) -> Draws:
        """Return draws of as many blocks as the noise has; all randomness is the noise's."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """Return the evaluations per sample."""
        raise NotImplementedError

    def exact_distribution(self) -> Gaussian | None:
        """Return the distribution of the draws, right or wrong, where it is Gaussian and so known exactly."""
        return None


def refresh(noise: Noise, level: NoiseLevel, a: Tensor) -> Tensor:
    """Draw s' (B,) given actions a (B,) at a level."""
    return torch.add(noise.normal()[0] * math.sqrt(level.v) + level.c, a, alpha=level.rho)


def sample_prior(noise: Noise, level: NoiseLevel) -> Tensor:
    """Draw actions (B,) of the untilted distribution at a level."""
    return noise.normal()[0] * math.sqrt(level.C[0, 0]) + float(level.m[0])


class ChainRecorder:
    """Records acceptance, traces and jumps of some chains of each block.

    Args:
        num_traced: chains of a block whose trace is kept.
        blocks: number of blocks side by side.
    """

    def __init__(self, num_traced: int, blocks: int) -> None:
        self.kept, self.num_traced, self.blocks = max(num_traced, NUM_MONITORED), num_traced, blocks
        self.accepted: list[Tensor] = []
        self.trace: list[Tensor] = []

    def record(self, before: Tensor, after: Tensor, accepted: Tensor | None = None) -> None:
        """Record one step: actions before and after it, and 1 where it was accepted, each (B,)."""
        if not self.trace:
            self.trace.append(self.first_chains(before, self.kept))
        self.trace.append(self.first_chains(after, self.kept))
        if accepted is not None:
            self.accepted.append(self.first_chains(accepted, NUM_MONITORED))

    def first_chains(self, x: Tensor, n: int) -> Tensor:
        """Return a copy of the values x (B,) of each block's first n chains (blocks, n)."""
        return x.view(self.blocks, -1)[:, :n].clone()

    def draws(self, a: Tensor, s: Tensor) -> Draws:
        """Return the draws a and s (B,) with what was recorded."""
        accepted = torch.stack(self.accepted).mean(-1) if self.accepted else None
        trace = torch.stack(self.trace)
        squared_jumps = trace[..., :NUM_MONITORED].diff(dim=0).square().mean(-1)
        return Draws(a, s, accepted, trace[1:, :, : self.num_traced] if self.num_traced else None, squared_jumps)


class Importance(Sampler):
    """Draws from q resampled with weights exp(beta Q), systematically in groups of 4096; exact as a group grows.

    ``extra`` has each group's ``ess_fraction`` and ``log_z``, the log of its unbiased estimate of Z.
    """

    name = "importance"
    independent = False

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem = self.problem
        clean, Q, beta = problem.joint.clean, problem.target.Q, problem.lambda_scale
        a = sample_prior(noise, clean)
        s = refresh(noise, clean, a)
        log_w = beta * (Q.b * a - 0.5 * Q.A * a * a)
        log_w = log_w.double().view(-1, IMPORTANCE_GROUP)
        weight = torch.softmax(log_w, -1)
        kept = systematic_resampling(weight, noise.uniforms_of_groups(BLOCK_SIZE // IMPORTANCE_GROUP))
        kept = (kept + IMPORTANCE_GROUP * torch.arange(len(kept), device=kept.device)[:, None]).ravel()
        extra = {
            "ess_fraction": (1 / (weight.square().sum(-1) * IMPORTANCE_GROUP)).tolist(),
            "log_z": (torch.logsumexp(log_w, -1) - math.log(IMPORTANCE_GROUP) + beta * Q.const).tolist(),
        }
        return Draws(a[kept], s[kept], extra=extra)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        return Cost(prior=1, value=1, refresh=1)


def systematic_resampling(weight: Tensor, uniform: Tensor) -> Tensor:
    """Return the indices (groups, N) that are kept in each group, index i floor or ceil of N weight_i times.

    >>> systematic_resampling(torch.tensor([[0.5, 0.25, 0.0, 0.25]]), torch.tensor([0.5])).tolist()
    [[0, 0, 1, 3]]

    Args:
        weight: (groups, N), each row of sum 1.
        uniform: one for each group, in [0, 1) (groups,).
    """
    n = weight.shape[-1]
    quantiles = (torch.arange(n, dtype=weight.dtype, device=weight.device) + uniform.to(weight)[:, None]) / n
    return torch.searchsorted(weight.cumsum(-1), quantiles).clamp_(max=n - 1)


class IndependenceMH(Sampler):
    """Proposals from q, accepted with probability min(1, exp(beta (Q(a') - Q(a)))) (Tierney 1994)."""

    name = "independence_mh"
    stationary = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        clean, Q, beta = problem.joint.clean, problem.target.Q, problem.lambda_scale

        def log_weight(x: Tensor) -> tuple[Tensor, Tensor]:
            return beta * (Q.b * x[0] - 0.5 * Q.A * x[0].square()), torch.zeros_like(x)

        state = init_state(sample_prior(noise, clean).unsqueeze(0), log_weight)
        for _ in range(problem.settings.mcmc_steps):
            proposal = init_state(sample_prior(noise, clean).unsqueeze(0), log_weight)
            before = state
            state, info = independence_mh(noise, state, proposal, proposal.log_p - state.log_p)
            recorder.record(before.x[0], state.x[0], info.accepted)
        return recorder.draws(state.x[0], refresh(noise, clean, state.x[0]))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.mcmc_steps + 1
        return Cost(prior=n, value=n, refresh=1)


class ULA(Sampler):
    """Unadjusted Langevin steps on the tilted action, from q; biased: variance (1 / tau) / (1 - eta tau / 2)."""

    name = "ula"
    stationary = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        eta = problem.settings.ula_step
        x, score = sample_prior(noise, problem.joint.clean).unsqueeze(0), problem.model.action_score(problem.target)
        for _ in range(problem.settings.mcmc_steps):
            before = x
            x = ula(noise, x, score(x), eta)
            recorder.record(before[0], x[0])
        return recorder.draws(x[0], refresh(noise, problem.joint.clean, x[0]))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.mcmc_steps
        return Cost(prior=1, score=n, value=n, refresh=1)

    def exact_distribution(self) -> Gaussian:
        """See :meth:`Sampler.exact_distribution`."""
        problem = self.problem
        x: Gaussian = problem.joint.clean
        step = ula_transition(problem.target.mu, problem.target.tau, problem.settings.ula_step)
        for _ in range(problem.settings.mcmc_steps):
            x = propagate(x, step)
        return propagate(x, affine.refresh(problem.joint.clean))


def ula_transition(mu: float, tau: float, eta: float, gradient_noise: float = 0.0) -> AffineStep:
    """Return the ULA step of the action on N(mu, 1 / tau), its gradient with noise of variance ``gradient_noise``."""
    A = np.diag([1 - eta * tau, 1.0])
    return AffineStep(A, np.array([eta * tau * mu, 0.0]), np.diag([2 * eta + eta**2 * gradient_noise, 0.0]))


class MALA(Sampler):
    """Metropolis-adjusted Langevin steps on the tilted action, from q (Roberts and Tweedie 1996)."""

    name = "mala"
    stationary = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        target = problem.model.action_target(problem.target)
        eta = problem.settings.mala_step / problem.target.tau
        state: State = init_state(sample_prior(noise, problem.joint.clean).unsqueeze(0), target)
        for _ in range(problem.settings.mcmc_steps):
            before = state
            state, info = mala(noise, state, target, eta)
            recorder.record(before.x[0], state.x[0], info.accepted)
        return recorder.draws(state.x[0], refresh(noise, problem.joint.clean, state.x[0]))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.mcmc_steps + 1
        return Cost(prior=1, score=n, value=n, refresh=1)


class Gibbs(Sampler):
    """s' | a, then a | s' of the tilted joint, whose precision is tau + alpha^2 / sigma_sprime^2."""

    name = "gibbs"
    stationary = True

    @property
    def posterior_precision(self) -> float:
        """Precision of a | s'."""
        joint = self.problem.joint
        return self.problem.target.tau + joint.alpha**2 / joint.sigma_sprime**2

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        joint, target = problem.joint, problem.target
        tau = self.posterior_precision
        a = sample_prior(noise, joint.clean)
        for _ in range(problem.settings.mcmc_steps):
            before = a
            s = refresh(noise, joint.clean, a)
            gain = joint.alpha / joint.sigma_sprime**2 / tau
            a = noise.normal()[0] / math.sqrt(tau) + (s - joint.shift) * gain + target.tau * target.mu / tau
            recorder.record(before, a)
        return recorder.draws(a, refresh(noise, joint.clean, a))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.mcmc_steps
        return Cost(prior=1, score=n, value=n, refresh=n + 1)

    def exact_distribution(self) -> Gaussian:
        """See :meth:`Sampler.exact_distribution`."""
        problem, joint, target = self.problem, self.problem.joint, self.problem.target
        tau = self.posterior_precision
        gain = joint.alpha / joint.sigma_sprime**2 / tau
        draw_action = AffineStep(
            np.array([[0.0, gain], [0.0, 1.0]]),
            np.array([target.tau * target.mu / tau - gain * joint.shift, 0.0]),
            np.diag([1 / tau, 0.0]),
        )
        x: Gaussian = joint.clean
        for _ in range(problem.settings.mcmc_steps):
            x = propagate(propagate(x, affine.refresh(joint.clean)), draw_action)
        return propagate(x, affine.refresh(joint.clean))
