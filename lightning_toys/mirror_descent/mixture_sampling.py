"""MixtureSampling: samplers on mixtures, under quadratic rewards and others, beside the exact distribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.errors import bounded, check_settings, note, require
from lightning_toys.mirror_descent import mixture_figures
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import check_table, judge, verdicts
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample, mixing_metrics
from lightning_toys.mirror_descent.evaluation import SamplerEvaluation
from lightning_toys.mirror_descent.hparams import from_hparam
from lightning_toys.mirror_descent.joint import Array
from lightning_toys.mirror_descent.mixture_checks import (
    distances,
    exact_statistics,
    first_action,
    mixture_checks,
    points_of,
)
from lightning_toys.mirror_descent.mixture_data import GaussianMixture
from lightning_toys.mirror_descent.mixture_model import MixtureModel
from lightning_toys.mirror_descent.mixture_report import summary_lines
from lightning_toys.mirror_descent.own import check_reward, check_schedule
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.mirror_descent.schedules import Linear, Schedule
from lightning_toys.mirror_descent.shipped import KNOWN, MakeSampler, make_attempt, make_samplers
from lightning_toys.mirror_descent.sweeps import scaled_settings
from lightning_toys.mirror_descent.tilt import ActionValue, Reward
from lightning_toys.mirror_descent.truth import Truth
from lightning_toys.training.configuration import as_dataclass, require_data
from lightning_toys.training.files import make_folder, set_aside, write_atomic
from lightning_toys.training.progress import WorkProgress
from lightning_toys.training.results import Report

FAR = 100.0  # standard deviations, of target or q, from the target's mean beyond which a draw ran away


class MixtureSampling(SamplerEvaluation):
    """Samples x = (a, s') from q(x) exp(lambda Q(a)) / Z, q a Gaussian mixture, beside the exact distribution.

    Under quadratic rewards (:class:`ActionValue`, :class:`QuadraticReward`) it is a mixture in closed form. Under
    any other reward with a ``value`` it is known by adaptive quadrature, where the action has one coordinate. ``test``
    needs no checkpoint: there is nothing to train.

    Args:
        seeds: one seed a replica.
        samplers: short names, class paths of your own (or, from Python, :class:`Sampler` classes); all shipped ones
            that run on mixtures if left out.
        reward: gives Q.
        schedule: how the tilt grows over the noise levels.
        lambda_scale: lambda, the inverse temperature of the tilt at the clean end.
        chains: chains of each sampler and seed.
        settings: how much work the samplers do.
        bins: bars of the figures.
        budgets: factors of the settings' steps and levels at which each sampler is run too, for the frontier.
        budget_chains: chains of each seed there.
        assert_implementation: fail, with exit code 1, where samples differ from the exact moments of their sampler.

    Raises:
        ToyError: a value is not allowed.
    """

    experiment = "mirror_descent"
    headline: Sequence[str] = ("w1", "mode_tv", "moment_kl")
    error_metrics: Sequence[str] = ("w1", "mode_tv", "moment_kl")
    metric_labels: Mapping[str, str] = {
        "w1": "1-Wasserstein distance of the marginals to the tilted distribution's (its standard deviations)",
        "mode_tv": "total variation distance of the components' weights",
        "moment_kl": "KL of Gaussians with the same mean and covariance (nats)",
        "conditional_ks": "Kolmogorov-Smirnov distance of s' | a to what it was",
        "reward": "mean of Q",
        "evaluations": "evaluations to a sample",
    }

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        samplers: Sequence[str | Callable[[Problem], Sampler]] | None = None,
        reward: Reward | None = None,
        schedule: Schedule | None = None,
        lambda_scale: float = 1.0,
        chains: int = 2**15,
        settings: Settings | None = None,
        bins: int = 60,
        budgets: Sequence[float] = (),
        budget_chains: int = 2**15,
        assert_implementation: bool = False,
    ) -> None:
        check_settings(MixtureSampling, locals(), "--model.")
        super().__init__(seeds)
        bounded("--model.lambda_scale", lambda_scale, 0.0)
        for name, value in (("chains", chains), ("budget_chains", budget_chains)):
            bounded(f"--model.{name}", value, 100)
        bounded("--model.bins", bins, 2)
        for factor in budgets:
            bounded("--model.budgets", factor, 0.0, 1000.0, above=True)
        self.reward = from_hparam(Reward, reward, "reward", ActionValue())
        self.schedule = from_hparam(Schedule, schedule, "schedule", Linear())
        check_schedule(self.schedule)
        self.lambda_scale, self.chains, self.settings = lambda_scale, chains, as_dataclass(Settings, settings)
        self.bins, self.budgets, self.budget_chains = bins, sorted(budgets), budget_chains
        self.assert_implementation = assert_implementation
        # a mixture and a reward on which every sampler can be made: the run's own are asked with the data
        anywhere = dataclasses.replace(self.problem_on(GaussianMixture()), reward=ActionValue())
        general = [n for n, make in KNOWN.items() if not make(anywhere).linear_only]
        self.makers = make_samplers(general if samplers is None else samplers, anywhere)
        for name, make in self.makers.items():
            require(
                not make(anywhere).linear_only,
                f"--model.samplers: {name!r} is not allowed here, it needs the linear-Gaussian problem; leave it out",
            )
        self.samples: dict[str, list[Sample]] = {}
        self.rows = []
        self.costs: dict[str, int] = {}
        self.exact_points: list[Array] = []
        self.frontier: dict[str, tuple[list[float], Array]] = {}

    # what ToyModule asks for

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`.

        Raises:
            ToyError: the data module is no GaussianMixture, no exact distribution is known, or settings do not fit.
        """
        data = require_data(data, GaussianMixture)
        problem = self.problem_on(data)
        self.check_problem(problem, self.sampler_names, self.chains)
        self.check_own_samplers(problem, self.sampler_names)
        return {"batch_size": data.batch_size}

    # the problem

    @property
    def problem(self) -> Problem:
        """The sampling problem, on the attached Trainer's data."""
        return self.problem_on(require_data(self.trainer.datamodule, GaussianMixture))  # type: ignore[attr-defined]

    def problem_on(self, data: GaussianMixture) -> Problem:
        """Return the sampling problem whose untilted distribution is that of ``data``."""
        return Problem(data.joint, self.reward, self.schedule, self.lambda_scale, self.settings, MixtureModel())

    def maker(self, name: str) -> MakeSampler:
        """See :meth:`SamplerEvaluation.maker`."""
        if name in self.makers:
            return self.makers[name]
        return make_samplers([name], dataclasses.replace(self.problem_on(GaussianMixture()), reward=ActionValue()))[
            name
        ]

    def truth(self, problem: Problem) -> Truth:
        """Return what is exactly known of the target."""
        target: Any = problem.tilted
        distribution: Truth = target.truth
        return distribution

    def check_problem(self, problem: Problem, names: Sequence[str], chains: int) -> None:
        """Refuse rewards without an exact distribution, samplers that cannot be made, and too few chains for a group.

        Raises:
            ToyError: names the setting.
        """
        check_reward(problem.reward, problem.joint)
        self.truth(problem)
        samplers = {name: make_attempt(name, self.maker(name), problem) for name in names}
        for name, sampler in samplers.items():
            require(
                chains >= sampler.group or not sampler.whole_groups,
                f"--model.chains: {chains} is not allowed with {name}; give at least {sampler.group}, a group of its "
                "draws",
            )
        if unstable := [n for n, sampler in samplers.items() if sampler.unadjusted]:
            bound = 2 / problem.tilted.tau
            require(
                self.settings.ula_step < bound,
                f"--model.settings.ula_step: {self.settings.ula_step} is not allowed here, {' and '.join(unstable)} "
                f"may run away; give a number below 2 / tau = {bound:.3g}",
            )

    # sampling

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(self, sampler: str, chains: int | None = None, data: GaussianMixture | None = None) -> Tensor:
        """Return samples of x = (a, s') from one sampler, (R, chains, D) in float64 on the CPU.

        >>> MixtureSampling(seeds=[0, 1]).sample("sde_dps", chains=1000, data=GaussianMixture()).shape
        torch.Size([2, 1000, 2])

        Args:
            sampler: a name such as ``"mala"``.
            chains: chains of each replica; as many as the module's if left out.
            data: the mixture; the attached Trainer's data if left out.

        Raises:
            ToyError: there are no data, no such sampler, or chains and settings do not fit the sampler.
        """
        if data is None and self._trainer is not None:
            data = self._trainer.datamodule  # type: ignore[attr-defined]
        require(isinstance(data, GaussianMixture), "sample: no data are attached; give data=GaussianMixture(...)")
        assert data is not None
        chains = self.chains if chains is None else chains
        require(chains >= 1, f"sample: chains={chains} is not allowed; give an integer >= 1")
        problem = self.problem_on(data)
        self.check_problem(problem, [sampler], chains)
        found = run_chains(self.maker(sampler)(problem), self.seeds, chains, self.like)
        return torch.from_numpy(np.stack([points_of(x) for x in found]))

    def work_progress(self, blocks: int) -> WorkProgress:
        """Return the progress of drawing so many blocks of chains."""
        return WorkProgress(blocks, "drawing", self.shows_progress)

    def drawn(
        self, name: str, problem: Problem, chains: int, progress: WorkProgress
    ) -> tuple[Sampler, list[Sample], float]:
        """Return a sampler, its samples, one a seed, and the share of draws that ran away, which are left out.

        Raises:
            ToyError: most of them ran away, or one of a group that depends on the others.
        """
        sampler, samples, near = self.drawn_near(name, problem, chains, progress)
        lost = 1 - float(np.mean(near))
        if lost == 0:
            return sampler, samples, 0.0
        require(
            lost < 0.5 and not sampler.group,
            f"--model.samplers: {name} ran away, {lost:.2g} of its draws are not finite or {FAR:g} deviations from "
            "the target; give smaller steps, more levels or a weaker tilt, or leave it out",
        )
        note(
            f"warning: {name} ran away in {lost:.2g} of its draws, which are left out of its distances; smaller steps "
            "or more levels would keep them"
        )
        kept = [dataclasses.replace(x, a=x.a[..., ok], s=x.s[..., ok]) for x, ok in zip(samples, near, strict=True)]
        return sampler, kept, lost

    def drawn_near(
        self, name: str, problem: Problem, chains: int, progress: WorkProgress
    ) -> tuple[Sampler, list[Sample], list[npt.NDArray[np.bool_]]]:
        """Return a sampler, its samples, one a seed, and for each whether its draws (n,) are near the target."""
        sampler = self.maker(name)(problem)
        with torch.autocast(self.device.type, enabled=False):  # scores are small differences
            samples = self.run_samplers([sampler] * len(self.seeds), chains, progress)
        truth = self.truth(problem)
        std = np.sqrt(np.maximum(np.diag(truth.covariance), np.diag(truth.prior.covariance)))
        with np.errstate(invalid="ignore", over="ignore"):
            near = [np.all(np.abs(points_of(x) - truth.mean) < FAR * std, axis=1) for x in samples]
        return sampler, samples, near

    def evaluate(self) -> Report:
        """Run every sampler, and return its distances to the exact distribution."""
        problem = self.problem
        data = require_data(self.trainer.datamodule, GaussianMixture)  # type: ignore[attr-defined]
        joint, truth = data.joint, self.truth(problem)
        if not self.schedule.reaches_target:
            note(
                f"warning: schedule {type(self.schedule).__name__} does not end at the tilt, annealed samplers miss it"
            )
        names = self.sampler_names
        blocks = len(names) * self.local_blocks(self.chains)
        blocks += len(names) * len(self.budgets) * self.local_blocks(self.budget_chains)
        metrics: dict[str, list[float]] = {}
        checks = []
        self.samples, self.costs, self.frontier = {}, {}, {}
        with self.work_progress(blocks) as progress:
            for name in names:
                sampler, samples, lost = self.drawn(name, problem, self.chains, progress)
                cost = sampler.cost()
                self.samples[name], self.costs[name] = samples, cost.total
                rows = [
                    distances(joint, self.reward, truth, points_of(x))
                    | {"lost": lost}
                    | mixing_metrics(first_action(x), sampler.stationary, cost.total)
                    | {k: float(v) for k, v in (*cost._asdict().items(), ("evaluations", cost.total))}
                    | {k: float(np.mean(v)) for k, v in (x.extra or {}).items()}
                    for x in samples
                ]
                metrics |= {f"{k}@{name}": [row[k] for row in rows] for k in rows[0]}
                checks += mixture_checks(sampler, samples, joint, truth, complete=lost == 0)
                if lost:
                    checks.append(ClosedFormCheck(name, "lost", math.nan, "unknown", 0.0, lost, 0.0))
            for name in names if self.budgets else []:
                self.frontier[name] = self.at_budgets(name, problem, joint, truth, progress)
        self.rows = judge(checks)
        arrays: dict[str, Any] = {
            "checks": [r.as_dict() for r in self.rows],
            "verdicts": verdicts(self.rows),
            "exact": exact_statistics(joint, truth) | {"log_z": truth.log_z, "error": truth.error},
            "frontier": {k: {"evaluations": x, "w1": y.tolist()} for k, (x, y) in self.frontier.items()},
        }
        first = {k.partition("@")[0]: v for k, v in metrics.items() if k.endswith(f"@{names[0]}")}
        return Report(self.seeds, first | metrics, self.references(joint, truth), arrays)

    def at_budgets(
        self, name: str, problem: Problem, joint: Any, truth: Truth, progress: WorkProgress
    ) -> tuple[list[float], Array]:
        """Return the evaluations of a sampler at each budget, and ``w1`` (R, budgets), NaN where draws ran away."""
        costs: list[float] = []
        columns: list[list[float]] = []
        for factor in self.budgets:
            scaled = dataclasses.replace(problem, settings=scaled_settings(self.settings, factor))
            if costs and float(self.maker(name)(scaled).cost().total) == costs[-1]:
                continue  # its work does not depend on these settings
            sampler, samples, near = self.drawn_near(name, scaled, self.budget_chains, progress)
            costs.append(float(sampler.cost().total))
            if np.all(near):
                columns.append([distances(joint, self.reward, truth, points_of(x))["w1"] for x in samples])
                continue
            # no reason to lose what else was drawn: at a small budget steps are long
            lost = 1 - float(np.mean(near))
            note(f"warning: {name} ran away in {lost:.2g} of its draws at {factor:g} times its budget, left out there")
            columns.append([math.nan] * len(samples))
        return costs, np.array(columns).T

    def references(self, joint: Any, truth: Truth) -> dict[str, dict[str, float]]:
        """Return the distances of exact draws of the target, and of the untilted distribution."""
        target: Any = self.problem.tilted
        untilted: Truth = target.truth_at(0.0)
        self.exact_points = [truth.draw(seed, self.chains) for seed in self.seeds]
        out = {}
        for name, points in (
            ("exact_draws", self.exact_points),
            ("exact_draws_of_budgets", [truth.draw(seed, self.budget_chains) for seed in self.seeds]),
            ("untilted", [untilted.draw(seed, self.chains) for seed in self.seeds]),
        ):
            rows = [distances(joint, self.reward, truth, x) for x in points]
            out[name] = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        return out

    # Lightning; gradients of rewards are not for inference mode, whose tensors have none

    @torch.inference_mode(False)
    @torch.no_grad()
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run every sampler; ``test`` also writes facts.md."""
        self.last_report = self.evaluate()
        self.write_evaluation(self.last_report)

    @torch.inference_mode(False)
    @torch.no_grad()
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run every sampler, and write facts.md."""
        self.last_report = report = self.evaluate()
        keep = {f"test/{k}": torch.tensor(v) for k, v in report.metrics.items() if k.startswith(tuple(self.headline))}
        self.write_scalars(keep, self.loaded_step)
        if not (self.trainer.is_global_zero and self.keeps_files) or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        make_folder(self.run_folder)
        path = self.run_folder / "facts.md"
        set_aside(path)
        summary = summary_lines(self.truth(self.problem), report, self.rows, self.sampler_names)
        write_atomic(path, "\n".join([*summary, "", *check_table(self.rows)]) + "\n")
        self.tell("\n".join(summary))
        self.tell(f"every moment with its error: {path}")
        self.tell(f"metrics without @ are those of {self.sampler_names[0]}, the first of --model.samplers")

    @torch.inference_mode(False)
    @torch.no_grad()
    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the sample (R, chains, D) of each sampler; where draws ran away, as many as every seed has left."""
        problem, out = self.problem, {}
        with self.work_progress(len(self.sampler_names) * self.local_blocks(self.chains)) as progress:
            for name in self.sampler_names:
                _, samples, _ = self.drawn(name, problem, self.chains, progress)
                points = [points_of(x) for x in samples]
                least = min(map(len, points))
                out[name] = torch.from_numpy(np.stack([x[:least] for x in points]))
        return out

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if not self.samples or self.last_report is None:
            return {}
        report, joint, truth = self.last_report, self.problem.joint, self.truth(self.problem)
        coordinates: list[str] = joint.coordinates  # type: ignore[attr-defined]
        out = {
            f"match_{name}": mixture_figures.draw_marginals(
                truth, coordinates, name, points_of(samples[0]), self.exact_points[0], self.bins
            )
            for name, samples in self.samples.items()
        }
        families = {name: self.maker(name)(self.problem).family for name in self.sampler_names}
        curves = self.frontier or {
            name: ([float(self.costs[name])], np.array([[v] for v in report.metrics[f"w1@{name}"]]))
            for name in self.sampler_names
        }
        floor = report.references["exact_draws_of_budgets" if self.frontier else "exact_draws"]["w1"]
        out["frontier"] = mixture_figures.draw_frontier(curves, families, floor, self.metric_labels["w1"])
        if len(truth.weights) > 1:
            out["modes"] = mixture_figures.draw_modes(self.rows, truth.weights)
        return out
