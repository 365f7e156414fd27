"""A sweep's grid: its cells, and what is checked before any of them is run."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_toys.commands.shipped import find_config
from lightning_toys.commands.strict_yaml import read_word, write_word
from lightning_toys.commands.sweep.cell import Cell, Plan, Task, fingerprint, read_file, read_mark, stacked
from lightning_toys.commands.sweep.settings import part_flags
from lightning_toys.commands.trainer.arguments import check_configs, split_configs
from lightning_toys.commands.trainer.toys_cli import ToysCLI
from lightning_toys.errors import NothingToTrainError, ToyError

LONGEST = 200  # bytes of a cell's name, which is a folder's
FEW = 16  # values of a flag that are all checked


def parse_grid(words: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Part ``--grid.FLAG '[a, b]'`` from the other words.

    Raises:
        ToyError: a value is no list, or an empty one.
    """
    found, rest = part_flags(words, "grid", "'[1, 2]'")
    grid: dict[str, list[Any]] = {}
    for name, text in found.items():
        values = read_word(text)
        if not isinstance(values, list) or not values:
            raise ToyError(f"--grid.{name}: {text!r} is not allowed; give a list such as '[1, 2]'")
        grid[name] = values
    return grid, rest


def cells(grid: dict[str, list[Any]]) -> list[Cell]:
    """Return the grid's cells; a cell is named by the last parts of its flags, ``mode=flow,num_train=20``.

    The axis ``config`` holds configuration files; their names stand for them.
    """
    short = {k: k.split(".")[-1] for k in grid}
    if len(set(short.values())) < len(short):
        short = {k: ".".join(k.split(".")[-2:]) for k in grid}
    files = [Path(v) for v in grid.get("config", [])]
    stems = [f.stem for f in files]
    alike = len(set(stems)) < len(stems)  # flow_vs_regression/flow.yaml, generative_policy/flow.yaml
    named = {str(f): f"{f.parent.name}_{f.stem}" if alike else f.stem for f in files}
    out = []
    for values in itertools.product(*grid.values()):
        pairs = list(zip(grid, values, strict=True))
        words = [f"{short[k]}={named[str(Path(v))] if k == 'config' else write_word(v)}" for k, v in pairs]
        name = ",".join(words).replace("/", "_").replace(" ", "")
        flags = tuple(w for k, v in pairs if k != "config" for w in (f"--{k}", write_word(v)))
        out.append(Cell(name, flags, tuple(v for k, v in pairs if k == "config")))
    return out


def check_words(words: list[str], varied: Sequence[str], kind: str) -> tuple[list[str], list[str]]:
    """Return configuration files and the other words, a variant among them, of a sweep that varies some flags.

    Raises:
        ToyError: a flag is not the sweep's to vary or to be given, or is given twice.
    """
    configs, rest = split_configs(words)
    check_configs(configs)
    if not configs and "config" not in varied:
        raise ToyError("-c: give a configuration file")
    taken = {"run.name", "ckpt_path"}
    if taken & set(varied) or any(w.split("=")[0].removeprefix("--") in taken for w in rest):
        raise ToyError("--run.name, --ckpt_path: a sweep names and resumes its cells itself; use --run.variant")
    if inner := [k for k in varied if k.startswith("run.")]:
        raise ToyError(f"--{kind}.{inner[0]}: is no setting to vary; give flags of --model, --data or --trainer")
    given = {w.split("=")[0].removeprefix("--") for w in rest}
    if both := sorted(given & set(varied)):
        raise ToyError(f"--{both[0]}: given beside --{kind}.{both[0]}; give one of them")
    if "run.variant" not in given:
        suffix = "search" if kind == "search" else "sweep"
        rest += ["--run.variant", f"{Path(configs[0]).stem if configs else 'configs'}-{suffix}"]
    return configs, rest


