"""Cells on Ray, on loopback: workers, nodes and drivers are lost, and every number is that of a run by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.ownership import last_record
from tests.commands.sweep.test_cells import metrics, owner, wait_for
from tests.commands.sweep.test_search import states
from tests.conftest import REPO, Runner, assert_bitwise_equal

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
SAME = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "callbacks")


class Driver:
    """A `sweep` in a process and a session of its own, with all that it starts."""

    def __init__(self, words: list[str], says: Path) -> None:
        self.says = says
        with says.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "cli.py", *words],
                cwd=REPO,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO}:{REPO}/tests/own_classes"},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def end(self, seconds: float = 240) -> tuple[int, str]:
        """Wait for it; return its exit code, and what has been said."""
        return self.process.wait(timeout=seconds), self.says.read_text()

    def clean(self) -> None:
        """Kill what is left of it."""
        for process in descendants(self.process.pid) if self.process.poll() is None else []:
            kill(process)
        kill(self.process.pid)
        self.process.wait()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = children.get(pid, [])
    return [*found, *(p for child in found for p in descendants(child))]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Any]:
    """Start drivers; end with the test."""
    started: list[Driver] = []

    def start(words: list[str]) -> Driver:
        started.append(Driver(words, tmp_path / "says"))
        return started[-1]

    yield start
    for driver in started:
        driver.clean()


def training(folder: Path, cells: list[str]) -> dict[int, str]:
    """The processes that train cells, and have written checkpoints, with their cells."""
    found = {}
    for name in cells:
        run = folder / name
        record = last_record(run)
        pid = record.owner["pid"] if record.owner and record.held() else 0
        if pid and (run / "checkpoints" / "last.ckpt").exists() and not (run / "results.json").exists():
            found[pid] = name
    return found


def outcome(run: Path) -> dict[str, Any]:
    """What a run has found: checkpoint, curves, results, all that is not of the clock."""
    found = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = {k: found.get(k) for k in SAME}
    return {**kept, "metrics": metrics(run), "rows": read_csv(run / "metrics.csv")}


NAMES = [f"num_train={n}" for n in (20, 25, 30, 35, 40, 45)]
GRID = ("--grid.data.num_train", "[20,25,30,35,40,45]")
LONG = ("--model.seeds", "[0,1]", "--trainer.max_steps", "600", "--checkpoint.every_n_steps", "50")


def solo(runner: Runner, variant: str, name: str) -> dict[str, Any]:
    """A cell's run by itself."""
    flags = ("--run.variant", variant, "--run.name", name, "--data.num_train", name.partition("=")[2], *LONG)
    runner.ok("fit", "regression", *flags)
    runner.ok("test", "regression", *flags, "--ckpt_path", "last")
    return outcome(runner.root / "flow_vs_regression" / variant / name)


