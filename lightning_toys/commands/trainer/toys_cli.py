"""The Trainer's verbs: LightningCLI with run folders, checkpoints that yield to flags, and one-line errors."""

from __future__ import annotations

import atexit
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_toys.commands.settings import flatten, reproducible_settings, short_name
from lightning_toys.commands.trainer.arguments import flags
from lightning_toys.commands.trainer.memory import beyond_memory, check_numbers, largest
from lightning_toys.commands.trainer.parser import ToyParser, explain
from lightning_toys.commands.trainer.rules import callbacks_of, check_figures, check_trainer, note_unused
from lightning_toys.commands.trainer.settings import SettingsCLI
from lightning_toys.commands.trainer.surroundings import (
    keep_in_run_folder,
    more_callbacks,
    summarises,
    without_writers_traces,
)
from lightning_toys.errors import FiguresError, ToyError, note, process_rank, require, run_folder_error
from lightning_toys.training.checkpoint_format import malformed_optimizers
from lightning_toys.training.files import make_folder, set_aside, whole_file, write_beside
from lightning_toys.training.metrics_csv import MetricsCSV
from lightning_toys.training.metrics_reader import read_run
from lightning_toys.training.monitors import HOLDOUT, MonitorCheck, monitoring
from lightning_toys.training.ownership import OWNER, check_owned
from lightning_toys.training.progress_bar import Progress
from lightning_toys.training.replica_parallel import ReplicaStrategy
from lightning_toys.training.reporting import FigureWriter, Reporter, ResultsWriter
from lightning_toys.training.results_format import results_step
from lightning_toys.training.run_folder import RUN_VARIABLE, clear_cut_off, is_beside, new_run, was_cut_off
from lightning_toys.training.tensorboard_layout import TensorBoardLayout
from lightning_toys.training.train_log import TrainLog, heard_by, summary


