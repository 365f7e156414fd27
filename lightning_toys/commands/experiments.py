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


def public_name(class_path: str) -> str:
    """Return ``lightning_toys.EXPERIMENT.Class`` for any path of an exported class; empty for all else.

    It stays the same where files are renamed.
    """
    parts = class_path.split(".")
    if len(parts) < 3 or parts[0] != "lightning_toys" or parts[1] not in EXPERIMENTS:
        return ""
    package = importlib.import_module(f"lightning_toys.{parts[1]}")
    return f"lightning_toys.{parts[1]}.{parts[-1]}" if parts[-1] in package.PLACES else ""


def import_all() -> None:
    """Import every exported class, so that a configuration can name it by its last name."""
    for name in EXPERIMENTS:
        package = importlib.import_module(f"lightning_toys.{name}")
        for word in package.PLACES:
            getattr(package, word)
