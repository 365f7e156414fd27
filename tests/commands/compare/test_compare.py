"""sweep runs each cell once, whatever stops it; compare says what the numbers say."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lightning_toys import cli
from lightning_toys.commands.compare.page import grid
from lightning_toys.commands.compare.plots import draw
from lightning_toys.commands.compare.report import question_remarks
from lightning_toys.commands.compare.runs import find_results, load_runs
from lightning_toys.commands.compare.tables import ResultTable
from lightning_toys.commands.sweep import cell
from lightning_toys.commands.sweep.grid import cells, parse_grid
from lightning_toys.stats import A_SHARE, NO_LIMITS, NOT_NEGATIVE, Estimate, format_estimate
from lightning_toys.training.module import ToyModule
from tests.commands.compare.runs_of_others import a_run
from tests.conftest import REPO, Runner
from tests.processes import wait_for

GRID = ("--grid.model.mode", "[regression,flow]", "--grid.data.num_train", "[20,50]")
FLAGS = ("--model.seeds", "[0,1,2]", "--trainer.max_steps", "60", "--run.variant", "grid")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count what a sweep really runs."""
    calls: list[str] = []
    true_run = cell.run_trainer

    def run(args: list[str]) -> object:
        calls.append(f"{args[0]} {args[args.index('--run.name') + 1] if '--run.name' in args else 'alone'}")
        return true_run(args)

    monkeypatch.setattr(cell, "run_trainer", run)
    return calls


def test_grid_words() -> None:
    grid, rest = parse_grid(["-c", "x", "--grid.a.b", "[1, 0.5]", "--flag", "v", "--grid.c=[x]"])
    assert grid == {"a.b": [1, 0.5], "c": ["x"]}
    assert rest == ["-c", "x", "--flag", "v"]
    assert [c.name for c in cells(grid)] == ["b=1,c=x", "b=0.5,c=x"]
    assert cells(grid)[0].flags == ("--a.b", "1", "--c", "x")
    # two flags of one last name keep more of it, and lists and nulls are words
    names = [c.name for c in cells({"data.seed": [None], "data.target.seed": [1], "model.seeds": [[0, 1]]})]
    assert names == ["data.seed=null,target.seed=1,model.seeds=[0,1]"]


