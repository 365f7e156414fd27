"""Samplers at the clean level: importance resampling, independence-MH, ULA, MALA, Gibbs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent import affine
from lightning_toys.mirror_descent.action_density import ActionDensity, independence_moves, mala_moves
from lightning_toys.mirror_descent.affine import AffineStep, propagate
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample, check_mean, lag_one_autocorrelation
from lightning_toys.mirror_descent.grid_distribution import Steps, independence_distribution, langevin_distribution
from lightning_toys.mirror_descent.joint import Gaussian
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise, State, independence_mh, init_state, mala, ula
from lightning_toys.mirror_descent.model import refresh, sample_prior
from lightning_toys.mirror_descent.particle_groups import SKEWED, group_estimates, too_skewed
from lightning_toys.mirror_descent.problem import Cost
from lightning_toys.mirror_descent.resampling import systematic_resampling
from lightning_toys.mirror_descent.sampler import (
    ChainRecorder,
    Draws,
    PairRecorder,
    Sampler,
    refreshed_moments,
)
from lightning_toys.mirror_descent.truth import OneAction

IMPORTANCE_GROUP = 2**12  # draws that are resampled together by their importance weights


class Importance(Sampler):
    """Draws from q resampled with weights exp(beta Q), systematically in groups of 4096; exact as a group grows.

    ``extra`` has each group's ``ess_fraction`` and ``log_z``, the log of its unbiased estimate of Z.
    """

    name = "importance"
    family = "plain"
    group = IMPORTANCE_GROUP
    num_traced = 0
    reads_score = False
    exact_in_the_limit = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        model, clean, tilted = self.problem.model, self.problem.joint.clean, self.problem.tilted
        a = model.draw_action(noise, clean)
        s = model.draw_state(noise, clean, a)
        # a weight is the exponential of a difference of large numbers
        log_w = tilted.log_weight(a.double()).view(-1, IMPORTANCE_GROUP)
        weight = torch.softmax(log_w, -1)
        kept = systematic_resampling(weight, noise.uniforms_of_groups(BLOCK_SIZE // IMPORTANCE_GROUP))
        kept = (kept + IMPORTANCE_GROUP * torch.arange(len(kept), device=kept.device)[:, None]).ravel()
        log_z = torch.logsumexp(log_w, -1) - math.log(IMPORTANCE_GROUP) + tilted.log_weight_offset
        extra = {
            "ess_fraction": (1 / (weight.square().sum(-1) * IMPORTANCE_GROUP)).tolist(),
            "log_z": log_z.tolist(),
        }
        pairs = PairRecorder(self.num_traced, noise.blocks)
        pairs.record(a[0], s[0])
        a, s = a[:, kept], s[:, kept]
        pairs.record(a[0], s[0])
        return Draws(without_rows(a), without_rows(s), *pairs.traces(), extra=extra)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        return Cost(prior=1, value=1, refresh=1)

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """See :meth:`Sampler.own_checks`: the weights' effective sample size, and Z."""
        ess = [v for x in samples for v in (x.extra or {})["ess_fraction"]]
        wanted = self.problem.tilted.importance_ess_fraction
        return [check_mean(self.name, "ess_fraction", wanted, ess), z_check(self, samples)]


def z_check(sampler: Sampler, samples: Sequence[Sample]) -> ClosedFormCheck:
    """Return the check that the estimates of Z, ``log_z`` of each group, are unbiased.

    Where a few of them are by far the largest, a t-test of their mean does not hold: such values are missed more easily
    than met too often. Then a mean below Z is not tested (``exact`` is NaN); one above it is.
    """
    found = group_estimates(samples, sampler.problem.tilted.log_z)
    check = check_mean(sampler.name, "Z / exact Z", 1.0, list(found))
    missed = too_skewed(found) and check.estimate < 1
    return replace(check, exact=math.nan, source=SKEWED) if missed else check


class IndependenceMH(Sampler):
    """Proposals from q, accepted with probability min(1, exp(beta (Q(a') - Q(a)))) (Tierney 1994)."""

    name = "independence_mh"
    family = "plain"
    stationary = True
    reads_score = False

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        model, clean, tilted = problem.model, problem.joint.clean, problem.tilted

        def log_weight(x: Tensor) -> tuple[Tensor, Tensor]:
            return tilted.log_weight(x), torch.zeros_like(x)

        state = init_state(model.draw_action(noise, clean), log_weight)
        for _ in range(problem.settings.mcmc_steps):
            proposal = init_state(model.draw_action(noise, clean), log_weight)
            before = state
            state, info = independence_mh(noise, state, proposal, proposal.log_p - state.log_p)
            recorder.record(before.x[0], state.x[0], info.accepted)
        return recorder.draws(state.x, model.draw_state(noise, clean, state.x))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.mcmc_steps + 1
        return Cost(prior=n, value=n, refresh=1)

    @cached_property
    def density(self) -> ActionDensity:
        """The exact density of the action after the last step, by its transition matrix."""
        problem, steps = self.problem, self.problem.settings.mcmc_steps
        return ActionDensity(
            problem.linear_joint.clean, [independence_moves(problem.linear_joint.clean, problem.target, steps)]
        )

    def exact_moments(self) -> dict[str, float]:
        """See :meth:`Sampler.exact_moments`."""
        return refreshed_moments(self.problem, *self.density.solve()) if self.density.known else {}

    def exact_distribution_on_mixtures(self) -> OneAction | None:
        """See :meth:`Sampler.exact_distribution_on_mixtures`: with one action."""
        return independence_distribution(self.problem, self.problem.settings.mcmc_steps)

    def why_unknown(self) -> str:
        """See :meth:`Sampler.why_unknown`."""
        return self.density.why_unknown


