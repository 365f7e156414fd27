"""sweep: every cell of a grid of flags, or the trials of a search, in this process or on Ray; resumable."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from lightning_toys.commands.sweep.agenda import Agenda
from lightning_toys.commands.sweep.cell import COMMON, Plan, check_drawn, failures, forget_failures, is_settled, verdict
from lightning_toys.commands.sweep.engine import Engine, InProcess
from lightning_toys.commands.sweep.grid import check_cell, check_words, plan_grid
from lightning_toys.commands.sweep.ray_worker import leave_group
from lightning_toys.commands.sweep.search import Search, trials
from lightning_toys.commands.sweep.search_space import corners, parse_search
from lightning_toys.commands.sweep.settings import Settings, check_ranks, parse_settings, part_flags
from lightning_toys.errors import ToyError, note
from lightning_toys.training.ownership import HeldError, acquire


def sweep_command(args: Sequence[str]) -> None:
    """Run `sweep`: check every value, run the cells that are not done and that nobody else runs, compare all.

    Raises:
        ToyError: bad input, and nothing has been run; or cells were refused while they ran.
        NonFiniteError: a cell's training blew up; the others were run all the same.
        RunFolderError: there is no room for more.
        Stopped: a signal came.
    """
    settings, words = parse_settings(args)
    check_ranks(settings)
    leave_group()
    if settings.parallel:
        from lightning_toys.commands.sweep.ray_engine import check_ray

        check_ray()
    with ExitStack() as stack:
        search = None
        if any(w.split("=")[0].partition(".")[0] == "--search" for w in words):
            plan = plan_search(words, settings, list(args))
            search = stack.enter_context(Search(plan))
        else:
            plan = plan_grid(words, list(args))
        if settings.retry:
            forget_failures(plan)
        agenda = Agenda(plan, search)
        tell_settled(plan, search is not None)
        if agenda.waiting:
            engine: Engine = stack.enter_context(engine_of(settings, plan))
            engine.run(agenda)
            if agenda.second_round():
                engine.run(agenda)
        close(agenda, search)


def engine_of(settings: Settings, plan: Plan) -> AbstractContextManager[Any]:
    """Return what runs the cells."""
    if not settings.parallel:
        return nullcontext(InProcess())
    from lightning_toys.commands.sweep.ray_engine import RayEngine

    return RayEngine(settings, plan.base)


def tell_settled(plan: Plan, searches: bool) -> None:
    """Say which cells are settled already."""
    failed = failures(plan)
    if done := sum(is_settled(t) for t in plan.tasks) - len(failed):
        note(f"{done} of {len(plan.tasks)} cells are done already")
    if failed:
        again = "" if searches else " (--sweep.retry true runs them again)"
        note(f"{len(failed)} failed before: {', '.join(failed)}{again}")


def close(agenda: Agenda, search: Search | None) -> None:
    """Compare where everything is settled; else say who is still at work."""
    plan = agenda.plan
    if left := [t.cell.name for t in plan.tasks if not is_settled(t)]:
        who = ", ".join(dict.fromkeys(agenda.held.get(n, "nobody") for n in left))
        note(
            f"{len(left)} of {len(plan.tasks)} cells are still run elsewhere ({who}); whoever ends last makes the "
            "comparison, and so does this command, given again then"
        )
        return
    if search:  # a trial that fails is an answer
        search.finish()
        check_drawn(plan)
        return
    try:
        with acquire(plan.tasks[0].folder.parent / COMMON, agenda.session):
            compare_tasks(plan)
    except HeldError:
        note("another process is making the comparison")
        return
    verdict(plan)


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
    return Plan(base, trials(search, checked[0]), search, command)


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
