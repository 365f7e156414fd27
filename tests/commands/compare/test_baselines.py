"""Runs that were judged on other points have baselines of their own, in tables and in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from lightning_toys.bilevel.control import figures as control
from lightning_toys.bilevel.regression import figures as regression
from lightning_toys.commands.compare.plots import draw
from lightning_toys.commands.compare.runs import Run, find_results, load_runs
from lightning_toys.commands.compare.tables import reference_rows
from lightning_toys.generative_policy import bandit_figures
from lightning_toys.generative_policy.bandit import RotatingModes
from tests.commands.compare.runs_of_others import METRIC, WHOLE, a_run
from tests.conftest import Runner


def run_on(folder: Path, name: str, settings: dict[str, Any], **references: float) -> Path:
    """Make a run with settings and baselines."""
    rows = {name: {"l2": value} for name, value in references.items()}
    return a_run(folder / name, WHOLE | {"label": name, "settings": settings, "references": rows})


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Return a sweep over num_train and mode, whose ``zero`` is the same and whose ``nearest`` is not."""
    for n, nearest in ((20, 0.5), (50, 0.2)):
        for mode in ("flow", "mip"):
            settings = {"model.mode": mode, "data.num_train": n}
            run_on(tmp_path, f"{n}-{mode}", settings, zero=0.9, nearest=nearest)
    return load_runs(find_results([tmp_path]))


def pieces(ax: Axes) -> list[tuple[float, float, float]]:
    """Return value, first and last row of each piece of a line, rows rounded."""
    found = [s for c in ax.collections if isinstance(c, LineCollection) for s in c.get_segments() if len(s) == 2]
    lines = [(float(s[0][0]), float(s[0][1]), float(s[1][1])) for s in found if s[0][0] == s[1][0]]
    return sorted((round(x, 6), float(np.ceil(low)), float(np.floor(high))) for x, low, high in lines)


def test_a_piece_of_a_line_beside_the_runs_that_it_is_of(runs: list[Run]) -> None:
    assert [r.label for r in runs] == [f"{m} num_train={n}" for n in (20, 50) for m in ("flow", "mip")]
    figure = draw(runs, "l2")
    assert pieces(figure.axes[0]) == [(0.2, 2.0, 3.0), (0.5, 0.0, 1.0)]
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert names == ["zero 0.9", "nearest, each run's own", "each seed", "mean and 95 % CI"]


def test_one_line_where_all_runs_have_the_same(runs: list[Run]) -> None:
    """Negative control."""
    figure = draw(runs[:2], "l2")
    assert pieces(figure.axes[0]) == []
    lines = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [0, 1]]
    assert sorted(float(np.asarray(line.get_xdata())[0]) for line in lines) == [0.5, 0.9]


def test_runs_in_turns_and_one_without(runs: list[Run]) -> None:
    """Each row has its own, whatever the order; a run that lacks a baseline has none beside it."""
    a, b, c, _ = runs
    del b.content["references"]["nearest"]
    figure = draw([a, c, a, b], "l2")
    assert pieces(figure.axes[0]) == [(0.2, 1.0, 1.0), (0.5, 0.0, 0.0), (0.5, 2.0, 2.0)]


def test_more_baselines_than_styles_are_drawn(tmp_path: Path) -> None:
    names = {f"b{i:02d}": 1.0 + 0.01 * i for i in range(20)}
    (run,) = load_runs(find_results([run_on(tmp_path, "a", {}, **names)]))
    shown = [t.get_text() for t in draw([run], "l2").legends[0].get_texts()]
    assert [n for n in names if any(s.startswith(n) for s in shown)] == list(names)


def test_rows_of_a_table_say_whose_they_are(runs: list[Run]) -> None:
    assert reference_rows(runs, ["l2"]) == [
        ["reference: zero", "", "0.9"],
        ["reference: nearest (num_train=20)", "", "0.5"],
        ["reference: nearest (num_train=50)", "", "0.2"],
    ]


def test_rows_that_no_setting_tells_apart(tmp_path: Path) -> None:
    for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.2)):
        run_on(tmp_path, name, {"data.seed": name}, zero=value)
    runs = [Run(r.folder, r.folder.name, r.content) for r in load_runs(find_results([tmp_path]))]
    assert [row[0] for row in reference_rows(runs, ["l2"])] == ["reference: zero (a)", "reference: zero (b, ...)"]


