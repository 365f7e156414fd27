"""FlowVsRegression: regression and four flow-like objectives, with one network and one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import check_settings, require
from lightning_toys.flow_vs_regression import figures
from lightning_toys.flow_vs_regression.data import PointData, point_data
from lightning_toys.flow_vs_regression.evaluation import Evaluation
from lightning_toys.flow_vs_regression.figure_data import FigureData
from lightning_toys.flow_vs_regression.metrics import compute_metrics
from lightning_toys.flow_vs_regression.objectives import (
    MIP,
    Flow,
    MIPForm,
    MIPOneStep,
    Mode,
    Objective,
    Readout,
    Regression,
    StraightFlow,
    X0Distribution,
    make_objective,
)
from lightning_toys.flow_vs_regression.own import (
    Architecture,
    Metric,
    check_architecture,
    check_objective,
    from_hparam,
    to_hparam,
)
from lightning_toys.flow_vs_regression.own_data import VALIDATION_POINTS, check_data, check_measures
from lightning_toys.flow_vs_regression.prediction import Predictor
from lightning_toys.flow_vs_regression.targets import Predict, Target
from lightning_toys.flow_vs_regression.units import unfit_units
from lightning_toys.manual_steps import ManualSteps, is_plain, is_plain_adamw, record_terms
from lightning_toys.nets import ConditionalNet, Network
from lightning_toys.training.configuration import as_dataclass, unused_flags
from lightning_toys.training.loader import Batch, Block, DrawnBlock
from lightning_toys.training.noise import NoiseStream, uniform
from lightning_toys.training.own_classes import trial
from lightning_toys.training.replica_parallel import Parallel
from lightning_toys.training.results import Report


def from_0_1_0(toy: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's entry is of that release, where c was one number and its length not kept."""
    return "condition_dim" not in toy["sizes"]


