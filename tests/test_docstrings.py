"""Every example in the package's docstrings gives what it says."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.conftest import REPO

FILES = [p for p in sorted((REPO / "lightning_toys").rglob("*.py")) if ">>> " in p.read_text()]
NAMES = [".".join(p.relative_to(REPO).with_suffix("").parts) for p in FILES]


def test_there_are_examples() -> None:
    assert len(NAMES) > 40


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
