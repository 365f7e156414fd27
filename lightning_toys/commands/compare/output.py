"""The folder of a comparison: looked at before anything is read, written as a whole at the end."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_toys.errors import ToyError, is_disk_full, printable
from lightning_toys.training.files import set_aside, write_atomic

WANTED = {
    "--out": "give a folder that can be written",
    "--html": "give a file that ends in .html, in a folder that can be written",
}


@dataclass(frozen=True)
class Place:
    """Files for one folder, and the flag that names it."""

    flag: str
    folder: Path
    files: Mapping[str, bytes]


def refused(name: str, why: str, flag: str = "--out") -> ToyError:
    """Return the error for a folder that nothing can be written into, or a file that cannot be made."""
    shown = name if len(name) <= 120 else f"{name[:80]}...{name[-30:]}"
    return ToyError(f"{flag}: {shown!r} is not allowed ({why}); {WANTED[flag]}")


def check_page(name: str) -> Path:
    """Return the file of a page, as far as can be told without making it.

    Raises:
        ToyError: it does not end in .html, it is a folder, its name is none, or its folder cannot be written.
    """
    if not name:
        raise refused(name, "it is empty", "--html")
    page = Path(name)
    try:
        is_folder = stat.S_ISDIR(page.stat().st_mode)
    except FileNotFoundError:
        is_folder = False
    except (OSError, ValueError) as error:
        raise refused(name, said(error), "--html") from None
    if is_folder:
        raise refused(name, "it is a folder", "--html")
    if page.suffix != ".html":
        raise refused(name, "its name does not end in .html", "--html")
    check_folder(str(page.parent), "--html", name)
    return page


def check_folder(name: str, flag: str = "--out", given: str | None = None) -> Path:
    """Return a folder that files can go into, as far as can be told without making it.

    Args:
        name: the folder's.
        flag: what names it, for an error.
        given: what was given to the flag, if that is more than the folder's name.

    Raises:
        ToyError: it is a file or lies in one, its name is none, or it may not be written.
    """
    if not name:
        raise refused(name, "it is empty", flag)
    folder, name = Path(name), given or name
    for path in (folder, *folder.absolute().parents):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise refused(name, said(error), flag) from None
        if not stat.S_ISDIR(found.st_mode):
            raise refused(name, "it is no folder" if path == folder else f"{str(path)[-80:]!r} is no folder", flag)
        if not os.access(path, os.W_OK | os.X_OK):
            raise refused(name, f"{str(path)[-80:]!r} may not be written", flag)
        break
    return folder


def said(error: OSError | ValueError) -> str:
    """Return what an error of the file system's says, without the name."""
    return printable(str(getattr(error, "strerror", None) or error))


def write_together(places: Sequence[Place]) -> None:
    """Write all files into their folders, or none; those that are there are set aside.

    Raises:
        ToyError: a folder cannot be written; what was made on the way there is gone again.
        OSError: the disk is full; likewise.
    """
    made: set[Path] = set()
    at = places[0]
    try:
        with ExitStack() as stack:
            held = []
            for at in places:
                folder = at.folder.absolute()
                made.update(p for p in (folder, *folder.parents) if not p.exists())
                folder.mkdir(parents=True, exist_ok=True)
                waiting = TemporaryDirectory(prefix=".comparison-", dir=folder, ignore_cleanup_errors=True)
                held.append(Path(stack.enter_context(waiting)))
                for name, content in at.files.items():
                    write_atomic(held[-1] / name, content)
            for at, waits in zip(places, held, strict=True):
                for name in at.files:
                    set_aside(at.folder / name)
                    (waits / name).replace(at.folder / name)
    except (OSError, ValueError) as error:
        for path in sorted(made, key=lambda p: len(p.parts), reverse=True):
            with suppress(OSError):
                path.rmdir()
        if is_disk_full(error):
            raise
        raise refused(str(at.folder), said(error), at.flag) from None
