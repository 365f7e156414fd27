"""The examples in mirror_descent's docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

WITH_EXAMPLES = ("chain_runner", "joint", "module", "problem", "samplers", "schedules", "tilt")


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"lightning_toys.mirror_descent.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
