"""sweep: every cell of a grid of flags, or the trials of a search, shared out among processes; resumable."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_toys.commands.shipped import find_config
from lightning_toys.commands.strict_yaml import read_word, write_word
from lightning_toys.commands.sweep.cell import (
    CLAIMS,
    Cell,
    Plan,
    Task,
    failures,
    forget_failures,
    holders,
    is_done,
    settled,
    stacked,
    verdict,
    work,
)
from lightning_toys.commands.sweep.claims import STALE, take
from lightning_toys.commands.sweep.search import Search, trials
from lightning_toys.commands.sweep.search_space import corners, parse_search
from lightning_toys.commands.trainer.arguments import check_configs, split_configs
from lightning_toys.commands.trainer.toys_cli import ToysCLI
from lightning_toys.errors import NothingToTrainError, ToyError, did_you_mean, note

SETTINGS = ("jobs", "devices", "stale", "retry")


@dataclass(frozen=True)
class Settings:
    """The ``--sweep.*`` flags."""

    jobs: int | None = None
    devices: list[str] | None = None
    stale: float = STALE
    retry: bool = False


def part_flags(words: Sequence[str], prefix: str, example: str) -> tuple[dict[str, str], list[str]]:
    """Part ``--PREFIX.NAME TEXT`` from the other words.

    Raises:
        ToyError: a value is missing.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if not word.startswith(f"--{prefix}."):
            rest.append(word)
            continue
        name, eq, text = word.partition("=")
        if not eq and (text := next(waiting, "")) == "":
            raise ToyError(f"{name}: a value is missing, such as {example}")
        short = name.removeprefix(f"--{prefix}.")
        if short in found and prefix == "grid":  # of other flags the last one wins, as everywhere
            raise ToyError(f"{name}: given twice; give one list")
        found[short] = text
    return found, rest


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


def parse_settings(words: Sequence[str]) -> tuple[Settings, list[str]]:
    """Part the sweep's own flags from the other words.

    Raises:
        ToyError: there is no such flag, or its value is not allowed.
    """
    found, rest = part_flags(words, "sweep", "--sweep.jobs 4")
    given: dict[str, Any] = {}
    for name, text in found.items():
        value = read_word(text)
        if name not in SETTINGS:
            raise ToyError(
                f"--sweep.{name}: no such flag; give one of {', '.join(SETTINGS)}{did_you_mean(name, SETTINGS)}"
            )
        if name == "jobs" and (type(value) is not int or value < 1):
            raise ToyError(f"--sweep.jobs: {text!r} is not allowed; give an integer >= 1")
        if name == "stale" and (type(value) not in (int, float) or not value > 0):
            raise ToyError(f"--sweep.stale: {text!r} is not allowed; give seconds, a number > 0")
        if name == "retry" and type(value) is not bool:
            raise ToyError(f"--sweep.retry: {text!r} is not allowed; give true or false")
        if name == "devices":
            if not isinstance(value, list) or not value or not all(isinstance(v, int | str) for v in value):
                raise ToyError(f"--sweep.devices: {text!r} is not allowed; give a list such as '[0, 1]'")
            value = [str(v) for v in value]
        given[name] = value
    return Settings(**given), rest


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


def sweep_command(args: Sequence[str]) -> None:
    """Run `sweep`: check every cell, run those that are not done and that nobody else runs, compare all.

    Raises:
        ToyError: bad input in any cell, and nothing has been run; or cells were refused while they ran.
        NonFiniteError: a cell's training blew up; the others were run all the same.
    """
    from lightning_toys.commands.sweep.workers import Foreman, devices, leave_group, terminate

    settings, words = parse_settings(args)
    neighbours = leave_group()
    if neighbours > 1 and (settings.jobs or settings.devices):
        raise ToyError(
            f"--sweep.jobs, --sweep.devices: not allowed beside {neighbours} ranks on this machine, each of which "
            "takes cells on its own device; give one rank a machine, or neither flag"
        )
    found = devices()
    named = check_devices(settings.devices or [], found)
    if named:  # before anything here wakes the GPUs, as a search's rehearsal does
        os.environ["CUDA_VISIBLE_DEVICES"] = named[0]
    old, chooser = None, None
    if threading.current_thread() is threading.main_thread():
        old = signal.signal(signal.SIGTERM, terminate)  # what is held is released on the way out
    try:
        if any(w.split("=")[0].partition(".")[0] == "--search" for w in words):
            plan = plan_search(words, settings, list(args))
            chooser = Search(plan)
            chooser.check()
        else:
            plan = plan_grid(words, settings, list(args))
        if settings.retry:
            forget_failures(plan)
        if done := sum(settled(t) for t in plan.tasks) - len(failed := failures(plan)):
            note(f"{done} of {len(plan.tasks)} cells are done already")
        if failed:
            again = "" if chooser else " (--sweep.retry true runs them again)"
            note(f"{len(failed)} failed before: {', '.join(failed)}{again}")
        jobs = settings.jobs or max(len(named), 1)
        if jobs > 1:
            Foreman(plan, jobs, named or found).run()
        else:
            work(plan, chooser)
        close(plan, chooser)
    finally:
        if chooser:
            chooser.close()
        if old is not None:
            signal.signal(signal.SIGTERM, old)


