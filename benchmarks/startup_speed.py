"""What it takes to begin: each verb's start, beside the bare import of torch and Lightning.

    python benchmarks/startup_speed.py [--quick] [--write]

Every row is a process of its own; the rows of a round run one after the other, and the medians are over rounds. CPU
time is the process's user and system time (of `fit` and `test` up to the first step, or the first batch of the test),
wall time what somebody waits. The bare import ends at the same point, without the interpreter's own end.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import REPOSITORY, arguments, report, spread

TOYS = (sys.executable, "-m", "lightning_toys")
END = "import os, resource; u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime, flush=True); "
BARE = f"import torch, lightning.pytorch; {END}os._exit(0)"
# up to the first optimiser step, or the first batch of a test: then the process ends as the bare import does
FIRST = """
import os, resource, sys
from lightning_toys.commands.trainer.start import prepare
prepare()
from lightning.pytorch.loops import _EvaluationLoop, _TrainingEpochLoop

def stop(*args, **kwargs):
    u = resource.getrusage(resource.RUSAGE_SELF)
    print(u.ru_utime + u.ru_stime, flush=True)
    os._exit(0)

_TrainingEpochLoop.advance = stop
_EvaluationLoop._evaluation_step = stop
from lightning_toys.cli import main
sys.exit(main(sys.argv[1:]))
"""
FLOW = ("-c", "flow_vs_regression/flow", "--figures.enabled", "false")


def taken(words: tuple[str, ...], folder: Path, says: bool, code: int = 0) -> tuple[float, float]:
    """Run a process; return its CPU and wall seconds.

    Args:
        words: its command line.
        folder: where it runs.
        says: whether it prints its CPU time itself.
        code: its exit code.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    begin, before = time.perf_counter(), os.times()
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - begin, os.times()
    if done.returncode != code:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    if says:
        return float(done.stdout.split()[-1]), wall
    return after.children_user + after.children_system - before.children_user - before.children_system, wall


def two_runs(folder: Path) -> None:
    """Make two small runs to compare and to test."""
    for mode in ("regression", "flow"):
        words = ["--model.mode", mode, "--run.variant", "flow", "--run.name", mode, "--trainer.max_steps", "2"]
        small = ["--model.network.hidden", "8", "--data.num_eval", "50", "--model.seeds", "[0,1]"]
        taken((*TOYS, "fit", *FLOW, *words, *small), folder, says=False)
    for path in folder.rglob("results.json"):
        assert json.loads(path.read_text())["metrics"]


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows: dict[str, tuple[tuple[str, ...], bool, int, str]] = {
        "bare import of torch, lightning.pytorch": ((sys.executable, "-c", BARE), True, 0, ""),
        "--help": ((*TOYS, "--help"), False, 0, "wall < .3"),
        "fit --help": ((*TOYS, "fit", "--help"), False, 0, "wall < .3"),
        "list": ((*TOYS, "list"), False, 0, "wall < .3"),
        "--version": ((*TOYS, "--version"), False, 0, "wall < .3"),
        "an unknown verb": ((*TOYS, "fti"), False, 2, "wall < .3"),
        "compare, two runs, two pictures": ((*TOYS, "compare", "lightning_logs"), False, 0, "wall < 1.5 and pictures"),
        "fit, to the first step": ((sys.executable, "-c", FIRST, "fit", *FLOW), True, 0, "CPU <= 1.15 bare"),
        "test, to the first batch": (
            (sys.executable, "-c", FIRST, "test", *FLOW, "--run.name", "flow"), True, 0, "CPU <= 1.15 bare"),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        two_runs(folder)
        rounds = [
            {row: taken(words, folder, says, code) for row, (words, says, code, _) in rows.items()}
            for _ in range(1 if options.quick else 5)
        ]
    bare = next(iter(rows))
    lines = ["| row | CPU s | wall s | CPU to the bare import | target |", "|---|---|---|---|---|"]
    for row, (_, _, _, aim) in rows.items():
        cpu, wall = ([r[row][k] for r in rounds] for k in (0, 1))
        ratio = [r[row][0] / r[bare][0] for r in rounds]
        met = {
            "": True,
            "wall < .3": statistics.median(wall) < 0.3,
            "wall < 1.5 and pictures": statistics.median(wall) < 1.5,
            "CPU <= 1.15 bare": statistics.median(ratio) <= 1.15,
        }[aim]
        verdict = f"{aim}: {'met' if met else 'missed'}" if aim else ""
        lines.append(f"| {row} | {spread(cpu)} | {spread(wall)} | {spread(ratio)} | {verdict} |")
    about = f"Medians of {len(rounds)} rounds, with their range."
    report("startup_speed.py", "Start-up", about, lines, options.write)


if __name__ == "__main__":
    main()
