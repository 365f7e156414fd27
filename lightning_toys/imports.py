"""Classes imported when they are first asked for (PEP 562), and classes found by the path that somebody gives."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_toys.errors import ToyError, did_you_mean


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]], scripts: Mapping[str, Sequence[str]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], dict[str, str]]:
    """Return a package's ``__getattr__``, ``__dir__`` and where the classes that configurations may name are defined.

    Args:
        package: the package's ``__name__``.
        modules: those classes by the module below the package that defines them.
        scripts: likewise, names for scripts alone, such as base classes for classes of one's own.

    Example:
        >>> find, names, places = lazy_exports("lightning_toys", {"stats": ["holm"]})
        >>> places["holm"], find("holm").__name__
        ('lightning_toys.stats', 'holm')
    """

    def by_name(listed: Mapping[str, Sequence[str]]) -> dict[str, str]:
        return {name: f"{package}.{module}" for module, names in listed.items() for name in names}

    places = by_name(modules)
    everything = places | by_name(scripts or {})

    def find(name: str) -> Any:
        if name not in everything:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(everything[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *everything})

    return find, names, places


def load_class(path: str) -> Any:
    """Return what a dotted path names.

    Raises:
        ToyError: says in one line whether there is no such module, no such class in it, or an error in its file.
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                if end == 1 or "." not in error.name:
                    raise ToyError(f"no module {error.name!r}{module_hint(error.name)}") from None
                continue  # a class within a class
            raise ToyError(fault(name, error)) from None
        except Exception as error:
            raise ToyError(fault(name, error)) from None
        for i, word in enumerate(parts[end:]):
            if not hasattr(found, word):
                where = ".".join(parts[: end + i])
                kinds = [n for n, v in getattr(found, "__dict__", {}).items() if isinstance(v, type)]
                raise ToyError(f"{where!r} has no class {word!r}{did_you_mean(word, kinds)}")
            found = getattr(found, word)
        return found
    raise ToyError(f"{path!r} is no module.Class")


def module_hint(name: str) -> str:
    """Return a hint for a module that is not there: a file here that is called almost so.

    A file of that very name, of a working folder that is not on the path, is no hint.
    """
    return did_you_mean(name, [p.stem for p in Path().glob("*.py") if p.stem != name][:200])


def fault(module: str, error: Exception) -> str:
    """Say where a module's own file fails when it is imported, in one line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name} line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    # the last line that is neither the import system's nor a library's
    own = [f for f in frames if not f.filename.startswith("<") and "site-packages" not in f.filename]
    own = [f for f in own if Path(f.filename).resolve() != Path(__file__).resolve()]
    where = f"{Path(own[-1].filename).name} line {own[-1].lineno}" if own else f"module {module!r}"
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