def test_runs_on_20_and_on_50_points(runner: Runner) -> None:
    """What the picture shows is what the runs' own files say."""
    for n in ("20", "50"):
        flags = ("--model.seeds", "[0,1]", "--trainer.max_steps", "2", "--trainer.logger", "false")
        runner.ok("fit", "flow", *flags, "--data.num_train", n)
    runs = load_runs(find_results([runner.root]))
    own = [r.content["references"]["nearest"]["l2"] for r in runs]
    assert own[0] > 1.5 * own[1]
    drawn = pieces(draw(runs, "l2").axes[0])
    assert [p for p in drawn if p[0] in np.round(own, 6)] == [(round(own[i], 6), float(i), float(i)) for i in (1, 0)]


def heights(ax: Axes) -> list[float]:
    """Return the heights of the lines that go across an axis."""
    lines = [line for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    return sorted(float(np.asarray(line.get_ydata())[0]) for line in lines)


def test_streams_of_bilevel_have_panels_of_their_own(tmp_path: Path) -> None:
    arrays = {"outer_loss": [[1.0, 0.5], [1.1, 0.6]], "time": [1, 2]}
    folders = {}
    for name, oracle in (("a", 0.1), ("b", 0.1), ("c", 0.3)):
        references = {"oracle": {"outer_loss": oracle}, "uniform": {"outer_loss": None}}
        folders[name] = a_run(tmp_path / name, WHOLE | {"arrays": arrays, "references": references})
    (figure,) = regression.compare_figures(folders).values()
    assert [ax.get_legend_handles_labels()[1] for ax in figure.axes] == [["a, 2 seeds", "b, 2 seeds"], ["c, 2 seeds"]]
    (figure,) = regression.compare_figures({k: folders[k] for k in "ab"}).values()
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"a, 2 seeds", "b, 2 seeds"}
    assert [heights(ax) for ax in figure.axes] == [[]]  # no line that no run has


def test_bandits_of_two_widths_have_hills_of_their_own(tmp_path: Path) -> None:
    """The default bandit's hills were drawn, whatever the runs' own were."""
    curves = "step,replicas/eval/regret/seed_0,replicas/eval/regret/seed_1\n1,1.0,1.0\n2,0.5,0.6\n"
    folders = {}
    own = {width: RotatingModes(width) for width in (0.15, 0.4)}
    for i in range(9):  # more than there are colours
        references = own[0.15 if i else 0.4].baselines
        folder = a_run(tmp_path / str(i), WHOLE | {"metrics": {"regret": METRIC}, "references": references})
        (folder / "metrics.csv").write_text(curves)
        folders[str(i)] = folder
    tops = {w: [b.max_reward - m for m in sorted(b.mode_maxima)[:-1]] for w, b in own.items()}
    for names, wanted in (("0", tops[0.4]), ("123", tops[0.15]), ("012345678", tops[0.4] + 8 * tops[0.15])):
        (figure,) = bandit_figures.compare_figures({k: folders[k] for k in names}).values()
        assert heights(figure.axes[0]) == pytest.approx(sorted(wanted))


def test_agents_in_two_environments_have_baselines_of_their_own(tmp_path: Path) -> None:
    curves = "step,replicas/eval/return/seed_0,replicas/eval/return/seed_1\n1,10.0,12.0\n2,20.0,30.0\n"
    folders = {}
    for name, agent, chance in (("a", "omd", 22.0), ("b", "mle", 22.0), ("c", "somebody.Own", 9.0)):
        references = {"random actions": {"return": chance, "length": None}}
        folder = a_run(tmp_path / name, WHOLE | {"references": references})
        (folder / "metrics.csv").write_text(curves)
        model = {"init_args": {"model_hidden_dim": 3, "agent": agent}}
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        folders[name] = folder
    (figure,) = control.compare_figures(folders).values()
    assert heights(figure.axes[0]) == [9.0, 22.0]
    names = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert [n for n in names if "random" in n] == ["random actions, a", "random actions, c"]
    (figure,) = control.compare_figures({k: folders[k] for k in "ab"}).values()
    assert heights(figure.axes[0]) == [22.0]
