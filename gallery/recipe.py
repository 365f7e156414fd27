"""What a recipe is: runs of cli.py, and the figures, tables and numbers that are read out of their folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


class Folders(dict[str, Path]):
    """A run's name to its folder, and whether the runs are of the full setting."""

    def __init__(self, found: Mapping[str, Path], full: bool) -> None:
        super().__init__(found)
        self.full = full


@dataclass(frozen=True)
class Run:
    """One or more commands that fill one folder.

    Attributes:
        name: unique over all recipes.
        commands: words after ``python cli.py``, as the docs print them, or ``-m MODULE``, which takes ``--out FILE``.
        folder: of the run (or of the sweep), below the root of runs.
        seeds: as a reader would say it.
        minutes: what the full setting takes on one core, roughly.
        quick: words that the quick setting adds to every command; None: it leaves the run out.
        quick_minutes: what that takes.
        needs: a package beside the project's own; a run that lacks it is left out, and said to be.
        keeps: what it came to is kept in the repository (gallery/kept.py), since it takes hours.
        curves: patterns of columns of metrics.csv that are kept with it, where recipes read them.
        files: patterns of small files below ``folder`` that are kept with it, likewise.
        may_diverge: a training of it may go non-finite, which is a result: what comes after it is run all the same.
        cells: which folders below ``folder`` are this run's, a pattern; other runs have others there.
    """

    name: str
    commands: tuple[str, ...]
    folder: str
    seeds: str
    minutes: float
    quick: str | None = ""
    quick_minutes: float = 0.5
    needs: str | None = None
    keeps: bool = False
    curves: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    may_diverge: bool = False
    cells: str | None = None

    def places(self, root: Path) -> list[Path]:
        """Return the folders that are this run's alone, of those that are there."""
        folder = root / self.folder
        return sorted(folder.glob(self.cells)) if self.cells else [folder] if folder.is_dir() else []

    def left_out(self, full: bool) -> str:
        """Say why a setting leaves the run out; nothing where it does not."""
        if not full and self.quick is None:
            return f"{self.name} is too long for the quick setting"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.name} needs the package {self.needs}"
        return ""

    @property
    def experiment(self) -> str:
        """Package name of the experiment."""
        return self.folder.split("/")[0]


@dataclass(frozen=True)
class Entry:
    """A figure, table or number, and the runs it comes from.

    Attributes:
        name: a figure's is its file in docs/images without .png; a table's and a number's is its mark in the docs.
        runs: names of the runs.
        make: the PNG's path below the first run's folder, or what turns folders into the text; None where only the
            docs' own value is known, so that no build renews it.
    """

    name: str
    runs: tuple[str, ...]
    make: str | Callable[[Folders], str] | None = None


@dataclass(frozen=True)
class Recipe:
    """One experiment's part of the gallery."""

    name: str
    runs: tuple[Run, ...]
    figures: tuple[Entry, ...] = ()
    tables: tuple[Entry, ...] = ()
    numbers: tuple[Entry, ...] = ()
