"""TiltedSampling: samplers of the tilted target beside its closed form, without any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.errors import bounded, check_settings, note, require
from lightning_toys.mirror_descent import figures, sample_figures
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import (
    Row,
    check_table,
    distribution_table,
    verdict_lines,
)
from lightning_toys.mirror_descent.data import LinearGaussian
from lightning_toys.mirror_descent.diagnostics import (
    Sample,
)
from lightning_toys.mirror_descent.evaluation import SamplerEvaluation
from lightning_toys.mirror_descent.hparams import from_hparam
from lightning_toys.mirror_descent.own import check_schedule
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.mirror_descent.schedules import Linear, Schedule
from lightning_toys.mirror_descent.shipped import KNOWN, SHORT_NAMES, class_path_of, make_samplers
from lightning_toys.mirror_descent.sweeps import Curves, refresh_lines, sweep_settings
from lightning_toys.mirror_descent.tilt import Reward, StateReward
from lightning_toys.training.configuration import as_dataclass, require_data
from lightning_toys.training.files import make_folder, partial_name, put_in_place, set_aside, write_atomic
from lightning_toys.training.progress import WorkProgress
from lightning_toys.training.results import Report


def stack_samples(samples: Sequence[Sample]) -> Tensor:
    """Return the pairs (a, s') of samples of n chains each, one a seed: (R, n, 2), float64 on the CPU."""
    return torch.from_numpy(np.stack([np.stack([x.a, x.s], -1) for x in samples]))


class TiltedSampling(SamplerEvaluation):
    """Samples (a, s') from q(a, s') exp(lambda Q(a)) / Z by many samplers, and compares each with the closed form.

    ``test`` needs no checkpoint: there is nothing to train. ``action_kl@gibbs``, ... are the metrics of each sampler,
    and those without ``@`` are the first sampler's.

    Args:
        seeds: one seed a replica.
        samplers: the samplers: short names, class paths of your own (or, from Python, :class:`Sampler` classes); all
            shipped ones if left out.
        reward: gives Q.
        schedule: how the tilt grows over the noise levels.
        lambda_scale: lambda, the inverse temperature of the tilt at the clean end.
        chains: chains of each sampler and seed.
        settings: how much work the samplers do.
        bins: equally likely bins of the histogram KL, and bars of the figures.
        sweep_max_refresh: largest refresh_L of the figure of KL against refreshes; 0 leaves it out.
        sweep_chains: chains of each seed there.
        gif: write anim_<sampler>.gif of every sampler.
        assert_implementation: fail, with exit code 1, where samples differ from the exact moments of their sampler.

    Raises:
        ToyError: a value is not allowed.
    """

    experiment = "mirror_descent"
    headline: Sequence[str] = ("joint_kl", "action_kl", "cond_ratio")
    error_metrics: Sequence[str] = ("joint_kl", "action_kl")
    metric_labels: Mapping[str, str] = {
        "joint_kl": "KL of (a, s') to the tilted distribution, by moments (nats)",
        "action_kl": "KL of the action to the tilted distribution, by moments (nats)",
        "cond_ratio": "Var(s' | a) over what it was",
        "evaluations": "evaluations to a sample",
        "esjd_per_cost": "squared jumps of all steps, per evaluation",
    }

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        samplers: Sequence[str | Callable[[Problem], Sampler]] | None = None,
        reward: Reward | None = None,
        schedule: Schedule | None = None,
        lambda_scale: float = 1.5,
        chains: int = 2**15,
        settings: Settings | None = None,
        bins: int = 60,
        sweep_max_refresh: int = 4,
        sweep_chains: int = 2**14,
        gif: bool = False,
        assert_implementation: bool = False,
    ) -> None:
        check_settings(TiltedSampling, locals(), "--model.")
        super().__init__(seeds)
        self.set_options(
            samplers, reward, schedule, lambda_scale, chains, settings, bins, sweep_max_refresh, sweep_chains, gif
        )
        self.assert_implementation = assert_implementation

    def set_options(
        self,
        samplers: Sequence[str | Callable[[Problem], Sampler]] | None,
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
        bounded("--model.lambda_scale", lambda_scale, 0.0)
        for name, value in (("chains", chains), ("sweep_chains", sweep_chains)):
            bounded(f"--model.{name}", value, 100)
        bounded("--model.bins", bins, 2)
        bounded("--model.sweep_max_refresh", sweep_max_refresh, 0, 100)  # as many pictures' points
        self.reward = from_hparam(Reward, reward, "reward", StateReward())
        self.schedule = from_hparam(Schedule, schedule, "schedule", Linear())
        check_schedule(self.schedule)
        self.lambda_scale, self.chains, self.settings = lambda_scale, chains, as_dataclass(Settings, settings)
        self.bins, self.sweep_max_refresh, self.sweep_chains, self.gif = bins, sweep_max_refresh, sweep_chains, gif
        # the shipped reward: whether a sampler can do without closed forms of somebody's own is asked with the data
        anywhere = dataclasses.replace(self.problem_on(LinearGaussian()), reward=StateReward())
        shipped = [n for n, make in SHORT_NAMES.items() if make(anywhere).reads_score or not self.learned]
        self.makers = make_samplers(shipped if samplers is None else samplers, anywhere, self.learned)
        self.samples: dict[str, list[Sample]] = {}
        self.reference_samplers: dict[str, Sampler] = {}  # in the original coordinates, with what is known of each
        self.rows: list[Row] = []
        self.exact_samples: list[Sample] = []
        self.curves: dict[str, Curves] = {}
        self.costs: dict[str, int] = {}
        self.assert_implementation = False

    def sampler_hparams(self) -> list[str | dict[str, str]]:
        """Return the samplers as plain values: short names, and class paths of those of somebody's own."""
        return [n if n in KNOWN else {"class_path": class_path_of(make)} for n, make in self.makers.items()]

    # what ToyModule asks for

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`.

        Raises:
            ToyError: the data module is no LinearGaussian, ULA would be unstable, or there are too few chains for SMC.
        """
        data = require_data(data, LinearGaussian)
        problem = self.problem_on(data)
        self.check_sampling(problem, self.sampler_names, self.chains)
        self.check_own_samplers(problem, self.sampler_names)
        return {"batch_size": data.batch_size}

    # sampling

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
        name, problem = self.sampler_name(sampler), self.problem_on(data)
        self.check_sampling(problem, [name], chains)
        return stack_samples(run_chains(self.build_centred(problem, [name])[sampler], self.seeds, chains, self.like))

    def work_progress(self, blocks: int) -> WorkProgress:
        """Return the progress of drawing so many blocks of chains."""
        return WorkProgress(blocks, "drawing", self.shows_progress)

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
            self.tell(f"metrics without @ are those of {next(iter(self.samples))}, the first of --model.samplers")
        if writes and self.gif:
            self.write_animations()

    def tables(self, problem: Problem, report: Report) -> list[str]:
        """Return the lines of facts.md."""
        known = {n: s.exact_distribution() for n, s in self.reference_samplers.items()}
        exact = {n: x for n, x in known.items() if x is not None}
        measured = {n: report.metrics[f"joint_kl@{n}"] for n in self.sampler_names}
        distributions = distribution_table(problem, exact, measured)
        refreshes = refresh_lines(problem, self.sweep_max_refresh) if "pc_ula" in self.reference_samplers else []
        lines = [*check_table(self.rows), "", *distributions, "", *verdict_lines(self.rows)]
        return [*lines, "", *refreshes] if refreshes else lines

    def write_animations(self) -> None:
        """Write anim_<sampler>.gif of each sampler that records its steps."""
        for name in self.sampler_names:
            sampler = self.build_centred(self.problem, [name])[name][0]
            sampler.num_traced = 4000
            (sample,) = run_chains(sampler, self.seeds[:1], 100, self.like)
            if sample.trace is None:
                note(f"--model.gif: no animation of {name}, which records no steps")
                continue
            path = self.run_folder / "figures" / f"anim_{name}.gif"
            make_folder(path.parent)
            partial = partial_name(path)
            sample_figures.animate(partial, self.problem, self.reference_samplers[name], sample, self.bins)
            set_aside(path)
            put_in_place(partial, path)
            self.tell(f"animation: {path}")

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the sample (R, chains, 2) of each label: pairs (a, s')."""
        out, samplers_by_label = {}, self.build_centred(self.problem, self.sampler_names)
        compiled = self.is_compiled(samplers_by_label, self.chains)
        work = len(samplers_by_label) * self.local_blocks(self.chains)
        with self.work_progress(work) as progress:
            for name, samplers in samplers_by_label.items():
                samples = self.run_samplers(samplers, self.chains, progress, compiled)
                self.check_draws(name, samples)
                out[name] = stack_samples(samples)
        return out

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if not self.samples or self.last_report is None:
            return {}
        problem, report, references = self.problem, self.last_report, self.reference_samplers
        out = {
            f"match_{name}": sample_figures.draw_sample(
                problem, name, self.samples[name][0], self.exact_samples[0], self.bins
            )
            for name in self.sampler_names
        }
        costs = {name: self.costs[name] for name in self.sampler_names}
        families = {name: references[name].family for name in self.sampler_names}
        out["frontier"] = figures.draw_error_vs_cost(report.metrics, costs, families, len(self.seeds), self.chains)
        if self.curves:
            plans = sweep_settings(self.settings, self.sweep_max_refresh)
            out["kl_vs_refresh"] = figures.draw_sweeps(self.curves, plans, 1 / self.sweep_chains)
        kept = {n: self.samples[n][0].trace for n in self.sampler_names if references[n].stationary}
        traces = {n: trace for n, trace in kept.items() if trace is not None}
        if traces:
            out["ranks"] = figures.draw_rank_histograms(traces)
        return out
