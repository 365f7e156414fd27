"""Ending a search's hopeless trials early: a callback that reports each validation and stops where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_toys.commands.trainer.surroundings import with_callbacks
from lightning_toys.errors import ToyError
from lightning_toys.training.module import ToyModule

Pruner = Callable[[int, float], bool]  # (optimiser step, metric) -> whether the trial is to stop


class PrunedError(Exception):
    """A trial is not worth going on with; its checkpoint is written."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(f"pruned at step {step}")
        self.step, self.value = step, value


class PruneCallback(Callback):
    """Reports the metric's mean over replicas after each validation within `fit`.

    Args:
        pruner: is told, and says whether to stop.
        metric: of the module's report.
    """

    def __init__(self, pruner: Pruner, metric: str) -> None:
        self.pruner, self.metric = pruner, metric

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and stop where told to; after the last step there is nothing to stop."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, ToyModule)
        found = pl_module.last_report.metrics if pl_module.last_report else {}
        if self.metric not in found:
            raise ToyError(
                f"--search.pruner: validations have no {self.metric!r} to judge by, but {', '.join(found)}; give none, "
                "or another --search.metric"
            )
        value = sum(found[self.metric]) / len(found[self.metric])
        if self.pruner(trainer.global_step, value) and trainer.global_step < trainer.max_steps:
            raise PrunedError(trainer.global_step, value)


def pruning(pruner: Pruner, metric: str) -> AbstractContextManager[None]:
    """Have a `fit` of the command line ask a pruner."""
    return with_callbacks(PruneCallback(pruner, metric))
