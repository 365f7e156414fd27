"""bilevel: environment steps a second of each agent, whose time it is, and what a step of the regression costs.

    python benchmarks/bilevel_speed.py [--quick] [--write]

- control: `fit -c configs/bilevel/control.yaml`, steps after the first 1000 (random) ones: act, store, sample, update,
  and an evaluation of 10 episodes every 1000 steps. The published JAX code was seen to make 80 to 150 steps a second.
- regression: `fit -c configs/bilevel/regression.yaml`, three replicas.

One thread, CPU time within the training steps and evaluations; medians of rounds with their range.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import arguments, quiet_fit, report, spread

from lightning_toys.bilevel import BilevelControl, WindowRegression
from lightning_toys.bilevel.control.environments import Environments
from lightning_toys.bilevel.control.learner import Learner
from lightning_toys.bilevel.control.replay import ReplayBuffer

AGENTS = ("omd", "funcbo", "mle", "vep")
GOALS = {1: 450.0, 8: 1500.0}  # replica-steps a second
REGRESSION_GOAL = 20.0  # ms a step
PUBLISHED = "80 to 150"


class Watch:
    """CPU-seconds within some methods, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.live = False

    def over(self, kind: type, method: str, name: str) -> Callable[[], None]:
        """Time a method from now on; return what undoes that."""
        plain = getattr(kind, method)

        def timed(this: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            out = plain(this, *args, **kwargs)
            if self.live:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin
            return out

        setattr(kind, method, timed)
        return lambda: setattr(kind, method, plain)


QUIET = ("--figures.enabled", "false", "--trainer.accelerator", "cpu")


def control(agent: str, replicas: int, steps: int) -> dict[str, float]:
    """Return CPU-seconds a step by part, ``whole`` included, once learning has begun."""
    watch, undo = Watch(), []
    plain = BilevelControl.training_step
    counted = 0

    def training_step(this: BilevelControl, block: Any, index: int) -> None:
        nonlocal counted
        watch.live = block.start >= 1000
        counted += (block.stop - block.start) * watch.live
        begin = time.process_time()
        plain(this, block, index)
        if watch.live:
            watch.seconds["whole"] = watch.seconds.get("whole", 0.0) + time.process_time() - begin

    parts = [
        (BilevelControl, "exploration_actions", "act"),
        (Environments, "step", "environment"),
        (ReplayBuffer, "store", "replay"),
        (ReplayBuffer, "sample", "replay"),
        (Learner, "outer_iteration", "update"),
        (BilevelControl, "validation_step", "evaluate"),
    ]
    BilevelControl.training_step = training_step  # type: ignore[method-assign]
    try:
        undo = [watch.over(*part) for part in parts]
        flags = ("--model.agent", agent, "--trainer.max_steps", str(1000 + steps))
        quiet_fit("bilevel/control.yaml", [*QUIET, *flags], replicas)
    finally:
        BilevelControl.training_step = plain  # type: ignore[method-assign]
        for f in undo:
            f()
    found = {k: v / counted for k, v in watch.seconds.items()}
    found["whole"] += found.get("evaluate", 0.0)  # an evaluation steps environments too; its own time has them all
    return found


def regression(flags: tuple[str, ...], steps: int) -> float:
    """Return CPU-seconds a step of three replicas."""
    plain, seconds, counted = WindowRegression.training_step, 0.0, 0

    def training_step(this: WindowRegression, block: Any, index: int) -> None:
        nonlocal seconds, counted
        begin = time.process_time()
        plain(this, block, index)
        seconds, counted = seconds + time.process_time() - begin, counted + block.stop - block.start

    WindowRegression.training_step = training_step  # type: ignore[method-assign]
    try:
        quiet_fit("bilevel/regression.yaml", [*QUIET, *flags, "--trainer.max_steps", str(steps)], 3)
    finally:
        WindowRegression.training_step = plain  # type: ignore[method-assign]
    return seconds / counted


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    rounds, steps = (1, 100) if options.quick else (3, 2000)
    names = ("act", "environment", "replay", "update", "evaluate")
    lines = [
        f"| agent | replicas | replica-steps/s | target | {' | '.join(f'{n}, %' for n in names)} |",
        "|---|---:|---:|---|" + "---:|" * len(names),
    ]
    for replicas, goal in GOALS.items():
        for agent in AGENTS:
            found = [control(agent, replicas, steps) for _ in range(rounds)]
            rates = [replicas / x["whole"] for x in found]
            shares = [statistics.median(100 * x.get(n, 0.0) / x["whole"] for x in found) for n in names]
            aim = f"≥ {goal:g}: {'met' if statistics.median(rates) >= goal else 'missed'}"
            cells = " | ".join(f"{s:.0f}" for s in shares)
            lines.append(f"| {agent} | {replicas} | {spread(rates, 0)} | {aim} | {cells} |")
    lines += ["", "| regression, three replicas | ms a step | target |", "|---|---:|---|"]
    kinds: dict[str, tuple[str, ...]] = {
        "funcbo": ("--model.algorithm", "funcbo"),
        "aid": ("--model.algorithm", "aid"),
        "unroll1": ("--model.algorithm", "unroll1"),
        "unroll of 16": ("--model.algorithm", "unroll1", "--model.unroll_steps", "16", "--model.inner_steps", "16"),
        "uniform": ("--model.algorithm", "uniform"),
    }
    for name, flags in kinds.items():
        ms = [1000 * regression(flags, 20 if options.quick else 100) for _ in range(rounds)]
        aim = f"≤ {REGRESSION_GOAL:g}: {'met' if statistics.median(ms) <= REGRESSION_GOAL else 'missed'}"
        lines.append(f"| {name} | {spread(ms, 1)} | {aim} |")
    note = f"The published JAX code was seen to make {PUBLISHED} environment steps a second."
    about = f"Medians of {rounds} rounds, with their range. CPU time. {note}"
    report("bilevel_speed.py", "bilevel speed", about, lines, options.write)


if __name__ == "__main__":
    main()