def plan_grid(words: list[str], command: list[str]) -> Plan:
    """Check a grid's every value, and that no cell was swept otherwise; return what is to be done.

    Raises:
        ToyError: bad input.
    """
    grid, words = parse_grid(words)
    if not grid and not any(w.startswith("--gr") for w in words):
        check_words(words, ["config"], "grid")
        raise ToyError("--grid: give at least one flag to vary, such as --grid.model.mode '[regression,flow]'")
    if wrong := [v for v in grid.get("config", []) if not isinstance(v, str)]:
        raise ToyError(f"--grid.config: {wrong[0]!r} is not allowed; give names of configuration files")
    try:
        if "config" in grid:  # shipped ones are given by name; from here on all are files
            grid["config"] = [find_config(v) for v in grid["config"]]
            check_configs(grid["config"])
    except ToyError as error:
        raise ToyError(f"--grid.config{str(error).removeprefix('-c')}") from None
    configs, rest = check_words(words, list(grid), "grid")
    if stray := [w for w in rest if w.split("=")[0].rpartition(".")[0].startswith("--gr")]:
        raise ToyError(f"{stray[0]}: no such flag; a grid is --grid.FLAG, such as --grid.model.mode")
    base = [w for c in configs for w in ("-c", c)] + rest
    found = cells(grid)
    if len({c.name for c in found}) < len(found):
        raise ToyError("--grid: two cells are the same; give each value once")
    if long := [c.name for c in found if len(os.fsencode(c.name)) > LONGEST]:
        raise ToyError(f"--grid: a cell would be named {long[0][:60]}..., too long for a folder; give shorter values")
    tasks = tasks_of(base, grid, found)
    read = functools.cache(read_file)
    for task in tasks:
        mark = read_mark(task.folder)
        if "flags" in mark and mark["flags"] != fingerprint(base, task.cell, read):
            raise ToyError(f"--run.variant: {task.folder} was swept with other settings; give another --run.variant")
    return Plan(base, tasks, command=["cli.py", "sweep", *command])


def is_structural(flag: str) -> bool:
    """Whether a flag may change which other flags there are: it names a file or a class."""
    return "." not in flag or flag.endswith("class_path")


def shape_of(value: Any) -> Any:
    """Return what a value is like: numbers of one kind are alike, lists of alike numbers too; a word is like itself."""
    if isinstance(value, list):
        return tuple(shape_of(v) for v in value)
    return type(value) if type(value) in (int, float) else repr(value)


def telling(values: Sequence[Any]) -> set[int]:
    """Return the indices of the values to check: all of a few; of many the least and the largest of each shape."""
    alike: dict[Any, list[int]] = {}
    for k, value in enumerate(values):
        alike.setdefault(shape_of(value), []).append(k)
    if len(values) <= FEW:
        return set(range(len(values)))
    return {f(same, key=lambda k: values[k]) for same in alike.values() for f in (min, max)}


def samples(grid: dict[str, list[Any]], found: Sequence[Cell]) -> Iterator[tuple[tuple[int, ...], Cell]]:
    """Yield cells that have each value of each flag at least once, for all files and classes.

    Not each combination: a grid of 10 x 10 x 10 has 28 of these. Each comes with the indices of its files and classes.
    """
    structural = [i for i, flag in enumerate(grid) if is_structural(flag)]
    chosen = [telling(values) for values in grid.values()]
    for where, cell in zip(itertools.product(*(range(len(v)) for v in grid.values())), found, strict=True):
        moved = [i for i, k in enumerate(where) if k > 0 and i not in structural]
        if len(moved) <= 1 and all(where[i] in chosen[i] for i in moved):
            yield tuple(where[i] for i in structural), cell


def tasks_of(base: Sequence[str], grid: dict[str, list[Any]], found: Sequence[Cell]) -> list[Task]:
    """Check every value of a grid; return its cells with their folders.

    Raises:
        ToyError: a value is not allowed.
    """
    known: dict[tuple[int, ...], Task] = {}
    for where, cell in samples(grid, found):
        task = check_cell(base, cell)
        known.setdefault(where, task)
    structural = [i for i, flag in enumerate(grid) if is_structural(flag)]
    tasks = []
    for where, cell in zip(itertools.product(*(range(len(v)) for v in grid.values())), found, strict=True):
        like = known[tuple(where[i] for i in structural)]
        tasks.append(Task(cell, like.folder.parent / cell.name, like.trains))
    return tasks


def check_cell(base: Sequence[str], cell: Cell) -> Task:
    """Go through all of a cell's input without running it.

    Raises:
        ToyError: something is not allowed.
    """
    trains = True
    try:
        try:
            checked = ToysCLI(["fit", *stacked(base, cell)], dry=True)
        except NothingToTrainError:
            trains, checked = False, ToysCLI(["test", *stacked(base, cell)], dry=True)
    except ToyError as error:
        raise ToyError(f"{error} (in the cell {cell.name})") from None
    if checked.trainer.world_size > 1:
        raise ToyError("--trainer.devices: a cell runs in one process; use `fit` for each to run on several")
    return Task(cell, checked.run.path.parent / cell.name, trains)
