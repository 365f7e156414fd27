"""Data of somebody's own, and what is measured on any data: a trial before any work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_toys.errors import require
from lightning_toys.flow_vs_regression.data import PointData, Points
from lightning_toys.flow_vs_regression.metrics import compute_metrics
from lightning_toys.flow_vs_regression.own import Metric, check_extra_metrics, check_metrics
from lightning_toys.flow_vs_regression.targets import Target
from lightning_toys.flow_vs_regression.units import Units, unfit_units
from lightning_toys.training.own_classes import attempt, is_own, require_methods

VALIDATION_POINTS = 1000  # at most, see :meth:`PointData.val_dataloader`
OTHER_METRICS = ("evaluations", "spread")  # names that the module's own evaluation gives


def shape_of(value: Any) -> str:
    """Return a value's shape in words, or its type where it is no tensor."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def require_tensor(where: str, value: Any, shape: tuple[int | None, ...], letters: str) -> None:
    """Refuse what is no float64 tensor of finite numbers of that shape, in which None stands for any length.

    Raises:
        ToyError: names the value and what is wrong.
    """
    fits = isinstance(value, Tensor) and value.dim() == len(shape)
    fits = fits and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
    wanted = ", ".join(letter if n is None else str(n) for n, letter in zip(shape, letters.split(), strict=True))
    require(fits, f"{where} has shape {shape_of(value)}; give ({wanted})")
    require(value.dtype == torch.float64, f"{where} is {value.dtype}; give torch.float64")
    require(bool(value.isfinite().all()), f"{where} is not finite")


def check_data(data: PointData, seeds: Sequence[int]) -> None:
    """Hold data of somebody's own to their contract, see :class:`PointData`; of the others, their target's values.

    Args:
        data: what a module is to learn from.
        seeds: one a replica.

    Raises:
        ToyError: names the class and what is wrong.
    """
    if is_own(data):
        where = f"--data: {type(data).__name__}"
        require_methods("--data", data, PointData, "points", "evaluation_points", "baseline_rows")
        check_attributes(where, data)
        check_points(where, data, seeds)
        check_evaluation(where, data, seeds)
    elif data.target is not None and is_own(data.target):
        where = f"--data.target: {type(data.target).__name__}.__call__"
        for c, x1 in (data.points(seeds)[:2], data.evaluation_points()):
            wrong = ~x1.isfinite().all(-1)
            require(not bool(wrong.any()), f"{where} is not finite at c = {c[wrong][:1].flatten().tolist()}")


def check_attributes(where: str, data: PointData) -> None:
    """Refuse attributes of data that are none of their kind, see :class:`PointData`."""
    for name, least in (("condition_dim", 1), ("output_dim", 1), ("num_holdout", 0)):
        given = getattr(data, name, None)
        whole = isinstance(given, int) and given >= least
        require(whole, f"{where}.{name}: {given!r} is not allowed; give an integer >= {least}")
    C, D = data.condition_dim, data.output_dim
    names = list(data.condition_names)
    require(len(names) == C, f"{where}.condition_names: {names} is not allowed; give condition_dim = {C} names")
    names = list(data.output_names)
    require(len(names) in (0, D), f"{where}.output_names: {names} is not allowed; give output_dim = {D} names, or none")
    target = data.target
    known = target is None or (isinstance(target, Target) and C == 1 and getattr(target, "dim", None) == D)
    require(known, f"{where}.target: {target!r} is not allowed; give a Target with dim {D} of one input, or None")
    units = data.units
    require(
        units is None or isinstance(units, Units), f"{where}.units: {units!r} is not allowed; give Units(...), or None"
    )
    why = unfit_units(None if units is None else units._asdict(), C, D)
    require(not why, f"{where}.{why.removeprefix('sizes.')}")


