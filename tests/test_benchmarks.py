"""The benchmarks' peers compute what ours does. Needs the extra bench (`make bench` installs it)."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
CHECKS = [
    ("jitted_control_speed", "check_cartpole", ()),
    ("jitted_control_speed", "check_learning", ("mle",)),
    ("jitted_control_speed", "check_learning", ("omd",)),
    ("jitted_policy_speed", "check", ()),
    ("jitted_mirror_speed", "check", ()),
]


@pytest.mark.slow  # jax is imported and compiles
@pytest.mark.parametrize(("script", "check", "arguments"), CHECKS, ids=lambda x: str(x))
def test_the_jitted_peer_is_ours(
    script: str, check: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax")
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    cores = os.sched_getaffinity(0)
    try:
        getattr(importlib.import_module(script), check)(*arguments)
    finally:
        os.sched_setaffinity(0, cores)  # the scripts keep XLA to one
