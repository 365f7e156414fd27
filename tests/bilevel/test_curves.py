"""Curves on logarithmic axes: every seed and the median, no interval; nothing that no network can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_toys.bilevel.control import figures as control
from lightning_toys.bilevel.curves import draw_seeds
from lightning_toys.bilevel.regression import figures as regression
from lightning_toys.plotting import new_figure
from lightning_toys.training.results import Report
from tests.commands.compare.runs_of_others import WHOLE, a_run


def test_every_seed_and_the_median() -> None:
    x, rows = np.arange(3.0), np.array([[1.0, 2, 3], [100, 200, 300], [2, 1, 4]])
    ax = new_figure()[1][0, 0]
    draw_seeds(ax, x, rows, "k", "three")
    assert [list(line.get_ydata()) for line in ax.lines] == [*rows.tolist(), [2, 2, 4]]
    assert not ax.collections  # no band
    assert ax.get_legend_handles_labels()[1] == ["three"]
    draw_seeds(ax, x[:1], rows[:1, :1], "k", "a point")
    assert ax.lines[-1].get_marker() == "o"


@pytest.mark.parametrize(("title", "bands"), [("RMS of d - y", 0), ("return, greedy actions", 1)])
def test_a_logarithmic_panel_has_no_band(title: str, bands: int) -> None:
    ax = new_figure()[1][0, 0]
    control.draw_metric(ax, title, np.arange(2.0), np.array([[1.0, 2], [3, 9]]), "k", "x")
    assert len(ax.collections) == bands
    assert len(ax.lines) == 3


def test_runs_side_by_side_have_their_interval_at_the_end() -> None:
    ax = new_figure()[1][0, 0]
    values = np.array([[10.0, 20], [12, 400], [11, 60]])
    for place in range(2):
        control.draw_metric(ax, "return, greedy actions", np.array([100.0, 200]), values, "k", f"run {place}", place)
    bars = [c for c in ax.containers if hasattr(c, "has_yerr")]
    assert [float(b.lines[0].get_xdata()[0]) for b in bars] == pytest.approx([202, 203.5])  # type: ignore[union-attr]
    assert [float(b.lines[0].get_ydata()[0]) for b in bars] == [160, 160]  # type: ignore[union-attr]
    assert ax.get_legend_handles_labels()[1] == ["run 0", "run 1"]
    control.label_axes(ax, "return, greedy actions")
    assert ax.get_ylim() == (0, pytest.approx(420))  # though the interval reaches far below 0


def test_an_outer_loss_has_curves_of_runs_alone() -> None:
    """What an exact solver would score is no line in it."""
    arrays = {"time": [1, 2], "outer_loss": [[3.0, 2.0], [4.0, 2.5]]}
    figure = regression.draw_loss(Report([0, 1], {}, {"oracle": {"exact_loss": 1.2}}, arrays), "x")
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[3.0, 2.0], [4.0, 2.5], [3.5, 2.25]]
    assert figure.axes[0].get_title() == "x, 2 seeds: each seed, and their median"


def some_results(label: str, weights: list[list[float]], key: str = "exact_loss") -> dict[str, object]:
    arrays = {"time": [1, 2], "outer_loss": [[3.0, 2.0], [4.0, 2.5]], "weights_by_seed": weights}
    metrics = {k: {"values": [1.0, 2.0], "mean": 1.5} for k in ("outer_loss", "exact_loss")}
    content = WHOLE | {"label": label, "arrays": arrays | {"best_weights": [0.5, 0.0, 0.5]}, "metrics": metrics}
    return content | {"references": {"oracle": {key: 1.2}}}


def test_weights_of_every_seed_side_by_side(tmp_path: Path) -> None:
    """A line for each seed and dots for the best; no mean of lags, and no run whose weights do nothing."""
    rows = [[[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], [[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]]
    runs = {f"run {k}": a_run(tmp_path / str(k), some_results(f"run {k}", w)) for k, w in enumerate(rows)}
    idle = some_results("idle", rows[0])
    del idle["metrics"]["exact_loss"]  # type: ignore[attr-defined]
    figures = regression.compare_figures({**runs, "idle": a_run(tmp_path / "idle", idle)})
    assert set(figures) == {"outer_loss_curves", "lag_weights"}
    panels = [ax for ax in figures["lag_weights"].axes if ax.get_visible()]
    assert [ax.get_title() for ax in panels] == ["run 0", "run 1"]
    for ax, weights in zip(panels, rows, strict=True):
        assert [list(line.get_ydata()) for line in ax.lines] == [*weights, [0.5, 0.0, 0.5]]
        assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "None"]
    runs["old"] = a_run(tmp_path / "old", some_results("old", rows[0], "outer_loss"))  # as 0.1.0 wrote it
    assert len(regression.compare_figures(runs)["outer_loss_curves"].axes) == 1
    one, other = (regression.stream_of({"oracle": {"exact_loss": x}}) for x in (1.2, 1.3))
    assert one != other
