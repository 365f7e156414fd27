"""Evaluation of samplers against closed forms: what is drawn, measured, swept and judged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.errors import LARGEST, note, require
from lightning_toys.mirror_descent.chain_runner import compiles, run_chains
from lightning_toys.mirror_descent.closed_form_checks import (
    ImplementationError,
    Row,
    closed_form_checks,
    judge,
    off_target_warning,
    verdicts,
)
from lightning_toys.mirror_descent.data import LinearGaussian
from lightning_toys.mirror_descent.diagnostics import (
    Sample,
    distribution_metrics,
    exact_draws,
    ks_p_values,
    mixing_metrics,
)
from lightning_toys.mirror_descent.joint import gaussian_kl
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE
from lightning_toys.mirror_descent.own import check_reward, check_sampler
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.mirror_descent.schedules import Schedule
from lightning_toys.mirror_descent.shipped import MakeSampler, make_attempt, make_samplers
from lightning_toys.mirror_descent.sweeps import Curves, sweep_settings
from lightning_toys.mirror_descent.tilt import Reward
from lightning_toys.stats import holm
from lightning_toys.training.configuration import require_data
from lightning_toys.training.loader import Batch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.progress import WorkProgress
from lightning_toys.training.results import Report

KS_METRICS = ("action_ks_p", "state_ks_p", "residual_ks_p")


def share_lost(sample: Sample) -> float:
    """Return the share of a sample's draws that are not finite, or so large that their squares would not be."""
    near = (np.abs(sample.a) <= LARGEST) & (np.abs(sample.s) <= LARGEST)
    return 1 - float(near.mean())