class FlowVsRegression(Predictor):
    """Learns c -> f(c) from a few points, by regression or by flow-like models, R replicas at once.

    Args:
        mode: the objective; see docs/flow_vs_regression.md for the equations.
        seeds: one seed a replica; replica r of many is the solo run with that seed.
        loss: ``l2`` trains on squared errors, ``l1`` on absolute ones.
        network: the network; or an architecture of one's own.
        x0: distribution of x0 in training; by default zeros for regression and gaussian for the rest.
        lr: Adam's learning rate.
        weight_decay: decoupled weight decay.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of a moving average of the weights.
        t_star: time of mip's second step.
        mip_form: ``published``, ``path`` or ``paper``; they differ in the network's inputs, see
            :class:`~lightning_toys.flow_vs_regression.objectives.MIP`.
        evaluation: how predictions are read out.
        parallel: what several processes share out, the rows of each ``batch`` or the ``replicas``.
        compile: whether the loss is compiled (`torch.compile`): for GPUs; takes half a minute once.
        objective: an objective of one's own, in the place of ``mode``.
        metrics: metrics of one's own, beside the others.

    Raises:
        ToyError: a value is not allowed.

    Example:
        Predictions of two replicas with their initial weights, at 5 points:

        >>> from lightning_toys.flow_vs_regression import InterpolationData
        >>> module = FlowVsRegression("flow", seeds=[0, 1])
        >>> module.sizes = module.measure(InterpolationData())
        >>> module.configure_model()
        >>> module(torch.linspace(0, 1, 5).unsqueeze(1)).shape
        torch.Size([2, 5, 1])
    """

    experiment = "flow_vs_regression"
    error_metrics: Sequence[str] = ("l1", "l2")
    positive_loss = True
    metric_labels: Mapping[str, str] = {
        "l2": "RMSE on the evaluation grid (l2)",
        "l1": "mean absolute error on the evaluation grid (l1)",
    }

    def __init__(
        self,
        mode: Mode = "regression",
        seeds: Sequence[int] = (0,),
        loss: Literal["l1", "l2"] = "l2",
        network: Architecture | Network | None = None,
        x0: X0Distribution | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        t_star: float = 0.9,
        mip_form: MIPForm = "published",
        evaluation: Evaluation | None = None,
        parallel: Parallel = "batch",
        compile: bool = False,
        objective: Objective | None = None,
        metrics: list[Metric] | Metric | None = None,
    ) -> None:
        check_settings(FlowVsRegression, locals(), "--model.")
        super().__init__(seeds, lr, weight_decay, clip_grad_norm, ema_decay, parallel=parallel, compile=compile)
        self.mode, self.loss, self.mip_form = mode, loss, mip_form
        # a checkpoint's hyper-parameters are plain values: load_from_checkpoint hands dicts over
        self.network: Network | Architecture = (
            network if isinstance(network, Architecture) else as_dataclass(Network, from_hparam(network, "network"))
        )
        self.evaluation = as_dataclass(Evaluation, evaluation)
        own = from_hparam(objective, "objective")
        self.objective = own if own is not None else make_objective(mode, t_star, mip_form)
        if own is None:  # another is tried in :meth:`try_own`
            self.evaluation.check_test_readouts(self.objective)
        self.own_objective = own is not None
        self.metrics = [] if metrics is None else metrics if isinstance(metrics, list) else [metrics]
        self.x0_distribution: X0Distribution = x0 if x0 is not None else self.objective.x0_distribution
        require(
            self.evaluation.weights != "ema" or ema_decay is not None,
            "--model.evaluation.weights: 'ema' needs --model.ema_decay",
        )
        self.save_hyperparameters(logger=False)
        net = self.network
        self.hparams["network"] = to_hparam(net) if isinstance(net, Architecture) else asdict(net)
        self.hparams.update(evaluation=asdict(self.evaluation), objective=None if own is None else to_hparam(own))
        self.hparams.update(seeds=self.seeds, metrics=None)  # metrics are no part of what is loaded
        self.figure_data: FigureData | None = None
        self.manual_steps: ManualSteps | None = None

    @property
    def data(self) -> PointData:
        """The data module that the Trainer runs with."""
        return point_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        mode = type(self.objective).__name__ if self.own_objective else self.mode
        net = self.network
        return f"{mode} {type(net).__name__ if isinstance(net, Architecture) else net.kind}"

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        out = super().unused_settings() | self.network.unused_settings(self.objective.with_time)
        if self.own_objective:
            return out | unused_flags("no --model.objective", "mode", "t_star", "mip_form")
        if self.mode not in ("mip", "mip_one_step"):
            out |= unused_flags("--model.mode mip or mip_one_step", "t_star")
        if self.mode != "mip":
            out |= unused_flags("--model.mode mip", "mip_form")
        if self.mode != "flow":
            out |= unused_flags("--model.mode flow", "evaluation.solver")
        if self.mode not in ("flow", "straight_flow"):
            out |= unused_flags("--model.mode flow or straight_flow", "evaluation.nfe")
        return out

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        data = point_data(data)
        with trial():
            check_data(data, self.seeds)
        require(
            self.evaluation.weights != "best" or data.num_holdout > 0,
            "--model.evaluation.weights: 'best' needs --data.holdout > 0",
        )
        self.metric_labels = {**type(self).metric_labels, **data.metric_labels}
        with trial():
            self.try_own(data)
        return {
            "dim": data.output_dim,
            "condition_dim": data.condition_dim,
            "batch_size": data.batch_size,
            "held": data.num_holdout,
            "units": None if data.units is None else data.units._asdict(),
        }

    def try_own(self, data: PointData) -> None:
        """Hold classes of somebody's own to their contracts, before anything is trained."""
        D, C, own = data.output_dim, data.condition_dim, self.own_objective
        if isinstance(self.network, Architecture):
            conditions = C + self.objective.extra_conditions
            timed = bool(getattr(self.objective, "with_time", True))
            check_architecture(self.network, self.seeds, D, conditions, timed)
        if own:
            check_objective(self.objective, self.network, self.evaluation, self.seeds, D, C)
        check_measures(self.metrics, data)
        self.headline = (*type(self).headline, *(m.name for m in self.metrics))

    def measured(
        self, prediction: Tensor, truth: Tensor, c: Tensor, predict: Predict
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return :func:`compute_metrics`, with the target's and somebody's own metrics among the scalars."""
        target = self.data.target
        scalars, arrays = compute_metrics(prediction, truth, c, target)
        own = target.extra_metrics(c, prediction, predict) if isinstance(target, Target) else {}
        own |= {m.name: m(prediction, truth, c) for m in self.metrics}
        return scalars | {name: values.detach().double().cpu() for name, values in own.items()}, arrays

    @property
    def keeps_best(self) -> bool:
        """See :attr:`ToyModule.keeps_best`."""
        return int(self.sizes["held"]) > 0

    def build(self) -> ConditionalNet:
        """Build the network for the data's dimensions."""
        dim, batch = self.sizes["dim"], self.sizes["batch_size"]
        self.x0_noise = NoiseStream(self.local_seeds, "x0", (batch, dim))
        self.t_noise = NoiseStream(self.local_seeds, "t", (batch, self.objective.times), uniform)
        conditions = self.condition_dim + self.objective.extra_conditions
        return self.network.build(self.local_seeds, dim, conditions, self.objective.with_time)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_load_checkpoint`; weights keep the units that they were trained in."""
        super().on_load_checkpoint(checkpoint)
        self.sizes["units"] = checkpoint["toy"]["sizes"].get("units")

    def network_mismatch(self, checkpoint: dict[str, Any], net: nn.Module) -> str | None:
        """See :meth:`ToyModule.network_mismatch`."""
        why = super().network_mismatch(checkpoint, net)
        if why is None or self.mode != "mip_one_step" or not from_0_1_0(checkpoint["toy"]):
            return why
        return "in 0.1.0 mip_one_step was the first step of mip's network; give --model.mode mip --model.mip_form path"

    def extras_mismatch(self, toy: dict[str, Any], step: int, resumes: bool) -> str:
        """See :meth:`ToyModule.extras_mismatch`: units that are none, or, of a resumed run, those of other rows."""
        if self.mode == "mip" and self.mip_form == "published" and not self.own_objective and from_0_1_0(toy):
            return "config is of 0.1.0, where 'published' was what is 'path' now; give --model.mip_form path"
        given, mine = toy["sizes"].get("units"), self.sizes["units"]
        if given != mine and resumes:
            return "sizes.units are those of other training rows; go on with the rows that the run began with"
        return unfit_units(given, self.condition_dim, self.sizes["dim"])

    # training

    @cached_property
    def local_objective(self) -> Objective:
        """The objective of the replicas that this process trains."""
        count = len(self.seeds)
        return self.objective.of_replicas(range(count)[self.local_replicas], count)

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """See :meth:`ToyModule.replica_losses`."""
        return self.compiled(self.losses)(*self.sample(batch, step), batch.total)

    def sample(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a step's c (R, B, C), x1 and x0 (R, B, D) and t (R, B, 1)."""
        c, x1 = batch.columns
        rows = slice(batch.first, batch.first + x1.shape[1])
        x0 = self.x0_noise.at(step, x1)[:, rows] if self.x0_distribution == "gaussian" else torch.zeros_like(x1)
        t = self.t_noise.at(step, x1)[:, rows] if self.local_objective.samples_time else torch.zeros(())
        return c, x1, x0, t

    def losses(self, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor, total: int) -> Tensor:
        """Return each replica's loss (R,): sums over c (R, B, C), x1 and x0 (R, B, D), t (R, B, 1), by ``total``."""
        assert isinstance(self.net, ConditionalNet)
        norm = torch.square if self.loss == "l2" else torch.abs
        terms = [norm(r).sum((1, 2)) for r in self.local_objective.residuals(self.net, c, x1, x0, t)]
        return sum(terms[1:], terms[0]) / (total * x1.shape[2])

    def take_steps(self, block: Block | DrawnBlock, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """See :meth:`ToyModule.take_steps`: by ``manual_steps``, for the shipped MLPs and objectives."""
        assert isinstance(self.net, ConditionalNet)
        own = [getattr(type(self), name) for name in WRITTEN_OUT] != list(WRITTEN_OUT.values())
        own |= type(self.objective) not in (Regression, Flow, StraightFlow, MIP, MIPOneStep)
        if own or torch.is_autocast_enabled("cpu") or not (is_plain(self.net) and is_plain_adamw(optimizer, self.net)):
            return None
        if self.manual_steps is None or not self.manual_steps.is_of(self.net, optimizer):
            self.manual_steps = ManualSteps(
                self.net, optimizer, self.loss, self.clip_grad_norm, self.ema_net, self.ema_decay
            )
        numbers = range(block.start, block.stop)
        batches = [block.batch(step) for step in numbers]
        drawn = [self.sample(batch, step) for batch, step in zip(batches, numbers, strict=True)]
        # the objective is asked for all rows of the block at once: each of its rows is by itself
        c, x1, x0, t = (torch.cat(x, dim=1) if x[0].dim() else x[0] for x in zip(*drawn, strict=True))
        terms = record_terms(lambda net: self.objective.residuals(net, c, x1, x0, t))
        rates = [self.lr if (rate := self.rate_at(step)) is None else rate for step in numbers]
        rows = self.manual_steps.rows(terms, [x.shape[1] for _, x, *_ in drawn])
        return self.manual_steps.run(rows, [batch.total for batch in batches], rates)

    # evaluation

    def evaluate(self, c: Tensor, truth: Tensor, full: bool) -> Report:
        """Evaluate the configured readout at c (M, C) against ``truth`` (M, D), with ``full`` every other too."""
        e, data = self.evaluation, self.data
        readout = self.configured_readout
        draws = e.draws if full else min(e.draws, 8)
        prediction = self.predict(c, draws).cpu().double()
        counts = self.last_evaluations  # metrics that predict anew overwrite it
        scalars, arrays = self.measured(prediction, truth, c, partial(self.predict_anew, draws, readout, None))
        metrics = {name: v.tolist() for name, v in scalars.items()}
        if counts is not None:
            metrics["evaluations"] = counts.tolist()
        if full:
            for distribution in e.test_x0:
                for other in self.objective.readouts(e.test_solvers, e.test_nfe):
                    suffix = f"@{distribution}/{other.name}"
                    same = (distribution, other.name) == (e.x0, readout.name)
                    p = prediction if same else self.predict(c, draws, distribution, other).cpu().double()
                    if other.counted is not None and self.last_evaluations is not None:
                        spent = metrics["evaluations"] if same else self.last_evaluations.tolist()
                        metrics["evaluations" + suffix] = spent
                    anew = partial(self.predict_anew, draws, other, distribution)
                    found, _ = self.measured(p, truth, c, anew)
                    metrics.update({k + suffix: v.tolist() for k, v in found.items() if "_dim" not in k})
                    if p.shape[1] > 1:
                        metrics["spread" + suffix] = p.var(1).mean((1, 2)).sqrt().tolist()
        references: dict[str, dict[str, float]] = {}
        rows = data.baselines(self.seeds, c)
        for name in rows[0]:
            values = [
                self.measured(row[name], truth, c, partial(self.baseline_anew, r, name))[0]
                for r, row in enumerate(rows)
            ]
            references[name] = {k: float(np.mean([s[k].item() for s in values])) for k in values[0]}
        points, names = data.points(self.seeds[:1]), (data.condition_names, data.output_names)
        self.figure_data = FigureData(
            c, truth, prediction, points.c[0], points.x1[0], rows[0], data.target, arrays, *names
        )
        means = {k: v.mean(0).tolist() for k, v in arrays.items()}
        return Report(self.seeds, metrics, references, means)

    def predict_anew(
        self, draws: int, readout: Readout, fixed: X0Distribution | None, c: Tensor, distribution: X0Distribution | None
    ) -> Tensor:
        """Return predictions (R, K, M, D), float64, for a target's own metrics: of ``fixed``, else ``distribution``."""
        return self.predict(c, draws, fixed or distribution, readout).cpu().double()

    def baseline_anew(self, r: int, name: str, c: Tensor, distribution: X0Distribution | None) -> Tensor:
        """Return the prediction (1, 1, M, D) of a baseline that learns replica r's points, at any c (M, 1)."""
        return self.data.baseline_rows(self.seeds[r : r + 1], c)[0][name]

    def validation_step(self, grid: Tensor, batch_idx: int) -> None:
        """Evaluate the configured readout on the grid (at most 1000 points) and on held-out points."""
        if self.keeps_best:
            self.evaluate_holdout()
        report = self.evaluate(*self.data.evaluation_points(VALIDATION_POINTS), full=False)
        self.last_report = report
        self.write_evaluation(report)

    def evaluate_holdout(self) -> None:
        """Evaluate each replica on its own held-out points, by which its best weights are chosen."""
        e, points = self.evaluation, self.data.points(self.seeds)
        H, D = points.holdout_x1.shape[1:]
        assert isinstance(self.net, ConditionalNet)
        x0 = self.sample_x0(e.x0, min(e.draws, 8), H, D)
        with torch.no_grad():
            p = self.predictions(self.net, self.configured_readout, points.holdout_c, x0).cpu().double()
        scores = (p - points.holdout_x1.unsqueeze(1)).square().mean((1, 2, 3)).sqrt()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.keep_best(scores.to(self.device))
            self.write_scalars({"holdout/l2": scores})
        distributed = self.trainer.world_size > 1
        self.log("holdout/l2", scores.mean().float().to(self.device), logger=False, batch_size=1, sync_dist=distributed)

    def test_step(self, grid: Tensor, batch_idx: int) -> None:
        """Evaluate every readout on the whole grid."""
        report = self.evaluate(*self.data.evaluation_points(), full=True)
        self.last_report = report
        self.write_scalars({f"test/{k}": torch.tensor(report.metrics[k]) for k in ("l1", "l2")}, self.loaded_step)

    def predict_step(self, grid: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return ``c`` (M, C), ``truth`` (M, D) and the ``prediction`` of :meth:`predict` (R, K, M, D), float64."""
        c, truth = self.data.evaluation_points()
        return {"c": c, "truth": truth, "prediction": self.predict(c).cpu().double()}

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if self.figure_data is None or self.last_report is None:
            return {}
        return figures.draw_all(self.figure_data, self.last_report, folder / "metrics.csv", self.label)


# what :meth:`FlowVsRegression.take_steps` stands for: where one of them is somebody's own, autograd takes the steps
WRITTEN_OUT = {
    name: getattr(FlowVsRegression, name)
    for name in ("replica_losses", "losses", "sample", "training_step", "configure_optimizers")
}
