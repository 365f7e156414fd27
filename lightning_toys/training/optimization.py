"""Optimiser steps of replicas side by side, several to a Trainer batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_toys.errors import bounded, note, require
from lightning_toys.training.averaging import average_decay
from lightning_toys.training.compiling import Arguments, Result, compile_function
from lightning_toys.training.denormals import denormals_flushed
from lightning_toys.training.loader import Batch, Block, DrawnBlock
from lightning_toys.training.metric_logging import ReplicaLogging
from lightning_toys.training.muon import ReplicaMuon, split_hidden
from lightning_toys.training.replica_parallel import ReplicaStrategy
from lightning_toys.training.validation_clock import set_validation, validation_due


def clip_per_replica(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale each replica's gradient so that its own norm is at most ``max_norm``; parameters (R, ...)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
    scale = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))


class ReplicaOptimization(ReplicaLogging):
    """Replicas that learn: one optimiser over all of them, each replica's gradient clipped by itself.

    Optimisation is manual for two reasons: many steps fit in one Trainer batch, and clipping is per replica. For the
    arguments see :class:`~lightning_toys.training.module.ToyModule`.
    """

    ema_warmup: bool = True  # whether the decay of the moving average warms up; it was constant once

    def __init__(
        self,
        lr: float,
        weight_decay: float,
        clip_grad_norm: float | None,
        ema_decay: float | None,
        lr_decay: Literal["constant", "cosine"],
        optimizer: Literal["adamw", "muon"],
        muon_lr: float,
        compile: bool,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.compiles = compile
        self.compiled_parts: dict[str, Any] = {}
        bounded("--model.lr", lr, 0.0, above=True)
        bounded("--model.muon_lr", muon_lr, 0.0, above=True)
        bounded("--model.weight_decay", weight_decay, 0.0)
        if clip_grad_norm is not None:
            bounded("--model.clip_grad_norm", clip_grad_norm, 0.0, above=True)
        require(
            ema_decay is None or 0 < ema_decay < 1,
            f"--model.ema_decay: {ema_decay} is not allowed; give a number between 0 and 1 or null",
        )
        self.lr, self.weight_decay, self.clip_grad_norm, self.ema_decay = lr, weight_decay, clip_grad_norm, ema_decay
        self.lr_decay, self.optimizer_kind, self.muon_lr = lr_decay, optimizer, muon_lr
        self.side_losses: dict[str, Tensor] = {}  # what :meth:`note_losses` was given at the step that is taken
        self.backward_by: str | None = None  # how the last block's gradients were computed; None before training

    def take_steps(self, block: Block | DrawnBlock, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Take all steps of a block faster than autograd does, and return the losses (steps, R); None where it cannot.

        Only asked where nothing listens to single steps (:attr:`steps_directly`), in one process.
        """
        return None

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """Return each replica's share of its loss (R,): the sum over local rows divided by ``batch.total``."""
        raise NotImplementedError

    def note_losses(self, **values: Tensor) -> None:
        """Have this step's values (R,), shares as :meth:`replica_losses` returns them, logged as ``train/NAME``."""
        self.side_losses = {name: v.detach() for name, v in values.items()}

    def on_train_start(self) -> None:
        """Let the learning rate and weight decay given now win over those in a resumed optimiser's state.

        An optimiser of somebody's own keeps its settings, and goes on with those of the checkpoint.
        """
        if self.own_optimizer:
            if self.trainer.lr_scheduler_configs:
                note(
                    f"{type(self).__name__}.configure_optimizers: nothing steps its scheduler but your own code "
                    "(self.lr_schedulers().step()); lr_decay 'cosine' needs none"
                )
            return
        for optimizer in self.trainer.optimizers:
            for group, lr in zip(optimizer.param_groups, self.learning_rates, strict=True):
                group.update(lr=lr, weight_decay=self.weight_decay)

    @property
    def own_optimizer(self) -> bool:
        """Whether ``configure_optimizers`` is somebody's own, and with it the optimiser's settings."""
        return not type(self).configure_optimizers.__module__.startswith("lightning_toys.")

    def full_rates(self, optimizer: Any) -> list[float]:
        """Return the learning rate of each of an optimiser's groups, before any decay."""
        if not self.own_optimizer:
            return self.learning_rates
        # kept in the optimiser's state, and so in checkpoints: a resumed one's rates are decayed already
        return [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate of each of the optimiser's parameter groups, before any decay."""
        return [self.muon_lr, self.lr] if self.optimizer_kind == "muon" else [self.lr]

    def decayed(self, step: int) -> float:
        """Return the learning rates' factor at optimiser step ``step``, from 0: (1 + cos(pi step / steps)) / 2."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.trainer.max_steps)))

    def rate_at(self, step: int) -> float | None:
        """Return the learning rate of optimiser step ``step``, from 0, where it changes."""
        if self.lr_decay != "cosine":
            return None
        first = self.full_rates(self.trainer.optimizers[0])[0] if self.own_optimizer else self.lr
        return first * self.decayed(step)

    def decay_rates(self, optimizer: Any, step: int) -> None:
        """Set the learning rates of optimiser step ``step``."""
        factor = self.decayed(step)
        for group, lr in zip(optimizer.param_groups, self.full_rates(optimizer), strict=True):
            group["lr"] = lr * factor

    @property
    def steps_directly(self) -> bool:
        """Whether backward and optimiser step may go past Lightning's wrappers, which then would only pass them on.

        In a small model those wrappers cost a sixth of a step. They matter to a strategy of several processes, to a
        profiler, and to hooks that somebody overrides; then they are used.
        """
        trainer = self.trainer
        hooks = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        hooked = any(getattr(type(c), h) is not getattr(Callback, h) for c in callbacks for h in hooks)
        hooked |= any(getattr(type(self), h) is not getattr(LightningModule, h) for h in (*hooks, "backward"))
        return (
            type(trainer.strategy) in (SingleDeviceStrategy, ReplicaStrategy)
            and type(trainer.precision_plugin) in (Precision, MixedPrecision, DoublePrecision)
            and isinstance(trainer.profiler, PassThroughProfiler)  # type: ignore[attr-defined]
            and not hooked
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return fused AdamW, or Muon on the hidden matrices with AdamW on the rest."""
        if self.optimizer_kind == "muon":
            matrices, others = split_hidden(self.net)
            require(
                bool(matrices),
                f"--model.optimizer: muon is not allowed with this network ({type(self.net).__name__}), which has no "
                "matrix between hidden layers; give more layers (--model.network.layers), or adamw",
            )
            return ReplicaMuon(matrices, others, self.muon_lr, self.lr, weight_decay=self.weight_decay)
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=fused)

    @denormals_flushed()
    def training_step(self, block: Block | DrawnBlock, batch_idx: int) -> None:
        """Take every optimiser step of the block.

        Raises:
            NonFiniteError: a loss was not finite; names the first such step and the replicas' seeds.
        """
        require(
            hasattr(block, "start"),
            f"training data: a {type(block).__name__} is no block of steps; give a data module with ToyDataModule for "
            "its base, not a DataLoader",
        )
        direct = self.steps_directly
        optimizer: Any = self.optimizers(use_pl_optimizer=not direct)
        require(
            not isinstance(optimizer, list),
            f"{type(self).__name__}.configure_optimizers gives several optimisers; give one, of several groups, or "
            "take the steps in a training_step of your own",
        )
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        self.backward_by = "autograd"
        if direct and block.world_size == 1 and not self.compiles:
            by_hand = self.take_steps(block, optimizer)
            if by_hand is not None:
                self.backward_by = "written out"
                for _ in range(block.start, block.stop):  # what Lightning's wrapper counts
                    progress.increment_ready()
                    progress.increment_completed()
                self.finish_block(block, by_hand)
                return
        parameters = list(self.net.parameters())
        losses: list[Tensor] = []
        side: dict[int, dict[str, Tensor]] = {}
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        for step in range(block.start, block.stop):
            if self.lr_decay == "cosine":
                self.decay_rates(optimizer, step)
            loss = self.replica_losses(block.batch(step), step)
            losses.append(loss.detach().clone() if self.compiles else loss.detach())  # a graph writes over it
            if self.side_losses and every and (step + 1) % every == 0:
                side[step + 1] = {k: v.clone() for k, v in self.side_losses.items()}
            with self.without_autocast():
                if direct:
                    for p in parameters:
                        p.grad = None
                    loss.backward(torch.ones_like(loss))  # type: ignore[no-untyped-call]
                else:  # DDP averages gradients over ranks; the losses are shares of one sum
                    optimizer.zero_grad()
                    self.manual_backward(loss.sum() * block.world_size)
                if self.clip_grad_norm is not None:
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
                    decay = average_decay(self.ema_decay, step) if self.ema_warmup else self.ema_decay
                    torch._foreach_lerp_(averages, list[Tensor](parameters), 1 - decay)
        self.finish_block(block, torch.stack(losses), side)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Have the Trainer validate where it is due: intervals count optimiser steps."""
        set_validation(self.trainer, validation_due(self.trainer, batch.start))

    def compiled(self, f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return a part of the loss compiled where ``--model.compile`` asks for it, as a CUDA graph on a GPU."""
        if not self.compiles:
            return f
        if f.__name__ not in self.compiled_parts:
            self.compiled_parts[f.__name__] = compile_function(f, self.device.type == "cuda")
        out: Callable[Arguments, Result] = self.compiled_parts[f.__name__]
        return out

    def without_autocast(self) -> AbstractContextManager[Any]:
        """Return the context of backward and optimiser step, without the autocast that Lightning keeps on.

        Autocast is for the forward pass. Under it the second derivatives of a loss with gradients in it, and Muon's
        products, would be cast too.
        """
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def finish_block(
        self, block: Block | DrawnBlock, losses: Tensor, side: Mapping[int, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Check the block's losses (steps, R) and log those at multiples of ``log_every_n_steps``.

        Args:
            block: whose steps they are.
            losses: of every step.
            side: by a step that is logged, what :meth:`note_losses` was given there.
        """
        if block.world_size > 1:
            losses = self.trainer.strategy.reduce(losses, reduce_op="sum")
        losses = self.gather_replicas(losses, dim=1)
        if not torch.isfinite(losses).all():
            bad = ~torch.isfinite(losses)
            first = int(bad.any(1).nonzero()[0])
            self.refuse_non_finite("loss is", bad[first], block.start + first)
        self.last_losses = losses[-1]
        # what `self.log` and Lightning's own callbacks take for the x-axis: optimiser steps, not blocks
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = block.stop
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every:
            rows = []
            for step in range(-(-(block.start + 1) // every) * every, block.stop + 1, every):
                rows.append((step, {"train/loss": losses[step - 1 - block.start]}))
                if side and (noted := side.get(step)):
                    summed = {k: self.trainer.strategy.reduce(v, reduce_op="sum") if block.world_size > 1 else v
                              for k, v in noted.items()}  # fmt: skip
                    rows.append((step, {f"train/{k}": self.gather_replicas(v) for k, v in summed.items()}))
                if (rate := self.rate_at(step - 1)) is not None:
                    rows.append((step, {"train/lr": torch.tensor([rate])}))
            self.write_rows(rows)

    def check_finite_weights(self) -> None:
        """Raise :class:`NonFiniteError` if a weight is not finite, which the loss shows one step later only."""
        bad = torch.zeros(len(self.local_seeds), dtype=torch.bool, device=self.device)
        for p in self.net.parameters():
            bad |= ~torch.isfinite(p.detach()).flatten(1).all(1)
        bad = self.gather_replicas(bad)
        if bad.any():
            self.refuse_non_finite("weights are", bad, self.global_step)


def optimizers_in(made: Any) -> list[torch.optim.Optimizer]:
    """Return the optimisers in what ``configure_optimizers`` returns, in any of the forms that Lightning takes.

    Args:
        made: an optimiser, a dictionary with one, a list of either, or a pair of lists: optimisers and schedulers.

    >>> one = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    >>> forms = (one, [one], {"optimizer": one}, [{"optimizer": one, "lr_scheduler": None}], ([one], [None]), None)
    >>> [len(optimizers_in(form)) for form in forms]
    [1, 1, 1, 1, 1, 0]
    """
    if made is None:
        return []
    if isinstance(made, tuple | list):
        if len(made) == 2 and all(isinstance(part, list) for part in made):  # the second: schedulers
            made = made[0]
        return [optimizer for part in made for optimizer in optimizers_in(part)]
    found: torch.optim.Optimizer = made["optimizer"] if isinstance(made, dict) else made
    return [found]
