"""The Trainer's command line: flags over a checkpoint's settings over files, and the run folder that they name."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_toys.commands.experiments import import_all
from lightning_toys.commands.settings import class_paths, differences
from lightning_toys.commands.trainer.arguments import (
    check_configs,
    check_words,
    flags,
    settle_length,
    split_configs,
)
from lightning_toys.commands.trainer.classes import experiment_class
from lightning_toys.commands.trainer.own_classes import (
    check_class_paths,
    named_in_full,
    owners_named,
    renewed,
    without_replaced,
)
from lightning_toys.commands.trainer.parser import Refused, ToyParser
from lightning_toys.errors import NothingToTrainError, ToyError, is_disk_full, note, process_rank, run_folder_error
from lightning_toys.training.callbacks import RescueCheckpoint
from lightning_toys.training.checkpoint_format import malformed
from lightning_toys.training.ownership import Ownership, acquire
from lightning_toys.training.reporting import FigureWriter
from lightning_toys.training.run_folder import (
    RunFolder,
    check_name,
    check_root,
    find_or_begin,
    new_run,
    read_checkpoint,
    resolve_checkpoint,
)

ROOT = "lightning_logs"


class SettingsCLI(LightningCLI):
    """LightningCLI up to the settings: a run's folder, and checkpoints whose settings yield to flags."""

    run: RunFolder
    ownership: Ownership | None = None
    checkpoint_path: Path | None
    checkpoint: dict[str, Any] | None
    checkpoint_state: tuple[int, ...]  # which file it was read from
    standing: set[Path]  # of the run folder's root and the folders above, those that were there before

    def __init__(self, args: Sequence[str], dry: bool = False) -> None:
        self.words, self.dry = list(args), dry
        self.files, self.rest = split_configs(self.words[1:])
        given = check_configs(self.files)  # before the parser is built, which takes much longer
        ToyParser.files = {name: renewed(named_in_full(name, content)) for name, content in given.items()}
        on_the_line = flags(self.rest)
        check_words(on_the_line)
        check_class_paths(ToyParser.files, on_the_line)
        kept, self.dropped = without_replaced(ToyParser.files, on_the_line)
        texts = [f if kept[f] == given[f] else yaml.safe_dump(kept[f]) for f in self.files]
        self.stacked = [w for text in texts for w in ("-c", text)]
        self.checkpoint_path, self.checkpoint = None, None
        self.dumped: tuple[Namespace, Namespace, dict[str, Any]] | None = None  # of which configuration, and its values
        self.taken: list[tuple[str, Any, Any]] = []  # settings that the checkpoint has its way with
        import_all()  # a configuration may name the experiments' classes by their last names
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=False,  # every draw is keyed; nothing reads the global generators
            auto_configure_optimizers=False,
            parser_class=ToyParser,
            trainer_defaults={
                "devices": 1,  # more seeds on one device beat more devices; a multi-GPU machine has to be asked for
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
        parser.add_argument(
            "--run.takeover", type=bool, default=False, help="take the run's folder from the process that holds it"
        )
        parser.add_class_arguments(RescueCheckpoint, "checkpoint")
        parser.add_class_arguments(FigureWriter, "figures")

    # parsing

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse flags over the checkpoint's settings over the files, and choose the run folder."""
        verb, stacked = self.words[0], self.stacked
        rest = settle_length([*owners_named(ToyParser.files, flags(self.rest)), *self.rest])
        ToyParser.command = rest
        self.config = parse(parser, [verb, *stacked, *rest])
        settings = self.config[verb]
        refuse_unused(settings)
        kind, given = experiment_class(settings.model.class_path), settings.model.get("init_args")
        if verb == "fit" and not kind.trains:
            raise NothingToTrainError(f"fit: {kind.__name__} has nothing to train; give the verb test")
        where = self.place(settings)
        word = settings.get("ckpt_path")
        if word is None and verb != "fit" and not kind.stands_alone(given.as_dict() if given else {}):
            word = "last"
        # of the line alone: a run's own config.yaml names where it was made, which may not be where it lies
        asked = {k for k in ("root", "variant", "name") if f"--run.{k}" in flags(rest)}
        path: Path | None = None
        if word == "auto" and verb == "fit":
            path, self.run = find_or_begin(*where)
            self.config[verb].ckpt_path = None
        elif word is None:
            self.run = new_run(*where)
        else:
            path, self.run = resolve_checkpoint("last" if word == "auto" else word, *where, asked)
        if path is None:
            return
        elsewhere = self.run.path.resolve() not in path.resolve().parents
        taken = self.run.used if verb == "fit" else asked and any(self.run.checkpoints.glob("*.ckpt"))
        if elsewhere and taken and process_rank() == 0:  # the others may find it begun
            raise ToyError(f"--ckpt_path: {path} is not of {self.run.path}, which holds a run; give another --run.name")
        self.checkpoint_state = file_state(path)
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

    def own(self) -> None:
        """Become the owner of the run's folder, unless nothing will be written to it, or the first process owns it.

        Raises:
            ToyError: another process owns it, or it cannot be written to.
        """
        settings = self.config[self.words[0]]
        if self.dry or process_rank() > 0 or settings.trainer.fast_dev_run or self.ownership is not None:
            return
        try:
            self.ownership = acquire(self.run.path, takeover=settings.run.takeover)
        except OSError as error:
            if is_disk_full(error):
                raise run_folder_error(error, self.run.path) or error from None
            raise ToyError(f"--run.root: {self.run.path} cannot be written to ({error.strerror})") from None
        if self.checkpoint_path is not None and file_state(self.checkpoint_path) != self.checkpoint_state:
            raise ToyError(
                f"--ckpt_path: {self.checkpoint_path} was replaced since it was read; give the command again"
            )
        before = self.ownership.before
        if before.owner is not None and self.ownership.holds == 1:
            note(f"{self.run.path} was held by {before.who}, " + ("taken over" if before.held() else "which is gone"))

    def disown(self) -> None:
        """Leave the run's folder to whoever wants it."""
        if self.ownership is not None:
            self.ownership.release()
            self.ownership = None

    def place(self, settings: Namespace) -> tuple[Path, str, str, str | None]:
        """Return root, experiment, variant and name of the run, refused where they are no folders' names."""
        for flag in ("variant", "name"):
            value = settings.run[flag]
            if value is not None:
                check_name(f"--run.{flag}", value)
        root, variant, name = settings.run.root, settings.run.variant, settings.run.name
        given = flags(self.rest)
        if lies := self.run_of_config():  # where the run lies, which may not be where it was made
            root = root if "--run.root" in given else str(lies.root)
            variant = variant if "--run.variant" in given else lies.variant
            name = name if "--run.name" in given else lies.name
        check_root(root)
        self.standing = {p for p in (Path(root), *Path(root).parents) if p.exists()}
        variant = variant or (Path(self.files[0]).stem if self.files else "unnamed")
        check_name("--run.variant", variant)  # a file's name may be none for a folder
        return Path(root), experiment_class(settings.model.class_path).experiment_name(), variant, name

    def run_of_config(self) -> RunFolder | None:
        """Return the run whose own config.yaml is given; None where none is."""
        for file in self.files:
            run = ToyParser.files[file].get("run") or {}
            if run.get("name") and re.fullmatch(r"config(-\d+)?\.yaml", Path(file).name):
                place = Path(file).absolute().parent
                if len(place.parents) >= 3:
                    variant, experiment, root = list(place.parents)[:3]
                    return RunFolder(Path(os.path.relpath(root)), experiment.name, variant.name, place.name)
        return None

    def stored_settings(self, path: Path, checkpoint: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint's model and data sections, once it is whole and names no class that is not given here."""
        if why := malformed(checkpoint, self.words[0] == "fit"):
            raise ToyError(f"--ckpt_path: {path} is no whole checkpoint: {why}")
        held: dict[str, Any] = {k: renewed(checkpoint["toy"]["config"].get(k)) for k in ("model", "data")}
        made_by, wanted = held["model"]["class_path"], given["model"]["class_path"]
        if made_by != wanted:
            raise ToyError(f"--ckpt_path: {path} is a checkpoint of {made_by}, not of {wanted}")
        if missing := sorted(c for c in class_paths(held) - class_paths(given) if not c.startswith("lightning_toys.")):
            raise ToyError(f"--ckpt_path: {path} names the class {missing[0]}; if it is yours, give it here too")
        return held

    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would let the checkpoint's settings beat the flags here."""

    def dump(self, verb: str) -> dict[str, Any]:
        """Return the verb's configuration as plain values."""
        whole, section = self.config, self.config[verb]
        if self.dumped is None or self.dumped[0] is not whole or self.dumped[1] != section:  # four are asked for a run
            text = self._subcommand_parsers[verb].dump(section, skip_none=False, skip_validation=True)
            # libyaml's loader is ten times faster, and not in every PyYAML
            fast = yaml.__with_libyaml__
            values = yaml.load(text, Loader=yaml.CSafeLoader) if fast else yaml.load(text, Loader=yaml.SafeLoader)
            self.dumped = (whole, section.clone(), values)
        plain: dict[str, Any] = copy.deepcopy(self.dumped[2])
        return plain


def file_state(path: Path) -> tuple[int, ...]:
    """Return what tells a file from one that has taken its place."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def refuse_unused(settings: Namespace) -> None:
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
