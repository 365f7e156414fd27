"""new: an experiment of one's own, begun in the working folder."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_toys.commands.experiments import EXPERIMENTS
from lightning_toys.errors import ToyError, note

HELP = """\
usage: lightning-toys new NAME

writes NAME.py (a module and a data module), NAME.yaml and test_NAME.py here; they train, resume, sweep and compare as
they are:
  lightning-toys fit  -c NAME
  lightning-toys test -c NAME
  lightning-toys sweep -c NAME --grid.model.hidden '[8,32]'
  pytest test_NAME.py                (pip install pytest)
"""
TEMPLATE = Path(__file__).parent / "template"
FILES = {"{}.py": "mine.py", "{}.yaml": "mine.yaml", "test_{}.py": "test_mine.py.txt"}


def new_command(args: Sequence[str]) -> None:
    """Run `new NAME`.

    Raises:
        ToyError: the name is no module's name or is taken, a file is in the way, or the folder cannot be written to.
    """
    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    if len(args) != 1:
        raise ToyError(f"new: {len(args)} words given; give one NAME, such as my_experiment")
    name = args[0].removesuffix(".py")
    check_name(name)
    kind = "".join(word[:1].upper() + word[1:] for word in name.split("_"))
    texts = {}
    for target, source in FILES.items():
        text = (TEMPLATE / source).read_text(encoding="utf-8")
        texts[Path(target.format(name))] = re.sub(r"Mine", kind, re.sub(r"(?<![a-z])mine(?![a-z])", name, text))
    if there := [str(path) for path in texts if path.exists()]:
        raise ToyError(f"new: {', '.join(there)} is there already; give another NAME")
    for path, text in texts.items():
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w", encoding="utf-8") as f:
                f.write(text)
        except OSError as error:
            raise ToyError(f"new: {path} cannot be written ({error.strerror})") from None
    print("\n".join(map(str, texts)))
    sys.stdout.flush()
    note(f"train it by `lightning-toys fit -c {name}`, test it by `pytest test_{name}.py`")


def check_name(name: str) -> None:
    """Refuse a name that no module of one's own can have.

    Raises:
        ToyError: says why.
    """
    if keyword.iskeyword(name):
        raise ToyError(f"new: {name!r} is not allowed, it is a keyword of Python; give another name")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name) or name.endswith("_"):
        raise ToyError(f"new: {name!r} is not allowed; give small letters, digits and _, beginning with a letter")
    if name in (*EXPERIMENTS, "lightning_toys"):
        raise ToyError(f"new: {name!r} is a shipped experiment; give another name")
    here = Path(f"{name}.py")
    if name in sys.stdlib_module_names or (importlib.util.find_spec(name) is not None and not here.exists()):
        raise ToyError(f"new: {name!r} is the name of an installed module; give another")
