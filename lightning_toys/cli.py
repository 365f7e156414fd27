"""The command line: which verb is meant, and its help; a verb's own packages are imported once it is run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from lightning_toys import __version__
from lightning_toys.errors import (
    KEPT,
    NonFiniteError,
    OwnershipLostError,
    RunFolderError,
    Stopped,
    ToyError,
    did_you_mean,
    one_line,
)

TRAINER_VERBS = ("fit", "validate", "test", "predict")
VERBS = (*TRAINER_VERBS, "compare", "sweep", "list", "show", "copy", "new", "completion")

HELP = """\
usage: lightning-toys VERB -c EXPERIMENT/VARIANT [--flag value ...]      (in a clone also: python cli.py VERB ...)

  fit       train; goes on where a run stopped with --ckpt_path last, or auto
  validate  score a checkpoint as training does (validation.json)
  test      score a checkpoint under every sampler
  predict   write a checkpoint's predictions to the run folder
  compare   put runs side by side: compare RUN_OR_FOLDER ... [--baseline LABEL] [--out FOLDER] [--html FILE]
  sweep     fit and test every cell of a grid, or the trials of a search, then compare (sweep --help):
            sweep -c FILE --grid.model.mode '[regression,flow]' [--grid.ANY.FLAG '[...]'] [--flag value ...]

  list      the shipped configurations: what each answers, and how long it takes
  show      print one: show flow_vs_regression/flow
  copy      write one into a file of your own: copy flow_vs_regression/flow [FILE]
  new       start an experiment of your own: new NAME writes NAME.py, NAME.yaml and test_NAME.py here
  completion
            print a script that completes all of this at a TAB: completion bash, or zsh

flags (VERB --help lists all; fit --model.help CLASS lists an experiment's own, fit --data.help CLASS its data's)
  -c FILE                     configuration: a file, or the name of a shipped one; several are stacked, flags beat files
  --print_config              print the whole configuration and stop
  --model.* --data.*          the experiment, e.g. --model.seeds '[0,1,2]' --data.num_train 20
  --trainer.*                 Lightning's Trainer: max_steps, max_epochs, accelerator, devices, strategy, precision,
                              logger, callbacks, ...
  --ckpt_path last|best|auto|PATH
                              the newest run's checkpoint, or any; auto starts a run, or goes on with it
  --run.root DIR  --run.variant NAME  --run.name NAME
                              the run folder is root/experiment/variant/name; beside a PATH, where to go on
  --checkpoint.every_n_steps N   --checkpoint.keep N   --figures.every_n_validations N   --figures.dpi N
  --version

example
  lightning-toys fit  -c flow_vs_regression/flow --model.seeds '[0,1,2,3]'
  lightning-toys test -c flow_vs_regression/flow --ckpt_path last
  tensorboard --logdir lightning_logs
