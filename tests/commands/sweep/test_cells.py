"""A sweep's cells in one process, and several processes on one folder: a cell is run by whoever owns its folder."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_toys import cli
from lightning_toys.commands.sweep import cell
from lightning_toys.commands.sweep.agenda import Agenda
from lightning_toys.commands.sweep.cell import Cell, Order, Outcome, Plan, Task, write_mark
from lightning_toys.commands.sweep.ray_worker import leave_group
from lightning_toys.errors import RunFolderError, ToyError
from lightning_toys.training.ownership import OWNER, acquire, create, last_record
from tests.conftest import Runner
from tests.processes import fork


def wait_for(found: Callable[[], Any], seconds: float = 180.0) -> Any:
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return answer


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    return found


def owner(folder: Path) -> int | None:
    """The process that owns a folder."""
    found = last_record(folder).owner
    return found.get("pid") if found else None


def stop_in_the_middle(folders: list[Path]) -> tuple[int, Path] | None:
    """Stop a process that is training one of some cells, and has written a checkpoint; return it and the cell."""
    for folder in folders:
        if (folder / "checkpoints" / "last.ckpt").exists() and (pid := owner(folder)):
            os.kill(pid, signal.SIGSTOP)
            if owner(folder) == pid and not (folder / "results.json").exists():
                return pid, folder
            os.kill(pid, signal.SIGCONT)
    return None


@contextmanager
def held(folder: Path, says: Path) -> Iterator[int]:
    """Have another process own a folder."""

    def hold() -> None:
        with acquire(folder):
            signal.pause()

    pid = fork(hold, says)
    try:
        wait_for(lambda: owner(folder) == pid)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.slow  # a cell that is held is in the gate, and so is a worker that is killed
def test_two_drivers_on_one_folder_and_one_is_killed(runner: Runner, tmp_path: Path) -> None:
    """SIGKILL in the middle of a cell: the other goes on with it, and all is as if one process had done it."""
    flags = ("--model.seeds", "[0,1]", "--trainer.max_steps", "800", "--checkpoint.every_n_steps", "50")
    flags += ("--grid.data.num_train", "[20,30,50]")
    words = runner.words("sweep", "regression", *flags, "--run.variant", "many")
    folder = runner.root / "flow_vs_regression" / "many"
    says = [tmp_path / f"says-{k}" for k in range(2)]
    pids = [fork(lambda: cli.main(words), s) for s in says]
    cells = [folder / f"num_train={n}" for n in (20, 30, 50)]
    pid, cut = wait_for(lambda: stop_in_the_middle(cells))
    os.kill(pid, signal.SIGKILL)
    codes = {p: os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids}
    text = "\n".join(s.read_text() for s in says)
    assert codes == {p: -9 if p == pid else 0 for p in pids}, text
    assert "Traceback" not in text
    # unless the other was through before
    left = (
        "" if (folder / "comparison").exists() else runner.ok(*("sweep", "regression"), *flags, "--run.variant", "many")
    )
    assert (folder / "comparison" / "comparison.md").is_file(), text + left
    runner.ok("sweep", "regression", *flags, "--run.variant", "one")
    for path in cells:
        assert metrics(path) == metrics(folder.with_name("one") / path.name), path
        # fit and test wrote their results once each
        assert sorted(p.name for p in path.glob("results*")) == ["results-1.json", "results.json"]
    assert cut in cells
    # negative control: the metrics tell cells apart
    assert metrics(cells[0]) != metrics(cells[1])


def test_a_cell_that_is_held_is_skipped(runner: Runner, tmp_path: Path, compared: list[list[str]]) -> None:
    flags = ("--trainer.max_steps", "2", "--run.variant", "grid", "--grid.model.mode", "[regression,flow]")
    folder = runner.root / "flow_vs_regression" / "grid"
    with held(folder / "mode=flow", tmp_path / "says") as pid:
        err = runner.ok("sweep", "flow", *flags)
        assert "skipped: mode=flow, which is held by" in err
        assert "1 of 2 cells are still run elsewhere" in err
        assert f"(process {pid}" in err
        assert compared == []
        assert [p.name for p in (folder / "mode=flow").iterdir()] == [OWNER]
    assert "1 of 2 cells are done already" in runner.ok("sweep", "flow", *flags)
    assert compared == [["flow_vs_regression/mode=regression", "flow_vs_regression/mode=flow"]]


def test_the_comparison_is_made_by_one(runner: Runner, tmp_path: Path, compared: list[list[str]]) -> None:
    flags = ("--trainer.max_steps", "2", "--run.variant", "grid", "--grid.model.mode", "[flow]")
    with held(runner.root / "flow_vs_regression" / "grid" / cell.COMMON, tmp_path / "says"):
        assert "another process is making the comparison" in runner.ok("sweep", "flow", *flags)
    assert compared == []


def test_who_was_thought_dead_writes_nothing(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose cell somebody else took over leaves it alone and says so."""
    folder = runner.root / "flow_vs_regression" / "grid" / "mode=flow"
    true_run = cell.run_trainer

    def run(args: list[str]) -> object:
        taker = {"host": "far", "pid": 7, "machine": "other"}
        assert create(folder / OWNER, last_record(folder).number + 1, taker)
        return true_run(args)

    monkeypatch.setattr(cell, "run_trainer", run)
    flags = ("--trainer.max_steps", "60", "--run.variant", "grid", "--grid.model.mode", "[flow]")
    err = runner.ok("sweep", "flow", *flags)
    assert "left to another: mode=flow" in err
    assert "far (process 7)" in err
    assert not (folder / "checkpoints" / "last.ckpt").exists()
    assert not json.loads((folder / "sweep.json").read_text())["done"]


