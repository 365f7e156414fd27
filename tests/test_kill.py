"""Every experiment, stopped again and again at random points and taken up again, ends where an undisturbed run ends.

SIGKILL, SIGTERM and SIGINT come in a seeded order at seeded times; a disk that fills up stops a run with one line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys.cli import main
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.ownership import PARTIAL
from lightning_toys.training.run_folder import SWEEP_MARK
from tests.conftest import REPO
from tests.processes import fork
from tests.shipped import FIRST, module_class, tiny

TRAINED = [c for kind, c in FIRST.items() if kind.trains]
# steps that take some seconds, and how often there is a validation, a checkpoint and a row
LENGTH = {
    "FlowVsRegression": (3000, 400, 90, 25),
    "GaussianPolicy": (1200, 300, 70, 25),
    "MeanFlowPolicy": (500, 200, 45, 25),
    "FlowPolicy": (600, 200, 45, 25),
    "LearnedSampling": (300, 100, 35, 25),
    "BanditPolicy": (200, 80, 35, 25),
    "WindowRegression": (90, 40, 7, 10),
    "BilevelControl": (500, 200, 45, 25),
    "UpdateEntropy": (24, 10, 3, 5),
}
SHORT = (60, 20, 10, 5)  # of an experiment that has just come
SAME = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SLOW = pytest.mark.slow


def words(config: Path, root: Path, name: str, *flags: str) -> list[str]:
    steps, validate, keep, log = LENGTH.get(module_class(config).__name__, SHORT)
    return [
        *("fit", "-c", str(config.relative_to(REPO)), "--run.root", str(root), "--run.name", name, *tiny(config)),
        *("--trainer.accelerator", "cpu", "--figures.enabled", "false", "--trainer.max_steps", str(steps)),
        *("--trainer.val_check_interval", str(validate), "--checkpoint.every_n_steps", str(keep)),
        *("--trainer.log_every_n_steps", str(log), *flags),
    ]


def ended(pid: int) -> int | None:
    """Return a child's exit code, minus the signal's number where one killed it; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def stop_somewhere(command: list[str], said: Path, last: Path, wait: float, number: signal.Signals) -> int | None:
    """Start a command, send a signal ``wait`` seconds after its first checkpoint, return how it ended."""
    before = last.stat().st_mtime_ns if last.exists() else 0
    pid = fork(lambda: main(command), said)
    limit = time.monotonic() + 120
    while not (last.exists() and last.stat().st_mtime_ns > before):
        assert time.monotonic() < limit, said.read_text()
        if (code := ended(pid)) is not None:
            return code
        time.sleep(0.002)
    time.sleep(wait)
    if (code := ended(pid)) is not None:
        return code
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> dict[str, Any]:
    """What a run has found: checkpoint, curves, results, all that is not of the clock or the machine."""
    found = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    results = json.loads((folder / "results.json").read_text())
    kept = {k: results[k] for k in ("metrics", "references", "arrays", "seeds", "step", "headline")}
    toy = {k: v for k, v in found["toy"].items() if k != "config"}
    return {k: found.get(k) for k in SAME} | {"toy": toy, "results": kept, "rows": read_csv(folder / "metrics.csv")}


# in the gate, one; every experiment's own tests resume it bitwise
GATE = ("FlowVsRegression",)
KILLED = [
    pytest.param(
        c,
        marks=[] if module_class(c).__name__ in GATE else [pytest.mark.slow],
        id=f"{c.parent.name}-{c.stem}",
    )
    for c in TRAINED
]


