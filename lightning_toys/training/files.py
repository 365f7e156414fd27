"""Files of a run: written whole or not at all, and never over another."""

from __future__ import annotations

import os
from pathlib import Path


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
