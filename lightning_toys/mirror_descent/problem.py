"""What every sampler is given: the joint distribution, the reward, the schedule, and how much work it may do."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from lightning_toys.errors import MOST, REPEATS, bounded, require
from lightning_toys.mirror_descent.joint import Joint, NoiseLevel
from lightning_toys.mirror_descent.model import ExactModel, JointModel
from lightning_toys.mirror_descent.schedules import Schedule
from lightning_toys.mirror_descent.tilt import Reward, TiltedAction, tilt
from lightning_toys.training.compiling import check_compiler


class Cost(NamedTuple):
    """Evaluations per sample, counted alike for all samplers.

    Attributes:
        prior: draws of q(a).
        score: evaluations of the model's score or density.
        value: evaluations of Q, its gradient included.
        refresh: draws of s' | a.
    """

    prior: int = 0
    score: int = 0
    value: int = 0
    refresh: int = 0

    @property
    def total(self) -> int:
        """Sum of the four counts."""
        return self.prior + self.score + self.value + self.refresh


@dataclass(frozen=True)
class Settings:
    """How much work the samplers do.

    Args:
        K: noise levels of the annealed samplers, abar even from ``abar_min`` to 1.
        abar_min: abar of the noisiest level, in (0, 1).
        refresh_L: rounds a level, each an exact refresh of s' | a and then the action steps; 0: one round, no refresh.
        action_steps_per_level: action steps of a round.
        particles: draws of s' that pc_ula's gradient takes the mean of.
        ula_step: step size eta of ULA and pc_ula.
        mala_step: step size of the corrected samplers, times tau (pc_joint_mala: times the greater of tau and 1).
        final_refresh: pc_joint_mala refreshes s' | a once more at the end.
        mcmc_steps: steps of the plain samplers.
        predictor_K: levels of the reverse processes, even in log-SNR.
        smc_K: levels of twisted SMC, even in log-SNR.
        smc_particles: particles of one run of twisted SMC, a power of 2.
        ess_threshold: effective sample size, as a fraction of the particles, below which SMC resamples.
        smc_twist: ``dps``, Q at the Tweedie mean, as published, or ``tfg``, the same smoothed.
        compile: run noise and pc_mala's steps as compiled code; needs a C++ compiler and, once, half a minute.

    Raises:
        ToyError: a value is not allowed, or there is no compiler.
    """

    K: int = 40
    abar_min: float = 0.05
    refresh_L: int = 1
    action_steps_per_level: int = 1
    particles: int = 20
    ula_step: float = 0.08
    mala_step: float = 0.7
    final_refresh: bool = True
    mcmc_steps: int = 100
    predictor_K: int = 200
    smc_K: int = 40
    smc_particles: int = 2**12
    ess_threshold: float = 0.5
    smc_twist: Literal["dps", "tfg"] = "tfg"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("K", "action_steps_per_level", "particles", "mcmc_steps"):
            value = getattr(self, name)
            bounded(f"--model.settings.{name}", value, 1, MOST if name == "particles" else REPEATS)
        for name in ("predictor_K", "smc_K"):
            value = getattr(self, name)
            bounded(f"--model.settings.{name}", value, 2, REPEATS)
        bounded("--model.settings.refresh_L", self.refresh_L, 0, REPEATS)
        for name in ("ula_step", "mala_step"):
            value = getattr(self, name)
            bounded(f"--model.settings.{name}", value, 0.0, above=True)
        require(
            0 < self.abar_min < 1, f"--model.settings.abar_min: {self.abar_min} is not allowed; give a number in (0, 1)"
        )
        require(
            0 <= self.ess_threshold <= 1,
            f"--model.settings.ess_threshold: {self.ess_threshold} is not allowed; give a number in [0, 1]",
        )
        if self.compile:
            check_compiler("--model.settings.compile")
        n = self.smc_particles
        require(
            n >= 2 and 2**15 % n == 0,
            f"--model.settings.smc_particles: {n} is not allowed; give a power of 2 up to 32768",
        )


@dataclass(frozen=True)
class Problem:
    """The sampling problem: draw (a, s') from q(a, s') exp(lambda_scale Q(a)) / Z.

    >>> from lightning_toys.mirror_descent import ActionValue, Linear
    >>> problem = Problem(Joint(), ActionValue(), Linear(), lambda_scale=1.5)
    >>> round(problem.target.mu, 3), round(1 / problem.target.tau, 3)
    (0.9, 0.4)

    Attributes:
        joint: the clean distribution q.
        reward: gives Q.
        schedule: how the tilt grows over the levels.
        lambda_scale: lambda, the inverse temperature of the tilt at the clean end.
        settings: how much work samplers do.
        model: what samplers know of q: its closed form, or a learned energy.
    """

    joint: Joint
    reward: Reward
    schedule: Schedule
    lambda_scale: float
    settings: Settings = field(default_factory=Settings)
    model: JointModel = field(default_factory=ExactModel)

    @cached_property
    def target(self) -> TiltedAction:
        """The target: the tilted distribution of the clean action."""
        return tilt(self.joint.clean, self.reward, self.lambda_scale)

    @cached_property
    def tilted_joint(self) -> NoiseLevel:
        """The target: the tilted distribution of the clean (a, s')."""
        return self.joint.with_action_marginal(self.target.mu, 1 / self.target.tau)

    @cached_property
    def levels(self) -> list[TiltedAction]:
        """The tilted distribution of the action at each of the K levels, noisy to clean."""
        s = self.settings
        abars = np.linspace(s.abar_min, 1.0, s.K) if s.K > 1 else np.ones(1)
        return [tilt(self.joint.level(float(x)), self.reward, self.beta(float(x))) for x in abars]

    def beta(self, abar: float) -> float:
        """Return beta = lambda f(abar), the tilt's inverse temperature at a level."""
        return self.lambda_scale * self.schedule.fraction(abar, self.settings.abar_min)
