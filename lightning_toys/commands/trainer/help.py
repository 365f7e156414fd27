"""What ``fit --help`` and its like print: every flag that the verb takes, in groups; without importing anything heavy.

tests/commands/trainer/test_help.py checks the list against the parser: a flag that is refused is not in it, and none
that is taken is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_toys.commands.shipped import shipped
from lightning_toys.errors import ToyError

SAYS = {
    "fit": "train an experiment; with --ckpt_path last go on where a run stopped",
    "validate": "score a checkpoint as training does, and write validation.json",
    "test": "score a checkpoint by everything that the experiment measures, and write results.json",
    "predict": "write a checkpoint's predictions to predictions.npz",
}


@dataclass(frozen=True)
class Flag:
    """A flag.

    Attributes:
        name: with its dashes.
        value: what it takes, in a word.
        text: what it does, in a line.
        verbs: for which it has a use; all, unless said.
    """

    name: str
    value: str
    text: str
    verbs: Sequence[str] = ("fit", "validate", "test", "predict")


FIT = ("fit",)
GROUPS: dict[str, tuple[Flag, ...]] = {
    "the experiment": (
        Flag("-c, --config", "FILE", "configuration: a file or a shipped name; several are stacked, flags beat files"),
        Flag("--model", "CLASS", "the experiment, with its settings as --model.SETTING VALUE"),
        Flag("--data", "CLASS", "its data, with their settings as --data.SETTING VALUE"),
        Flag("--model.help", "CLASS", "list an experiment's settings; --data.help CLASS its data's"),
        Flag("--print_config", "", "print the whole configuration and stop"),
        Flag("--help", "", "print this and stop; with -c FILE the settings of its classes too"),
    ),
    "the run's folder, root/experiment/variant/name": (
        Flag("--run.root", "DIR", "folder of all runs (lightning_logs)"),
        Flag("--run.variant", "NAME", "default: the first configuration's name"),
        Flag("--run.name", "NAME", "default: version_0, version_1, ..."),
        Flag("--ckpt_path", "WORD", "last, best (of the newest run, or --run.name), a path, or auto: start, or go on"),
        Flag("--checkpoint.every_n_steps", "N", "steps between writes of last.ckpt; 0: at the end only (1000)", FIT),
        Flag("--checkpoint.keep", "N", "older ones kept beside last.ckpt, as step-00000400.ckpt (0)", FIT),
        Flag("--run.takeover", "BOOL", "take the folder from a process that holds it; that one writes no more (false)"),
        Flag("--figures.enabled", "BOOL", "draw figures/*.png (true)"),
        Flag("--figures.dpi", "N", "their resolution (150)"),
        Flag("--figures.every_n_validations", "N", "while training too, for TensorBoard; 0: at the end only (0)", FIT),
    ),
    "how long, and how often it is measured": (
        Flag("--trainer.max_steps", "N", "optimiser steps", FIT),
        Flag("--trainer.max_epochs", "N", "passes over the training points; a flag frees the other one of a file", FIT),
        Flag("--trainer.min_steps", "N", "no callback stops before", FIT),
        Flag("--trainer.max_time", "DD:HH:MM:SS", "stop after this time", FIT),
        Flag("--trainer.val_check_interval", "N", "optimiser steps between validations (1000); the last always", FIT),
        Flag("--trainer.limit_val_batches", "N", "0: never validate", FIT),
        Flag("--trainer.num_sanity_val_steps", "N", "1: validate once before the first step (0)", FIT),
        Flag("--trainer.log_every_n_steps", "N", "optimiser steps between two logged losses (100)", FIT),
        Flag("--trainer.fast_dev_run", "BOOL", "a trial of one block of steps and one validation; writes nothing"),
    ),
    "devices and precision": (
        Flag("--trainer.accelerator", "NAME", "cpu, gpu, mps or auto (auto)"),
        Flag("--trainer.devices", "N", "how many, or which: '[0, 1]' (1)"),
        Flag("--trainer.num_nodes", "N", "machines, under torchrun or SLURM (1)"),
        Flag("--trainer.strategy", "NAME", "auto, ddp, ddp_fork, ... (auto)"),
        Flag(
            "--trainer.precision",
            "NAME",
            "32-true, 64-true, bf16-mixed, ...; an experiment names those that it allows (32-true)",
        ),
        Flag("--trainer.plugins", "CLASS", "Lightning's plugins"),
        Flag("--trainer.sync_batchnorm", "BOOL", "Lightning's; the shipped networks have no batch norm (false)"),
    ),
    "logging and callbacks": (
        Flag("--trainer.logger", "CLASS", "TensorBoardLogger (default), WandbLogger, MLFlowLogger, ...; false: none"),
        Flag("--trainer.callbacks", "CLASS", "EarlyStopping, ModelCheckpoint, Timer, ... with their settings"),
        Flag("--trainer.enable_progress_bar", "BOOL", "the bar of optimiser steps, or a line now and then (true)"),
        Flag("--trainer.enable_model_summary", "BOOL", "print the parameters (false)"),
        Flag("--trainer.enable_autolog_hparams", "BOOL", "Lightning's own log of hyper-parameters (true)"),
        Flag("--trainer.model_registry", "NAME", "of Lightning's platform"),
        Flag("--trainer.profiler", "NAME", "simple, advanced, pytorch"),
    ),
    "finding errors": (
        Flag("--trainer.detect_anomaly", "BOOL", "torch's anomaly detection (false)"),
        Flag("--trainer.deterministic", "BOOL", "torch's deterministic algorithms (false)"),
        Flag("--trainer.benchmark", "BOOL", "cuDNN's benchmark mode"),
        Flag("--trainer.inference_mode", "BOOL", "evaluate under inference_mode (true)"),
    ),
}


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether a verb's help is asked for."""
    return bool({"-h", "--help"} & set(args))


