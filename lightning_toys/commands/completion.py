"""completion: a script for bash or zsh that completes verbs, flags, configurations, classes and run folders at a TAB.

The script is made once, by shtab, and holds every word: a TAB starts no Python. It has to be made anew after an update.
"""

from __future__ import annotations

import argparse
import inspect
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_toys.commands.shipped import shipped
from lightning_toys.commands.sweep.settings import CHECKS
from lightning_toys.commands.trainer.help import GROUPS, SAYS, Flag, class_names
from lightning_toys.errors import ToyError, did_you_mean

SHELLS = ("bash", "zsh")
VERBS = {
    **SAYS,
    "compare": "put runs side by side",
    "sweep": "fit and test every cell of a grid, or the trials of a search, then compare",
    "list": "the shipped configurations",
    "show": "print a shipped configuration",
    "copy": "write a shipped configuration into a file of your own",
    "new": "start an experiment of your own",
    "completion": "print the script of these completions",
}
COMPARE = (
    Flag("--baseline", "LABEL", "the run that differences are taken from"),
    Flag("--out", "FOLDER", "folder for the files"),
    Flag("--html", "FILE", "one page with all of it"),
)
SEARCH = ("metric", "direction", "trials", "seed", "sampler", "pruner")
VALUES = {
    "--trainer.accelerator": ("auto", "cpu", "gpu", "mps"),
    "--trainer.strategy": ("auto", "ddp", "ddp_fork"),
    "--trainer.precision": ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-true"),
    "--trainer.profiler": ("simple", "advanced", "pytorch"),
    "--search.direction": ("minimize", "maximize"),
    "--search.sampler": ("tpe", "cmaes", "random", "grid", "gp"),
    "--search.pruner": ("none", "median", "hyperband"),
}
FOLDERS = ("DIR", "FOLDER")
# the shells' own parts: {names} are the shipped configurations. A run's folder is known by its config.yaml.
BASH = """
_lightning_toys_configs() {
  compgen -W "{names}" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -f -X '!*.yml' -- "$1"
}
_lightning_toys_run_dirs() {
  local file
  for file in lightning_logs/*/*/*/config.yaml; do
    [[ -e $file && ${file%/*} == "$1"* ]] && printf '%s\\n' "${file%/*}"
  done
  compgen -d -- "$1"
}
_lightning_toys_checkpoints() {
  compgen -W "last best auto" -- "$1"
  _lightning_toys_run_dirs "$1"
}
"""
# bash parts words at "=" and ":", which names of runs hold; a flag and its value stay apart
BASH_WORDS = """
_lightning_toys() {
  local -a words=()
  local i word last glue="" cword=0
  for i in "${!COMP_WORDS[@]}"; do
    word=${COMP_WORDS[i]}
    last=$(( ${#words[@]} - 1 ))
    if [[ $word == "=" && $last -ge 0 && ${words[last]} == --* ]]; then
      words+=("")
      glue=1
    elif [[ $last -ge 1 && ( -n $glue || $word == [=:]* ) ]]; then
      words[last]+=$word
      glue=""
      [[ $word == *[=:] ]] && glue=1
    else
      words+=("$word")
      glue=""
    fi
    (( i == COMP_CWORD )) && cword=$(( ${#words[@]} - 1 ))
  done
  local -a COMP_WORDS=("${words[@]}")
  local COMP_CWORD=$cword current=${words[cword]}
  _shtab_lightning_toys
  COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*[=:]}"}"}")
}
complete -o bashdefault -F _lightning_toys lightning-toys
"""
ZSH = """
_lightning_toys_configs() {
  local -a names=({names})
  compadd -a names
  _files -g '*.(yaml|yml)'
}
_lightning_toys_run_dirs() {
  local -a runs=(lightning_logs/*/*/*/config.yaml(N:h))
  compadd -a runs
  _files -/
}
_lightning_toys_checkpoints() {
  compadd last best auto
  _lightning_toys_run_dirs
}
"""


def completion_command(args: Sequence[str]) -> None:
    """Run `completion SHELL`: print the script.

    Raises:
        ToyError: there is no such shell, or shtab is not installed.
    """
    shell = args[0] if args else ""
    if len(args) != 1 or shell not in SHELLS:
        given = " ".join(args)
        raise ToyError(f"completion: {given!r} is not allowed; give bash or zsh{did_you_mean(given, SHELLS)}")
    try:
        import shtab  # noqa: F401
    except ModuleNotFoundError:
        raise ToyError("completion: shtab is not installed; pip install 'lightning-toys[completion]'") from None
    print(script(shell))


def script(shell: str) -> str:
    """Return the script for a shell."""
    import shtab

    names = " ".join(s.name for s in shipped())
    preamble = {"bash": BASH, "zsh": ZSH}[shell].replace("{names}", names)
    made: str = shtab.complete(parser_of_all(), shell, preamble=preamble)
    return f"{made}\n{BASH_WORDS}" if shell == "bash" else made


