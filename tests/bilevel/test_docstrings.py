"""The examples in docstrings are right."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

WITH_EXAMPLES = (
    *("vectors", "implicit", "inference"),
    *(f"control.{name}" for name in ("agents", "environments", "module", "nets", "replay", "tabular")),
    *(f"regression.{name}" for name in ("drift", "metrics", "mlp", "module", "stream")),
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name: str) -> None:
    found = doctest.testmod(import_module(f"lightning_toys.bilevel.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
