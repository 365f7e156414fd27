"""Options of modules: seeds, dataclasses and data as they were given, and flags that do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule

from lightning_toys.errors import did_you_mean, is_number, require


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Refuse an empty, repeated or negative list of replica seeds."""
    whole = isinstance(seeds, Sequence) and all(is_number(s, whole=True) for s in seeds)
    require(whole, f"--model.seeds: {seeds!r} is not allowed; give a list of integers, such as [0]")
    require(len(seeds) > 0, "--model.seeds: [] is not allowed; give at least one seed, such as [0]")
    require(
        min(seeds) >= 0 and max(seeds) < 2**63, f"--model.seeds: {list(seeds)} is not allowed; seeds are in [0, 2^63)"
    )
    require(len(set(seeds)) == len(seeds), f"--model.seeds: {list(seeds)} is not allowed; a seed appears twice")
    return [int(s) for s in seeds]  # NumPy's integers cannot be written into results.json


Data = TypeVar("Data", bound=LightningDataModule)


def require_data(data: LightningDataModule | None, kind: type[Data]) -> Data:
    """Return ``data`` if it is what the experiment learns from, and refuse it otherwise."""
    require(data is not None, f"--data: a data module is missing (a DataLoader alone is none); give {kind.__name__}")
    require(isinstance(data, kind), f"--data: {type(data).__name__} is not allowed; give {kind.__name__}")
    assert isinstance(data, kind)
    return data


Options = TypeVar("Options")


def as_dataclass(
    kind: type[Options], given: Options | dict[str, Any] | None, default: Options | None = None
) -> Options:
    """Return a dataclass of options as it was given, from a checkpoint's plain values, or its default.

    Raises:
        ToyError: it is no such dataclass, or a key is none of its settings.
    """
    name, known = kind.__name__, [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]
    if isinstance(given, dict):
        for key in given:
            hint = f"give some of {', '.join(known)}{did_you_mean(str(key), known)}"
            require(key in known, f"{name}: a setting {key!r} is not allowed; {hint}")
        return kind(**given)
    plain = isinstance(given, str | int | float | list | tuple)
    require(not plain, f"{name}: {given!r} is not allowed; give a {name}, or a dict of {', '.join(known)}")
    return given or default or kind()


def unused_flags(wants: str, *names: str) -> dict[str, str]:
    """Return flags of the model, and what they want to do something; see :meth:`ToyModule.unused_settings`."""
    return {f"--model.{n}": wants for n in names}
