"""LearnedSampling: the same samplers with a learned energy, each beside itself with the closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.errors import check_settings, note, require
from lightning_toys.mirror_descent import figures
from lightning_toys.mirror_descent.data import LinearGaussian
from lightning_toys.mirror_descent.energy import (
    EVALUATION_LEVELS,
    EnergyNet,
    LevelMatrix,
    denoising_losses,
    extract_replica,
    level_weights,
    score_relative_error,
    training_levels,
)
from lightning_toys.mirror_descent.hparams import to_hparam
from lightning_toys.mirror_descent.learned_table import EXACT_SUFFIX, sampler_table, score_table
from lightning_toys.mirror_descent.model import LearnedModel
from lightning_toys.mirror_descent.module import TiltedSampling
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.mirror_descent.schedules import Schedule
from lightning_toys.mirror_descent.tilt import Reward
from lightning_toys.nets import Network
from lightning_toys.training.configuration import as_dataclass, require_data
from lightning_toys.training.loader import Batch
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform
from lightning_toys.training.replica_parallel import Parallel
from lightning_toys.training.results import Report

NUM_MOMENT_PAIRS = 2**16  # training pairs whose mean and standard deviation scale the network's input
NUM_SCORE_SAMPLES = 2**14  # samples of each level that the score's error is averaged over


class LearnedSampling(TiltedSampling):
    """Learns an energy of the noised joint distribution by denoising score matching, and samples the target with it.

    ``validate`` measures the score's error at each level; ``test`` also runs every sampler that reads a score twice on
    the same noise, with the learned energy (``action_kl@pc_mala``) and with the closed form
    (``action_kl@pc_mala_exact``).

    Args:
        seeds: one seed a replica.
        network: the network (concat or film).
        optimizer: ``adamw``, or ``muon`` on the hidden matrices and AdamW on the rest.
        muon_lr: Muon's learning rate.
        lr: AdamW's learning rate.
        lr_decay: ``cosine`` takes the learning rates to 0 over the run.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of an exponential moving average of the weights, which is then evaluated in their place.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.
        samplers: the samplers: short names, class paths of your own (or, from Python, :class:`Sampler` classes); all
            shipped ones that read a score if left out.
        reward: gives Q.
        schedule: how the tilt grows over the noise levels.
        lambda_scale: lambda, the inverse temperature of the tilt at the clean end.
        chains: chains of each sampler and seed.
        settings: how much work the samplers do.
        bins: equally likely bins of the histogram KL, and bars of the figures.
        sweep_max_refresh: largest refresh_L of the figure of KL against refreshes; 0 leaves it out.
        sweep_chains: chains of each seed there.
        gif: write anim_<sampler>.gif of every sampler.
        assert_implementation: fail, with exit code 1, where samples differ from the exact moments of their sampler,
            both with the closed form.
        gaussian_part: give each level its best Gaussian by M(abar); false: f has to learn the linear score too.
    """

    trains = True
    learned = True
    headline = ("score_error", "joint_kl", "action_kl", "cond_ratio")
    error_metrics: Sequence[str] = (*TiltedSampling.error_metrics, "score_error")
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
        gaussian_part: bool = True,
    ) -> None:
        check_settings(LearnedSampling, locals(), "--model.")
        super(TiltedSampling, self).__init__(
            seeds, lr, weight_decay, clip_grad_norm, ema_decay, lr_decay, optimizer, muon_lr, parallel
        )
        self.set_options(
            samplers, reward, schedule, lambda_scale, chains, settings, bins, sweep_max_refresh, sweep_chains, gif
        )
        self.assert_implementation = assert_implementation
        default = Network("film", hidden=32, activation="silu", residual=True)
        self.network = as_dataclass(Network, network, default)
        self.gaussian_part = gaussian_part
        require(
            self.network.kind != "transformer",
            "--model.network.kind: 'transformer' is not allowed here; give concat or film",
        )
        require(
            self.network.activation != "relu",
            "--model.network.activation: 'relu' is not allowed here, its slope jumps; give gelu, silu or tanh",
        )
        self.hparams.update({"network": asdict(self.network), "lr": lr, "optimizer": optimizer, "seeds": self.seeds})
        self.hparams.update(gaussian_part=gaussian_part)
        # load_from_checkpoint hands these to this constructor
        self.hparams.update(lr_decay=lr_decay, muon_lr=muon_lr, weight_decay=weight_decay, parallel=parallel)
        self.hparams.update(clip_grad_norm=clip_grad_norm, ema_decay=ema_decay, samplers=self.sampler_hparams())
        self.hparams.update(reward=to_hparam(self.reward), schedule=to_hparam(self.schedule))
        self.hparams.update(settings=asdict(self.settings), lambda_scale=lambda_scale, chains=chains, bins=bins)
        self.hparams.update(sweep_max_refresh=sweep_max_refresh, sweep_chains=sweep_chains, gif=gif)
        self.hparams.update(assert_implementation=assert_implementation)
        self.trained_on: dict[str, float] = {}

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
        z = torch.from_numpy(keyed_generator(0, 0, "data/moments").standard_normal((NUM_MOMENT_PAIRS, 2)))
        linear = require_data(data, LinearGaussian)
        pairs = linear.pairs(z)
        joint = {k: float(v) for k, v in asdict(linear.joint).items()}
        return sizes | {"mean": pairs.mean(0).tolist(), "std": pairs.std(0).tolist(), "joint": joint}

    def build(self) -> EnergyNet:
        """See :meth:`ToyModule.build`."""
        self.eps_noise = NoiseStream(self.local_seeds, "score/eps", (self.sizes["batch_size"], 2))
        self.level_noise = NoiseStream(self.local_seeds, "score/level", (1, 1), uniform)
        require(
            torch.get_default_dtype() in (torch.float32, torch.float64),
            "--trainer.precision: a half precision throughout is not allowed here, scores are differences; "
            "give 32-true, 64-true or bf16-mixed",
        )
        net = self.network.build(self.local_seeds, 2, 1, True, 2)
        matrix = LevelMatrix(self.local_seeds) if self.gaussian_part else None
        return EnergyNet(net, matrix, self.sizes["mean"], self.sizes["std"])

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`."""
        (x0,) = batch.columns
        local = slice(batch.first, batch.first + x0.shape[1])
        eps = self.eps_noise.at(step, x0)[:, local]
        abar = training_levels(self.level_noise.at(step, x0), batch.total)[:, local]
        assert isinstance(self.net, EnergyNet)
        return (level_weights(abar) * denoising_losses(self.net, x0, eps, abar)).sum(1) / batch.total

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_load_checkpoint`; without a Trainer the weights' precision is the checkpoint's."""
        super().on_load_checkpoint(checkpoint)
        self.trained_on = dict(checkpoint["toy"]["sizes"].get("joint", {}))  # which older checkpoints lack
        if self._trainer is None:
            dtype = next(w.dtype for name, w in checkpoint["state_dict"].items() if name.startswith("net.net."))
            for net in (self.net, self.ema_net):
                if net is not None:
                    net.to(dtype)

    # evaluation

    @property
    def evaluated_net(self) -> EnergyNet:
        """The network that is evaluated: of the averaged weights where there are such.

        Raises:
            ToyError: there is no network yet.
        """
        require(
            hasattr(self, "net"),
            "the network is not built yet; load a checkpoint, or set sizes = measure(data) and call configure_model()",
        )
        net = self.ema_net or self.net
        assert isinstance(net, EnergyNet)
        return net

    @property
    def like(self) -> Tensor:
        """See :attr:`TiltedSampling.like`: the network's."""
        return next(self.evaluated_net.parameters()).new_zeros(())

    def build_samplers(self, problem: Problem, names: Sequence[str]) -> dict[str, list[Sampler]]:
        """See :meth:`TiltedSampling.build_samplers`: with each replica's energy, then with the closed form."""
        problems = self.learned_problems(problem)
        learned = {name: [self.maker(name)(p) for p in problems] for name in names}
        return learned | {f"{k}{EXACT_SUFFIX}": v for k, v in super().build_samplers(problem, names).items()}

    def build_centred(self, problem: Problem, names: Sequence[str]) -> dict[str, list[Sampler]]:
        """See :meth:`TiltedSampling.build_centred`."""
        problems = [p.centred for p in self.learned_problems(problem)]
        learned = {name: [self.maker(name)(p) for p in problems] for name in names}
        exact = super().build_samplers(problem.centred, names)
        return learned | {f"{k}{EXACT_SUFFIX}": v for k, v in exact.items()}

    def learned_problems(self, problem: Problem) -> list[Problem]:
        """Return the problem with each replica's energy for its model."""
        models = [LearnedModel(extract_replica(self.evaluated_net, r)) for r in range(len(self.seeds))]
        return [dataclasses.replace(problem, model=model) for model in models]

    def tell_before_drawing(self, problem: Problem, samplers: Sequence[Sampler]) -> None:
        """See :meth:`TiltedSampling.tell_before_drawing`; and say so where the data are not those of the training."""
        super().tell_before_drawing(problem, samplers)
        now = asdict(problem.linear_joint)
        if other := [f"{k} = {now[k]:g}, not {v:g}" for k, v in self.trained_on.items() if now.get(k, v) != v]:
            note(f"warning: the score was learned from other data than these: --data has {', '.join(other)}")

    def sampler_name(self, label: str) -> str:
        """See :meth:`TiltedSampling.sampler_name`: ``pc_mala`` for ``pc_mala`` (learned) and ``pc_mala_exact``."""
        return label.removesuffix(EXACT_SUFFIX)

    def holm_families(self, labels: list[str]) -> list[list[str]]:
        """See :meth:`TiltedSampling.holm_families`: one with the learned energy, one with the closed form."""
        return [[n for n in labels if n.endswith(EXACT_SUFFIX) == exact] for exact in (False, True)]

    def score_errors(self) -> dict[str, list[float]]:
        """Return ``score_error@ABAR``, the score's relative error at each level, and ``score_error``, their maximum."""
        like = next(self.net.parameters())
        z = keyed_generator(0, 0, "evaluation/score").standard_normal((NUM_SCORE_SAMPLES, 2), np.float32)
        joint = self.problem.linear_joint
        normals = torch.from_numpy(z).to(like)
        errors = [score_relative_error(self.evaluated_net, joint, abar, normals) for abar in EVALUATION_LEVELS]
        found = torch.stack(errors).cpu().double()
        out = {"score_error": found.amax(0).tolist()}
        return out | {f"score_error@{abar:g}": e.tolist() for abar, e in zip(EVALUATION_LEVELS, found, strict=True)}

    # of points of one's own

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, x: Tensor, abar: Tensor | float) -> Tensor:
        """Return the learned score, the gradient of log q(x; abar), at noised pairs x = (a, s') of each replica.

        The weights are those that are evaluated: the moving average where there is one. No gradient flows back.

        Args:
            x: points (R, M, 2), or (M, 2) for all replicas.
            abar: fraction of signal variance in [0, 1]: a number, (M,) or (R, M).

        Returns:
            Scores (R, M, 2), in the network's dtype and on its device.

        Raises:
            ToyError: a shape or an abar does not fit, or there is no network yet.
        """
        return self.evaluated_net.score(*self.net_inputs(x, abar))

    @torch.inference_mode(False)
    @torch.no_grad()
    def log_density(self, x: Tensor, abar: Tensor | float) -> Tensor:
        """Return the learned log q(x; abar) (R, M), up to a constant of each level; see :meth:`forward`."""
        rows, levels = self.net_inputs(x, abar)
        with torch.autocast(rows.device.type, enabled=False):
            return self.evaluated_net.log_density(rows, levels)

    def net_inputs(self, x: Tensor, abar: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return x (R, M, 2) and abar (R, M, 1) as the network takes them.

        Raises:
            ToyError: a shape or an abar does not fit, or there is no network yet.
        """
        like = next(self.evaluated_net.parameters())
        replicas = like.shape[0]
        require(
            x.dim() in (2, 3) and x.shape[-1] == 2 and x.shape[:-2] in ((), (replicas,)),
            f"x: shape {tuple(x.shape)} is not allowed; give (M, 2) or ({replicas}, M, 2), a pair (a, s') a row",
        )
        rows = (x.clone() if x.is_inference() else x).to(like).expand(replicas, -1, -1)
        levels, points = torch.as_tensor(abar).to(like), rows.shape[1]
        require(
            levels.shape in ((), (points,), (replicas, points)),
            f"abar: shape {tuple(levels.shape)} is not allowed; give a number, ({points},) or ({replicas}, {points})",
        )
        require(bool(((levels >= 0) & (levels <= 1)).all()), "abar: a value is not allowed; give numbers in [0, 1]")
        return rows, levels.expand(replicas, points).unsqueeze(-1)

    # a score is a gradient: not in inference mode, whose tensors have none

    @torch.inference_mode(False)
    @torch.no_grad()
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Measure the score's error."""
        self.last_report = Report(self.seeds, self.score_errors())
        self.write_evaluation(self.last_report)

    @torch.inference_mode(False)
    @torch.no_grad()
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Measure the score's error, and run every sampler with the learned energy and with the closed form."""
        super().test_step(batch, batch_idx)

    @torch.inference_mode(False)
    @torch.no_grad()
    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """See :meth:`TiltedSampling.predict_step`."""
        return super().predict_step(batch, batch_idx)

    def evaluate(self) -> Report:
        """See :meth:`TiltedSampling.evaluate`."""
        report = super().evaluate()
        return Report(self.seeds, self.score_errors() | report.metrics, report.references, report.arrays)

    def tables(self, problem: Problem, report: Report) -> list[str]:
        """See :meth:`TiltedSampling.tables`: the score's errors, then every sampler, learned and exact."""
        found, names = report.metrics, self.sampler_names
        return [*score_table(found), "", *sampler_table(found, names, self.seeds, self.chains)]

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if self.last_report is None:
            return {}
        metrics = self.last_report.metrics
        out = {"score_error": figures.draw_score_error(metrics, EVALUATION_LEVELS, self.seeds)}
        if self.samples:
            out["learned_and_exact"] = figures.draw_learned_vs_exact(
                metrics, self.sampler_names, EXACT_SUFFIX, self.last_report.references["exact_draws"]["joint_kl"]
            )
            out |= super().figures(folder)
        return out
