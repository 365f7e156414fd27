"""What callbacks that monitor a metric may monitor, looked at before training."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_toys.errors import ToyError, did_you_mean
from lightning_toys.training.module import ToyModule


class MonitorCheck(Callback):
    """Refuses a monitored metric that is not measured: Lightning would notice at the first validation of the training.

    It looks after the sanity check, Lightning's validation before the first step.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at every callback that monitors something.

        Raises:
            ToyError: names the callback and what there is.
        """
        assert isinstance(pl_module, ToyModule)
        pl_module.last_report = None  # of weights that nobody trained
        known = sorted(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in known:
                raise ToyError(
                    f"--trainer.callbacks.monitor: {monitor!r} of {type(callback).__name__} is not measured; "
                    f"give one of {', '.join(known)}{did_you_mean(str(monitor), known)}"
                )
