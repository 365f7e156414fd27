"""`fit` with the written-out backward pass: when it is taken, that results say so, and that it trains as autograd."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_toys.flow_vs_regression import FlowVsRegression
from tests.conftest import Runner

SHORT = ("--trainer.max_steps", "60", "--model.seeds", "[0,1,2]", "--trainer.accelerator", "cpu")


class Listening(Callback):
    """Looks at gradients before each step."""

    norms: list[float] = []  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the gradient's norm."""
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))


class OwnLoss(FlowVsRegression):
    """A loss of somebody's own."""

    def losses(self, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor, total: int) -> Tensor:
        """Return twice the loss."""
        return 2 * super().losses(c, x1, x0, t, total)


def how(runner: Runner, name: str) -> str:
    found: str = json.loads((runner.folder("flow", name) / "results.json").read_text())["backward"]
    return found


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "written out"),
        (("--model.network.kind", "film", "--model.clip_grad_norm", "0.1", "--model.ema_decay", "0.9"), "written out"),
        (("--trainer.precision", "64-true"), "written out"),
        (("--model.network.kind", "transformer"), "autograd"),
        (("--trainer.precision", "bf16-mixed"), "autograd"),
        (("--trainer.precision", "bf16-true"), "autograd"),
        (("--trainer.callbacks", f"{__name__}.Listening"), "autograd"),
        (("--trainer.profiler", "simple"), "autograd"),
        (("--model", f"{__name__}.OwnLoss"), "autograd"),
    ],
)
def test_results_say_how_steps_were_taken(flags: tuple[str, ...], expected: str, runner: Runner) -> None:
    before = len(Listening.norms)
    runner.ok("fit", "flow", *SHORT, "--run.name", "a", *flags)
    assert how(runner, "a") == expected
    assert len(Listening.norms) - before == (60 if "Listening" in " ".join(flags) else 0)


@pytest.mark.parametrize("flags", [(), ("--model.network.kind", "film"), ("--model.mode", "mip", "--model.loss", "l1")])
def test_it_trains_as_autograd_does(
    flags: tuple[str, ...], runner: Runner, monkeypatch: pytest.MonkeyPatch, bitwise: Callable[..., None]
) -> None:
    """To rounding, and it goes on bit for bit; a run may be begun with the one and ended with the other."""
    runner.ok("fit", "flow", *SHORT, *flags, "--run.name", "whole")
    runner.ok("fit", "flow", *SHORT, *flags, "--run.name", "cut", "--trainer.max_steps", "25")
    runner.ok("fit", "flow", *SHORT, *flags, "--run.name", "cut", "--ckpt_path", "last")
    whole = runner.checkpoint("flow", "whole")
    for key in ("state_dict", "optimizer_states"):
        bitwise(whole[key], runner.checkpoint("flow", "cut")[key], key)
    runner.ok("fit", "flow", *SHORT, *flags, "--run.name", "mixed", "--trainer.max_steps", "25")
    monkeypatch.setattr(FlowVsRegression, "take_steps", lambda *args: None)
    runner.ok("fit", "flow", *SHORT, *flags, "--run.name", "mixed", "--ckpt_path", "last")
    runner.ok("fit", "flow", *SHORT, *flags, "--run.name", "autograd")
    assert how(runner, "whole") == "written out"
    assert how(runner, "mixed") == how(runner, "autograd") == "autograd"
    for name in ("mixed", "autograd"):
        other = runner.checkpoint("flow", name)["state_dict"]
        for key, value in whole["state_dict"].items():
            torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-5)
    assert not torch.equal(whole["state_dict"]["net.first.weight"], torch.zeros(()))
