"""ToyModule: R replicas trained side by side, several optimiser steps to a Trainer batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_toys.errors import NonFiniteError, require
from lightning_toys.stats import mean_ci
from lightning_toys.training.checkpoint_form import optimizers_misfit
from lightning_toys.training.compiling import Arguments, Result, compiled
from lightning_toys.training.loader import Batch, Block, DrawnBlock
from lightning_toys.training.muon import ReplicaMuon, split_hidden
from lightning_toys.training.replica_parallel import Parallel, ReplicaStrategy, SharedReplicas, share, with_states
from lightning_toys.training.results import Report, is_main


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Refuse an empty, repeated or negative list of replica seeds."""
    require(len(seeds) > 0, "--model.seeds: [] is not allowed; give at least one seed, such as [0]")
    require(
        min(seeds) >= 0 and max(seeds) < 2**63, f"--model.seeds: {list(seeds)} is not allowed; seeds are in [0, 2^63)"
    )
    require(len(set(seeds)) == len(seeds), f"--model.seeds: {list(seeds)} is not allowed; a seed appears twice")
    return list(seeds)


def clip_per_replica(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale each replica's gradient so that its own norm is at most ``max_norm``; parameters (R, ...)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
    scale = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))


Data = TypeVar("Data", bound=LightningDataModule)


def fitting(data: LightningDataModule | None, kind: type[Data]) -> Data:
    """Return ``data`` if it is what the experiment learns from, and refuse it otherwise."""
    name = type(data).__name__ if data is not None else "none"
    require(isinstance(data, kind), f"--data: {name} is not allowed; give {kind.__name__}")
    assert isinstance(data, kind)
    return data


Options = TypeVar("Options")


def made(kind: type[Options], given: Options | dict[str, Any] | None, default: Options | None = None) -> Options:
    """Return a dataclass of options as it was given, from a checkpoint's plain values, or its default."""
    if isinstance(given, dict):
        return kind(**given)
    return given or default or kind()


def idle_flags(wants: str, *names: str) -> dict[str, str]:
    """Return flags of the model, and what they want to do something; see :meth:`ToyModule.idle`."""
    return {f"--model.{n}": wants for n in names}


