"""Errors that are the user's to mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal


class ToyError(Exception):
    """Bad input. The message names the flag, the value and what is allowed, in one line."""


class NothingToTrainError(ToyError):
    """`fit` was asked of an experiment without weights."""


class NonFiniteError(Exception):
    """A loss or a parameter stopped being finite; names the optimiser step and the replica's seed."""


class RunFolderError(Exception):
    """A run's folder cannot be written to any more; names it, and why."""


class FiguresError(RunFolderError):
    """A run's figures could not be drawn; says what of it is whole: results and checkpoint."""


class OwnershipLostError(Exception):
    """Another process took a run's folder over from this one, which may write nothing more to it."""


class Stopped(SystemExit):
    """A signal asked the program to end.

    Attributes:
        code: 128 and the signal's number.
        told: whether the user has been told what to do then.
    """

    def __init__(self, number: int, told: bool = False) -> None:
        super().__init__(128 + number)
        self.number, self.told = signal.Signals(number), told


KEPT = "the last good checkpoint, if one was written, is kept"
AGAIN = "go on (fit: with --ckpt_path last; sweep: with the same command)"


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def run_folder_error(error: OSError, folder: Path) -> RunFolderError | None:
    """Return an error of writing to a run's folder in words, with what to do; None where it is about something else.

    Args:
        error: as Python raised it.
        folder: the run's.
    """
    if is_disk_full(error):
        return RunFolderError(f"no space left to write to {folder}; {KEPT}: make room, then {AGAIN}")
    if not folder.is_dir():
        return RunFolderError(f"{folder} was deleted or moved while it was written to; nothing more is written")
    name = os.path.abspath(str(error.filename)) if error.filename else ""
    inside = name.startswith(f"{folder.absolute()}{os.sep}") or name == str(folder.absolute())
    if not inside and error.errno not in (errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG):
        return None
    why = (error.strerror or str(error)).lower()
    return RunFolderError(f"{folder} cannot be written to ({why}: {error.filename}); {KEPT}: mend that, then {AGAIN}")