class ToysCLI(SettingsCLI):
    """LightningCLI with run folders, checkpoints that yield to flags, and one-line errors.

    As LightningCLI's, the constructor runs the verb.
    """

    def __init__(self, args: Sequence[str], dry: bool = False) -> None:
        self.ownership, self.log = None, TrainLog(args)
        try:
            with heard_by(self.log.hear):
                super().__init__(args, dry)
        finally:
            self.disown()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with our callbacks and loggers beside the user's."""
        settings = self.config_init[self.subcommand]
        trainer: Namespace = settings.trainer
        rescue, figures, results = settings.checkpoint, settings.figures, ResultsWriter()
        for callback in (rescue, figures, results, self.log):
            callback.run = self.run
        self.model.config = reproducible_settings(self.dump(str(self.subcommand)))
        settings_shown = flatten(self.model.config)
        results.settings = settings_shown
        results.hparams = {k: short_name(v) for k, v in settings_shown.items() if v != "None" and ".test_" not in k}
        self.model.run_path = self.run.path
        given = callbacks_of(trainer)
        watches = monitoring(given) or self.model.best_metric != HOLDOUT
        if watches and not trainer.num_sanity_val_steps:  # a name that is not measured is refused before training
            kwargs["num_sanity_val_steps"] = 1
        # figures read metrics.csv, and results note the speed: both come after what they look at. Results come before
        # figures, which may be somebody's own code: what was trained is written down whatever becomes of its pictures
        progress = Progress(shown=trainer.enable_progress_bar is not False)
        kwargs["enable_progress_bar"] = False  # Lightning's own counts batches, each of many steps
        ours = [progress, rescue, results, figures, TensorBoardLayout(), self.log]
        kwargs["callbacks"] = [MonitorCheck(), *given, *ours, *more_callbacks.get()]
        kwargs["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in given)
        kwargs["default_root_dir"] = str(self.run.path)
        kwargs["logger"] = self.loggers(trainer.logger)
        if self.subcommand == "fit" and self.checkpoint_path is None and not self.dry:
            os.environ[RUN_VARIABLE] = self.run.name  # for the child processes that a strategy may start
        if self.strategy is not None:
            kwargs["strategy"] = self.strategy
        return self.trainer_class(**{**trainer, **kwargs})

    def replica_strategy(self, trainer: Namespace) -> Any:
        """Return the strategy that shares replicas out, or the given one where there is one process only."""
        require(
            trainer.strategy in ("auto", "ddp"),
            f"--trainer.strategy: {trainer.strategy!r} is not allowed with --model.parallel replicas; give auto or ddp",
        )
        processes = self.trainer_class(**{**trainer, "logger": False, "enable_checkpointing": False}).world_size
        require(
            processes <= len(self.model.seeds),
            f"--model.parallel: replicas is not allowed with {len(self.model.seeds)} of --model.seeds on {processes} "
            "processes; give a seed for each, or fewer devices",
        )
        return ReplicaStrategy() if processes > 1 else trainer.strategy

    def loggers(self, given: Any) -> Any:
        """Return TensorBoard and metrics.csv where the user says nothing; the user's and metrics.csv else."""
        if given is False:
            return False
        step = self.checkpoint["global_step"] if self.checkpoint is not None else None
        table = MetricsCSV(self.run.path, resume_step=step if self.subcommand == "fit" else None)
        if given is None or given is True:
            hparams = self.run.path / TensorBoardLogger.NAME_HPARAMS_FILE
            if os.path.lexists(hparams) and not hparams.is_file():  # Lightning would wait for a FIFO's reader
                set_aside(hparams)
            board = TensorBoardLogger(
                self.run.root,
                name=f"{self.run.experiment}/{self.run.variant}",
                version=self.run.name,
                default_hp_metric=False,
                purge_step=step + 1 if step is not None and self.subcommand == "fit" else None,
            )
            return [board, table]
        loggers = [*given] if isinstance(given, list) else [given]
        writes = not self.dry and not self.config_init[self.subcommand].trainer.fast_dev_run
        for logger in loggers:
            if isinstance(logger, WandbLogger) and writes:
                keep_in_run_folder(logger, self.run.path)
        return [*loggers, table]

    def instantiate_classes(self) -> None:
        """Instantiate, then keep the configuration in the run folder: the first as config.yaml."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:  # jsonargparse's report of a check in a constructor
            parser = self._subcommand_parsers[self.words[0]]
            raise ToyError(explain(str(error), ToyParser.command, parser)) from None
        except (OverflowError, MemoryError, RuntimeError) as error:
            raise self.too_large(error, str(self.subcommand)) from None
        check_numbers(self.dump(str(self.subcommand)))
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.model.sizes = self.model.measure(self.datamodule)
        if self.checkpoint is not None:
            self.check_fit(self.checkpoint)
        trainer = self.config_init[self.subcommand].trainer
        if self.subcommand == "predict" and type(self.model).predict_step is LightningModule.predict_step:
            raise ToyError(f"predict: {type(self.model).__name__} has no predictions to write; give the verb test")
        check_trainer(trainer, self.model, self.datamodule, str(self.subcommand))
        if self.subcommand == "fit":
            check_figures(self.config_init.fit.figures, trainer.logger)
        self.strategy = self.replica_strategy(trainer) if self.model.parallel == "replicas" else None
        if trainer.logger is not False and not was_cut_off(self.run.path):
            read_run(self.run.path)  # what a table is added to has to be one
        self.claim(bool(trainer.fast_dev_run))
        try:
            self.trainer = self.instantiate_trainer()
        except (MisconfigurationException, TypeError, ValueError, ImportError, RuntimeError) as error:
            raise ToyError(f"--trainer: {' '.join(str(error).split())}") from None
        if not self.dry:
            note_unused(trainer, self.model, str(self.subcommand), flags(self.rest))
            for line in self.dropped:
                note(line)
        for key, now, was in self.taken:
            note(f"{key} is {now!r} as in the checkpoint, not {was!r} as in the configuration; a flag would win")

    def check_fit(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is of another network, or whose optimisers cannot go on."""
        net = self.model.build()
        resumes = self.subcommand == "fit"
        if why := self.model.network_mismatch(checkpoint, net):
            asked = [w.split("=")[0] for w in ToyParser.command if w.startswith(("--model", "--data"))]
            blame = f"; asked for by {', '.join(asked)}" if asked else ""
            raise ToyError(f"--ckpt_path: {self.checkpoint_path} does not fit the network: {why}{blame}")
        if why := self.model.extras_mismatch(checkpoint["toy"], int(checkpoint["global_step"]), resumes):
            raise ToyError(f"--ckpt_path: {self.checkpoint_path} cannot be used: toy.{why}")
        reads = resumes or (self.subcommand == "test" and self.model.tests_optimizer)
        if reads and (why := malformed_optimizers(checkpoint) or self.model.optimizer_mismatch(checkpoint, net)):
            what = "gone on with" if resumes else "used"
            raise ToyError(f"--ckpt_path: {self.checkpoint_path} cannot be {what}: {why}")

    def claim(self, fast_dev_run: bool) -> None:
        """Own the run's folder. A new one is made, so that a run started at the same moment takes the next number."""
        if self.dry or fast_dev_run or process_rank() > 0:
            return
        begins = self.checkpoint_path is None
        numbered = begins and not was_cut_off(self.run.path) and self.config[self.subcommand].run.name is None
        while numbered:
            try:
                self.run.path.mkdir(parents=True)
                break
            except FileExistsError:
                self.run = new_run(self.run.root, self.run.experiment, self.run.variant, None)
            except OSError as error:
                raise ToyError(f"--run.root: {self.run.path} cannot be made ({error.strerror})") from None
        self.own()
        if begins and self.subcommand == "fit" and self.run.used:
            if not was_cut_off(self.run.path):  # since we looked
                raise ToyError(
                    f"--run.name: {self.run.name!r} is taken: {self.run.path} holds a run; give another name"
                )
            aside = clear_cut_off(self.run.path)
            note(f"begun again: an earlier start ended before its first checkpoint; what it left is in {aside}")

    def disown(self) -> None:
        """Leave the run's folder to whoever wants it; where nothing came of it, not even the folder is left."""
        mine = self.ownership  # a sweep that runs it as a cell holds it too, and goes on
        empty = mine is not None and mine.holds == 1 and mine.before.number < 0 and not self.run.used
        super().disown()
        if empty and self.run.path.is_dir():
            self.leave()

    def keep_config(self) -> None:
        """Write config.yaml (on a resume with other settings: config-1.yaml, ...), and never over another."""
        settings = self.dump(str(self.subcommand))
        # so that this file, given again, means this run
        settings["run"] = {"root": str(self.run.root), "variant": self.run.variant, "name": self.run.name}
        text = yaml.safe_dump(settings, sort_keys=False)
        make_folder(self.run.path)
        write_beside(self.run.path / "config.yaml", text)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Have Lightning read checkpoints as we do; its own default is torch's, which the environment can change."""
        kwargs = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        if "verbose" in kwargs and "--verbose" not in flags(self.rest):
            kwargs["verbose"] = False  # Lightning's table of means; the summary below has the intervals
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb, unless only its input was to be checked."""
        if self.dry:
            return
        fresh = not self.run.used
        try:
            with without_writers_traces():
                super()._run_subcommand(subcommand)
        except OSError as raised:
            fault: OSError = raised
            try:
                check_owned(self.run.path)  # an owner that lost the run may find its files gone
            except OSError as gone:
                fault = gone
            raise run_folder_error(fault, self.run.path) or fault from None
        except Exception as error:
            # Lightning's logger tells of a full disk as of a value that it does not support
            if isinstance(cause := error.__cause__, OSError) and (told := run_folder_error(cause, self.run.path)):
                raise told from None
            if type(error).__module__.startswith("wandb."):
                why = " ".join(str(error).split())[:160]
                raise ToyError(f"--trainer.logger: W&B says: {why} (WANDB_MODE=offline keeps runs here)") from None
            if not isinstance(error, ToyError | MemoryError | RuntimeError | ValueError | OverflowError):
                raise
            found = error if isinstance(error, ToyError) else self.too_large(error, subcommand)
            if fresh and self.trainer.global_step == 0 and self.trainer.is_global_zero:
                self.leave()
            raise found from None

    def too_large(self, error: Exception, verb: str) -> ToyError:
        """Return what to say of an error that means sizes beyond what memory or 64 bits hold; raise any other again."""
        settings = self.dump(verb)
        if isinstance(error, OverflowError):
            check_numbers(settings)
        why = beyond_memory(error)
        if not why:
            raise error
        return ToyError(f"{largest(flatten(settings))}: {why}; give smaller sizes")

    def leave(self) -> None:
        """Take away what this command put into a new run's folder, and the folders that were made for it."""
        for path in self.run.path.iterdir() if self.run.path.is_dir() else ():
            if is_beside(path.name) and path.name != OWNER:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder = self.run.path
        with suppress(OSError):  # until one is not empty
            while folder not in self.standing:
                folder.rmdir()
                folder = folder.parent

    def before_fit(self) -> None:
        """Keep the configuration once everything has been built without complaint."""
        if process_rank() == 0 and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.keep_config()

    def before_test(self) -> None:
        """Keep the configuration of a run that is not trained."""
        if self.checkpoint is None and process_rank() == 0 and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.keep_config()

    def after_fit(self) -> None:
        """Say so where a resumed run had nothing left to train, and make up for results that it was stopped before."""
        step = self.trainer.global_step
        if self.checkpoint is None or step > self.checkpoint["global_step"]:
            return
        note(f"nothing was trained: the checkpoint is at step {step}, and no more are asked for")
        last, found = self.run.checkpoints / "last.ckpt", results_step(self.run.path)
        newest = self.checkpoint_path is not None and self.checkpoint_path.resolve() == last.resolve()
        late = newest and (found is None or found < step) and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.trainer.strategy.broadcast(late):  # ranks may see different states of a folder, and must not part
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Reporter):
                    callback.ends_fit = True
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def predict(self, **kwargs: Any) -> None:
        """Write predictions.npz (c, truth, prediction by replica and draw) into the run folder."""
        batches: Any = self.trainer.predict(**kwargs)
        if not batches or not self.trainer.is_global_zero:
            return
        found: dict[str, torch.Tensor] = batches[0]
        path = self.run.path / "predictions.npz"
        make_folder(path.parent)
        arrays: dict[str, Any] = {k: v.cpu().numpy() for k, v in found.items()}
        set_aside(path)
        with whole_file(path) as f:
            np.savez_compressed(f, **arrays, seeds=np.array(self.model.seeds))
        note(f"predictions are in {path}")