class SamplerEvaluation(ToyModule):
    """The part of :class:`TiltedSampling` that runs samplers and measures what they drew."""

    trains = False
    learned = False  # whether samplers are run with a learned energy, beside themselves with the closed form
    reward: Reward
    schedule: Schedule
    settings: Settings
    lambda_scale: float
    chains: int
    bins: int
    sweep_max_refresh: int
    sweep_chains: int
    makers: dict[str, MakeSampler]
    samples: dict[str, list[Sample]]
    reference_samplers: dict[str, Sampler]  # in the original coordinates, with what is known of each
    rows: list[Row]
    exact_samples: list[Sample]
    curves: dict[str, Curves]
    costs: dict[str, int]
    assert_implementation: bool

    # what ToyModule asks for of a module without weights

    def build(self) -> nn.Module:
        """See :meth:`ToyModule.build`: there are no weights."""
        return nn.Module()

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`: there is no loss."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return f"{type(self.reward).__name__} {type(self.schedule).__name__}"

    @property
    def sampler_names(self) -> list[str]:
        """Names of the samplers."""
        return list(self.makers)

    @property
    def problem(self) -> Problem:
        """The sampling problem, on the attached Trainer's data."""
        return self.problem_on(require_data(self.trainer.datamodule, LinearGaussian))  # type: ignore[attr-defined]

    def work_progress(self, blocks: int) -> WorkProgress:
        """Return the progress of drawing so many blocks of chains."""
        raise NotImplementedError

    def problem_on(self, data: Any) -> Problem:
        """Return the sampling problem whose untilted distribution is that of ``data``."""
        return Problem(data.joint, self.reward, self.schedule, self.lambda_scale, self.settings)

    @property
    def like(self) -> Tensor:
        """A tensor () with the device and dtype of the chains: the module's device, torch's default dtype."""
        return torch.zeros((), device=self.device, dtype=torch.get_default_dtype())

    def build_samplers(self, problem: Problem, names: Sequence[str]) -> dict[str, list[Sampler]]:
        """Return label to samplers, one a seed; the first label's metrics are those without ``@``.

        They run in the coordinates of ``problem``.
        """
        return {name: [self.maker(name)(problem)] * len(self.seeds) for name in names}

    def build_centred(self, problem: Problem, names: Sequence[str]) -> dict[str, list[Sampler]]:
        """Return the samplers whose chains are drawn: in centred coordinates."""
        return self.build_samplers(problem.centred, names)

    def sampler_name(self, label: str) -> str:
        """Return the name of a label's sampler."""
        return label

    def maker(self, name: str) -> MakeSampler:
        """Return what makes the sampler of a name: one of the module's, or a shipped one.

        Raises:
            ToyError: there is none, or it reads no score where one is learned.
        """
        if name in self.makers:
            return self.makers[name]
        return make_samplers([name], self.problem_on(LinearGaussian()), self.learned)[name]

    def run_samplers(
        self, samplers: Sequence[Sampler], chains: int, progress: WorkProgress, compiled: bool = False
    ) -> list[Sample]:
        """Return each seed's sample of ``chains`` chains, drawn by all ranks together; ``samplers`` are one a seed."""
        trainer = self.trainer
        return run_chains(
            samplers,
            self.seeds,
            chains,
            self.like,
            trainer.global_rank,
            trainer.world_size,
            lambda blocks: progress.advance(samplers[0].name, blocks),
            compiled=compiled,
        )

    def is_compiled(self, samplers_by_label: Mapping[str, Sequence[Sampler]], chains: int) -> bool:
        """Whether these samplers are run by compiled code, all of them or none."""
        blocks = len(self.seeds) * -(-chains // BLOCK_SIZE)
        return compiles(self.settings, self.like, [samplers[0] for samplers in samplers_by_label.values()], blocks)

    def local_blocks(self, chains: int) -> int:
        """Return how many blocks of chains this rank draws of a sampler."""
        trainer = self.trainer
        blocks = len(self.seeds) * -(-chains // BLOCK_SIZE)
        return len(range(trainer.global_rank, blocks, trainer.world_size))

    def tell_before_drawing(self, problem: Problem, samplers: Sequence[Sampler]) -> None:
        """Say what will not be known, and what will not reach the target, before anything is drawn."""
        follows = any(s.annealed for s in samplers) or not self.schedule.reaches_target
        if follows and (warning := off_target_warning(problem)):
            note(warning)
        for sampler in samplers:
            if why := sampler.why_unknown():
                note(f"{sampler.name}: {why}; what it does is then tested where it is known, the goal in any case")
            if sampler.group and len(self.seeds) * (self.chains // sampler.group) == 1:
                note(
                    f"{sampler.name}: one group of {sampler.group} draws: its moments have no standard error, and are "
                    "not tested; give more --model.chains or --model.seeds"
                )

    def evaluate(self) -> Report:
        """Run every sampler, and return its metrics against the closed form."""
        problem = self.problem
        built = self.build_samplers(problem, self.sampler_names)
        self.reference_samplers = {label: samplers[0] for label, samplers in built.items()}
        references = self.reference_samplers
        self.tell_before_drawing(problem, [s for label, s in references.items() if label == self.sampler_name(label)])
        samplers_by_label = self.build_centred(problem, self.sampler_names)
        swept = [n for n in self.sampler_names if references[n].annealed] if self.sweep_max_refresh else []
        plans = sweep_settings(self.settings, self.sweep_max_refresh)
        work = len(samplers_by_label) * self.local_blocks(self.chains)
        work += len(swept) * sum(map(len, plans.values())) * self.local_blocks(self.sweep_chains)
        metrics: dict[str, list[float]] = {}
        p_values: dict[str, list[float]] = {}
        self.samples, self.costs = {}, {}
        compiled = self.is_compiled(samplers_by_label, self.chains)
        with self.work_progress(work) as progress:
            for label, samplers in samplers_by_label.items():
                sampler, cost = samplers[0], samplers[0].cost()
                samples = self.run_samplers(samplers, self.chains, progress, compiled)
                self.check_draws(label, samples)
                self.samples[label], self.costs[label] = samples, cost.total
                rows = [
                    distribution_metrics(problem, x, self.bins)
                    | mixing_metrics(x, sampler.stationary, cost.total)
                    | {k: float(v) for k, v in (*cost._asdict().items(), ("evaluations", cost.total))}
                    | {k: float(np.mean(v)) for k, v in (x.extra or {}).items()}
                    for x in samples
                ]
                metrics |= {f"{k}@{label}": [row[k] for row in rows] for k in rows[0]}
                if not sampler.group:
                    found = [ks_p_values(problem, x) for x in samples]
                    p_values |= {f"{k}@{label}": [row[k] for row in found] for k in found[0]}
            self.curves = {
                name: {
                    knob: self.sweep(name, problem, settings, progress, compiled) for knob, settings in plans.items()
                }
                for name in swept
            }
        for family in self.holm_families(list(samplers_by_label)):
            self.adjust_p_values(p_values, family)
        self.rows = judge([
            c for label, x in self.samples.items() for c in closed_form_checks(references[label], x, label)
            if label == self.sampler_name(label) or references[label].problem.model.exact
        ])  # fmt: skip
        arrays: dict[str, Any] = {
            "p_values": p_values,
            "checks": [r.as_dict() for r in self.rows],
            "verdicts": verdicts(self.rows),
        }
        first = {k.partition("@")[0]: v for k, v in metrics.items() if k.endswith(f"@{next(iter(samplers_by_label))}")}
        return Report(self.seeds, first | metrics, self.baselines(problem), arrays)

    def holm_families(self, labels: list[str]) -> list[list[str]]:
        """Return the families of labels within which p-values are adjusted."""
        return [labels]

    def adjust_p_values(self, p_values: dict[str, list[float]], labels: Sequence[str]) -> None:
        """Add ``*_p_holm``: each seed's Kolmogorov-Smirnov p-values adjusted over the family (Holm 1979)."""
        names = [f"{k}@{name}" for name in labels for k in KS_METRICS if f"{k}@{name}" in p_values]
        for r in range(len(self.seeds)):
            for name, p in zip(names, holm([p_values[n][r] for n in names]), strict=True):
                p_values.setdefault(name.replace("_p@", "_p_holm@"), []).append(float(p))

    def sweep(
        self, name: str, problem: Problem, plan: Mapping[int, Settings], progress: WorkProgress, compiled: bool
    ) -> dict[str, np.ndarray]:
        """Return ``action_kl`` and ``state_kl`` (R, len(plan)) of a sampler, a column for each of the settings."""
        found: dict[str, list[list[float]]] = {"action_kl": [], "state_kl": []}
        for value, settings in plan.items():
            samplers = self.build_centred(dataclasses.replace(problem, settings=settings), [name])[name]
            samples = self.run_samplers(samplers, self.sweep_chains, progress, compiled)
            if lost := max(map(share_lost, samples)):  # no reason to lose what else was drawn
                note(f"warning: {name} ran away in {lost:.2g} of its draws at {value} of the sweep, left out there")
                rows = [dict.fromkeys(found, math.nan)] * len(samples)
            else:
                rows = [distribution_metrics(problem, x, self.bins) for x in samples]
            for k, columns in found.items():
                columns.append([row[k] for row in rows])
        return {k: np.array(v).T for k, v in found.items()}

    def baselines(self, problem: Problem) -> dict[str, dict[str, float]]:
        """Return the metrics of exact draws of the target, and of the untilted distribution."""
        self.exact_samples = exact_draws(problem, self.seeds, self.chains)
        exact = [distribution_metrics(problem, x, self.bins) for x in self.exact_samples]
        keys = ("joint_kl", "action_kl", "state_kl", "action_kl_hist", "action_w1", "cond_ratio")
        out = {"exact_draws": {k: float(np.mean([row[k] for row in exact])) for k in keys}}
        out["exact_draws"]["action_kl_hist_floor"] = (self.bins - 1) / (2 * self.chains)
        clean, target = problem.linear_joint.clean, problem.tilted_joint
        out["untilted"] = {
            "joint_kl": gaussian_kl(clean.m, clean.C, target.m, target.C),
            "action_kl": gaussian_kl(clean.m[0], clean.C[0, 0], target.m[0], target.C[0, 0]),
        }
        return out

    def check_sampling(self, problem: Problem, names: Sequence[str], chains: int) -> None:
        """Refuse step sizes with which ULA is unstable, too few chains for a group, and tilts without an integral.

        Raises:
            ToyError: names the setting.
        """
        check_reward(problem.reward, problem.joint)
        samplers = {name: make_attempt(name, self.maker(name), problem) for name in names}
        if unstable := [n for n, sampler in samplers.items() if sampler.unadjusted]:
            through = any(samplers[n].annealed for n in unstable)
            targets = [problem.target, *(problem.levels if through else [])]
            step, bound = self.settings.ula_step, 2 / max(tilted.tau for tilted in targets)
            require(
                step < bound,
                f"--model.settings.ula_step: {step} is not allowed here, {' and '.join(unstable)} would run away; "
                f"give a number below 2 / tau = {bound:.3g}",
            )
        for name, sampler in samplers.items():
            require(
                not sampler.whole_groups or chains >= sampler.group,
                f"--model.chains: {chains} is not allowed with {name}; give at least "
                f"--model.settings.smc_particles, {sampler.group}",
            )
        require(bool(problem.levels), "")  # each level's tilt has an integral

    def check_own_samplers(self, problem: Problem, names: Sequence[str]) -> None:
        """Try samplers of somebody's own on one block of chains.

        Raises:
            ToyError: names one that breaks its contract, and what is wrong.
        """
        for name in names:
            check_sampler(name, make_attempt(name, self.maker(name), problem.centred))

    def check_draws(self, label: str, samples: Sequence[Sample]) -> None:
        """Refuse draws of which nothing can be said: not finite, or all alike.

        Args:
            label: the sampler's.
            samples: one a seed.

        Raises:
            ToyError: names the sampler and the seed.
        """
        for seed, sample in zip(self.seeds, samples, strict=True):
            lost = share_lost(sample)
            require(
                lost == 0,
                f"--model.samplers: {label} ran away, {lost:.2g} of its draws of seed {seed} are not finite or beyond "
                f"{LARGEST:g}; give smaller steps, more levels or a weaker tilt, or leave it out",
            )
            alike = [name for name, x in (("actions", sample.a), ("next states", sample.s)) if np.ptp(x) == 0]
            require(
                not alike,
                f"--model.samplers: {label} draws {' and '.join(alike)} that are all alike in seed {seed}, which have "
                "no distance to the target; mend it or leave it out",
            )

    def on_test_end(self) -> None:
        """Fail where samples differ from their sampler's exact moments and that is asked for; results are written.

        Raises:
            ImplementationError: names the rows.
        """
        wrong = [f"{r.check.sampler} {r.check.quantity} (z = {r.check.z:+.1f})" for r in self.rows
                 if r.as_dict()["implementation"] == "differs"]  # fmt: skip
        if self.assert_implementation and wrong:
            message = (
                f"--model.assert_implementation: samples differ from their sampler's exact moments: {', '.join(wrong)}"
            )
            note(f"error: {message}")
            raise ImplementationError(message)
