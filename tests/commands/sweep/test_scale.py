"""One sweep, many processes: each cell is run once, whoever dies, and the numbers are those of one process."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_toys import cli
from lightning_toys.commands.sweep import cell, claims
from lightning_toys.commands.sweep.cell import Cell, Plan, Task
from lightning_toys.commands.sweep.claims import BEAT, born, create, look, take
from lightning_toys.commands.sweep.command import check_devices
from lightning_toys.commands.sweep.workers import Foreman, devices, leave_group
from lightning_toys.errors import NonFiniteError, ToyError
from lightning_toys.training.metrics_reader import read_csv
from tests.conftest import REPO, Runner
from tests.processes import fork

CONFIGS = "configs/flow_vs_regression"


def wait_for(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return answer


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    return found


def holder(folder: Path, cell: str) -> int | None:
    link = look(folder / ".claims" / cell)
    return link.holder.get("pid") if link.holder else None


# claims


def old(folder: Path, **holder: Any) -> None:
    """Leave a claim whose holder has been silent for an hour."""
    folder.mkdir(parents=True)
    assert create(folder, 0, {"host": "far", "pid": 1, "machine": "far away", "born": "1", **holder})
    os.utime(folder / "0", (time.time() - 3600,) * 2)


def test_one_of_many_takers_wins(tmp_path: Path) -> None:
    """Threads and processes at once, thirty times over: one takes the dead holder's claim, and only one."""
    start, wins = multiprocessing.Barrier(3), tmp_path / "wins"

    def race() -> None:
        for i in range(30):
            got: list[Any] = []
            start.wait(timeout=60)
            threads = [
                threading.Thread(target=lambda i=i, got=got: got.append(take(tmp_path / str(i), 60)))  # type: ignore[misc]
                for _ in range(3)
            ]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            with wins.open("a") as f:
                f.writelines(f"{i}\n" for claim in got if claim)
        start.wait(timeout=60)  # a process that has ended is dead, and its claims anybody's

    for i in range(30):
        old(tmp_path / str(i))
    children = [fork(race, tmp_path / "says") for _ in range(2)]
    race()
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0, 0], (tmp_path / "says").read_text()
    assert sorted(map(int, wins.read_text().split())) == list(range(30))


def test_a_slow_living_holder_keeps_its_claim(tmp_path: Path) -> None:
    claim = take(tmp_path / "a", stale=0.4)
    assert claim is not None
    end = time.monotonic() + 1.2
    while time.monotonic() < end:  # three times as long as it would take to be thought dead
        assert take(tmp_path / "a", stale=0.4) is None
        time.sleep(0.05)
    claim.check()
    # negative control: without its heart beat it is taken over, and learns of it
    claim.ended.set()
    claim.thread.join()
    other = wait_for(lambda: take(tmp_path / "a", stale=0.4))
    claim.touch()
    with pytest.raises(Exception, match="has taken it over"):
        claim.check()
    claim.release()  # which is no longer its own
    assert take(tmp_path / "a", stale=60) is None
    other.release()
    assert take(tmp_path / "a", stale=60) is not None


def test_who_counts_as_dead(tmp_path: Path) -> None:
    gone = fork(lambda: take(tmp_path / "b", 1e6) is None, tmp_path / "says")
    os.waitpid(gone, 0)
    claim = take(tmp_path / "b", stale=1e6)  # of this machine: seen at once
    assert claim is not None
    assert claim.before.holder is not None
    assert claim.before.holder["pid"] == gone
    assert take(tmp_path / "b", stale=1e6) is None
    old(tmp_path / "c")
    assert take(tmp_path / "c", stale=7200) is None  # another machine's: only silence tells
    assert take(tmp_path / "c", stale=600) is not None
    old(tmp_path / "d", machine=look(tmp_path / "b").holder["machine"], pid=os.getpid(), born="0")  # type: ignore[index]
    assert take(tmp_path / "d", stale=7200) is not None  # the number is in use again, by another process
    old(tmp_path / "e")
    (tmp_path / "e" / "0").write_text("")  # its writer died before it could say its name
    os.utime(tmp_path / "e" / "0")
    assert take(tmp_path / "e", stale=60) is None
    os.utime(tmp_path / "e" / "0", (0, 0))
    assert take(tmp_path / "e", stale=60) is not None
    assert born(os.getpid()) is not None
    assert BEAT > 0


