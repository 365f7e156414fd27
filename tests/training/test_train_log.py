"""train.log: what a run said, with the time, and nothing of it lost."""

from __future__ import annotations

import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer

from lightning_toys.errors import LISTENERS, NonFiniteError, Stopped, note
from lightning_toys.flow_vs_regression import FlowVsRegression, InterpolationData
from lightning_toys.nets import Network
from lightning_toys.training import train_log
from lightning_toys.training.ownership import OWNER, acquire, create
from lightning_toys.training.train_log import TrainLog, heard_by
from tests.conftest import Runner

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} "
SHORT = ("--trainer.max_steps", "20", "--figures.enabled", "false")


def said(folder: Path) -> list[str]:
    """Return the lines of a run's log without their times."""
    lines = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    return [re.sub(f"^{STAMP}", "", line) for line in lines]


def test_a_run_and_what_follows_it_are_told(runner: Runner) -> None:
    runner.ok("fit", "flow", *SHORT, "--trainer.val_check_interval", "10", "--run.name", "a b")
    first = said(runner.folder("flow", "a b"))
    assert first[0].startswith("lightning-toys fit -c configs/flow_vs_regression/flow.yaml --run.root ")
    assert "--run.name 'a b' (version " in first[0]  # can be given to a shell again
    assert first[0].endswith(", cpu)")
    assert re.fullmatch(r"FlowVsRegression, seeds [\d, ]+", first[1])
    assert [line.partition(":")[0] for line in first[2:]][:2] == ["step 10", "step 20"]
    assert re.fullmatch(r"fit ended at step 20 after \d+\.\d s: l2 \S+.*", first[-1])
    # a resumed run and a test add to it; the setting that the checkpoint has its way with is told too
    resumed = ("--run.name", "a b", "--ckpt_path", "last")
    runner.ok("fit", "flow", *SHORT, "--trainer.max_steps", "30", *resumed)
    runner.ok("test", "flow", "--figures.enabled", "false", *resumed)
    lines = said(runner.folder("flow", "a b"))
    assert lines[: len(first)] == first
    assert sum(line.startswith("lightning-toys ") for line in lines) == 3
    assert any(line.startswith("fit ended at step 30 ") for line in lines)
    assert lines[-1].startswith("test ended at step 30 ")
    assert not LISTENERS


def test_notes_of_before_the_folder_was_known_are_in_it(runner: Runner, tmp_path: Path) -> None:
    runner.ok("fit", "flow", *SHORT, "--trainer.max_steps", "2")
    changed = tmp_path / "changed.yaml"
    changed.write_text("model:\n  init_args:\n    lr: 0.0123\n")
    on = ("--trainer.max_steps", "4", "--ckpt_path", "last", "-c", str(changed))
    err = runner.ok("fit", "flow", *SHORT, *on)
    (taken,) = (line for line in err.splitlines() if "as in the checkpoint" in line)
    assert "0.0123" in taken
    lines = said(runner.folder("flow"))
    assert lines.count(taken) == 1
    assert lines[lines.index(taken) - 2].startswith("lightning-toys fit")


def test_a_run_that_goes_non_finite_says_where(runner: Runner) -> None:
    code, err = runner.code("fit", "flow", *SHORT, "--model.lr", "1e30")
    assert code == 1
    why = err.rpartition("error: ")[2].partition(";")[0].strip()
    assert "at step" in why
    assert said(runner.folder("flow"))[-1] == f"error: NonFiniteError: {why}"


@pytest.mark.parametrize("logger", [True, False])
def test_a_script_has_it_where_it_keeps_files(tmp_path: Path, logger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = FlowVsRegression(seeds=[3, 4], network=Network(hidden=8))
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    t = Trainer(max_steps=4, callbacks=[TrainLog()], logger=logger, **quiet)
    data = InterpolationData(num_eval=20)
    t.fit(module, data)
    t.test(module, data, verbose=False)
    assert len(list(tmp_path.rglob("train.log"))) == int(logger)
    if logger:
        lines = said(module.run_folder)
        assert lines[0].startswith("fit from a script")
        assert lines[1].endswith("seeds 3, 4")
        assert sum(line.startswith("test from a script") for line in lines) == 1
        assert lines[-1].startswith("test ended at step 4")
        assert sum("ended at step 4" in line for line in lines) == 2


def test_a_trial_writes_none(runner: Runner) -> None:
    runner.ok("fit", "flow", *SHORT, "--trainer.fast_dev_run", "true")
    assert not list(runner.root.rglob("train.log"))


def test_warnings_and_notes_are_heard_once_and_still_said(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []

    def speak() -> None:
        with heard_by(heard.append):
            note("a note")
            warnings.warn("mind the step", stacklevel=1)

    with pytest.warns(UserWarning, match="mind"):
        speak()
    note("afterwards")
    assert heard == ["a note", "warning: mind the step"]
    assert capsys.readouterr().err == "a note\nafterwards\n"


def begun(folder: Path) -> TrainLog:
    """Return a log that writes into a folder."""
    log = TrainLog()
    log.place = folder / train_log.NAME
    return log


def test_what_lies_in_its_place_is_set_aside(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.log")  # whoever opens it to write waits for a reader
    signal.alarm(20)
    try:
        begun(tmp_path).hear("one\n\ntwo")
    finally:
        signal.alarm(0)
    assert [line for line in said(tmp_path) if line] == ["one", "two"]


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    begun(tmp_path / "file" / "below").hear("nothing")
    assert (tmp_path / "file").read_text() == ""


def test_whoever_lost_a_run_writes_nothing_more(tmp_path: Path) -> None:
    log = begun(tmp_path)
    mine = acquire(tmp_path)
    log.hear("mine")
    assert create(tmp_path / OWNER, mine.number + 1, {"host": "far", "pid": 1, "machine": "another", "since": 1.0})
    log.hear("late")
    assert said(tmp_path) == ["mine"]


def test_an_error_is_told_but_not_a_stop_that_was(tmp_path: Path) -> None:
    log = begun(tmp_path)
    nothing: Any = None
    log.on_exception(nothing, nothing, Stopped(signal.SIGTERM, told=True))
    log.on_exception(nothing, nothing, NonFiniteError("the loss\nis not finite"))
    log.on_exception(nothing, nothing, KeyboardInterrupt())
    assert said(tmp_path) == ["error: NonFiniteError: the loss is not finite", "error: KeyboardInterrupt"]
