"""CPU time of one optimiser step of `fit`, beside two plain PyTorch loops that learn the same thing.

    python benchmarks/training_speed.py [--quick] [--write]

Rows of the first table, for each objective (regression, flow) and width (three hidden layers, 50 points in batches of
32 and 18, one CPU thread):

- bare loop: ``nn.Linear`` layers, fused AdamW, batches gathered beforehand; forward, mse, zero_grad, backward, step,
  and nothing else: no logs, no checks, no checkpoints. For flow, noise and times are drawn in the loop. One network.
- eager script: the usual research script. ``DataLoader`` over a ``TensorDataset`` with shuffling, Adam with its
  defaults, ``loss.item()`` each step, one row of a CSV file written and flushed each epoch (2 steps). One network.
- fit, R replicas: ``lightning_toys.cli.main(["fit", ...])`` in this process, from one Trainer batch to another: steps,
  shuffles, keyed noise, finiteness checks, metrics.csv and TensorBoard every 100 steps, a checkpoint every 1000, and
  all that the Trainer does between. Start-up, validation and figures are left out.

Time is CPU time of the whole process (``time.process_time``), so a busy neighbour disturbs little. The measurements are
interleaved: one round takes each row once, ratios are taken within a round, and the table gives their median and range
over the rounds. All rows share ``fit``'s allocator setting (``lightning_toys.training.allocator``), which the two loops
would not have on their own. The second table says where a step of `fit` spends its time, by a sampling profile
(SIGPROF): with steps by autograd, as own networks take them, and with steps written out (manual_steps); with a GPU a
third gives wall time of `fit` on either device.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import measuring
import torch
import torch.nn.functional as F
from measuring import WARM, StepClock, arguments, gpu_wall_clock, report, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_toys.flow_vs_regression.data import InterpolationData
from lightning_toys.flow_vs_regression.module import FlowVsRegression
from lightning_toys.training.allocator import keep_freed_memory
from lightning_toys.training.module import ToyModule

MODES = ("regression", "flow")
BATCH, PER_EPOCH = 32, 2
CELLS = ((1, 64), (16, 256))  # replicas and width
TARGETS = {1: ("bare loop", {64: 1.25, 256: 1.25}), 16: ("eager script", {64: 0.15, 256: 0.40})}


def fit(mode: str, width: int, replicas: int, steps: int, accelerator: str = "cpu") -> float:
    """Return seconds per step of `fit`."""
    config = f"flow_vs_regression/{mode}.yaml"
    return measuring.fit(config, [f"--model.network.hidden={width}"], replicas, steps, accelerator)


def points() -> tuple[Tensor, Tensor]:
    """Return the default task's c (50, 1) and x1 (50, 1)."""
    c, x1 = InterpolationData().train_columns([0])
    return c[0], x1[0]


def network(mode: str, width: int) -> nn.Sequential:
    """Return the usual MLP of [x, c] or [x, c, t]."""
    sizes = [2 + (mode == "flow"), width, width, width]
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def objective(mode: str, net: nn.Module, c: Tensor, x1: Tensor, zeros: Tensor) -> Tensor:
    """Return the loss that `fit` minimises."""
    if mode == "regression":
        return F.mse_loss(net(torch.cat([zeros, c], dim=-1)), x1)
    x0, t = torch.randn_like(x1), torch.rand_like(x1)
    return F.mse_loss(net(torch.cat([torch.lerp(x0, x1, t), c, t], dim=-1)), x1 - x0)


