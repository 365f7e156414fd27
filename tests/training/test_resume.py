"""A resumed run ends bit by bit where the uninterrupted one ends, whatever stopped it."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_toys.cli import main
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.ownership import PARTIAL
from tests.conftest import Runner
from tests.processes import wait_for

STATE = ("state_dict", "optimizer_states", "global_step", "loops", "callbacks")
# everything that has state: two replicas, moving average, best weights, clipping, noise, validation and checkpoints
# off each other's beat
BUSY = (
    *("--model.seeds", "[3,5]", "--model.ema_decay", "0.9", "--model.clip_grad_norm", "1.0"),
    *("--data.holdout", "0.1", "--data.noise", "0.1"),
    *("--trainer.val_check_interval", "60", "--checkpoint.every_n_steps", "40", "--trainer.log_every_n_steps", "10"),
)


def check_same(runner: Runner, variant: str, a: str, b: str, bitwise: Callable[..., None]) -> None:
    one, two = runner.checkpoint(variant, a), runner.checkpoint(variant, b)
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(one[key], two[key], key)
    assert read_csv(runner.folder(variant, a) / "metrics.csv") == read_csv(runner.folder(variant, b) / "metrics.csv")


@pytest.mark.parametrize(
    ("mode", "cut"), [("flow", 1), ("flow", 61), ("flow", 120), ("regression", 61), ("straight_flow", 61), ("mip", 61)]
)
def test_stopping_early_and_going_on(runner: Runner, bitwise: Callable[..., None], mode: str, cut: int) -> None:
    """Mid-pass (1, 61 are odd, a pass has two steps) and at a validation and checkpoint (120)."""
    flags = ("--model.mode", mode, *BUSY)
    runner.ok("fit", "flow", *flags, "--run.name", "whole", "--trainer.max_steps", "150")
    runner.ok("fit", "flow", *flags, "--run.name", "cut", "--trainer.max_steps", str(cut))
    assert runner.checkpoint("flow", "cut")["global_step"] == cut
    resumed = ("--ckpt_path", "last", "--trainer.max_steps", "150")
    runner.ok("fit", "flow", *flags, "--run.name", "cut", *resumed)
    # the cut run validated at its own end too: that row is the only difference
    one, two = runner.checkpoint("flow", "whole"), runner.checkpoint("flow", "cut")
    weights = [k for k in one["state_dict"] if not k.startswith("best_")]
    for k in weights:
        bitwise(one["state_dict"][k], two["state_dict"][k], k)
    bitwise(one["optimizer_states"], two["optimizer_states"], "optimizer")
    if cut == 120:
        check_same(runner, "flow", "whole", "cut", bitwise)


LONG = (*BUSY, "--model.network.hidden", "64", "--trainer.max_steps", "2000")


@pytest.mark.slow  # tests/test_kill.py has it in the gate
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signal_and_going_on(runner: Runner, bitwise: Callable[..., None], number: signal.Signals) -> None:
    """The command sequence: fit, a signal mid-epoch, fit --ckpt_path last."""
    process = runner.start("fit", "flow", *LONG, "--run.name", "cut")
    wait_for(runner.folder("flow", "cut") / "checkpoints" / "last.ckpt", process)
    time.sleep(0.15)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    stopped = runner.checkpoint("flow", "cut")["global_step"]
    assert 0 < stopped < 2000
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert stopped % 20 == 0  # a checkpoint of the 40 or the 60 beat
    else:
        assert process.returncode == 128 + number, err
        assert f"stopped at step {stopped}" in err
        assert "Traceback" not in err
    first_config = (runner.folder("flow", "cut") / "config.yaml").read_text()
    runner.ok("fit", "flow", *LONG, "--run.name", "cut", "--ckpt_path", "last")
    assert not list((runner.folder("flow", "cut") / "checkpoints").glob(f"{PARTIAL}*"))
    runner.ok("fit", "flow", *LONG, "--run.name", "whole")
    check_same(runner, "flow", "whole", "cut", bitwise)
    # in the same folder, with its first configuration kept
    assert (runner.folder("flow", "cut") / "config.yaml").read_text() == first_config
    names = {p.name for p in runner.folder("flow", "cut").parent.iterdir()}
    assert names == {"cut", "whole"}


def test_rows_reach_the_disk_before_their_checkpoint(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be killed right after any checkpoint has its name: no row up to its step may be missing then."""
    real, seen = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        moved = real(self, target)
        if Path(target).suffix == ".ckpt":
            rows = [int(r["step"]) for r in read_csv(Path(target).parent.parent / "metrics.csv")]
            step = torch.load(target, map_location="cpu", weights_only=True)["global_step"]
            seen.append((step, rows))
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    runner.ok("fit", "flow", *BUSY, "--trainer.max_steps", "150", "--run.name", "a")
    assert {40, 60, 80, 120, 150} <= {step for step, _ in seen}
    for step, rows in seen:
        # step 1 aside, rows are at the multiples of 10 and where validation was
        assert [r for r in rows if r % 10 == 0] == list(range(10, step + 1, 10))


