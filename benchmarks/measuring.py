"""What the benchmarks share: `fit` under a clock, the machine in words, and RESULTS.md by sections."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_toys.cli import main as toys

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/RESULTS.md"
WARM = 50  # steps before the clock starts


class StepClock(Callback):
    """Notes (step, clock) at the end of every Trainer batch, before the package's own callbacks have their turn."""

    marks: list[tuple[int, float]] = []  # noqa: RUF012  read after the run, whose Trainer is not handed out
    clock: Callable[[], float] = time.process_time

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        StepClock.marks.append((trainer.global_step, StepClock.clock()))


def fit(
    config: str, options: Sequence[str], replicas: int, steps: int, accelerator: str = "cpu", warm: int = WARM
) -> float:
    """Return seconds per step of `fit` over ``steps`` steps, the first ``warm`` apart; a block ends there."""
    StepClock.marks.clear()
    options = [*options, f"--trainer.max_steps={warm + steps}", "--trainer.limit_val_batches=0"]
    options += [f"--trainer.accelerator={accelerator}", "--trainer.devices=1"]
    quiet_fit(config, [*options, f"--trainer.callbacks={__name__}.StepClock"], replicas)
    at = dict(StepClock.marks)
    return (at[warm + steps] - at[warm]) / steps


def quiet_fit(config: str, options: Sequence[str], replicas: int) -> None:
    """Run `fit` with seeds 0, 1, ... and without a word; stop with its words if it fails."""
    words = io.StringIO()
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(words):
        args = ["fit", "-c", str(REPOSITORY / "configs" / config), f"--run.root={root}"]
        if toys([*args, f"--model.seeds={list(range(replicas))}", *options]) != 0:
            raise SystemExit(f"fit failed:\n{words.getvalue()}")


def gpu_wall_clock() -> float:
    """Return wall time once the GPU has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, and the range in brackets."""
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def machine() -> str:
    """Name the processor, memory, versions and threads."""

    def field(path: str, key: str, default: str) -> str:
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                if line.startswith(key):
                    return line.split(":", 1)[1].strip()
        return default

    memory = field("/proc/meminfo", "MemTotal", "").split()
    gib = f"{int(memory[0]) / 2**20:.0f} GiB" if memory else "unknown memory"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = field("/proc/cpuinfo", "model name", platform.processor() or platform.machine())
    return (
        f"{datetime.date.today()}: {cpu}, {os.cpu_count()} cores, {gib}, {gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread."
    )


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what all scripts take: ``--quick`` and ``--write``."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    quick = "one round of little work: does it run? Its numbers mean nothing"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--write", action="store_true", help="write this script's section of RESULTS.md too")
    return parser


def report(script: str, title: str, about: str, lines: Sequence[str], write: bool, section: str = "") -> None:
    """Print the machine, how it was measured, and the tables; with ``write`` they become a section of RESULTS.md."""
    text = "\n\n".join([machine(), about, "\n".join(lines)])
    print(text)
    if write:
        head = f"# {title}\n\nWritten by `benchmarks/{script} --write`, which explains each row."
        write_section(section or script, f"{head}\n\n{text}")


def write_section(script: str, text: str, path: Path = RESULTS) -> None:
    """Put ``text`` between the markers of ``script``, at the end if they are not there; all else stays as it is."""
    begin, end = f"<!-- {script} -->\n", f"<!-- end of {script} -->\n"
    old = path.read_text() if path.exists() else ""
    before, found, rest = old.partition(begin)
    after = ""
    if found:
        _, closed, after = rest.partition(end)
        if not closed:
            raise SystemExit(f"{path}: {begin.strip()} has no {end.strip()} after it; nothing is written")
    elif old:
        before += "\n"
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
