"""Two processes and one run folder; a process that was only stopped; a `fit` that is started again by the same line."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_toys.cli import main
from lightning_toys.flow_vs_regression import FlowVsRegression
from lightning_toys.training.callbacks import RescueCheckpoint
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.ownership import OWNER
from tests.conftest import SMALL
from tests.processes import fork

LENGTH = (
    *("--trainer.max_steps", "400", "--trainer.val_check_interval", "100", "--checkpoint.every_n_steps", "50"),
    *("--trainer.log_every_n_steps", "10", "--trainer.accelerator", "cpu"),
)


class Run:
    """A run of flow_vs_regression in a folder of its own."""

    def __init__(self, root: Path, name: str = "run") -> None:
        self.root, self.name = root, name
        self.folder = root / "flow_vs_regression" / "flow" / name
        self.last = self.folder / "checkpoints" / "last.ckpt"

    def words(self, verb: str, *flags: str) -> list[str]:
        length = LENGTH if verb == "fit" else ("--trainer.accelerator", "cpu")
        place = ("--run.root", str(self.root), "--run.name", self.name)
        return [verb, "-c", "flow_vs_regression/flow", *place, *SMALL, *length, *flags]

    def start(self, verb: str, *flags: str) -> int:
        return fork(lambda: main(self.words(verb, *flags)), self.root / f"said-{self.name}")

    def said(self) -> str:
        return (self.root / f"said-{self.name}").read_text()

    def weights(self) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.last, weights_only=True)
        return found

    def files(self) -> dict[str, bytes]:
        found = (p for p in self.folder.rglob("*") if p.is_file() and OWNER not in p.parts)
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in found}

    def points(self) -> list[tuple[str, int]]:
        """What TensorBoard shows: name and step of each point."""
        board = EventAccumulator(str(self.folder), size_guidance={"scalars": 0})
        board.Reload()
        return [(tag, e.step) for tag in board.Tags()["scalars"] for e in board.Scalars(tag)]


def ends(pid: int, seconds: float = 120) -> int:
    """Wait for a child; return its exit code."""
    limit = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("it did not end")
        time.sleep(0.02)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stops(pid: int, seconds: float = 120) -> None:
    """Wait until a child has stopped itself."""
    limit = time.monotonic() + seconds
    while state(pid) != "T":
        assert state(pid) not in "ZX", "it ended"
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbed."""
    run = Run(tmp_path_factory.mktemp("whole"))
    before = Path.cwd()
    assert main(run.words("fit")) == 0
    assert Path.cwd() == before
    return run


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have children stop themselves (SIGSTOP) within the validation at a step."""
    here = os.getpid()
    plain = FlowVsRegression.validation_step

    def at(step: int) -> None:
        def validation_step(self: FlowVsRegression, *args: Any) -> None:
            if os.getpid() != here and self.global_step == step:
                # else the stop may fall between the question who owns the run and the write, in TensorBoard's thread:
                # then that one event is written (with a pause put between them it always was; with this flush, never)
                for logger in self.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.flush()
                os.kill(os.getpid(), signal.SIGSTOP)
            plain(self, *args)

        monkeypatch.setattr(FlowVsRegression, "validation_step", validation_step)

    return at


def one_line(err: str) -> str:
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    return err


def test_the_second_process_is_refused(
    run: Run, whole: Run, stopping: Callable[[int], None], bitwise: Callable[..., None], capsys: Any
) -> None:
    stopping(200)
    pid = run.start("fit")
    stops(pid)
    capsys.readouterr()
    before = run.files()
    for verb, flags in (
        ("fit", ("--ckpt_path", "last")),
        ("fit", ("--ckpt_path", "auto")),
        ("test", ("--ckpt_path", "last")),
        ("validate", ()),
        ("predict", ("--ckpt_path", str(run.last))),
    ):
        assert main(run.words(verb, *flags)) == 2
        said = one_line(capsys.readouterr().err)
        assert re.search(rf"{run.folder} is held by {socket.gethostname()} \(process {pid}, since [-\d]+ [:\d]+", said)
        assert "which is stopped" in said
    assert run.files() == before
    os.kill(pid, signal.SIGCONT)
    assert ends(pid) == 0, run.said()
    bitwise(run.weights()["state_dict"], whole.weights()["state_dict"], "")
    assert read_csv(run.folder / "metrics.csv") == read_csv(whole.folder / "metrics.csv")
    points = run.points()
    assert len(points) > 100
    assert len(set(points)) == len(points)
    assert sorted(points) == sorted(whole.points())
    assert main(run.words("test", "--ckpt_path", "last")) == 0


def test_one_that_was_stopped_writes_nothing_more(
    run: Run, whole: Run, stopping: Callable[[int], None], bitwise: Callable[..., None], capsys: Any
) -> None:
    """Stopped within a validation, taken over and gone on with to the end, awake again: not a byte is its."""
    stopping(200)
    pid = run.start("fit")
    stops(pid)
    capsys.readouterr()
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which have the second of their making
    assert main(run.words("fit", "--ckpt_path", "last", "--run.takeover", "true")) == 0
    assert f"process {pid}" in capsys.readouterr().err
    after = run.files()
    os.kill(pid, signal.SIGCONT)
    assert ends(pid) == 1, run.said()
    errors = [line for line in run.said().splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "nothing more is written" in errors[0]
    assert "Traceback" not in run.said()
    assert run.files() == after
    assert run.weights()["global_step"] == 400
    bitwise(run.weights()["state_dict"], whole.weights()["state_dict"], "")
    assert read_csv(run.folder / "metrics.csv") == read_csv(whole.folder / "metrics.csv")
    assert len(set(run.points())) == len(run.points())


def test_a_fit_killed_before_its_first_checkpoint_is_started_again(
    run: Run, whole: Run, monkeypatch: pytest.MonkeyPatch, bitwise: Callable[..., None], capsys: Any
) -> None:
    here, plain = os.getpid(), RescueCheckpoint.save

    def save(self: RescueCheckpoint, *args: Any) -> None:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, *args)

    monkeypatch.setattr(RescueCheckpoint, "save", save)
    for k in (1, 2):
        assert ends(run.start("fit")) == -signal.SIGKILL
        assert (run.folder / "config.yaml").exists()
        assert not run.last.exists()
        assert (run.folder / "cut-1" / "config.yaml").exists() == (k == 2)
    capsys.readouterr()
    assert main(run.words("fit")) == 0
    assert (
        f"begun again: an earlier start ended before its first checkpoint; what it left is in {run.folder}/cut-2"
        in (capsys.readouterr().err)
    )
    bitwise(run.weights()["state_dict"], whole.weights()["state_dict"], "")
    assert read_csv(run.folder / "metrics.csv") == read_csv(whole.folder / "metrics.csv")
    assert (run.folder / "cut-2" / "config.yaml").exists()
    # one that has a checkpoint is not begun again
    assert main(run.words("fit")) == 2
    assert "--ckpt_path auto" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("named", [True, False])
def test_auto_starts_or_goes_on(
    run: Run, whole: Run, named: bool, bitwise: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The same line, whatever happened before."""
    if not named:
        run = Run(run.root, "version_0")
    words = run.words("fit", "--ckpt_path", "auto")
    if not named:
        at = words.index("--run.name")
        del words[at : at + 2]
    here, plain = os.getpid(), RescueCheckpoint.on_train_batch_end
    stop_at = {"step": 0, "signal": signal.SIGKILL}

    def on_train_batch_end(self: RescueCheckpoint, trainer: Any, module: LightningModule, *args: Any) -> None:
        if os.getpid() != here and trainer.global_step >= stop_at["step"]:
            os.kill(os.getpid(), stop_at["signal"])
        plain(self, trainer, module, *args)

    monkeypatch.setattr(RescueCheckpoint, "on_train_batch_end", on_train_batch_end)
    for step, number, kept in ((10, signal.SIGKILL, None), (150, signal.SIGKILL, 100), (250, signal.SIGTERM, 250)):
        stop_at |= {"step": step, "signal": number}
        pid = fork(lambda: main(words), run.root / "said")
        assert ends(pid) == (-number if number == signal.SIGKILL else 128 + number), (run.root / "said").read_text()
        assert (run.weights()["global_step"] if run.last.exists() else None) == kept
    assert main(words) == 0
    bitwise(run.weights()["state_dict"], whole.weights()["state_dict"], "")
    assert read_csv(run.folder / "metrics.csv") == read_csv(whole.folder / "metrics.csv")
    assert (run.folder / "results.json").exists()
    capsys.readouterr()
    assert main(words) == 0
    assert "nothing was trained" in capsys.readouterr().err
    assert [p.name for p in run.folder.parent.iterdir()] == [run.name]


