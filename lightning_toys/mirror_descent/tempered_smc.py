"""Tempered sequential Monte Carlo at the clean level: the tilt grows step by step, and MALA moves the particles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lightning_toys.errors import REPEATS, bounded
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise, init_state, mala
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.resampling import Resampling, Systematic
from lightning_toys.mirror_descent.sampler import Draws, Sampler
from lightning_toys.mirror_descent.samplers import z_check


class TemperedSMC(Sampler):
    """Particles of q(a) exp(lambda_t Q(a)), lambda_t even from 0 to lambda in ``smc_K`` steps (Del Moral et al. 2006).

    At each step weights take exp((lambda_t - lambda_(t - 1)) Q(a)); the particles are resampled when their effective
    sample size falls below ``ess_threshold`` of ``smc_particles``, and moved by MALA. s' is drawn given the action at
    the end. Exact as the particles grow, and unbiased in Z; without resampling it is annealed importance sampling (Neal
    2001).

    ``extra`` has each run's ``log_z``, final ``ess_fraction`` and number of resamplings, ``resampled``.

    Args:
        problem: the sampling problem.
        moves: MALA steps at each temperature.
        resampling: the scheme's class.

    Raises:
        ToyError: ``moves`` is out of bounds.
    """

    name = "smc_tempered"
    family = "tempered SMC"
    num_traced = 0
    exact_in_the_limit = True
    whole_groups = True

    def __init__(self, problem: Problem, moves: int = 1, resampling: Callable[[], Resampling] = Systematic) -> None:
        super().__init__(problem)
        bounded("--model.samplers: TemperedSMC's moves", moves, 0, REPEATS)
        self.moves, self.resampling, self.group = moves, resampling(), problem.settings.smc_particles
        self.temperatures = problem.settings.smc_K

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`: a block holds BLOCK_SIZE / smc_particles independent runs."""
        problem, s = self.problem, self.problem.settings
        model, clean, d = problem.model, problem.joint.clean, problem.joint.action_dim
        n, runs = s.smc_particles, noise.blocks * (BLOCK_SIZE // s.smc_particles)
        a = model.draw_action(noise, clean)
        log_w = torch.zeros(runs, n, dtype=torch.float64, device=a.device)
        log_z, resampled = torch.zeros(runs, dtype=torch.float64, device=a.device), torch.zeros(runs)
        own, before = torch.arange(n, device=a.device), model.tilt(clean, problem.reward, 0.0)
        for t in range(1, self.temperatures + 1):
            now = model.tilt(clean, problem.reward, problem.lambda_scale * t / self.temperatures)
            wide = a.double()
            log_w = log_w + (now.log_weight(wide) - before.log_weight(wide)).view(runs, n)
            log_z = log_z + now.log_weight_offset - before.log_weight_offset
            weight = torch.softmax(log_w, -1)
            low = 1 / (weight.square().sum(-1) * n) < s.ess_threshold
            uniform = self.resampling.uniforms(noise, runs, n)
            if bool(low.any()):
                resampled += low.cpu()
                kept = torch.where(low[:, None], self.resampling.indices(weight, uniform), own)
                a = a.view(d, runs, n).gather(2, kept.expand(d, runs, n)).flatten(1)
                log_z = torch.where(low, log_z + torch.logsumexp(log_w, -1) - math.log(n), log_z)
                log_w = torch.where(low[:, None], torch.zeros_like(log_w), log_w)
            target, before = model.action_target(now), now
            state = init_state(a, target)
            for _ in range(self.moves):
                state, _ = mala(noise, state, target, s.mala_step / now.tau)
            a = state.x
        log_z = log_z + torch.logsumexp(log_w, -1) - math.log(n)
        weight = torch.softmax(log_w, -1)
        kept = self.resampling.indices(weight, self.resampling.uniforms(noise, runs, n))
        a = a.view(d, runs, n).gather(2, kept.expand(d, runs, n)).flatten(1)
        extra = {
            "log_z": log_z.tolist(),
            "ess_fraction": (1 / (weight.square().sum(-1) * n)).tolist(),
            "resampled": resampled.tolist(),
        }
        return Draws(without_rows(a), without_rows(model.draw_state(noise, clean, a)), extra=extra)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        evaluations = self.temperatures * (self.moves + 1)
        return Cost(prior=1, score=evaluations, value=evaluations, refresh=1)

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """See :meth:`Sampler.own_checks`: Z."""
        return [z_check(self, samples)]
