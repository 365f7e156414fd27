"""The Trainer's verbs: LightningCLI with run folders, checkpoints that yield to flags, and one-line errors."""

from __future__ import annotations

import atexit
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

# the experiments register their classes for short names
import lightning_toys.bilevel
import lightning_toys.flow_vs_regression
import lightning_toys.generative_policy
import lightning_toys.mirror_descent
import lightning_toys.update_entropy  # noqa: F401
from lightning_toys.arguments import (
    Refused,
    ToyParser,
    check_configs,
    check_words,
    explain,
    flags,
    settle_length,
    split_configs,
)
from lightning_toys.errors import (
    DiskFullError,
    NothingToTrainError,
    ToyError,
    is_disk_full,
    note,
    process_rank,
    require,
)
from lightning_toys.settings import (
    beyond_memory,
    class_paths,
    differences,
    experiment_class,
    experiment_of,
    flatten,
    largest,
    lasting,
    short,
)
from lightning_toys.stats import mean_ci, written
from lightning_toys.trainer_rules import callbacks_of, check_figures, check_trainer, tell
from lightning_toys.training.board import LayoutWriter
from lightning_toys.training.callbacks import RescueCheckpoint, ValidationClock
from lightning_toys.training.checkpoint_form import malformed
from lightning_toys.training.metrics_csv import MetricsCSV, read_run
from lightning_toys.training.monitors import MonitorCheck, monitoring
from lightning_toys.training.replica_parallel import ReplicaStrategy
from lightning_toys.training.reporting import FigureWriter, Progress, Reporter, ResultsWriter
from lightning_toys.training.results import Report, set_aside, write_atomic
from lightning_toys.training.results_form import results_step
from lightning_toys.training.run_folder import (
    RUN_VARIABLE,
    SWEEP_MARK,
    RunFolder,
    check_root,
    new_run,
    read_checkpoint,
    resolve_checkpoint,
)

ROOT = "lightning_logs"


