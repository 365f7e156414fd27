"""What runs a sweep's cells: this process, one after the other. Ray is in ray_engine.py."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from lightning_toys.commands.sweep.agenda import Agenda
from lightning_toys.commands.sweep.cell import run_cell
from lightning_toys.errors import note


class Engine(Protocol):
    """Runs the cells of an agenda."""

    def run(self, agenda: Agenda) -> None:
        """Run cells until none is left that nobody else holds.

        Raises:
            Stopped: a signal ended it; cells that were running have left checkpoints.
            RunFolderError: a folder cannot be written to.
        """


class InProcess:
    """Runs cells here, one after the other."""

    def run(self, agenda: Agenda) -> None:
        """See :class:`Engine`; an error that nobody foresees ends the process that it came to."""
        while order := agenda.next():
            name = order.task.cell.name
            note(f"cell {agenda.numbers[name]} of {len(agenda.plan.tasks)}: {name}{agenda.time_left()}")
            pruner = partial(agenda.chooser.prune, name) if agenda.chooser and order.prunes else None
            agenda.end(order, run_cell(order, pruner))
