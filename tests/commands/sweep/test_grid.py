"""A sweep's grid and its flags: cells and their names, what is checked, how often, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_toys import cli
from lightning_toys.commands.sweep import grid as grids
from lightning_toys.commands.sweep.cell import Cell, Task, fingerprint
from lightning_toys.commands.sweep.grid import cells, plan_grid, samples, telling
from lightning_toys.commands.sweep.settings import Settings, check_ranks, is_address, parse_settings
from lightning_toys.errors import ToyError
from tests.conftest import REPO, Runner

CONFIGS = "configs/flow_vs_regression"


def test_configs_as_an_axis(runner: Runner, tmp_path: Path, compared: list[list[str]]) -> None:
    """One sweep over tasks: cells named after the files, a comparison for each experiment."""
    files = [f"{CONFIGS}/regression.yaml", f"{CONFIGS}/mip.yaml", "configs/generative_policy/gaussian.yaml"]
    content = yaml.safe_load(Path(files[2]).read_text())
    content["model"].setdefault("init_args", {})["evaluation"] = {"samples": 100, "pairs": 20}
    files[2] = str(tmp_path / "gaussian.yaml")
    Path(files[2]).write_text(yaml.safe_dump(content))
    flags = ("--run.root", str(runner.root), "--trainer.max_steps", "2", "--figures.enabled", "false")
    code, err = runner.raw("sweep", "--grid.config", json.dumps(files), "--grid.model.seeds", "[[0,1]]", *flags)
    assert code == 0, err
    names = [f"config={n},seeds=[0,1]" for n in ("regression", "mip", "gaussian")]
    assert compared == [[f"flow_vs_regression/{n}" for n in names[:2]], [f"generative_policy/{names[2]}"]]
    for experiment, found in (("flow_vs_regression", names[:2]), ("generative_policy", names[2:])):
        folder = runner.root / experiment / "configs-sweep"
        assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == set(found)
        assert all((folder / n / "results.json").is_file() for n in found)


def test_files_of_one_name(runner: Runner, tmp_path: Path) -> None:
    files = [f"configs/{e}/flow.yaml" for e in ("flow_vs_regression", "generative_policy")]
    found = cells({"config": files, "model.lr": [0.1]})
    assert [c.name for c in found] == ["config=flow_vs_regression_flow,lr=0.1", "config=generative_policy_flow,lr=0.1"]
    assert [c.configs for c in found] == [(f,) for f in files]
    assert found[0].flags == ("--model.lr", "0.1")
    # stacked on -c; what the file says is part of what the cell is
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {max_steps: 2}\nmodel: {init_args: {seeds: [3]}}\n")
    flags = ("--run.variant", "grid", "--grid.config", f"[{mine}]")
    runner.ok("sweep", "flow", *flags)
    results = json.loads((runner.root / "flow_vs_regression/grid/config=mine/results.json").read_text())
    assert (results["seeds"], results["step"]) == ([3], 2)
    mine.write_text("trainer: {max_steps: 3}\nmodel: {init_args: {seeds: [3]}}\n")
    code, err = runner.code("sweep", "flow", *flags)
    assert code == 2
    assert "was swept with other settings" in err


def test_shipped_configurations_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder; the cells are called, and run with, what they are with the files' paths."""
    mine = tmp_path / "mine.yaml"
    mine.write_text((REPO / "configs/bilevel/regression.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    names, flags = ["bilevel/regression", "bilevel/regression_noisy", "mine"], ["--run.root", str(tmp_path / "logs")]
    plan = plan_grid(["--grid.config", json.dumps(names), *flags], [])
    files = [REPO / "configs" / f"{n}.yaml" for n in names[:2]] + [mine]
    assert [t.folder.name for t in plan.tasks] == ["config=regression", "config=regression_noisy", "config=mine"]
    assert [fingerprint(plan.base, t.cell)[0] for t in plan.tasks] == [f.read_text() for f in files]
    with pytest.raises(ToyError, match="two cells are the same"):
        plan_grid(["--grid.config", json.dumps([names[0], str(files[0])]), *flags], [])


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is checked, in place of checking it."""
    found: list[str] = []

    def check(base: list[str], cell: Cell) -> Task:
        found.append(cell.name)
        return Task(cell, Path("nowhere") / cell.name)

    monkeypatch.setattr(grids, "check_cell", check)
    return found


def test_each_value_is_checked_once(checked: list[str]) -> None:
    """1 + 9 + 9 + 1 of 200 combinations; 200 folders all the same."""
    axes = {"model.a": [*range(10)], "model.b": [*range(10)], "model.c": ["x", "y"]}
    words = [w for k, v in axes.items() for w in (f"--grid.{k}", json.dumps(v))]
    plan = plan_grid(["-c", f"{CONFIGS}/flow.yaml", *words], [])
    assert len(plan.tasks) == len({t.folder for t in plan.tasks}) == 200
    assert len(checked) == 1 + 9 + 9 + 1
    seen = [dict(w.split("=") for w in name.split(",")) for name in checked]
    for key, values in (("a", axes["model.a"]), ("b", axes["model.b"]), ("c", axes["model.c"])):
        assert {c[key] for c in seen} == {str(v) for v in values}


def test_values_are_checked_for_every_file_and_class(checked: list[str]) -> None:
    files = [f"{CONFIGS}/flow.yaml", f"{CONFIGS}/mip.yaml"]
    plan_grid(["--grid.config", json.dumps(files), "--grid.model.a", "[1,2,3]"], [])
    assert sorted(checked) == sorted(f"config={f},a={a}" for f in ("flow", "mip") for a in (1, 2, 3))


def test_of_many_values_the_extremes_are_checked(checked: list[str]) -> None:
    assert telling([3, 1, 2]) == {0, 1, 2}  # few: all
    many: list[object] = [*range(5, 1005)]
    assert telling(many) == {0, 999}
    assert telling([*many, 0.5, -7, "flow"]) == {999, 1000, 1001, 1002}  # each kind by itself, each word
    assert telling([[k] for k in many] + [[1, 2]]) == {0, 999, 1000}
    assert len(list(samples({"model.a": many}, cells({"model.a": many})))) == 2
    plan = plan_grid(["-c", f"{CONFIGS}/flow.yaml", "--grid.model.a", json.dumps(many)], [])
    assert len(plan.tasks) == 1000
    assert checked == ["a=5", "a=1004"]


def test_a_bad_value_is_found_wherever_it_stands(runner: Runner) -> None:
    """Also beside other axes, and among many."""
    for values in ("[0.1,-1]", json.dumps([0.1 * k for k in range(-20, 20)])):
        code, err = runner.code("sweep", "flow", "--grid.model.mode", "[flow,mip]", "--grid.model.lr", values)
        assert code == 2
        assert "--model.lr" in err
        assert "(in the cell " in err
        assert err.count("\n") == 1
    assert not runner.root.exists()


def test_a_name_too_long_for_a_folder(runner: Runner) -> None:
    code, err = runner.code("sweep", "flow", "--grid.model.seeds", json.dumps([[*range(200)], [1]]))
    assert code == 2
    assert err.startswith("error: --grid: a cell would be named seeds=[0,1,2")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sweep.jobs", "0"], "--sweep.jobs: '0' is not allowed; give an integer from 1"),
        (["--sweep.jobs", "two"], "--sweep.jobs: 'two' is not allowed"),
        (["--sweep.jobs", "1.5"], "--sweep.jobs: '1.5' is not allowed"),
        (["--sweep.jobs", "true"], "--sweep.jobs: 'true' is not allowed"),
        (["--sweep.stale", "3"], "--sweep.stale: is no setting any more; leave it out"),
        (["--sweep.devices", "[0,1]"], "--sweep.devices: Ray shares the GPUs out; give --sweep.jobs N"),
        (["--sweep.retry", "maybe"], "--sweep.retry: 'maybe' is not allowed; give true or false"),
        (["--sweep.address", "host"], "--sweep.address: 'host' is not allowed; give auto, or HOST:PORT"),
        (["--sweep.address", "host:99999"], "--sweep.address: 'host:99999' is not allowed"),
        (["--sweep.address", "ray://host:1"], "--sweep.address: 'ray://host:1' is not allowed"),
        (["--sweep.jobs", "2", "--sweep.cpus", "0"], "--sweep.cpus: '0' is not allowed; give CPUs for each cell"),
        (["--sweep.jobs", "2", "--sweep.cpus", "1.5"], "--sweep.cpus: '1.5' is not allowed"),
        (["--sweep.jobs", "2", "--sweep.gpus", "-1"], "--sweep.gpus: '-1' is not allowed"),
        (["--sweep.jobs", "2", "--sweep.gpus", ".nan"], "--sweep.gpus: '.nan' is not allowed"),
        (["--sweep.cpus", "2"], "--sweep.cpus: does nothing in one process; give --sweep.jobs N (> 1)"),
        (["--sweep.jobs", "1", "--sweep.gpus", "1"], "--sweep.gpus: does nothing in one process"),
        (["--sweep.address", "auto", "--sweep.dashboard", "true"], "--sweep.dashboard: is for Ray on this machine"),
        (["--sweep.job", "2"], "--sweep.job: no such flag; give one of jobs, address, cpus, gpus, dashb"),
        (["--sweep.jobs"], "--sweep.jobs: a value is missing"),
        (["--grid.config", "[nowhere.yaml]"], "--grid.config: no file 'nowhere.yaml'"),
        (["--grid.config", "[3]"], "--grid.config: 3 is not allowed; give names"),
        (["--trainer.devices", "2", "--trainer.accelerator", "cpu"], "--trainer.devices: a cell runs in one process"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], says: str, runner: Runner) -> None:
    code, err = runner.raw(
        "sweep", "-c", f"{CONFIGS}/flow.yaml", "--run.root", str(runner.root), "--grid.model.mode", "[mip]", *flags
    )
    assert code == 2
    assert err.startswith(f"error: {says}"), err
    assert err.count("\n") == 1
    assert not runner.root.exists()


WILD = ["", " ", "0", "-1", "1e400", "9" * 400, "[1]", "{a: 1}", "null", ":1", "a:", "a:b", "é:0", "&a *a", "'"]


@pytest.mark.parametrize("name", ["jobs", "address", "cpus", "gpus", "dashboard", "retry", "stale", "x"])
def test_wild_values_are_refused_in_one_line(name: str) -> None:
    """No value of a sweep's flag ends in anything but settings or a ToyError of one line."""
    for text in WILD:
        with pytest.raises(ToyError, match=rf"^--sweep\.{name}: [^\n]+$"):
            parse_settings([f"--sweep.{name}={text}"])
    assert is_address("auto")
    assert is_address("10.0.0.1:6379")
    assert is_address("node-1.cluster:1")


@pytest.mark.slow
def test_without_ray_it_is_one_line(runner: Runner) -> None:
    """The import is blocked in a process of its own; in one process Ray is not asked for."""
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import importlib.util
true = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "ray" else true(name, package)
from pathlib import Path
from lightning_toys.cli import main
assert main([*sys.argv[2:], "--sweep.jobs", "2"]) == 2
assert not Path(sys.argv[1]).exists()
print("and in one process:", file=sys.stderr)
sys.exit(main(sys.argv[2:]))
"""
    words = runner.words("sweep", "flow", "--grid.model.mode", "[flow]", "--trainer.max_steps", "2")
    line = [sys.executable, "-c", script, str(runner.root), *words]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=120)
    says = "--sweep.jobs, --sweep.address: ray is not installed; pip install 'lightning-toys[sweep]'"
    assert done.stderr.partition("and in one process:")[0] == f"error: {says}\n"
    assert done.returncode == 0, done.stderr


def test_ranks_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
    """Several ranks are refused, once; nodes of a cluster are not."""
    for given in ({"WORLD_SIZE": "4", "RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}):
        with monkeypatch.context() as patch:
            for name, value in given.items():
                patch.setenv(name, value)
            code, err = runner.code("sweep", "flow", "--grid.model.mode", "[mip]")
            assert code == 2
            assert err.startswith("error: sweep: 4 ranks of it were started, and one is wanted; give --sweep.jobs N")
            assert err.count("\n") == 1
            check_ranks(Settings(address="auto"))
            patch.setenv([*given][1], "3")
            code, err = runner.code("sweep", "flow", "--grid.model.mode", "[mip]")
            assert (code, err) == (2, "")
    assert not runner.root.exists()
    check_ranks(Settings())


def test_help_names_the_sweeps_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "--help"]) == 0
    out = capsys.readouterr().out
    own = ("jobs", "address", "cpus", "gpus", "dashboard", "retry")
    searching = ("metric", "direction", "trials", "seed", "sampler", "pruner")
    for flag in (*(f"--sweep.{f}" for f in own), "--grid.config", *(f"--search.{f}" for f in searching)):
        assert flag in out
