"""One case played in a child process of its own, and what came of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import CHANGES, Case, Ground

MEMORY = 4 * 2**30  # bytes beside what a process has before a case
FILE = 2**29
OWNER = ".owner"  # who holds a run: comes and goes
PASSED = ("refused", "ran", "not finite", "failed")
NOTHING = re.compile(r"(/dev/(null|tty|shm/.*|zero|urandom)|/proc/.*|.*/__pycache__/.*|.*\.pyc(\.\d+)?)")


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        kind: one of ``PASSED``, or what must not be: traceback, hang, crash, lost file, left behind, outside, lines.
        why: of that.
        code: exit code.
        seconds: wall time.
        said: the end of standard error.
    """

    kind: str
    why: str
    code: int
    seconds: float
    said: str

    @property
    def passed(self) -> bool:
        """Whether all is as it should be."""
        return self.kind in PASSED

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


# what lies in a folder


def snapshot(root: Path) -> dict[str, list[Any]]:
    """Return what lies below a folder: kind, and what tells its content."""
    found: dict[str, list[Any]] = {}
    for here, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(here, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path.relative_to(root))] = ["link", os.readlink(path)]
            elif stat.S_ISREG(mode):
                content = path.read_bytes()
                found[str(path.relative_to(root))] = ["file", hashlib.blake2b(content).hexdigest(), len(content)]
            else:
                found[str(path.relative_to(root))] = ["folder" if stat.S_ISDIR(mode) else "special", stat.S_IFMT(mode)]
    return found


def begins_with(path: Path, digest: str, size: int) -> bool:
    """Whether a file begins with what another held."""
    try:
        with path.open("rb") as f:
            return hashlib.blake2b(f.read(size)).hexdigest() == digest
    except OSError:
        return False


def step_of(path: Path) -> int | None:
    """Return a checkpoint's step, None if it is none."""
    import torch

    try:
        step = torch.load(path, map_location="cpu", weights_only=True)["global_step"]
    except Exception:
        return None
    return step if isinstance(step, int) else None


def lost(root: Path, before: dict[str, list[Any]], steps: dict[str, int | None]) -> str:
    """Return the first thing that was there and is not any more, empty if all is kept.

    A file is kept if its bytes are under its name, under another name in its folder (set aside), or at the beginning of
    what has its name (rows and events are added to). A checkpoint may give way to one that is further on. The rows of a
    metrics.csv may be written anew with more columns: each cell of old is in it. A folder may be set aside too, with
    what is in it.
    """
    after = snapshot(root)
    aside: set[str] = set()  # folders that lie elsewhere, whole
    for name, what in before.items():
        if after.get(name) == what or OWNER in Path(name).parts or any(name.startswith(f"{a}/") for a in aside):
            continue
        if what[0] == "folder" and moved_whole(name, before, after):
            aside.add(name)
            continue
        folder = Path(name).parent
        if what[0] != "file":
            moved = any(w == what for n, w in after.items() if Path(n).parent == folder and n not in before)
            if what[0] == "folder" or not moved:  # a folder's content is looked for under its own name
                return f"{name} ({what[0]})"
            continue
        if any(w == what for n, w in after.items() if Path(n).parent == folder):
            continue
        if begins_with(root / name, what[1], what[2]):
            continue
        if name in steps and (old := steps[name]) is not None:
            new = step_of(root / name)
            if new is not None and new >= old:
                continue
        if Path(name).name in ("hparams.yaml",):
            continue  # Lightning's own, written anew from the same settings
        table = Path(name).name in ("metrics.csv", "metrics.csv.elsewhere")  # what a link to it leads to
        if table and rows_kept(root, name):
            continue
        return name
    return ""


