"""sweep --search: trials are shared out, resumed and told to Optuna; no difference comes without its error."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from lightning_toys import cli
from lightning_toys.commands.sweep.samplers import pruner_of, sampler_of
from lightning_toys.commands.sweep.search_space import corners, distribution, parse_axis
from lightning_toys.errors import ToyError
from lightning_toys.training.results import limits_in
from tests.commands.sweep.test_cells import metrics, stop_in_the_middle, wait_for
from tests.conftest import Runner
from tests.processes import fork

LR = ("--search.model.lr", "{low: 1e-4, high: 1e-2, log: true}")
LAYERS = ("--search.model.network.layers", "{choices: [1, 2]}")


def states(folder: Path) -> dict[int, tuple[str, Any, dict[str, Any]]]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'search.db'}")
    try:
        study = optuna.load_study(study_name="search", storage=storage)
        return {t.number: (t.state.name, t.value, t.params) for t in study.get_trials()}
    finally:
        storage.remove_session()
        storage.engine.dispose()


def mark(folder: Path, k: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"trial-{k:04d}" / "sweep.json").read_text())
    return found


@pytest.mark.slow  # test_ray.py kills a worker in the gate
def test_a_search_whose_driver_is_killed_goes_on(runner: Runner, tmp_path: Path) -> None:
    """With the trial that was cut off; trials and numbers are those of a search that nobody killed."""
    flags = ("--search", *LR, *LAYERS, "--search.trials", "3", "--search.metric", "l2", "--model.seeds", "[0,1,2]")
    flags += ("--trainer.max_steps", "600", "--checkpoint.every_n_steps", "50")
    words = runner.words("sweep", "regression", *flags, "--run.variant", "two")
    folder = runner.root / "flow_vs_regression" / "two"
    pid = fork(lambda: cli.main(words), tmp_path / "says")
    runs = [folder / f"trial-{k:04d}" for k in range(3)]
    wait_for(lambda: stop_in_the_middle(runs))
    code, err = runner.raw(*words)  # one driver at a time
    assert code == 2
    assert "two is searched by" in err
    assert f"(process {pid}" in err
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    runner.ok("sweep", "regression", *flags, "--run.variant", "two")
    found = states(folder)
    assert [s for s, _, _ in found.values()] == ["COMPLETE"] * 3
    text = runner.ok("sweep", "regression", *flags, "--run.variant", "one")
    alone = folder.with_name("one")
    for k in range(3):
        assert mark(folder, k)["params"] == mark(alone, k)["params"]
        assert metrics(folder / f"trial-{k:04d}") == metrics(alone / f"trial-{k:04d}")
        number = mark(folder, k)["trial"]
        assert found[number][1] == np.mean(metrics(folder / f"trial-{k:04d}")["l2"]["values"])
        assert found[number][2] == mark(folder, k)["params"]
        assert sorted(p.name for p in (folder / f"trial-{k:04d}").glob("results*")) == [
            "results-1.json",
            "results.json",
        ]
    assert len({json.dumps(mark(folder, k)["params"]) for k in range(3)}) == 3
    # finished trials are not run again, more of them can be asked for, another search needs another name
    err = runner.ok("sweep", "regression", *flags, "--run.variant", "one")
    assert "3 of 3 cells are done already" in err
    assert "cell 1" not in err
    code, err = runner.code("sweep", "regression", *flags, "--run.variant", "one", "--search.seed", "1")
    assert code == 2
    assert "was searched with other settings" in err
    # the table: best first, each with its interval, differences from the best by seed with theirs
    rows = list(csv.reader((alone / "comparison" / "trials.csv").read_text().splitlines()))
    means = [float(r[3]) for r in rows[1:]]
    assert means == sorted(means)
    table = (alone / "comparison" / "trials.md").read_text()
    lines = [x for x in table.splitlines() if x.startswith("| trial-")]
    # of so few seeds ± may reach below 0, where no error is: then the interval's ends; differences keep theirs
    assert [x.count(" ± ") + x.count(r" \[0, ") for x in lines] == [1, 2, 2]
    assert all(" ± " in x for x in lines[1:])
    best = mark(alone, int(rows[1][0][-1]))["params"]
    assert "looks better than it is" in text
    line = next(x for x in text.splitlines() if x.startswith("  python cli.py fit"))
    assert f"--model.lr {json.dumps(best['model.lr'])}" in line
    assert line.endswith("--model.seeds '[3, 4, 5]'")
    assert line.count("--model.seeds") == 1


@pytest.mark.slow  # a pruned trial is in the gate
def test_trials_that_blow_up_are_told_as_failed(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--search.model.lr", "{choices: [1e30, 1e-3]}", "--search.metric", "l2", "--trainer.max_steps", "60")
    flags += ("--search.direction", "maximize", "--search.trials", "4", "--model.seeds", "[0]", "--run.variant", "a")
    folder = runner.root / "flow_vs_regression" / "a"
    err = runner.ok("sweep", "regression", *flags)
    found = states(folder)
    wild = {n for n, (_, _, params) in found.items() if params["model.lr"] == "1e30"}
    assert 0 < len(wild) < 4
    assert {n for n, (state, _, _) in found.items() if state == "FAIL"} == wild
    assert "not finite" in err
    assert "which trial is better may be chance; give more --model.seeds" in err
    table = (folder / "comparison" / "trials.md").read_text()
    assert table.count("non-finite") == len(wild)
    assert "±" not in table.split("\n", 2)[2]  # one seed: no interval, and so no difference
    rows = [x.split("|") for x in table.splitlines() if x.startswith("| trial-")]
    assert {r[5].strip() for r in rows} == {"-"}
    wilder = ("--search.model.lr", "{choices: [1e29, 1e30]}", "--search.trials", "1")
    code, err = runner.code("sweep", "regression", *flags[:-1], "b", *wilder)
    assert code == 1
    assert "all 1 trials failed, the first by: " in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--search.model.lr", "3"], "--search.model.lr: '3' is not allowed; give {low: 1e-4, high: 1e-2, log: true}"),
        (
            ["--search.model.lr", "{low: 1, high: 0.1}"],
            "--search.model.lr: '{low: 1, high: 0.1}' is not allowed, low is",
        ),
        (
            ["--search.model.lr", "{low: 0, high: 0.1, log: true}"],
            "--search.model.lr: '{low: 0, high: 0.1, log: true}' is",
        ),
        (
            ["--search.model.lr", "{lo: 0, high: 0.1}"],
            "--search.model.lr: '{lo: 0, high: 0.1}' is not allowed, no key 'lo'",
        ),
        (
            ["--search.model.mode", "{choices: [flow]}"],
            "--search.model.mode: '{choices: [flow]}' is not allowed, choices",
        ),
        (["--search.model.mode", "{choices: [flow, flwo]}"], "--model.mode: 'flwo' is not allowed; give one of"),
        (["--search.model.lrr", "{low: 0.1, high: 0.2}"], "--model.lrr: no such"),
        (["--search.model.seeds", "{choices: [1, 2]}"], "--search.model.seeds: is no setting to search"),
        ([*LR, "--search.trials", "0"], "--search.trials: '0' is not allowed; give an integer >= 1"),
        ([*LR, "--search.direction", "up"], "--search.direction: 'up' is not allowed; give one of minimize, maximize"),
        ([*LR, "--search.trial", "3"], "--search.trial: no such flag; give metric, direction, trials, seed"),
        (
            [*LR, "--search.sampler", "tp"],
            "--search.sampler: 'tp' is not allowed; give one of tpe, cmaes",
        ),
        (
            [*LR, "--search.sampler", "grid"],
            "--search.sampler: grid is not allowed with the range of",
        ),
        (
            [*LR, "--search.sampler", "optuna.samplers.Nothing"],
            "--search.sampler: 'optuna.samplers.Nothing'",
        ),
        ([*LR, "--search.sampler", "no.such.Class"], "--search.sampler: 'no.such.Class' is not allowed (No module"),
        (
            [*LR, "--search.sampler", "pathlib.Path"],
            "--search.sampler: 'pathlib.Path' is not allowed; it is no",
        ),
        (
            [*LR, "--search.pruner", "hyper"],
            "--search.pruner: 'hyper' is not allowed; give one of none, median",
        ),
        (
            [*LR, "--search.pruner", "optuna.pruners.PercentilePruner"],
            "--search.pruner: 'optuna.pruners.Perc",
        ),
        ([*LR, "--search.metric", "l3"], "--search.metric: no 'l3' in results.json; give one of l1, l2"),
        ([*LR, "--model.lr", "0.1"], "--model.lr: given beside --search.model.lr; give one of them"),
        ([*LR, "--grid.model.mode", "[flow]"], "--grid, --search: not allowed together"),
        ([*LR, "--sweep.retry", "true"], "--sweep.retry: not allowed in a search"),
        (["--search"], "--search: give at least one flag to choose"),
    ],
)
def test_bad_searches_are_one_line(flags: list[str], says: str, runner: Runner) -> None:
    metric = [] if "--search.metric" in flags else ["--search.metric", "l2"]
    code, err = runner.code("sweep", "regression", *metric, *flags)
    assert code == 2
    assert err.startswith(f"error: {says}"), err
    assert err.count("\n") == 1
    assert not runner.root.exists()


def test_metric_and_optuna_are_needed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    code, err = runner.code("sweep", "regression", *LR)
    assert (code, err) == (2, "error: --search.metric: is missing; give a metric of results.json, such as l2\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, err = runner.code("sweep", "regression", *LR, "--search.metric", "l2")
    assert (code, err) == (2, "error: --search: optuna is not installed; pip install 'lightning-toys[search]'\n")


def test_a_pruned_trial_stops_at_its_validation(runner: Runner) -> None:
    """The worst of four are stopped early, are told to Optuna as pruned, and stand in the table as such."""
    space = ("--search.model.lr", "{choices: [0.001, 0.002, 1e-7, 1e-8]}", "--search.sampler", "grid")
    flags = (*space, "--search.pruner", "pruners.Early", "--search.metric", "l2", "--model.seeds", "[0]")
    flags += ("--run.variant", "a")
    flags += ("--trainer.max_steps", "300", "--trainer.val_check_interval", "100")
    err = runner.ok("sweep", "regression", *flags)
    folder = runner.root / "flow_vs_regression" / "a"
    found = states(folder)
    assert len(found) == 4  # a grid has as many trials as points
    pruned = {n for n, (state, _, _) in found.items() if state == "PRUNED"}
    marks = {k: mark(folder, k) for k in range(4)}
    assert pruned == {m["trial"] for m in marks.values() if m["params"]["model.lr"] in ("1e-7", "1e-8")}
    assert len(pruned) == 2
    for k, m in marks.items():
        run = folder / f"trial-{k:04d}"
        if m["trial"] in pruned:
            assert m["pruned"]["step"] == 100
            assert m["done"] is False
            assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 100
        else:
            assert m["done"]
    assert err.count("pruned at step 100: l2 ") == 2
    assert (folder / "comparison" / "trials.md").read_text().count("pruned at step 100") == 2
    assert "4 of 4 cells are done already" in runner.ok("sweep", "regression", *flags)


SPACE = {"a": {"low": 0.0, "high": 1.0, "log": False, "int": False}, "b": {"choices": ["x", "y"]}}


def ask(settings: dict[str, Any], study: Any, index: int, last: Any) -> tuple[dict[str, Any], Any]:
    study.sampler = last = sampler_of(settings, index, len(study.trials), last)
    trial = study.ask({k: distribution(a) for k, a in settings["space"].items()})
    study.tell(trial, trial.params.get("a", 0.5) ** 2)
    return trial.params, last


@pytest.mark.parametrize("name", ["tpe", "cmaes", "random", "grid", "gp", "optuna.samplers.QMCSampler"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers(name: str) -> None:
    """Each proposes as many different trials as there can be; another driver goes on with others; a seed repeats."""
    if name == "cmaes":
        pytest.importorskip("cmaes")
    space = {"b": {"choices": [*"stuvwxyz"]}, "c": SPACE["b"]} if name == "grid" else SPACE
    settings = {"sampler": name, "seed": 3, "space": space}
    runs = []
    for _ in range(2):
        study, last, seen = optuna.create_study(), None, []
        for k in range(14):
            if k == 7:
                last = None  # the driver was killed, and started again
            params, last = ask(settings, study, k, last)
            seen.append(params)
        runs.append(seen)
    assert len({json.dumps(p) for p in runs[0]}) >= (10 if name == "gp" else 14)  # which may settle on the best
    assert runs[0] == runs[1]


def test_a_sampler_s_package_is_named(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "cmaes" else true(name, *a))
    code, err = runner.code("sweep", "regression", *LR, "--search.metric", "l2", "--search.sampler", "cmaes")
    assert (code, err) == (2, "error: --search.sampler: cmaes needs cmaes: pip install cmaes\n")


def test_pruners_know_when_trials_are_first_judged() -> None:
    assert type(pruner_of({"pruner": "median"}, 100)).__name__ == "MedianPruner"
    hyperband = pruner_of({"pruner": "hyperband"}, 100)
    assert hyperband._min_resource == 100


def test_spaces() -> None:
    assert parse_axis("model.lr", "{low: 1e-4, high: 1e-2, log: true}") == {
        "low": 1e-4,
        "high": 1e-2,
        "log": True,
        "int": False,
    }
    layers = parse_axis("x", "{low: 1, high: 8, int: true}")
    assert (layers["low"], type(layers["high"])) == (1, int)
    sizes = parse_axis("y", "{choices: [[64, 64], null, relu]}")
    assert sizes == {"choices": ["[64, 64]", "null", "relu"]}
    with pytest.raises(ToyError, match="integers where int is true"):
        parse_axis("x", "{low: 1.5, high: 8, int: true}")
    # every bound and every choice is checked once, not every combination
    found = [c.flags for c in corners({"x": layers, "y": sizes})]
    assert found[0] == ("--x", "1", "--y", "[64, 64]")
    assert len(found) == 1 + 1 + 2
    assert {f[1] for f in found} == {"1", "8"}
    assert {f[3] for f in found} == set(sizes["choices"])


def test_limits_are_those_of_the_trials_metric() -> None:
    metrics = {
        "l2": {"values": [1.0]},
        "off3": {"values": [0.5], "share_ci95": [0.1, 0.9]},
        "reward": {"values": [1.0]},
    }
    found = [limits_in({"metrics": metrics, "error_metrics": ["l2"]}, name) for name in metrics]
    assert found == [(0.0, float("inf")), (0.0, 1.0), (-float("inf"), float("inf"))]