class ULA(Sampler):
    """Unadjusted Langevin steps on the tilted action, from q; biased: variance (1 / tau) / (1 - eta tau / 2)."""

    name = "ula"
    family = "plain"
    stationary = True
    unadjusted = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        model, clean, eta = problem.model, problem.joint.clean, problem.settings.ula_step
        x, score = model.draw_action(noise, clean), model.action_score(problem.tilted)
        for _ in range(problem.settings.mcmc_steps):
            before = x
            x = ula(noise, x, score(x), eta)
            recorder.record(before[0], x[0])
        return recorder.draws(x, model.draw_state(noise, clean, x))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.mcmc_steps
        return Cost(prior=1, score=n, value=n, refresh=1)

    def exact_distribution(self) -> Gaussian:
        """See :meth:`Sampler.exact_distribution`."""
        problem = self.problem
        x: Gaussian = problem.linear_joint.clean
        step = ula_transition(problem.target.mu, problem.target.tau, problem.settings.ula_step)
        for _ in range(problem.settings.mcmc_steps):
            x = propagate(x, step)
        return propagate(x, affine.refresh(problem.linear_joint.clean))

    def exact_distribution_on_mixtures(self) -> OneAction | None:
        """See :meth:`Sampler.exact_distribution_on_mixtures`: with one action."""
        s = self.problem.settings
        steps = Steps(self.problem.tilted, s.ula_step, s.mcmc_steps, adjusted=False)
        return langevin_distribution(self.problem, self.problem.joint.clean, [steps])


def ula_transition(mu: float, tau: float, eta: float, gradient_noise: float = 0.0) -> AffineStep:
    """Return the ULA step of the action on N(mu, 1 / tau), its gradient with noise of variance ``gradient_noise``."""
    A = np.diag([1 - eta * tau, 1.0])
    return AffineStep(A, np.array([eta * tau * mu, 0.0]), np.diag([2 * eta + eta**2 * gradient_noise, 0.0]))


class MALA(Sampler):
    """Metropolis-adjusted Langevin steps on the tilted action, from q (Roberts and Tweedie 1996)."""

    name = "mala"
    family = "plain"
    stationary = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        model, clean = problem.model, problem.joint.clean
        target = model.action_target(problem.tilted)
        eta = problem.settings.mala_step / problem.tilted.tau
        state: State = init_state(model.draw_action(noise, clean), target)
        for _ in range(problem.settings.mcmc_steps):
            before = state
            state, info = mala(noise, state, target, eta)
            recorder.record(before.x[0], state.x[0], info.accepted)
        return recorder.draws(state.x, model.draw_state(noise, clean, state.x))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.mcmc_steps + 1
        return Cost(prior=1, score=n, value=n, refresh=1)

    @cached_property
    def density(self) -> ActionDensity:
        """The exact density of the action after the last step, by its transition matrix."""
        s, target = self.problem.settings, self.problem.target
        return ActionDensity(
            self.problem.linear_joint.clean, [mala_moves(target, s.mala_step / target.tau, s.mcmc_steps)]
        )

    def exact_moments(self) -> dict[str, float]:
        """See :meth:`Sampler.exact_moments`."""
        return refreshed_moments(self.problem, *self.density.solve()) if self.density.known else {}

    def exact_distribution_on_mixtures(self) -> OneAction | None:
        """See :meth:`Sampler.exact_distribution_on_mixtures`: with one action."""
        s, tilted = self.problem.settings, self.problem.tilted
        return langevin_distribution(
            self.problem, self.problem.joint.clean, [Steps(tilted, s.mala_step / tilted.tau, s.mcmc_steps)]
        )

    def why_unknown(self) -> str:
        """See :meth:`Sampler.why_unknown`."""
        return self.density.why_unknown


class Gibbs(Sampler):
    """s' | a, then a | s' of the tilted joint, whose precision is tau + alpha^2 / sigma_sprime^2."""

    name = "gibbs"
    family = "plain"
    stationary = True
    reads_score = False
    linear_only = True

    @property
    def posterior_precision(self) -> float:
        """Precision of a | s'."""
        joint = self.problem.linear_joint
        return self.problem.target.tau + joint.alpha**2 / joint.sigma_sprime**2

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem, recorder = self.problem, ChainRecorder(self.num_traced, noise.blocks)
        joint, target = problem.linear_joint, problem.target
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
        problem, joint, target = self.problem, self.problem.linear_joint, self.problem.target
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

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """See :meth:`Sampler.own_checks`: the chain's autocorrelation at lag 1."""
        precision = (
            self.problem.linear_joint.alpha**2 / self.problem.linear_joint.sigma_sprime**2
        )  # of s' as an observation of a
        found = [v for x in samples if x.trace is not None for v in lag_one_autocorrelation(x.trace)]
        wanted = precision / (self.problem.target.tau + precision)
        return [check_mean(self.name, "lag-1 autocorrelation", wanted, found)]
