"""Files of a run: written whole or not at all, never over another, and by the run's owner alone."""

from __future__ import annotations

import itertools
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_toys.training.ownership import PARTIAL, check_owned

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def special_kind(path: Path) -> str:
    """Return what is at a path where that is neither a file nor a folder, such as ``a FIFO``; links are followed."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError:
        return ""
    return "" if kind in (stat.S_IFREG, stat.S_IFDIR) else KINDS.get(kind, "something else")


def read_text(path: Path, most: int) -> str:
    """Return the text (UTF-8) of an ordinary file.

    A FIFO would be waited for, a device read without end; neither is opened.

    Args:
        path: the file; links are followed.
        most: bytes that are read at most.

    Raises:
        ValueError: it is no ordinary file, has more bytes, or is no text; says which.
        OSError: it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, no file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size} bytes; at most {most} are read")
    return path.read_text(encoding="utf-8")


def numbered_names(path: Path) -> Iterator[Path]:
    """Yield ``name-1.ext``, ``name-2.ext``, ... beside a path."""
    return (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in itertools.count(1))


def set_aside(path: Path) -> None:
    """Move an existing file to the first free ``name-1.ext``, ``name-2.ext``, ...: nothing in a run is overwritten.

    Raises:
        OwnershipLostError: the run is another process's by now.
    """
    if not os.path.lexists(path):  # a link to nowhere is something too
        return
    kept = next(p for p in numbered_names(path) if not os.path.lexists(p))
    check_owned(path)
    path.rename(kept)


def write_beside(path: Path, text: str) -> None:
    """Write ``path``, or where that is something else already the first free ``name-1.ext``, ...; once for one text.

    Raises:
        OwnershipLostError: the run is another process's by now.
    """
    for there in itertools.chain([path], numbered_names(path)):
        if not os.path.lexists(there):
            write_atomic(there, text)
            return
        with suppress(OSError, UnicodeDecodeError):
            if there.is_file() and there.read_text(encoding="utf-8") == text:  # a FIFO would be waited for
                return


def make_folder(path: Path) -> None:
    """Make a folder and those above it; within a run's folder only while that is there and ours.

    Raises:
        OwnershipLostError: the run is another process's by now.
        FileNotFoundError: the run's folder was deleted: it is not made anew.
    """
    check_owned(path)
    path.mkdir(parents=True, exist_ok=True)


def partial_name(path: Path) -> Path:
    """Return a name beside ``path`` to write to, which no other process has."""
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}-{path.name[-100:]}")


def put_in_place(partial: Path, path: Path) -> None:
    """Move a file that is written to its place, once it is on the disk.

    Raises:
        OwnershipLostError: the run is another process's by now.
    """
    flush_to_disk(partial)
    check_owned(path)
    partial.replace(path)
    flush_to_disk(path.parent)  # its name, too


def flush_to_disk(path: Path) -> None:
    """Have a file's or a folder's content on the disk, and not only in memory."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to that takes the place of ``path`` in one move at the end; on an error nothing is left.

    Raises:
        OwnershipLostError: the run is another process's by now.
    """
    partial = partial_name(path)
    try:
        check_owned(path)
        with partial.open("wb") as f:
            yield f
        put_in_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write to a file beside ``path``, then put it in place in one move; on an error nothing is left.

    Raises:
        OwnershipLostError: the run is another process's by now.
    """
    with whole_file(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)