def inside(folder: str, tree: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return what lies below a folder, by its name from there."""
    return {n.removeprefix(folder): what for n, what in tree.items() if n.startswith(f"{folder}/")}


def moved_whole(folder: str, before: dict[str, list[Any]], after: dict[str, list[Any]]) -> bool:
    """Whether a folder has a new name beside its old one, and in it what it had."""
    new = [n for n, what in after.items() if what == before[folder] and n not in before]
    beside = [n for n in new if Path(n).parent == Path(folder).parent]
    return any(inside(n, after) == inside(folder, before) for n in beside)


def rows_kept(root: Path, name: str) -> bool:
    """Whether each cell of a metrics.csv, of which a copy was made before, is in the file that has its name now."""
    import csv

    def cells(path: Path) -> set[tuple[str, str, str]]:
        rows = csv.DictReader(io.StringIO(path.read_text(errors="replace")))
        return {(r["step"], k, v) for r in rows for k, v in r.items() if k and isinstance(v, str) and v}

    try:
        return cells(root.parent / "metrics-before.csv") <= cells(root / name)
    except (OSError, KeyError):
        return False


# the child


def watch_writes(root: Path, report: Path) -> None:
    """Note files that are opened for writing, made or moved outside of a folder."""
    inside, out = str(root), os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                mode is None and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            paths = [path] if writes else []
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"):
            paths = [args[-1] if event in ("os.link", "os.symlink") else args[0]]
        elif event == "os.rename":
            paths = list(args[:2])
        else:
            return
        for path in paths:
            if isinstance(path, int):
                continue
            full = os.path.abspath(os.fsdecode(path))
            if not full.startswith(inside) and not NOTHING.fullmatch(full):
                os.write(out, f"{event} {full}\n".encode("utf-8", "surrogateescape"))

    sys.addaudithook(hook)


def child(case: Case, templates: Path, box: Path) -> None:
    """Play a case, in a process of its own; leaves before.json, code, out, err and outside in ``box``."""
    os.setsid()
    folder = box / "work"
    ground = Ground(folder, case)
    source = templates / case.config
    shutil.copytree(source, folder, symlinks=True)
    metrics = ground.run / "metrics.csv"
    for change in case.changes:
        CHANGES[change[0]](ground, *change[1:])
    if metrics.is_file():
        shutil.copy(metrics, box / "metrics-before.csv")
    steps = {str(p.relative_to(folder)): step_of(p) for p in folder.rglob("*.ckpt") if p.is_file()}
    (box / "before.json").write_text(json.dumps({"tree": snapshot(folder), "steps": steps}))

    os.chdir(folder)
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        os.environ[variable] = str(box / "home")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(box / "home" / "inductor")
    (box / "home").mkdir()
    tempfile.tempdir = None  # it keeps what it has found before
    for number, name in enumerate((os.devnull, str(box / "out"), str(box / "err"))):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = os.fdopen(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        setattr(sys, name, stream)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch_writes(box, box / "outside")
    sys.argv = [str(Path(__file__).resolve().parents[2] / "cli.py"), *ground.words]
    from lightning_toys.cli import main

    try:
        code = main(ground.words)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    (box / "code").write_text(str(code))


def judge(case: Case, box: Path, status: int | None, seconds: float) -> Outcome:
    """Say what came of a case, from what its process left; ``status`` is None where it was stopped for its time.

    A refusal is one line, and leaves everything as it was. A sweep goes on with its other cells: it says a line for
    each that was refused.
    """
    text = (box / "err").read_text(errors="replace") if (box / "err").exists() else ""
    said = text[-1500:]
    code = int((box / "code").read_text()) if (box / "code").exists() else -1

    def outcome(kind: str, why: str = "") -> Outcome:
        return Outcome(kind, why, code, round(seconds, 2), said)

    if status is None:
        return outcome("hang")
    if not (box / "before.json").exists():
        return outcome("crash", f"before the case began: {said[-300:]}")
    if "Traceback" in text:
        return outcome("traceback", text.strip().splitlines()[-1][:200])
    if status != 0 or code < 0:
        return outcome("crash", f"status {status}")
    if code not in (0, 1, 2):
        return outcome("code", str(code))
    if (box / "outside").exists() and (found := (box / "outside").read_text(errors="replace")):
        return outcome("outside", found.splitlines()[0][:200])
    before = json.loads((box / "before.json").read_text())
    errors = [x for x in text.splitlines() if x.startswith("error: ")]
    several = case.verb == "sweep"
    if code and (not errors or (len(errors) > 1 and not several)):
        return outcome("lines", f"exit code {code} with {len(errors)} lines of error")
    if code == 0 and errors:
        return outcome("lines", "an error, and exit code 0")
    if code == 2 and not several:
        if text.strip().splitlines() != errors:
            return outcome("lines", f"a refusal in {len(text.strip().splitlines())} lines")
        now = snapshot(box / "work")
        every = [n for n in {**now, **before["tree"]} if OWNER not in Path(n).parts]
        if changed := sorted(n for n in every if now.get(n) != before["tree"].get(n)):
            gone = [n for n in changed if n in before["tree"]]
            return outcome("lost file" if gone else "left behind", (gone or changed)[0])
        return outcome("refused", errors[0][:160])
    if gone := lost(box / "work", before["tree"], before["steps"]):
        return outcome("lost file", gone)
    if code == 2:
        return outcome("refused", errors[0][:160])
    if code == 1:
        return outcome("not finite" if "finite" in errors[0] else "failed", errors[0][:160])
    return outcome("ran")


def play(case: Case, templates: Path, box: Path, limit: float, keep: bool = False) -> Outcome:
    """Play a case in a child of this process, which has imported what it needs; ``box`` is made for it."""
    shutil.rmtree(box, ignore_errors=True)
    box.mkdir(parents=True)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            child(case, templates, box)
            os._exit(0)
        except BaseException:
            (box / "err").open("a").write(traceback.format_exc())
            os._exit(70)
    status: int | None = None
    while time.monotonic() - start < limit:
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = found
            break
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # and whatever it has started
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    outcome = judge(case, box, status, time.monotonic() - start)
    if not keep:
        shutil.rmtree(box, ignore_errors=True)
    return outcome