def custom(name: str) -> dict[str, str]:
    """Return one of the shells' own functions, as shtab takes it."""
    return dict.fromkeys(SHELLS, f"_lightning_toys_{name}")


def parser_of_all() -> argparse.ArgumentParser:
    """Return a parser with every verb's words; it is for shtab to read, and parses nothing."""
    parser = argparse.ArgumentParser("lightning-toys", description="Small, exact research experiments", add_help=False)
    parser.add_argument("--help", action="help", help="what there is")
    parser.add_argument("--version", action="version", version="", help="print the version and stop")
    made = parser.add_subparsers(dest="verb")
    verbs = {name: made.add_parser(name, help=text, description=text, add_help=False) for name, text in VERBS.items()}
    own = dict(class_flags())
    for verb in (*SAYS, "sweep"):
        of = "fit" if verb == "sweep" else verb
        for flag in (f for group in GROUPS.values() for f in group if of in f.verbs):
            add(verbs[verb], flag.name.split(", "), flag.value, flag.text)
        for name, values in own.items():
            add(verbs[verb], [name], "VALUE", "", values)
    for name in [*own, *(f.name for group in GROUPS.values() for f in group if f.name.startswith("--trainer."))]:
        add(verbs["sweep"], [f"--grid.{name.removeprefix('--')}"], "LIST", "values of a grid")
    add(verbs["sweep"], ["--grid.config"], "LIST", "configurations of a grid")
    for name, (_, text) in CHECKS.items():
        add(verbs["sweep"], [f"--sweep.{name}"], "VALUE", text, ("true", "false") if text == "true or false" else ())
    for name in SEARCH:
        add(verbs["sweep"], [f"--search.{name}"], "VALUE", "of a search")
    for flag in COMPARE:
        add(verbs["compare"], [flag.name], flag.value, flag.text)
    runs: Any = verbs["compare"].add_argument("runs", nargs="*", help="run folders, or folders above them")
    runs.complete = custom("run_dirs")
    for verb in ("show", "copy"):
        verbs[verb].add_argument("name", choices=[s.name for s in shipped()], help="a shipped configuration")
    verbs["completion"].add_argument("shell", choices=SHELLS, help="bash or zsh")
    return parser


def add(
    parser: argparse.ArgumentParser, names: Sequence[str], value: str, text: str, values: Sequence[str] = ()
) -> None:
    """Add a flag, and what it may be given."""
    last = names[-1]
    if not value:
        parser.add_argument(*names, action="store_true", help=text)
        return
    if last in ("--model", "--model.help", "--data", "--data.help"):
        values = class_names(last[2:].partition(".")[0])
    values = values or VALUES.get(last, ()) or (("true", "false") if value == "BOOL" else ())
    how: dict[str, Any] = {"action": "append"} if last == "--config" else {}
    action: Any = parser.add_argument(*names, metavar=value.replace(":", "-"), choices=values or None, help=text, **how)
    if last == "--config":
        action.complete = custom("configs")
    elif last == "--ckpt_path":
        action.complete = custom("checkpoints")
    elif value in FOLDERS:
        action.complete = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
    elif value == "FILE":
        action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}


def class_flags() -> Iterator[tuple[str, Sequence[str]]]:
    """Yield the flags of the experiments' classes, each with the values that it may have where those are few."""
    from lightning_toys.commands.experiments import import_all
    from lightning_toys.commands.trainer.start import prepare

    prepare()
    from lightning_toys.commands.trainer.parser import all_subclasses, class_options
    from lightning_toys.training.data import ToyDataModule
    from lightning_toys.training.module import ToyModule

    import_all()
    known: dict[str, list[str]] = {}
    for prefix, base in (("--model", ToyModule), ("--data", ToyDataModule)):
        for cls in all_subclasses(base):
            for name, parameter in inspect.signature(cls).parameters.items():
                found = known.setdefault(f"{prefix}.{name}", [])
                found += [v for v in words_of(hint_of(cls, name, parameter.annotation)) if v not in found]
    yield from ((name, known.get(name, [])) for name in sorted(class_options()))


def hint_of(cls: type, name: str, annotation: Any) -> Any:
    """Return the type that a parameter of a constructor has, where it can be told."""
    for kind in cls.__mro__:
        try:
            return typing.get_type_hints(vars(kind)["__init__"])[name]
        except (NameError, KeyError, AttributeError, TypeError):  # imported for type checking alone, or a base's
            continue
    return annotation


def words_of(hint: Any) -> list[str]:
    """Return the words that a type allows, if it is a choice of some.

    >>> words_of(typing.Literal["a", "b"] | None), words_of(bool), words_of(int)
    (['a', 'b'], ['true', 'false'], [])
    """
    if hint is bool:
        return ["true", "false"]
    if typing.get_origin(hint) is typing.Literal:
        return [str(a) for a in typing.get_args(hint)]
    return [
        w for a in typing.get_args(hint) if typing.get_origin(a) is typing.Literal or a is bool for w in words_of(a)
    ]
