"""Corrector samplers over noise levels, noisy to clean: pc_ula, pc_mala, pc_joint_mala."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent import affine
from lightning_toys.mirror_descent.affine import Law
from lightning_toys.mirror_descent.fused import gaussian_mala
from lightning_toys.mirror_descent.kernels import (
    Noise,
    State,
    choose,
    langevin_proposal,
    mala,
    mala_matrix,
    select,
    start,
    ula,
)
from lightning_toys.mirror_descent.problem import Cost
from lightning_toys.mirror_descent.samplers import Draws, Sampler, Watch, from_prior, langevin, refresh
from lightning_toys.mirror_descent.tilt import Tilted
from lightning_toys.training.compiling import kept_compiled


class Annealed(Sampler):
    """At each level ``refresh_L`` rounds: s' | a drawn exactly, then action steps on q_k(a) exp(beta_k Q_k(a)).

    A refresh that nothing reads is neither made nor counted: MALA on the action knows Q in closed form.
    Nothing is rescaled from one level to the next. A schedule may ask for MALA steps on the clean target at the end.
    """

    watched = 0

    @property
    def rounds(self) -> list[Tilted]:
        """The law of each round, level by level."""
        return [law for law in self.world.levels for _ in range(max(1, self.world.settings.refresh_L))]

    def correct(self, noise: Noise, a: Tensor, watch: Watch) -> Tensor:
        """Take the schedule's final steps."""
        target, n = self.world.target, self.world.schedule.final_steps
        if n == 0:
            return a
        law, eta = self.world.model.action(target), self.world.settings.mala_step / target.tau
        state = start(a.unsqueeze(0), law)
        for _ in range(n):
            before = state
            state, info = mala(noise, state, law, eta)
            watch.note(before.x[0], state.x[0], info.accepted)
        return state.x[0]

    def cost_of(self, score: int, value: int, refreshes: int) -> Cost:
        """Return the cost of each round's evaluations, with the final steps and the final refresh."""
        n, steps = len(self.rounds), self.world.schedule.final_steps
        more = steps + 1 if steps else 0
        return Cost(1, n * score + more, n * value + more, n * refreshes + 1)