def test_cells_run_once_and_compare(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = counted(monkeypatch)
    runner.ok("sweep", "flow", *FLAGS, *GRID)
    assert len(calls) == 8
    folder = runner.root / "flow_vs_regression" / "grid"
    out = folder / "comparison"
    assert {p.name for p in out.iterdir()} >= {
        *("comparison.md", "comparison.csv", "comparison.tex", "comparison.html", "l2.png", "l1.png")
    }
    calls.clear()
    err = runner.ok("sweep", "flow", *FLAGS, *GRID)
    assert calls == []
    assert "4 of 4 cells are done already" in err
    # a larger grid runs the new cells only
    more = ("--grid.model.mode", "[regression,flow]", "--grid.data.num_train", "[20,50,30]")
    runner.ok("sweep", "flow", *FLAGS, *more)
    assert sorted(calls) == [
        *(f"fit mode={m},num_train=30" for m in ("flow", "regression")),
        *(f"test mode={m},num_train=30" for m in ("flow", "regression")),
    ]
    # other settings under the same name are refused before any work
    calls.clear()
    code, err = runner.code("sweep", "flow", *FLAGS, *GRID, "--model.lr", "0.5")
    assert code == 2
    assert "was swept with other settings" in err
    assert calls == []
    # a cell is what `fit` and `test` by hand give
    runner.ok("fit", "flow", "--model.seeds", "[0,1,2]", "--trainer.max_steps", "60", "--data.num_train", "20")
    runner.ok("test", "flow", "--ckpt_path", "last")
    by_hand = json.loads((runner.folder("flow") / "results.json").read_text())
    swept = json.loads((folder / "mode=flow,num_train=20" / "results.json").read_text())
    assert by_hand["metrics"] == swept["metrics"]


@pytest.mark.slow  # tests/commands/sweep kills sweeps in the gate
def test_a_killed_sweep_goes_on(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the second cell: the first is not run again, the second resumes from its checkpoint."""
    flags = ("--model.seeds", "[0,1]", "--trainer.max_steps", "1500", "--model.network.hidden", "64")
    flags += ("--checkpoint.every_n_steps", "100", "--run.variant", "grid", "--grid.model.mode", "[regression,flow]")
    process = runner.start("sweep", "flow", *flags)
    folder = runner.root / "flow_vs_regression" / "grid"
    second = folder / "mode=flow" / "checkpoints" / "last.ckpt"
    wait_for(second, process, 120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first_results = (folder / "mode=regression" / "results.json").read_bytes()
    calls = counted(monkeypatch)
    err = runner.ok("sweep", "flow", *flags)
    assert calls == ["fit mode=flow", "test mode=flow"]
    assert "1 of 2 cells are done already" in err
    assert (folder / "mode=regression" / "results.json").read_bytes() == first_results
    # and ends where an undisturbed run ends
    runner.ok("fit", "flow", *flags[:-4], "--run.variant", "alone", "--run.name", "a")
    import torch

    alone = torch.load(runner.root / "flow_vs_regression/alone/a/checkpoints/last.ckpt", weights_only=True)
    swept = torch.load(second, weights_only=True)
    assert all(torch.equal(alone["state_dict"][k], swept["state_dict"][k]) for k in alone["state_dict"])


def test_one_bad_cell_does_not_stop_the_others(runner: Runner) -> None:
    flags = ("--model.seeds", "[0,1]", "--trainer.max_steps", "120", "--run.variant", "grid")
    code, err = runner.code("sweep", "regression", *flags, "--grid.model.lr", "[1e30,1e-3]")
    assert code == 1
    assert "lr=1e30" in err
    assert "not finite" in err
    assert (runner.root / "flow_vs_regression/grid/lr=1e-3/results.json").is_file()
    assert (runner.root / "flow_vs_regression/grid/comparison/comparison.md").is_file()


def test_all_cells_bad(runner: Runner) -> None:
    code, err = runner.code("sweep", "regression", "--model.seeds", "[0]", "--grid.model.lr", "[1e29,1e30]")
    assert code == 1
    assert "2 of 2 cells went non-finite" in err
    code, err = runner.code("sweep", "regression", "--grid.model.lr", "[0.1,0.1]")
    assert code == 2
    assert "two cells are the same" in err
    code, err = runner.code("sweep", "regression", "--grid.model.lr", "[0.1]", "--grid.model.lr=[0.2]")
    assert code == 2
    assert "--grid.model.lr: given twice; give one list" in err


def fake_run(folder: Path, label: str, values: list[float], seeds: list[int], experiment: str = "toy") -> None:
    folder.mkdir(parents=True)
    metrics = {m: {"values": [v * k for v in values], "mean": 0, "ci95": [0, 0]} for m, k in (("l1", 0.5), ("l2", 1.0))}
    content = {"experiment": experiment, "variant": "v", "seeds": seeds, "label": label, "metrics": metrics}
    (folder / "results.json").write_text(json.dumps({**content, "references": {"zero": {"l1": 0.4, "l2": 0.9}}}))


def test_compare_against_scipy(runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 0.1, 6), rng.normal(1.2, 0.1, 6)
    fake_run(tmp_path / "runs" / "a", "a_1", a.tolist(), list(range(6)))
    # the seeds in another order, and one that a lacks: pairs are by seed
    fake_run(tmp_path / "runs" / "b", "b_2", [*b[::-1].tolist(), 7.0], [*range(5, -1, -1), 9])
    assert cli.main(["compare", str(tmp_path / "runs")]) == 0
    text = (tmp_path / "runs" / "comparison" / "comparison.md").read_text()
    wanted = scipy_stats.ttest_rel(b, a)
    lo, hi = wanted.confidence_interval(0.95)
    line = next(x for x in text.splitlines() if x.startswith("| b_2 | l2"))
    numbers = [float(x) for x in re.findall(r"\[(\S+), (\S+)\]", line)[0]]
    assert numbers == pytest.approx([lo, hi], rel=1e-3)
    assert "| 6 |" in line
    assert f"{wanted.pvalue:.2g}" in line  # one comparison: Holm changes nothing
    rows = list(csv.DictReader((tmp_path / "runs/comparison/comparison.csv").read_text().splitlines()))
    mean = next(float(r["mean"]) for r in rows if r["run"] == "a_1" and r["metric"] == "l2")
    assert mean == pytest.approx(a.mean())
    tex = (tmp_path / "runs" / "comparison" / "comparison.tex").read_text()
    assert r"a\_1" in tex
    assert r"\toprule" in tex
    assert r"$\pm$" in tex
    printed = capsys.readouterr().out
    assert "a_1" in printed
    assert "reference: zero" in printed
    # turned round, the difference changes sign; a run answers to its label and to its folder
    for name in ("b_2", "b"):
        out = tmp_path / f"out-{name}"
        assert cli.main(["compare", str(tmp_path / "runs"), "--baseline", name, "--out", str(out)]) == 0
        line = next(x for x in (out / "comparison.md").read_text().splitlines() if x.startswith("| a_1 | l2"))
        assert [float(x) for x in re.findall(r"\[(\S+), (\S+)\]", line)[0]] == pytest.approx([-hi, -lo], rel=1e-3)


def test_every_target_has_tables_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors on two targets are answers to two questions: no difference is taken between them."""
    for target, scale in (("A", 1.0), ("B", 100.0)):
        for mode, shift in (("flow", 1.0), ("mip", 2.0)):
            folder = tmp_path / f"{target}-{mode}"
            fake_run(folder, mode, [scale * (shift + 0.1 * k * shift) for k in range(3)], [0, 1, 2])
            content = json.loads((folder / "results.json").read_text())
            settings = {"model.mode": mode, "data.target": f"lightning_toys.x.{target}", "data.target.dim": 8}
            content |= {"settings": settings, "references": {"zero": {"l1": 0.4 * scale, "l2": 0.9 * scale}}}
            (folder / "results.json").write_text(json.dumps(content))
    assert cli.main(["compare", str(tmp_path)]) == 0
    assert "the runs differ in data.target: errors are answers to different questions" in capsys.readouterr().err
    found = (tmp_path / "comparison" / "comparison.md").read_text()
    assert [x for x in found.splitlines() if x.startswith("**")] == [
        f"**{t}: {x}**"
        for t in "AB"
        for x in ("mean ± half of the 95 % interval over seeds", "paired by seed: run minus flow")
    ]
    lines = found.splitlines()
    assert sum(x.startswith("| reference: zero |") for x in lines) == 2
    differences = [float(x.split("|")[3].split("±")[0]) for x in lines if x.startswith("| mip | l2 |")]
    assert differences == pytest.approx([1.1, 110], rel=1e-2)
    assert sorted(p.name for p in (tmp_path / "comparison").glob("l2*.png")) == ["l2-A.png", "l2-B.png"]
    rows = csv.DictReader((tmp_path / "comparison" / "comparison.csv").read_text().splitlines())
    assert {r["run"] for r in rows if r["metric"] == "l2"} >= {"A, flow", "A, mip", "B, flow", "B, mip"}
    # a baseline is each target's own
    assert cli.main(["compare", str(tmp_path), "--baseline", "mip", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.md").read_text().count("run minus mip") == 2
    assert cli.main(["compare", str(tmp_path), "--baseline", "B, mip", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.md").read_text().count("run minus mip") == 1
    assert cli.main(["compare", str(tmp_path), "--baseline", "m", "--out", str(tmp_path / "out")]) == 0


def test_a_module_says_by_which_settings_runs_are_asked_something_else(tmp_path: Path) -> None:
    """Other data, another environment: no difference is taken. Results of 0.1.0 know of targets alone."""
    said = list(ToyModule.question_settings)
    for key, named, groups in (
        ("data.path", said, 2), ("model.env", said, 2), ("data.drift.omega", said, 2), ("model.reward", said, 2),
        ("data.num_train", said, 1), ("data.pathological", said, 1), ("data.num_train", ["data.num_train"], 2),
        ("data.path", None, 1), ("data.target.dim", None, 2), ("data.target.dim", [], 1),
    ):  # fmt: skip
        root = tmp_path / f"{key}-{groups}-{named is None}"
        for k in range(2):
            fake_run(root / str(k), "a", [1.0, 2.0], [0, 1])
            content = json.loads((root / str(k) / "results.json").read_text())
            content |= {"settings": {key: f"v{k}"}} | ({} if named is None else {"question_settings": named})
            (root / str(k) / "results.json").write_text(json.dumps(content))
        runs = load_runs(find_results([root]))
        assert len({r.group for r in runs}) == groups, (key, named)
        assert len(question_remarks(runs)) == groups - 1


def test_compare_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run(tmp_path / "a", "a", [1.0, 2.0], [0, 1])
    fake_run(tmp_path / "b", "b", [1.0, 2.0], [0, 1], experiment="other")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text("{")
    for words, says in [
        ([str(tmp_path / "a"), str(tmp_path / "b")], "different experiments"),
        ([str(tmp_path / "c")], "is not a results.json"),
        ([str(tmp_path / "a"), "--baseline", "zzz"], "fits 0 of the runs"),
        ([str(tmp_path / "a"), "--out", "README.md"], "--out: 'README.md' is not allowed (it is no folder)"),
    ]:
        assert cli.main(["compare", *words]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1


def test_labels_tell_runs_apart(runner: Runner) -> None:
    for mode in ("regression", "flow"):
        for n in ("20", "30"):
            flags = ("--model.mode", mode, "--data.num_train", n, "--trainer.max_steps", "2")
            runner.ok("fit", "flow", *flags)
    runs = load_runs(find_results([runner.root]))
    assert sorted(r.label for r in runs) == [f"{m} num_train={n}" for m in ("flow", "regression") for n in (20, 30)]


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.0712345, 0.00751, "0.0712 ± 0.0075"),
        (123.456, 12.3, "123 ± 12"),
        (1.0, float("nan"), "1"),
        (0.5, 0.0, "0.5000 ± 0.0000"),
        (3.2e-9, 1.5e-10, "3.20e-09 ± 1.5e-10"),
        (1.87e-6, 7.8e-6, "1.9e-06 ± 7.8e-06"),
        (1e-12, 5e-9, "0 ± 5.0e-09"),
        (18870.0, 17000.0, "1.9e+04 ± 1.7e+04"),
        (1e20, 0.0, "1e+20 ± 0"),
        (995.0, 17000.0, "1e+03 ± 1.7e+04"),
        (6e-11, 5.1e-9, "1e-10 ± 5.1e-09"),
        (9.97e-6, 1.2e-6, "1.00e-05 ± 1.2e-06"),
        (-1.87e-6, 9.97e-6, "-1.9e-06 ± 1.00e-05"),
        (2e15, 12.0, "2.00000000000000e+15 ± 12"),
    ],
)
def test_numbers_are_written_to_their_error(mean: float, half: float, text: str) -> None:
    assert format_estimate(Estimate(mean, mean - half, mean + half, 5)) == text


@pytest.mark.parametrize(
    ("mean", "half", "limits", "text"),
    [
        (0.0041, 0.0050, NOT_NEGATIVE, "0.0041 [0, 0.0091]"),
        (0.0041, 0.0050, NO_LIMITS, "0.0041 ± 0.0050"),
        (0.0041, 0.0040, NOT_NEGATIVE, "0.0041 ± 0.0040"),
        (0.98, 0.04, A_SHARE, "0.980 [0.940, 1]"),
        (0.5, 0.9, A_SHARE, "0.50 [0, 1]"),
        (3.2e-9, 4.1e-9, NOT_NEGATIVE, "3.2e-09 [0, 7.3e-09]"),
        (0.0, 0.0, NOT_NEGATIVE, "0.0000 ± 0.0000"),
        (0.3, float("nan"), NOT_NEGATIVE, "0.3"),
    ],
)
def test_no_interval_is_beyond_what_a_quantity_can_be(
    mean: float, half: float, limits: tuple[float, float], text: str
) -> None:
    assert format_estimate(Estimate(mean, mean - half, mean + half, 5), limits=limits) == text


def test_intervals_of_errors_and_shares_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"l2": [0.1, 3.0], "off3": [0.9, 1.0], "reward": [0.1, 3.0]}
    metrics: dict[str, dict[str, list[float] | float]] = {
        n: {"values": v, "mean": 0.0, "ci95": [0.0, 0.0]} for n, v in values.items()
    }
    metrics["off3"]["share_ci95"] = [0.9, 1.0]
    content = {"experiment": "toy", "variant": "v", "seeds": [0, 1], "label": "one", "references": {}}
    a_run(tmp_path / "one", content | {"metrics": metrics, "headline": ["l2"], "error_metrics": ["l2"]})
    assert cli.main(["compare", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in ("2 [0, 20]", "0.95 [0.31, 1]", "2 ± 18", "95 % interval over seeds, or [its ends], cut at the limits"):
        assert text in out, text


def test_console_script_and_module_agree() -> None:
    """The installed command and cli.py are one program."""
    script = Path(sys.executable).with_name("lightning-toys")
    words = (
        [str(script)]
        if script.exists()
        else [sys.executable, "-c", "from lightning_toys.cli import console; console()"]
    )
    a = subprocess.run([*words, "fitt"], capture_output=True, text=True, cwd=REPO, check=False)
    b = subprocess.run([sys.executable, "cli.py", "fitt"], capture_output=True, text=True, cwd=REPO, check=False)
    assert a.returncode == b.returncode == 2
    assert a.stderr == b.stderr


@pytest.mark.parametrize("text", ["[" * 2000 + "]" * 2000, f"[{'9' * 5000}]", "[&a [*a]]", "[{a: 1, a: 2}]"])
def test_grid_lists_that_are_no_data(runner: Runner, text: str) -> None:
    code, err = runner.raw("sweep", "-c", "configs/flow_vs_regression/flow.yaml", "--grid.model.lr", text)
    assert code == 2
    assert err.startswith("error: --grid.model.lr:")
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"done": true}'])
def test_a_cells_mark_that_is_damaged(runner: Runner, text: str) -> None:
    folder = runner.root / "flow_vs_regression" / "grid" / "mode=flow"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(text)
    code, err = runner.code("sweep", "flow", *FLAGS, "--grid.model.mode", "[flow]")
    assert code == 2
    assert err.count("\n") == 1, err
    assert "sweep.json: is not what a sweep writes" in err


def test_values_that_are_not_finite_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A readout that diverges on bad seeds would look good: each mean, pair and picture says how many it is of."""
    found: dict[str, list[float | None]] = {
        "bad": [1.0, None, None, 1.2], "good": [2.0, 2.5, 3.0, 3.5], "worse": [None, None, None, 4.0],
        "lost": [None] * 4,
    }  # fmt: skip
    for name, values in found.items():
        metric = {"values": values, "mean": None, "ci95": [None, None]}
        content = {"experiment": "toy", "variant": "v", "seeds": [0, 1, 2, 3], "label": name, "references": {}}
        content |= {"metrics": {"l2": metric, "l2@a/euler-1": metric}, "headline": ["l2"], "error_metrics": ["l2"]}
        a_run(tmp_path / name, content)
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(tmp_path), "--baseline", "good", "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert err.count("note: values that are not finite are left out of means, differences and pictures") == 1
    assert "not finite are left out" in page.read_text()
    tables = [t.split("\n") for t in (tmp_path / "comparison" / "comparison.md").read_text().split("**\n")[1:]]
    means, paired, errors, readouts = ([x for x in t if x.startswith("| ")][1:] for t in tables)
    assert means == [
        r"| bad | 4 | 1.1 \[0, 2.4\] (2 of 4) |", "| good | 4 | 2.8 ± 1.0 |", "| lost | 4 | - (0 of 4) |",
        "| worse | 4 | 4 (1 of 4) |",
    ]  # fmt: skip
    assert readouts == [x.replace("| 4 | ", "| ", 1) for x in means]
    # of the seeds 0 and 3: -1 and -2.3; the others have fewer than two pairs
    assert [x.split(" | ")[2] for x in paired] == ["-1.6 ± 8.3", "-", "-"]
    assert [x.split(" | ")[-2] for x in paired] == ["2 of 4", "0 of 4", "1 of 4"]
    assert [x.split(" | ")[2] for x in errors] == ["1.095 (2 of 4)", "2.692", "- (0 of 4)", "4 (1 of 4)"]
    assert [x.split(" | ")[6] for x in errors] == ["2 of 4", "-", "-", "1 of 4"]
    assert "1.1 [0, 2.4] (2 of 4)" in out
    rows = list(csv.DictReader((tmp_path / "comparison/comparison.csv").read_text().splitlines()))
    held = [(r["replicas"], r["values"], r["seeds"], r["not_finite"]) for r in rows if not r["readout"]]
    assert held == [
        ("2", "1.0 1.2", "0 3", "1 2"), ("4", "2.0 2.5 3.0 3.5", "0 1 2 3", ""), ("0", "", "", "0 1 2 3"),
        ("1", "4.0", "3", "0 1 2"),
    ]  # fmt: skip
    labels = [x.get_text() for x in draw(load_runs(find_results([tmp_path])), "l2").axes[0].get_yticklabels()]
    assert labels == ["bad (2 of 4)", "good", "lost (0 of 4)", "worse (1 of 4)"]
    # where all are finite nothing is said
    assert cli.main(["compare", str(tmp_path / "good"), "--out", str(tmp_path / "out")]) == 0
    assert "not finite" not in capsys.readouterr().err


def test_counted_cells_sort_as_numbers(tmp_path: Path) -> None:
    words = ["1.1 [0, 2.4] (2 of 4)", "2.8 ± 1.0", "- (0 of 4)", "2 of 4", "4 (1 of 4)", "-"]
    found = grid(ResultTable("t", ["run", "l2"], [["a", word] for word in words]), {})
    assert found["columns"][1]["number"]
    assert [row["cells"][1].order for row in found["rows"]] == ["1.1", "2.8", None, "2", "4", None]
    assert [row["cells"][1].missing for row in found["rows"]] == [False, False, True, False, False, True]
