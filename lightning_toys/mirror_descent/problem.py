"""What every sampler is given: the joint distribution, the reward, the schedule, and how much work it may do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from lightning_toys.errors import MOST, REPEATS, ToyError, bounded, check_settings, require
from lightning_toys.mirror_descent.joint import Array, LinearGaussianJoint, NoiseLevel
from lightning_toys.mirror_descent.joint_distribution import JointDistribution, Tilted
from lightning_toys.mirror_descent.model import ExactModel, JointModel
from lightning_toys.mirror_descent.schedules import Schedule
from lightning_toys.mirror_descent.tilt import Reward, ShiftedReward, TiltedAction, tilt
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
        abar_max: abar of the last level, above ``abar_min``; below 1 annealed samplers end at a noisy level's target.
        refresh_L: exact refreshes of s' | a at each level, spread evenly over its action steps (more of them than steps
            would change nothing); 0: s' is drawn once, at the noisiest level.
        action_steps_per_level: action steps at each level, however many refreshes there are.
        particles: draws of s' that pc_ula's gradient takes the mean of.
        ula_step: step size eta of ULA and pc_ula.
        mala_step: step size of the corrected samplers, times tau (pc_joint_mala: times the greater of tau and 1).
        final_mala_step: step size of a schedule's final MALA steps, times tau; ``mala_step`` if left out.
        final_refresh: pc_joint_mala refreshes s' | a once more at the end.
        mcmc_steps: steps of the plain samplers.
        predictor_K: levels of the reverse processes, even in log-SNR.
        smc_K: levels of twisted SMC, even in log-SNR.
        smc_particles: particles of one run of twisted SMC, a power of 2.
        ess_threshold: effective sample size, as a fraction of the particles, below which SMC resamples.
        smc_twist: ``dps``, Q at the Tweedie mean, as published, or ``tfg``, the same smoothed.
        compile: run noise and pc_mala's steps as compiled code, which needs a C++ compiler and, once, some seconds;
            ``auto``: where there is a compiler and the work is long enough to repay it.

    Raises:
        ToyError: a value is not allowed, or there is no compiler.
    """

    K: int = 40
    abar_min: float = 0.05
    abar_max: float = 1.0
    refresh_L: int = 1
    action_steps_per_level: int = 1
    particles: int = 20
    ula_step: float = 0.08
    mala_step: float = 0.7
    final_mala_step: float | None = None
    final_refresh: bool = True
    mcmc_steps: int = 100
    predictor_K: int = 200
    smc_K: int = 40
    smc_particles: int = 2**12
    ess_threshold: float = 0.5
    smc_twist: Literal["dps", "tfg"] = "tfg"
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.settings.")
        for name in ("K", "action_steps_per_level", "particles", "mcmc_steps"):
            value = getattr(self, name)
            bounded(f"--model.settings.{name}", value, 1, MOST if name == "particles" else REPEATS)
        for name in ("predictor_K", "smc_K"):
            value = getattr(self, name)
            bounded(f"--model.settings.{name}", value, 2, REPEATS)
        bounded("--model.settings.refresh_L", self.refresh_L, 0, REPEATS)
        for name in ("ula_step", "mala_step", "final_mala_step"):
            value = getattr(self, name)
            if value is None and name == "final_mala_step":
                continue
            bounded(f"--model.settings.{name}", value, 0.0, above=True)
        require(
            0 < self.abar_min < 1, f"--model.settings.abar_min: {self.abar_min} is not allowed; give a number in (0, 1)"
        )
        require(
            self.abar_min < self.abar_max <= 1,
            f"--model.settings.abar_max: {self.abar_max} is not allowed; give a number above "
            f"--model.settings.abar_min, {self.abar_min}, at most 1",
        )
        require(
            0 <= self.ess_threshold <= 1,
            f"--model.settings.ess_threshold: {self.ess_threshold} is not allowed; give a number in [0, 1]",
        )
        require(
            self.compile in (True, False, "auto"),
            f"--model.settings.compile: {self.compile!r} is not allowed; give true, false or auto",
        )
        if self.compile is True:
            check_compiler("--model.settings.compile")
        n = self.smc_particles
        require(
            n >= 2 and 2**15 % n == 0,
            f"--model.settings.smc_particles: {n} is not allowed; give a power of 2 up to 32768",
        )

    @property
    def refresh_steps(self) -> list[int]:
        """The action steps of a level, counted from 0, before which s' | a is drawn anew.

        >>> Settings(refresh_L=2, action_steps_per_level=5).refresh_steps
        [0, 2]
        """
        n = self.action_steps_per_level
        refreshes = min(self.refresh_L, n)
        return [j * n // refreshes for j in range(refreshes)]


@dataclass(frozen=True)
class Problem:
    """The sampling problem: draw (a, s') from q(a, s') exp(lambda_scale Q(a)) / Z.

    >>> from lightning_toys.mirror_descent import ActionValue, Linear
    >>> problem = Problem(LinearGaussianJoint(), ActionValue(), Linear(), lambda_scale=1.5)
    >>> round(problem.target.mu, 3), round(1 / problem.target.tau, 3)
    (0.9, 0.4)

    Attributes:
        joint: the clean distribution q.
        reward: gives Q.
        schedule: how the tilt grows over the levels.
        lambda_scale: lambda, the inverse temperature of the tilt at the clean end.
        settings: how much work samplers do.
        model: what samplers know of q: its closed form, or a learned energy.
        original: the problem that this one is in other coordinates, see :attr:`centred`.
    """

    joint: JointDistribution
    reward: Reward
    schedule: Schedule
    lambda_scale: float
    settings: Settings = field(default_factory=Settings)
    model: JointModel = field(default_factory=ExactModel)
    original: Problem | None = None

    # in every problem

    @cached_property
    def tilted(self) -> Tilted:
        """The target: the tilted clean distribution."""
        return self.model.tilt(self.joint.clean, self.reward, self.lambda_scale)

    @cached_property
    def tilted_levels(self) -> list[Tilted]:
        """The tilted distribution at each of the K levels, noisy to clean."""
        if self.original is not None:
            return [*self.levels]
        return [self.model.tilt(self.joint.level(x), self.reward, self.beta(x)) for x in self.abars]

    @property
    def abars(self) -> list[float]:
        """abar of the K levels of annealed samplers, noisy to clean."""
        s = self.settings
        return np.linspace(s.abar_min, s.abar_max, s.K).tolist() if s.K > 1 else [s.abar_max]

    def beta(self, abar: float) -> float:
        """Return beta = lambda f(abar), the tilt's inverse temperature at a level."""
        return self.lambda_scale * self.schedule.fraction(abar, self.settings.abar_min)

    @property
    def origin(self) -> Array:
        """Where the clean coordinates' 0 is in those of the original problem (dim,)."""
        return np.zeros(self.joint.dim) if self.original is None else self.original.joint.centre

    @cached_property
    def centred(self) -> Problem:
        """The same problem in coordinates whose clean origin is the mean of q: samples have to be moved by ``origin``.

        Chains run in these, since in single precision a number far from 0 has no digits left for differences.
        """
        m = self.joint.centre
        if self.original is not None or not m.any():
            return self
        joint = replace(self.linear_joint, mu_a=0.0, d=0.0, s=0.0, mu_eps=0.0)
        model = self.model.measured_from(m)
        return replace(self, joint=joint, reward=ShiftedReward(self.reward, m), model=model, original=self)

    # in the linear-Gaussian problem

    @property
    def linear_joint(self) -> LinearGaussianJoint:
        """The linear-Gaussian joint distribution.

        Raises:
            ToyError: this is another.
        """
        if not isinstance(self.joint, LinearGaussianJoint):
            raise ToyError(
                f"--data: {type(self.joint).__name__} is not allowed here, closed forms of the linear-Gaussian problem "
                "are wanted; give LinearGaussian"
            )
        return self.joint

    @cached_property
    def target(self) -> TiltedAction:
        """The tilted distribution of the clean action."""
        return tilt(self.linear_joint.clean, self.reward, self.lambda_scale)

    @cached_property
    def tilted_joint(self) -> NoiseLevel:
        """The tilted distribution of the clean (a, s')."""
        return self.linear_joint.with_action_marginal(self.target.mu, 1 / self.target.tau)

    @cached_property
    def levels(self) -> list[TiltedAction]:
        """The tilted distribution of the action at each of the K levels, noisy to clean.

        Annealed samplers carry x from level to level as it is, so that all levels have one origin, the clean one.
        """
        if self.original is not None:
            m = self.origin
            return [
                TiltedAction(NoiseLevel(at.level.m - m, at.level.C, at.level.abar), at.beta, at.Q.about(float(m[0])))
                for at in self.original.levels
            ]
        return [tilt(self.linear_joint.level(x), self.reward, self.beta(x)) for x in self.abars]
