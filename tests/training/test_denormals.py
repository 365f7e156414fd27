"""Denormal numbers are zero during training steps, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_toys.flow_vs_regression import FlowVsRegression
from lightning_toys.training.denormals import denormals_flushed, flushes_denormals
from lightning_toys.training.loader import Block, DrawnBlock
from tests.conftest import Runner
from tests.shipped import FIRST

flag = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such setting")


@flag
@pytest.mark.parametrize("before", [False, True])
def test_the_setting_is_given_back(before: bool) -> None:
    @denormals_flushed()
    def fails() -> None:
        assert flushes_denormals()
        raise RuntimeError

    torch.set_flush_denormal(before)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                fails()
            assert flushes_denormals() is before
    finally:
        torch.set_flush_denormal(False)


@flag
def test_it_sees_them() -> None:
    tiny_number = torch.full((3,), 1e-39)
    assert (tiny_number * 0.5 != 0).all()
    assert not flushes_denormals()
    with denormals_flushed():
        assert (tiny_number * 0.5 == 0).all()
        assert (torch.full((3,), 1e-37) * 0.5 != 0).all()


def test_every_experiment_does_so() -> None:
    training = [kind for kind in FIRST if kind.trains]
    assert len(training) > 5
    for kind in training:
        assert hasattr(kind.training_step, "__wrapped__"), kind  # what the decorator leaves


@flag
@pytest.mark.parametrize("flags", [(), ("--model.network.kind", "transformer")])
def test_steps_are_taken_so(flags: tuple[str, ...], runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    finish = FlowVsRegression.finish_block

    def seen(self: FlowVsRegression, block: Block | DrawnBlock, losses: torch.Tensor, *more: Any) -> None:
        found.append(flushes_denormals())
        finish(self, block, losses, *more)

    monkeypatch.setattr(FlowVsRegression, "finish_block", seen)
    runner.ok("fit", "flow", "--trainer.max_steps", "2", *flags)
    assert found
    assert all(found)
    assert not flushes_denormals()