def test_a_corrupt_checkpoint_and_the_older_ones(
    run: Run, whole: Run, bitwise: Callable[..., None], capsys: Any
) -> None:
    assert main(run.words("fit", "--trainer.max_steps", "230", "--checkpoint.keep", "2")) == 0
    names = sorted(p.name for p in run.last.parent.iterdir())
    assert names == ["last.ckpt", "step-00000150.ckpt", "step-00000200.ckpt"]
    run.last.write_bytes(run.last.read_bytes()[:1000])
    capsys.readouterr()
    assert main(run.words("fit", "--ckpt_path", "last")) == 2
    said = one_line(capsys.readouterr().err)
    assert "beside it can be read: step-00000200.ckpt (step 200), step-00000150.ckpt (step 150)" in said
    assert main(run.words("fit", "--ckpt_path", "auto", "--checkpoint.keep", "2")) == 0
    assert "going on from step-00000200.ckpt, which is of step 200" in capsys.readouterr().err
    bitwise(run.weights()["state_dict"], whole.weights()["state_dict"], "")
    assert read_csv(run.folder / "metrics.csv") == read_csv(whole.folder / "metrics.csv")
    kept = sorted(p.name for p in run.last.parent.glob("step-*"))
    assert kept == ["step-00000300.ckpt", "step-00000350.ckpt"]
    assert (run.last.parent / "last-1.ckpt").stat().st_size == 1000  # the corrupt one is not lost
    for path in run.last.parent.iterdir():
        path.write_bytes(b"")
    assert main(run.words("fit", "--ckpt_path", "auto")) == 2
    assert "none of" in one_line(capsys.readouterr().err)
