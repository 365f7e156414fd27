"""TiltedSampling: samplers of the tilted target beside its closed form, without any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import bounded, note, require
from lightning_toys.mirror_descent import figures
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import (
    check_table,
    closed_form_checks,
    distribution_table,
    off_target_warning,
)
from lightning_toys.mirror_descent.data import LinearGaussian
from lightning_toys.mirror_descent.diagnostics import Sample, distribution_metrics, exact_draws, mixing_metrics
from lightning_toys.mirror_descent.hparams import from_hparam
from lightning_toys.mirror_descent.joint import gaussian_kl
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.registry import SAMPLERS, check_samplers
from lightning_toys.mirror_descent.samplers import Sampler
from lightning_toys.mirror_descent.schedules import Linear, Schedule
from lightning_toys.mirror_descent.tilt import Reward, StateReward
from lightning_toys.stats import holm
from lightning_toys.training.configuration import as_dataclass, require_data
from lightning_toys.training.files import make_folder, partial_name, put_in_place, set_aside, write_atomic
from lightning_toys.training.loader import Batch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.progress import WorkProgress
from lightning_toys.training.results import Report

KS_METRICS = ("action_ks_p", "state_ks_p", "residual_ks_p")
ANNEALED = ("pc_ula", "pc_mala", "pc_joint_mala")


def stack_samples(samples: Sequence[Sample]) -> Tensor:
    """Return the pairs (a, s') of samples of n chains each, one a seed: (R, n, 2), float64 on the CPU."""
    return torch.from_numpy(np.stack([np.stack([x.a, x.s], -1) for x in samples]))


class TiltedSampling(ToyModule):
    """Samples (a, s') from q(a, s') exp(lambda Q(a)) / Z by many samplers, and compares each with the closed form.

    ``test`` needs no checkpoint: there is nothing to train. ``action_kl@gibbs``, ... are the metrics of each sampler,
    and those without ``@`` are the first sampler's.

    Args:
        seeds: one seed a replica.
        samplers: names of the samplers; all if left out.
        reward: gives Q.
        schedule: how the tilt grows over the noise levels.
        lambda_scale: lambda, the inverse temperature of the tilt at the clean end.
        chains: chains of each sampler and seed.
        settings: how much work the samplers do.
        bins: equally likely bins of the histogram KL, and bars of the figures.
        sweep_max_refresh: largest refresh_L of the figure of KL against refreshes; 0 leaves it out.
        sweep_chains: chains of each seed there.
        gif: write anim_<sampler>.gif of the annealed samplers.

    Raises:
        ToyError: a value is not allowed.
    """

    experiment = "mirror_descent"
    trains = False
    allowed_samplers: Sequence[str] = list(SAMPLERS)
    headline: Sequence[str] = ("joint_kl", "action_kl", "cond_ratio")
    metric_labels: Mapping[str, str] = {
        "joint_kl": "KL of (a, s') to the tilted law, by moments (nats)",
        "action_kl": "KL of the action to the tilted law, by moments (nats)",
        "cond_ratio": "Var(s' | a) over what it was",
        "evaluations": "evaluations to a sample",
    }

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        samplers: Sequence[str] | None = None,
        reward: Reward | None = None,
        schedule: Schedule | None = None,
        lambda_scale: float = 1.5,
        chains: int = 2**15,
        settings: Settings | None = None,
        bins: int = 60,
        sweep_max_refresh: int = 4,
        sweep_chains: int = 2**14,
        gif: bool = False,
    ) -> None:
        super().__init__(seeds)
        self.set_options(
            samplers, reward, schedule, lambda_scale, chains, settings, bins, sweep_max_refresh, sweep_chains, gif
        )

    def set_options(
        self,
        samplers: Sequence[str] | None,
        reward: Reward | None,
        schedule: Schedule | None,
        lambda_scale: float,
        chains: int,
        settings: Settings | None,
        bins: int,
        sweep_max_refresh: int,
        sweep_chains: int,
        gif: bool,
    ) -> None:
        """Check and keep the options of sampling; see the class for each."""
        allowed = list(self.allowed_samplers)
        self.sampler_names = check_samplers(samplers if samplers is not None else allowed, allowed)
        bounded("--model.lambda_scale", lambda_scale, 0.0)
        for name, value in (("chains", chains), ("sweep_chains", sweep_chains)):
            bounded(f"--model.{name}", value, 100)
        bounded("--model.bins", bins, 2)
        bounded("--model.sweep_max_refresh", sweep_max_refresh, 0, 100)  # as many pictures' points
        self.reward = from_hparam(Reward, reward, "reward", StateReward())
        self.schedule = from_hparam(Schedule, schedule, "schedule", Linear())
        self.lambda_scale, self.chains, self.settings = lambda_scale, chains, as_dataclass(Settings, settings)
        self.bins, self.sweep_max_refresh, self.sweep_chains, self.gif = bins, sweep_max_refresh, sweep_chains, gif
        self.samples: dict[str, list[Sample]] = {}
        self.exact_samples: list[Sample] = []
        self.refresh_curves: dict[str, dict[str, np.ndarray]] = {}
        self.costs: dict[str, int] = {}

    # what ToyModule asks for

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`.

        Raises:
            ToyError: the data module is no LinearGaussian, ULA would be unstable, or there are too few chains for SMC.
        """
        data = require_data(data, LinearGaussian)
        self.check_sampling(self.problem_on(data), self.sampler_names, self.chains)
        return {"batch_size": data.batch_size}

    def check_sampling(self, problem: Problem, names: Sequence[str], chains: int) -> None:
        """Refuse step sizes with which ULA is unstable, and too few chains for one run of SMC.

        Raises:
            ToyError: names the setting.
        """
        if unstable := [n for n in names if n in ("ula", "pc_ula")]:
            targets = [problem.target, *(problem.levels if "pc_ula" in unstable else [])]
            step, bound = self.settings.ula_step, 2 / max(tilted.tau for tilted in targets)
            require(
                step < bound,
                f"--model.settings.ula_step: {step} is not allowed here, {' and '.join(unstable)} would run away; "
                f"give a number below 2 / tau = {bound:.3g}",
            )
        particles = self.settings.smc_particles
        require(
            "smc_twisted" not in names or chains >= particles,
            f"--model.chains: {chains} is not allowed with smc_twisted; give at least "
            f"--model.settings.smc_particles, {particles}",
        )

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
    def problem(self) -> Problem:
        """The sampling problem, on the attached Trainer's data."""
        return self.problem_on(require_data(self.trainer.datamodule, LinearGaussian))  # type: ignore[attr-defined]

    def problem_on(self, data: LinearGaussian) -> Problem:
        """Return the sampling problem whose untilted distribution is that of ``data``."""
        return Problem(data.joint, self.reward, self.schedule, self.lambda_scale, self.settings)

    # sampling

    def build_samplers(self, problem: Problem, names: Sequence[str]) -> dict[str, list[Sampler]]:
        """Return label to samplers, one a seed; the first label's metrics are those without ``@``."""
        return {name: [SAMPLERS[name](problem)] * len(self.seeds) for name in names}

    def sampler_name(self, label: str) -> str:
        """Return the name of a label's sampler."""
        return label

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(self, sampler: str, chains: int | None = None, data: LinearGaussian | None = None) -> Tensor:
        """Return samples of (a, s') from one sampler, (R, chains, 2) in float64 on the CPU: those that ``test`` draws.

        Noise is keyed by the replica's seed and the chain: of more chains the first are the same. No Trainer is needed.

        >>> module = TiltedSampling(seeds=[0, 1])
        >>> module.sample("mala", chains=1000, data=LinearGaussian()).shape
        torch.Size([2, 1000, 2])

        Args:
            sampler: a name such as ``"mala"``; in ``test`` what follows the ``@`` of a metric.
            chains: chains of each replica; as many as the module's if left out.
            data: has the untilted distribution; the attached Trainer's data if left out.

        Raises:
            ToyError: there are no data, no such sampler, or chains and settings do not fit the sampler.
        """
        if data is None and self._trainer is not None:
            data = self._trainer.datamodule  # type: ignore[attr-defined]
        require(isinstance(data, LinearGaussian), "sample: no data are attached; give data=LinearGaussian(...)")
        assert data is not None
        chains = self.chains if chains is None else chains
        require(chains >= 1, f"sample: chains={chains} is not allowed; give an integer >= 1")
        names = check_samplers([self.sampler_name(sampler)], self.allowed_samplers)
        problem = self.problem_on(data)
        self.check_sampling(problem, names, chains)
        return stack_samples(run_chains(self.build_samplers(problem, names)[sampler], self.seeds, chains, self.like))

    @property
    def like(self) -> Tensor:
        """A tensor () with the device and dtype of the chains: the module's device, torch's default dtype."""
        return torch.zeros((), device=self.device, dtype=torch.get_default_dtype())

    def run_samplers(self, samplers: Sequence[Sampler], chains: int, progress: WorkProgress) -> list[Sample]:
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
        )

    def local_blocks(self, chains: int) -> int:
        """Return how many blocks of chains this rank draws of a sampler."""
        trainer = self.trainer
        blocks = len(self.seeds) * -(-chains // BLOCK_SIZE)
        return len(range(trainer.global_rank, blocks, trainer.world_size))

    def evaluate(self) -> Report:
        """Run every sampler, and return its metrics against the closed form."""
        problem = self.problem
        if not self.schedule.reaches_target and (warning := off_target_warning(problem)):
            note(warning)
        samplers_by_label = self.build_samplers(problem, self.sampler_names)
        swept = [n for n in ANNEALED if n in self.sampler_names] if self.sweep_max_refresh else []
        work = len(samplers_by_label) * self.local_blocks(self.chains)
        work += len(swept) * (self.sweep_max_refresh + 1) * self.local_blocks(self.sweep_chains)
        metrics: dict[str, list[float]] = {}
        self.samples, self.costs = {}, {}
        with WorkProgress(work, "drawing", self.shows_progress) as progress:
            for name, samplers in samplers_by_label.items():
                sampler = samplers[0]
                samples = self.run_samplers(samplers, self.chains, progress)
                self.samples[name], self.costs[name] = samples, sampler.cost().total
                rows = [
                    distribution_metrics(problem, x, self.bins, sampler.independent)
                    | mixing_metrics(x, sampler.stationary)
                    for x in samples
                ]
                for row in rows:
                    row |= {k: float(v) for k, v in sampler.cost()._asdict().items()}
                    row["evaluations"] = float(sampler.cost().total)
                for row, x in zip(rows, samples, strict=True):
                    row |= {k: float(np.mean(v)) for k, v in (x.extra or {}).items()}
                found = {k: [row[k] for row in rows] for k in rows[0]}
                metrics |= {f"{k}@{name}": v for k, v in found.items()}
            self.refresh_curves = {name: self.sweep_refreshes(name, problem, progress) for name in swept}
        for family in self.holm_families(list(samplers_by_label)):
            self.adjust_p_values(metrics, family)
        first = {k.partition("@")[0]: v for k, v in metrics.items() if k.endswith(f"@{next(iter(samplers_by_label))}")}
        return Report(self.seeds, first | metrics, self.baselines(problem))

    def holm_families(self, labels: list[str]) -> list[list[str]]:
        """Return the families of labels within which p-values are adjusted."""
        return [labels]

    def adjust_p_values(self, metrics: dict[str, list[float]], labels: Sequence[str]) -> None:
        """Add ``*_p_holm``: each seed's Kolmogorov-Smirnov p-values adjusted over the family (Holm 1979)."""
        names = [f"{k}@{name}" for name in labels for k in KS_METRICS if f"{k}@{name}" in metrics]
        for r in range(len(self.seeds)):
            for name, p in zip(names, holm([metrics[n][r] for n in names]), strict=True):
                metrics.setdefault(name.replace("_p@", "_p_holm@"), []).append(float(p))

    def sweep_refreshes(self, name: str, problem: Problem, progress: WorkProgress) -> dict[str, np.ndarray]:
        """Return ``action_kl`` and ``state_kl`` (R, L + 1) of a sampler for refresh_L from 0 to L."""
        found: dict[str, list[list[float]]] = {"action_kl": [], "state_kl": []}
        for count in range(self.sweep_max_refresh + 1):
            settings = dataclasses.replace(self.settings, refresh_L=count, final_refresh=False)
            samplers = self.build_samplers(dataclasses.replace(problem, settings=settings), [name])[name]
            rows = [
                distribution_metrics(problem, x, self.bins)
                for x in self.run_samplers(samplers, self.sweep_chains, progress)
            ]
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
        clean, target = problem.joint.clean, problem.tilted_joint
        out["untilted"] = {
            "joint_kl": gaussian_kl(clean.m, clean.C, target.m, target.C),
            "action_kl": gaussian_kl(clean.m[0], clean.C[0, 0], target.m[0], target.C[0, 0]),
        }
        return out

    # Lightning

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run every sampler; ``test`` also writes facts.md."""
        self.last_report = self.evaluate()
        self.write_evaluation(self.last_report)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run every sampler, and write facts.md and the animations."""
        self.last_report = self.evaluate()
        keep = {
            f"test/{k}": torch.tensor(v)
            for k, v in self.last_report.metrics.items()
            if k.startswith(tuple(self.headline))
        }
        self.write_scalars(keep, self.loaded_step)
        writes = self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if writes and self.keeps_files:
            make_folder(self.run_folder)
            path = self.run_folder / "facts.md"
            set_aside(path)
            text = "\n".join(self.tables(self.problem, self.last_report))
            write_atomic(path, text + "\n")
            self.tell(text)
        if writes and self.gif:
            self.write_animations()

    def tables(self, problem: Problem, report: Report) -> list[str]:
        """Return the lines of facts.md."""
        checks = [c for n, x in self.samples.items() for c in closed_form_checks(SAMPLERS[n](problem), x)]
        exact = {n: x for n in self.sampler_names if (x := SAMPLERS[n](problem).exact_distribution()) is not None}
        measured = {n: report.metrics[f"joint_kl@{n}"] for n in self.sampler_names}
        return [*check_table(checks), "", *distribution_table(problem, exact, measured)]

    def write_animations(self) -> None:
        """Write anim_<sampler>.gif of each annealed sampler."""
        annealed = [n for n in self.sampler_names if n in ANNEALED]
        if not annealed:
            note(f"--model.gif: no animation, none of --model.samplers is annealed ({', '.join(ANNEALED)})")
        for name in annealed:
            sampler = self.build_samplers(self.problem, [name])[name][0]
            sampler.num_traced = 4000
            path = self.run_folder / "figures" / f"anim_{name}.gif"
            make_folder(path.parent)
            trace = run_chains(sampler, self.seeds[:1], 100, self.like)[0].trace
            assert trace is not None
            partial = partial_name(path)
            figures.animate(partial, self.problem, name, trace, self.bins)
            set_aside(path)
            put_in_place(partial, path)
            self.tell(f"animation: {path}")

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the sample (R, chains, 2) of each label: pairs (a, s')."""
        out, samplers_by_label = {}, self.build_samplers(self.problem, self.sampler_names)
        work = len(samplers_by_label) * self.local_blocks(self.chains)
        with WorkProgress(work, "drawing", self.shows_progress) as progress:
            for name, samplers in samplers_by_label.items():
                out[name] = stack_samples(self.run_samplers(samplers, self.chains, progress))
        return out

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if not self.samples or self.last_report is None:
            return {}
        problem, report = self.problem, self.last_report
        out = {
            f"match_{name}": figures.draw_densities(
                problem, name, self.samples[name][0], self.exact_samples[0], self.bins
            )
            for name in self.sampler_names
        }
        costs = {name: self.costs[name] for name in self.sampler_names}
        out["frontier"] = figures.draw_error_vs_cost(report.metrics, costs, report.references["exact_draws"])
        if self.refresh_curves:
            out["kl_vs_refresh"] = figures.draw_kl_vs_refresh(
                self.refresh_curves, range(self.sweep_max_refresh + 1), 1 / self.sweep_chains
            )
        kept = {n: self.samples[n][0].trace for n in self.sampler_names if SAMPLERS[n].stationary}
        traces = {n: trace for n, trace in kept.items() if trace is not None}
        if traces:
            out["ranks"] = figures.draw_rank_histograms(traces)
        return out
