"""Curves on logarithmic axes: every seed and the median, no interval; marks for what no network can have."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_toys.bilevel.control import figures as control
from lightning_toys.bilevel.curves import draw_seeds
from lightning_toys.bilevel.regression import figures as regression
from lightning_toys.plotting import new_figure
from lightning_toys.training.results import Report


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


def test_closed_forms_are_marks_at_the_edge() -> None:
    arrays = {"time": [1, 2], "outer_loss": [[3.0, 2.0], [4.0, 2.5]]}
    report = Report([0, 1], {}, {"oracle": {"outer_loss": 1.2}, "no_tracking": {"outer_loss": float("nan")}}, arrays)
    figure = regression.draw_loss(report, "x")
    ax = figure.axes[0]
    (mark,) = [line for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    figure.canvas.draw()
    box = mark.get_clip_box()
    assert box is not None
    assert box.width == pytest.approx(regression.MARK * ax.bbox.width)
    assert box.x1 == pytest.approx(ax.bbox.x1)
    assert figure.legends[0].get_title().get_text() == regression.MARKS