def bare_loop(mode: str, width: int, steps: int) -> float:
    """Return CPU seconds per step of the least that PyTorch can do."""
    torch.manual_seed(0)
    c, x1 = points()
    net = network(mode, width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    order = torch.stack([torch.randperm(len(c)) for _ in range((WARM + steps) // PER_EPOCH)])
    batches = [
        (rows_c, rows_x1, torch.zeros_like(rows_x1))
        for p in order
        for rows_c, rows_x1 in zip(c[p].split(BATCH), x1[p].split(BATCH), strict=True)
    ]
    start = 0.0
    for step, (rows_c, rows_x1, zeros) in enumerate(batches):
        if step == WARM:
            start = time.process_time()
        loss = objective(mode, net, rows_c, rows_x1, zeros)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.process_time() - start) / steps


def eager_script(mode: str, width: int, steps: int) -> float:
    """Return CPU seconds per step of the usual research script."""
    torch.manual_seed(0)
    net = network(mode, width)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*points()), batch_size=BATCH, shuffle=True)
    start = 0.0
    with tempfile.TemporaryFile("w", newline="") as file:
        table = csv.writer(file)
        for epoch in range((WARM + steps) // PER_EPOCH):
            if epoch == WARM // PER_EPOCH:
                start = time.process_time()
            losses = []
            for c, x1 in loader:
                loss = objective(mode, net, c, x1, torch.zeros_like(x1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            table.writerow([epoch, sum(losses) / len(losses)])
            file.flush()
    return (time.process_time() - start) / steps


ROWS: dict[str, Callable[[str, int, int], float]] = {
    "bare loop": bare_loop,
    "eager script": eager_script,
    "fit, 1 replica": lambda mode, width, steps: fit(mode, width, 1, steps),
    "fit, 16 replicas": lambda mode, width, steps: fit(mode, width, 16, steps),
}


def speed_table(widths: tuple[int, ...], rounds: int, steps: int) -> Iterator[str]:
    """Measure every row ``rounds`` times, interleaved, and yield the table's lines."""
    cells = [(mode, width) for width in widths for mode in MODES]
    taken: dict[tuple[str, int], list[dict[str, float]]] = {cell: [] for cell in cells}
    for _ in range(rounds):
        for cell in cells:
            taken[cell].append({name: measure(*cell, steps) for name, measure in ROWS.items()})
    yield "| width | objective | row | µs per step | µs per replica-step | to bare loop | to eager script | target |"
    yield "|---|---|---|---|---|---|---|---|"
    for (mode, width), found in taken.items():
        for name in ROWS:
            replicas = int(name.split()[1]) if name.startswith("fit") else 1
            micro = statistics.median(f[name] for f in found) * 1e6
            ratios = {
                base: spread([f[name] / replicas / f[base] for f in found]) if name != base else "1"
                for base in ("bare loop", "eager script")
            }
            target = ""
            if name.startswith("fit"):
                base, bounds = TARGETS[replicas]
                met = statistics.median(f[name] / replicas / f[base] for f in found) <= bounds[width]
                target = f"≤ {bounds[width]:.2f} to {base}: {'met' if met else 'missed'}"
            line = [width, mode, name, f"{micro:.0f}", f"{micro / replicas:.0f}", *ratios.values(), target]
            yield f"| {' | '.join(map(str, line))} |"


# the first rule that matches a frame, from the innermost outwards, names the sample's share
RULES = (
    ("torch/optim/", "optimiser step"),
    ("quick_adam.py", "optimiser step"),
    ("steps.py:descend", "optimiser step"),
    ("torch/autograd/", "backward"),
    *((f"mlp.py:{name}", "backward") for name in ("act_backward", "backward", "input_grad")),
    *((f"mlp.py:{name}", "forward and loss") for name in ("act", "forward")),
    *((f"steps.py:{name}", "forward and loss") for name in ("step", "losses")),
    ("manual_steps/", "inputs, and copies to and from groups"),
    ("training/metrics_csv.py", "logging"),
    ("tensorboard", "logging"),
    ("metric_logging.py:write_scalars", "logging"),
    ("callbacks.py:save", "checkpoints"),
    ("training/noise.py", "noise, shuffles and slices"),
    ("training/loader.py", "noise, shuffles and slices"),
    ("flow_vs_regression/module.py:replica_losses", "forward and loss"),
    ("lightning/pytorch/", "Trainer and its optimiser wrapper"),
    ("lightning/fabric/", "Trainer and its optimiser wrapper"),
    ("lightning_toys/training/", "the package's training_step and callbacks"),
)


def share_of(frame: FrameType | None) -> str | None:
    """Return what a sample counts for; None outside of training."""
    places: list[str] = []
    while frame is not None:
        places.append(f"{frame.f_code.co_filename.replace(os.sep, '/')}:{frame.f_code.co_name}")
        frame = frame.f_back
    if not any("loops/fit_loop.py:advance" in p for p in places):
        return None
    return next((name for p in places for part, name in RULES if part in p), "other")


@contextlib.contextmanager
def by_autograd() -> Iterator[None]:
    """`fit` takes its steps by autograd meanwhile, as own networks do."""
    own = FlowVsRegression.take_steps
    FlowVsRegression.take_steps = ToyModule.take_steps  # type: ignore[method-assign]
    try:
        yield
    finally:
        FlowVsRegression.take_steps = own  # type: ignore[method-assign]


def profiled(width: int, replicas: int, steps: int) -> tuple[float, Counter[str]]:
    """Return seconds per step of `fit` of flow, and how many samples of its stack, one in 2 ms, each part has."""
    seen: Counter[str] = Counter()

    def sample(number: int, frame: FrameType | None) -> None:
        if (name := share_of(frame)) is not None:
            seen[name] += 1

    before = signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
    try:
        taken = fit("flow", width, replicas, steps)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return taken, seen


def profile_table(cells: Sequence[tuple[int, int]], steps: int) -> Iterator[str]:
    """Profile `fit` of flow of (replicas, width), by autograd and by steps written out, and yield the table's lines."""
    found: dict[str, tuple[float, Counter[str]]] = {}
    for replicas, width in cells:
        count = max(40, steps // replicas)
        with by_autograd():
            found[f"{replicas} x {width}, autograd"] = profiled(width, replicas, count)
        found[f"{replicas} x {width}, written out"] = profiled(width, replicas, count)
    yield f"| µs of a step of `fit`, flow, replicas x width | {' | '.join(found)} |"
    yield "|---|" + "---:|" * len(found)
    yield f"| whole | {' | '.join(f'{taken * 1e6:.0f}' for taken, _ in found.values())} |"
    total = sum((seen for _, seen in found.values()), Counter[str]())
    for name, _ in total.most_common():
        parts = [taken * 1e6 * seen[name] / seen.total() for taken, seen in found.values()]
        yield f"| {name} | {' | '.join(f'{p:.0f}' for p in parts)} |"


def gpu_table(width: int, steps: int) -> Iterator[str]:
    """Yield wall time of `fit` on either device."""
    StepClock.clock = gpu_wall_clock
    yield f"| `fit` regression, width {width} | CPU, 1 thread: ms per step | GPU: ms per step | CPU to GPU |"
    yield "|---|---|---|---|"
    for replicas in (1, 16, 256):
        n = steps if replicas < 256 else 100
        cpu, gpu = (
            statistics.median(fit("regression", width, replicas, n, a) for _ in range(3)) for a in ("cpu", "gpu")
        )
        yield f"| {replicas} replicas | {cpu * 1e3:.2f} | {gpu * 1e3:.2f} | {cpu / gpu:.2f} |"
    StepClock.clock = time.process_time


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    widths, rounds, steps = ((64,), 1, 100) if options.quick else ((64, 256), 9, 1000)
    lines = [*speed_table(widths, rounds, steps), "", *profile_table(CELLS, 8 * steps)]
    if torch.cuda.is_available():
        lines += ["", *gpu_table(widths[-1], steps)]
    about = f"Medians of {rounds} interleaved rounds of {steps} steps, with their range."
    report("training_speed.py", "Training speed", f"{about} CPU time.", lines, options.write)


if __name__ == "__main__":
    main()
