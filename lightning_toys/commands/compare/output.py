"""The folder of a comparison: looked at before anything is read, written as a whole at the end."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_toys.errors import ToyError, is_disk_full, printable
from lightning_toys.training.files import set_aside, write_atomic


def refused(name: str, why: str) -> ToyError:
    """Return the error for a folder that nothing can be written into."""
    shown = name if len(name) <= 120 else f"{name[:80]}...{name[-30:]}"
    return ToyError(f"--out: {shown!r} is not allowed ({why}); give a folder that can be written")


def check_folder(name: str) -> Path:
    """Return a folder that files can go into, as far as can be told without making it.

    Raises:
        ToyError: it is a file or lies in one, its name is none, or it may not be written.
    """
    if not name:
        raise refused(name, "it is empty")
    folder = Path(name)
    for path in (folder, *folder.absolute().parents):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise refused(name, said(error)) from None
        if not stat.S_ISDIR(found.st_mode):
            raise refused(name, "it is no folder" if path == folder else f"{str(path)[-80:]!r} is no folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise refused(name, f"{str(path)[-80:]!r} may not be written")
        break
    return folder


def said(error: OSError | ValueError) -> str:
    """Return what an error of the file system's says, without the name."""
    return printable(str(getattr(error, "strerror", None) or error))


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files into a folder, or none; those that are there are set aside.

    Raises:
        ToyError: the folder cannot be written; what was made on the way there is gone again.
        OSError: the disk is full; likewise.
    """
    made: list[Path] = []
    try:
        made = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".comparison-", dir=folder, ignore_cleanup_errors=True) as held:
            for name, content in files.items():
                write_atomic(Path(held) / name, content)
            for name in files:
                set_aside(folder / name)
                (Path(held) / name).replace(folder / name)
    except (OSError, ValueError) as error:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if is_disk_full(error):
            raise
        raise refused(str(folder), said(error)) from None
