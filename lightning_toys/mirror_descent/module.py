"""TiltedSampling: every sampler against the exact tilted law, without any training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import note, require
from lightning_toys.mirror_descent import bench, figures
from lightning_toys.mirror_descent.data import LinearGaussian
from lightning_toys.mirror_descent.diagnostics import Sample, exact_draws, law_metrics, mixing_metrics
from lightning_toys.mirror_descent.facts import fact_table, facts_of, law_reached, law_table
from lightning_toys.mirror_descent.joint import gaussian_kl
from lightning_toys.mirror_descent.kernels import BLOCK
from lightning_toys.mirror_descent.problem import Settings, World
from lightning_toys.mirror_descent.registry import SAMPLERS, check_samplers
from lightning_toys.mirror_descent.samplers import Sampler
from lightning_toys.mirror_descent.schedules import Linear, Schedule
from lightning_toys.mirror_descent.tilt import Reward, StateReward
from lightning_toys.stats import holm
from lightning_toys.training.configuration import require_data
from lightning_toys.training.loader import Batch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.progress import WorkProgress
from lightning_toys.training.results import Report, set_aside, write_atomic

KS = ("action_ks_p", "state_ks_p", "residual_ks_p")
SWEPT = ("pc_ula", "pc_mala", "pc_joint_mala")  # whose refreshes are swept


class TiltedSampling(ToyModule):
    """Draws (a, s') from q(a, s') exp(lambda Q(a)) by many samplers, and holds each against the closed form.

    ``test`` needs no checkpoint: there is nothing to train. The plain metrics are those of the first sampler, and
    ``action_kl@gibbs``, ... those of each.

    Args:
        seeds: one seed a replica.
        asked: see :meth:`ask`.
    """

    experiment = "mirror_descent"
    trains = False
    known: Sequence[str] = list(SAMPLERS)
    headline: Sequence[str] = ("joint_kl", "action_kl", "cond_ratio")
    metric_labels: Mapping[str, str] = {
        "joint_kl": "KL of (a, s') to the tilted law, by moments (nats)",
        "action_kl": "KL of the action to the tilted law, by moments (nats)",
        "cond_ratio": "Var(s' | a) over what it was",
        "evaluations": "evaluations to a sample",
    }

    def __init__(self, seeds: Sequence[int] = (0,), **asked: Any) -> None:
        super().__init__(seeds)
        self.ask(**asked)

    def ask(
        self,
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
        """Keep what is asked of the samplers.

        Args:
            samplers: which, by name; all if left out.
            reward: what is tilted towards.
            schedule: how the tilt grows over the noise levels.
            lambda_scale: lambda, the tilt's strength at the clean end.
            chains: chains of each sampler and seed.
            settings: how much work the samplers do.
            bins: equally likely bins of the histogram KL, and bars of the figures.
            sweep_max_refresh: largest refresh_L of the figure of KL against refreshes; 0 leaves it out.
            sweep_chains: chains of each seed there.
            gif: make anim_<sampler>.gif of the annealed samplers.
        """
        self.names = check_samplers(samplers if samplers is not None else list(self.known), self.known)
        require(
            0 <= lambda_scale < math.inf, f"--model.lambda_scale: {lambda_scale} is not allowed; give a number >= 0"
        )
        for name, value in (("chains", chains), ("sweep_chains", sweep_chains)):
            require(value >= 100, f"--model.{name}: {value} is not allowed; give an integer >= 100")
        require(bins >= 2, f"--model.bins: {bins} is not allowed; give an integer >= 2")
        require(
            sweep_max_refresh >= 0,
            f"--model.sweep_max_refresh: {sweep_max_refresh} is not allowed; give an integer >= 0",
        )
        self.reward, self.schedule = reward or StateReward(), schedule or Linear()
        self.strength, self.chains, self.settings = lambda_scale, chains, settings or Settings()
        self.bins, self.sweep_max_refresh, self.sweep_chains, self.gif = bins, sweep_max_refresh, sweep_chains, gif
        self.drawn: dict[str, list[Sample]] = {}
        self.truth: list[Sample] = []
        self.curves: dict[str, dict[str, np.ndarray]] = {}
        self.costs: dict[str, int] = {}

    # what the house asks

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        data = require_data(data, LinearGaussian)
        world = World(data.joint, self.reward, self.schedule, self.strength, self.settings)
        if unstable := [n for n in self.names if n in ("ula", "pc_ula")]:
            laws = [world.target, *(world.levels if "pc_ula" in unstable else [])]
            step, bound = self.settings.ula_step, 2 / max(law.tau for law in laws)
            require(
                step < bound,
                f"--model.settings.ula_step: {step} is not allowed here, {' and '.join(unstable)} would run away; "
                f"give a number below 2 / tau = {bound:.3g}",
            )
        particles = self.settings.smc_particles
        require(
            "smc_twisted" not in self.names or self.chains >= particles,
            f"--model.chains: {self.chains} is not allowed with smc_twisted; give at least "
            f"--model.settings.smc_particles, {particles}",
        )
        return {"batch_size": data.batch_size}

    def build(self) -> nn.Module:
        """See :meth:`ToyModule.build`: nothing."""
        return nn.Module()

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`: there is no loss."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return f"{type(self.reward).__name__} {type(self.schedule).__name__}"

    @property
    def world(self) -> World:
        """The question asked."""
        joint = require_data(self.trainer.datamodule, LinearGaussian).joint  # type: ignore[attr-defined]
        return World(joint, self.reward, self.schedule, self.strength, self.settings)

    # drawing

    def readouts(self, world: World) -> dict[str, list[Sampler]]:
        """Return what is drawn from: label to one sampler a seed. The first is the one whose metrics are the plain."""
        return {name: [SAMPLERS[name](world)] * len(self.seeds) for name in self.names}

    @property
    def like(self) -> Tensor:
        """A number with the device and dtype of the chains."""
        return torch.zeros((), device=self.device, dtype=torch.get_default_dtype())

    def sample(self, samplers: Sequence[Sampler], chains: int, ticker: WorkProgress) -> list[Sample]:
        """Return each seed's draws."""
        trainer = self.trainer
        return bench.run(
            samplers,
            self.seeds,
            chains,
            self.like,
            trainer.global_rank,
            trainer.world_size,
            lambda blocks: ticker.advance(samplers[0].name, blocks),
        )

    def ticks(self, chains: int) -> int:
        """Return how many blocks this rank draws of a sampler."""
        trainer = self.trainer
        blocks = len(self.seeds) * -(-chains // BLOCK)
        return len(range(trainer.global_rank, blocks, trainer.world_size))

    def evaluate(self) -> Report:
        """Run every sampler, and hold it against the closed form."""
        world = self.world
        if not self.schedule.full_at_the_end and (warning := law_reached(world)):
            note(warning)
        readouts = self.readouts(world)
        swept = [n for n in SWEPT if n in self.names] if self.sweep_max_refresh else []
        work = len(readouts) * self.ticks(self.chains)
        work += len(swept) * (self.sweep_max_refresh + 1) * self.ticks(self.sweep_chains)
        metrics: dict[str, list[float]] = {}
        self.drawn, self.costs = {}, {}
        with WorkProgress(work, "drawing", self.trainer.is_global_zero) as ticker:
            for name, samplers in readouts.items():
                sampler = samplers[0]
                samples = self.sample(samplers, self.chains, ticker)
                self.drawn[name], self.costs[name] = samples, sampler.cost().total
                rows = [
                    law_metrics(world, x, self.bins, sampler.independent) | mixing_metrics(x, sampler.stationary)
                    for x in samples
                ]
                for row in rows:
                    row |= {k: float(v) for k, v in sampler.cost()._asdict().items()}
                    row["evaluations"] = float(sampler.cost().total)
                for row, x in zip(rows, samples, strict=True):
                    row |= {k: float(np.mean(v)) for k, v in (x.extra or {}).items()}
                found = {k: [row[k] for row in rows] for k in rows[0]}
                metrics |= {f"{k}@{name}": v for k, v in found.items()}
            self.curves = {name: self.sweep(name, world, ticker) for name in swept}
        for family in self.families(list(readouts)):
            self.adjust(metrics, family)
        first = {k.partition("@")[0]: v for k, v in metrics.items() if k.endswith(f"@{next(iter(readouts))}")}
        return Report(self.seeds, first | metrics, self.references(world))

    def families(self, readouts: list[str]) -> list[list[str]]:
        """Return the groups of readouts within which p-values are adjusted."""
        return [readouts]

    def adjust(self, metrics: dict[str, list[float]], readouts: Sequence[str]) -> None:
        """Add the p-values of each seed's Kolmogorov-Smirnov tests adjusted over the whole family (Holm 1979)."""
        names = [f"{k}@{name}" for name in readouts for k in KS if f"{k}@{name}" in metrics]
        for r in range(len(self.seeds)):
            for name, p in zip(names, holm([metrics[n][r] for n in names]), strict=True):
                metrics.setdefault(name.replace("_p@", "_p_holm@"), []).append(float(p))

    def sweep(self, name: str, world: World, ticker: WorkProgress) -> dict[str, np.ndarray]:
        """Return KLs (R, L + 1) for refresh_L from 0 to L."""
        found: dict[str, list[list[float]]] = {"action_kl": [], "state_kl": []}
        for count in range(self.sweep_max_refresh + 1):
            settings = dataclasses.replace(self.settings, refresh_L=count, final_refresh=False)
            samplers = self.readouts(dataclasses.replace(world, settings=settings))[name]
            rows = [law_metrics(world, x, self.bins) for x in self.sample(samplers, self.sweep_chains, ticker)]
            for k, columns in found.items():
                columns.append([row[k] for row in rows])
        return {k: np.array(v).T for k, v in found.items()}

    def references(self, world: World) -> dict[str, dict[str, float]]:
        """Return what exact draws of the tilted law show, and the untilted law."""
        self.truth = exact_draws(world, self.seeds, self.chains)
        exact = [law_metrics(world, x, self.bins) for x in self.truth]
        keys = ("joint_kl", "action_kl", "state_kl", "action_kl_hist", "action_w1", "cond_ratio")
        out = {"exact_draws": {k: float(np.mean([row[k] for row in exact])) for k in keys}}
        out["exact_draws"]["action_kl_hist_floor"] = (self.bins - 1) / (2 * self.chains)
        clean, target = world.joint.clean, world.tilted_joint
        out["untilted"] = {
            "joint_kl": gaussian_kl(clean.m, clean.C, target.m, target.C),
            "action_kl": gaussian_kl(clean.m[0], clean.C[0, 0], target.m[0], target.C[0, 0]),
        }
        return out

    # Lightning

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run every sampler; `test` also writes the closed forms beside."""
        self.last_report = self.evaluate()
        self.write_evaluation(self.last_report)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Run every sampler."""
        self.last_report = self.evaluate()
        keep = {
            f"test/{k}": torch.tensor(v)
            for k, v in self.last_report.metrics.items()
            if k.startswith(tuple(self.headline))
        }
        self.write_scalars(keep, self.loaded_step)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.run_folder.mkdir(parents=True, exist_ok=True)
            path = self.run_folder / "facts.md"
            set_aside(path)
            text = "\n".join(self.tables(self.world, self.last_report))
            write_atomic(path, text + "\n")
            note(text)
            if self.gif:
                self.film()

    def tables(self, world: World, report: Report) -> list[str]:
        """Return the lines of facts.md."""
        facts = [f for n, x in self.drawn.items() for f in facts_of(SAMPLERS[n](world), x)]
        laws = {n: law for n in self.names if (law := SAMPLERS[n](world).law()) is not None}
        measured = {n: report.metrics[f"joint_kl@{n}"] for n in self.names}
        return [*fact_table(facts), "", *law_table(world, laws, measured)]

    def film(self) -> None:
        """Write anim_<sampler>.gif of each annealed sampler."""
        annealed = [n for n in self.names if n in SWEPT]
        if not annealed:
            note(f"--model.gif: no animation, none of --model.samplers is annealed ({', '.join(SWEPT)})")
        for name in annealed:
            sampler = self.readouts(self.world)[name][0]
            sampler.watched = 4000
            path = self.run_folder / "figures" / f"anim_{name}.gif"
            path.parent.mkdir(parents=True, exist_ok=True)
            set_aside(path)
            steps = bench.run(sampler, self.seeds[:1], 100, self.like)[0].path
            assert steps is not None
            figures.animate(path, self.world, name, steps, self.bins)
            note(f"animation: {path}")

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return each sampler's draws (R, chains, 2), by name."""
        out, readouts = {}, self.readouts(self.world)
        with WorkProgress(len(readouts) * self.ticks(self.chains), "drawing", self.trainer.is_global_zero) as ticker:
            for name, samplers in readouts.items():
                samples = self.sample(samplers, self.chains, ticker)
                out[name] = torch.from_numpy(np.stack([np.stack([x.a, x.s], -1) for x in samples]))
        return out

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if not self.drawn or self.last_report is None:
            return {}
        world, report = self.world, self.last_report
        out = {
            f"match_{name}": figures.draw_match(world, name, self.drawn[name][0], self.truth[0], self.bins)
            for name in self.names
        }
        costs = {name: self.costs[name] for name in self.names}
        out["frontier"] = figures.draw_frontier(report.metrics, costs, report.references["exact_draws"])
        if self.curves:
            out["kl_vs_refresh"] = figures.draw_refreshes(
                self.curves, range(self.sweep_max_refresh + 1), 1 / self.sweep_chains
            )
        drawn = {n: self.drawn[n][0].path for n in self.names if SAMPLERS[n].stationary}
        paths = {n: path for n, path in drawn.items() if path is not None}
        if paths:
            out["ranks"] = figures.draw_ranks(paths)
        return out