def test_a_wrong_position_would_be_seen(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, bitwise: Callable[..., None]
) -> None:
    """Negative control: a loader that forgets its place ends elsewhere."""
    from lightning_toys.training.loader import BlockLoader

    flags = (*BUSY, "--model.mode", "regression")
    runner.ok("fit", "flow", *flags, "--run.name", "whole", "--trainer.max_steps", "150")
    runner.ok("fit", "flow", *flags, "--run.name", "cut", "--trainer.max_steps", "61")

    def forget(self: BlockLoader, state: dict[str, int]) -> None:
        self.next_step = state["next_step"] - 1

    monkeypatch.setattr(BlockLoader, "load_state_dict", forget)
    runner.ok("fit", "flow", *flags, "--run.name", "cut", "--ckpt_path", "last", "--trainer.max_steps", "150")
    one, two = runner.checkpoint("flow", "whole"), runner.checkpoint("flow", "cut")
    with pytest.raises(AssertionError):
        bitwise(one["state_dict"]["net.last.weight"], two["state_dict"]["net.last.weight"], "")


def test_a_place_ahead_of_the_trainer_is_an_error(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an endless wait for steps that the loader has given already."""
    from lightning_toys.training.loader import BlockLoader

    runner.ok("fit", "flow", "--run.name", "cut", "--trainer.max_steps", "61")

    def ahead(self: BlockLoader, state: dict[str, int]) -> None:
        self.next_step = state["next_step"] + 1

    monkeypatch.setattr(BlockLoader, "load_state_dict", ahead)
    with pytest.raises(RuntimeError, match="more steps are asked for"):
        main(runner.words("fit", "flow", "--run.name", "cut", "--ckpt_path", "last", "--trainer.max_steps", "150"))


def test_no_random_state_and_weights_only(runner: Runner) -> None:
    """Two runs differ in no bit though the global generators differ, and the checkpoint holds plain values."""
    torch.manual_seed(1)
    runner.ok("fit", "flow", "--trainer.max_steps", "20", "--run.name", "a")
    torch.manual_seed(2)
    runner.ok("fit", "flow", "--trainer.max_steps", "20", "--run.name", "b")
    a, b = runner.checkpoint("flow", "a"), runner.checkpoint("flow", "b")
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert set(a["toy"]) == {"seeds", "sizes", "config"}


def test_checkpoint_while_writing_is_whole(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies while it writes a checkpoint keeps the one before."""
    runner.ok("fit", "flow", "--trainer.max_steps", "20", "--run.name", "a")
    before = runner.checkpoint("flow", "a")["global_step"]

    real = Path.replace

    def die(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".ckpt":
            raise OSError("out of order")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        code, err = runner.code("fit", "flow", "--run.name", "a", "--ckpt_path", "last", "--trainer.max_steps", "40")
    assert code == 1
    assert "error: out of order" in err
    assert "Traceback" not in err
    assert runner.checkpoint("flow", "a")["global_step"] == before == 20


def test_a_runs_folder_stands_for_its_last_checkpoint(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2")
    folder = runner.folder("flow")
    runner.ok("test", "flow", "--ckpt_path", str(folder))
    assert "last.ckpt" not in {p.name for p in folder.iterdir()}
    code, err = runner.code("test", "flow", "--ckpt_path", str(folder / "figures"))
    assert code == 2
    assert "--ckpt_path: no file" in err


def test_nothing_left_of_an_older_checkpoint_leaves_results_and_rows(runner: Runner) -> None:
    """A finished run is not put back by a checkpoint from within it, whose steps are asked for and done."""
    flags = ("--model.seeds", "[0,1]", "--data.holdout", "0.2", "--data.noise", "0.1", "--run.name", "a")
    flags = (*flags, "--trainer.val_check_interval", "20")
    runner.ok("fit", "flow", *flags, "--trainer.max_steps", "60")
    folder = runner.folder("flow", "a")
    before = {n: (folder / n).read_bytes() for n in ("results.json", "metrics.csv")}
    runner.ok("fit", "flow", *flags, "--trainer.max_steps", "100", "--ckpt_path", "last")
    after = {n: (folder / n).read_bytes() for n in before}
    assert after != before
    half = folder / "half.ckpt"
    assert main(runner.words("fit", "flow", *flags, "--trainer.max_steps", "40", "--run.name", "b")) == 0
    shutil.copy(runner.folder("flow", "b") / "checkpoints" / "last.ckpt", half)
    said = runner.ok("fit", "flow", *flags, "--trainer.max_steps", "40", "--ckpt_path", str(half))
    assert "nothing was trained: the checkpoint is at step 40" in said
    assert {n: (folder / n).read_bytes() for n in before} == after
