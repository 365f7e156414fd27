"""Corrector samplers annealed over noise levels, noisy to clean: pc_ula, pc_mala, pc_joint_mala.

Correctors are those of Song et al. 2021 (arXiv 2011.13456).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent import affine
from lightning_toys.mirror_descent.affine import propagate
from lightning_toys.mirror_descent.compiled_kernels import gaussian_mala
from lightning_toys.mirror_descent.joint import Gaussian
from lightning_toys.mirror_descent.kernels import (
    Noise,
    State,
    init_state,
    langevin_proposal,
    mala,
    mala_transition_matrix,
    select,
    select_state,
    ula,
)
from lightning_toys.mirror_descent.problem import Cost
from lightning_toys.mirror_descent.samplers import (
    ChainRecorder,
    Draws,
    Sampler,
    refresh,
    sample_prior,
    ula_transition,
)
from lightning_toys.mirror_descent.tilt import TiltedAction
from lightning_toys.training.compiling import kept_compiled


class AnnealedSampler(Sampler):
    """At each level ``refresh_L`` rounds: s' | a drawn exactly, then action steps on q_k(a) exp(beta_k Q_k(a)).

    A refresh that nothing reads is neither drawn nor counted: MALA on the action knows Q in closed form.
    Nothing is rescaled from one level to the next. A schedule may ask for MALA steps on the clean target at the end.
    """

    num_traced = 0

    @property
    def rounds(self) -> list[TiltedAction]:
        """The tilted distribution of each round, level by level."""
        return [tilted for tilted in self.problem.levels for _ in range(max(1, self.problem.settings.refresh_L))]

    def final_mala(self, noise: Noise, a: Tensor, recorder: ChainRecorder) -> Tensor:
        """Return actions a (B,) after the schedule's final MALA steps on the clean target."""
        tilted, n = self.problem.target, self.problem.schedule.final_steps
        if n == 0:
            return a
        target, eta = self.problem.model.action_target(tilted), self.problem.settings.mala_step / tilted.tau
        state = init_state(a.unsqueeze(0), target)
        for _ in range(n):
            before = state
            state, info = mala(noise, state, target, eta)
            recorder.record(before.x[0], state.x[0], info.accepted)
        return state.x[0]

    def cost_of_rounds(self, score: int, value: int, refreshes: int) -> Cost:
        """Return the cost per sample, given a round's evaluations; final steps and the final refresh are added."""
        n, steps = len(self.rounds), self.problem.schedule.final_steps
        final = steps + 1 if steps else 0
        return Cost(1, n * score + final, n * value + final, n * refreshes + 1)