class ToyModule(SharedReplicas):
    """Base of the replica experiments.

    A subclass builds ``self.net`` in :meth:`build` (every parameter with a leading replica axis), gives each replica's
    loss in :meth:`replica_losses` and leaves a :class:`Report` in ``last_report``. Optimisation is manual for two
    reasons: many steps fit in one Trainer batch, and clipping is per replica.

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
        compile: whether :meth:`quick` compiles.
    """

    headline: Sequence[str] = ("l2",)  # the metrics of which `compare` shows every readout
    metric_labels: Mapping[str, str] = {}  # axis labels, with units
    trains: bool = True  # False: there are no weights, and `test` needs no checkpoint
    precisions: Sequence[str] = ()  # of the Trainer's, those that it can run in; () is all
    keeps: Sequence[str] = ()  # modules beside the networks that go into a checkpoint, and check themselves
    reads_data: bool = True  # False: the loss needs no sample of the data module
    monitors_loss: bool = True  # whether there is a training loss at every validation
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
        super().__init__()
        self.compiles = compile
        self.compiled_parts: dict[str, Any] = {}
        self.automatic_optimization = False
        self.seeds = check_seeds(seeds)
        self.parallel, self.mine = parallel, slice(0, len(self.seeds))
        require(0 < lr < math.inf, f"--model.lr: {lr} is not allowed; give a number > 0")
        require(0 < muon_lr < math.inf, f"--model.muon_lr: {muon_lr} is not allowed; give a number > 0")
        decays = 0 <= weight_decay < math.inf
        require(decays, f"--model.weight_decay: {weight_decay} is not allowed; give a number >= 0")
        require(
            clip_grad_norm is None or clip_grad_norm > 0,
            f"--model.clip_grad_norm: {clip_grad_norm} is not allowed; give a number > 0 or null",
        )
        require(
            ema_decay is None or 0 < ema_decay < 1,
            f"--model.ema_decay: {ema_decay} is not allowed; give a number between 0 and 1 or null",
        )
        self.lr, self.weight_decay, self.clip_grad_norm, self.ema_decay = lr, weight_decay, clip_grad_norm, ema_decay
        self.lr_decay, self.optimizer_kind, self.muon_lr = lr_decay, optimizer, muon_lr
        self.register_buffer("best_score", torch.full((len(self.seeds),), torch.inf))
        self.last_report: Report | None = None
        self.banded: dict[str, None] = {}  # names of what was logged with its interval, in their order
        self.last_losses = torch.zeros(len(self.seeds))
        self.loaded_step = 0
        self.sizes: dict[str, Any] = {}
        self.run_folder = Path()  # where the command line puts this run
        self.config: dict[str, Any] = {}  # the command line's model and data sections, kept in checkpoints

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

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """Return each replica's share of its loss (R,): the sum over local rows divided by ``batch.total``."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """A few words that tell this run from others in a comparison."""
        return type(self).__name__

    def idle(self) -> dict[str, str]:
        """Return the flags that would do nothing beside the other settings, each with what it wants.

        A flag ending in a dot stands for all below it. Only the command line is held against them: a file may give what
        another setting would use.
        """
        return idle_flags("--model.optimizer muon", "muon_lr") if self.optimizer_kind != "muon" else {}

    def figures(self, folder: Path) -> dict[str, Figure]:
        """Return the figures of the last report, by file name; ``folder`` holds the run's metrics.csv."""
        return {}

    @staticmethod
    def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
        """Return figures that put runs side by side, beyond those that `compare` draws of any metric.

        Args:
            runs: label to run folder.
        """
        return {}

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
            self.mine = share(len(self.seeds), self.trainer.global_rank, self.trainer.world_size)
            self.best_score = self.best_score[self.mine].clone()
        self.net = self.build()
        if self.ema_decay is not None:
            self.ema_net = self.shadow()
        if self.keeps_best:
            self.best_net = self.shadow()

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

    # training

    def on_train_start(self) -> None:
        """Let the learning rate and weight decay given now win over those in a resumed optimiser's state."""
        for optimizer in self.trainer.optimizers:
            for group, lr in zip(optimizer.param_groups, self.learning_rates, strict=True):
                group.update(lr=lr, weight_decay=self.weight_decay)

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate of each of the optimiser's parameter groups, before any decay."""
        return [self.muon_lr, self.lr] if self.optimizer_kind == "muon" else [self.lr]

    def decayed(self, step: int) -> float:
        """Return the learning rates' factor at optimiser step ``step``, from 0: (1 + cos(pi step / steps)) / 2."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.trainer.max_steps)))

    def rate_at(self, step: int) -> float | None:
        """Return the learning rate of optimiser step ``step``, from 0, where it changes."""
        return self.lr * self.decayed(step) if self.lr_decay == "cosine" else None

    def decay_rates(self, optimizer: Any, step: int) -> None:
        """Set the learning rates of optimiser step ``step``."""
        factor = self.decayed(step)
        for group, lr in zip(optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = lr * factor

    @property
    def steps_directly(self) -> bool:
        """Whether backward and optimiser step may go past Lightning's wrappers, which then would only pass them on.

        In a small model those wrappers cost a sixth of a step. They matter to a strategy of several processes, to a
        gradient scaler, to a profiler, and to hooks that somebody overrides; then they are used.
        """
        trainer = self.trainer
        hooks = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        hooked = any(getattr(type(c), h) is not getattr(Callback, h) for c in callbacks for h in hooks)
        hooked |= any(getattr(type(self), h) is not getattr(LightningModule, h) for h in (*hooks, "backward"))
        return (
            type(trainer.strategy) in (SingleDeviceStrategy, ReplicaStrategy)
            and getattr(trainer.precision_plugin, "scaler", None) is None
            and type(trainer.precision_plugin) in (Precision, MixedPrecision, DoublePrecision)
            and isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
            and not hooked
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return fused AdamW, or Muon on the hidden matrices with AdamW on the rest."""
        if self.optimizer_kind == "muon":
            matrices, others = split_hidden(self.net)
            return ReplicaMuon(matrices, others, self.muon_lr, self.lr, weight_decay=self.weight_decay)
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=fused)

    def training_step(self, block: Block | DrawnBlock, batch_idx: int) -> None:
        """Take every optimiser step of the block.

        Raises:
            NonFiniteError: a loss was not finite; names the first such step and the replicas' seeds.
        """
        direct = self.steps_directly
        optimizer = self.optimizers(use_pl_optimizer=not direct)
        assert not isinstance(optimizer, list)
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        parameters = list(self.net.parameters())
        losses: list[Tensor] = []
        for step in range(block.start, block.stop):
            if self.lr_decay == "cosine":
                self.decay_rates(optimizer, step)
            loss = self.replica_losses(block.batch(step), step)
            losses.append(loss.detach().clone() if self.compiles else loss.detach())  # a graph writes over it
            with self.without_autocast():
                if direct:
                    for p in parameters:
                        p.grad = None
                    loss.backward(torch.ones_like(loss))  # type: ignore[no-untyped-call]
                else:  # DDP averages gradients over ranks; the losses are shares of one sum
                    optimizer.zero_grad()
                    self.manual_backward(loss.sum() * block.world)
                if self.clip_grad_norm is not None:
                    if (scaler := getattr(self.trainer.precision_plugin, "scaler", None)) is not None:
                        scaler.unscale_(self.trainer.optimizers[0])  # else the norm is that of scaled gradients
                    clip_per_replica(parameters, self.clip_grad_norm)
                if direct:  # what Lightning's wrapper counts; `global_step` reads it
                    progress.increment_ready()
                    optimizer.step()
                    progress.increment_completed()
                else:
                    optimizer.step()
            if self.ema_net is not None and self.ema_decay is not None:
                with torch.no_grad():
                    averages: list[Tensor] = list(self.ema_net.parameters())
                    torch._foreach_lerp_(averages, list[Tensor](parameters), 1 - self.ema_decay)
        self.finish_block(block, torch.stack(losses))

    def quick(self, f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return a part of the loss compiled where ``--model.compile`` asks for it, as a CUDA graph on a GPU."""
        if not self.compiles:
            return f
        if f.__name__ not in self.compiled_parts:
            self.compiled_parts[f.__name__] = compiled(f, self.device.type == "cuda")
        out: Callable[Arguments, Result] = self.compiled_parts[f.__name__]
        return out

    def without_autocast(self) -> AbstractContextManager[Any]:
        """Return the context of backward and optimiser step, without the autocast that Lightning keeps on.

        Autocast is for the forward pass. Under it the second derivatives of a loss with gradients in it, and Muon's
        products, would be cast too.
        """
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def finish_block(self, block: Block | DrawnBlock, losses: Tensor) -> None:
        """Check the block's losses (steps, R) and log those at multiples of ``log_every_n_steps``."""
        if block.world > 1:
            losses = self.trainer.strategy.reduce(losses, reduce_op="sum")
        losses = self.everywhere(losses, dim=1)
        if not torch.isfinite(losses).all():
            bad = ~torch.isfinite(losses)
            first = int(bad.any(1).nonzero()[0])
            self.refuse_non_finite("loss is", bad[first], block.start + first)
        self.last_losses = losses[-1]
        # what `self.log` and Lightning's own callbacks take for the x-axis: optimiser steps, not blocks
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = block.stop
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every:
            for step in range(-(-(block.start + 1) // every) * every, block.stop + 1, every):
                self.write_scalars({"train/loss": losses[step - 1 - block.start]}, step)
                if (rate := self.rate_at(step - 1)) is not None:
                    self.write_scalars({"train/lr": torch.tensor([rate])}, step)

    def check_finite_weights(self) -> None:
        """Raise :class:`NonFiniteError` if a weight is not finite, which the loss shows one step later only."""
        bad = torch.zeros(len(self.local_seeds), dtype=torch.bool, device=self.device)
        for p in self.net.parameters():
            bad |= ~torch.isfinite(p.detach()).flatten(1).all(1)
        bad = self.everywhere(bad)
        if bad.any():
            self.refuse_non_finite("weights are", bad, self.global_step)

    def refuse_non_finite(self, what: str, bad: Tensor, step: int) -> NoReturn:
        """Stop the run, naming the replicas where ``bad`` (R,) is true."""
        who = [s for s, b in zip(self.seeds, bad.tolist(), strict=True) if b]
        raise NonFiniteError(f"the {what} not finite at step {step} in the replicas of seeds {who}")

    # logging

    def write_scalars(self, metrics: dict[str, Tensor], step: int | None = None) -> None:
        """Write metrics (R,) to every logger: mean, 95 % interval, and each replica's value.

        This goes past ``self.log``: a call of that costs as much as a quarter of a training step, and its x-axis
        counts Trainer batches, not optimiser steps.
        """
        if not self.trainer.is_global_zero:
            return
        row: dict[str, float] = {}
        for name, values in metrics.items():
            v = values.detach().double().cpu().tolist()
            estimate = mean_ci(v)
            row[name] = estimate.mean
            if len(v) > 1:
                # groups of their own: TensorBoard's first cards are the means
                self.banded[name] = None
                row[f"interval/{name}/lo"], row[f"interval/{name}/hi"] = estimate.lo, estimate.hi
                row.update({f"replicas/{name}/seed_{s}": x for s, x in zip(self.seeds, v, strict=True)})
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=step or self.global_step or self.loaded_step)

    def write_evaluation(self, report: Report) -> None:
        """Write a validation's metrics as ``eval/...``; means under these names are what callbacks can monitor."""
        means = {f"eval/{k}": sum(v) / len(v) for k, v in report.metrics.items() if is_main(k)}
        if self.trainer.state.fn == "fit" and self.monitors_loss:
            means["train/loss"] = float(self.last_losses.mean())
        self.log_dict(means, logger=False, batch_size=1, sync_dist=self.trainer.world_size > 1)
        if not self.trainer.sanity_checking:
            shown = {k: torch.tensor(v) for k, v in report.metrics.items() if "_dim" not in k}
            # a group of their own: TensorBoard's first cards are those of the whole law
            self.write_scalars({f"{'modes' if '_mode' in k else 'eval'}/{k}": v for k, v in shown.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the configuration in the checkpoint, plain values only; put every process's replicas together."""
        if self.shares_replicas:
            checkpoint.update(with_states(checkpoint, self.replica_names, self.everywhere))
        checkpoint["toy"] = {"seeds": list(self.seeds), "sizes": self.sizes, "config": self.config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which step the weights are of, and what the network is built for."""
        self.loaded_step = int(checkpoint["global_step"])
        if not hasattr(self, "net"):
            self.sizes = dict(checkpoint["toy"]["sizes"])
            self.configure_model()
        if self.shares_replicas:
            checkpoint.update(with_states(checkpoint, self.replica_names, lambda x: x[self.mine].clone()))

    def misfit(self, checkpoint: dict[str, Any], net: nn.Module) -> str | None:
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
        for name in [*known, *(k for k in held if k.partition(".")[0] not in self.keeps)]:
            if held.get(name) != known.get(name):
                shapes = [str(tuple(s[name])) if name in s else "nothing" for s in (held, known)]
                return f"it has {shapes[0]} for {name}, where {shapes[1]} is wanted"
        return None

    def extras_misfit(self, toy: dict[str, Any], step: int, resumes: bool) -> str:
        """Say what is wrong with that which an experiment adds to a checkpoint, if something is.

        Args:
            toy: the checkpoint's entry of that name.
            step: of the checkpoint.
            resumes: whether training is to go on from it; other verbs may read less.
        """
        return ""

    def optimizers_misfit(self, checkpoint: dict[str, Any], net: nn.Module) -> str:
        """Say where the checkpoint's optimisers differ from those that this run would train ``net`` with."""
        self.net = net
        try:
            made: Any = self.configure_optimizers()
        finally:
            del self.net
        optimizers = list(made) if isinstance(made, tuple | list) else [made]
        return optimizers_misfit(checkpoint["optimizer_states"], optimizers, int(checkpoint["global_step"]))
