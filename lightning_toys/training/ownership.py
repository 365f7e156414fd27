"""Who may write to a run's folder: one process at a time, and nothing more from one that lost it.

The folder ``.owner`` in a run's folder holds numbered records: 0, 1, 2, ... The last one names the owner, or says that
there is none. A run is taken by creating the next number, which a file system lets exactly one process do (``O_EXCL``,
on NFS too). So of two that take over from a dead owner one wins, and an owner that was only stopped finds a number
after its own when it wakes: all writes in the folder look for that first (a fencing token).

On one machine an owner is dead when its process is gone, whatever the clocks say. From another machine that cannot be
seen: there an owner counts as dead when its record was not touched for :data:`LEASE` seconds, by the clock of the file
system; a thread touches it every :data:`BEAT` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_toys.errors import OwnershipLostError, ToyError

PARTIAL = ".partial-"  # how the name of a file begins that is still being written
OWNER = ".owner"  # the folder of the records, within the run's
BEAT = 5.0  # seconds between two touches of the record
LEASE = 120.0  # seconds without one after which an owner on another machine counts as dead


class HeldError(ToyError):
    """Another process, which lives, owns the folder."""


def machine() -> str:
    """Name what shares our process numbers: this boot of this host, this container."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += f" {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
        name += f" {os.stat('/proc/self/ns/pid').st_ino}"
    return name


def process_state(pid: int) -> tuple[str, str] | None:
    """Return when a process of this machine began, which tells a number used again apart, and its state's letter.

    None if it is gone. Where there is no ``/proc`` both are empty: only that it lives is known.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else (fields[19], fields[0])
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
    return "", ""


@dataclass(frozen=True)
class Record:
    """The last record of a folder.

    Attributes:
        number: its number; -1 where nobody ever owned the folder.
        owner: who wrote it; None if the folder is free.
        silent: seconds since it was touched, by the file system's clock.
    """

    number: int
    owner: dict[str, Any] | None
    silent: float

    def held(self) -> bool:
        """Whether somebody who lives owns the folder."""
        if self.owner is None:
            return False
        if self.owner.get("machine") == machine():
            state = process_state(int(self.owner["pid"]))
            return state is not None and state[0] == self.owner.get("began")
        return self.silent < LEASE

    @property
    def who(self) -> str:
        """The owner in words: host, process, since when."""
        owner = self.owner or {}
        since = ""
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError, OSError):
            since = f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(owner['since']))}"
        stopped = ""
        if owner.get("machine") == machine():
            state = process_state(int(owner["pid"]))
            stopped = ", which is stopped" if state is not None and state[1] == "T" else ""
        return f"{owner.get('host', 'somebody')} (process {owner.get('pid', '?')}{since}{stopped})"


def numbers(records: Path) -> list[int]:
    """Return the numbers of a folder's records, ascending."""
    return sorted(int(name) for name in os.listdir(records) if name.isdecimal() and len(name) < 19)


def last_record(folder: Path) -> Record:
    """Read who owns a folder."""
    records = folder / OWNER
    while True:
        try:
            found = numbers(records)
            if not found:
                return Record(-1, None, 0.0)
            with (records / str(found[-1])).open() as f:  # opening it is what makes NFS ask the server for its age
                text, touched = f.read(), os.fstat(f.fileno()).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            if not records.is_dir():
                return Record(-1, None, 0.0)
            continue
        content: Any = None
        with contextlib.suppress(ValueError):  # just being written, or its writer died over it
            content = json.loads(text)
        if content == {"free": True} or touched == 0:
            return Record(found[-1], None, 0.0)
        whole = isinstance(content, dict) and type(content.get("pid")) is int
        return Record(found[-1], content if whole else {}, file_time(records) - touched)


def file_time(folder: Path) -> float:
    """Return the time as the file system tells it: clocks of machines differ."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def create(records: Path, number: int, content: dict[str, Any]) -> bool:
    """Write a record if nobody has written it or a later one; drop those that nobody needs any more."""
    path = records / str(number)
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(file, "w") as f:
            f.write(json.dumps(content))
    except OSError:  # a full disk: an empty record would look held for a while
        path.unlink(missing_ok=True)
        raise
    found = numbers(records)
    if found and found[-1] > number:  # we looked long ago: this number was used, and dropped
        path.unlink(missing_ok=True)
        return False
    for old in found:
        if old < number - 1:
            (records / str(old)).unlink(missing_ok=True)
    return True


class Ownership:
    """A folder that this process owns, until it is released; a context manager.

    Attributes:
        folder: the run's folder.
        number: of the record that makes it ours.
        before: the record that it follows; its owner, if any, was dead or is taken over.
    """

    def __init__(self, folder: Path, number: int, before: Record) -> None:
        self.folder, self.number, self.before = folder, number, before
        self.holds = 1  # of this process, one within the other
        records = folder / OWNER
        self.ours, self.next = str(records / str(number)), str(records / str(number + 1))
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.live, name=f"owner of {folder.name}", daemon=True)
        self.thread.start()

    def live(self) -> None:
        """Touch the record until the folder is released or lost; a server that does not answer may do so later."""
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.ours)

    def check(self) -> None:
        """Raise unless the folder is still ours.

        Raises:
            OwnershipLostError: another process owns it, or did.
            FileNotFoundError: it was deleted or moved.
        """
        if os.path.exists(self.ours) and not os.path.exists(self.next):
            return
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run's folder was deleted or moved", str(self.folder))
        if not os.path.exists(self.ours) and last_record(self.folder).number < self.number:
            raise FileNotFoundError(errno.ENOENT, "what says who owns the run was deleted", self.ours)
        after = last_record(self.folder)
        taker = f"{after.who} has taken it over" if after.owner else "another process had taken it over"
        raise OwnershipLostError(f"{self.folder} is not this process's any more: {taker}; nothing more is written")

    def release(self) -> None:
        """Make the folder free, unless it is another's by now or still held by this process."""
        self.holds -= 1
        if self.holds:
            return
        owned.pop(str(self.folder), None)
        self.ended.set()
        try:
            create(self.folder / OWNER, self.number + 1, {"free": True})
        except OSError:  # a full disk: then our own record, last touched in 1970, says so
            with contextlib.suppress(OSError):
                os.utime(self.ours, (0, 0))

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


owned: dict[str, Ownership] = {}  # what this process holds, by absolute path; its forks write for it


def acquire(folder: Path, session: str | None = None, takeover: bool = False) -> Ownership:
    """Become the owner of a folder, which is made if need be.

    Args:
        folder: the run's.
        session: names what the process works for. An owner of the same session is taken over at once: whoever gave
            the work out again knows that the one before was lost.
        takeover: take it whoever owns it; that one writes nothing more.

    Raises:
        HeldError: a living process owns it.
        OwnershipLostError: this process did, and lost it.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(os.path.abspath(folder))
    if (mine := owned.get(str(folder))) is not None:
        mine.check()
        mine.holds += 1
        return mine
    (folder / OWNER).mkdir(parents=True, exist_ok=True)
    while True:
        last = last_record(folder)
        owner = last.owner or {}
        ours = session is not None and owner.get("session") == session
        # what this process could not release, on a disk that was read-only then
        ours = ours or (owner.get("machine") == machine() and owner.get("pid") == os.getpid())
        if last.held() and not ours and not takeover:
            raise HeldError(
                f"--run.name: {folder} is held by {last.who}; wait until it has ended, give another name, or "
                "--run.takeover true, after which that process writes nothing more"
            )
        pid = os.getpid()
        began = process_state(pid)
        me = {"host": socket.gethostname(), "pid": pid, "since": time.time(), "machine": machine(), "session": session}
        if create(folder / OWNER, last.number + 1, {**me, "began": began[0] if began else ""}):
            break
    ownership = owned[str(folder)] = Ownership(folder, last.number + 1, last)
    if last.owner is None or not last.held():  # what its owner died over; nobody will rename it
        for left in (*folder.glob(f"{PARTIAL}*"), *folder.glob(f"*/{PARTIAL}*")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return ownership


def check_owned(path: str | Path) -> None:
    """Raise where a file lies in a folder that this process owned and lost; to be called just before each write.

    Raises:
        OwnershipLostError: see :meth:`Ownership.check`.
        FileNotFoundError: see :meth:`Ownership.check`.
    """
    if not owned:
        return
    where = os.path.abspath(path)
    for folder, ownership in owned.items():
        if where == folder or where.startswith(folder + os.sep):
            ownership.check()
