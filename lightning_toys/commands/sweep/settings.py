"""The sweep's own flags: ``--sweep.*``, and how ``--PREFIX.NAME TEXT`` is parted from the other words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_toys.commands.strict_yaml import read_word
from lightning_toys.errors import ToyError, did_you_mean, process_rank

GONE = {
    "devices": "Ray shares the GPUs out; give --sweep.jobs N, and CUDA_VISIBLE_DEVICES=0,1 before the command for some",
    "stale": "is no setting any more; leave it out: a run folder's owner that died is seen without it",
}


@dataclass(frozen=True)
class Settings:
    """The ``--sweep.*`` flags.

    Attributes:
        jobs: cells at a time.
        address: of a Ray cluster, ``auto`` or HOST:PORT; None for Ray on this machine.
        cpus: of a cell.
        gpus: of a cell.
        dashboard: whether to start Ray's.
        retry: whether cells that failed are run again.
    """

    jobs: int | None = None
    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None
    dashboard: bool = False
    retry: bool = False

    @property
    def parallel(self) -> bool:
        """Whether Ray runs the cells."""
        return self.address is not None or (self.jobs or 1) > 1


def is_share(value: Any, least: float) -> bool:
    """Whether something is a part of one, or a whole number, as Ray wants it."""
    if type(value) not in (int, float) or not least <= value <= 1e6:  # nor nan
        return False
    return bool(value <= 1 or value == int(value))


def is_address(value: Any) -> bool:
    """Whether something is ``auto`` or HOST:PORT."""
    match = re.fullmatch(r"[^\s:/]+:(\d{1,5})", value) if isinstance(value, str) else None
    return value == "auto" or (match is not None and 0 < int(match[1]) < 65536)


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "jobs": (lambda v: type(v) is int and 1 <= v <= 100_000, "an integer from 1 to 100000"),
    "address": (is_address, "auto, or HOST:PORT of a Ray cluster"),
    "cpus": (lambda v: is_share(v, 0.001), "CPUs for each cell: a whole number, or a fraction of one"),
    "gpus": (lambda v: is_share(v, 0), "GPUs for each cell: a whole number, or a fraction of one"),
    "dashboard": (lambda v: type(v) is bool, "true or false"),
    "retry": (lambda v: type(v) is bool, "true or false"),
}


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


def parse_settings(words: Sequence[str]) -> tuple[Settings, list[str]]:
    """Part the sweep's own flags from the other words.

    Raises:
        ToyError: there is no such flag, its value is not allowed, or it would do nothing.
    """
    found, rest = part_flags(words, "sweep", "--sweep.jobs 4")
    given: dict[str, Any] = {}
    for name, text in found.items():
        if name in GONE:
            raise ToyError(f"--sweep.{name}: {GONE[name]}")
        if name not in CHECKS:
            raise ToyError(
                f"--sweep.{name}: no such flag; give one of {', '.join(CHECKS)}{did_you_mean(name, list(CHECKS))}"
            )
        # an address looks like an integer of base 60 to YAML
        value = text if name == "address" else read_word(text)
        allowed, what = CHECKS[name]
        if not allowed(value):
            raise ToyError(f"--sweep.{name}: {text!r} is not allowed; give {what}")
        given[name] = value
    settings = Settings(**given)
    unused = [k for k in ("cpus", "gpus", "dashboard") if k in given and not settings.parallel]
    if unused:
        raise ToyError(
            f"--sweep.{unused[0]}: does nothing in one process; give --sweep.jobs N (> 1) or --sweep.address"
        )
    if settings.dashboard and settings.address:
        raise ToyError("--sweep.dashboard: is for Ray on this machine; a cluster's is started by `ray start --head`")
    return settings, rest


SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def check_ranks(settings: Settings) -> None:
    """Refuse to be one of several ranks of a launcher: each would be a sweep of its own.

    Under ``ray symmetric-run`` the ranks are nodes of a cluster, and the first alone is given the command.

    Raises:
        ToyError: there are several. SystemExit 2 on all ranks but the first, so that it is said once.
    """
    sizes = [os.environ[v] for v in SIZES if v in os.environ]
    count = next((int(s) for s in sizes if s.isdecimal()), 1)
    if count == 1 or settings.address is not None:
        return
    if process_rank() > 0:
        raise SystemExit(2)
    raise ToyError(
        f"sweep: {count} ranks of it were started, and one is wanted; give --sweep.jobs N without a launcher, or on "
        "several nodes `srun ray symmetric-run` with --sweep.address auto (docs/scale.md)"
    )
