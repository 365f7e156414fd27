"""A sweep's cells: what one is, how it is run by the process that owns its folder, and what is remembered of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_toys.commands.sweep.pruning import PrunedError, Pruner, pruning
from lightning_toys.commands.trainer.arguments import split_configs, without
from lightning_toys.commands.trainer.surroundings import without_summary
from lightning_toys.commands.trainer.toys_cli import run_trainer
from lightning_toys.errors import (
    FiguresError,
    NonFiniteError,
    OwnershipLostError,
    RunFolderError,
    ToyError,
    is_disk_full,
    note,
    one_line,
)
from lightning_toys.training.files import write_atomic
from lightning_toys.training.ownership import HeldError, acquire, last_record
from lightning_toys.training.run_folder import SWEEP_MARK

COMMON = ".sweep"  # beside the cells' folders: whoever owns it makes the comparison, or drives the search


@dataclass(frozen=True)
class Cell:
    """One combination of the grid's values: its flags, and the configuration files stacked on the others."""

    name: str
    flags: tuple[str, ...]
    configs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A cell with the folder that it runs in; one without weights is tested only."""

    cell: Cell
    folder: Path
    trains: bool = True


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do.

    Attributes:
        base: the words that all cells have, configuration files first.
        tasks: the cells; of a search, its trials, whose flags are chosen when they begin.
        search: the settings of a search.
        command: the user's words, for the record.
    """

    base: list[str]
    tasks: list[Task]
    search: dict[str, Any] | None = None
    command: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Order:
    """All that a process needs to run one cell.

    Attributes:
        base: the words that all cells have.
        task: the cell, its flags chosen.
        session: names the sweep's driver. An owner of the same session is taken over at once: the driver gives a cell
            out again only when its former process is lost.
        metric: of a search; what its trials are judged by.
        prunes: whether validations are to be reported, and may end the trial.
        command: the user's words, for the record.
    """

    base: list[str]
    task: Task
    session: str
    metric: str | None = None
    prunes: bool = False
    command: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How an order ended.

    Attributes:
        kind: ``done``, ``pruned``, ``settled`` (by somebody else), ``held`` or ``lost`` (to another process),
            ``stopped`` (by a signal), ``unwritable`` (its folder), or why it failed: ``non-finite``, ``refused``,
            ``crashed``.
        reason: in words.
    """

    kind: str
    reason: str = ""


def fingerprint(base: Sequence[str], cell: Cell, read: Callable[[str], str] | None = None) -> list[str]:
    """Return what a cell is run with: its words, with the files' contents in place of their names.

    Without ``--data.num_workers``, which changes no number: another machine may go on with other processes.

    Args:
        base: the words that all cells have.
        cell: the cell.
        read: reads a file; a planner of many cells gives one that remembers.
    """
    configs, rest = split_configs(list(base))
    return [
        *((read or read_file)(c) for c in (*configs, *cell.configs)),
        *without(rest, "--data.num_workers"),
        *cell.flags,
    ]


def read_file(name: str) -> str:
    """Return a file's text."""
    return Path(name).read_text()