@pytest.mark.parametrize("config", KILLED)
def test_stopped_again_and_again(config: Path, tmp_path: Path, bitwise: Callable[..., None]) -> None:
    begin = time.monotonic()
    assert main(words(config, tmp_path, "whole")) == 0
    took = time.monotonic() - begin
    parent = tmp_path / config.parent.name / config.stem
    whole = outcome(parent / "whole")
    g = keyed_generator(0, 0, f"test/kill/{config.stem}")
    last, said = parent / "cut" / "checkpoints" / "last.ckpt", tmp_path / "said"
    sent = []
    for number in g.permutation(SIGNALS).tolist():
        resume = ("--ckpt_path", "last") if last.exists() else ()
        wait = float(g.random()) * took / 4
        code = stop_somewhere(words(config, tmp_path, "cut", *resume), said, last, wait, signal.Signals(number))
        if code == 0:  # it was quicker
            break
        assert code == (-number if number == signal.SIGKILL else 128 + number), said.read_text()
        sent.append(number)
    assert sent
    if code != 0:
        assert main(words(config, tmp_path, "cut", "--ckpt_path", "last")) == 0
    assert "Traceback" not in said.read_text()
    assert not list(last.parent.glob(f"{PARTIAL}*"))
    cut = outcome(parent / "cut")
    for key in whole:
        bitwise(whole[key], cut[key], key)
    # stopped after its last checkpoint and before its results: they are made up for
    (parent / "whole" / "results.json").unlink()
    assert main(words(config, tmp_path, "whole", "--ckpt_path", "last")) == 0
    late = outcome(parent / "whole")
    for key in whole:
        bitwise(whole[key], late[key], key)
    assert not (parent / "whole" / "validation.json").exists()
    # negative control: another seed's run is told apart
    with pytest.raises(AssertionError):
        bitwise({**whole, "toy": {**whole["toy"], "seeds": [99]}}, cut, "")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of some MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("free", [pytest.param(0, marks=SLOW), 20, pytest.param(60, marks=SLOW)])
def test_a_full_disk(tiny_disk: Path, capsys: pytest.CaptureFixture[str], free: int) -> None:
    """One line, exit code 1, the last good checkpoint whole; with room again, the run goes on to the same end."""
    config = REPO / "configs/flow_vs_regression/flow.yaml"
    assert main(words(config, tiny_disk, "run", "--trainer.max_steps", "500")) == 0
    folder = tiny_disk / "flow_vs_regression" / "flow" / "run"
    room = os.statvfs(tiny_disk)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - 1024 * free)))
    capsys.readouterr()
    code = main(words(config, tiny_disk, "run", "--ckpt_path", "last"))
    said = capsys.readouterr().err
    if code == 0:
        pytest.fail(f"{free} KiB were enough: the test is too small")
    assert code == 1, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert "no space left" in errors[0].lower()
    assert str(folder) in errors[0]
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert 500 <= kept["global_step"] < 3000
    assert not list(folder.rglob(f"{PARTIAL}*"))
    assert read_csv(folder / "metrics.csv")
    ballast.unlink()
    assert main(words(config, tiny_disk, "run", "--ckpt_path", "last")) == 0
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3000


@pytest.mark.slow  # a fit's full disk is in the gate
@pytest.mark.parametrize("free", [pytest.param(0, marks=SLOW), 30, pytest.param(120, marks=SLOW)])
def test_a_sweep_on_a_full_disk(tiny_disk: Path, capsys: pytest.CaptureFixture[str], free: int) -> None:
    """One line, exit code 1, and no cell is marked as failed: with room again, the same command ends the sweep."""
    config = REPO / "configs/flow_vs_regression/flow.yaml"
    command = words(config, tiny_disk, "unused", "--trainer.max_steps", "300")
    at = command.index("--run.name")
    command = ["sweep", *command[1:at], *command[at + 2 :], "--grid.model.mode", "[regression,flow]"]
    room = os.statvfs(tiny_disk)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - 1024 * free))
    code = main(command)
    said = capsys.readouterr().err
    assert code == 1, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert "no space left" in errors[0].lower()
    marks = [json.loads(p.read_text()) for p in tiny_disk.rglob(SWEEP_MARK) if p.stat().st_size]
    assert not any(m.get("failed") for m in marks)
    ballast.unlink()
    assert main(command) == 0
    assert len(list(tiny_disk.rglob("results.json"))) >= 2
