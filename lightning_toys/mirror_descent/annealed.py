"""Corrector samplers annealed over noise levels, noisy to clean: pc_ula, pc_mala, pc_joint_mala.

Correctors are those of Song et al. 2021 (arXiv 2011.13456).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent import affine
from lightning_toys.mirror_descent.action_density import ActionDensity, joint_acceptance, mala_moves
from lightning_toys.mirror_descent.affine import AffineStep, propagate
from lightning_toys.mirror_descent.compiled_kernels import gaussian_mala
from lightning_toys.mirror_descent.grid_distribution import Steps, langevin_distribution
from lightning_toys.mirror_descent.joint import Gaussian, NoiseLevel
from lightning_toys.mirror_descent.kernels import (
    Noise,
    State,
    init_state,
    langevin_proposal,
    mala,
    select,
    select_state,
    ula,
)
from lightning_toys.mirror_descent.model import refresh, sample_prior
from lightning_toys.mirror_descent.problem import Cost
from lightning_toys.mirror_descent.sampler import (
    ChainRecorder,
    Draws,
    Sampler,
    refreshed_moments,
)
from lightning_toys.mirror_descent.tilt import TiltedAction
from lightning_toys.mirror_descent.truth import OneAction
from lightning_toys.training.compiling import kept_compiled


class AnnealedSampler(Sampler):
    """At each level ``action_steps_per_level`` action steps on q_k(a) exp(beta_k Q_k(a)).

    s' | a is drawn exactly before the first of a level's steps, or ``refresh_L`` times spread over them; with
    ``refresh_L`` 0 it stays what it was at the noisiest level. A refresh that nothing reads is neither drawn nor
    counted: MALA on the action knows Q in closed form. Nothing is rescaled from one level to the next. A schedule may
    ask for MALA steps on the clean target at the end.
    """

    family = "annealed"
    annealed = True
    num_traced = 0

    @property
    def final_step(self) -> float:
        """Step size of the final MALA steps."""
        s = self.problem.settings
        return (s.mala_step if s.final_mala_step is None else s.final_mala_step) / self.problem.tilted.tau

    def final_mala(self, noise: Noise, a: Tensor, recorder: ChainRecorder) -> Tensor:
        """Return actions a (d_a, B) after the schedule's final MALA steps on the clean target."""
        tilted, n = self.problem.tilted, self.problem.schedule.final_steps
        if n == 0:
            return a
        target = self.problem.model.action_target(tilted)
        state = init_state(a, target)
        for _ in range(n):
            before = state
            state, info = mala(noise, state, target, self.final_step)
            recorder.record(before.x[0], state.x[0], info.accepted)
        return state.x

    def cost_of_levels(self, score: int, value: int, refreshes: int, at_start: int = 0) -> Cost:
        """Return the cost per sample, given a level's evaluations; final steps and the final refresh are added."""
        n, steps = len(self.problem.tilted_levels), self.problem.schedule.final_steps
        final = steps + 1 if steps else 0
        return Cost(1, n * score + final, n * value + final, n * refreshes + at_start + 1)


