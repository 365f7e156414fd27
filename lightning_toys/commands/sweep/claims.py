"""Claims: who works on what in a folder that processes of many machines share, without a server.

A thing that can be claimed is a folder of numbered links: 0, 1, 2, ... The last one names its holder, or says that the
thing is free. It is taken by creating the next number, which a file system lets exactly one process do (``O_EXCL``, on
NFS too). So of two that take over from a dead holder one wins, and a holder that was only thought dead finds a number
after its own. A holder touches its link every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT = 5.0  # seconds between two signs of life
STALE = 120.0  # seconds without one after which a holder on another machine counts as dead


class ClaimLostError(Exception):
    """Another process took over what this one held: it had given no sign of life for too long."""


def machine() -> str:
    """Name what shares our process numbers: this boot of this host, this container."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += f" {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
        name += f" {os.stat('/proc/self/ns/pid').st_ino}"
    return name


def born(pid: int) -> str | None:
    """Return when a process of this machine was started, which tells a number used again apart; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@dataclass(frozen=True)
class Link:
    """The last link of a claim.

    Attributes:
        number: its number; -1 where nobody ever held the thing.
        holder: who wrote it; None if the thing is free.
        silent: seconds since its last sign of life, by the file system's clock.
    """

    number: int
    holder: dict[str, Any] | None
    silent: float

    def held(self, stale: float) -> bool:
        """Whether somebody who lives holds the thing."""
        if self.holder is None:
            return False
        if self.holder.get("machine") == machine():
            return self.silent < stale and born(self.holder["pid"]) == self.holder["born"]
        return self.silent < stale

    @property
    def who(self) -> str:
        """The holder in words."""
        holder = self.holder or {}
        return f"{holder.get('host', 'somebody')} (process {holder.get('pid', '?')})"


def numbers(folder: Path) -> list[int]:
    """Return the numbers of a claim's links, ascending."""
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def look(folder: Path) -> Link:
    """Read the last link."""
    while True:
        try:
            found = numbers(folder)
            if not found:
                return Link(-1, None, 0.0)
            with (folder / str(found[-1])).open() as f:  # opening it is what makes NFS ask the server for its age
                text, touched = f.read(), os.fstat(f.fileno()).st_mtime
        except FileNotFoundError:
            if not folder.is_dir():
                return Link(-1, None, 0.0)
            continue
        try:
            content = json.loads(text)
        except ValueError:  # just being written, or its writer died over it
            content = {}
        if content == {"free": True} or touched == 0:
            return Link(found[-1], None, 0.0)
        return Link(found[-1], content, clock(folder) - touched)


def clock(folder: Path) -> float:
    """Return the time as the file system tells it: clocks of machines differ."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def create(folder: Path, number: int, content: dict[str, Any]) -> bool:
    """Write a link if nobody has written it or a later one; drop those that nobody needs any more."""
    path = folder / str(number)
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(file, "w") as f:
            f.write(json.dumps(content))
    except OSError:  # a full disk: an empty link would look held for a while
        path.unlink(missing_ok=True)
        raise
    found = numbers(folder)
    if found and found[-1] > number:  # we looked long ago: this number was used, and dropped
        path.unlink(missing_ok=True)
        return False
    for old in found:
        if old < number - 1:
            (folder / str(old)).unlink(missing_ok=True)
    return True


class Claim:
    """Something held, with a thread that says so every ``beat`` seconds.

    Args:
        folder: the claim's folder.
        number: the link that makes it ours.
        before: the link that it follows; its holder, if any, was dead.
        beat: seconds between two signs of life.
    """

    def __init__(self, folder: Path, number: int, before: Link, beat: float = BEAT) -> None:
        self.folder, self.number, self.before, self.beat = folder, number, before, beat
        self.lost = False
        self.last = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.live, name=f"claim {folder.name}", daemon=True)
        self.thread.start()

    def live(self) -> None:
        """Give signs of life until the claim is released or lost."""
        while not self.lost and not self.ended.wait(self.beat):
            self.touch()

    def touch(self) -> None:
        """Give a sign of life; see whether the claim is still ours."""
        try:
            os.utime(self.folder / str(self.number))
            self.lost = self.lost or max(numbers(self.folder), default=-1) > self.number
            self.last = time.monotonic()
        except FileNotFoundError:  # a later holder dropped it, or the whole folder was deleted
            self.lost = True
        except OSError:  # a server that does not answer now may do so at the next beat
            pass

    def check(self) -> None:
        """Raise where the claim is not ours any more.

        Raises:
            ClaimLostError: another process holds it, or did.
        """
        if time.monotonic() - self.last > 3 * self.beat:  # this process was stopped, and the thread with it
            self.touch()
        if self.lost:
            raise ClaimLostError(f"{look(self.folder).who} has taken it over")

    def release(self) -> None:
        """Make the thing free, unless it is another's by now."""
        self.ended.set()
        self.thread.join()
        try:
            create(self.folder, self.number + 1, {"free": True})
        except OSError:  # a full disk: then our own link, last touched in 1970, says so
            with contextlib.suppress(OSError):
                os.utime(self.folder / str(self.number), (0, 0))


def take(folder: Path, stale: float = STALE) -> Claim | None:
    """Claim what is free, or whose holder is dead; None where a living process holds it, or was faster."""
    folder.mkdir(parents=True, exist_ok=True)
    last = look(folder)
    if last.held(stale):
        return None
    pid = os.getpid()
    me = {"host": socket.gethostname(), "pid": pid, "start": time.time(), "machine": machine(), "born": born(pid)}
    if not create(folder, last.number + 1, me):
        return None
    return Claim(folder, last.number + 1, last, min(BEAT, stale / 4))


@contextlib.contextmanager
def lock(folder: Path, stale: float = STALE) -> Iterator[Claim]:
    """Hold something for a moment, and wait for it where another holds it."""
    while (claim := take(folder, stale)) is None:
        time.sleep(random.uniform(0.02, 0.1))
    try:
        yield claim
    finally:
        claim.release()