class PCULA(Annealed):
    """ULA steps of fixed size; with a state reward the gradient comes from the mean of M particles of s'.

    The particles enter through their mean only, and s'bar ~ N(rho a + c, v / M) has its law at 1 / M of the cost.
    """

    name = "pc_ula"

    def noise_variance(self, law: Tilted) -> float:
        """Return the variance that the particles give the gradient."""
        w = self.world.reward.state_weight
        return (law.beta * w * law.level.rho) ** 2 * law.level.v / self.world.settings.particles

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, watch = self.world.settings, Watch(self.watched, noise.blocks)
        x = from_prior(noise, self.world.levels[0].level).unsqueeze(0)
        for law in self.rounds:
            spread, pull = math.sqrt(self.noise_variance(law)), self.world.model.pull(law)
            for _ in range(s.action_steps_per_level):
                before, gradient = x, pull(x)
                if spread > 0:
                    gradient.add_(noise.normal(), alpha=spread)
                x = ula(noise, x, gradient, s.ula_step)
                watch.note(before[0], x[0])
        a = self.correct(noise, x[0], watch)
        return watch.draws(a, refresh(noise, self.world.joint.clean, a))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`: the M particles count."""
        s = self.world.settings
        particles = s.particles if self.world.reward.state_weight > 0 else 0
        n = s.action_steps_per_level
        return self.cost_of(n, n, n * particles)

    def law(self) -> Law | None:
        """See :meth:`Sampler.law`."""
        if self.world.schedule.final_steps:
            return None
        first = self.world.levels[0].level
        law = Law(first.m, first.C)
        for at in self.rounds:
            step = langevin(at.mu, at.tau, self.world.settings.ula_step, self.noise_variance(at))
            for _ in range(self.world.settings.action_steps_per_level):
                law = law.after(step)
        return law.after(affine.refresh(self.world.joint.clean))


class PCMALA(Annealed):
    """MALA steps of size ``mala_step`` / tau_k."""

    name = "pc_mala"

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, watch = self.world.settings, Watch(self.watched, noise.blocks)
        x = from_prior(noise, self.world.levels[0].level).unsqueeze(0)
        if noise.compiled and self.world.model.exact:
            a = self.correct(noise, self.leap(noise, x[0], watch), watch)
            return watch.draws(a, refresh(noise, self.world.joint.clean, a))
        for at in self.rounds:
            law = self.world.model.action(at)
            state: State = start(x, law)
            for more in reversed(range(s.action_steps_per_level)):
                new, info = langevin_proposal(noise, state, law, s.mala_step / at.tau)
                # after a level's last step nothing but the place is wanted
                x = select(info.accepted, new.x, state.x)
                watch.note(state.x[0], x[0], info.accepted)
                if more:
                    state = choose(info.accepted, new, state)
        a = self.correct(noise, x[0], watch)
        return watch.draws(a, refresh(noise, self.world.joint.clean, a))

    def leap(self, noise: Noise, a: Tensor, watch: Watch) -> Tensor:
        """Take the same steps by compiled code, for the exact law."""
        s, step = self.world.settings, kept_compiled(gaussian_mala)
        rows = [(at.mu, at.tau, math.sqrt(s.mala_step / at.tau / 2)) for at in self.rounds]
        for numbers in torch.tensor(rows, dtype=a.dtype, device=a.device):
            for _ in range(s.action_steps_per_level):
                before = a
                a, accepted = step(a, noise.normal()[0], noise.uniform()[0], numbers)
                watch.note(before, a, accepted)
        return a

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = self.world.settings.action_steps_per_level + 1
        return self.cost_of(n, n, 0)

    def density(self, fineness: float = 40.0, half_width: float = 7.0) -> tuple[np.ndarray, np.ndarray]:
        """Return a grid and the exact density of the final action on it, by carrying MALA's matrix through the levels.

        Accurate to the grid's quadrature; some seconds a call at the default settings.

        Args:
            fineness: points to a standard deviation of the narrowest law.
            half_width: standard deviations of every law that the grid covers.
        """
        s, target = self.world.settings, self.world.target
        first = self.world.levels[0].level
        laws = [(float(first.m[0]), math.sqrt(float(first.C[0, 0])))]
        laws += [(at.mu, 1 / math.sqrt(at.tau)) for at in [*self.world.levels, target]]
        low, high = (pick(m + k * half_width * std for m, std in laws) for pick, k in ((min, -1), (max, 1)))
        points = min(4001, max(801, 1 + round((high - low) / min(std for _, std in laws) * fineness)))
        grid = np.linspace(low, high, points)
        p = np.exp(-0.5 * np.square(grid - first.m[0]) / first.C[0, 0])
        p /= p.sum()
        plan = [(at, s.action_steps_per_level * max(1, s.refresh_L)) for at in self.world.levels]
        for at, steps in [*plan, (target, self.world.schedule.final_steps)]:
            if steps == 0:
                continue
            gradient = (at.mu - grid) * at.tau
            P = mala_matrix(grid, 0.5 * (grid - at.mu) * gradient, gradient, s.mala_step / at.tau)
            for _ in range(steps):
                p = p @ P
        return grid, p / (p.sum() * (grid[1] - grid[0]))


class PCJointMALA(Annealed):
    """MALA steps on (a, u) at once, u = (s' - rho a - c) / sqrt(v), whose tilted law is that of a times N(0, 1)."""

    name = "pc_joint_mala"

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, watch, first = self.world.settings, Watch(self.watched, noise.blocks), self.world.levels[0].level
        a = from_prior(noise, first)
        state_next = refresh(noise, first, a)
        for at in self.rounds:
            level = at.level
            if s.refresh_L > 0:
                state_next = refresh(noise, level, a)
            u = (state_next - level.rho * a - level.c) / math.sqrt(level.v)
            law = self.world.model.joint(at)
            state = start(torch.stack([a, u]), law)
            # u has precision 1, whatever a's is
            eta = s.mala_step / max(at.tau, 1.0)
            for _ in range(s.action_steps_per_level):
                before = state
                state, info = mala(noise, state, law, eta)
                watch.note(before.x[0], state.x[0], info.accepted)
            a, u = state.x
            state_next = u * math.sqrt(level.v) + level.rho * a + level.c
        if self.world.schedule.final_steps:
            a = self.correct(noise, a, watch)
        if s.final_refresh or self.world.schedule.final_steps:  # which moved a away from s'
            state_next = refresh(noise, self.world.joint.clean, a)
        return watch.draws(a, state_next)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        s = self.world.settings
        n = s.action_steps_per_level + 1
        cost = self.cost_of(n, n, min(s.refresh_L, 1))
        last = s.final_refresh or self.world.schedule.final_steps > 0
        return cost if last else cost._replace(refresh=cost.refresh - 1)
