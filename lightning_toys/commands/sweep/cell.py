"""A sweep's cells: what one is, how it is run, what is remembered of it, and how processes share them out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning_toys.commands.sweep.claims import STALE, Claim, ClaimLostError, look, take
from lightning_toys.commands.trainer.arguments import split_configs, without
from lightning_toys.commands.trainer.toys_cli import run_trainer, without_summary
from lightning_toys.errors import NonFiniteError, ToyError, is_disk_full, note
from lightning_toys.training.callbacks import RescueCheckpoint
from lightning_toys.training.files import write_atomic
from lightning_toys.training.run_folder import SWEEP_MARK, holds_run

CLAIMS = ".claims"  # beside the cells' folders


@dataclass(frozen=True)
class Cell:
    """One combination of the grid's values: its flags, and the configuration files stacked on the others."""

    name: str
    flags: tuple[str, ...]
    configs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A cell that has been checked, with the folder that it runs in; one without weights is tested only."""

    cell: Cell
    folder: Path
    trains: bool = True

    @property
    def claims(self) -> Path:
        """Where it is claimed."""
        return self.folder.parent / CLAIMS / self.cell.name


@dataclass(frozen=True)
class Plan:
    """What a sweep's processes share out.

    Attributes:
        base: the words that all cells have, configuration files first.
        tasks: the cells; of a search, its trials, whose flags are chosen when they are taken.
        stale: seconds without a sign of life after which a cell's holder counts as dead.
        search: the settings of a search.
        command: the user's words, for the record.
    """

    base: list[str]
    tasks: list[Task]
    stale: float = STALE
    search: dict[str, Any] | None = None
    command: list[str] = field(default_factory=list)

    def dump(self) -> str:
        """Write the plan for another process."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def load(text: str) -> Plan:
        """Read what :meth:`dump` wrote."""
        found = json.loads(text)
        tasks = []
        for t in found.pop("tasks"):
            c = t["cell"]
            cell = Cell(c["name"], tuple(c["flags"]), tuple(c["configs"]))
            tasks.append(Task(cell, Path(t["folder"]), t["trains"]))
        return Plan(tasks=tasks, **found)


class Chooser(Protocol):
    """What a search adds to a sweep."""

    def choose(self, task: Task) -> Cell:
        """Return a trial with its flags."""

    def report(self) -> None:
        """Take note of the trials that have ended."""

    def judge(self, folder: Path) -> None:
        """Raise where a trial's results are of no use."""


def fingerprint(base: Sequence[str], cell: Cell) -> list[str]:
    """Return what a cell is run with: its words, with the files' contents in place of their names.

    Without ``--data.num_workers``, which changes no number: another machine may go on with other processes.
    """
    configs, rest = split_configs(list(base))
    return [
        *(Path(c).read_text() for c in (*configs, *cell.configs)),
        *without(rest, "--data.num_workers"),
        *cell.flags,
    ]


