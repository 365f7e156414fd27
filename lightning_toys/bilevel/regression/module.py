"""WindowRegression: learn the weight of each past time in the loss that is fitted now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.bilevel.regression import figures
from lightning_toys.bilevel.regression.data import DriftStream
from lightning_toys.bilevel.regression.hypergradients import (
    AdamMoments,
    Hypergradient,
    Window,
    aid_hypergradient,
    inner_value_gradient,
    logit_gradient,
    network_hypergradient,
    outer_loss,
    ridge_hypergradient,
    unrolled_hypergradient,
    weighted_targets,
)
from lightning_toys.bilevel.regression.learner import Learner
from lightning_toys.bilevel.regression.metrics import (
    largest_lags,
    local_regret,
    mean_of_last_sixth,
    normalised,
    rolling_mean,
)
from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.bilevel.regression.stream import Stream
from lightning_toys.errors import MOST, REPEATS, bounded, require
from lightning_toys.nets import DEEPEST
from lightning_toys.training.checkpoint_format import Like, unlike
from lightning_toys.training.configuration import require_data, unused_flags
from lightning_toys.training.denormals import denormals_flushed
from lightning_toys.training.inference import require_built, with_replica_axis
from lightning_toys.training.loader import Block, DrawnBlock
from lightning_toys.training.module import ToyModule
from lightning_toys.training.results import Report

RECORD_EVERY = 10  # steps between two records of the weights and of the hypergradient that the local regret takes
REGRET_WINDOW = 10  # recorded hypergradients that the local regret averages over
ROLLING_STEPS = 30  # of the rolling outer loss
CURVE_POINTS = 250  # of a curve in results.json


class WindowRegression(ToyModule):
    """Learns weights lambda of the lags 1..window so that a network fitted to the past under them predicts the present.

    At time t the network h takes ``inner_steps`` steps of Adam on sum_s lambda_s mean |h - y_(t-s)|^2, warm-started.
    Its loss on y_t at other points is recorded, and the hypergradient of that loss moves lambda by one step of Adam:
    together one optimiser step of the run. See :mod:`lightning_toys.bilevel.regression.hypergradients`.

    Args:
        algorithm: the hypergradient: ``funcbo`` (function space), ``aid`` (implicit differentiation), ``unroll1``
            (through the last ``unroll_steps`` inner steps), or ``uniform``: lambda stays as it is, the control.
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
    """

    experiment = "bilevel"
    comparison_figures = "lightning_toys.bilevel.regression.figures.compare_figures"
    headline = ("outer_loss", "exact_loss", "local_regret")
    precisions = ("32-true", "64-true")  # conjugate gradient and Adam's small steps drown in half a precision
    metric_labels: Mapping[str, str] = {
        "outer_loss": "outer loss over the last sixth of the stream",
        "outer_loss_all": "outer loss over the whole stream",
        "exact_loss": "outer loss of the learned weights, were the inner problem solved exactly",
        "local_regret": "bilevel local regret of the normalised weights, last sixth of the stream",
        "local_regret_all": "bilevel local regret of the normalised weights, whole stream",
    }
    reads_data = False
    measured_later = ("outer_loss", "outer_loss_all", "exact_loss", "local_regret", "local_regret_all")

    def __init__(
        self,
        algorithm: Literal["funcbo", "aid", "unroll1", "uniform"] = "funcbo",
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
    ) -> None:
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
        self.algorithm, self.hidden, self.layers = algorithm, hidden, layers
        self.inner_lr, self.inner_steps, self.outer_lr, self.lambda0 = inner_lr, inner_steps, outer_lr, lambda0
        self.weights, self.smoothing, self.unroll_steps = weights, smoothing, unroll_steps
        self.cg_iterations, self.damping, self.curvature = cg_iterations, damping, curvature
        self.adjoint, self.ridge, self.adjoint_steps, self.adjoint_lr = adjoint, ridge, adjoint_steps, adjoint_lr
        self.save_hyperparameters(logger=False)
        self.hparams["seeds"] = self.seeds
        self.records: dict[str, Tensor] = {}  # of every step so far; part of the checkpoint
        self._stream: Stream | None = None

    # building

    @property
    def data(self) -> DriftStream:
        """The data module that the Trainer runs with."""
        return require_data(self.trainer.datamodule, DriftStream)  # type: ignore[attr-defined]

    @property
    def stream(self) -> Stream:
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
        out: dict[str, str] = {}
        for algorithm, names in (
            ("aid", ("cg_iterations", "damping", "curvature")),
            ("unroll1", ("unroll_steps",)),
            ("funcbo", ("adjoint", "ridge", "adjoint_steps", "adjoint_lr")),
        ):
            if self.algorithm != algorithm:
                out |= unused_flags(f"--model.algorithm {algorithm}", *names)
        if self.algorithm == "uniform":
            return out | unused_flags("an algorithm that learns the weights", "outer_lr", "weights")
        if self.algorithm == "funcbo":
            network = self.adjoint == "network"
            out |= unused_flags("--model.adjoint ridge", "ridge") if network else {}
            out |= {} if network else unused_flags("--model.adjoint network", "adjoint_steps", "adjoint_lr")
        return out

    @property
    def label(self) -> str:
        """See :attr:`ToyModule.label`."""
        names = {"funcbo": "funcBO", "aid": "AID", "unroll1": f"unroll {self.unroll_steps}", "uniform": "uniform"}
        return names[self.algorithm] + (", smoothed" if self.smoothing > 1 else "")

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """See :meth:`ToyModule.measure`."""
        data = require_data(data, DriftStream)
        return {"inputs": data.shape.inputs, "outputs": data.shape.outputs, "window": data.window}

    def build(self) -> Learner:
        """See :meth:`ToyModule.build`."""
        net = MLP((self.sizes["inputs"], *[self.hidden] * self.layers, self.sizes["outputs"]))
        start = self.lambda0 if self.weights == "clip" else None
        adjoint = self.algorithm == "funcbo" and self.adjoint == "network"
        return Learner(net, self.seeds, self.sizes["window"], start, self.smoothing, adjoint)

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
        self.finish_block(block, torch.stack(rows["loss"]).to(self.device) / block.world)

    def window_at(self, t: int) -> Window:
        """Return the data of step t."""
        like, stream = self.learner.theta, self.stream
        inner_points, outer_points = stream.points(like)
        return Window(inner_points, outer_points, *stream.window(t, self.sizes["window"], like))

    def take_step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Fit h to the window, score it, and step lambda; return the step's records: loss (R,), lambda (R, W), ..."""
        learner, window = self.learner, self.window_at(step)
        theta, free, lam = learner.theta, learner.free, self.lag_weights
        unrolls = self.unroll_steps if self.algorithm == "unroll1" else 0
        targets = weighted_targets(lam, window.past_y)
        free.grad = None
        for _ in range(self.inner_steps - unrolls):
            forward = learner.mlp.forward_pass(theta, window.inner_points, second_order=False)
            theta.grad = forward.vjp(inner_value_gradient(forward, targets))
            optimizer.step()
        theta.grad = None
        v, found = self.hypergradient(lam, window, optimizer)
        rows = {"loss": outer_loss(learner.mlp(theta, window.outer_points), window.current_y)}
        if found is not None and self.algorithm == "aid":
            rows["residual"] = found.residual
        if step % RECORD_EVERY == 0:
            reference = aid_hypergradient(learner.mlp, theta, lam, window, 10, 1e-4, gauss_newton=True)
            rows |= {"lambda": lam, "slope": lam.sum(1, keepdim=True) * reference.value}
        if v is not None:
            v = learner.smooth_gradient(v, step)
            free.grad = v if self.weights == "clip" else logit_gradient(v, lam)
            optimizer.step()
            if self.weights == "clip":
                free.clamp_(min=0)
        return rows

    @property
    def lag_weights(self) -> Tensor:
        """Lambda (R, W), lag 1 first, no graph."""
        free = self.learner.free.detach()
        if self.weights == "clip":
            return free.clone()
        return self.lambda0 * free.shape[1] * torch.softmax(free, dim=1)

    def hypergradient(
        self, lam: Tensor, window: Window, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor | None, Hypergradient | None]:
        """Return dF/dlambda (R, W) by the chosen algorithm, none for ``uniform``; ``unroll1`` steps h too."""
        learner = self.learner
        net, theta = learner.mlp, learner.theta.detach()
        if self.algorithm == "uniform":
            return None, None
        if self.algorithm == "aid":
            newton = self.curvature == "gauss_newton"
            found = aid_hypergradient(net, theta, lam, window, self.cg_iterations, self.damping, newton)
        elif self.algorithm == "unroll1":
            state = optimizer.state[learner.theta]
            if not state:  # as torch makes it at its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=theta.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(theta), torch.zeros_like(theta)
            moments = AdamMoments(state["exp_avg"], state["exp_avg_sq"], int(state["step"]))
            done = unrolled_hypergradient(net, theta, moments, lam, window, self.unroll_steps, self.inner_lr)
            learner.theta.copy_(done.theta)
            for name, value in zip(("exp_avg", "exp_avg_sq"), done.moments[:2], strict=True):
                state[name].copy_(value)
            state["step"].fill_(done.moments.step)
            return done.value, None
        elif self.adjoint == "network":
            found, after = network_hypergradient(
                net, theta, lam, window, learner.adjoint_network, self.adjoint_steps, self.adjoint_lr
            )
            learner.adjoint_network = after
        else:
            found = ridge_hypergradient(net, theta, lam, window, self.ridge)
        return found.value, found

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
        return next(unlike(toy, {"records": form}), "")

    # evaluating

    def evaluate(self) -> Report:
        """Score the stream so far by the records of its steps."""
        loss, exact = self.records["loss"], self.data.exact_loss
        late, regret = mean_of_last_sixth(self.records["lambda"]), local_regret(self.records["slope"], REGRET_WINDOW)
        metrics = {
            "outer_loss": mean_of_last_sixth(loss),
            "outer_loss_all": loss.mean(0),
            "exact_loss": torch.from_numpy(exact.loss(late.numpy())),
            "local_regret": mean_of_last_sixth(regret),
            "local_regret_all": regret.mean(0),
        }
        metrics |= {f"lag_{i + 1}": lags for i, lags in enumerate(largest_lags(late, 3).unbind(1))}
        if "residual" in self.records:
            metrics["cg_residual"] = mean_of_last_sixth(self.records["residual"])
        references = {name: {"outer_loss": value} for name, value in exact.references().items()}
        kept = torch.linspace(0, len(loss) - 1, min(CURVE_POINTS, len(loss))).round().long()
        arrays = {
            "time": kept.tolist(),
            "outer_loss": rolling_mean(loss, ROLLING_STEPS)[kept].T.tolist(),
            "weights": normalised(late).mean(0).tolist(),
        }
        return Report(self.seeds, {k: v.tolist() for k, v in metrics.items()}, references, arrays)

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
