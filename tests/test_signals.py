"""A signal ends any verb, wherever it is: one line, exit code 130 or 143, and no handler is left behind.

And a run's folder that is deleted, or cannot be written to any more, ends it with one line.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys import cli
from lightning_toys.cli import main
from lightning_toys.flow_vs_regression import FlowVsRegression
from tests.test_run_owner import Run

SHORT = ("--trainer.max_steps", "60", "--trainer.val_check_interval", "30", "--checkpoint.every_n_steps", "20")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("trained"))
    assert main(run.words("fit", *SHORT)) == 0
    return run


def sends(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: signal.Signals, when: int = 1) -> None:
    """Have a method send its process a signal when it is called for the ``when``-th time."""
    plain, calls = getattr(owner, name), []

    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == when:
            os.kill(os.getpid(), number)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


# verb, what is called while the signal comes, and the verb's flags
PLACES = {
    "test": ("test", FlowVsRegression, "test_step", ("--ckpt_path", "last")),
    "validate": ("validate", FlowVsRegression, "validation_step", ("--ckpt_path", "last")),
    "predict": ("predict", FlowVsRegression, "predict_step", ("--ckpt_path", "last")),
    "set-up": ("fit", FlowVsRegression, "setup", SHORT),
    "sanity check": ("fit", FlowVsRegression, "validation_step", (*SHORT, "--trainer.num_sanity_val_steps", "1")),
    "figures": ("fit", FlowVsRegression, "figures", (*SHORT, "--figures.enabled", "true")),
    "results": ("fit", "lightning_toys.training.reporting", "write_results", SHORT),
}


@pytest.mark.parametrize(
    ("place", "number"),
    [*((p, signal.SIGINT) for p in PLACES), *((p, signal.SIGTERM) for p in ("validate", "set-up", "figures"))],
)
def test_one_line_and_the_code(
    place: str, number: signal.Signals, run: Run, trained: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    verb, owner, name, flags = PLACES[place]
    if verb == "fit":
        run = Run(run.root, place.replace(" ", "-"))
    else:
        shutil.copytree(trained.folder, run.folder)
    if isinstance(owner, str):
        owner = __import__(owner, fromlist=["_"])
    sends(monkeypatch, owner, name, number)
    before = [signal.getsignal(n) for n in NUMBERS]
    assert main(run.words(verb, *flags)) == 128 + number
    said = capsys.readouterr().err
    assert said.count(f"stopped by {number.name}") == 1, said
    assert not [line for line in said.splitlines() if line.startswith(("Traceback", "error", "Detected"))]
    assert [signal.getsignal(n) for n in NUMBERS] == before
    # nothing is lost: what was trained goes on, or is scored, to the end
    monkeypatch.undo()
    again = ("--ckpt_path", "auto") if verb == "fit" else ()
    assert main(run.words(verb, *flags, *again)) == 0, capsys.readouterr().err
    assert (run.folder / ("predictions.npz" if verb == "predict" else "results.json")).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_ends_at_a_checkpoint(
    number: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sends(monkeypatch, FlowVsRegression, "training_step", number, when=2)
    before = [signal.getsignal(n) for n in NUMBERS]
    assert main(run.words("fit", *SHORT)) == 128 + number
    said = capsys.readouterr().err
    step = run.weights()["global_step"]
    assert 0 < step < 60
    assert f"stopped at step {step}; go on with --ckpt_path {run.last}" in said
    assert "stopped by" not in said
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_a_second_interrupt_does_not_wait(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plain = FlowVsRegression.training_step

    def training_step(self: Any, *args: Any) -> Any:
        for _ in range(2 if self.global_step else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args)

    monkeypatch.setattr(FlowVsRegression, "training_step", training_step)
    assert main(run.words("fit", *SHORT)) == 130
    assert "stopped by SIGINT" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["list"], ["compare", "x"], ["fit", "-c", "flow_vs_regression/flow"]])
def test_other_verbs_and_imports(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sends(monkeypatch, cli, "verb_first", signal.SIGINT)
    assert main(command) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_no_handler_is_left_behind_by_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> None:
        raise ZeroDivisionError("a fault of the code")

    def mine(*args: Any) -> None:
        """Somebody's own."""

    monkeypatch.setattr(FlowVsRegression, "training_step", crash)
    old = signal.signal(signal.SIGTERM, mine)
    try:
        before = [signal.getsignal(n) for n in NUMBERS]
        with pytest.raises(ZeroDivisionError):
            main(run.words("fit", *SHORT))
        assert main(["fit", "-c", "nothing"]) == 2
        assert [signal.getsignal(n) for n in NUMBERS] == before
    finally:
        signal.signal(signal.SIGTERM, old)