def check_points(where: str, data: PointData, seeds: Sequence[int]) -> None:
    """Hold the points that are learned from to their contract."""
    R, C, D, H = len(seeds), data.condition_dim, data.output_dim, data.num_holdout
    of = f"{where}.points"
    points = attempt(of, partial(data.points, seeds))
    require(isinstance(points, Points), f"{of} gives {shape_of(points)}; give Points(c, x1, holdout_c, holdout_x1)")
    require_tensor(f"{of}: c", points.c, (R, None, C), "R N C")
    N = points.c.shape[1]
    require(N >= 1, f"{of} gives no points to learn from")
    require_tensor(f"{of}: x1", points.x1, (R, N, D), "R N D")
    require_tensor(f"{of}: holdout_c, of num_holdout = {H},", points.holdout_c, (R, H, C), "R H C")
    require_tensor(f"{of}: holdout_x1, of num_holdout = {H},", points.holdout_x1, (R, H, D), "R H D")
    alone = attempt(of, partial(data.points, seeds[-1:]))
    same = isinstance(alone, Points) and all(torch.equal(a[-1:], b) for a, b in zip(points, alone, strict=True))
    require(same, f"{of}: those of a replica depend on more than its seed; draw by keyed_generator")
    of = f"{where}.train_columns"
    columns = attempt(of, partial(data.train_columns, seeds))
    pair = isinstance(columns, tuple) and len(columns) == 2 and all(isinstance(x, Tensor) for x in columns)
    fits = pair and all(x.dim() == 3 and len(x) == R for x in columns)
    fits = fits and columns[0].shape[1] == columns[1].shape[1] and [x.shape[2] for x in columns] == [C, D]
    require(fits, f"{of} gives other shapes than c ({R}, N, {C}) and x1 ({R}, N, {D})")


def check_evaluation(where: str, data: PointData, seeds: Sequence[int]) -> None:
    """Hold what predictions are judged by to its contract: points, their values, and baselines there."""
    C, D = data.condition_dim, data.output_dim
    of = f"{where}.evaluation_points"
    for most in (None, VALIDATION_POINTS):
        pair = attempt(of, partial(data.evaluation_points, most))
        require(isinstance(pair, tuple) and len(pair) == 2, f"{of} gives {shape_of(pair)}; give c (M, C), x1 (M, D)")
        c, truth = pair
        require_tensor(f"{of}: c", c, (None, C), "M C")
        require(len(c) >= 1, f"{of} gives no points to judge at")
        require_tensor(f"{of}: the value", truth, (len(c), D), "M D")
        require(most is None or len(c) <= most, f"{of}({most}) gives {len(c)} points; give at most {most}")
    of = f"{where}.baseline_rows"
    rows = attempt(of, partial(data.baselines, seeds, c))  # kept for the first validation, which is at these points
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    require(listed, f"{of} gives {shape_of(rows)}; give a list of dicts")
    count = len(rows) in (1, len(seeds))
    require(count, f"{of} gives {len(rows)} dicts for {len(seeds)} replicas; give one a replica, or a single one")
    for row in rows:
        require(row.keys() == rows[0].keys(), f"{of} names {[*row]} for one replica and {[*rows[0]]} for another")
        for name, values in row.items():
            fits = isinstance(values, Tensor) and values.is_floating_point()
            fits = isinstance(name, str) and fits and values.shape == (1, 1, len(c), D)
            require(fits, f"{of}: {name!r} has shape {shape_of(values)}; give (1, 1, {len(c)}, {D})")


def check_measures(metrics: Sequence[Metric], data: PointData) -> None:
    """Refuse so few evaluation points that a metric has none to be measured at, and metrics that break their contract.

    Args:
        metrics: of somebody's own; the target's own are tried too.
        data: what they are measured on.

    Raises:
        ToyError: names the flag or the class, and what is wrong.
    """
    c, truth = data.evaluation_points(VALIDATION_POINTS)
    scalars, arrays = compute_metrics(truth.expand(1, 1, -1, -1), truth, c, data.target)
    empty = [name for name, v in (scalars | arrays).items() if bool(v.isnan().any())]
    words = f"{len(c)} points leave {' and '.join(empty)} without a value, at intervals or boundaries without a point"
    require(not empty, f"--data.num_eval: {words}; give more")
    taken, target = [*scalars, *OTHER_METRICS], data.target
    # the names of a shipped target's matter to those beside them alone
    if (
        isinstance(target, Target)
        and type(target).extra_metrics is not Target.extra_metrics
        and (metrics or is_own(target))
    ):
        taken += check_extra_metrics(target, taken, truth, c)
    if metrics:
        check_metrics(metrics, taken, truth[:8], c[:8])
