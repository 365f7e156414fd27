"""A probe that does not fit into memory is refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy import memory
from lightning_toys.update_entropy.memory import check_memory, free_bytes, probe_bytes
from lightning_toys.update_entropy.probe import Plan

PLAN = Plan(prompts=4, group=4, eval_prompts=64, eval_group=1)


def a_model(numbers: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model on no device that trains so many numbers, beside a frozen part that does not count."""
    model = nn.ParameterDict({"trained": torch.empty(numbers, dtype=dtype, device="meta"), "frozen": torch.empty(9, 9)})
    model["frozen"].requires_grad_(False)
    return model


def test_what_is_kept_by_hand() -> None:
    """16 gradients and 16 directions of U, 64 gradients of E, 20 more; 16 steps without a sequence."""
    assert probe_bytes(a_model(1000), PLAN) == 4000 * (16 + 16 + 64 + 20 + 16)
    assert probe_bytes(a_model(1000, torch.bfloat16), PLAN) == 2000 * 132
    assert probe_bytes(a_model(1000), PLAN, world_size=4) == 4000 * (16 + 16 + 16 + 20 + 16)
    few = Plan(prompts=4, group=2, eval_prompts=64, eval_group=1)
    assert probe_bytes(a_model(1000), few) == 4000 * (8 + 8 + 64 + 20 + 4 * 4)
    few.counterfactuals = False
    assert probe_bytes(a_model(1000), few) == 4000 * (8 + 8 + 64 + 20)


def test_too_much_is_refused_and_much_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = a_model(124_000_000)
    wanted = probe_bytes(model, PLAN)
    monkeypatch.setattr(memory, "free_bytes", lambda device: wanted - 1)
    with pytest.raises(
        ToyError, match=r"^--model.plan.eval_prompts: 64 is not allowed here: gradients of 64 \+ 16 "
    ) as caught:
        check_memory(model, PLAN)
    assert "by 124,000,000 parameters take about 61.0 GiB, and 61.0 GiB are free" in str(caught.value)
    assert "\n" not in str(caught.value)
    for free in (wanted, None):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        check_memory(model, PLAN)
        assert "the probe's gradients of 64 + 16 sequences" in capsys.readouterr().err
    check_memory(a_model(1000), PLAN)
    assert capsys.readouterr().err == ""


def test_what_is_free_is_the_least_of_machine_and_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = free_bytes(torch.device("cpu"))
    if machine is not None:  # elsewhere than on Linux nothing is known
        assert machine > 1 << 20
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(torch.device("cpu")) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert (free_bytes(torch.device("cpu")) is None) == (machine is None)