class PCULA(AnnealedSampler):
    """ULA steps of fixed size; with a state reward the gradient comes from the mean of M particles of s'.

    The particles enter through their mean only, and s'bar ~ N(rho a + c, v / M) has its distribution at 1 / M of the
    cost. The gradient of Q with s'bar in the place of E[s' | a] has -w rho (s'bar - E[s' | a]) in addition.
    """

    name = "pc_ula"
    unadjusted = True

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, recorder = self.problem.settings, ChainRecorder(self.num_traced, noise.blocks)
        weight = self.problem.reward.state_weight
        model, levels = self.problem.model, self.problem.tilted_levels
        x = model.draw_action(noise, levels[0].level)

        def particle_mean(level: NoiseLevel) -> Tensor:
            return torch.add(noise.normal() * math.sqrt(level.v / s.particles) + level.c, x, alpha=level.rho)

        s_mean = particle_mean(levels[0].level) if weight > 0 and not s.refresh_steps else None
        for tilted in levels:
            level, score = tilted.level, model.action_score(tilted)
            for i in range(s.action_steps_per_level):
                if weight > 0 and i in s.refresh_steps:
                    s_mean = particle_mean(level)
                before, gradient = x, score(x)
                if s_mean is not None:
                    difference = torch.sub(s_mean - level.c, x, alpha=level.rho)
                    gradient.add_(difference, alpha=-tilted.beta * weight * level.rho)
                x = ula(noise, x, gradient, s.ula_step)
                recorder.record(before[0], x[0])
        a = self.final_mala(noise, x, recorder)
        return recorder.draws(a, model.draw_state(noise, self.problem.joint.clean, a))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`: the M particles count."""
        s = self.problem.settings
        particles = s.particles if self.problem.reward.state_weight > 0 else 0
        n, refreshes = s.action_steps_per_level, len(s.refresh_steps)
        return self.cost_of_levels(n, n, refreshes * particles, 0 if refreshes else particles)

    def exact_distribution(self) -> Gaussian | None:
        """See :meth:`Sampler.exact_distribution`; unknown after final MALA steps."""
        if self.problem.schedule.final_steps:
            return None
        s, weight = self.problem.settings, self.problem.reward.state_weight

        def particle_mean(level: NoiseLevel) -> AffineStep:
            step = affine.refresh(level)
            return AffineStep(step.A, step.b, step.D / s.particles)

        first = self.problem.levels[0].level
        x = propagate(first, particle_mean(first))  # of a and s'bar
        for at in self.problem.levels:
            level = at.level
            coupling = s.ula_step * at.beta * weight * level.rho  # of s'bar - rho a - c
            A = np.array([[1 - s.ula_step * at.tau + coupling * level.rho, -coupling], [0.0, 1.0]])
            b = np.array([s.ula_step * at.tau * at.mu + coupling * level.c, 0.0])
            step = AffineStep(A, b, np.diag([2 * s.ula_step, 0.0]))
            for i in range(s.action_steps_per_level):
                if i in s.refresh_steps:
                    x = propagate(x, particle_mean(level))
                x = propagate(x, step)
        return propagate(x, affine.refresh(self.problem.linear_joint.clean))

    def exact_distribution_on_mixtures(self) -> OneAction | None:
        """See :meth:`Sampler.exact_distribution_on_mixtures`: with one action."""
        s, levels = self.problem.settings, self.problem.tilted_levels
        moves = [Steps(at, s.ula_step, s.action_steps_per_level, adjusted=False) for at in levels]
        moves.append(Steps(self.problem.tilted, self.final_step, self.problem.schedule.final_steps))
        return langevin_distribution(self.problem, levels[0].level, moves)


class PCMALA(AnnealedSampler):
    """MALA steps of size ``mala_step`` / tau_k."""

    name = "pc_mala"

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, recorder = self.problem.settings, ChainRecorder(self.num_traced, noise.blocks)
        model, levels = self.problem.model, self.problem.tilted_levels
        x = model.draw_action(noise, levels[0].level)
        if noise.compiled and model.exact:
            a = self.final_mala(noise, self.compiled_steps(noise, x[0], recorder).unsqueeze(0), recorder)
            return recorder.draws(a, model.draw_state(noise, self.problem.joint.clean, a))
        for tilted in levels:
            target = model.action_target(tilted)
            state: State = init_state(x, target)
            for remaining in reversed(range(s.action_steps_per_level)):
                new, info = langevin_proposal(noise, state, target, s.mala_step / tilted.tau)
                # after a level's last step only x is wanted
                x = select(info.accepted, new.x, state.x)
                recorder.record(state.x[0], x[0], info.accepted)
                if remaining:
                    state = select_state(info.accepted, new, state)
        a = self.final_mala(noise, x, recorder)
        return recorder.draws(a, model.draw_state(noise, self.problem.joint.clean, a))

    def compiled_steps(self, noise: Noise, a: Tensor, recorder: ChainRecorder) -> Tensor:
        """Return actions a (B,) after the same steps by compiled code, on the closed form of q."""
        s, step = self.problem.settings, kept_compiled(gaussian_mala)
        rows = [(at.mu, at.tau, math.sqrt(s.mala_step / at.tau / 2)) for at in self.problem.levels]
        for parameters in torch.tensor(rows, dtype=a.dtype, device=a.device):
            for _ in range(s.action_steps_per_level):
                before = a
                a, accepted = step(a, noise.normal()[0], noise.uniform()[0], parameters)
                recorder.record(before, a, accepted)
        return a

    def fast_steps(self) -> int:
        """See :meth:`Sampler.fast_steps`: all but the final ones."""
        return len(self.problem.levels) * self.problem.settings.action_steps_per_level

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.problem.settings.action_steps_per_level + 1
        return self.cost_of_levels(n, n, 0)

    @cached_property
    def density(self) -> ActionDensity:
        """The exact density of the final action, by MALA's transition matrices; a second at the default settings."""
        return self.density_within()

    def density_within(self, points_per_std: float = 20.0, half_width: float = 7.0) -> ActionDensity:
        """Return the exact density of the final action; see :class:`ActionDensity` for the grid."""
        s, target = self.problem.settings, self.problem.target
        moves = [mala_moves(at, s.mala_step / at.tau, s.action_steps_per_level) for at in self.problem.levels]
        moves.append(mala_moves(target, self.final_step, self.problem.schedule.final_steps))
        return ActionDensity(self.problem.levels[0].level, moves, points_per_std, half_width)

    def exact_moments(self) -> dict[str, float]:
        """See :meth:`Sampler.exact_moments`."""
        return refreshed_moments(self.problem, *self.density.solve()) if self.density.known else {}

    def exact_distribution_on_mixtures(self) -> OneAction | None:
        """See :meth:`Sampler.exact_distribution_on_mixtures`: with one action."""
        s, levels = self.problem.settings, self.problem.tilted_levels
        moves = [Steps(at, s.mala_step / at.tau, s.action_steps_per_level) for at in levels]
        moves.append(Steps(self.problem.tilted, self.final_step, self.problem.schedule.final_steps))
        return langevin_distribution(self.problem, levels[0].level, moves)

    def why_unknown(self) -> str:
        """See :meth:`Sampler.why_unknown`."""
        return self.density.why_unknown


class PCJointMALA(AnnealedSampler):
    """MALA steps on (a, u) at once, u = (s' - rho a - c) / sqrt(v): the target is that of a times N(0, 1)."""

    name = "pc_joint_mala"
    linear_only = True

    def step_size(self, tilted: TiltedAction) -> float:
        """Return eta at a level: u has precision 1, whatever a's is."""
        return self.problem.settings.mala_step / max(tilted.tau, 1.0)

    @property
    def refreshes_last(self) -> bool:
        """Whether s' | a is drawn at the end: final MALA steps move a away from s'."""
        return self.problem.settings.final_refresh or self.problem.schedule.final_steps > 0

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, recorder = self.problem.settings, ChainRecorder(self.num_traced, noise.blocks)
        first = self.problem.levels[0].level
        a = sample_prior(noise, first)
        state_next = a if s.refresh_steps else refresh(noise, first, a)
        for tilted in self.problem.levels:
            level, eta = tilted.level, self.step_size(tilted)
            target, state = self.problem.model.joint_target(tilted), None
            for i in range(s.action_steps_per_level):
                if i in s.refresh_steps:
                    a = a if state is None else state.x[0]
                    state_next, state = refresh(noise, level, a), None
                if state is None:
                    u = (state_next - level.rho * a - level.c) / math.sqrt(level.v)
                    state = init_state(torch.stack([a, u]), target)
                before = state
                state, info = mala(noise, state, target, eta)
                recorder.record(before.x[0], state.x[0], info.accepted)
            assert state is not None
            a, u = state.x
            state_next = u * math.sqrt(level.v) + level.rho * a + level.c
        if self.problem.schedule.final_steps:
            a = self.final_mala(noise, a.unsqueeze(0), recorder)[0]
        if self.refreshes_last:
            state_next = refresh(noise, self.problem.linear_joint.clean, a)
        return recorder.draws(a, state_next)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        s = self.problem.settings
        refreshes = len(s.refresh_steps)
        n = s.action_steps_per_level + max(1, refreshes)  # a refresh has the density evaluated anew
        cost = self.cost_of_levels(n, n, refreshes, 0 if refreshes else 1)
        return cost if self.refreshes_last else cost._replace(refresh=cost.refresh - 1)

    @cached_property
    def density(self) -> ActionDensity:
        """The exact density of the final action where s' is drawn anew before every step: u is then standard normal."""
        s, target, moves = self.problem.settings, self.problem.target, []
        for at in self.problem.levels:
            eta = self.step_size(at)
            moves.append(mala_moves(at, eta, s.action_steps_per_level, joint_acceptance(eta)))
        moves.append(mala_moves(target, self.final_step, self.problem.schedule.final_steps))
        return ActionDensity(self.problem.levels[0].level, moves)

    def exact_moments(self) -> dict[str, float]:
        """See :meth:`Sampler.exact_moments`: known where a refresh goes before every action step."""
        s = self.problem.settings
        if s.refresh_L < s.action_steps_per_level or not self.density.known:
            return {"slope": self.problem.linear_joint.alpha, "cond_ratio": 1.0} if self.refreshes_last else {}
        found = refreshed_moments(self.problem, *self.density.solve())
        return found if self.refreshes_last else {k: found[k] for k in ("mean", "var")}

    def why_unknown(self) -> str:
        """See :meth:`Sampler.why_unknown`."""
        s = self.problem.settings
        if s.refresh_L < s.action_steps_per_level:
            return "the action's exact density is known with a refresh before every action step only"
        return self.density.why_unknown