def trainer_help(verb: str) -> str:
    """Return the help of fit, validate, test or predict."""
    lines = [f"usage: lightning-toys {verb} -c EXPERIMENT/VARIANT [--flag value ...]", "", f"  {SAYS[verb]}"]
    for title, group in GROUPS.items():
        shown = [f for f in group if verb in f.verbs]
        if shown:
            lines += ["", f"{title}:"]
            lines += [f"  {f'{f.name} {f.value}'.strip():38}  {f.text}" for f in shown]
    lines += ["", f"experiments: {', '.join(class_names('model'))}", f"data: {', '.join(class_names('data'))}"]
    lines += ["any class of your own too, by MODULE.CLASS; a class given to a flag has its own help: --FLAG.help CLASS"]
    return "\n".join(lines)


def class_names(section: str) -> list[str]:
    """Return the classes that the shipped configurations name for the model, or for the data."""
    pattern = re.compile(rf"^{section}:\n  class_path: (\S+)$", re.MULTILINE)  # reading YAML takes ten times as long
    found = [pattern.search(s.path.read_text(encoding="utf-8")) for s in shipped()]
    return sorted({m[1].rpartition(".")[2] for m in found if m})


def named_classes(args: Sequence[str]) -> dict[str, str]:
    """Return the classes of model and data that a command line chooses, by flag or by its configurations.

    Raises:
        ToyError: a configuration is not there, or is none.
    """
    from lightning_toys.commands.trainer.arguments import check_configs, flags, split_configs

    configs, rest = split_configs(args)
    found: dict[str, str] = {}
    for content in check_configs(configs).values():
        for section in ("model", "data"):
            node = content.get(section)
            name = node.get("class_path") if isinstance(node, dict) else node
            found |= {section: name} if isinstance(name, str) else {}
    given = flags(rest)
    return found | {s: v for s in ("model", "data") if (v := given.get(f"--{s}"))}


def check_class_help(args: Sequence[str]) -> None:
    """Refuse ``--model.help`` and ``--data.help`` without a class, which jsonargparse answers with an empty page.

    Raises:
        ToyError: names the classes.
    """
    for i, word in enumerate(args):
        flag, eq, value = word.partition("=")
        if flag in ("--model.help", "--data.help"):
            value = value if eq else args[i + 1] if i + 1 < len(args) and not args[i + 1].startswith("-") else ""
            if not value:
                names = class_names(flag[2:].partition(".")[0])
                raise ToyError(f"{flag}: a class is missing; give one of {', '.join(names)}, or MODULE.CLASS")
