"""Reflow learns the map of its teacher, whose paths it makes straight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression.reflow import Reflow
from lightning_toys.nets import ConditionalNet
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
    net = objective.loaded(x0)
    x = x0 + net(x0, c, torch.zeros(2, 4, 1)) / 2
    torch.testing.assert_close(objective.end_of(x0, c), x + net(x, c, torch.full((2, 4, 1), 0.5)) / 2)
    with pytest.raises(ToyError, match=r"has 2 replicas, this run 3; give as many seeds"):
        Reflow(str(file)).loaded(torch.zeros(3, 4, 1))


def test_teachers_that_are_refused(tmp_path: Path, runner: Runner) -> None:
    with pytest.raises(ToyError, match=r"--model.objective.teacher: 'none.ckpt' is no file"):
        Reflow("none.ckpt")
    runner.ok("fit", "regression", "--trainer.max_steps", "2", "--model.seeds", "[0]")
    file = runner.folder("regression") / "checkpoints" / "last.ckpt"
    with pytest.raises(ToyError, match="was trained as regression, no flow"):
        Reflow(str(file)).loaded(torch.zeros(1, 4, 1))
    with pytest.raises(ToyError, match=r"--model.objective.nfe: 6 is not allowed with rk4"):
        Reflow(str(file), "rk4", 6)