def test_in_a_thread_there_are_no_handlers(capsys: Any) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["list"])))
    thread.start()
    thread.join()
    assert codes == [0]


# the folder under a run


def refuses(run: Run, code: int, capsys: Any) -> str:
    said = str(capsys.readouterr().err)
    assert code == 1, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert str(run.folder) in errors[0]
    return errors[0]


def does(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], step: int = 30) -> None:
    """Do something within the validation at a step."""
    plain = FlowVsRegression.validation_step

    def validation_step(self: FlowVsRegression, *args: Any) -> None:
        if self.global_step == step:
            act()
        plain(self, *args)

    monkeypatch.setattr(FlowVsRegression, "validation_step", validation_step)


@pytest.mark.parametrize("what", ["deleted", "moved", "replaced by a file"])
def test_the_folder_goes_while_it_is_written_to(
    what: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def act() -> None:
        if what == "moved":
            run.folder.rename(run.root / "elsewhere")
        else:
            while run.folder.exists():  # threads write to it in the meantime
                shutil.rmtree(run.folder, ignore_errors=True)
        if what == "replaced by a file":
            run.folder.write_text("")

    does(monkeypatch, act)
    assert "was deleted or moved" in refuses(run, main(run.words("fit", *SHORT)), capsys)
    assert run.folder.is_file() if what == "replaced by a file" else not run.folder.exists()
    if what == "moved":
        assert (run.root / "elsewhere" / "checkpoints" / "last.ckpt").exists()


def test_the_folder_becomes_read_only(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run.folder.mkdir(parents=True)
    here = str(run.folder)
    if subprocess.run(["mount", "--bind", here, here], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        does(monkeypatch, lambda: subprocess.run(["mount", "-o", "remount,bind,ro", here], check=True))
        said = refuses(run, main(run.words("fit", *SHORT)), capsys)
        assert "read-only file system" in said
        assert "the last good checkpoint, if one was written, is kept" in said
        assert run.weights()["global_step"] == 20
        subprocess.run(["mount", "-o", "remount,bind,rw", here], check=True)
        monkeypatch.undo()
        assert main(run.words("fit", *SHORT, "--ckpt_path", "auto")) == 0
        assert run.weights()["global_step"] == 60
    finally:
        subprocess.run(["umount", "-l", here], check=True)


def test_a_disk_that_fills_while_tensorboard_writes(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """TensorBoard writes in a thread of its own, whose traceback nobody wants."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    does(monkeypatch, lambda: monkeypatch.setattr(RecordWriter, "write", full))
    before = threading.excepthook
    said = refuses(run, main(run.words("fit", *SHORT)), capsys)
    assert "no space left" in said
    assert threading.excepthook is before
    kept = torch.load(run.last, weights_only=True)
    assert kept["global_step"] == 20
    monkeypatch.undo()
    assert main(run.words("fit", *SHORT, "--ckpt_path", "auto")) == 0


def test_what_says_who_owns_the_run_is_deleted(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    does(monkeypatch, lambda: shutil.rmtree(run.folder / ".owner"))
    said = refuses(run, main(run.words("fit", *SHORT)), capsys)
    assert "what says who owns the run was deleted" in said
    assert "the last good checkpoint, if one was written, is kept" in said
