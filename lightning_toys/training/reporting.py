"""Callbacks that tell of a run: its figures, its results."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_toys.errors import (
    WHOLE,
    OwnershipLostError,
    RunFolderError,
    bounded,
    check_settings,
    printable,
    run_folder_error,
)
from lightning_toys.training.files import make_folder, set_aside, write_atomic
from lightning_toys.training.metrics_csv import MetricsCSV
from lightning_toys.training.module import ToyModule
from lightning_toys.training.progress_bar import Progress
from lightning_toys.training.results import write_results
from lightning_toys.training.run_folder import RunFolder
from lightning_toys.training.scalar_rows import check_each_event


class Reporter(Callback):
    """Reports at the end of every verb, and in a script at the end of the Trainer's methods.

    Attributes:
        run: the command line's run; None in a script, where files go to the Trainer's folder.
        ends_fit: whether a validation stands for the end of a `fit` that was stopped before it.
    """

    run: RunFolder | None = None
    ends_fit = False

    def folder(self, module: ToyModule) -> Path:
        """Return the folder that files go to."""
        return self.run.path if self.run is not None else module.run_folder

    def report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report of ``pl_module.last_report``; ``stage`` is ``fit``, ``test`` or ``validate``."""
        raise NotImplementedError

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report of the last validation."""
        self.report(trainer, pl_module, "fit")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, under the verb `validate`."""
        if trainer.state.fn == "validate":
            self.report(trainer, pl_module, "fit" if self.ends_fit else "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report of the test's findings."""
        self.report(trainer, pl_module, "test")


SHOWING = (TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger)  # loggers that show pictures


def show(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Give a figure to a logger, where it shows pictures."""
    if isinstance(logger, TensorBoardLogger):
        check_each_event(logger)
        logger.experiment.add_figure(name, figure, step, close=False)
    elif isinstance(logger, WandbLogger):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # type: ignore[no-untyped-call]
        logger.log_image(name, [np.asarray(canvas.buffer_rgba())], step)  # type: ignore[no-untyped-call]
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}-{step}.png")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_figure(name, figure, step=step)


class FigureWriter(Reporter):
    """Draws the module's figures into figures/*.png, and shows them in TensorBoard (or W&B, MLflow, Comet).

    Args:
        every_n_validations: draw at every n-th validation within `fit`, besides the end; 0 for the end only.
        dpi: resolution of the PNG files.
        enabled: false draws nothing, which saves some seconds a run in a large sweep.

    Attributes:
        failure: what went wrong in drawing, on the command line, where the verb goes on without the picture and ends
            with an error; empty if nothing did. In a script an error is raised as it is.
    """

    def __init__(self, every_n_validations: int = 0, dpi: int = 150, enabled: bool = True) -> None:
        check_settings(FigureWriter, locals(), "--figures.")
        bounded("--figures.every_n_validations", every_n_validations, 0, WHOLE)
        bounded("--figures.dpi", dpi, 10, 2400)
        self.every_n_validations, self.dpi, self.enabled = every_n_validations, dpi, enabled
        self.count = 0
        self.failure = ""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw while training, where asked to."""
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.count += 1
        if self.every_n_validations and self.count % self.every_n_validations == 0:
            self.draw(trainer, pl_module, "train", to_disk=False)

    def report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Draw the end of `fit` with its training curves, and a test's findings."""
        if stage != "validate":
            self.draw(trainer, pl_module, stage)

    def draw(self, trainer: Trainer, pl_module: LightningModule, stage: str, to_disk: bool = True) -> None:
        """Draw every figure of the module that has something to show."""
        assert isinstance(pl_module, ToyModule)
        if not self.enabled or not trainer.is_global_zero:
            return
        if pl_module.last_report is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        step = pl_module.global_step or pl_module.loaded_step
        folder = self.folder(pl_module)
        figures: dict[str, Figure] = {}
        with self.held(pl_module, folder):
            figures |= pl_module.figures(folder)
        for name, figure in figures.items():
            drawn = io.BytesIO()
            with self.held(pl_module, folder):
                figure.savefig(drawn, dpi=self.dpi)
            if not drawn.getvalue():
                continue
            if to_disk:
                make_folder(folder / "figures")
                path = folder / "figures" / f"{name}.png"
                if not path.exists() or path.read_bytes() != drawn.getvalue():
                    set_aside(path)
                    write_atomic(path, drawn.getvalue())
            for logger in trainer.loggers:
                show(logger, f"{stage}/{name}", figure, step)

    @contextmanager
    def held(self, module: ToyModule, folder: Path) -> Iterator[None]:
        """Keep an error of drawing for the end of the verb: a picture costs no training, and no other picture.

        In a script it is raised; so is what says that the run's folder cannot be written to, or is another's.
        """
        try:
            yield
        except (OwnershipLostError, RunFolderError):
            raise
        except Exception as error:
            if self.run is None or (isinstance(error, OSError) and run_folder_error(error, folder)):
                raise
            self.failure = self.failure or f"figures of {type(module).__name__} failed{place_of(error, module)}"


def place_of(error: Exception, module: ToyModule) -> str:
    """Return the line of a module's own file that an error comes of, or else the innermost one, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(sys.modules.get(type(module).__module__), "__file__", None)
    place = next((f for f in reversed(frames) if f.filename == own), frames[-1])
    said = printable(" ".join(str(error).split()))[:160]
    return f" at {Path(place.filename).name}, line {place.lineno} ({type(error).__name__}{': ' if said else ''}{said})"


def write_hparams(
    logger: TensorBoardLogger, hparams: Mapping[str, Any], metrics: Mapping[str, float], name: str, step: int
) -> None:
    """Write a run's row of TensorBoard's page of hyper-parameters.

    Lightning's and torch's own writer also declares an "experiment", of which TensorBoard believes the first that it
    finds for all runs of the folder: then runs of another experiment have no columns, and no setting is known to
    differ. Without it TensorBoard collects the settings of all runs, and shows first those that differ.

    Args:
        logger: the run's.
        hparams: settings by name.
        metrics: values by name, which become scalars.
        name: of the row.
        step: optimiser step.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams as session

    logger.log_metrics(dict(metrics), step)
    logger.hparams.update(hparams)  # its hparams.yaml
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
    _, start, end = session(plain, dict(metrics))  # type: ignore[no-untyped-call]
    held = start.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(held.content)
    content.session_start_info.group_name = name
    held.content = content.SerializeToString()
    writer: Any = logger.experiment._get_file_writer()
    for summary in (start, end):
        writer.add_summary(summary, step)
    logger.experiment.flush()


def script_settings(trainer: Trainer, module: ToyModule) -> dict[str, Any]:
    """Return a script's settings as the command line's are stored: flat, plain values by flag without dashes."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    out: dict[str, Any] = {}
    for section, thing, given in (("model", module, dict(module.hparams)), ("data", data, vars(data))):
        out[section] = f"{type(thing).__module__}.{type(thing).__qualname__}"
        for name, value in given.items():
            if isinstance(value, bool | int | float | str | list | tuple) and not name.startswith(("_", "trainer")):
                out[f"{section}.{name}"] = value if isinstance(value, bool | int | float | str) else str(list(value))
            elif isinstance(value, Mapping) and section == "model":
                plain = {k: v for k, v in value.items() if isinstance(v, bool | int | float | str)}
                out |= {f"model.{name}.{k}": v for k, v in plain.items()}
    return out


class ResultsWriter(Reporter):
    """Writes results.json after `fit` and `test`, validation.json after `validate`, and loggers' hyper-parameters.

    TensorBoard's row of them wants the metrics beside them, and comes at the end; other loggers are told at the start.
    In a script ``Trainer(callbacks=[ResultsWriter()])`` makes the Trainer's folder a run that `compare` can read.
    """

    hparams: dict[str, Any]
    settings: dict[str, Any]

    def __init__(self) -> None:
        self.hparams, self.settings = {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the user's loggers the settings, now that nothing is refused any more."""
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger | MetricsCSV):
                logger.log_hyperparams(self.hparams)

    def session_name(self, module: ToyModule) -> str:
        """Return the name of TensorBoard's row of hyper-parameters: what tells runs apart comes first."""
        folder = self.folder(module)
        return f"{module.run_label} ({folder.parent.name}/{folder.name}, {module.experiment_name()})"

    def report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write results.json, and the HParams row once a verb."""
        assert isinstance(pl_module, ToyModule)
        report = pl_module.last_report
        if report is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        progress = next((c for c in trainer.callbacks if isinstance(c, Progress)), None)  # type: ignore[attr-defined]
        step = pl_module.global_step or pl_module.loaded_step
        extra = {
            "stage": stage,
            "label": pl_module.run_label,
            "settings": self.settings or script_settings(trainer, pl_module),
            "unused": sorted(flag.removeprefix("--") for flag in pl_module.unused_settings()),
            "module": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
            "comparison_figures": pl_module.comparison_figures,
            "headline": list(pl_module.headline),
            "question_settings": list(pl_module.question_settings),
            "error_metrics": list(pl_module.error_metrics),
            "metric_labels": dict(pl_module.metric_labels),
            "step": step,
            "seconds_per_step": progress.seconds_per_step if progress else None,
            "backward": pl_module.backward_by,
        }
        where = trainer.strategy.root_device  # at the end of `fit` the module is on the CPU already
        device = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
        folder = self.folder(pl_module)
        make_folder(folder)
        # a test's readouts stay where `compare` looks for them
        path: Path = folder / ("validation.json" if stage == "validate" else "results.json")
        variant = self.run.variant if self.run is not None else "script"
        write_results(path, report, pl_module.experiment_name(), variant, device, extra)
        if stage == "validate":
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and stage == "fit":
                write_hparams(logger, self.hparams, report.means(stage), self.session_name(pl_module), step)
