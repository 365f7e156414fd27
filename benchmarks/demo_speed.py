"""The whole of `make demo` after the install, beside the same work as one JAX script.

    python benchmarks/demo_speed.py [--quick] [--write]        # needs the extra bench

- ours: the command of the Makefile's `demo`: a sweep of two cells, regression and flow, 8 seeds and 5000 epochs each,
  with checkpoints, logs, baselines, every readout of `test`, figures and the comparison of the two.
- JAX: benchmarks/jax_demo.py: both modes trained with 8 seeds and scored on the same grid by the same readouts, in
  jitted programs; no baselines, figures, logs or files.

Each is a process of its own on the same one core, started anew: imports and compilations are part of it. Wall and CPU
seconds; CPU seconds are the system's for the process and what it started. A round takes each once; medians, ranges.
Both have to come to errors (l2 from zeros, mean over seeds) that differ by less than a factor of three.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import REPOSITORY, arguments, report
from peers import peer_head, peer_line

EPOCHS, QUICK_EPOCHS = 5000, 500
AIM = 1.0
MODES = ("regression", "flow")
READOUT = {"regression": "direct", "flow": "euler-9"}


def demo_command(makefile: Path = REPOSITORY / "Makefile") -> list[str]:
    """Return the arguments of `cli.py` in the Makefile's target `demo`."""
    lines = makefile.read_text().split("\ndemo:", 1)[1].splitlines()
    words = shlex.split(lines[1])
    assert words[:2] == ["$(PY)", "cli.py"], lines[1]
    return words[2:]


def timed(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Run a command to its end; return wall and CPU seconds and what it printed, or stop with what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = folder / "stderr.txt"
    begin = time.perf_counter()
    with words.open("w") as errors:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, env=environment)
        assert process.stdout is not None
        printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed:\n{words.read_text()}")
    return wall, usage.ru_utime + usage.ru_stime, printed


def ours(epochs: int) -> tuple[float, float, dict[str, float]]:
    """Return wall and CPU seconds of the demo, and its errors by mode."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "cli.py", *demo_command(), f"--trainer.max_epochs={epochs}", f"--run.root={root}"]
        wall, cpu, _ = timed(command, Path(root))
        errors = {}
        for file in Path(root).rglob("results.json"):
            metrics = json.loads(file.read_text())["metrics"]
            mode = next(m for m in MODES if f"l2@zeros/{READOUT[m]}" in metrics)
            values = metrics[f"l2@zeros/{READOUT[mode]}"]["values"]
            errors[mode] = sum(values) / len(values)
    assert set(errors) == set(MODES), errors
    return wall, cpu, errors


def jax_script(epochs: int) -> tuple[float, float, dict[str, float]]:
    """Return wall and CPU seconds of the JAX script, and its errors by mode."""
    with tempfile.TemporaryDirectory() as root:
        script = str(REPOSITORY / "benchmarks/jax_demo.py")
        wall, cpu, printed = timed([sys.executable, script, str(epochs)], Path(root))
    found = json.loads(printed)
    return wall, cpu, {mode: found[mode][f"l2@zeros/{READOUT[mode]}"] for mode in MODES}


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # both inherit it
    rounds, epochs = (1, QUICK_EPOCHS) if args.quick else (3, EPOCHS)
    taken = [(ours(epochs), jax_script(epochs)) for _ in range(rounds)]
    lines = list(peer_head(("`make demo`", "epochs"), "s"))
    for i, name in enumerate(("wall", "CPU")):
        found = [{"ours": a[i], "JAX script": b[i]} for a, b in taken]
        lines.append(peer_line([name, epochs], found, "s", AIM))
    (*_, mine), (*_, theirs) = taken[-1]
    errors = "; ".join(f"{mode} {mine[mode]:.3f} and {theirs[mode]:.3f}" for mode in MODES)
    for mode in MODES:
        assert 1 / 3 < mine[mode] / theirs[mode] < 3, errors
    about = f"Medians of {rounds} rounds, with their range. l2 of ours and of the script: {errors}."
    report("demo_speed.py", "The demo beside a JAX script", about, lines, args.write)


if __name__ == "__main__":
    main()
