"""Guidance rules at every schedule, process and scale, by exact distributions: default, best, and scale 1.

``python -m lightning_toys.mirror_descent.guidance_grid`` prints the tables. In the linear-Gaussian problem a guided
reverse process ends at a Gaussian that is known, so that nothing is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_toys.mirror_descent.guidance import (
    DiffusionPosteriorSampling,
    GuidanceRule,
    ProductOfExperts,
    TrainingFreeGuidance,
)
from lightning_toys.mirror_descent.joint import LinearGaussianJoint, gaussian_kl
from lightning_toys.mirror_descent.predictors import Predictor
from lightning_toys.mirror_descent.printed_table import print_table
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.schedules import Constant, LateConstant, LateRamp, Linear, Schedule, SigmaPower
from lightning_toys.mirror_descent.tilt import StateReward

RULES: Sequence[type[GuidanceRule]] = (ProductOfExperts, DiffusionPosteriorSampling, TrainingFreeGuidance)
SCHEDULES: Sequence[Schedule] = (Linear(), Constant(), LateConstant(), LateRamp(), SigmaPower())
SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
PROCESSES = ("sde", "ode")


class Setting(NamedTuple):
    """A cell of the grid, and what it comes to.

    Attributes:
        schedule: the schedule's name.
        scale: the guidance scale.
        kl: joint KL to the target (nats), exact.
        mean: of the action.
        slope: of s' on it.
    """

    schedule: str
    scale: float
    kl: float
    mean: float
    slope: float


def problem_of(levels: int) -> Problem:
    """Return the problem of configs/mirror_descent/analytic.yaml with so many levels of the reverse processes."""
    return Problem(LinearGaussianJoint(), StateReward(), Linear(), 1.5, Settings(predictor_K=levels))


def settings_of(problem: Problem, rule: type[GuidanceRule], process: str) -> Iterator[Setting]:
    """Yield the cells of a rule and a process."""
    target = problem.tilted_joint
    for schedule, scale in itertools.product(SCHEDULES, SCALES):
        sampler = Predictor(replace(problem, schedule=schedule), process, rule, scale=scale)  # type: ignore[arg-type]
        x = sampler.exact_distribution()
        assert x is not None
        kl = gaussian_kl(x.m, x.C, target.m, target.C)
        yield Setting(type(schedule).__name__, scale, kl, float(x.m[0]), x.rho)


def table(levels: int = 200) -> list[str]:
    """Return the lines of two Markdown tables: of each rule and process the default and the cell of least KL; and scale
    1 at each schedule.
    """
    problem = problem_of(levels)
    lines = [
        f"Exact distributions, {levels} levels; default: Linear, scale 1; the best of {len(SCHEDULES)} schedules and "
        f"{len(SCALES)} scales from {SCALES[0]:g} to {SCALES[-1]:g}.",
        "",
        "| rule | process | joint KL, default | least joint KL | schedule | scale | mean there | slope of s' there |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    plain = []
    for rule, process in itertools.product(RULES, PROCESSES):
        cells = list(settings_of(problem, rule, process))
        plain.append(
            f"| {rule.name} | {process.upper()} | {' | '.join(f'{c.kl:.3g}' for c in cells if c.scale == 1)} |"
        )
        default = next(c for c in cells if (c.schedule, c.scale) == ("Linear", 1.0))
        best = min(cells, key=lambda c: c.kl)
        lines.append(
            f"| {rule.name} | {process.upper()} | {default.kl:.3g} | {best.kl:.3g} | {best.schedule} | {best.scale:g} "
            f"| {best.mean:.4f} | {best.slope:.4f} |"
        )
    names = [type(schedule).__name__ for schedule in SCHEDULES]
    heads = ["", f"| joint KL at scale 1 | process | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
    return [*lines, *heads, *plain]


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; with ``--out FILE`` write it there too, where no file is yet. Return the exit code."""
    return print_table(table, __doc__, args)


if __name__ == "__main__":
    raise SystemExit(main())
