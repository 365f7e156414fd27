"""list, show and copy: the shipped configurations, without a clone."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lightning_toys.commands.shipped import Shipped, by_name, nearest, shipped
from lightning_toys.errors import ToyError, note

HELP = """\
usage: lightning-toys list [EXPERIMENT]
       lightning-toys show EXPERIMENT/VARIANT
       lightning-toys copy EXPERIMENT/VARIANT [FILE]

  list   the shipped configurations: what each answers, and how long it takes on one CPU core
  show   print one
  copy   write one into a file of your own (default: VARIANT.yaml here); a file that is there stays as it is
"""


def configs_command(verb: str, args: Sequence[str]) -> None:
    """Run `list`, `show` or `copy`.

    Raises:
        ToyError: no such configuration, or a file that is in the way or cannot be written.
    """
    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    if stray := [a for a in args if a.startswith("-")]:
        raise ToyError(f"{verb}: {stray[0]}: no such flag")
    least, most = {"list": (0, 1), "show": (1, 1), "copy": (1, 2)}[verb]
    if not least <= len(args) <= most:
        name = "EXPERIMENT/VARIANT"
        wanted = {"list": "at most one EXPERIMENT", "show": f"one {name}", "copy": f"{name} [FILE]"}
        raise ToyError(f"{verb}: {len(args)} words given; give {wanted[verb]}, as `lightning-toys list` shows them")
    if verb == "list":
        listed(args[0] if args else "")
    elif verb == "show":
        print(named(verb, args[0]).path.read_text(encoding="utf-8"), end="")
    else:
        copied(named(verb, args[0]), Path(args[1]) if len(args) > 1 else None)


def named(verb: str, word: str) -> Shipped:
    """Return the configuration of a name.

    Raises:
        ToyError: there is none.
    """
    if found := by_name(word):
        return found
    raise ToyError(f"{verb}: no configuration {word!r}{nearest(word)}")


def listed(experiment: str) -> None:
    """Print the table."""
    rows = [s for s in shipped() if not experiment or s.name.partition("/")[0] == experiment]
    if not rows:
        names = ", ".join(dict.fromkeys(s.name.partition("/")[0] for s in shipped()))
        raise ToyError(f"list: {experiment!r} is no experiment; give one of {names}")
    width = max(len(s.name) for s in rows)
    time = max(len(s.takes) for s in rows)
    room = max(30, shutil.get_terminal_size((120, 24)).columns - width - time - 4)
    print(f"{'name':{width}}  {'takes':>{time}}  answers")
    for s in rows:
        first, *more = textwrap.wrap(s.answers, room) or [""]
        print(f"{s.name:{width}}  {s.takes:>{time}}  {first}")
        for line in more:
            print(f"{'':{width}}  {'':{time}}  {line}")
    print("\n(takes: `fit` as configured, on one CPU core; `lightning-toys fit -c NAME` runs one)")


def copied(source: Shipped, target: Path | None) -> None:
    """Write a configuration into a file that is not there yet."""
    path = Path(source.path.name) if target is None else target
    if path.is_dir():
        path = path / source.path.name
    if not path.suffix:
        path = path.with_suffix(".yaml")
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise ToyError(f"copy: {path} is there already; give another FILE") from None
    except (OSError, ValueError) as error:
        raise ToyError(f"copy: {path} cannot be written ({getattr(error, 'strerror', error)})") from None
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        f.write(source.path.read_text(encoding="utf-8"))
    sys.stdout.flush()
    note(f"{path}: run it by `lightning-toys fit -c {path}`")
