"""ToyModule: what an experiment is, and how its networks are built and kept in checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import ToyError, check_settings, require
from lightning_toys.training.checkpoint_format import optimizer_mismatch
from lightning_toys.training.configuration import check_seeds, unused_flags
from lightning_toys.training.monitors import HOLDOUT, MonitorCheck
from lightning_toys.training.optimization import ReplicaOptimization, optimizers_in
from lightning_toys.training.progress_bar import Progress
from lightning_toys.training.replica_parallel import Parallel, ReplicaStrategy, share, with_states
from lightning_toys.training.results import Report, check_finite, checked_report
from lightning_toys.training.trainer_checks import check_running_trainer


class ToyModule(ReplicaOptimization):
    """Base of the replica experiments.

    A subclass builds ``self.net`` in :meth:`build` (every parameter with a leading replica axis), gives each replica's
    loss in :meth:`replica_losses` and leaves a :class:`Report` in ``last_report``. How steps are taken is in
    ``optimization.py``, what is logged in ``metric_logging.py``, how processes share replicas out in
    ``replica_parallel.py``.

    Args:
        seeds: one seed a replica.
        lr: AdamW's learning rate.
        weight_decay: AdamW's decoupled weight decay; 0 makes it Adam.
        clip_grad_norm: bound on each replica's gradient norm.
        ema_decay: decay of an exponential moving average of the weights.
        lr_decay: ``cosine`` takes every learning rate from its value to 0 over the run's steps.
        optimizer: ``adamw``, or ``muon`` on the hidden matrices and AdamW on the rest.
        muon_lr: Muon's learning rate.
        parallel: what several processes share out: the rows of each ``batch``, or the ``replicas``.
        compile: whether :meth:`compiled` compiles.
    """

    experiment: str = ""  # the question that it answers: runs of one experiment lie in one folder and are compared
    comparison_figures: str = (
        ""  # "package.module.compare_figures": figures by name of runs {label: folder}, for `compare`
    )
    headline: Sequence[str] = ("l2",)  # the metrics of which `compare` shows every readout
    metric_labels: Mapping[str, str] = {}  # axis labels, with units
    # settings, each with all below it, by which runs are asked something else: `compare` puts them into other tables
    question_settings: Sequence[str] = ("data.target", "data.path", "data.drift", "model.env", "model.reward")
    best_metric: str = HOLDOUT  # the scalar whose mean decides on checkpoints/best.ckpt, such as "eval/rmse"
    best_mode: Literal["min", "max"] = "min"  # whether small or large is good of it
    trains: bool = True  # False: there are no weights, and `test` needs no checkpoint
    precisions: Sequence[str] = ()  # of the Trainer's, those that it can run in; () is all
    checkpointed_modules: Sequence[
        str
    ] = ()  # modules beside the networks that go into a checkpoint, and check themselves
    reads_data: bool = True  # False: the loss needs no sample of the data module
    measured_later: Sequence[str] = ()  # metrics that the first validations may lack

    def __init__(
        self,
        seeds: Sequence[int],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        lr_decay: Literal["constant", "cosine"] = "constant",
        optimizer: Literal["adamw", "muon"] = "adamw",
        muon_lr: float = 0.02,
        parallel: Parallel = "batch",
        compile: bool = False,
    ) -> None:
        check_settings(ToyModule, locals(), "--model.")
        super().__init__(lr, weight_decay, clip_grad_norm, ema_decay, lr_decay, optimizer, muon_lr, compile)
        self.seeds = check_seeds(seeds)
        self.parallel, self.local_replicas = parallel, slice(0, len(self.seeds))
        self.register_buffer("best_score", torch.full((len(self.seeds),), torch.inf))
        self.last_report: Report | None = None
        self.last_losses = torch.zeros(len(self.seeds))
        self.sizes: dict[str, Any] = {}
        self.run_path: Path | None = None  # where the command line puts this run
        self.log_path: Path | None = None  # where a script's Trainer puts it
        self.config: dict[str, Any] = {}  # the command line's model and data sections, kept in checkpoints

    @property
    def run_folder(self) -> Path:
        """Where this run's files go: the command line's folder, or the Trainer's ``log_dir``.

        Raises:
            ToyError: no Trainer has run yet.
        """
        folder = self.run_path or self.log_path
        if folder is None:
            raise ToyError("run_folder: there is none before a Trainer runs the module")
        return folder

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows how far it is, as the Trainer's ``enable_progress_bar`` says."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        shown = any(isinstance(c, Progress) and c.shown for c in callbacks)
        return shown and self.trainer.is_global_zero

    # a Trainer's hooks, so that a script's does what the command line's does

    def configure_callbacks(self) -> list[Callback]:
        """Check what callbacks monitor, and show optimiser steps in the place of the Trainer's bar of batches."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        own: list[Callback] = [] if any(isinstance(c, MonitorCheck) for c in callbacks) else [MonitorCheck()]
        bars = [c for c in callbacks if isinstance(c, ProgressBar)]
        for bar in bars:
            callbacks.remove(bar)
        return [*own, Progress()] if bars else own

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that would do something else than it says; note where its files go.

        Raises:
            ToyError: names the Trainer's argument.
        """
        trainer: Any = self.trainer
        check_running_trainer(trainer, self.precisions)
        predicts = type(self).predict_step is not LightningModule.predict_step
        name = type(self).__name__
        require(predicts or stage != "predict", f"predict: {name} has no predict_step; call the module, or give it one")
        if trainer.precision != "64-true" and any(p.dtype == torch.float64 for p in self.parameters()):
            self.float()  # loaded in double precision, and now run in single
        self.log_path = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is agreed upon by all processes

    def on_train_end(self) -> None:
        """Remember which step the weights are of: another Trainer may test them. Hold the last validation to its word.

        Raises:
            NonFiniteError: a headline metric of the last validation is not finite.
        """
        self.loaded_step = self.global_step
        if self.last_report is not None:
            check_finite(self.last_report, self.headline, "fit's last validation")

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Give the Trainer the test's means: what ``trainer.test`` returns, and ``trainer.callback_metrics``.

        Raises:
            NonFiniteError: a headline metric is not finite.
        """
        if self.last_report is not None:
            check_finite(self.last_report, self.headline, "test")
            self.log_means(self.last_report.means("test"))

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Hold a validation that is not a training's to finite results, as a test."""
        super().on_validation_batch_end(outputs, batch, batch_idx, dataloader_idx)
        if self.last_report is not None and self.trainer.state.fn == "validate":
            check_finite(self.last_report, self.headline, "validate")

    # what an experiment gives

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """Return what :meth:`build` has to know of the data, plain values; kept in checkpoints.

        Raises:
            ToyError: the data module does not fit this module.
        """
        raise NotImplementedError

    def build(self) -> nn.Module:
        """Return the network; called once, when ``self.sizes`` is known."""
        raise NotImplementedError

    def report(self, stage: str) -> Report:
        """Return what is measured, one value a replica.

        Called at every validation (``stage`` is "validate") and by the Trainer's ``test`` ("test"), which may measure
        more. An experiment whose evaluation needs more than that overrides ``validation_step`` and ``test_step``.
        """
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure, and log ``eval/...``."""
        wanted = [n for n in self.headline if n not in self.measured_later]
        self.last_report = checked_report(self.report("validate"), type(self).__name__, wanted)
        self.write_evaluation(self.last_report)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure, and log ``test/...`` for the headline metrics."""
        self.last_report = checked_report(self.report("test"), type(self).__name__, self.headline)
        found = self.last_report.metrics
        shown = {f"test/{n}": torch.tensor(found[n]) for n in self.headline if n in found}
        shares = {f"test/{n}": count for n, count in self.last_report.shares.items()}
        self.write_scalars(shown, self.loaded_step, shares)

    @property
    def label(self) -> str:
        """A few words that tell this run from others in a comparison."""
        return type(self).__name__

    @property
    def run_label(self) -> str:
        """The label of a run: a subclass of somebody's own is told from its base, unless it has a label of its own."""
        own: list[type] = []
        for kind in type(self).__mro__:
            if kind is ToyModule or kind.__module__.startswith("lightning_toys."):
                inherits = kind is not ToyModule and own and not any("label" in vars(k) for k in own)
                return f"{type(self).__name__}: {self.label}" if inherits else self.label
            own.append(kind)
        return self.label

    def unused_settings(self) -> dict[str, str]:
        """Return the flags that would do nothing beside the other settings, each with what it wants.

        A flag ending in a dot stands for all below it. Only the command line is checked against them: a file may give
        what another setting would use.
        """
        return unused_flags("--model.optimizer muon", "muon_lr") if self.optimizer_kind != "muon" else {}

    def figures(self, folder: Path) -> dict[str, Figure]:
        """Return the figures of the last report, by file name; ``folder`` holds the run's metrics.csv."""
        return {}

    @classmethod
    def experiment_name(cls) -> str:
        """Return the folder of its runs: what it declares, or the top package of the file that it is defined in."""
        return cls.experiment or cls.__module__.partition(".")[0]

    @classmethod
    def stands_alone(cls, settings: Mapping[str, Any]) -> bool:
        """Whether `test` needs no run of ours, given these settings."""
        return not cls.trains

    # building and shadow copies

    def configure_model(self) -> None:
        """Build the network, and its shadow copies where they are wanted, once."""
        if hasattr(self, "net"):
            return
        if not self.sizes:
            if self._trainer is None:
                return  # load_from_checkpoint: on_load_checkpoint knows the sizes, and comes next
            self.sizes = self.measure(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self._trainer is not None and isinstance(self.trainer.strategy, ReplicaStrategy) and self.in_training:
            self.local_replicas = share(len(self.seeds), self.trainer.global_rank, self.trainer.world_size)
            self.best_score = self.best_score[self.local_replicas].clone()
        self.net = self.build()
        if self.ema_decay is not None:
            self.ema_net = self.shadow()
        if self.keeps_best:
            self.best_net = self.shadow()

    @property
    def tests_optimizer(self) -> bool:
        """Whether `test` reads the checkpoint's optimisers too."""
        return False

    @property
    def keeps_best(self) -> bool:
        """Whether each replica's best weights on held-out training points are kept."""
        return False

    def shadow(self) -> nn.Module:
        """Return a frozen copy of the network."""
        return copy.deepcopy(self.net).requires_grad_(False)

    def keep_best(self, scores: Tensor) -> None:
        """Copy the weights of every replica whose score (R,), lower is better, beats its best so far."""
        if self.best_net is None:
            return
        better = scores.to(self.best_score) < self.best_score
        self.best_score = torch.where(better, scores.to(self.best_score), self.best_score)
        for kept, p in zip(self.best_net.parameters(), self.net.parameters(), strict=True):
            kept.data[better] = p.data[better]

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the configuration in the checkpoint, plain values only; put every process's replicas together."""
        if self.shares_replicas:
            checkpoint.update(with_states(checkpoint, self.replica_names, self.gather_replicas))
        checkpoint["toy"] = {"seeds": list(self.seeds), "sizes": self.sizes, "config": self.config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which step the weights are of, and what the network is built for."""
        self.loaded_step = int(checkpoint["global_step"])
        if not hasattr(self, "net"):
            self.sizes = dict(checkpoint["toy"]["sizes"])
            self.configure_model()
        if self._trainer is None:  # load_from_checkpoint, which would round double weights to the module's
            kinds = {v.dtype for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
            self.to(torch.float64 if torch.float64 in kinds else self.dtype)
        if self.shares_replicas:
            checkpoint.update(with_states(checkpoint, self.replica_names, lambda x: x[self.local_replicas].clone()))

    def network_mismatch(self, checkpoint: dict[str, Any], net: nn.Module) -> str | None:
        """Say where the checkpoint's network differs from ``net``, that :meth:`build` made, if it does."""
        for name, wanted, flag in (
            ("ema_net", self.ema_decay is not None, "--model.ema_decay"),
            ("best_net", self.keeps_best, "--data.holdout"),
        ):
            if wanted != any(k.startswith(f"{name}.") for k in checkpoint["state_dict"]):
                return f"{flag} was {'not ' if wanted else ''}given when it was trained"
        built = {k: v.shape for k, v in net.state_dict().items()}
        held = {k: v.shape for k, v in checkpoint["state_dict"].items()}
        copies = ["net", *(s for s in ("ema_net", "best_net") if any(k.startswith(f"{s}.") for k in held))]
        known = {k: v.shape for k, v in self.state_dict().items()}
        known |= {f"{s}.{k}": v for s in copies for k, v in built.items()}
        for name in [*known, *(k for k in held if k.partition(".")[0] not in self.checkpointed_modules)]:
            if held.get(name) != known.get(name):
                shapes = [str(tuple(s[name])) if name in s else "nothing" for s in (held, known)]
                return f"it has {shapes[0]} for {name}, where {shapes[1]} is wanted"
        return None

    def extras_mismatch(self, toy: dict[str, Any], step: int, resumes: bool) -> str:
        """Say what is wrong with that which an experiment adds to a checkpoint, if something is.

        Args:
            toy: the checkpoint's entry of that name.
            step: of the checkpoint.
            resumes: whether training is to go on from it; other verbs may read less.
        """
        return ""

    def optimizer_mismatch(self, checkpoint: dict[str, Any], net: nn.Module) -> str:
        """Say where the checkpoint's optimisers differ from those that this run would train ``net`` with."""
        self.net = net
        try:
            made: Any = self.configure_optimizers()
        finally:
            del self.net
        # an optimiser of somebody's own may keep no moments, as plain SGD
        learned = self.has_learned(checkpoint) and not self.own_optimizer
        states, step = checkpoint["optimizer_states"], int(checkpoint["global_step"])
        return optimizer_mismatch(states, optimizers_in(made), step, learned)

    def has_learned(self, checkpoint: dict[str, Any]) -> bool:
        """Whether an optimiser step lies behind a checkpoint: then its optimisers hold moments."""
        return int(checkpoint["global_step"]) > 0
