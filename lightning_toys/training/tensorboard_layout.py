"""TensorBoard's page of custom scalars: every curve with the band of its interval, and with one line a replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_toys.training.module import ToyModule
from lightning_toys.training.results import is_main

Layout = dict[str, dict[str, tuple[str, list[str]]]]


def layout_of(names: Mapping[str, bool], seeds: Sequence[int]) -> Layout:
    """Return the page's charts: the configured readout's, not those of single modes, levels or dimensions.

    Args:
        names: of scalars that are logged with their interval and their replicas; whether that is of a geometric mean.
        seeds: the replicas'.
    """

    def margin(name: str) -> tuple[str, list[str]]:
        mean = f"interval/{name}/geometric_mean" if names[name] else name
        return "Margin", [mean, f"interval/{name}/lo", f"interval/{name}/hi"]

    ordered = sorted((n for n in names if is_main(n) and not n.startswith("modes/")), key=lambda n: n.split("/")[0])
    return {
        f"mean and 95 % interval over {len(seeds)} seeds": {n: margin(n) for n in ordered},
        "seed by seed": {n: ("Multiline", [rf"replicas/{n}/seed_\d+$"]) for n in ordered},
    }


class TensorBoardLayout(Callback):
    """Writes the page's layout after the first validation, and again where more is logged at the end."""

    def __init__(self) -> None:
        self.written: dict[str, bool] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout once the metrics have their names."""
        if not trainer.sanity_checking and not self.written:
            self.write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout anew if more names have come."""
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout into every TensorBoard logger."""
        assert isinstance(pl_module, ToyModule)
        names = pl_module.interval_names
        if not trainer.is_global_zero or len(names) == len(self.written):
            return
        self.written = dict(names)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout_of(self.written, pl_module.seeds))
