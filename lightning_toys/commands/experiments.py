"""The shipped experiments: their packages, and the classes that each exports. Imports nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

EXPERIMENTS = ("flow_vs_regression", "generative_policy", "mirror_descent", "update_entropy", "bilevel")


def exported() -> Iterator[tuple[str, str]]:
    """Yield the name and the full path of each class that the experiments export."""
    for name in EXPERIMENTS:
        package = importlib.import_module(f"lightning_toys.{name}")
        yield from ((word, f"{place}.{word}") for word, place in package.PLACES.items())


def import_all() -> None:
    """Import every exported class, so that a configuration can name it by its last name."""
    for name in EXPERIMENTS:
        package = importlib.import_module(f"lightning_toys.{name}")
        for word in package.PLACES:
            getattr(package, word)
