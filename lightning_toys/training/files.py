"""Files of a run: written whole or not at all, and never over another."""

from __future__ import annotations

import os
import stat
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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


def set_aside(path: Path) -> None:
    """Move an existing file to the first free ``name-1.ext``, ``name-2.ext``, ...: nothing in a run is overwritten."""
    if not path.exists():
        return
    k = 1
    while (kept := path.with_name(f"{path.stem}-{k}{path.suffix}")).exists():
        k += 1
    path.rename(kept)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write to a temporary file beside ``path``, then put it in place in one move; on an error nothing is left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