def read_mark(folder: Path) -> dict[str, Any]:
    """Return what is remembered of a cell: ``flags``, ``done``, ``failed``; empty where it was never started."""
    try:
        found = json.loads((folder / SWEEP_MARK).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
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


def is_done(folder: Path, base: Sequence[str], cell: Cell) -> bool:
    """Whether the cell was run to its end.

    Raises:
        ToyError: the folder holds a cell that was started with other flags or files.
    """
    mark, wanted = read_mark(folder), fingerprint(base, cell)
    if mark.get("flags", wanted) != wanted:
        raise ToyError(f"--run.variant: {folder} was swept with other settings; give another --run.variant")
    return bool(mark.get("done"))


def settled(task: Task) -> bool:
    """Whether nothing is left to do for a cell: it is done, or failed."""
    mark = read_mark(task.folder)
    return bool(mark.get("done") or mark.get("failed"))


def run_cell(
    run: Callable[[list[str]], Any], task: Task, base: Sequence[str], cell: Cell, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fit a cell, from its last checkpoint where there is one, and test it; return the mark of one that is done."""
    folder = task.folder
    words = [*stacked(base, cell), "--run.name", cell.name]
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
    mark = {"flags": fingerprint(base, cell), "done": False, **(extra or {})}
    write_mark(folder, mark)
    if task.trains:
        with without_summary():
            run(["fit", *words, *resume])
    run(["test", *words, *(("--ckpt_path", "last") if task.trains else ())])
    return {**mark, "done": True}


def stacked(base: Sequence[str], cell: Cell) -> list[str]:
    """Return a cell's words: the files that all have, its own files, the flags that all have, its own flags."""
    configs, rest = split_configs(list(base))
    return [*(w for c in (*configs, *cell.configs) for w in ("-c", c)), *rest, *cell.flags]


def work(plan: Plan, chooser: Chooser | None = None, guess: bool = True) -> None:
    """Take and run cells that nobody else holds, until there are none; ``guess`` how long it will take.

    Raises:
        ToyError: a cell's folder was swept with other settings.
    """
    started = time.monotonic()
    left = [i for i, t in enumerate(plan.tasks) if not settled(t)]
    total, busy = len(left), True
    while busy:  # until a whole round finds nothing to take
        busy = False
        for i in list(left):
            task = plan.tasks[i]
            claim = None if settled(task) else take(task.claims, plan.stale)
            if claim is None:
                continue
            try:
                if settled(task):  # since we looked
                    continue
                busy = True
                left = [j for j in left if not settled(plan.tasks[j])]
                gone = total - len(left)
                eta = (time.monotonic() - started) / gone * len(left) / 60 if gone and guess else None
                note(
                    f"cell {i + 1} of {len(plan.tasks)}: {task.cell.name}"
                    + (f", about {eta:.1f} min left" if eta is not None else "")
                )
                if claim.before.holder is not None:
                    note(f"{claim.before.who} had started it and gives no more signs of life")
                hold(plan, task, claim, run_trainer, chooser)
            finally:
                claim.release()
        left = [j for j in left if not settled(plan.tasks[j])]


def hold(plan: Plan, task: Task, claim: Claim, run: Callable[[list[str]], Any], chooser: Chooser | None = None) -> None:
    """Run a cell that we hold, and remember how it ended."""
    failed: dict[str, str] = {}
    RescueCheckpoint.guard = claim.check
    try:
        cell = chooser.choose(task) if chooser else task.cell
        kept = {k: v for k, v in read_mark(task.folder).items() if k in ("trial", "params")}
        mark = run_cell(run, task, plan.base, cell, kept)
        if chooser:
            chooser.judge(task.folder)
        claim.check()
        write_mark(task.folder, mark)
    except ClaimLostError as error:
        note(f"left to another: {task.cell.name} ({error})")
    except NonFiniteError as error:
        failed = {"kind": "non-finite", "reason": str(error)}
    except ToyError as error:
        failed = {"kind": "refused", "reason": str(error)}
    except Exception as error:
        if not is_disk_full(error):  # which is not the cell's fault: once there is room, it goes on
            failed = {"kind": "crashed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        raise
    finally:
        RescueCheckpoint.guard = None
        claim.touch()
        if failed and not claim.lost:  # so that no other process tries it again
            note(f"error: {failed['reason']} (in the cell {task.cell.name})")
            write_mark(task.folder, {**read_mark(task.folder), "failed": failed})
    if chooser:
        chooser.report()


def forget_failures(plan: Plan) -> None:
    """Let cells that failed be run again, those that nobody holds."""
    for task in plan.tasks:
        if read_mark(task.folder).get("failed") and (claim := take(task.claims, plan.stale)):
            try:
                mark = read_mark(task.folder)
                mark.pop("failed", None)
                write_mark(task.folder, mark)
            finally:
                claim.release()


def failures(plan: Plan) -> dict[str, dict[str, str]]:
    """Return the cells that failed, with kind and reason."""
    marks = {t.cell.name: read_mark(t.folder).get("failed") for t in plan.tasks}
    return {name: failed for name, failed in marks.items() if failed}


def holders(plan: Plan) -> tuple[list[str], int]:
    """Return who holds the cells that are not settled, and how many of those nobody holds."""
    found, free = [], 0
    for task in plan.tasks:
        if not settled(task):
            link = look(task.claims)
            if link.held(plan.stale):
                found.append(link.who)
            elif not settled(task):  # it ended while we looked
                free += 1
    return found, free


def verdict(plan: Plan) -> None:
    """End a sweep, all of whose cells are settled.

    Raises:
        NonFiniteError: a cell's training blew up, or it crashed.
        ToyError: cells were refused.
    """
    failed = failures(plan)
    if not failed:
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
