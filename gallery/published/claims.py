"""The report's five claims as families of comparisons, fixed before any of our numbers was looked at.

Each is read as "A's error is smaller than B's", for pairs of cells and metrics. The metrics are the report's own
headline of each task. A comparison of modes is made for each network apart, its errors averaged over both training
losses (geometric mean, seed by seed), but for reconstruction, where the claim is about the best, which is L2's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from gallery.published.record import LOSSES, METRICS, MODES, NETWORKS, Cell, cells
from gallery.verdicts import Comparison, Ratio, geometric_mean, paired_ratio, welch_ratio

Values = Mapping[int, float]
Source = Callable[[Cell, str, Collection[str]], Values]  # (cell, metric, what is mended) to seed to value

# what is mended: the metrics' Gaussian start, the misplaced f*, a flow's single step, the last step's weights
MENDS = {
    "x0": "the Gaussian x0",
    "truth": "the misplaced f*",
    "steps": "a single Euler step",
    "weights": "the last step's weights",
}
HEADLINES = {"reconstruction": "l2", "piecewise": "boundary", "rotation": "perpendicular_mean"}
GEOMETRY = (
    ("piecewise", "subspace_diagonal"),
    ("piecewise", "boundary"),
    ("rotation", "perpendicular_mean"),
)
# signed, so without a logarithm; and the truth itself scores .034
SIGNED = ("cosine_mean", "cosine_min")
COMPARED = tuple((task, metric) for task, metrics in METRICS.items() for metric in metrics if metric not in SIGNED)


@dataclass(frozen=True)
class Pair:
    """A is said to have a smaller error than B.

    Attributes:
        label: of the pair, as a table says it.
        metric: by which.
        a: cells whose errors are averaged, seed by seed.
        b: likewise.
        a_metric: of A where it is another readout's; else ``metric``.
        b_metric: likewise of B.
    """

    label: str
    metric: str
    a: tuple[Cell, ...]
    b: tuple[Cell, ...]
    b_metric: str = ""

    @property
    def is_published(self) -> bool:
        """Whether both sides are in the published record."""
        return not self.b_metric


@dataclass(frozen=True)
class Claim:
    """A sentence of the report, the comparisons that it means, and whether a tie is enough for it."""

    text: str
    pairs: tuple[Pair, ...]
    ties_hold: bool = False


def both_losses(task: str, network: str, mode: str) -> tuple[Cell, ...]:
    """Return a mode's cells of both training losses."""
    return tuple(Cell(task, loss, network, mode) for loss in LOSSES)


def geometry_pairs() -> Iterator[Pair]:
    """Each mode that is not regression, against regression."""
    for (task, metric), network, mode in product(GEOMETRY, NETWORKS, MODES[1:]):
        a, b = both_losses(task, network, mode), both_losses(task, network, "regression")
        yield Pair(f"{task} {metric}, {network}: {mode} / regression", metric, a, b)


def reconstruction_pairs() -> Iterator[Pair]:
    """Regression against each other mode, trained with L2."""
    for network, mode in product(NETWORKS, MODES[1:]):
        a, b = (Cell("reconstruction", "l2", network, m) for m in ("regression", mode))
        yield Pair(f"reconstruction l2, {network}: regression / {mode}", "l2", (a,), (b,))


def best_pairs() -> Iterator[Pair]:
    """straight_flow, FiLM, L1 against each of the 19 other cells, in boundary and in perpendicular share."""
    for task in ("piecewise", "rotation"):
        best, metric = Cell(task, "l1", "film", "straight_flow"), HEADLINES[task]
        for other in cells(task):
            if other != best:
                name = f"{other.mode} {other.network} {other.loss}"
                yield Pair(f"{task} {metric}: straight_flow film l1 / {name}", metric, (best,), (other,))


def loss_pairs() -> Iterator[Pair]:
    """L2's flows against L1's: the claim's argument is that L1 does not train a flow."""
    for (task, metric), network, mode in product(HEADLINES.items(), NETWORKS, ("flow", "straight_flow")):
        a, b = (Cell(task, loss, network, mode) for loss in ("l2", "l1"))
        yield Pair(f"{task} {metric}, {network} {mode}: trained with L2 / L1", metric, (a,), (b,))


def time_pairs() -> Iterator[Pair]:
    """straight_flow, without time, against flow; mip's one step without time against the first step of mip's network.

    The second is ours alone: the first step of mip's network was not published.
    """
    for (task, metric), network in product(HEADLINES.items(), NETWORKS):
        a, b = (both_losses(task, network, mode) for mode in ("straight_flow", "flow"))
        yield Pair(f"{task} {metric}, {network}: straight_flow / flow", metric, a, b)
        a, b = (both_losses(task, network, mode) for mode in ("mip_one_step", "mip"))
        yield Pair(f"{task} {metric}, {network}: mip_one_step / first step of mip", metric, a, b, f"{metric}#one-step")


CLAIMS = (
    Claim("flows beat regression on geometry", tuple(geometry_pairs())),
    Claim("regression is best at reconstruction", tuple(reconstruction_pairs())),
    Claim("straight_flow, FiLM, L1 is best in boundary and in perpendicular", tuple(best_pairs())),
    Claim("training a flow with L1 lacks grounds", tuple(loss_pairs())),
    Claim("time conditioning is not needed", tuple(time_pairs()), ties_hold=True),
)


def averaged(found: Sequence[Values]) -> dict[int, float]:
    """Return the geometric mean over cells, for the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(x) for x in found)))
    if len(found) == 1:
        return {s: found[0][s] for s in seeds}
    return {s: geometric_mean([x[s] for x in found]) for s in seeds}


def sides(pair: Pair, source: Source, mended: Collection[str]) -> tuple[Values, Values]:
    """Return A's and B's errors by seed."""
    a = averaged([source(cell, pair.metric, mended) for cell in pair.a])
    return a, averaged([source(cell, pair.b_metric or pair.metric, mended) for cell in pair.b])


def published_ratio(pair: Pair, source: Source) -> Ratio | None:
    """Return the published A / B; None where B was not published."""
    return welch_ratio(*(x.values() for x in sides(pair, source, ()))) if pair.is_published else None


def compare(pair: Pair, ours: Source) -> Comparison:
    """Return our A / B by the published protocol and mended, and what each mend does."""

    def ratios(mended: Collection[str]) -> dict[int, float]:
        a, b = sides(pair, ours, mended)
        return {s: a[s] / b[s] for s in a if s in b}

    plain = ratios(())
    alone = {
        words: sum(math.log(x[s] / plain[s]) for s in plain) / len(plain)
        for name, words in MENDS.items()
        for x in [ratios((name,))]
    }
    return Comparison(
        welch_ratio(*(x.values() for x in sides(pair, ours, ()))),
        welch_ratio(*(x.values() for x in sides(pair, ours, tuple(MENDS)))),
        paired_ratio(ratios(tuple(MENDS)), plain),
        alone,
    )
