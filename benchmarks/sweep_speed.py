"""What a sweep adds to its cells: planning, Ray's start and end, a task, the memory of its processes.

    python benchmarks/sweep_speed.py [--quick] [--write]

Each round is a process of its own. Planning is what `sweep` does before the first cell is run, of 1024 cells of
flow_vs_regression (16 x 16 x 4 values) and of 1000 (one flag); CPU seconds, without imports. Ray is started as
`--sweep.jobs 2` starts it. A task is an empty one, a thousand of them at once, wall time. Memory is what a process has
for itself (unique set size): of Ray's own processes together, and of a worker that has run a cell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import REPOSITORY, arguments, report, spread

PLAN = """
import json, sys, time
from lightning_toys.commands.trainer.start import prepare
prepare()
from lightning_toys.commands.sweep.agenda import Agenda
from lightning_toys.commands.sweep.grid import plan_grid
grids = {
    "three flags": [*("--grid.data.num_train", json.dumps([*range(20, 36)])), *("--grid.model.mode",
        "[regression,flow,straight_flow,mip]"), *("--grid.model.lr", json.dumps([1e-4 * k for k in range(1, 17)]))],
    "one flag": ["--grid.model.lr", json.dumps([1e-5 * k for k in range(1, 1001)])],
}
found = {}
for name, grid in grids.items():
    begin = time.process_time()
    cells = len(Agenda(plan_grid(["-c", "flow_vs_regression/flow", "--run.root", "none", *grid], [])).waiting)
    found[name] = [cells, time.process_time() - begin]
print(json.dumps(found))
"""
RAY = """
import json, os, sys, time
from pathlib import Path
from lightning_toys.commands.sweep.agenda import Agenda
from lightning_toys.commands.sweep.grid import plan_grid
from lightning_toys.commands.sweep.ray_engine import RayEngine
from lightning_toys.commands.sweep.settings import Settings

def unique(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Private_")) / 1024

def family(pid):
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, new = [], [pid]
    while new:
        new = [c for p in new for c in children.get(p, [])]
        found += new
    return found

words = ["-c", "flow_vs_regression/flow", "--run.root", "runs", "--trainer.max_steps", "20"]
words += ["--figures.enabled", "false", "--grid.model.mode", "[flow]"]
plan = plan_grid(words, [])
begin = time.perf_counter()
engine = RayEngine(Settings(jobs=2), plan.base).__enter__()
found = {"start": time.perf_counter() - begin}
empty = engine.ray.remote(lambda: os.getpid())
engine.ray.get([empty.remote() for _ in range(100)])
begin = time.perf_counter()
pids = set(engine.ray.get([empty.remote() for _ in range(1000)]))
found["task"] = (time.perf_counter() - begin) / 1000
found["ray"] = sum(unique(p) for p in family(os.getpid()) if p not in pids)
engine.run(Agenda(plan))
workers = [p for p in family(os.getpid()) if "ray::" in Path(f"/proc/{p}/cmdline").read_text() and p in pids]
found["worker"] = max(unique(p) for p in workers)
begin = time.perf_counter()
engine.__exit__(None, None, None)
found["end"] = time.perf_counter() - begin
print(json.dumps(found))
"""


def measured(script: str, folder: Path) -> dict[str, object]:
    """Run a script in a process of its own; return what it prints last."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    plans, rays = [], []
    for _ in range(1 if options.quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            plans.append(measured(PLAN, Path(folder)))
            rays.append(measured(RAY, Path(folder)))
    lines = ["| | | target |", "|---|---|---|"]
    for name in plans[0]:
        cells = plans[0][name][0]  # type: ignore[index]
        each = [1000 * p[name][1] / p[name][0] for p in plans]  # type: ignore[index]
        met = "met" if sorted(each)[len(each) // 2] <= 20 else "missed"
        lines.append(f"| planning, {cells} cells of {name}: CPU ms a cell | {spread(each)} | <= 20: {met} |")
    rows = {
        "Ray's start, s": ("start", 1.0),
        "Ray's end, s": ("end", 1.0),
        "a task, ms": ("task", 1000.0),
        "Ray's own processes, MiB": ("ray", 1.0),
        "a worker with torch and Lightning, MiB": ("worker", 1.0),
    }
    for row, (key, scale) in rows.items():
        lines.append(f"| {row} | {spread([scale * float(r[key]) for r in rays])} | |")  # type: ignore[arg-type]
    about = f"Medians of {len(rays)} rounds, with their range."
    report("sweep_speed.py", "Sweeps", about, lines, options.write)


if __name__ == "__main__":
    main()