def test_a_claim_let_go_on_a_full_disk_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its holder has not died: nothing is said of it to the next."""
    claim = take(tmp_path / "a")
    assert claim is not None
    with monkeypatch.context() as patch:
        patch.setattr(claims, "create", full_disk)
        claim.release()
    assert not look(tmp_path / "a").held(stale=1e12)
    after = take(tmp_path / "a", stale=1e12)
    assert after is not None
    assert after.before.holder is None
    after.release()


def full_disk(*_: object) -> bool:
    raise OSError(errno.ENOSPC, "no space left")


def test_a_taker_who_looked_long_ago_loses(tmp_path: Path) -> None:
    """Links that nobody needs are dropped; a number that was used and dropped is no claim."""
    for _ in range(3):
        claim = take(tmp_path / "a")
        assert claim is not None
        claim.release()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["4", "5"]
    assert not create(tmp_path / "a", 2, {"host": "late"})
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["4", "5"]


# processes

GRID = ("--grid.data.num_train", "[20,30,50]")
LONGER = ("--model.seeds", "[0,1]", "--trainer.max_steps", "1000", "--checkpoint.every_n_steps", "50")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Note what is compared in place of drawing it."""
    found: list[list[str]] = []
    note = lambda folder, runs: found.append([f"{folder.parent.name}/{r.name}" for r in runs])  # noqa: E731
    monkeypatch.setattr("lightning_toys.commands.compare.report.compare_folder", note)
    return found


def test_one_of_three_is_killed(runner: Runner, tmp_path: Path) -> None:
    """SIGKILL in the middle of a cell: another goes on with it, and all is as if one process had done it."""
    words = runner.words("sweep", "regression", *LONGER, "--run.variant", "many", *GRID)
    folder = runner.root / "flow_vs_regression" / "many"
    says = [tmp_path / f"says-{k}" for k in range(3)]
    pids = [fork(lambda: cli.main(words), s) for s in says]
    names = [f"num_train={n}" for n in (20, 30, 50)]

    def victim() -> tuple[int, str] | None:
        for name in names:
            if (folder / name / "checkpoints" / "last.ckpt").exists() and (pid := holder(folder, name)):
                os.kill(pid, signal.SIGSTOP)
                if holder(folder, name) == pid and not (folder / name / "results.json").exists():
                    return pid, name
                os.kill(pid, signal.SIGCONT)
        return None

    pid, cut = wait_for(victim)
    os.kill(pid, signal.SIGKILL)
    codes = {p: os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids}
    text = "\n".join(s.read_text() for s in says)
    assert codes == {p: -9 if p == pid else 0 for p in pids}, text
    assert "had started it and gives no more signs of life" in text
    assert "the cell goes on from its last checkpoint" in text
    assert "Traceback" not in text
    assert (folder / "comparison" / "comparison.md").is_file()
    assert not (folder / "comparison" / "comparison-1.md").exists()
    runner.ok("sweep", "regression", *LONGER, "--run.variant", "one", *GRID)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, ".claims", "comparison"])
    for name in names:
        assert metrics(folder / name) == metrics(folder.with_name("one") / name), name
        # fit and test wrote their results once each
        assert sorted(p.name for p in (folder / name).glob("results*")) == ["results-1.json", "results.json"]
    assert cut in names
    # negative control: the metrics tell cells apart
    assert metrics(folder / names[0]) != metrics(folder / names[1])