def one_line(error: object, most: int = 2000) -> str:
    """Return a message on one line that a terminal shows as it is, whatever names and values it quotes.

    Example:
        >>> one_line("a\\nb \\x1b[31m")
        'a b \\\\x1b[31m'
    """
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split()))
    return text if len(text) <= most else f"{text[:most]}..."


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``options``, or the empty string.

    Options that end alike ("model.init_args.lr" for "lr") are compared whole; the caller strips prefixes.
    """
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate, and the separators of lines and paragraphs
JOINERS = "\u200c\u200d"  # format characters that belong to words


def printable(text: str) -> str:
    r"""Return a text on one line: line ends, control characters and lone surrogates are written out.

    A name may come out of somebody else's file, and be no text that a terminal or a file should be sent.

    >>> printable("a\nb\x1b[2J"), printable("ü ± $x$")
    ('a\\nb\\x1b[2J', 'ü ± $x$')
    """
    if text.isprintable():
        return text
    seen = (c in JOINERS or unicodedata.category(c) not in UNSEEN for c in text)
    return "".join(c if fine else c.encode("unicode_escape").decode() for c, fine in zip(text, seen, strict=True))


def require(condition: bool, message: str) -> None:
    """Raise :class:`ToyError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ToyError(message)


LARGEST = 1e30  # of numbers: rates, weights, widths; single precision holds 3e38
MOST = 10**8  # of sizes: entries along one axis
REPEATS = 10**6  # of loops that nobody sees the end of before it has come: solver steps, inner iterations
WHOLE = 2**63 - 1  # what 64 bits hold: seeds, indices, steps


def bounded(flag: str, value: float, low: float, high: float | None = None, *, above: bool = False) -> None:
    """Refuse a size or a number that is out of bounds, before anything is made of it.

    Args:
        flag: as it is written on the command line.
        value: what was given; NaN is out of all bounds.
        low: the least that is allowed; an integer where the value has to be one, as NumPy's are and 2.0 is not.
        high: the most; by default ``MOST`` of integers and ``LARGEST`` of numbers.
        above: whether ``low`` itself is left out.

    Raises:
        ToyError: names the flag, the value and what is allowed.

    Example:
        >>> bounded("--data.num_train", 1, 2, 9)
        Traceback (most recent call last):
        lightning_toys.errors.ToyError: --data.num_train: 1 is not allowed; give an integer >= 2, at most 9
    """
    whole = isinstance(low, int)
    most = high if high is not None else MOST if whole else LARGEST
    if is_number(value, whole) and (low < value if above else low <= value) and value <= most:
        return
    given = str(value) if len(str(value)) <= 40 else f"{str(value)[:40]}..."
    ends = [str(x) if whole else format(x, "g") for x in (low, most)]
    kind = "an integer" if whole else "a number"
    allowed = f"{'>' if above else '>='} {ends[0]}, at most {ends[1]}" if low >= 0 else f"from {ends[0]} to {ends[1]}"
    raise ToyError(f"{flag}: {given} is not allowed; give {kind} {allowed}")


def check_settings(owner: type, given: Mapping[str, Any], prefix: str) -> None:
    """Refuse what a constructor's annotations do not allow, as the command line does before it calls one.

    From Python a word that a ``Literal`` does not list would take some other branch without an error, and a word in the
    place of a number a ``TypeError``. Only words, numbers, booleans and lists of words are looked at.

    Args:
        owner: the class whose constructor it is; of a dataclass ``type(self)``.
        given: its arguments by name, such as ``locals()`` in its first line, or a dataclass's ``vars(self)``.
        prefix: of their flags, such as ``--model.``.

    Raises:
        ToyError: names the flag, the value and what is allowed.

    Example:
        >>> class Mean:
        ...     def __init__(self, kind: Literal["plain", "geometric"] = "plain") -> None:
        ...         check_settings(Mean, locals(), "--model.")
        >>> Mean("harmonic")
        Traceback (most recent call last):
        lightning_toys.errors.ToyError: --model.kind: 'harmonic' is not allowed; give plain or geometric
    """
    for name, annotation in checked_annotations(owner).items():
        if name not in given or allows(annotation, value := given[name]):
            continue
        words = words_in(annotation)
        allowed = " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
        if lists := [part for part in parts_of(annotation) if is_list(part)]:
            known = ", ".join(words_in(lists[0]))
            if isinstance(value, list | tuple):
                value = next((v for v in value if not allows(lists[0], [v])), value)
                allowed = f"some of {known}"
            else:
                allowed = f"a list of some of {known}"
        shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
        hint = did_you_mean(str(value).lower(), words)
        raise ToyError(f"{prefix}{name}: {shown} is not allowed; give {allowed}{hint}")


PLAIN: dict[Any, list[str]] = {  # kinds whose values are looked at, as an error names them
    bool: ["true", "false"], int: ["an integer"], float: ["a number"], types.NoneType: ["null"]
}  # fmt: skip


@cache
def checked_annotations(owner: type) -> dict[str, Any]:
    """Return the annotations of a constructor that :func:`check_settings` looks at; none where they cannot be read."""
    try:
        hints = typing.get_type_hints(owner.__init__)  # type: ignore[misc]
    except (NameError, AttributeError, TypeError):  # of somebody's subclass: names that a type checker alone knows
        return {}
    hints.pop("return", None)
    return {n: a for n, a in hints.items() if lists_words(a) or all(part in PLAIN for part in parts_of(a))}


def lists_words(annotation: Any) -> bool:
    """Whether there is a ``Literal`` in an annotation, or within its unions and lists."""
    return typing.get_origin(annotation) is Literal or any(map(lists_words, typing.get_args(annotation)))


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def is_list(annotation: Any) -> bool:
    """Whether an annotation is that of a list, a tuple or a sequence of some kind."""
    origin = typing.get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Sequence)


def allows(annotation: Any, value: Any) -> bool:
    """Whether a value is what an annotation says, as far as words, lists of them and plain kinds go."""
    if len(parts := parts_of(annotation)) > 1:
        return any(allows(part, value) for part in parts)
    if typing.get_origin(annotation) is Literal:
        return any(isinstance(value, type(word)) and value == word for word in typing.get_args(annotation))
    if is_list(annotation):
        return isinstance(value, list | tuple) and all(allows(typing.get_args(annotation)[0], v) for v in value)
    if annotation in (int, float):
        return is_number(value, whole=annotation is int)
    if annotation is bool:
        return type(value).__name__ in ("bool", "bool_") or (is_number(value) and value in (0, 1))
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether a value is a number, or an integer; NumPy's are, and True is none."""
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


def words_in(annotation: Any) -> list[str]:
    """Return what may be given, as configurations write it."""
    if typing.get_origin(annotation) is Literal:
        return [str(word) for word in typing.get_args(annotation)]
    return PLAIN.get(annotation) or [word for part in typing.get_args(annotation) for word in words_in(part)]


def process_rank() -> int:
    """Return this process's rank as its launcher tells it, before any strategy exists."""
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 0


LISTENERS: list[Callable[[str], None]] = []  # who else is told what :func:`note` says
HELD: list[list[str]] = []  # what is to be said at the end of each :func:`notes_held` that is under way


@contextmanager
def notes_held() -> Iterator[None]:
    """Say what a block notes at its end, or nothing if it ends with an error: a refusal is one line."""
    HELD.append([])
    try:
        yield
    except BaseException:
        HELD.pop()
        raise
    for message in HELD.pop():
        note(message)


def note(message: str) -> None:
    """Say something to the user, once: on standard error, from the first process only."""
    if HELD:
        HELD[-1].append(message)
    elif process_rank() == 0:
        print(message, file=sys.stderr, flush=True)
        for listener in LISTENERS:
            listener(message)
