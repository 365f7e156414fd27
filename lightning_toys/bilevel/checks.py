"""Checks of settings that :func:`lightning_toys.errors.bounded` has no form for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from lightning_toys.errors import require

MOST_Y = 1e12  # of drifts and noise: squares of them are summed in single precision, which holds 3e38


def number_in(flag: str, value: Any, fits: Callable[[float], bool], allowed: str) -> None:
    """Refuse what is no number, or one that does not fit.

    Args:
        flag: as it is written on the command line.
        value: what was given.
        fits: whether a number does; NaN fits nothing that is compared.
        allowed: what does, in words.

    Raises:
        ToyError: names the flag, the value and what is allowed.

    >>> number_in("--model.eps", None, lambda x: 0 <= x <= 1, "a share between 0 and 1")
    Traceback (most recent call last):
    lightning_toys.errors.ToyError: --model.eps: None is not allowed; give a share between 0 and 1
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    given = str(value) if number else repr(value)[:40]
    require(number and fits(value), f"{flag}: {given} is not allowed; give {allowed}")


def numbers(flag: str, values: Any, one: str) -> Sequence[Any]:
    """Return a list of settings as it was given, if it is one and not empty; ``one`` is what to give one of.

    Raises:
        ToyError: it is no list, or has nothing in it.
    """
    listed = isinstance(values, Collection) and not isinstance(values, str | Mapping)
    given = repr(values)[:40]
    require(listed and len(values) > 0, f"{flag}: {given} is not allowed; give at least one {one}, in a list")
    found: Sequence[Any] = values
    return found


def switches(flag: str, **given: Any) -> None:
    """Refuse what is neither true nor false, by the settings' names after ``flag``; None is left to another's word.

    Raises:
        ToyError: names the flag and the value.
    """
    for name, value in given.items():
        fits = value is None or isinstance(value, bool)
        require(fits, f"{flag}.{name}: {value!r} is not allowed; give true or false")
