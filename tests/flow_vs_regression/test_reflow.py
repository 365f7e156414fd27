"""Reflow learns the map of its teacher, whose paths it makes straight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import FlowVsRegression, InterpolationData
from lightning_toys.flow_vs_regression.reflow import Reflow
from lightning_toys.nets import ConditionalNet, Network
from tests.conftest import Runner


class Decay(ConditionalNet):
    """dx/dt = -x, which carries x0 to x0 / e."""

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        return -x


class Constant(ConditionalNet):
    """The velocity of the straight line from x0 to x0 / e at t = 0."""

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        return x * (torch.exp(torch.tensor(-1.0, dtype=x.dtype)) - 1)


def test_its_target_is_the_teachers_end(tmp_path: Path) -> None:
    file = tmp_path / "teacher.ckpt"
    file.touch()
    objective = Reflow(str(file), nfe=64)
    objective.net = Decay()
    g = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(2, 5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    c = torch.zeros(2, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(objective.end_of(x0, c), x0 / torch.e, rtol=1e-6, atol=1e-8)
    (residual,) = objective.residuals(Constant(), c, x1, x0, torch.zeros_like(c))
    assert residual.abs().max() < 1e-6
    (later,) = objective.residuals(Constant(), c, x1, x0, torch.full_like(c, 0.5))
    assert later.abs().max() > 0.1


def test_a_teacher_from_a_run(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--model.seeds", "[0,1]")
    file = runner.folder("flow") / "checkpoints" / "last.ckpt"
    objective = Reflow(str(file), "euler", 2)
    x0, c = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 4, 1)
    net = objective.loaded()
    x = x0 + net(x0, c, torch.zeros(2, 4, 1)) / 2
    end = x + net(x, c, torch.full((2, 4, 1), 0.5)) / 2
    torch.testing.assert_close(objective.end_of(x0, c), end)
    assert (end[1] - end[0]).abs().max() > 0.01
    for replicas in ([0], [1], [1, 1], [1, 0]):
        part = objective.of_replicas(replicas, 2)
        torch.testing.assert_close(part.end_of(x0[replicas], c[replicas]), end[replicas])
    torch.testing.assert_close(objective.end_of(x0.double(), c.double()), end.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ToyError, match=r"has 2 replicas, this run 3; give as many seeds"):
        objective.of_replicas([0, 1, 2], 3)
    with pytest.raises(ToyError, match=r"maps 1 inputs to 1 outputs, these data 2 to 1"):
        objective.end_of(x0, torch.zeros(2, 4, 2))


@pytest.mark.parametrize("seeds", [[7], [0, 1], [0, 1, 2]])
def test_it_is_fitted_gone_on_with_and_tested(runner: Runner, bitwise: Callable[..., None], seeds: list[int]) -> None:
    flags = ("--model.seeds", str(seeds), "--model.ema_decay", "0.9")
    runner.ok("fit", "flow", *flags, "--trainer.max_steps", "20", "--run.name", "teacher")
    file = runner.folder("flow", "teacher") / "checkpoints" / "last.ckpt"
    reflow = ("--model.objective", "Reflow", "--model.objective.teacher", str(file), "--model.objective.nfe", "4")
    runner.ok("fit", "flow", *flags, *reflow, "--trainer.max_steps", "30", "--run.name", "whole")
    runner.ok("fit", "flow", *flags, *reflow, "--trainer.max_steps", "13", "--run.name", "cut")
    resumed = ("--ckpt_path", "last", "--trainer.max_steps", "30")
    runner.ok("fit", "flow", *flags, *reflow, "--run.name", "cut", *resumed)
    whole, cut = (runner.checkpoint("flow", name) for name in ("whole", "cut"))
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(whole[key], cut[key], key)
    runner.ok("test", "flow", *flags, *reflow, "--run.name", "whole", "--ckpt_path", "last")
    results = json.loads((runner.folder("flow", "whole") / "results.json").read_text())
    assert len(results["metrics"]["l2"]["values"]) == len(seeds)


def test_a_process_of_several_takes_its_own_replicas_of_the_teacher(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--model.seeds", "[3,4,5]")
    objective = Reflow(str(runner.folder("flow") / "checkpoints" / "last.ckpt"))
    module = FlowVsRegression(seeds=[3, 4, 5], objective=objective)
    module.local_replicas = slice(1, 3)  # as --model.parallel replicas has it
    local = module.local_objective
    assert isinstance(local, Reflow)
    for part, whole in zip(local.loaded().parameters(), objective.loaded().parameters(), strict=True):
        assert torch.equal(part, whole[1:])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "32-true"])
def test_a_script_fits_it_in_any_precision(runner: Runner, precision: Any) -> None:
    """And learns where one Euler step of its teacher ends: at t = 0 the teacher itself has no residual."""
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--model.seeds", "[3,4,5]")
    file = runner.folder("flow") / "checkpoints" / "last.ckpt"
    objective = Reflow(str(file), "euler", 1)
    module = FlowVsRegression(seeds=[3, 4, 5], objective=objective, network=Network(hidden=16))
    quiet: Any = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_steps=3, precision=precision, enable_checkpointing=False, **quiet)
    trainer.fit(module, datamodule=InterpolationData(num_eval=20))
    like = next(module.net.parameters())
    assert like.dtype == {"6": torch.float64, "b": torch.bfloat16, "3": torch.float32}[precision[0]]
    c, x0 = torch.rand(3, 4, 1).to(like), torch.randn(3, 4, 1).to(like)
    local = module.local_objective
    assert isinstance(local, Reflow)
    (residual,) = local.residuals(local.loaded(), c, torch.zeros_like(x0), x0, torch.zeros_like(c))
    assert residual.abs().max() < {"6": 1e-12, "b": 0.05, "3": 1e-5}[precision[0]]


def test_teachers_that_are_refused(tmp_path: Path, runner: Runner) -> None:
    with pytest.raises(ToyError, match=r"--model.objective.teacher: 'none.ckpt' is no file"):
        Reflow("none.ckpt")
    runner.ok("fit", "regression", "--trainer.max_steps", "2", "--model.seeds", "[0]")
    file = runner.folder("regression") / "checkpoints" / "last.ckpt"
    with pytest.raises(ToyError, match="was trained as regression, no flow"):
        Reflow(str(file)).loaded()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ToyError, match=r"^--model.objective.teacher: reading .*text.ckpt fails: "):
        Reflow(str(tmp_path / "text.ckpt")).loaded()
    with pytest.raises(ToyError, match=r"--model.objective.nfe: 6 is not allowed with rk4"):
        Reflow(str(file), "rk4", 6)
