"""Scores of runs over seeds: interquartile means with bootstrap intervals, and the probability of improvement.

    python -m lightning_toys.bilevel.score_table FOLDER ... [--metric return] [--steps 30000,50000] [--over LABEL]

As Agarwal et al. recommend for few seeds (arXiv 2108.13264). A seed's score is one number; runs are independent
samples, so nothing is paired. Every score is listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_toys.errors import ToyError, did_you_mean, printable, require
from lightning_toys.training.metrics_reader import read_run, replica_columns
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.results_format import read_results

RESAMPLES = 10_000


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """Return the mean (...) of the middle half of x (..., n): a quarter of n, rounded down, is cut off at either end.

    >>> float(interquartile_mean(np.array([0.0, 1.0, 2.0, 90.0])))
    1.5
    """
    n = x.shape[-1]
    cut = n // 4
    out: np.ndarray = np.sort(x, axis=-1)[..., cut : n - cut].mean(-1)
    return out


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return P(X > Y) + P(X = Y) / 2 (...) over all pairs of x (..., n) and y (..., m).

    >>> float(probability_of_improvement(np.array([1.0, 3.0]), np.array([0.0, 3.0])))
    0.625
    """
    gap = x[..., :, None] - y[..., None, :]
    out: np.ndarray = (0.5 + 0.5 * np.sign(gap)).mean((-1, -2))
    return out


class Interval(NamedTuple):
    """An estimate and its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Interval:
    """Return a statistic of samples (n,), (m,), ... with its interval; each sample is drawn anew on its own."""
    drawn = []
    for i, x in enumerate(samples):
        index = keyed_generator(0, i, "score_table/bootstrap").integers(len(x), size=(RESAMPLES, len(x)))
        drawn.append(x[index])
    low, high = np.quantile(statistic(*drawn), [0.025, 0.975])
    return Interval(float(statistic(*samples)), float(low), float(high))


def scores(folder: Path, metric: str, step: int | None) -> dict[int, float]:
    """Return a run's score by seed: what it ended with, or that of the validation at a step.

    Raises:
        ToyError: the run has no such metric, or was not validated at that step.
    """
    results = read_results(folder / "results.json")
    seeds = [int(s) for s in results["seeds"]]
    if step is None:
        known = results["metrics"]
        require(
            metric in known,
            f"--metric: {folder} has no {metric!r}; it has {', '.join(known)}{did_you_mean(metric, known)}",
        )
        return dict(zip(seeds, known[metric]["values"], strict=True))
    steps, values = replica_columns(read_run(folder), f"eval/{metric}", seeds)
    at = np.flatnonzero(steps == step)
    shown = f"{int(steps[0])} to {int(steps[-1])}" if len(steps) else "nothing"
    require(len(at) > 0, f"--steps: {folder} has no eval/{metric} at step {step}; it has {shown}")
    return dict(zip(seeds, values[:, at[-1]].tolist(), strict=True))


def table(runs: dict[str, Path], metric: str, steps: Sequence[int | None], over: str | None) -> str:
    """Return the table in Markdown: a row for each run and step.

    Args:
        runs: label to run folder.
        metric: of results.json, or of validations.
        steps: of validations; None is the run's end.
        over: label of the run that the others are compared with; None is without.

    Raises:
        ToyError: a run has no such metric, none at such a step, or one that is not finite.
    """
    versus = f" | P(above {over})" if over else ""
    lines = [f"| run | step | seeds | interquartile mean | mean{versus} | each seed |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for step in steps:
        found = {label: scores(folder, metric, step) for label, folder in runs.items()}
        base = np.array(list(found[over].values())) if over else None
        for label, by_seed in found.items():
            x = np.array(list(by_seed.values()), dtype=np.float64)
            require(bool(np.isfinite(x).all()), f"--metric: {metric} of {runs[label]} is not finite")
            cells = [printable(label), "end" if step is None else str(step), str(len(x))]
            cells += [str(bootstrap(interquartile_mean, x)), f"{x.mean():.3g}"]
            if base is not None:
                cells.append("-" if label == over else str(bootstrap(probability_of_improvement, x, base)))
            cells.append(", ".join(f"{v:.3g}" for v in x))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def found_runs(folders: Sequence[str]) -> dict[str, Path]:
    """Return run folders by their labels, and by their folders' names where labels are the same.

    Raises:
        ToyError: there is no run.
    """
    found = sorted({path.parent for folder in folders for path in Path(folder).rglob("results.json")})
    require(len(found) > 0, f"{' '.join(folders)}: no finished run; give folders that hold results.json")
    labels = [str(read_results(path / "results.json")["label"]) for path in found]
    return {
        label if labels.count(label) == 1 else f"{label} ({path.name})": path
        for label, path in zip(labels, found, strict=True)
    }


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 2 if the input is bad."""
    parser = argparse.ArgumentParser("python -m lightning_toys.bilevel.score_table", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="runs, or folders of runs")
    parser.add_argument("--metric", default="return", help="of results.json")
    parser.add_argument("--steps", default="", help="validations, such as 30000,50000; none is each run's end")
    parser.add_argument("--over", default=None, help="label of the run that the others are compared with")
    given = parser.parse_args(words)
    try:
        runs = found_runs(given.folders)
        names = ", ".join(runs)
        require(given.over is None or given.over in runs, f"--over: {given.over!r} is not allowed; give one of {names}")
        digits = [w.strip() for w in given.steps.split(",") if w.strip()]
        require(all(w.isdigit() for w in digits), f"--steps: {given.steps!r} is not allowed; give 30000,50000")
        print(table(runs, given.metric, [int(w) for w in digits] or [None], given.over))
    except ToyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