def tell_trial(cli: ToysCLI, verb: str) -> None:
    """Say what a run of ``--trainer.fast_dev_run`` has tried."""
    steps = cli.trainer.global_step
    did = f"{steps} optimiser step{'s' * (steps != 1)} and a validation" if verb == "fit" else f"one pass of {verb}"
    note(f"--trainer.fast_dev_run: {did} went through; nothing was written")


def note_environment() -> None:
    """Say so where somebody sets flags by LightningCLI's environment variables, which are not read."""
    pattern = re.compile(r"PL_(CONFIG|(FIT|VALIDATE|TEST|PREDICT)__\w+)")
    if found := sorted(name for name in os.environ if pattern.fullmatch(name)):
        note(f"{', '.join(found)}: not read; a setting is a flag, or stands in a configuration")


def part_ranks() -> None:
    """Take the process group down before the process ends: gloo's threads, still running, can abort it on its way out.

    Lightning does so for NCCL alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_trainer(args: Sequence[str]) -> ToysCLI:
    """Run one of the Trainer's verbs.

    Raises:
        ToyError: input is the user's to mend.
        FiguresError: everything was done but figures, that could not be drawn.
    """
    atexit.unregister(part_ranks)
    atexit.register(part_ranks)
    if process_rank() == 0:  # the others got it from the first
        os.environ.pop(RUN_VARIABLE, None)
    note_environment()
    try:
        cli = ToysCLI(args)
    except MisconfigurationException as error:
        raise ToyError(" ".join(str(error).split())) from None
    finally:
        if process_rank() == 0:
            os.environ.pop(RUN_VARIABLE, None)
    if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        tell_trial(cli, args[0])
    elif cli.trainer.is_global_zero and summarises.get():
        if report := cli.model.last_report:
            note(summary(report, cli.model))
        note(f"run folder: {cli.run.path}")
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FigureWriter) and callback.failure:
            raise FiguresError(f"{callback.failure}; all else that the run should write is in {cli.run.path}")
    return cli
