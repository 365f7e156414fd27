"""Metrics that a module calls errors: geometric means, ratios paired by seed, and bars that do not reach 0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lightning_toys.commands.compare.plots import draw
from lightning_toys.commands.compare.runs import Run, find_results, load_runs
from lightning_toys.commands.compare.tables import error_table
from lightning_toys.stats import holm
from tests.commands.compare.runs_of_others import WHOLE, a_run
from tests.malformed import Refusal

# one bad seed carries the first one's mean
VALUES = {"a": [0.01, 0.012, 0.009, 0.9], "b": [0.03, 0.04, 0.02, 0.03], "c": [0.1, 0.2, 0.15, 0.12]}


def runs_of(root: Path, errors: tuple[str, ...] = ("l2",), values: dict[str, list[float]] = VALUES) -> list[Run]:
    for name, found in values.items():
        content: dict[str, Any] = copy.deepcopy(WHOLE) | {"seeds": [3, 1, 4, 5], "label": name}
        content["error_metrics"] = list(errors)
        content["metrics"] = {"l2": {"values": found, "mean": 0.0, "ci95": [0.0, 0.0]}}
        content["settings"] = {"model.mode": name}
        a_run(root / name, content)
    return load_runs(find_results([root]))


def test_ratios_are_those_of_the_logarithms_adjusted_within_a_metric(tmp_path: Path) -> None:
    runs = runs_of(tmp_path)
    table = error_table(runs, runs[1])
    assert table is not None
    assert [row[0] for row in table.rows] == [r.label for r in runs]
    logs = {name: np.log(found) for name, found in VALUES.items()}
    tests = [scipy_stats.ttest_1samp(logs[name] - logs["b"], 0.0) for name in "ac"]
    adjusted = dict(zip("ac", holm([t.pvalue for t in tests]), strict=True))
    assert adjusted["c"] > 1.5 * tests[1].pvalue  # of two; else nothing is seen of Holm
    for row, name in zip(table.rows, "abc", strict=True):
        assert row[2] == f"{np.exp(logs[name].mean()):.4g}"
        if name == "b":
            assert row[4:] == ["-"] * 4
            continue
        ends = scipy_stats.ttest_1samp(logs[name] - logs["b"], 0.0).confidence_interval(0.95)
        assert row[4] == f"{np.exp((logs[name] - logs['b']).mean()):.4g}"
        assert row[5] == f"[{np.exp(ends.low):.4g}, {np.exp(ends.high):.4g}]"
        assert row[6:] == ["4", f"{adjusted[name]:.2g}"]


@pytest.mark.parametrize(
    ("errors", "values"),
    [((), VALUES), (("l1",), VALUES), (("l2",), {"a": [0.0, 1.0, 2.0, 3.0], "b": [-1.0, 1.0, 2.0, 3.0]})],
)
def test_without_errors_there_is_no_table(
    tmp_path: Path, errors: tuple[str, ...], values: dict[str, list[float]]
) -> None:
    runs = runs_of(tmp_path, errors, values)
    assert error_table(runs, runs[0]) is None


def test_one_run_that_is_not_positive_has_no_row(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, values={**VALUES, "d": [0.0, 1.0, 1.0, 1.0]})
    table = error_table(runs, runs[0])
    assert table is not None
    assert [row[0] for row in table.rows] == [r.label for r in runs[:3]]


def test_a_run_alone_has_no_ratio(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, values={"a": VALUES["a"]})
    table = error_table([run], run)
    assert table is not None
    assert table.columns == ["run", "metric", "geometric mean", "95 % interval"]
    assert [len(row) for row in table.rows] == [4]
    assert "ratio" not in table.title


def bars(figure: Any) -> list[tuple[float, float]]:
    """Return the ends of the error bars that are drawn."""
    found = [c.get_segments() for c in figure.axes[0].collections if hasattr(c, "get_segments")]
    return [(float(s[0][0]), float(s[-1][0])) for segments in found for s in segments if len(s) and s[0][1] == s[-1][1]]


def test_bars_are_the_geometric_intervals_and_stay_above_0(tmp_path: Path) -> None:
    runs = runs_of(tmp_path)
    figure = draw(runs, "l2")
    found = bars(figure)
    assert len(found) == 3
    for (low, high), values in zip(found, VALUES.values(), strict=True):
        wanted = scipy_stats.ttest_1samp(np.log(values), 0.0).confidence_interval(0.95)
        assert (low, high) == (pytest.approx(np.exp(wanted.low)), pytest.approx(np.exp(wanted.high)))
        assert low > 0
    assert "geometric mean and 95 % CI" in [t.get_text() for t in figure.legends[0].get_texts()]
    plain = bars(draw(runs_of(tmp_path / "plain", ()), "l2"))
    assert plain != found
    # two seeds that are orders apart: the bar ends within what a picture holds
    wide = runs_of(tmp_path / "wide", values={"a": [1e-290, 1.0, 1.0, 1e-280]})
    assert np.isfinite(bars(draw(wide, "l2"))).all()


def test_a_module_says_which(tmp_path: Path, refuse: Refusal) -> None:
    from lightning_toys.bilevel import BilevelControl, WindowRegression
    from lightning_toys.flow_vs_regression import FlowVsRegression

    assert FlowVsRegression().error_metrics == ("l1", "l2")
    assert set(BilevelControl.error_metrics) <= set(BilevelControl.metric_labels)
    assert set(WindowRegression.headline) < set(WindowRegression.error_metrics)
    for wrong in (3, [3], "l2"):
        run = a_run(tmp_path / str(wrong), copy.deepcopy(WHOLE) | {"error_metrics": wrong})
        refuse(["compare", str(run)], "error_metrics is no list of metrics")