def test_refused_and_crashed_cells(runner: Runner, monkeypatch: pytest.MonkeyPatch, compared: list[list[str]]) -> None:
    """A cell that is refused while it runs is noted; the others go on; nobody tries it again unless asked to."""
    true_run, trouble = cell.run_trainer, [True]
    calls: list[str] = []

    def run(args: list[str]) -> object:
        name = args[args.index("--run.name") + 1]
        calls.append(name)
        if name == "lr=0.01" and trouble[0]:
            raise ToyError("--model.probe: the step is refused")
        if name == "lr=0.02" and trouble[0]:
            raise RuntimeError("no memory")
        return true_run(args)

    monkeypatch.setattr(cell, "run_trainer", run)
    flags = ("--trainer.max_steps", "2", "--run.variant", "grid", "--grid.model.lr")
    code, err = runner.code("sweep", "flow", *flags, "[0.01,0.001]")
    assert code == 2
    assert "error: --model.probe: the step is refused (in the cell lr=0.01)" in err
    assert "1 of 2 cells were refused: lr=0.01" in err
    assert compared == [["flow_vs_regression/lr=0.001"]]
    calls.clear()
    code, err = runner.code("sweep", "flow", *flags, "[0.01,0.001]")
    assert (code, calls) == (2, [])
    assert "1 failed before: lr=0.01" in err
    with pytest.raises(RuntimeError, match="no memory"):
        cli.main(runner.words("sweep", "flow", *flags, "[0.01,0.02,0.001]"))
    code, err = runner.code("sweep", "flow", *flags, "[0.01,0.02,0.001]")
    assert code == 1
    assert "1 of 3 cells crashed: lr=0.02; 1 of 3 cells were refused: lr=0.01" in err
    trouble[0] = False
    err = runner.ok("sweep", "flow", *flags, "[0.01,0.02,0.001]", "--sweep.retry", "true")
    assert calls == ["lr=0.02", "lr=0.01", "lr=0.01", "lr=0.02", "lr=0.02"]


@pytest.mark.slow  # the test above has refused cells too
def test_a_cell_that_is_refused_before_its_first_step(runner: Runner, compared: list[list[str]]) -> None:
    """Only when both values meet; its folder is still the sweep's to write the reason to."""
    axes = ("--grid.model.network.kind", "[film]", "--grid.model.network.layers", "[1]")
    code, err = runner.code("sweep", "flow", "--trainer.max_steps", "2", "--run.variant", "grid", *axes)
    assert code == 2, err  # the only values there are: refused before any work
    assert not runner.root.exists()
    axes = ("--grid.model.network.kind", "[concat,film]", "--grid.model.network.layers", "[2,1]")
    code, err = runner.code("sweep", "flow", "--trainer.max_steps", "2", "--run.variant", "grid", *axes)
    assert code == 2
    assert "1 of 4 cells were refused: kind=film,layers=1" in err
    mark = json.loads((runner.root / "flow_vs_regression/grid/kind=film,layers=1/sweep.json").read_text())
    assert mark["failed"]["kind"] == "refused"
    assert len(compared[0]) == 3


