"""Worker processes of the fuzzer, as a context; a worker that dies is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import Case
from tests.fuzz.play import Outcome
from tests.shipped import REPO

LIMIT = 60.0  # seconds that a case may take


class Worker:
    """One process that plays cases.

    Args:
        root: of the templates.
        box: a folder of its own, made anew for each case.
    """

    def __init__(self, root: Path, box: Path) -> None:
        self.root, self.box = root, box
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> subprocess.Popen[str]:
        """Return the process, started if there is none."""
        if self.process is not None and self.process.poll() is None:
            return self.process
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore"}
        words = [sys.executable, "-m", "tests.fuzz.worker", str(self.root)]
        self.process = subprocess.Popen(
            words, cwd=REPO, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
        )
        self.answer(self.process)
        return self.process

    def answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Return a worker's next answer."""
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker of the fuzzer ended with {process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request."""
        process = self.start()
        assert process.stdin is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return self.answer(process)

    def make(self, config: str) -> None:
        """Make a configuration's template, unless it is there."""
        if not (self.root / config).exists() and self.ask({"make": config})["status"]:
            raise RuntimeError(f"{config}: no run to begin with")

    def play(self, case: Case, limit: float = LIMIT, keep: bool = False) -> Outcome:
        """Play a case."""
        request = {"case": case.to_json(), "limit": limit, "box": str(self.box), "keep": keep}
        try:
            return Outcome(**self.ask(request))
        except RuntimeError as error:
            self.stop()
            return Outcome("crash", str(error), -1, 0.0, "")

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.close()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            self.process = None
