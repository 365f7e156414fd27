"""One rank of several that runs command lines one after the other: `torchrun ... matrix_worker.py jobs.json`.

jobs.json is a list of command lines; the exit codes and standard errors of rank R go to jobs.json.R.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist

from lightning_toys.cli import main


def run(words: list[str]) -> tuple[int, str]:
    """Run one command line; return its exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    return code, said.getvalue()


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    jobs = Path(sys.argv[1])
    found = []
    for words in json.loads(jobs.read_text()):
        found.append(run(words))
        if (
            dist.is_initialized()
        ):  # in a launch of its own, a verb would find what all ranks of the one before have left
            dist.barrier()
    Path(f"{jobs}.{os.environ['RANK']}").write_text(json.dumps(found))
