"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

from lightning_toys import update_entropy


def test_examples_in_docstrings() -> None:
    results = {
        found.name: doctest.testmod(importlib.import_module(f"{update_entropy.__name__}.{found.name}"))
        for found in pkgutil.iter_modules(update_entropy.__path__)
    }
    assert not [name for name, result in results.items() if result.failed]
    assert sum(result.attempted for result in results.values()) >= 15
