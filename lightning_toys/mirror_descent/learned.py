"""LearnedSampling: the same samplers with a learned energy, beside themselves with the exact law."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.errors import require
from lightning_toys.mirror_descent import figures
from lightning_toys.mirror_descent.data import LinearGaussian
from lightning_toys.mirror_descent.model import LearnedModel
from lightning_toys.mirror_descent.module import TiltedSampling
from lightning_toys.mirror_descent.problem import World
from lightning_toys.mirror_descent.registry import BY_SCORE, SAMPLERS
from lightning_toys.mirror_descent.samplers import Sampler
from lightning_toys.mirror_descent.score import (
    LEVELS,
    EnergyScore,
    LevelMatrix,
    denoising_losses,
    level_weights,
    one_replica,
    relative_error,
    training_levels,
)
from lightning_toys.nets import Network
from lightning_toys.stats import mean_ci, paired_difference, written
from lightning_toys.training.configuration import as_dataclass, require_data
from lightning_toys.training.loader import Batch
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform
from lightning_toys.training.replica_parallel import Parallel
from lightning_toys.training.results import Report

EXACT = "_exact"  # what the readouts with the exact law end in
MOMENTS = 2**16  # training pairs whose mean and deviation scale the network's input
JUDGED = 2**14  # draws of each level that the score's error is taken over


class LearnedSampling(TiltedSampling):
    """Learns an energy of the noised joint law by denoising score matching, and samples the tilted law with it.

    ``validate`` judges the score at each level; ``test`` also runs every sampler that reads a score twice, with the
    learned energy (``action_kl@pc_mala``) and with the exact law (``action_kl@pc_mala_exact``), on the same noise.

    Args:
        seeds: one seed a replica.
        network: the network (concat or film).
        optimizer: ``adamw``, or ``muon`` on the hidden matrices and AdamW on the rest.
        muon_lr: Muon's learning rate.
        lr: AdamW's learning rate.
        lr_decay: ``cosine`` takes the learning rates to 0 over the run.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of a moving average of the weights, which is then what is judged.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.
        asked: see :meth:`TiltedSampling.ask`.
    """

    trains = True
    known = BY_SCORE
    headline = ("score_error", "joint_kl", "action_kl", "cond_ratio")
    metric_labels: Mapping[str, str] = {
        **TiltedSampling.metric_labels,
        "score_error": "relative error of the score, the worst level's",
    }

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        network: Network | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        muon_lr: float = 0.02,
        lr: float = 1e-3,
        lr_decay: Literal["constant", "cosine"] = "constant",
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        parallel: Parallel = "batch",
        **asked: Any,
    ) -> None:
        super(TiltedSampling, self).__init__(
            seeds, lr, weight_decay, clip_grad_norm, ema_decay, lr_decay, optimizer, muon_lr, parallel
        )
        self.ask(**asked)
        default = Network("film", hidden=32, activation="silu", residual=True)
        self.network = as_dataclass(Network, network, default)
        require(
            self.network.kind != "transformer",
            "--model.network.kind: 'transformer' is not allowed here; give concat or film",
        )
        require(
            self.network.activation != "relu",
            "--model.network.activation: 'relu' is not allowed here, its slope jumps; give gelu, silu or tanh",
        )
        self.hparams.update({"network": asdict(self.network), "lr": lr, "optimizer": optimizer, "seeds": self.seeds})

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        return super().unused_settings() | self.network.unused_settings()

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return f"learned, {super().label}"

    # training

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        sizes = super().measure(data)
        z = torch.from_numpy(keyed_generator(0, 0, "data/moments").standard_normal((MOMENTS, 2)))
        pairs = require_data(data, LinearGaussian).pairs(z)
        return sizes | {"mean": pairs.mean(0).tolist(), "std": pairs.std(0).tolist()}

    def build(self) -> EnergyScore:
        """See :meth:`ToyModule.build`."""
        self.eps_noise = NoiseStream(self.local_seeds, "score/eps", (self.sizes["batch_size"], 2))
        self.level_noise = NoiseStream(self.local_seeds, "score/level", (1, 1), uniform)
        require(
            torch.get_default_dtype() in (torch.float32, torch.float64),
            "--trainer.precision: a half precision throughout is not allowed here, scores are differences; "
            "give 32-true, 64-true or bf16-mixed",
        )
        net = self.network.build(self.local_seeds, 2, 1, True, 2)
        return EnergyScore(net, LevelMatrix(self.local_seeds), self.sizes["mean"], self.sizes["std"])

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`."""
        (x0,) = batch.columns
        local = slice(batch.first, batch.first + x0.shape[1])
        eps = self.eps_noise.at(step, x0)[:, local]
        abar = training_levels(self.level_noise.at(step, x0), batch.total)[:, local]
        assert isinstance(self.net, EnergyScore)
        return (level_weights(abar) * denoising_losses(self.net, x0, eps, abar)).sum(1) / batch.total

    # judging

    @property
    def scored_net(self) -> EnergyScore:
        """The weights that are judged."""
        net = self.ema_net or self.net
        assert isinstance(net, EnergyScore)
        return net

    def readouts(self, world: World) -> dict[str, list[Sampler]]:
        """See :meth:`TiltedSampling.readouts`: every sampler with each replica's energy, then with the exact law."""
        models = [LearnedModel(one_replica(self.scored_net, r)) for r in range(len(self.seeds))]
        worlds = [dataclasses.replace(world, model=model) for model in models]
        learned = {name: [SAMPLERS[name](w) for w in worlds] for name in self.names}
        return learned | {f"{name}{EXACT}": [SAMPLERS[name](world)] * len(self.seeds) for name in self.names}

    def families(self, readouts: list[str]) -> list[list[str]]:
        """See :meth:`TiltedSampling.families`: the learned ones, and those with the exact law."""
        return [[n for n in readouts if n.endswith(EXACT) == exact] for exact in (False, True)]

    def score_errors(self) -> dict[str, list[float]]:
        """Return the score's relative error at each level, and the greatest of them."""
        like = next(self.net.parameters())
        z = keyed_generator(0, 0, "evaluation/score").standard_normal((JUDGED, 2), np.float32)
        joint = self.world.joint
        errors = [relative_error(self.scored_net, joint, abar, torch.from_numpy(z).to(like)) for abar in LEVELS]
        found = torch.stack(errors).cpu().double()
        out = {"score_error": found.amax(0).tolist()}
        return out | {f"score_error@{abar:g}": e.tolist() for abar, e in zip(LEVELS, found, strict=True)}

    # a score is a gradient: not in inference mode, whose tensors have none

    @torch.inference_mode(False)
    @torch.no_grad()
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Judge the score."""
        self.last_report = Report(self.seeds, self.score_errors())
        self.write_evaluation(self.last_report)

    @torch.inference_mode(False)
    @torch.no_grad()
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Judge the score, and run every sampler with either law."""
        super().test_step(batch, batch_idx)

    @torch.inference_mode(False)
    @torch.no_grad()
    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """See :meth:`TiltedSampling.predict_step`."""
        return super().predict_step(batch, batch_idx)

    def evaluate(self) -> Report:
        """See :meth:`TiltedSampling.evaluate`."""
        report = super().evaluate()
        return Report(self.seeds, self.score_errors() | report.metrics, report.references)

    def tables(self, world: World, report: Report) -> list[str]:
        """See :meth:`TiltedSampling.tables`: the score's errors, then every sampler with either law."""
        lines = ["| abar | relative error of the score, by seed |", "|---:|---|"]
        for abar in LEVELS:
            errors = ", ".join(f"{e:.4f}" for e in report.metrics[f"score_error@{abar:g}"])
            lines.append(f"| {abar:g} | {errors} |")
        lines += ["", "| sampler | joint KL, learned | joint KL, exact law | difference | action KL, learned |"
                  " Var(s' given a), ratio, learned |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
        for name in self.names:
            found = report.metrics
            ours, exact = (dict(zip(self.seeds, found[f"joint_kl@{n}"], strict=True)) for n in (name, name + EXACT))
            paired = paired_difference(ours, exact)
            words = [written(mean_ci(list(values.values()))) for values in (ours, exact)]
            words.append(written(paired.estimate) if paired else f"{ours[self.seeds[0]] - exact[self.seeds[0]]:.2g}")
            words += [written(mean_ci(found[f"{k}@{name}"])) for k in ("action_kl", "cond_ratio")]
            lines.append(f"| {name} | {' | '.join(words)} |")
        return lines

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if self.last_report is None:
            return {}
        metrics = self.last_report.metrics
        out = {"score_error": figures.draw_score_error(metrics, LEVELS, self.seeds)}
        if self.drawn:
            out["learned_and_exact"] = figures.draw_pairs(metrics, self.names, EXACT)
            out |= super().figures(folder)
        return out