@pytest.mark.slow  # below, a driver is killed
def test_a_stopped_sweep_goes_on_from_checkpoints(runner: Runner, tmp_path: Path, compared: list[list[str]]) -> None:
    flags = ("--trainer.max_steps", "1200", "--run.variant", "grid", "--grid.model.mode", "[regression,flow]")
    flags += ("--model.seeds", "[0]", "--checkpoint.every_n_steps", "100")
    folder = runner.root / "flow_vs_regression" / "grid"
    for number in (signal.SIGINT, signal.SIGTERM):
        says = tmp_path / f"says-{number}"
        pid = fork(lambda: cli.main(runner.words("sweep", "flow", *flags)), says)
        wait_for(lambda pid=pid: any(owner(p) == pid and list(p.glob("events.*")) for p in folder.glob("mode=*")))
        os.kill(pid, number)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number, says.read_text()
        assert not [p for p in folder.glob("mode=*") if last_record(p).held()], says.read_text()
    runner.ok("sweep", "flow", *flags)
    runner.ok("sweep", "flow", *(f if f != "grid" else "one" for f in flags))
    for mode in ("regression", "flow"):
        assert metrics(folder / f"mode={mode}") == metrics(folder.with_name("one") / f"mode={mode}")
    assert len(compared) == 2


# what is next, and how far it is


def agenda(tmp_path: Path, count: int = 4) -> Agenda:
    return Agenda(Plan([], [Task(Cell(f"c{k}", ()), tmp_path / f"c{k}") for k in range(count)]))


def test_an_agenda_leaves_out_what_is_settled(tmp_path: Path) -> None:
    write_mark(tmp_path / "c0", {"flags": [], "done": True})
    write_mark(tmp_path / "c1", {"flags": [], "done": False, "failed": {"kind": "refused", "reason": "x"}})
    it = agenda(tmp_path)
    assert it.total == 2
    write_mark(tmp_path / "c2", {"flags": [], "done": False, "pruned": {"step": 1, "value": 2.0}})  # by another driver
    order = it.next()
    assert order is not None
    assert order.task.cell.name == "c3"
    assert it.ended == 1
    assert it.next() is None


def test_an_agenda_tries_once_more_what_others_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    it = agenda(tmp_path, 2)
    first, second = it.next(), it.next()
    assert first is not None
    assert second is not None
    it.end(first, Outcome("held", "far (process 7)"))
    assert not it.second_round()  # nothing has passed since
    it.end(first, Outcome("held", "far (process 7)"))
    it.end(second, Outcome("done"))
    assert it.held == {"c0": "far (process 7)"}
    assert it.second_round()
    again = it.next()
    assert again is not None
    assert again.task == first.task
    it.end(again, Outcome("done"))
    assert it.held == {}
    assert capsys.readouterr().err.count("skipped: c0, which is held by far (process 7)") == 2
    with pytest.raises(RunFolderError, match="no room"):
        it.end(again, Outcome("unwritable", "no room"))


def test_the_time_left(tmp_path: Path) -> None:
    it = agenda(tmp_path)
    assert it.time_left() == ""
    it.started -= 120
    it.end(Order([], it.waiting.pop(), it.session), Outcome("done"))
    assert it.time_left() == ", about 6.0 min left"  # two minutes a cell, three are left


def test_a_worker_forgets_its_node_s_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers inherit what srun or torchrun told the node: taken for ranks they would be silent, or wait."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    group = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "3", "SLURM_NTASKS": "8"}
    for given in (group, slurm):
        for name, value in {**given, "SLURM_JOB_ID": "9"}.items():
            monkeypatch.setenv(name, value)
        leave_group()
        assert not {*given} & set(os.environ)
        assert os.environ["SLURM_JOB_ID"] == "9"
        assert not TorchElasticEnvironment.detect()
        assert not SLURMEnvironment.detect()