def check_devices(named: list[str], found: list[str]) -> list[str]:
    """Refuse GPUs that are not here; one may be named by its UUID.

    Raises:
        ToyError: one is not.
    """
    if wrong := [n for n in named if n not in found and not (found and n.startswith(("GPU-", "MIG-")))]:
        here = f"those here are {', '.join(found)}" if found else "there are no GPUs here"
        raise ToyError(f"--sweep.devices: {wrong[0]!r} is not allowed; {here}")
    return named


def close(plan: Plan, chooser: Search | None) -> None:
    """Compare where everything is settled; else say who is still at work."""
    while True:
        who, free = holders(plan)
        if not free:
            break
        before = sum(settled(t) for t in plan.tasks)
        work(plan, chooser)  # a holder died since we last looked
        if sum(settled(t) for t in plan.tasks) == before:
            break
    if who or free:
        places = ", ".join(dict.fromkeys(who)) or "nobody"
        note(
            f"{len(who) + free} of {len(plan.tasks)} cells are still run elsewhere ({places}); whoever ends last makes "
            "the comparison, and so does this command, given again then"
        )
        return
    claim = take(plan.tasks[0].folder.parent / CLAIMS / "comparison", plan.stale)
    if claim is None:
        note("another process is making the comparison")
        return
    try:
        if chooser:
            chooser.finish()
        else:
            compare_tasks(plan)
    finally:
        claim.release()
    if not chooser:  # a trial that fails is an answer
        verdict(plan)


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


def plan_search(words: list[str], settings: Settings, command: list[str]) -> Plan:
    """Check a search's settings, every bound and every choice; return its trials.

    Raises:
        ToyError: bad input.
    """
    found, words = part_flags([w for w in words if w != "--search"], "search", "--search.trials 20")
    if any(w.startswith("--grid") for w in words):
        raise ToyError("--grid, --search: not allowed together; give one of them")
    if settings.retry:
        raise ToyError("--sweep.retry: not allowed in a search; give more --search.trials")
    search = parse_search(found)
    configs, rest = check_words(words, list(search["space"]), "search")
    base = [w for c in configs for w in ("-c", c)] + rest
    checked = [check_cell(base, cell) for cell in corners(search["space"])]
    command = ["cli.py", "sweep", *command]
    return Plan(base, trials(search, checked[0]), settings.stale, search, command)


def plan_grid(words: list[str], settings: Settings, command: list[str]) -> Plan:
    """Check a grid's every cell; return what is to be done.

    Raises:
        ToyError: bad input in any cell.
    """
    grid, words = parse_grid(words)
    if not grid and not any(w.startswith("--gr") for w in words):
        check_words(words, ["config"], "grid")
        raise ToyError("--grid: give at least one flag to vary, such as --grid.model.mode '[regression,flow]'")
    if wrong := [v for v in grid.get("config", []) if not isinstance(v, str)]:
        raise ToyError(f"--grid.config: {wrong[0]!r} is not allowed; give names of configuration files")
    try:
        check_configs([find_config(v) for v in grid.get("config", [])])
    except ToyError as error:
        raise ToyError(f"--grid.config{str(error).removeprefix('-c')}") from None
    configs, rest = check_words(words, list(grid), "grid")
    if stray := [w for w in rest if w.split("=")[0].rpartition(".")[0].startswith("--gr")]:
        raise ToyError(f"{stray[0]}: no such flag; a grid is --grid.FLAG, such as --grid.model.mode")
    base = [w for c in configs for w in ("-c", c)] + rest
    found = cells(grid)
    if len({c.name for c in found}) < len(found):
        raise ToyError("--grid: two cells are the same; give each value once")
    tasks = [check_cell(base, cell) for cell in found]
    for task in tasks:
        is_done(task.folder, base, task.cell)
    return Plan(base, tasks, settings.stale, command=["cli.py", "sweep", *command])


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


def compare_tasks(plan: Plan) -> None:
    """Compare the cells that are done, those of each experiment by themselves."""
    from lightning_toys.commands.compare.report import compare_folder

    failed = failures(plan)
    groups: dict[Path, list[Path]] = {}
    for task in plan.tasks:
        if task.cell.name not in failed:
            groups.setdefault(task.folder.parent, []).append(task.folder)
    for folder, done in groups.items():
        compare_folder(folder, done)
