"""What callbacks that monitor a metric may monitor, looked at before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_toys.errors import ToyError, did_you_mean

HOLDOUT = "holdout/l2"  # the error on held-out training points, which only some data have


def monitoring(callbacks: Sequence[Callback]) -> list[Any]:
    """Return the callbacks that monitor a metric."""
    return [c for c in callbacks if getattr(c, "monitor", None) is not None]


class MonitorCheck(Callback):
    """Refuses a monitored metric that is not measured: Lightning would trace back at the first validation.

    It looks after the sanity check, Lightning's validation before the first step; a resumed run has none, and is looked
    at in its first validation.
    """

    def __init__(self) -> None:
        self.checked = False

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before training.

        Raises:
            ToyError: names the callback and what there is.
        """
        module: Any = pl_module
        module.last_report = None  # of weights that nobody trained
        self.check(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look where nobody has yet."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self.checked:
            self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at every callback that monitors something and insists on it, and at what the best checkpoint is by."""
        module: Any = pl_module
        self.checked = True
        later = {f"eval/{n}" for n in module.measured_later}
        known = sorted({*trainer.callback_metrics, *later, *(["train/loss"] if module.monitors_loss else [])})
        for callback in monitoring(trainer.callbacks):  # type: ignore[attr-defined]
            if callback.monitor not in known and getattr(callback, "strict", True):
                raise ToyError(
                    f"--trainer.callbacks.monitor: {callback.monitor!r} of {type(callback).__name__} is not measured; "
                    f"give one of {', '.join(known)}{did_you_mean(str(callback.monitor), known)}"
                )
        best = module.best_metric
        if best not in ("", HOLDOUT, *known):
            raise ToyError(
                f"{type(module).__name__}.best_metric: {best!r} is not measured; give one of {', '.join(known)}"
                f"{did_you_mean(best, known)}"
            )