def read_mark(folder: Path) -> dict[str, Any]:
    """Return what is remembered of a cell: ``flags``, ``done``, ``failed``; empty where it was never started."""
    try:
        found = json.loads((folder / SWEEP_MARK).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not {"flags", "trial"} & set(found):
        raise ToyError(
            f"{folder / SWEEP_MARK}: is not what a sweep writes; move the folder away, or give --run.variant"
        )
    return found


def write_mark(folder: Path, mark: dict[str, Any]) -> None:
    """Remember something of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SWEEP_MARK, json.dumps(mark, indent=1))


def is_settled(task: Task) -> bool:
    """Whether nothing is left to do for a cell: it is done, was pruned, or failed."""
    return bool({"done", "pruned", "failed"} & {k for k, v in read_mark(task.folder).items() if v})


def stacked(base: Sequence[str], cell: Cell) -> list[str]:
    """Return a cell's words: the files that all have, its own files, the flags that all have, its own flags."""
    configs, rest = split_configs(list(base))
    return [*(w for c in (*configs, *cell.configs) for w in ("-c", c)), *rest, *cell.flags]


def run_cell(order: Order, pruner: Pruner | None = None) -> Outcome:
    """Run a cell from its last checkpoint, if there is one, and remember how it ended.

    Args:
        order: the cell.
        pruner: is told the metric of each validation, and says whether to stop there.

    Raises:
        Exception: what nobody foresees, once it has been noted in the cell's mark; and what is no fault of the cell.
    """
    task = order.task
    try:
        with acquire(task.folder, order.session):
            return Outcome("settled") if is_settled(task) else run_owned(order, pruner)
    except HeldError:
        return Outcome("held", last_record(task.folder).who)
    except OwnershipLostError as error:
        return Outcome("lost", str(error))


def run_owned(order: Order, pruner: Pruner | None) -> Outcome:
    """See :func:`run_cell`; the cell's folder is this process's."""
    task, folder = order.task, order.task.folder
    kept = {k: v for k, v in read_mark(folder).items() if k in ("trial", "params")}
    mark = {"flags": fingerprint(order.base, task.cell), "done": False, **kept}
    write_mark(folder, mark)
    failed: dict[str, str] = {}
    try:
        undrawn = fit_and_test(order, pruner)
        write_mark(folder, {**mark, "done": True, **({"undrawn": undrawn} if undrawn else {})})
        return Outcome("done")
    except PrunedError as stop:
        write_mark(folder, {**mark, "pruned": {"step": stop.step, "value": stop.value}})
        note(f"pruned at step {stop.step}: {order.metric} {stop.value:.4g}")
        return Outcome("pruned", f"at step {stop.step}")
    except NonFiniteError as error:
        failed = {"kind": "non-finite", "reason": str(error)}
    except ToyError as error:
        failed = {"kind": "refused", "reason": str(error)}
    except (OwnershipLostError, RunFolderError):
        raise
    except Exception as error:
        if not is_disk_full(error):  # which is no fault of the cell's: once there is room, it goes on
            fail(task, {"kind": "crashed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        raise
    fail(task, failed)
    return Outcome(failed["kind"], failed["reason"])


def fit_and_test(order: Order, pruner: Pruner | None) -> str:
    """Fit a cell and test it; of a trial, see that there is something to judge it by. Return what was not drawn."""
    task = order.task
    words = [*stacked(order.base, task.cell), "--run.name", task.cell.name]
    undrawn = []
    if task.trains:
        watch = pruning(pruner, order.metric) if pruner and order.metric else nullcontext()
        with without_summary(), watch:
            undrawn.append(run_but_figures(["fit", *words, "--ckpt_path", "auto"], task))
    undrawn.append(run_but_figures(["test", *words, *(("--ckpt_path", "last") if task.trains else ())], task))
    if order.metric:
        judge(task.folder, order.metric)
    return "; ".join(filter(None, undrawn))


def run_but_figures(words: Sequence[str], task: Task) -> str:
    """Run a cell's verb; pictures that cannot be drawn are told of, and no reason to be without the cell's numbers.

    Returns:
        what of them could not be drawn; empty if nothing.
    """
    try:
        run_trainer(words)
    except FiguresError as error:
        note(f"error: {one_line(error)} (in the cell {task.cell.name})")
        return one_line(error)
    return ""


def judge(folder: Path, metric: str) -> None:
    """Look at a trial's results.

    Raises:
        ToyError: they lack the metric.
        NonFiniteError: a replica's value is not finite.
    """
    found = metrics(folder)
    if metric not in found:
        raise ToyError(f"--search.metric: no {metric!r} in results.json; give one of {', '.join(found)}")
    if None in found[metric]["values"]:
        raise NonFiniteError(f"{metric} is not finite in every replica")


def metrics(folder: Path) -> dict[str, Any]:
    """Return the metrics of a results.json."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    return found


def fail(task: Task, failed: dict[str, str]) -> None:
    """Note that a cell failed, so that nobody tries it again unasked."""
    note(f"error: {failed['reason']} (in the cell {task.cell.name})")
    write_mark(task.folder, {**read_mark(task.folder), "failed": failed})


def forget_failures(plan: Plan) -> None:
    """Let cells that failed, or lack figures, be run again, those that nobody holds."""
    for task in plan.tasks:
        if not {"failed", "undrawn"} & read_mark(task.folder).keys():
            continue
        try:
            with acquire(task.folder):
                mark = read_mark(task.folder)
                mark.pop("failed", None)
                if mark.pop("undrawn", None):
                    mark["done"] = False
                write_mark(task.folder, mark)
        except HeldError:
            note(f"not run again, held by {last_record(task.folder).who}: {task.cell.name}")


def failures(plan: Plan) -> dict[str, dict[str, str]]:
    """Return the cells that failed, with kind and reason."""
    marks = {t.cell.name: read_mark(t.folder).get("failed") for t in plan.tasks}
    return {name: failed for name, failed in marks.items() if failed}


def check_drawn(plan: Plan, what_next: str = "") -> None:
    """End what has run all its cells with an error where figures are missing.

    Raises:
        FiguresError: says of which cells.
    """
    if undrawn := [t.cell.name for t in plan.tasks if read_mark(t.folder).get("undrawn")]:
        which = f"figures of {len(undrawn)} of {len(plan.tasks)} cells could not be drawn: {', '.join(undrawn)}"
        raise FiguresError(f"{which}; their numbers are whole{what_next}")


def verdict(plan: Plan) -> None:
    """End a sweep, all of whose cells are settled.

    Raises:
        NonFiniteError: a cell's training blew up, or it crashed.
        ToyError: cells were refused.
        FiguresError: all cells are done, but figures of some could not be drawn.
    """
    failed = failures(plan)
    if not failed:
        check_drawn(plan, " (--sweep.retry true runs them again)")
        return
    verbs = {"non-finite": "went non-finite", "crashed": "crashed", "refused": "were refused"}
    parts = []
    for kind, verb in verbs.items():
        if names := [n for n, f in failed.items() if f["kind"] == kind]:
            parts.append(f"{len(names)} of {len(plan.tasks)} cells {verb}: {', '.join(names)}")
    text = "; ".join(parts) + " (--sweep.retry true runs them again)"
    if {f["kind"] for f in failed.values()} == {"refused"}:
        raise ToyError(text)
    raise NonFiniteError(text)
