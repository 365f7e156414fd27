"""A sweep's agenda: which cell is next, how each ended, how far the sweep is and how long the rest will take."""

from __future__ import annotations

import time
import uuid
from typing import Protocol

from lightning_toys.commands.sweep.cell import Cell, Order, Outcome, Plan, Task, is_settled
from lightning_toys.errors import RunFolderError, note


class Chooser(Protocol):
    """What a search adds to a sweep."""

    metric: str
    prunes: bool

    def choose(self, task: Task) -> Cell:
        """Return a trial with its flags."""

    def report(self) -> None:
        """Take note of the trials that have ended."""

    def prune(self, name: str, step: int, value: float) -> bool:
        """Take note of a trial's validation; return whether it is to stop."""


class Agenda:
    """The cells in their order.

    Args:
        plan: the sweep.
        chooser: of a search: chooses the flags of each trial when it begins.

    Attributes:
        session: names this driver.
        held: cells that other processes hold, and who.
    """

    def __init__(self, plan: Plan, chooser: Chooser | None = None) -> None:
        self.plan, self.chooser = plan, chooser
        self.session = uuid.uuid4().hex
        self.held: dict[str, str] = {}
        self.again: list[Task] = []
        self.waiting = [t for t in plan.tasks if not is_settled(t)]
        self.total, self.ended, self.started = len(self.waiting), 0, time.monotonic()
        self.numbers = {t.cell.name: k for k, t in enumerate(plan.tasks, 1)}

    def next(self) -> Order | None:
        """Return the next cell that is not settled; None where there is none."""
        while self.waiting:
            task = self.waiting.pop(0)
            if is_settled(task):  # by another driver on this folder
                self.count()
                continue
            if self.chooser:
                task = Task(self.chooser.choose(task), task.folder, task.trains)
            metric, prunes = (self.chooser.metric, self.chooser.prunes) if self.chooser else (None, False)
            return Order(self.plan.base, task, self.session, metric, prunes, self.plan.command)
        return None

    def end(self, order: Order, outcome: Outcome) -> None:
        """Take note of how a cell ended.

        Raises:
            RunFolderError: a folder cannot be written to, and the others probably neither.
        """
        name = order.task.cell.name
        self.held.pop(name, None)
        if outcome.kind == "unwritable":
            raise RunFolderError(outcome.reason)
        if outcome.kind == "held":
            note(f"skipped: {name}, which is held by {outcome.reason}")
            self.held[name] = outcome.reason
            self.again.append(order.task)
        elif outcome.kind == "lost":
            note(f"left to another: {name} ({outcome.reason})")
            self.held[name] = "another process"
            self.again.append(order.task)
        else:
            self.count()
        if self.chooser:
            self.chooser.report()

    def give_back(self, order: Order) -> None:
        """Put a cell first again: the machine that it ran on goes away."""
        self.waiting.insert(0, order.task)

    def count(self) -> None:
        """Count a cell that has ended."""
        self.ended += 1

    def second_round(self) -> bool:
        """Begin with those that others held; return whether there are any, and some time has passed over the rest."""
        passed = self.ended > 0
        self.waiting, self.again = (self.again if passed else []), []
        return bool(self.waiting)

    def time_left(self) -> str:
        """Return how long the rest will take, ``", about 3.1 min left"``; empty where that cannot be said."""
        if not self.ended:
            return ""
        left = (time.monotonic() - self.started) / self.ended * (self.total - self.ended) / 60
        return f", about {left:.1f} min left"
