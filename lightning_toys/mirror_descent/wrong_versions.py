"""Wrong versions of samplers, and by how many standard errors the verdict on implementations catches each.

``python -m lightning_toys.mirror_descent.wrong_versions`` prints the table. A wrong version is drawn with the noise of
the right one, and its draws are compared with the right one's exact moments, as ``test`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.annealed import PCMALA
from lightning_toys.mirror_descent.best_of_n import BestOfN
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import closed_form_checks
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck
from lightning_toys.mirror_descent.feynman_kac_correctors import FeynmanKacCorrectors
from lightning_toys.mirror_descent.guidance import DiffusionPosteriorSampling
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise, accept, init_state, select_state, ula
from lightning_toys.mirror_descent.mixture import GaussianMixtureJoint, Mixture
from lightning_toys.mirror_descent.mixture_checks import mixture_checks
from lightning_toys.mirror_descent.mixture_model import MixtureModel, component_of, like, pick
from lightning_toys.mirror_descent.predictors import Predictor
from lightning_toys.mirror_descent.printed_table import print_table
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.resampling import Resampling, Systematic, systematic_resampling
from lightning_toys.mirror_descent.reverse_process import ReverseStep
from lightning_toys.mirror_descent.rewards import Quartic
from lightning_toys.mirror_descent.sampler import Draws, Sampler
from lightning_toys.mirror_descent.samplers import MALA, ULA, Importance
from lightning_toys.mirror_descent.schedules import Linear
from lightning_toys.mirror_descent.steering import FKSteering, Max
from lightning_toys.mirror_descent.tempered_smc import TemperedSMC
from lightning_toys.mirror_descent.tilt import ActionValue, StateReward
from lightning_toys.mirror_descent.truth import truth_of
from lightning_toys.mirror_descent.twisted_smc import Proposal, TwistedSMC

SETTINGS = Settings(K=10, mcmc_steps=20, predictor_K=30, smc_K=12, smc_particles=2**9, ula_step=0.05)
LINEAR = Problem(LinearGaussianJoint(), StateReward(), Linear(), 1.5, SETTINGS)


def two_modes() -> Mixture:
    """Return the mixture that particle methods are tried on."""
    C = np.array([[[0.4, 0.15], [0.15, 0.3]], [[0.3, -0.1], [-0.1, 0.5]]])
    return Mixture(np.array([0.7, 0.3]), np.array([[-1.0, -0.5], [1.4, 1.0]]), C, 1)


MIXTURE = Problem(GaussianMixtureJoint(two_modes()), ActionValue(1.2, 1.0), Linear(), 1.2, SETTINGS, MixtureModel())
QUARTIC = replace(MIXTURE, reward=Quartic(0.8, 1.2, 0.2))


class UncorrectedMALA(MALA):
    """MALA that accepts every proposal."""

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem = self.problem
        target, eta = problem.model.action_target(problem.tilted), problem.settings.mala_step / problem.tilted.tau
        a = problem.model.draw_action(noise, problem.joint.clean)
        for _ in range(problem.settings.mcmc_steps):
            a = ula(noise, a, target(a)[1], eta)
        return Draws(without_rows(a), without_rows(problem.model.draw_state(noise, problem.joint.clean, a)))


class AsymmetricMALA(MALA):
    """MALA that leaves the ratio of its proposals' densities out."""

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        problem = self.problem
        target, eta = problem.model.action_target(problem.tilted), problem.settings.mala_step / problem.tilted.tau
        state = init_state(problem.model.draw_action(noise, problem.joint.clean), target)
        for _ in range(problem.settings.mcmc_steps):
            new = init_state(ula(noise, state.x, state.grad, eta), target)
            state = select_state(accept(noise, new.log_p - state.log_p), new, state)
        a = state.x
        return Draws(without_rows(a), without_rows(problem.model.draw_state(noise, problem.joint.clean, a)))


class StrayStates(Importance):
    """Importance resampling in which each action gets its neighbour's next state."""

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        out = super().draw(noise)
        return replace(out, s=out.s.roll(1, -1))


