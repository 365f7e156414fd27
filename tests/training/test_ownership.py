"""A run's folder has one owner: who holds it, when it is taken over, and that who lost it writes nothing more."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_toys.errors import OwnershipLostError
from lightning_toys.training import ownership
from lightning_toys.training.files import set_aside, whole_file, write_atomic
from lightning_toys.training.metrics_csv import MetricsCSV
from lightning_toys.training.ownership import LEASE, OWNER, HeldError, acquire, check_owned, create, last_record
from tests.processes import fork


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return answer


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Callable[[Callable[[], object]], int]]:
    """Start children; kill those that are left."""
    started: list[int] = []

    def start(work: Callable[[], object]) -> int:
        started.append(fork(work, tmp_path / "said"))
        return started[-1]

    yield start
    for pid in started:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def hold(folder: Path, then: Callable[[], object] = lambda: time.sleep(60)) -> Callable[[], object]:
    def work() -> object:
        with acquire(folder):
            return then()

    return work


def holder(folder: Path) -> int | None:
    owner = last_record(folder).owner
    return owner["pid"] if owner else None


def taken_by_another(folder: Path) -> None:
    """Play another process that takes a folder over from this one."""
    assert create(folder / OWNER, last_record(folder).number + 1, {"host": "far", "pid": 1, "since": 0.0})


def test_the_second_is_told_who_holds_it(children: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid = children(hold(folder))
    until(lambda: holder(folder) == pid)
    with pytest.raises(HeldError) as refused:
        acquire(folder)
    said = str(refused.value)
    since = re.search(r"since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\)", said)
    assert f"{folder} is held by {socket.gethostname()} (process {pid}, since" in said
    assert since is not None
    assert abs(time.mktime(time.strptime(since[1], "%Y-%m-%d %H:%M:%S")) - time.time()) < 120
    # clocks that were moved change nothing: it lives
    for hours in (-1, 1):
        moved = time.time() + hours * 3600
        os.utime(folder / OWNER / str(last_record(folder).number), (moved, moved))
        with pytest.raises(HeldError):
            acquire(folder)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: "which is stopped" in last_record(folder).who)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with acquire(folder) as mine:  # at once
        assert mine.before.owner is not None
        assert mine.before.owner["pid"] == pid


def test_one_that_wakes_up_finds_it_lost(children: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def write_on() -> int:
        while True:
            try:
                write_atomic(folder / "counter", str(time.monotonic_ns()))
            except OwnershipLostError as lost:
                return 7 if f"process {os.getppid()}" in str(lost) else 8
            time.sleep(0.01)

    pid = children(hold(folder, write_on))
    until(lambda: (folder / "counter").exists())
    os.kill(pid, signal.SIGSTOP)
    with acquire(folder, takeover=True) as mine:
        assert mine.before.owner is not None
        assert mine.before.owner["pid"] == pid
        (folder / "counter").write_text("mine")
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert (folder / "counter").read_text() == "mine"
        mine.check()


def test_of_many_one_gets_it(children: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    dead = children(hold(folder))
    until(lambda: holder(folder) == dead)
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    go = tmp_path / "go"

    def race() -> int:
        until(go.exists)
        try:
            with acquire(folder):
                time.sleep(1)
                return 0
        except HeldError:
            return 3

    pids = [children(race) for _ in range(6)]
    go.touch()
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids)
    assert codes == [0, 3, 3, 3, 3, 3]


def test_another_machine_is_believed_for_a_while(tmp_path: Path) -> None:
    for age, free in ((0.0, False), (LEASE - 20, False), (LEASE + 20, True)):
        folder = tmp_path / f"{age}"
        (folder / OWNER).mkdir(parents=True)
        assert create(folder / OWNER, 0, {"host": "far", "pid": os.getpid(), "machine": "another", "since": 1.0})
        then = time.time() - age
        os.utime(folder / OWNER / "0", (then, then))
        if free:
            acquire(folder).release()
        else:
            with pytest.raises(HeldError, match="held by far"):
                acquire(folder)
            acquire(folder, takeover=True).release()


def test_a_session_takes_its_own_work_over(children: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        with acquire(folder, session="sweep 1"):
            time.sleep(60)

    pid = children(work)
    until(lambda: holder(folder) == pid)
    for other in (None, "sweep 2"):
        with pytest.raises(HeldError):
            acquire(folder, session=other)
    with acquire(folder, session="sweep 1"):
        assert holder(folder) == os.getpid()


def test_within_a_process_it_is_held_until_the_last_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with acquire(folder) as outer:
        with acquire(tmp_path / "." / "run") as inner:
            assert inner is outer
        assert holder(folder) == os.getpid()
        check_owned(folder / "a" / "b")
    assert last_record(folder).owner is None
    assert not ownership.owned


def test_nothing_is_written_to_what_was_lost(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with acquire(folder):
        table = MetricsCSV(folder)
        table.log_metrics({"a": 1.0}, 1)
        table.save()
        write_atomic(folder / "kept", "mine")
        taken_by_another(folder)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        table.log_metrics({"a": 2.0}, 2)
        attempts: dict[str, Callable[[], object]] = {
            "a new row": table.save,
            "a replaced file": lambda: write_atomic(folder / "kept", "again"),
            "a file set aside": lambda: set_aside(folder / "kept"),
            "a folder set aside": lambda: set_aside(folder / OWNER),
        }
        for what, write in attempts.items():
            with pytest.raises(OwnershipLostError, match="taken it over"):
                write()
            assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before, what
        write_atomic(tmp_path / "run-2", "another folder, whose name begins alike")
        # lost while it was written
    folder = tmp_path / "other"
    with acquire(folder):

        def slowly() -> None:
            with whole_file(folder / "big") as f:
                f.write(b"half")
                taken_by_another(folder)

        with pytest.raises(OwnershipLostError):
            slowly()
        assert [p.name for p in folder.iterdir()] == [OWNER]


def test_what_could_not_be_released_is_still_this_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> bool:
        raise OSError(errno.EROFS, "read-only file system")

    folder = tmp_path / "run"
    mine = acquire(folder)
    with monkeypatch.context() as patch:
        patch.setattr(ownership, "create", refuse)
        patch.setattr(ownership.os, "utime", refuse)
        mine.release()
    assert holder(folder) == os.getpid()
    acquire(folder).release()
    assert holder(folder) is None


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}"))
        done.append(f"sync {'folder' if name == tmp_path else name.read_text()}")
        sync(file)

    def replaced(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replaced)
    write_atomic(tmp_path / "file", "whole")
    assert done == ["sync whole", "rename", "sync folder"]


def test_a_deleted_folder_is_no_other_owner(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with acquire(folder) as mine:
        folder.rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match="deleted or moved"):
            mine.check()
        with pytest.raises(FileNotFoundError):
            write_atomic(folder / "file", "")
    assert not folder.exists()


def test_what_the_dead_left_half_written_is_cleared_away(children: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)

    def die() -> None:
        with whole_file(folder / "checkpoints" / "last.ckpt") as f:
            f.write(b"half")
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    pid = children(hold(folder, die))
    os.waitpid(pid, 0)
    assert len(list((folder / "checkpoints").iterdir())) == 1
    acquire(folder).release()
    assert not list((folder / "checkpoints").iterdir())


def test_a_record_that_is_no_record(tmp_path: Path) -> None:
    """Its writer died over it, or something else lies there: held for the lease, as by another machine."""
    for k, text in enumerate(("", "{", "[]", '{"pid": "x"}', '{"pid": 1, "since": "x", "machine": 3}')):
        folder = tmp_path / str(k)
        (folder / OWNER).mkdir(parents=True)
        (folder / OWNER / "0").write_text(text)
        (folder / OWNER / ("9" * 30)).write_text("no number of ours")
        with pytest.raises(HeldError, match="held by somebody"):
            acquire(folder)
        then = time.time() - LEASE - 1
        os.utime(folder / OWNER / "0", (then, then))
        acquire(folder).release()