class PCULA(AnnealedSampler):
    """ULA steps of fixed size; with a state reward the gradient comes from the mean of M particles of s'.

    The particles enter through their mean only, and s'bar ~ N(rho a + c, v / M) has its distribution at 1 / M of the
    cost.
    """

    name = "pc_ula"

    def gradient_noise_variance(self, tilted: TiltedAction) -> float:
        """Return the variance that the particles give the gradient."""
        w = self.problem.reward.state_weight
        return (tilted.beta * w * tilted.level.rho) ** 2 * tilted.level.v / self.problem.settings.particles

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, recorder = self.problem.settings, ChainRecorder(self.num_traced, noise.blocks)
        x = sample_prior(noise, self.problem.levels[0].level).unsqueeze(0)
        for tilted in self.rounds:
            noise_std, score = math.sqrt(self.gradient_noise_variance(tilted)), self.problem.model.action_score(tilted)
            for _ in range(s.action_steps_per_level):
                before, gradient = x, score(x)
                if noise_std > 0:
                    gradient.add_(noise.normal(), alpha=noise_std)
                x = ula(noise, x, gradient, s.ula_step)
                recorder.record(before[0], x[0])
        a = self.final_mala(noise, x[0], recorder)
        return recorder.draws(a, refresh(noise, self.problem.joint.clean, a))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`: the M particles count."""
        s = self.problem.settings
        particles = s.particles if self.problem.reward.state_weight > 0 else 0
        n = s.action_steps_per_level
        return self.cost_of_rounds(n, n, n * particles)

    def exact_distribution(self) -> Gaussian | None:
        """See :meth:`Sampler.exact_distribution`; unknown after final MALA steps."""
        if self.problem.schedule.final_steps:
            return None
        x: Gaussian = self.problem.levels[0].level
        for at in self.rounds:
            step = ula_transition(at.mu, at.tau, self.problem.settings.ula_step, self.gradient_noise_variance(at))
            for _ in range(self.problem.settings.action_steps_per_level):
                x = propagate(x, step)
        return propagate(x, affine.refresh(self.problem.joint.clean))


class PCMALA(AnnealedSampler):
    """MALA steps of size ``mala_step`` / tau_k."""

    name = "pc_mala"

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, recorder = self.problem.settings, ChainRecorder(self.num_traced, noise.blocks)
        x = sample_prior(noise, self.problem.levels[0].level).unsqueeze(0)
        if noise.compiled and self.problem.model.exact:
            a = self.final_mala(noise, self.compiled_steps(noise, x[0], recorder), recorder)
            return recorder.draws(a, refresh(noise, self.problem.joint.clean, a))
        for tilted in self.rounds:
            target = self.problem.model.action_target(tilted)
            state: State = init_state(x, target)
            for remaining in reversed(range(s.action_steps_per_level)):
                new, info = langevin_proposal(noise, state, target, s.mala_step / tilted.tau)
                # after a level's last step only x is wanted
                x = select(info.accepted, new.x, state.x)
                recorder.record(state.x[0], x[0], info.accepted)
                if remaining:
                    state = select_state(info.accepted, new, state)
        a = self.final_mala(noise, x[0], recorder)
        return recorder.draws(a, refresh(noise, self.problem.joint.clean, a))

    def compiled_steps(self, noise: Noise, a: Tensor, recorder: ChainRecorder) -> Tensor:
        """Return actions a (B,) after the same steps by compiled code, on the closed form of q."""
        s, step = self.problem.settings, kept_compiled(gaussian_mala)
        rows = [(at.mu, at.tau, math.sqrt(s.mala_step / at.tau / 2)) for at in self.rounds]
        for parameters in torch.tensor(rows, dtype=a.dtype, device=a.device):
            for _ in range(s.action_steps_per_level):
                before = a
                a, accepted = step(a, noise.normal()[0], noise.uniform()[0], parameters)
                recorder.record(before, a, accepted)
        return a

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.action_steps_per_level + 1
        return self.cost_of_rounds(n, n, 0)

    def action_density(self, points_per_std: float = 40.0, half_width: float = 7.0) -> tuple[np.ndarray, np.ndarray]:
        """Return a grid (n,) and the exact density of the final action on it (n,), by MALA's transition matrices.

        Accurate to the grid's quadrature; some seconds a call at the default settings.

        Args:
            points_per_std: points to a standard deviation of the narrowest target.
            half_width: standard deviations of every level's target that the grid covers.
        """
        s, target = self.problem.settings, self.problem.target
        first = self.problem.levels[0].level
        covered = [(float(first.m[0]), math.sqrt(float(first.C[0, 0])))]
        covered += [(at.mu, 1 / math.sqrt(at.tau)) for at in [*self.problem.levels, target]]
        low, high = (pick(m + k * half_width * std for m, std in covered) for pick, k in ((min, -1), (max, 1)))
        points = min(4001, max(801, 1 + round((high - low) / min(std for _, std in covered) * points_per_std)))
        grid = np.linspace(low, high, points)
        p = np.exp(-0.5 * np.square(grid - first.m[0]) / first.C[0, 0])
        p /= p.sum()
        plan = [(at, s.action_steps_per_level * max(1, s.refresh_L)) for at in self.problem.levels]
        for at, steps in [*plan, (target, self.problem.schedule.final_steps)]:
            if steps == 0:
                continue
            gradient = (at.mu - grid) * at.tau
            P = mala_transition_matrix(grid, 0.5 * (grid - at.mu) * gradient, gradient, s.mala_step / at.tau)
            for _ in range(steps):
                p = p @ P
        return grid, p / (p.sum() * (grid[1] - grid[0]))


class PCJointMALA(AnnealedSampler):
    """MALA steps on (a, u) at once, u = (s' - rho a - c) / sqrt(v): the target is that of a times N(0, 1)."""

    name = "pc_joint_mala"

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, recorder = self.problem.settings, ChainRecorder(self.num_traced, noise.blocks)
        first = self.problem.levels[0].level
        a = sample_prior(noise, first)
        state_next = refresh(noise, first, a)
        for tilted in self.rounds:
            level = tilted.level
            if s.refresh_L > 0:
                state_next = refresh(noise, level, a)
            u = (state_next - level.rho * a - level.c) / math.sqrt(level.v)
            target = self.problem.model.joint_target(tilted)
            state = init_state(torch.stack([a, u]), target)
            # u has precision 1, whatever a's is
            eta = s.mala_step / max(tilted.tau, 1.0)
            for _ in range(s.action_steps_per_level):
                before = state
                state, info = mala(noise, state, target, eta)
                recorder.record(before.x[0], state.x[0], info.accepted)
            a, u = state.x
            state_next = u * math.sqrt(level.v) + level.rho * a + level.c
        if self.problem.schedule.final_steps:
            a = self.final_mala(noise, a, recorder)
        if s.final_refresh or self.problem.schedule.final_steps:  # which moved a away from s'
            state_next = refresh(noise, self.problem.joint.clean, a)
        return recorder.draws(a, state_next)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        s = self.problem.settings
        n = s.action_steps_per_level + 1
        cost = self.cost_of_rounds(n, n, min(s.refresh_L, 1))
        refreshes_last = s.final_refresh or self.problem.schedule.final_steps > 0
        return cost if refreshes_last else cost._replace(refresh=cost.refresh - 1)