"""


def check_files(args: Sequence[str]) -> None:
    """Refuse configurations that are not there, or are none, before what takes seconds is imported."""
    from lightning_toys.commands.trainer.arguments import check_configs, split_configs

    check_configs(split_configs(args)[0])


def trainer(verb: str, args: Sequence[str]) -> None:
    """Run fit, validate, test or predict."""
    from lightning_toys.commands.trainer.help import asks_for_help, check_class_help, named_classes, trainer_help

    check_class_help(args)
    asked = asks_for_help(args)
    commands = [[verb, *args]]
    if asked:
        print(trainer_help(verb))
        commands = [[verb, f"--{section}.help", name] for section, name in named_classes(args).items()]
    if not commands:
        return
    check_files(args)
    from lightning_toys.commands.trainer.start import prepare

    prepare()
    from lightning_toys.commands.trainer.toys_cli import run_trainer

    for words in commands:
        with suppress(SystemExit) if asked else nullcontext():  # a parser's help ends its program
            run_trainer(words)


def compare(verb: str, args: Sequence[str]) -> None:
    """Run `compare`."""
    from lightning_toys.commands.compare.command import compare_command

    compare_command(args)


def sweep(verb: str, args: Sequence[str]) -> None:
    """Run `sweep`."""
    from lightning_toys.commands.sweep.help import HELP as SWEEP_HELP

    if {"-h", "--help"} & set(args):
        print(SWEEP_HELP)
        return
    check_files(args)
    from lightning_toys.commands.trainer.start import prepare

    prepare()
    from lightning_toys.commands.sweep.command import sweep_command

    sweep_command(args)


def configurations(verb: str, args: Sequence[str]) -> None:
    """Run `list`, `show` or `copy`."""
    from lightning_toys.commands.configs import configs_command

    configs_command(verb, args)


def new(verb: str, args: Sequence[str]) -> None:
    """Run `new`."""
    from lightning_toys.commands.new import new_command

    new_command(args)


def completion(verb: str, args: Sequence[str]) -> None:
    """Run `completion`."""
    from lightning_toys.commands.completion import completion_command

    completion_command(args)


COMMANDS: dict[str, Callable[[str, Sequence[str]], None]] = {
    **dict.fromkeys(TRAINER_VERBS, trainer),
    "compare": compare,
    "sweep": sweep,
    **dict.fromkeys(("list", "show", "copy"), configurations),
    "new": new,
    "completion": completion,
}


def verb_first(args: Sequence[str]) -> list[str]:
    """Return a command line with its verb before configurations that were given ahead of it."""
    ahead: list[str] = []
    rest = list(args)
    while rest and rest[0].partition("=")[0] in ("-c", "--config"):
        taken = 1 if "=" in rest[0] else 2
        ahead, rest = [*ahead, *rest[:taken]], rest[taken:]
    return [*rest[:1], *ahead, *rest[1:]] if rest else list(args)


def dispatch(args: Sequence[str]) -> None:
    """Run one command line.

    Raises:
        ToyError: there is no such verb, or the verb's input is bad.
    """
    args = verb_first(args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    verb = args[0]
    if verb in ("--version", "-V"):
        print(f"lightning-toys {__version__}")
        return
    if verb not in COMMANDS:
        if verb.startswith("-"):
            raise ToyError(f"{verb}: the verb comes first; give one of {', '.join(VERBS)}")
        raise ToyError(f"{verb!r} is no verb; give one of {', '.join(VERBS)}{did_you_mean(verb, VERBS)}")
    COMMANDS[verb](verb, args[1:])


def sigterm_exception() -> tuple[type[BaseException], ...]:
    """Return Lightning's exception for SIGTERM, where Lightning has been imported."""
    found = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return (found.SIGTERMException,) if found else ()


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Have SIGINT and SIGTERM end what is run, wherever it is; leave the handlers of before behind.

    Training answers them itself, between two blocks of steps. While the first is being answered a second is not heard;
    a third ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():  # where none can be set, none comes
        yield
        return
    heard = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        if heard == 1:
            raise Stopped(number)
        if heard > 2:
            os._exit(128 + number)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        yield
    finally:
        for number, handler in before.items():  # Lightning leaves its own behind where a run ends by an error
            if handler is not None:  # one that was not set from Python cannot be
                signal.signal(number, handler)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for a failed run, 2 for bad input, 128 + n for signal n."""
    try:
        with ending_by_signals():
            dispatch(list(sys.argv[1:] if args is None else args))
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        with suppress(OSError, ValueError):  # nor is there anybody for what the interpreter would write at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ToyError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"error: {one_line(error)}; {KEPT}", file=sys.stderr)
        return 1
    except (RunFolderError, OwnershipLostError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        why = ": ".join(str(w) for w in (error.filename, error.strerror or error) if w)
        print(f"error: {one_line(why)}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"error: there is not enough memory ({' '.join(str(error).split()) or 'MemoryError'})", file=sys.stderr)
        return 1
    except Stopped as stop:
        if not stop.told:
            print(f"stopped by {stop.number.name}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:  # of a thread's, where no handler could be set
        return 128 + signal.SIGINT
    except sigterm_exception():  # before the first step or outside of training: there is nothing to save
        return 128 + signal.SIGTERM
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def console() -> None:
    """Entry point of ``lightning-toys`` and cli.py: the working folder is on the path, as it is for ``python -m``."""
    sys.path.insert(0, "")
    raise SystemExit(main())