class ToysCLI(LightningCLI):
    """LightningCLI with run folders, checkpoints that yield to flags, and one-line errors."""

    run: RunFolder
    checkpoint_path: Path | None
    checkpoint: dict[str, Any] | None
    standing: set[Path]  # of the run folder's root and the folders above, those that were there before

    def __init__(self, args: Sequence[str], dry: bool = False) -> None:
        self.words, self.dry = list(args), dry
        self.files, self.rest = split_configs(self.words[1:])
        ToyParser.files = check_configs(self.files)  # before the parser is built, which takes much longer
        check_words(flags(self.rest))
        self.checkpoint_path, self.checkpoint = None, None
        self.taken: list[tuple[str, Any, Any]] = []  # settings that the checkpoint has its way with
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=False,  # every draw is keyed; nothing reads the global generators
            auto_configure_optimizers=False,
            parser_class=ToyParser,
            trainer_defaults={
                "devices": 1,  # more seeds on one device beat more devices; a multi-GPU machine has to be asked for
                "enable_progress_bar": False,  # ours costs nothing and counts optimiser steps
                "enable_model_summary": False,
                "check_val_every_n_epoch": None,
                "val_check_interval": 1000,
                "log_every_n_steps": 100,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
            },
            args=list(args),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the verb that is run: parsers for all of Lightning's four would take as long again as the rest."""
        return {self.words[0]: LightningCLI.subcommands()[self.words[0]]}

    def _dump_config(self) -> None:
        """Keep the verb's settings for hyper-parameters; Lightning's own check all of them once more."""
        if not hasattr(self, "config_dump"):
            self.config_dump = self.dump(self.words[0])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder and the standing callbacks' settings."""
        parser.add_argument("--run.root", type=str, default=ROOT, help="folder of all runs")
        parser.add_argument("--run.variant", type=str | None, default=None, help="default: the first -c file's name")
        parser.add_argument("--run.name", type=str | None, default=None, help="default: version_0, version_1, ...")
        parser.add_class_arguments(RescueCheckpoint, "checkpoint")
        parser.add_class_arguments(FigureWriter, "figures")

    # parsing

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse flags over the checkpoint's settings over the files, and choose the run folder."""
        verb, configs = self.words[0], self.files
        rest = settle_length(self.rest)
        stacked = [w for c in configs for w in ("-c", c)]
        ToyParser.command = rest
        self.config = parse(parser, [verb, *stacked, *rest])
        settings = self.config[verb]
        refuse_idle(settings)
        kind, given = experiment_class(settings.model.class_path), settings.model.get("init_args")
        if verb == "fit" and not kind.trains:
            raise NothingToTrainError(f"fit: {kind.__name__} has nothing to train; give the verb test")
        where = self.place(settings)
        word = settings.get("ckpt_path")
        if word is None and verb != "fit" and not kind.stands_alone(given.as_dict() if given else {}):
            word = "last"
        if word is None:
            self.run = new_run(*where)
            return
        # of the line alone: a run's own config.yaml names where it was made, which may not be where it lies
        asked = {k for k in ("root", "variant", "name") if f"--run.{k}" in flags(rest)}
        path, self.run = resolve_checkpoint(word, *where, asked)
        elsewhere = self.run.path.resolve() not in path.resolve().parents
        taken = self.run.used if verb == "fit" else asked and any(self.run.checkpoints.glob("*.ckpt"))
        if elsewhere and taken and process_rank() == 0:  # the others may find it begun
            raise ToyError(f"--ckpt_path: {path} is not of {self.run.path}, which holds a run; give another --run.name")
        checkpoint: dict[str, Any] = read_checkpoint(path)
        before = self.dump(verb)
        stored = self.stored_settings(path, checkpoint, before)
        self.checkpoint_path, self.checkpoint = path, checkpoint
        ToyParser.files = {**ToyParser.files, str(path): stored}
        self.config = parse(parser, [verb, *stacked, "-c", yaml.safe_dump(stored), *rest])
        seeds, kept = self.config[verb].model.init_args.get("seeds"), checkpoint["toy"]["seeds"]
        if seeds is not None and list(seeds) != kept:
            raise ToyError(f"--model.seeds: {list(seeds)} is not allowed; {path} holds the replicas of seeds {kept}")
        # the seeds are what the checkpoint's replicas are
        self.taken = [x for x in differences(before, self.dump(verb)) if x[0] != "--model.seeds"]
        self.config[verb].ckpt_path = str(path)

    def place(self, settings: Namespace) -> tuple[Path, str, str, str | None]:
        """Return root, experiment, variant and name of the run, refused where they are no folders' names."""
        for flag in ("variant", "name"):
            value = settings.run[flag]
            if value is not None and (not value or set("/\0") & set(value) or value in (".", "..") or len(value) > 200):
                raise ToyError(f"--run.{flag}: {value!r} is not allowed; give a folder's name, without /")
        check_root(settings.run.root)
        root = Path(settings.run.root)
        self.standing = {p for p in (root, *root.parents) if p.exists()}
        variant = settings.run.variant or (Path(self.files[0]).stem if self.files else "unnamed")
        return root, experiment_of(settings.model.class_path), variant, settings.run.name

    def stored_settings(self, path: Path, checkpoint: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's model and data sections, once it is whole and names no class that is not given here."""
        if why := malformed(checkpoint, self.words[0] == "fit"):
            raise ToyError(f"--ckpt_path: {path} is no whole checkpoint: {why}")
        held: dict[str, Any] = {k: checkpoint["toy"]["config"].get(k) for k in ("model", "data")}
        made_by, wanted = held["model"]["class_path"], given["model"]["class_path"]
        if made_by != wanted:
            raise ToyError(f"--ckpt_path: {path} is a checkpoint of {made_by}, not of {wanted}")
        if strange := sorted(c for c in class_paths(held) - class_paths(given) if not c.startswith("lightning_toys.")):
            raise ToyError(f"--ckpt_path: {path} names the class {strange[0]}; if it is yours, give it here too")
        return held

    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would let the checkpoint's settings beat the flags here."""

    def dump(self, verb: str) -> dict[str, Any]:
        """Return the verb's configuration as plain values."""
        text = self._subcommand_parsers[verb].dump(self.config[verb], skip_none=False, skip_validation=True)
        plain: dict[str, Any] = yaml.safe_load(text)
        return plain

    # running

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with our callbacks and loggers beside the user's."""
        settings = self.config_init[self.subcommand]
        trainer: Namespace = settings.trainer
        rescue, figures, results = settings.checkpoint, settings.figures, ResultsWriter()
        for callback in (rescue, figures, results):
            callback.run = self.run
        self.model.config = lasting(self.dump(str(self.subcommand)))
        settings_shown = flatten(self.model.config)
        results.settings = settings_shown
        results.hparams = {k: short(v) for k, v in settings_shown.items() if v != "None" and ".test_" not in k}
        self.model.run_folder = self.run.path
        given = callbacks_of(trainer)
        if monitoring(given) and not trainer.num_sanity_val_steps:
            kwargs["num_sanity_val_steps"] = 1
        # figures read metrics.csv, and results note the speed: both come after what they look at
        first, last = (ValidationClock(), Progress()), (rescue, figures, results, LayoutWriter())
        kwargs["callbacks"] = [MonitorCheck(), *given, *first, *last]
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
        read_run(self.run.path)  # what a table is added to has to be one
        step = self.checkpoint["global_step"] if self.checkpoint is not None else None
        table = MetricsCSV(self.run.path, resume_step=step if self.subcommand == "fit" else None)
        if given is None or given is True:
            board = TensorBoardLogger(
                self.run.root,
                name=f"{self.run.experiment}/{self.run.variant}",
                version=self.run.name,
                default_hp_metric=False,
                purge_step=step + 1 if step is not None and self.subcommand == "fit" else None,
            )
            return [board, table]
        return [*given, table] if isinstance(given, list) else [given, table]

    def instantiate_classes(self) -> None:
        """Instantiate, then keep the configuration in the run folder: the first as config.yaml."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:  # jsonargparse's report of a check in a constructor
            parser = self._subcommand_parsers[self.words[0]]
            raise ToyError(explain(str(error), ToyParser.command, parser)) from None
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
        claimed = self.claim(bool(trainer.fast_dev_run))
        try:
            self.trainer = self.instantiate_trainer()
        except (MisconfigurationException, TypeError, ValueError) as error:
            if claimed:
                self.leave()
            raise ToyError(f"--trainer: {' '.join(str(error).split())}") from None
        if not self.dry:
            tell(trainer, self.model, str(self.subcommand), flags(self.rest))
        for key, now, was in self.taken:
            note(f"{key} is {now!r} as in the checkpoint, not {was!r} as in the configuration; a flag would win")

    def check_fit(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is of another network, or whose optimisers cannot go on."""
        net = self.model.build()
        resumes = self.subcommand == "fit"
        if why := self.model.misfit(checkpoint, net):
            asked = [w.split("=")[0] for w in ToyParser.command if w.startswith(("--model", "--data"))]
            blame = f"; asked for by {', '.join(asked)}" if asked else ""
            raise ToyError(f"--ckpt_path: {self.checkpoint_path} does not fit the network: {why}{blame}")
        if why := self.model.extras_misfit(checkpoint["toy"], int(checkpoint["global_step"]), resumes):
            raise ToyError(f"--ckpt_path: {self.checkpoint_path} cannot be used: toy.{why}")
        if resumes and (why := self.model.optimizers_misfit(checkpoint, net)):
            raise ToyError(f"--ckpt_path: {self.checkpoint_path} cannot be gone on with: {why}")

    def claim(self, fast_dev_run: bool) -> bool:
        """Make a new run's folder, so that a run started at the same moment takes the next number."""
        new = self.subcommand == "fit" and self.checkpoint_path is None
        if not new or self.dry or fast_dev_run or process_rank() > 0 or self.config.fit.run.name is not None:
            return False
        while True:
            try:
                self.run.path.mkdir(parents=True)
                return True
            except FileExistsError:
                self.run = new_run(self.run.root, self.run.experiment, self.run.variant, None)
            except OSError as error:
                raise ToyError(f"--run.root: {self.run.path} cannot be made ({error.strerror})") from None

    def keep_config(self) -> None:
        """Write config.yaml (on a resume with other settings: config-1.yaml, ...), and never over another."""
        text = yaml.safe_dump(self.dump(str(self.subcommand)), sort_keys=False)
        self.run.path.mkdir(parents=True, exist_ok=True)
        first = self.run.path / "config.yaml"
        if not first.exists():
            write_atomic(first, text)
        elif first.read_text() != text:
            k = 1
            while (other := first.with_name(f"config-{k}.yaml")).exists() and other.read_text() != text:
                k += 1
            if not other.exists():
                write_atomic(other, text)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Have Lightning read checkpoints as we do; its own default is torch's, which the environment can change."""
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb, unless only its input was to be checked."""
        if self.dry:
            return
        fresh = not self.run.used
        try:
            super()._run_subcommand(subcommand)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(f"no space left to write to {self.run.path}") from None
            raise
        except (ToyError, MemoryError, RuntimeError, ValueError) as error:
            why = beyond_memory(error)
            if not (why or isinstance(error, ToyError)):
                raise
            if fresh and self.trainer.global_step == 0 and self.trainer.is_global_zero:
                self.leave()
            if isinstance(error, ToyError):
                raise
            raise ToyError(f"{largest(flatten(self.dump(subcommand)))}: {why}; give smaller sizes") from None

    def leave(self) -> None:
        """Take away what this command put into a new run's folder, and the folders that were made for it."""
        for path in self.run.path.iterdir() if self.run.path.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != SWEEP_MARK:
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
        path.parent.mkdir(parents=True, exist_ok=True)
        set_aside(path)
        arrays: dict[str, Any] = {k: v.cpu().numpy() for k, v in found.items()}
        np.savez_compressed(path, **arrays, seeds=np.array(self.model.seeds))
        note(f"predictions are in {path}")


def refuse_idle(settings: Namespace) -> None:
    """Refuse flags of Lightning's verbs that would be unsafe or change nothing here."""
    if settings.get("weights_only") is False:
        raise ToyError("--weights_only: False is not allowed; checkpoints hold tensors and plain values alone")
    if settings.seed_everything is not None and settings.seed_everything is not False:
        raise ToyError(
            f"--seed_everything: {settings.seed_everything} is not allowed, it would change nothing: every "
            "draw is keyed; give --model.seeds"
        )
    if settings.get("return_predictions") is False:
        raise ToyError("--return_predictions: False is not allowed; predictions are what predict writes")


def parse(parser: LightningArgumentParser, words: list[str]) -> Namespace:
    """Parse a command line; an error is a ToyError."""
    try:
        return parser.parse_args(words)
    except Refused as refused:
        raise ToyError(str(refused.code)) from None


def summary(report: Report, names: Sequence[str]) -> str:
    """Return the headline metrics in one line."""
    words = [f"{n} {written(mean_ci(report.metrics[n]))}" for n in names if n in report.metrics]
    seeds = len(report.seeds)
    return f"{', '.join(words)} ({seeds} seed{'s' if seeds > 1 else ''}{'; ± half of the 95 % interval' * (seeds > 1)})"


def part_ranks() -> None:
    """Take the process group down before the process ends: gloo's threads, still running, can abort it on its way out.

    Lightning does so for NCCL alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_trainer(args: Sequence[str]) -> ToysCLI:
    """Run one of the Trainer's verbs; raises ToyError for input that is the user's to mend."""
    atexit.unregister(part_ranks)
    atexit.register(part_ranks)
    if process_rank() == 0:  # the others got it from the first
        os.environ.pop(RUN_VARIABLE, None)
    try:
        cli = ToysCLI(args)
    except MisconfigurationException as error:
        raise ToyError(" ".join(str(error).split())) from None
    finally:
        if process_rank() == 0:
            os.environ.pop(RUN_VARIABLE, None)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        if report := cli.model.last_report:
            note(summary(report, cli.model.headline))
        note(f"run folder: {cli.run.path}")
    return cli
