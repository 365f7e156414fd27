"""Packages whose classes are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], dict[str, str]]:
    """Return a package's ``__getattr__``, ``__dir__`` and where each of its names is defined.

    Args:
        package: the package's ``__name__``.
        modules: names by the module below the package that defines them.

    Example:
        >>> find, names, places = lazy_exports("lightning_toys", {"stats": ["holm"]})
        >>> places["holm"], find("holm").__name__
        ('lightning_toys.stats', 'holm')
    """
    places = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return find, names, places
