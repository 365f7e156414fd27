"""A probe that does not fit into memory is refused before anything is sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy import memory
from lightning_toys.update_entropy.memory import check_memory, free_bytes, probe_bytes
from lightning_toys.update_entropy.plan import Plan

PLAN = Plan(prompts=4, group=4, eval_prompts=64, eval_group=1)


def a_model(numbers: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model on no device that trains so many numbers, beside a frozen part that does not count."""
    model = nn.ParameterDict({"trained": torch.empty(numbers, dtype=dtype, device="meta"), "frozen": torch.empty(9, 9)})
    model["frozen"].requires_grad_(False)
    return model


def test_what_is_kept_by_hand() -> None:
    """16 gradients of U, 64 of E, 32 that are being taken, 20 more; where none is kept 8, 6 without counterfactuals."""
    assert probe_bytes(a_model(1000), PLAN) == 4000 * (16 + 64 + 32 + 20)
    assert probe_bytes(a_model(1000, torch.bfloat16), PLAN) == 2000 * 132
    assert probe_bytes(a_model(1000), PLAN, world_size=4) == 4000 * (16 + 16 + 16 + 20)
    assert probe_bytes(a_model(1000), PLAN, update=8, evaluation=6) == 4000 * (8 + 6 + 8 + 20)
    assert probe_bytes(a_model(1000), PLAN, kept=False) == 4000 * 8
    assert probe_bytes(a_model(1000), replace(PLAN, counterfactuals=False), kept=False) == 4000 * 6
    few = replace(PLAN, grad_chunk_size=2)
    assert probe_bytes(a_model(1000), few) == 4000 * (16 + 64 + 2 + 20)


def test_gradients_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model(124_000_000)
    kept, anew = probe_bytes(model, PLAN), probe_bytes(model, PLAN, kept=False)

    def ask(free: int | None, keep: bool | None) -> tuple[bool, str]:
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return check_memory(model, replace(PLAN, keep_gradients=keep)), capsys.readouterr().err

    for free in (kept, None):
        found, said = ask(free, None)
        assert found
        assert said == "the probe's gradients of 64 + 16 sequences by 124,000,000 parameters take about 61.0 GiB\n"
    found, said = ask(kept - 1, None)
    assert not found
    assert "which is more than is free: none is kept; without kept gradients, a probe by 124,000,000" in said
    assert "takes about 3.7 GiB, and more time" in said
    found, said = ask(kept, False)  # as asked for
    assert not found
    assert said == "the probe: without kept gradients, a probe by 124,000,000 parameters takes about 3.7 GiB\n"
    for keep, free, words in (
        (
            True,
            kept - 1,
            ("keep_gradients: true is not allowed here: gradients of 64 + 16 ", "null or false (3.7 GiB)"),
        ),
        (None, anew - 1, ("keep_gradients: null is not allowed here: without kept gradients", "3.7 GiB are free")),
        (False, anew - 1, ("keep_gradients: false is not allowed here", "give an adapter (--model.policy.lora_rank)")),
    ):
        with pytest.raises(ToyError) as caught:
            ask(free, keep)
        assert str(caught.value).startswith("--model.plan.")
        assert all(w in str(caught.value) for w in words)
        assert "\n" not in str(caught.value)
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
