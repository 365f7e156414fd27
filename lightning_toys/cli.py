"""The command line: fit, validate, test and predict through LightningCLI, and compare and sweep beside them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_toys.commands.trainer.toys_cli import run_trainer
from lightning_toys.errors import (
    DiskFullError,
    NonFiniteError,
    ToyError,
    did_you_mean,
    tell_disk_full,
)
from lightning_toys.training.allocator import keep_freed_memory

TRAINER_VERBS = ("fit", "validate", "test", "predict")
VERBS = (*TRAINER_VERBS, "compare", "sweep")

HELP = """\
usage: python cli.py VERB -c configs/EXPERIMENT/VARIANT.yaml [--flag value ...]

  fit       train; goes on where a run stopped with --ckpt_path last
  validate  score a checkpoint as training does (validation.json)
  test      score a checkpoint under every sampler
  predict   write a checkpoint's predictions to the run folder
  compare   put runs side by side: compare RUN_OR_FOLDER ... [--baseline LABEL] [--out FOLDER]
  sweep     fit and test every cell of a grid, or the trials of a search, then compare (sweep --help):
            sweep -c FILE --grid.model.mode '[regression,flow]' [--grid.ANY.FLAG '[...]'] [--flag value ...]

flags (VERB --help lists all; any class named on the line has its own --model.help, --data.target.help CLASS, ...)
  -c FILE                     configuration; several are stacked, flags beat files
  --print_config              print the whole configuration and stop
  --model.* --data.*          the experiment, e.g. --model.seeds '[0,1,2]' --data.num_train 20
  --trainer.*                 everything of Lightning's Trainer: max_steps, max_epochs, accelerator, devices,
                              strategy, precision, logger, callbacks, ...
  --ckpt_path last|best|PATH  the newest run's checkpoint, or any
  --run.root DIR  --run.variant NAME  --run.name NAME
                              the run folder is root/experiment/variant/name; beside a PATH, where to go on
  --checkpoint.every_n_steps N   --figures.every_n_validations N   --figures.dpi N

example
  python cli.py fit  -c configs/flow_vs_regression/flow.yaml --model.seeds '[0,1,2,3]'
  python cli.py test -c configs/flow_vs_regression/flow.yaml --ckpt_path last
  tensorboard --logdir lightning_logs
"""


def dispatch(args: Sequence[str]) -> None:
    """Run one command line."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    verb = args[0]
    if verb not in VERBS:
        raise ToyError(f"{verb!r} is no verb; give one of {', '.join(VERBS)}{did_you_mean(verb, VERBS)}")
    if verb == "compare":
        from lightning_toys.commands.compare.report import compare_command

        compare_command(args[1:])
    elif verb == "sweep":
        from lightning_toys.commands.sweep.command import sweep_command

        sweep_command(args[1:])
    else:
        run_trainer(args)


def silence_lightning() -> None:
    """Silence Lightning's advertisements; what a user has to know is said by us."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what was asked for is said
    # it would have the state of before the step saved, which ours are not meant to be
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    # lightning asks torch's pytree under an old name
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
    # LightningCLI calls jsonargparse by names that version 5 drops; hence our pin below 5
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # loaders without workers are the point here
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory.*exists and is not empty.*")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for a failed run, 2 for bad input, 128 + n for signal n."""
    silence_lightning()
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        # small matrices gain little from more, and lose a hundredfold where two runs share the cores
        torch.set_num_threads(1)
    try:
        dispatch(list(sys.argv[1:] if args is None else args))
    except ToyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"error: {error}; the last good checkpoint, if one was written, is kept", file=sys.stderr)
        return 1
    except (DiskFullError, OSError) as error:
        tell_disk_full(error)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SIGTERMException:  # before the first step or outside of training: there is nothing to save
        return 128 + signal.SIGTERM
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def console() -> None:
    """Entry point of the ``lightning-toys`` script."""
    raise SystemExit(main())
