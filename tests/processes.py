"""Command lines in processes of their own: forked ones, which need not import torch anew, and two gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def fork(work: Callable[[], object], says: Path) -> int:
    """Run something in a child of this process; return its number. What it says is added to a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # python >= 3.12 dislikes forks beside threads
        pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        out = os.open(says, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(f, "w", buffering=1, closefd=False) for f in (1, 2))
        code = int(work() or 0)  # type: ignore[call-overload]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Wait until a process has written a file."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def two_ranks(jobs: list[list[str]], tmp_path: Path) -> list[list[tuple[int, str]]]:
    """Run command lines on two gloo processes; return each rank's exit codes and words."""
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    torchrun(REPO / "tests/matrix_worker.py", file)
    return [[(c, s) for c, s in json.loads(Path(f"{file}.{r}").read_text())] for r in range(2)]


def torchrun(script: Path, *words: str | Path) -> None:
    """Run a script on two processes, to a good end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    where = os.pathsep.join(map(str, (REPO, REPO / "tests/own_classes")))  # as in this process
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": where}
    done = subprocess.run(
        [*launch, str(script), *map(str, words)], cwd=REPO, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