class GaussianWeights(TwistedSMC):
    """Twisted SMC whose weights take the proposal's Gaussian for the mixture's reverse kernel."""

    def exact_kernel_ratio(self, k: int, before: Tensor, old: Proposal, after: Tensor, new: Proposal) -> Tensor:
        """See :meth:`TwistedSMC.exact_kernel_ratio`."""
        root = torch.as_tensor(old.root).movedim((0, 1), (-2, -1))
        away = (after - old.mean).movedim(0, -1).unsqueeze(-1)
        v = torch.linalg.solve_triangular(root, away, upper=False).squeeze(-1)
        out: Tensor = -0.5 * v.double().square().sum(-1)
        return out


class UnpaidFK(FKSteering):
    """FK steering whose last potential does not make up for those before."""

    def last_potential(self, log_g: Tensor, r: Tensor, paid: Tensor) -> Tensor:
        """See :meth:`FKSteering.last_potential`."""
        return log_g


class UncorrectedFKC(FeynmanKacCorrectors):
    """Feynman-Kac correctors without weights: half of the guidance is then missing."""

    def advance(
        self, noise: Noise, k: int, x: Tensor, memory: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """See :meth:`ParticleSteering.advance`."""
        x, log_g, memory = super().advance(noise, k, x, memory)
        return x, torch.zeros_like(log_g), memory


class ScorelessFKC(FeynmanKacCorrectors):
    """Feynman-Kac correctors whose weights leave grad V . S out."""

    def advance(
        self, noise: Noise, k: int, x: Tensor, memory: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """See :meth:`ParticleSteering.advance`."""
        wide, g = x[: self.problem.joint.action_dim].double(), self.growth(k)
        x, log_g, memory = super().advance(noise, k, x, memory)
        return x, (self.tilts[k + 1].value(g * wide) - self.tilts[k].value(wide)).view_as(log_g), memory


class PriorComponents(MixtureModel):
    """A mixture whose reverse kernel draws the component by its weight, not by its probability given x."""

    def draw_reverse(self, noise: Noise, noisy: Mixture, cleaner: Mixture, x: Tensor) -> Tensor:
        """See :meth:`JointModel.draw_reverse`."""
        j = component_of(noise.uniform()[0], like(noisy.weights, x).unsqueeze(-1).expand(-1, x.shape[-1]))
        g = math.sqrt(noisy.abar / cleaner.abar)
        gains = g * cleaner.covariances @ noisy.precisions
        covariances = cleaner.covariances - g * gains @ cleaner.covariances
        offsets = cleaner.means - np.einsum("jde,je->jd", gains, noisy.means)
        mean = like(gains, x) @ x + like(offsets, x).unsqueeze(-1)
        return pick(mean + like(np.linalg.cholesky(covariances), x) @ noise.normal(len(x)), j)


class Sharpened(Resampling):
    """Systematic resampling by the weights' power 1.2."""

    def uniforms(self, noise: Noise, groups: int, n: int) -> Tensor:
        """See :meth:`Resampling.uniforms`."""
        return Systematic().uniforms(noise, groups, n)

    def indices(self, weight: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Resampling.indices`."""
        sharp = weight**1.2
        return systematic_resampling(sharp / sharp.sum(-1, keepdim=True), uniform)


class StandardDeviations(Predictor):
    """DDIM with sigma in the place of sigma^2."""

    def step_rule(self, abar: float, next_abar: float) -> ReverseStep:
        """See :meth:`Predictor.step_rule`."""
        step = super().step_rule(abar, next_abar)
        return step._replace(variance=math.sqrt(step.variance))


def dps(problem: Problem, eta: float = 1.0) -> Predictor:
    """Return DDIM with noise, guided by DPS."""
    return Predictor(problem, "ddim", DiffusionPosteriorSampling, eta)


Make = Callable[[Problem], Sampler]


@dataclass(frozen=True)
class WrongVersion:
    """A wrong version of a sampler.

    Attributes:
        words: what is wrong.
        problem_name: what it is tried on, in a word.
        problem: the same.
        right: makes the right one.
        wrong: makes the wrong one.
    """

    words: str
    problem_name: str
    problem: Problem
    right: Make
    wrong: Make


def scaled(problem: Problem, factor: float) -> Problem:
    """Return the problem with a factor of lambda."""
    return replace(problem, lambda_scale=factor * problem.lambda_scale)


def changed(problem: Problem, **settings: Any) -> Problem:
    """Return the problem with other settings."""
    return replace(problem, settings=replace(problem.settings, **settings))


WRONG_VERSIONS: Sequence[WrongVersion] = (
    WrongVersion("MALA accepts every proposal", "linear-Gaussian", LINEAR, MALA, UncorrectedMALA),
    WrongVersion("MALA leaves the proposals' ratio out", "quartic", QUARTIC, MALA, AsymmetricMALA),
    WrongVersion("MALA at 1.05 lambda", "mixture", MIXTURE, MALA, lambda p: MALA(scaled(p, 1.05))),
    WrongVersion("ULA at a step longer by a fifth", "quartic", QUARTIC, ULA, lambda p: ULA(changed(p, ula_step=0.06))),
    WrongVersion("pc_mala with half of the levels", "quartic", QUARTIC, PCMALA, lambda p: PCMALA(changed(p, K=5))),
    WrongVersion("importance weights of 0.95 lambda", "mixture", MIXTURE, Importance,
                 lambda p: Importance(scaled(p, 0.95))),
    WrongVersion("each action has its neighbour's s'", "mixture", MIXTURE, Importance, StrayStates),
    WrongVersion("best of 7 for best of 8", "quartic", QUARTIC, BestOfN, lambda p: BestOfN(p, 7)),
    WrongVersion("twisted SMC weighs by the proposal's Gaussian", "mixture", MIXTURE, TwistedSMC, GaussianWeights),
    WrongVersion("twisted SMC resamples by weights^1.2", "mixture", MIXTURE, TwistedSMC,
                 lambda p: TwistedSMC(p, Sharpened)),
    WrongVersion("FK steering (max) does not pay back at the end", "mixture", MIXTURE,
                 lambda p: FKSteering(p, Max), lambda p: UnpaidFK(p, Max)),
    WrongVersion("FKC without its weights", "linear-Gaussian", LINEAR, FeynmanKacCorrectors, UncorrectedFKC),
    WrongVersion("FKC's weights leave the score out", "linear-Gaussian", LINEAR, FeynmanKacCorrectors, ScorelessFKC),
    WrongVersion("the reverse kernel's component is q's", "mixture", MIXTURE, FKSteering,
                 lambda p: FKSteering(replace(p, model=PriorComponents()))),
    WrongVersion("tempered SMC stops at 0.95 lambda", "quartic", QUARTIC, TemperedSMC,
                 lambda p: TemperedSMC(scaled(p, 0.95))),
    WrongVersion("DDIM's sigma for sigma^2", "linear-Gaussian", LINEAR, dps,
                 lambda p: StandardDeviations(p, "ddim", DiffusionPosteriorSampling)),
    WrongVersion("DDIM at eta 0.9 for 1", "linear-Gaussian", LINEAR, dps, lambda p: dps(p, 0.9)),
)  # fmt: skip


def largest(version: WrongVersion, make: Make, seeds: Sequence[int], blocks: int) -> ClosedFormCheck:
    """Return the row whose draws, made by ``make``, are most errors from the right sampler's exact moments."""
    problem, right = version.problem, version.right(version.problem)
    drawn = make(problem)
    drawn.name = right.name  # the key of its noise
    samples = run_chains(drawn, seeds, blocks * BLOCK_SIZE, torch.zeros(()))
    if problem.model.linear:
        checks = closed_form_checks(right, samples)
    else:
        joint: Any = problem.joint
        distribution = truth_of(joint.clean, problem.reward, problem.lambda_scale)
        checks = mixture_checks(right, samples, joint, distribution)
    return max((c for c in checks if not math.isnan(c.z)), key=lambda c: abs(c.z))


def table(seeds: Sequence[int] = (0, 1, 2, 3), blocks: int = 1) -> list[str]:
    """Return the lines of a Markdown table, a row a wrong version."""
    lines = [
        f"{len(seeds) * blocks * BLOCK_SIZE} draws each; errors: the largest |estimate - exact| / standard error.",
        "",
        "| wrong version | problem | row | errors | right version's |",
        "|---|---|---|---:|---:|",
    ]
    for version in WRONG_VERSIONS:
        wrong = largest(version, version.wrong, seeds, blocks)
        right = largest(version, version.right, seeds, blocks)
        lines.append(
            f"| {version.words} | {version.problem_name} | {wrong.quantity} | {abs(wrong.z):.1f} | {abs(right.z):.1f} |"
        )
    return lines


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; with ``--out FILE`` write it there too, where no file is yet. Return the exit code."""
    torch.set_num_threads(1)
    return print_table(table, __doc__, args)


if __name__ == "__main__":
    raise SystemExit(main())
