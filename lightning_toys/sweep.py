"""sweep: every cell of a grid of flags, fitted and tested in one process, resumable cell by cell."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_toys.arguments import check_configs, split_configs
from lightning_toys.errors import NonFiniteError, NothingToTrainError, ToyError, note
from lightning_toys.training.results import write_atomic
from lightning_toys.training.run_folder import SWEEP_MARK, holds_run


@dataclass(frozen=True)
class Cell:
    """One combination of the grid's values."""

    name: str
    flags: tuple[str, ...]


def parse_grid(words: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Part ``--grid.FLAG '[a, b]'`` from the other words.

    Raises:
        ToyError: a value is no list, or an empty one.
    """
    grid: dict[str, list[Any]] = {}
    rest: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        if not word.startswith("--grid."):
            rest.append(word)
            i += 1
            continue
        name, eq, text = word.partition("=")
        if not eq:
            i += 1
            if i >= len(words):
                raise ToyError(f"{name}: a list of values is missing, such as '[1, 2]'")
            text = words[i]
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            values = None
        if not isinstance(values, list) or not values:
            raise ToyError(f"{name}: {text!r} is not allowed; give a list such as '[1, 2]'")
        grid[name.removeprefix("--grid.")] = values
        i += 1
    return grid, rest


def cells(grid: dict[str, list[Any]]) -> list[Cell]:
    """Return the grid's cells; a cell is named by the last parts of its flags, ``mode=flow,num_train=20``."""
    short = {k: k.split(".")[-1] for k in grid}
    if len(set(short.values())) < len(short):
        short = {k: ".".join(k.split(".")[-2:]) for k in grid}
    out = []
    for values in itertools.product(*grid.values()):
        pairs = list(zip(grid, values, strict=True))
        name = ",".join(f"{short[k]}={yaml_word(v)}" for k, v in pairs).replace("/", "_").replace(" ", "")
        out.append(Cell(name, tuple(w for k, v in pairs for w in (f"--{k}", yaml_word(v)))))
    return out


def yaml_word(value: Any) -> str:
    """Write a value as one command-line word."""
    return value if isinstance(value, str) else json.dumps(value)


def sweep_command(args: Sequence[str]) -> None:
    """Run `sweep`: check every cell, run those that are not done, compare all.

    Raises:
        ToyError: bad input in any cell; nothing has been run then.
        NonFiniteError: a cell's training blew up; the others were run all the same.
    """
    from lightning_toys.cli import HELP, ToysCLI, run_trainer  # the cli imports this module when it is asked to sweep
    from lightning_toys.compare import compare_folder

    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    grid, words = parse_grid(args)
    configs, rest = split_configs(words)
    check_configs(configs)
    if not configs:
        raise ToyError("-c: give a configuration file")
    if not grid and not any(w.startswith("--gr") for w in rest):
        raise ToyError("--grid: give at least one flag to vary, such as --grid.model.mode '[regression,flow]'")
    taken = {"run.name", "ckpt_path"}
    if taken & set(grid) or any(w.split("=")[0].removeprefix("--") in taken for w in rest):
        raise ToyError("--run.name, --ckpt_path: a sweep names and resumes its cells itself; use --run.variant")
    if not any(w.split("=")[0] == "--run.variant" for w in rest):
        rest += ["--run.variant", f"{Path(configs[0]).stem}-sweep"]
    if stray := [w for w in rest if w.split("=")[0].rpartition(".")[0].startswith("--gr")]:
        raise ToyError(f"{stray[0]}: no such flag; a grid is --grid.FLAG, such as --grid.model.mode")
    if inner := [k for k in grid if k.startswith("run.")]:
        raise ToyError(f"--grid.{inner[0]}: is no setting to vary; give flags of --model, --data or --trainer")
    given = {w.split("=")[0].removeprefix("--") for w in rest}
    if both := sorted(given & set(grid)):
        raise ToyError(f"--{both[0]}: given beside --grid.{both[0]}; give one of them")
    base = [w for c in configs for w in ("-c", c)] + rest
    plan = cells(grid)
    if len({c.name for c in plan}) < len(plan):
        raise ToyError("--grid: two cells are the same; give each value once")
    folders: list[Path] = []
    trains = True
    for cell in plan:
        try:
            try:
                checked = ToysCLI(["fit", *base, *cell.flags], dry=True)
            except NothingToTrainError:
                trains, checked = False, ToysCLI(["test", *base, *cell.flags], dry=True)
        except ToyError as error:
            raise ToyError(f"{error} (in the cell {cell.name})") from None
        if checked.trainer.world_size > 1:
            raise ToyError("--trainer.devices: a sweep runs in one process; use `fit` for each cell to run on several")
        folders.append(checked.run.path.parent / cell.name)
    started, failed = time.monotonic(), []
    waiting = [i for i in range(len(plan)) if not is_done(folders[i], base, plan[i])]
    if len(waiting) < len(plan):
        note(f"{len(plan) - len(waiting)} of {len(plan)} cells are done already")
    for k, i in enumerate(waiting):
        eta = f", about {(time.monotonic() - started) / k * (len(waiting) - k) / 60:.1f} min left" if k else ""
        note(f"cell {k + 1} of {len(waiting)}: {plan[i].name}{eta}")
        try:
            run_cell(run_trainer, folders[i], base, plan[i], trains)
        except NonFiniteError as error:
            note(f"error: {error} (in the cell {plan[i].name})")
            failed.append(plan[i].name)
    if done := [f for f, c in zip(folders, plan, strict=True) if c.name not in failed]:
        compare_folder(folders[0].parent, done)
    if failed:
        raise NonFiniteError(f"{len(failed)} of {len(plan)} cells went non-finite: {', '.join(failed)}")


def is_done(folder: Path, base: Sequence[str], cell: Cell) -> bool:
    """Whether the cell was run to its end.

    Raises:
        ToyError: the folder holds a cell that was started with other flags or files.
    """
    mark = folder / SWEEP_MARK
    if not mark.exists():
        return False
    found = json.loads(mark.read_text())
    if found["flags"] != fingerprint(base, cell):
        raise ToyError(f"--run.variant: {folder} was swept with other settings; give another --run.variant")
    return bool(found["done"])


def fingerprint(base: Sequence[str], cell: Cell) -> list[str]:
    """Return what a cell is run with: its words, with the files' contents in place of their names."""
    configs, rest = split_configs(list(base))
    return [*(Path(c).read_text() for c in configs), *rest, *cell.flags]


def run_cell(run: Any, folder: Path, base: Sequence[str], cell: Cell, trains: bool = True) -> None:
    """Fit a cell, from its last checkpoint where there is one, and test it."""
    words = [*base, *cell.flags, "--run.name", cell.name]
    last = folder / "checkpoints" / "last.ckpt"
    resume: list[str] = []
    if last.exists():
        note("the cell goes on from its last checkpoint")
        resume = ["--ckpt_path", "last"]
    elif holds_run(folder):  # cut off before its first checkpoint: keep what is there, out of the way
        k = 1
        while folder.with_name(f"{folder.name}.cut-{k}").exists():
            k += 1
        os.rename(folder, folder.with_name(f"{folder.name}.cut-{k}"))
    folder.mkdir(parents=True, exist_ok=True)
    mark = {"flags": fingerprint(base, cell), "done": False}
    write_atomic(folder / SWEEP_MARK, json.dumps(mark, indent=1))
    if trains:
        run(["fit", *words, *resume])
    run(["test", *words, *(("--ckpt_path", "last") if trains else ())])
    write_atomic(folder / SWEEP_MARK, json.dumps({**mark, "done": True}, indent=1))
