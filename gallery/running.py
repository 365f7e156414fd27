"""Runs as subprocesses of cli.py: not run again where nothing changed, resumed where one was cut off."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gallery.recipe import Run

REPO = Path(__file__).resolve().parent.parent
TABLE = "table.md"  # that a run by ``python -m`` writes into its folder
SHARED = ("*.py", "training/*.py")  # below the package: the rooms that every experiment imports


def code_version(experiment: str) -> str:
    """Return a hash of the shared rooms, the experiment's package and its configurations, as they lie on disk."""
    package = REPO / "lightning_toys"
    files = [p for pattern in SHARED for p in package.glob(pattern)]
    files += [*(package / experiment).rglob("*.py"), *(REPO / "configs" / experiment).glob("*.yaml")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(REPO)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return what a result depends on beside the code."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "lightning", "numpy")}}


def machine() -> str:
    """Return the machine in words: no host name."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def git_state() -> dict[str, Any]:
    """Return the commit, and whether anything that runs differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True, check=True).stdout

    dirty = git("status", "--porcelain", "--", "lightning_toys", "configs", "cli.py")
    return {"commit": git("rev-parse", "--short=12", "HEAD").strip(), "dirty": bool(dirty.strip())}


def words_of(run: Run, command: str, root: Path, full: bool) -> list[str]:
    """Return the words that are run: those printed, the quick setting's, and the place."""
    words = shlex.split(command) + ([] if full else shlex.split(run.quick or ""))
    if words[0] == "-m":  # a table of a module's own
        return [*words, "--out", str(root / run.folder / TABLE)]
    words += ["--run.root", str(root)]
    if words[0] != "sweep" and "--run.name" not in words:  # else a cell of a sweep
        place = run.folder.split("/")
        words += ["--run.variant", place[1], "--run.name", place[2]]
    return words


def place_of(run: Run, command: str, root: Path) -> Path:
    """Return where a command's own run is: a folder below the run's where the command names it."""
    words = shlex.split(command)
    folder = root / run.folder
    return folder / words[words.index("--run.name") + 1] if "--run.name" in words else folder


def stamp_path(run: Run, root: Path) -> Path:
    """Return where a run's stamp is."""
    return root / "stamps" / f"{run.name}.json"


def read_stamp(run: Run, root: Path, full: bool) -> dict[str, Any] | None:
    """Return a run's stamp where it is of this command, this code and these versions."""
    path = stamp_path(run, root)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["identity"] == identity(run, full) else None


def identity(run: Run, full: bool) -> dict[str, Any]:
    """Return what a finished run has to share to stand for this one."""
    added = "" if full else run.quick or ""
    return {
        "commands": [f"{c} {added}".strip() for c in run.commands],
        "code": code_version(run.experiment),
        "versions": versions(),
    }


def finished(run: Run, root: Path, full: bool) -> bool:
    """Whether a run need not be run again."""
    stamp = read_stamp(run, root, full)
    return stamp is not None and stamp["done"] == len(run.commands) and run.places(root) != []


def start(words: Sequence[str], log: Path) -> int:
    """Run cli.py, or a module by -m, to its end; return its exit code."""
    line = [] if words[0] == "-m" else ["cli.py"]
    with log.open("a") as out:
        out.write(f"$ python {shlex.join([*line, *words])}\n")
        out.flush()
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run([sys.executable, *line, *words], cwd=REPO, env=env, stdout=out, stderr=out)
    return done.returncode


def diverged(code: int, log: Path) -> bool:
    """Whether a command ended since a training went non-finite, as its last line says."""
    last = log.read_text().rstrip().rpartition("\n")[2]
    return code == 1 and last.startswith("error: ") and ("not finite" in last or "non-finite" in last)


def perform(run: Run, root: Path, full: bool) -> None:
    """Run what is left of a run; its output goes to logs/NAME.txt beside the stamps.

    Raises:
        RuntimeError: a command failed.
    """
    folder, stamp = root / run.folder, read_stamp(run, root, full)
    if stamp is None or not run.places(root):
        for place in run.places(root):  # the gallery's own: of another code or command
            shutil.rmtree(place, ignore_errors=True)
        stamp = {"identity": identity(run, full), "done": 0, "seconds": 0.0}
    for sub in ("stamps", "logs"):
        (root / sub).mkdir(parents=True, exist_ok=True)
    log = root / "logs" / f"{run.name}.txt"
    for k, command in enumerate(run.commands):
        if k < stamp["done"]:
            continue
        words = words_of(run, command, root, full)
        place = place_of(run, command, root)
        if words[0] not in ("sweep", "-m") and (place / "checkpoints" / "last.ckpt").is_file():
            words += ["--ckpt_path", "last"]
        elif words[0] == "fit" and (k == 0 or place != folder):
            shutil.rmtree(place, ignore_errors=True)  # cut off before there was anything to go on from
        if words[0] == "-m":
            folder.mkdir(parents=True, exist_ok=True)
        stamp_path(run, root).write_text(json.dumps(stamp, indent=1))
        began = time.monotonic()
        code = start(words, log)
        stamp["seconds"] += time.monotonic() - began
        if code and not (run.may_diverge and diverged(code, log)):
            stamp_path(run, root).write_text(json.dumps(stamp, indent=1))
            tail = "\n".join(log.read_text().splitlines()[-5:])
            raise RuntimeError(f"{run.name}: `{command}` ended with {code}; {log}:\n{tail}")
        stamp |= {
            "done": k + 1,
            "git": git_state(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
        }
        stamp_path(run, root).write_text(json.dumps(stamp, indent=1))