def test_another_host_that_falls_silent_is_followed(runner: Runner) -> None:
    """A real process with another host name and process numbers of its own: dead only once it has been silent."""
    elsewhere = ["unshare", "--pid", "--uts", "--mount-proc", "--fork", "--kill-child"]
    if subprocess.run([*elsewhere, "hostname", "elsewhere"], capture_output=True).returncode:
        pytest.skip("namespaces need root, and unshare")
    flags = ("--trainer.max_steps", "6000", "--run.variant", "hosts", "--checkpoint.every_n_steps", "100")
    words = runner.words("sweep", "flow", *flags, "--grid.model.mode", "[flow]", "--sweep.stale", "3")
    line = ["sh", "-c", 'hostname elsewhere && exec "$0" "$@"', sys.executable, "cli.py", *words]
    process = subprocess.Popen(
        [*elsewhere, *line], cwd=REPO, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    folder = runner.root / "flow_vs_regression" / "hosts"
    cell = folder / "mode=flow"
    wait_for(lambda: (cell / "checkpoints" / "last.ckpt").exists())
    assert holder(folder, cell.name) == 1
    assert "1 of 1 cells are still run elsewhere (elsewhere (process 1))" in runner.raw(*words)[1]
    process.kill()
    process.communicate()
    silent = wait_for(lambda: look(folder / ".claims" / cell.name).silent > 3)
    assert silent
    said = runner.raw(*words)
    assert said[0] == 0, said
    assert "elsewhere (process 1) had started it and gives no more signs of life" in said[1]
    assert (cell / "results.json").is_file()
    assert json.loads((cell / "sweep.json").read_text())["done"]
    rows = [int(r["step"]) for r in read_csv(cell / "metrics.csv")]
    assert rows == sorted(set(rows))
    assert rows[-1] == 6000


def test_cells_of_living_others_are_left_to_them(runner: Runner, compared: list[list[str]]) -> None:
    flags = ("--trainer.max_steps", "2", "--run.variant", "grid", "--grid.model.mode", "[regression,flow]")
    folder = runner.root / "flow_vs_regression" / "grid"
    claim = take(folder / ".claims" / "mode=flow")
    assert claim is not None
    err = runner.ok("sweep", "flow", *flags)
    assert "1 of 2 cells are still run elsewhere" in err
    assert f"(process {os.getpid()})" in err
    assert compared == []
    assert not (folder / "mode=flow").exists()
    claim.release()
    assert "1 of 2 cells are done already" in runner.ok("sweep", "flow", *flags)
    assert compared == [["flow_vs_regression/mode=regression", "flow_vs_regression/mode=flow"]]


def test_who_was_thought_dead_writes_nothing(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped for long finds its cell taken over: it leaves the cell alone and says so."""
    folder = runner.root / "flow_vs_regression" / "grid"
    true_run = cell.run_trainer

    def run(args: list[str]) -> object:
        link = look(folder / ".claims" / "mode=flow")
        assert create(folder / ".claims" / "mode=flow", link.number + 1, {"host": "far", "pid": 7, "machine": "other"})
        from lightning_toys.training.callbacks import RescueCheckpoint

        RescueCheckpoint.guard.__self__.touch()  # type: ignore[union-attr]
        return true_run(args)

    monkeypatch.setattr(cell, "run_trainer", run)
    flags = ("--trainer.max_steps", "60", "--run.variant", "grid", "--grid.model.mode", "[flow]")
    err = runner.ok("sweep", "flow", *flags)
    assert "left to another: mode=flow (far (process 7) has taken it over)" in err
    assert not (folder / "mode=flow" / "checkpoints" / "last.ckpt").exists()
    assert not json.loads((folder / "mode=flow" / "sweep.json").read_text())["done"]


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


def test_jobs_stop_at_checkpoints(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: list[list[str]]
) -> None:
    """SIGTERM stops both workers, each at a checkpoint, from which the same command goes on."""
    flags = ("--trainer.max_steps", "1000000", "--run.variant", "jobs", "--grid.model.mode", "[regression,flow]")
    folder = runner.root / "flow_vs_regression" / "jobs"
    words = runner.words("sweep", "flow", *flags, "--sweep.jobs", "2")
    pid = fork(lambda: cli.main(words), tmp_path / "says")
    runs = [folder / f"mode={m}" for m in ("regression", "flow")]
    wait_for(lambda: all((r / "config.yaml").exists() for r in runs))
    assert len({holder(folder, r.name) for r in runs} | {pid}) == 3
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = (tmp_path / "says").read_text()
    assert code == 128 + signal.SIGTERM, text
    assert "[0] cell" in text
    assert "[1] cell" in text
    assert "stopped; the same command goes on" in text
    for run in runs:
        assert not look(folder / ".claims" / run.name).held(1e6)
        assert (run / "checkpoints" / "last.ckpt").exists()
        assert not json.loads((run / "sweep.json").read_text())["done"]
    calls: list[list[str]] = []
    monkeypatch.setattr(cell, "run_trainer", calls.append)
    runner.ok("sweep", "flow", *flags)
    assert [c[-2:] for c in calls if c[0] == "fit"] == [["--ckpt_path", "last"]] * 2
    assert compared == [["flow_vs_regression/mode=regression", "flow_vs_regression/mode=flow"]]


def test_ranks_of_torchrun_are_processes_of_their_own(runner: Runner) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    words = [str(torchrun), "--nproc_per_node", "2", "--master_port", "0", "cli.py"]
    flags = ("--trainer.max_steps", "40", "--run.variant", "ranks", *GRID)
    done = subprocess.run(
        [*words, *runner.words("sweep", "regression", *flags)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    folder = runner.root / "flow_vs_regression" / "ranks"
    cells = [p for p in folder.iterdir() if p.name.startswith("num_train=")]
    assert len(cells) == 3
    for one in cells:
        assert sorted(p.name for p in one.glob("results*")) == ["results-1.json", "results.json"]
        assert (one / "metrics.csv").is_file()
        assert (one / "checkpoints" / "last.ckpt").is_file()
        assert list(one.glob("events.*"))  # a rank that is not the first would write none
    assert (folder / "comparison" / "comparison.md").is_file()


def test_a_rank_leaves_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC", "CUDA_VISIBLE")) or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    assert leave_group() == 1
    group = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    for given, device in ((group, "c"), (slurm, "c")):
        for name, value in {**given, "CUDA_VISIBLE_DEVICES": "b,c", "SLURM_JOB_ID": "9"}.items():
            monkeypatch.setenv(name, value)
        assert devices() == ["b", "c"]
        assert leave_group() == 4
        assert not {*given} - {"SLURM_STEP_TASKS_PER_NODE"} & set(os.environ)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == device
        assert os.environ["SLURM_JOB_ID"] == "9"
        from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

        assert not TorchElasticEnvironment.detect()
        assert not SLURMEnvironment.detect()


def test_each_worker_has_its_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[int, str | None]] = []
    monkeypatch.setattr(
        "lightning_toys.commands.sweep.workers.Worker", lambda k, plan, device: started.append((k, device))
    )
    plan = Plan([], [Task(Cell(f"c{k}", ()), tmp_path / f"c{k}") for k in range(4)])
    assert Plan.load(plan.dump()) == plan
    Foreman(plan, 3, ["a", "b"])
    assert started == [(0, "a"), (1, "b"), (2, "a")]
    started.clear()
    Foreman(plan, 9, [])  # no more than there are cells
    assert started == [(k, None) for k in range(4)]
    assert check_devices(["1", "GPU-1a"], ["0", "1"]) == ["1", "GPU-1a"]
    with pytest.raises(ToyError, match="'2' is not allowed; those here are 0, 1"):
        check_devices(["2"], ["0", "1"])


def test_workers_that_die_are_replaced_for_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cell that kills whoever runs it must not go on killing for ever."""
    started: list[int] = []

    class Dying:
        def __init__(self, k: int, plan: str, device: str | None) -> None:
            started.append(k)
            self.number, self.process = k, subprocess.CompletedProcess([], -9)

        def ended(self) -> bool:
            return True

    monkeypatch.setattr("lightning_toys.commands.sweep.workers.Worker", Dying)
    plan = Plan([], [Task(Cell(f"c{k}", ()), tmp_path / f"c{k}") for k in range(4)])
    with pytest.raises(NonFiniteError, match="4 of 4 cells are left, whose workers died in silence"):
        Foreman(plan, 2, [], poll=0).run()
    assert started == [0, 1, 0, 1]


# the command line


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
        assert {p.name for p in folder.iterdir() if p.name != ".claims"} == set(found)
        assert all((folder / n / "results.json").is_file() for n in found)


def test_files_of_one_name(runner: Runner, tmp_path: Path) -> None:
    from lightning_toys.commands.sweep.command import cells

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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sweep.jobs", "0"], "--sweep.jobs: '0' is not allowed; give an integer >= 1"),
        (["--sweep.jobs", "two"], "--sweep.jobs: 'two' is not allowed"),
        (["--sweep.stale", "-1"], "--sweep.stale: '-1' is not allowed; give seconds, a number > 0"),
        (["--sweep.devices", "3"], "--sweep.devices: '3' is not allowed; give a list"),
        (["--sweep.devices", "[x]"], "--sweep.devices: 'x' is not allowed; "),
        (["--sweep.retry", "maybe"], "--sweep.retry: 'maybe' is not allowed; give true or false"),
        (
            ["--sweep.job", "2"],
            "--sweep.job: no such flag; give one of jobs, devices, stale, retry; did you mean 'jobs'?",
        ),
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


def test_jobs_beside_ranks(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    code, err = runner.code("sweep", "flow", "--grid.model.mode", "[mip]", "--sweep.jobs", "2")
    assert code == 2
    assert "not allowed beside 2 ranks on this machine" in err


def test_help_names_the_sweeps_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in (
        "--sweep.jobs",
        "--sweep.devices",
        "--sweep.stale",
        "--sweep.retry",
        "--grid.config",
        "--search.metric",
    ):
        assert flag in out
