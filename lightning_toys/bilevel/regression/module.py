"""WindowRegression: learn the weight of each past time in the loss that is fitted now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.bilevel.regression import figures
from lightning_toys.bilevel.regression.adam_state import adam_moments, put_back
from lightning_toys.bilevel.regression.algorithms import LagAlgorithm, TimeStep, make_algorithm, scaled
from lightning_toys.bilevel.regression.data import Observations, StreamData, require_stream
from lightning_toys.bilevel.regression.hypergradients import (
    Window,
    aid_hypergradient,
    inner_value_gradient,
    logit_gradient,
    outer_loss,
    safe_inverse,
)
from lightning_toys.bilevel.regression.learner import Learner
from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.bilevel.regression.own_algorithm import Trial, measured, try_algorithm
from lightning_toys.bilevel.regression.scores import score
from lightning_toys.bilevel.regression.unused import unused_settings
from lightning_toys.errors import MOST, REPEATS, bounded, check_settings, require
from lightning_toys.nets import DEEPEST
from lightning_toys.training.checkpoint_format import Like, mismatches
from lightning_toys.training.denormals import denormals_flushed
from lightning_toys.training.inference import require_built, with_replica_axis
from lightning_toys.training.loader import Block, DrawnBlock
from lightning_toys.training.module import ToyModule
from lightning_toys.training.results import Report

RECORD_EVERY = 10  # steps between two records of the weights and of the hypergradient that the local regret takes


class WindowRegression(ToyModule):
    """Learns weights lambda of the lags 1..window so that a network fitted to the past under them predicts the present.

    At time t the network h takes ``inner_steps`` steps of Adam on sum_s lambda_s mean |h - y_(t-s)|^2, warm-started.
    Its loss on y_t at other points is recorded, and the hypergradient of that loss moves lambda by one step of Adam:
    together one optimiser step of the run. See :mod:`lightning_toys.bilevel.regression.hypergradients`.

    Args:
        algorithm: the hypergradient: ``funcbo`` (function space), ``aid`` (implicit differentiation), ``unroll1``
            (through the last ``unroll_steps`` inner steps); a control, in which lambda stays as it is: ``uniform``,
            ``lag_1`` (the last observation alone), ``fixed`` (``fixed_weights``), ``optimum`` (the weights that are
            best with an exact inner solver), ``no_tracking`` (h is fitted to the mean of all observations so far),
            ``least_squares`` (each observation regressed on its past); or a
            :class:`~lightning_toys.bilevel.regression.algorithms.LagAlgorithm` of one's own.
        seeds: one seed a replica.
        hidden: width of h's hidden layers.
        layers: hidden layers of h.
        inner_lr: Adam's learning rate for h.
        inner_steps: steps of h at each time.
        outer_lr: Adam's learning rate for lambda.
        lambda0: every weight at the start.
        weights: ``clip``: lambda itself is stepped and clipped at 0; ``softmax``: its logits are, its sum is fixed.
        smoothing: lambda follows the mean of the last so many hypergradients (arXiv 2601.15363); 1 is without.
        unroll_steps: inner steps differentiated through; of ``unroll1``.
        cg_iterations: of conjugate gradient; of ``aid``.
        damping: added to the diagonal of aid's matrix.
        curvature: aid's matrix: the inner Hessian, or its Gauss-Newton part, which is never negative.
        adjoint: funcbo's space of adjoint functions: ``ridge``, linear in h's last hidden layer, solved exactly; or
            ``network``, an MLP with early stopping.
        ridge: weight of the coefficients' size, relative to the features' mean square; of ``ridge``.
        adjoint_steps: steps of the adjoint network at each time.
        adjoint_lr: Adam's learning rate for the adjoint network.
        fixed_weights: of lags 1, 2, ..., their scale is free; of ``fixed``.

    Raises:
        ToyError: a value is not allowed.
    """

    experiment = "bilevel"
    comparison_figures = "lightning_toys.bilevel.regression.figures.compare_figures"
    headline = ("outer_loss", "exact_loss", "local_regret")
    error_metrics: Sequence[str] = (*headline, "outer_loss_all", "local_regret_all")
    precisions = ("32-true", "64-true")  # conjugate gradient and Adam's small steps drown in half a precision
    metric_labels: Mapping[str, str] = {
        "outer_loss": "outer loss over the last sixth of the stream",
        "outer_loss_all": "outer loss over the whole stream",
        "exact_loss": "outer loss of the learned weights, were the inner problem solved exactly",
        "effective_lags": "lags that the weights are spread over, 1 / sum of squares",
        "local_regret": "bilevel local regret of the normalised weights, last sixth of the stream",
        "local_regret_all": "bilevel local regret of the normalised weights, whole stream",
    }
    reads_data = False
    measured_later = (
        *("outer_loss", "outer_loss_all", "exact_loss", "local_regret", "local_regret_all", "effective_lags"),
    )

    def __init__(
        self,
        algorithm: LagAlgorithm | str = "funcbo",
        seeds: Sequence[int] = (0,),
        hidden: int = 64,
        layers: int = 2,
        inner_lr: float = 3e-3,
        inner_steps: int = 10,
        outer_lr: float = 3e-2,
        lambda0: float = 1.0,
        weights: Literal["clip", "softmax"] = "clip",
        smoothing: int = 1,
        unroll_steps: int = 1,
        cg_iterations: int = 10,
        damping: float = 1e-4,
        curvature: Literal["hessian", "gauss_newton"] = "gauss_newton",
        adjoint: Literal["ridge", "network"] = "ridge",
        ridge: float = 1e-2,
        adjoint_steps: int = 10,
        adjoint_lr: float = 3e-3,
        fixed_weights: Sequence[float] | None = None,
    ) -> None:
        check_settings(WindowRegression, locals(), "--model.")
        integers = {
            "hidden": hidden,
            "layers": layers,
            "inner_steps": inner_steps,
            "smoothing": smoothing,
            "unroll_steps": unroll_steps,
            "cg_iterations": cg_iterations,
            "adjoint_steps": adjoint_steps,
        }
        for name, count in integers.items():
            bounded(f"--model.{name}", count, 1, DEEPEST if name == "layers" else MOST if name == "hidden" else REPEATS)
        positive = {
            "inner_lr": inner_lr,
            "outer_lr": outer_lr,
            "lambda0": lambda0,
            "ridge": ridge,
            "adjoint_lr": adjoint_lr,
        }
        for name, value in positive.items():
            bounded(f"--model.{name}", value, 0.0, above=True)
        bounded("--model.damping", damping, 0.0)
        require(
            unroll_steps <= inner_steps,
            f"--model.unroll_steps: {unroll_steps} is not allowed; give at most --model.inner_steps, {inner_steps}",
        )
        super().__init__(seeds, inner_lr)
        self.hidden, self.layers = hidden, layers
        self.inner_lr, self.inner_steps, self.outer_lr, self.lambda0 = inner_lr, inner_steps, outer_lr, lambda0
        self.weights, self.smoothing, self.unroll_steps = weights, smoothing, unroll_steps
        self.cg_iterations, self.damping, self.curvature = cg_iterations, damping, curvature
        self.adjoint, self.ridge, self.adjoint_steps, self.adjoint_lr = adjoint, ridge, adjoint_steps, adjoint_lr
        self.fixed_weights = fixed_weights
        self.algorithm, self.method = make_algorithm(algorithm, self)
        steps = self.method.own_steps
        bounded(f"--model.algorithm: {self.algorithm}.own_steps", steps, 0, REPEATS)
        require(steps <= inner_steps, f"--model.algorithm: {self.algorithm} takes {steps} inner steps of {inner_steps}")
        self.save_hyperparameters(logger=False)
        self.hparams["seeds"] = self.seeds
        if self.hparams["algorithm"] is self.method:  # in a script; the command line keeps class_path and init_args
            self.hparams["algorithm"] = self.algorithm
        self.records: dict[str, Tensor] = {}  # of every step so far; part of the checkpoint
        self._stream: Observations | None = None

    # building

    @property
    def data(self) -> StreamData:
        """The data module that the Trainer runs with."""
        return require_stream(self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def stream(self) -> Observations:
        """The stream that the Trainer's data module gives these seeds."""
        if self._stream is None:
            self._stream = self.data.stream(self.seeds)
        return self._stream

    @property
    def learner(self) -> Learner:
        """The parameters of h and lambda."""
        assert isinstance(self.net, Learner)
        return self.net

    def unused_settings(self) -> dict[str, str]:
        """See :meth:`ToyModule.unused_settings`."""
        return unused_settings(self)

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        return (self.method.label or type(self.method).__name__) + (", smoothed" if self.smoothing > 1 else "")

    def setup(self, stage: str) -> None:
        """See :meth:`ToyModule.setup`; refuse more steps than the stream has.

        Raises:
            ToyError: it has fewer.
        """
        super().setup(stage)
        most, steps = self.data.steps, self.trainer.max_steps
        require(
            stage != "fit" or most is None or steps <= most,
            f"--trainer.max_steps: {steps} is not allowed; the stream has {most} times after the first window",
        )

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`.

        Raises:
            ToyError: the data are no stream, or an algorithm of one's own is not what it has to be.
        """
        stream = require_stream(data)
        sizes = {"inputs": stream.shape.inputs, "outputs": stream.shape.outputs, "window": stream.window}
        sizes |= measured(self.method, stream)
        starts = "start" in sizes
        trial = Trial(
            stream,
            lambda algorithm, seeds: self.learner_of(algorithm, seeds, sizes),
            lambda learner: self.weights_of(learner, starts or self.weights == "clip"),
            self.inner_lr,
            starts,
        )
        try_algorithm(self.method, self.seeds, trial)
        return sizes

    def build(self) -> Learner:
        """See :meth:`ToyModule.build`."""
        return self.learner_of(self.method, self.seeds, self.sizes)

    def learner_of(self, algorithm: LagAlgorithm, seeds: Sequence[int], sizes: Mapping[str, Any]) -> Learner:
        """Return the parameters of replicas with these seeds, as a run begins with, and an algorithm's memory."""
        net = MLP((sizes["inputs"], *[self.hidden] * self.layers, sizes["outputs"]))
        start: float | np.ndarray | None = self.lambda0 if self.weights == "clip" else None
        if "start" in sizes:
            start = scaled(sizes["start"], self.lambda0 * sizes["window"])
        return Learner(net, seeds, sizes["window"], start, self.smoothing, algorithm.memory(net, seeds, sizes))

    @property
    def clips(self) -> bool:
        """Whether lambda itself is kept, clipped at 0, rather than its logits: those of a weight of 0 are infinite."""
        return self.weights == "clip" or "start" in self.sizes

    @property
    def learning_rates(self) -> list[float]:
        """See :attr:`ToyModule.learning_rates`."""
        return [self.inner_lr, self.outer_lr]

    def configure_optimizers(self) -> torch.optim.AdamW:
        """Return Adam on h and on lambda: one optimiser of two groups, of which one has a gradient at a time."""
        groups = [
            {"params": [p], "lr": lr}
            for p, lr in zip((self.learner.theta, self.learner.free), self.learning_rates, strict=True)
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=self.device.type in ("cpu", "cuda"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the predictions h(x) (R, M, d) of the networks as they were fitted last.

        Args:
            x: (R, M, p), or (M, p) for every replica alike.

        Raises:
            ToyError: the shape is another one, or the networks are not built.

        >>> from lightning_toys.bilevel import DriftStream
        >>> module = WindowRegression(seeds=[0, 1])  # or WindowRegression.load_from_checkpoint(path)
        >>> module.sizes = module.measure(DriftStream())
        >>> module.configure_model()
        >>> module(torch.zeros(7, 5)).shape
        torch.Size([2, 7, 3])
        """
        require_built(self)
        x = with_replica_axis(x, len(self.seeds), (self.sizes["inputs"],), "x")
        predictions: Tensor = self.learner(x.to(self.learner.theta))
        return predictions

    # training

    @denormals_flushed()
    def training_step(self, block: Block | DrawnBlock, batch_idx: int) -> None:
        """Take every step of the block.

        Every rank takes whole steps, the same ones: conjugate gradient would need a sum over ranks in each product,
        which takes longer than the product. Nothing goes through autograd, and nothing through a strategy's hooks.
        """
        (optimizer,) = self.trainer.optimizers
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        rows: dict[str, list[Tensor]] = {}
        with torch.no_grad(), self.without_autocast():
            for step in range(block.start, block.stop):
                # once a step, though two groups of parameters move: `global_step` reads it
                progress.increment_ready()
                for name, row in self.take_step(step, optimizer).items():
                    rows.setdefault(name, []).append(row.double().cpu())
                progress.increment_completed()
        for name, found in rows.items():
            before = [self.records[name]] if name in self.records else []
            self.records[name] = torch.cat([*before, torch.stack(found)])
        # the ranks' losses, which are equal, are summed
        self.finish_block(block, torch.stack(rows["loss"]).to(self.device) / block.world_size)

    def window_at(self, t: int) -> Window:
        """Return the data of step t."""
        like, stream = self.learner.theta, self.stream
        inner_points, outer_points = stream.points(like)
        return Window(inner_points, outer_points, *stream.window(t, self.sizes["window"], like))

    def take_step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Fit h to the window, score it, and step lambda; return the step's records: loss (R,), lambda (R, W), ..."""
        learner, window = self.learner, self.window_at(step)
        theta, free, lam = learner.theta, learner.free, self.lag_weights
        state = TimeStep(
            learner.mlp,
            theta.detach(),
            lam,
            window,
            lambda: adam_moments(optimizer, theta),
            self.inner_lr,
            learner.memory,
        )
        if (weights := self.method.weights_at(state)) is not None:
            lam = weights * (self.lambda0 * weights.shape[1] * safe_inverse(weights.sum(1)))[:, None]
            free.copy_(lam)
            state = replace(state, lam=lam)
        targets = self.method.targets(state)
        free.grad = None
        for _ in range(self.inner_steps - self.method.own_steps):
            forward = learner.mlp.forward_pass(theta, window.inner_points, second_order=False)
            theta.grad = forward.vjp(inner_value_gradient(forward, targets))
            optimizer.step()
        theta.grad = None
        found = self.method.hypergradient(state) if self.method.learns else None
        if found is not None and found.after is not None:
            put_back(optimizer, theta, *found.after)
        rows = {"loss": outer_loss(learner.mlp(theta, window.outer_points), window.current_y)}
        if found is not None and found.residual is not None:
            rows["residual"] = found.residual
        if step % RECORD_EVERY == 0:
            reference = aid_hypergradient(learner.mlp, theta, lam, window, 10, 1e-4, gauss_newton=True)
            rows |= {"lambda": lam, "slope": lam.sum(1, keepdim=True) * reference.value}
        if found is not None:
            v = learner.smooth_gradient(found.value, step)
            free.grad = v if self.clips else logit_gradient(v, lam)
            optimizer.step()
            if self.clips:
                free.clamp_(min=0)
        return rows

    @property
    def lag_weights(self) -> Tensor:
        """Lambda (R, W), lag 1 first, no graph."""
        return self.weights_of(self.learner, self.clips)

    def weights_of(self, learner: Learner, clips: bool) -> Tensor:
        """Return a learner's lambda (R, W), no graph; it keeps logits unless it ``clips``."""
        free = learner.free.detach()
        if clips:
            return free.clone()
        return self.lambda0 * free.shape[1] * torch.softmax(free, dim=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_save_checkpoint`; the records of every step so far are kept too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["toy"]["records"] = dict(self.records)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`ToyModule.on_load_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.records = dict(checkpoint["toy"]["records"])

    def extras_mismatch(self, toy: dict[str, Any], step: int, resumes: bool) -> str:
        """See :meth:`ToyModule.extras_mismatch`: the records of every step."""
        replicas, seen = len(self.seeds), -(-step // RECORD_EVERY)
        sizes: dict[str, tuple[int | None, ...]] = {"loss": (step, replicas)}
        sizes |= dict.fromkeys(("lambda", "slope"), (seen, replicas, self.sizes["window"]))
        records = toy.get("records")
        ever_by_aid = isinstance(records, dict) and "residual" in records
        if ever_by_aid or toy["config"]["model"]["init_args"].get("algorithm") == "aid":
            sizes["residual"] = (None, replicas)  # of the steps by aid: the algorithm may change on the way
        form = {name: Like(torch.float64, shape) for name, shape in sizes.items()}
        return next(mismatches(toy, {"records": form}), "")

    # evaluating

    def evaluate(self) -> Report:
        """Score the stream so far by the records of its steps."""
        return score(self.seeds, self.records, self.data.exact_loss, self.method.has_weights)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Score the stream so far."""
        if not self.records:  # a validation before the first step
            return
        self.last_report = self.evaluate()
        self.write_evaluation(self.last_report)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Score the stream up to the checkpoint's step."""
        self.last_report = self.evaluate()
        score = torch.tensor(self.last_report.metrics["outer_loss"])
        self.write_scalars({"test/outer_loss": score}, self.loaded_step)

    @torch.no_grad()
    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the last time's truth and prediction at the outer points (R, B', d), and lambda (R, W)."""
        window = self.window_at(len(self.records["loss"]) - 1)
        return {"truth": window.current_y, "prediction": self(window.outer_points), "lambda": self.lag_weights}

    def figures(self, folder: Path) -> dict[str, Figure]:
        """See :meth:`ToyModule.figures`."""
        if self.last_report is None or not self.records:
            return {}
        shown = self.predict_step(torch.empty(0), 0)
        return {
            "outer_loss": figures.draw_loss(self.last_report, self.label),
            "weights": figures.draw_weights(
                self.records["lambda"], RECORD_EVERY, self.data.exact_loss.oracle(), self.label
            ),
            "prediction": figures.draw_prediction(shown["truth"][0].cpu(), shown["prediction"][0].cpu(), self.label),
        }
