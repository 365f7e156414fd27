"""The configurations that the package ships, found by name where they lie: in the wheel or in the checkout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import lightning_toys
from lightning_toys.errors import ToyError, did_you_mean


@dataclass(frozen=True)
class Shipped:
    """A shipped configuration.

    Attributes:
        name: ``experiment/variant``.
        path: the file.
        answers: the question that it answers.
        takes: how long it takes on one CPU core, in words.
    """

    name: str
    path: Path
    answers: str
    takes: str


def folder() -> Path:
    """Return the folder of the shipped configurations."""
    inside = Path(lightning_toys.__file__).parent / "configs"
    return inside if inside.is_dir() else inside.parents[1] / "configs"


def shipped() -> list[Shipped]:
    """Return all of them, by name."""
    found = []
    for path in sorted(folder().glob("*/*.yaml")):
        said = {"answers": "", "takes": ""}
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                key, colon, text = line.removeprefix("#").partition(":")
                if not line.startswith("#") or not colon or key.strip() not in said:
                    break
                said[key.strip()] = text.strip()
        found.append(Shipped(f"{path.parent.name}/{path.stem}", path, **said))
    return found


def by_name(word: str) -> Shipped | None:
    """Return the configuration of that name, with or without .yaml; None where there is none."""
    parts = word.removesuffix(".yaml").split("/")
    wanted = "/".join(parts[1:] if parts[0] == "configs" else parts)
    return next((s for s in shipped() if s.name == wanted), None)


def find_config(word: str, flag: str = "-c") -> str:
    """Return the file that ``-c WORD`` means: a path first, then a shipped configuration of that name.

    Raises:
        ToyError: there is neither; names the nearest.
    """
    if os.path.isfile(word):  # Path's raises where a name is too long
        return word
    for name in (f"{word}.yaml", f"{word}.yml"):
        if os.path.isfile(name):
            return name
    if found := by_name(word):
        return str(found.path)
    raise ToyError(f"{flag}: no file {word!r}{nearest(word)}")


def nearest(word: str) -> str:
    """Return a hint: names of shipped configurations, or files here, that are like a word; or how to list them."""
    names = [s.name for s in shipped()]
    stem = Path(word).name.removesuffix(".yaml").removesuffix(".yml")
    if "/" not in word and (same := [n for n in names if n.partition("/")[2] == stem]):
        return f"; did you mean {' or '.join(map(repr, same))}?"
    here = [str(p) for pattern in ("*.yaml", "*.yml") for p in sorted(Path().glob(pattern))][:200]
    if hint := did_you_mean(word, here) or did_you_mean(word.removesuffix(".yaml").removeprefix("configs/"), names):
        return hint
    if hint := did_you_mean(stem, [n.partition("/")[2] for n in names]):
        close = hint.split("'")[1]
        return f"; did you mean {' or '.join(repr(n) for n in names if n.partition('/')[2] == close)}?"
    return "; `lightning-toys list` shows the shipped ones"