class Nodes:
    """A cluster of nodes.py, whose drivers are started with ``env``."""

    def __init__(self) -> None:
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nodes.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self.env},
            text=True,
        )
        try:
            self.address = self.said()
        except BaseException:
            self.close()
            raise

    def said(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line
        return line

    def ask(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.said()

    def close(self) -> None:
        left = [self.process.pid, *descendants(self.process.pid)]
        try:
            self.process.communicate(timeout=30)
        finally:
            for pid in left:
                kill(pid)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    found = Nodes()
    for name, value in found.env.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


@pytest.mark.slow  # two minutes
def test_workers_nodes_and_drivers_are_lost(runner: Runner, nodes: Nodes, drive: Any, tmp_path: Path) -> None:
    """One sweep of six cells through all of it: bit for bit what each cell is by itself."""
    line = runner.words("sweep", "regression", *LONG, *GRID, "--run.variant", "v")
    words = [*line, "--sweep.address", nodes.address]
    folder = runner.root / "flow_vs_regression" / "v"
    driver = drive(words)
    # the head's only worker is stopped in the middle of a cell, so that a node that joins has to take another
    pid, cut = wait_for(lambda: next(iter(training(folder, NAMES).items()), None))
    os.kill(pid, signal.SIGSTOP)
    raylet = int(nodes.ask("add"))

    def on_the_second() -> str | None:
        there = descendants(raylet)
        return next((name for pid, name in training(folder, NAMES).items() if pid in there), None)

    left = wait_for(on_the_second)
    # the node is gone, the worker is killed: Ray tries both cells again, from their checkpoints
    assert nodes.ask("remove") == "removed"
    assert not json.loads((folder / left / "sweep.json").read_text())["done"]
    kill(pid)
    wait_for(lambda: owner(folder / cut) not in (None, pid))
    # so is the driver; the same command goes on, here in one process, which needs no Ray
    pid, _ = wait_for(lambda: next(iter(training(folder, NAMES).items()), None))
    driver.process.kill()
    done = {n for n in NAMES if (folder / n / "results-1.json").exists()}
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    text = driver.says.read_text()
    said = runner.ok("sweep", "regression", *LONG, *GRID, "--run.variant", "v")
    assert "Traceback" not in text + said, text
    for name in NAMES:
        assert_bitwise_equal(outcome(folder / name), solo(runner, "solo", name), name)
        assert sorted(p.name for p in (folder / name).glob("results*")) == ["results-1.json", "results.json"]
    assert len(done) < len(NAMES)
    assert (folder / "comparison" / "comparison.md").is_file()
    # every line of a worker has its cell's name, and one says how far it is
    assert all(any(f"({n} pid=" in x for n in NAMES) for x in text.splitlines() if "run folder:" in x)
    assert " of 6 cells ended, " in text
    # negative control: cells differ
    with pytest.raises(AssertionError):
        assert_bitwise_equal(outcome(folder / NAMES[0]), outcome(folder / NAMES[1]), "")


def test_a_killed_worker_is_tried_again(runner: Runner, drive: Any) -> None:
    """The gate's part of the story above, on a Ray of the sweep's own."""
    flags = (*LONG, "--grid.data.num_train", "[20]", "--run.variant", "v", "--sweep.jobs", "2")
    driver = drive(runner.words("sweep", "regression", *flags))
    folder = runner.root / "flow_vs_regression" / "v"
    pid, cut = wait_for(lambda: next(iter(training(folder, NAMES[:1]).items()), None))
    kill(pid)
    code, text = driver.end()
    assert code == 0, text
    assert "Traceback" not in text, text
    assert_bitwise_equal(outcome(folder / cut), solo(runner, "solo", cut), cut)
    assert last_record(folder / cut).number > 0  # which somebody went on with
    assert (folder / "comparison" / "comparison.md").is_file()


def session(pid: int) -> list[str]:
    """What still runs of a driver's session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid and fields[0] not in "ZX":
                found.append(stat.with_name("cmdline").read_text().replace("\0", " ")[:120])
    return found


def listening(pids: list[int]) -> set[str]:
    """The addresses that processes listen on, in hexadecimal, as the kernel writes them."""
    sockets = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(fd))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.slow  # most of a minute; test_search.py has searches without Ray in the gate
def test_a_search_on_a_ray_of_its_own(runner: Runner, drive: Any) -> None:
    """Two trials at a time, pruned by the driver, then Ctrl-C; Ray is on loopback alone, and nothing of it is left."""
    space = ("--search.model.lr", "{choices: [0.001, 0.002, 1e-7, 1e-8]}", "--search.sampler", "grid")
    flags = (*space, "--search.pruner", "pruners.Early", "--search.metric", "l2", "--model.seeds", "[0]")
    flags += ("--trainer.max_steps", "4000", "--trainer.val_check_interval", "100", "--run.variant", "a")
    driver = drive(runner.words("sweep", "regression", *flags, "--sweep.jobs", "2"))
    folder = runner.root / "flow_vs_regression" / "a"
    wait_for(lambda: driver.process.poll() is not None or list(folder.glob("trial-*/sweep.json")))
    addresses = listening(descendants(driver.process.pid))
    assert addresses
    assert addresses <= LOOPBACK
    # the two that are pruned come first
    wait_for(lambda: training(folder, ["trial-0002", "trial-0003"]))
    driver.process.send_signal(signal.SIGINT)
    code, text = driver.end()
    assert code == 128 + signal.SIGINT, text
    assert "stopping the workers, each at a checkpoint" in text
    assert "stopped; the same command goes on" in text
    assert not [p for p in folder.glob("trial-*") if last_record(p).held()]
    wait_for(lambda: not session(driver.process.pid), 30)
    said = runner.ok("sweep", "regression", *flags)
    assert "2 of 4 cells are done already" in said
    assert "Traceback" not in text + said
    marks = [json.loads((folder / f"trial-{k:04d}" / "sweep.json").read_text()) for k in range(4)]
    pruned = [m for m in marks if m.get("pruned")]
    assert {m["params"]["model.lr"] for m in pruned} == {"1e-7", "1e-8"}
    assert {m["pruned"]["step"] for m in pruned} == {100}
    assert [m["done"] for m in marks].count(True) == 2
    found = states(folder)
    assert {found[m["trial"]][0] for m in pruned} == {"PRUNED"}
    assert (folder / "comparison" / "trials.md").read_text().count("pruned at step 100") == 2
    # every line of a worker has its cell's name, and one says how far it is
    assert "(trial-0000 pid=" in text
    assert "2 of 4 cells ended, " in text
