"""The entropy probe: what a whole plan costs, and how that grows with its parts.

    python benchmarks/entropy_speed.py [--quick] [--write]

The policy has width 64, 4 blocks, 17 tokens and a LoRA adapter of rank 8; responses of 64 tokens.

- published plan: 16 update sequences, 32 evaluation sequences, 5 step sizes: the step rebuilt, then the change along
  the whole step, baseline and gradient part (whose sum is the whole step again: checked, not passed through twice), and
  along each update sequence alone, at every step size, with standard errors and contributions. The published pipeline
  took 28.3 CPU-s for it where it was timed.
- whole probe: the same by :func:`probe`, which adds all first-order shares with their errors, every token's share, and
  the other estimator.
- all first-order influences: the update's gradients, one reverse pass over E, one forward-mode pass over U: the share
  of momentum, decay, every sequence and every token. The published first-order estimate took 2.06 CPU-s a direction.
- by token: one forward-mode pass over U on top, for the share of every token.
- with standard errors: every evaluation sequence's gradient as well, so that each share has its error.

One thread, CPU time, medians of rounds. The tables below vary one size at a time; memory is the peak of a process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from measuring import arguments, report, spread

from lightning_toys.training.allocator import keep_freed_memory
from lightning_toys.update_entropy.adamw import AdamWState, Hyperparameters, Moments, sum_tensors
from lightning_toys.update_entropy.attribution import first_order_influences, token_influences
from lightning_toys.update_entropy.derivatives import entropy_gradient, perturbed, trainable_parameters
from lightning_toys.update_entropy.entropy_derivatives import sequence_entropy_gradients
from lightning_toys.update_entropy.estimators import prefix_importance_sampling
from lightning_toys.update_entropy.forward import evaluate, prepared_for_inference
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.policy import TinyPolicy, is_adapter
from lightning_toys.update_entropy.probe import CLOSURE_TOLERANCE, probe
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.update import make_update

WHOLE, INFLUENCES = 4.0, 0.25  # CPU-seconds that are aimed at
PUBLISHED = (28.3, 2.06)
ETAS = [1e-5, 1e-4, 3e-4, 1e-3, 3e-3]


class Setting:
    """A policy with AdamW's state, an update batch and an evaluation batch."""

    def __init__(self, n_u: int = 16, n_e: int = 32, length: int = 64, vocabulary: int = 17) -> None:
        self.model = TinyPolicy(layers=4).build(0, vocabulary, length + 16)
        g = torch.Generator().manual_seed(0)
        for name, p in self.model.named_parameters():
            p.requires_grad_(is_adapter(name))
            if ".lora_B" in name:
                p.data = 0.02 * torch.randn(p.shape, generator=g)
        theta = trainable_parameters(self.model)
        moments = {
            n: Moments(30, 1e-3 * torch.randn(p.shape, generator=g), 1e-6 * torch.rand(p.shape, generator=g))
            for n, p in theta.items()
        }
        self.state = AdamWState(dict.fromkeys(theta, Hyperparameters()), moments)
        rng = np.random.default_rng(0)

        def some(n: int, group: int, rewards: bool) -> Sequences:
            said = [rng.integers(3, vocabulary, length).tolist() for _ in range(n)]
            asked = [rng.integers(3, vocabulary, 8).tolist() for _ in range(n)]
            return Sequences(asked, said, [i // group for i in range(n)], rng.random(n).tolist() if rewards else [])

        self.update, self.evaluation = some(n_u, 4, True), some(n_e, 1, False)

    def published_plan(self) -> None:
        update = make_update(self.model, self.update, self.state, 1.0)
        singles, step = list(update.sequence_directions()), update.step
        baseline, batch = sum_tensors([step.momentum, step.decay]), sum_tensors(singles)
        assert update.residual() <= CLOSURE_TOLERANCE
        directions = [step.direction, baseline, batch, *singles]
        theta, base = trainable_parameters(self.model), evaluate(self.model, self.evaluation)
        with prepared_for_inference(self.model) as passes:
            for eta in ETAS:
                for v in directions:
                    there = evaluate(passes, self.evaluation, 1.0, perturbed(theta, v, eta))
                    change = prefix_importance_sampling(base, there, "token").change
                    assert change.se > 0
                    assert len(change.contributions) == len(self.evaluation)

    def whole_plan(self) -> None:
        plan = Plan(etas=ETAS, counterfactuals=False, second_order=False)
        probe(self.model, self.update, [self.evaluation], self.state, plan, 1.0)

    def influences(self) -> None:
        update = make_update(self.model, self.update, self.state, 1.0)
        first_order_influences(self.model, update, self.evaluation)

    def by_token(self) -> None:
        update = make_update(self.model, self.update, self.state, 1.0)
        _, h = entropy_gradient(self.model, self.evaluation)
        token_influences(self.model, update, h)

    def with_errors(self) -> None:
        update = make_update(self.model, self.update, self.state, 1.0)
        gradients = sequence_entropy_gradients(self.model, self.evaluation)
        gradients.directional_derivatives(
            [update.step.direction, update.step.momentum, update.step.decay, *update.sequence_directions()]
        )

    def one_pass(self) -> None:
        evaluate(self.model, self.evaluation)


def seconds(work: Callable[[], None]) -> float:
    """Return the CPU-seconds of one call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def child(words: str) -> tuple[float, float, float]:
    """Return CPU-seconds of the influences with errors and of a pass, and peak MiB, of a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--child", words], capture_output=True, text=True, check=True)
    a, b, c = done.stdout.split()[-3:]
    return float(a), float(b), float(c)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.child:
        setting = Setting(*(int(w) for w in options.child.split(",")))
        setting.influences()
        one = [seconds(setting.with_errors) for _ in range(3)]
        passes = [seconds(setting.one_pass) for _ in range(3)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(statistics.median(one), statistics.median(passes), peak)
        return
    setting = Setting(4, 4, 8) if options.quick else Setting()
    rounds = 1 if options.quick else 5
    setting.influences()
    setting.one_pass()
    s = setting
    work = (s.published_plan, s.whole_plan, s.influences, s.by_token, s.with_errors, s.one_pass)
    taken = [[seconds(f) for f in work] for _ in range(rounds)]
    middle = [statistics.median(t[i] for t in taken) for i in range(len(work))]
    goals = (WHOLE, None, INFLUENCES, None, None, None)
    published = (f"{PUBLISHED[0]}", "", f"{PUBLISHED[1]} a direction", "", "", "")
    names = (
        "published plan",
        "whole probe",
        "all first-order influences",
        "by token",
        "with standard errors",
        "one pass over E",
    )
    lines = ["| row | CPU-seconds | in passes over E | published | target |", "|---|---|---|---|---|"]
    for i, name in enumerate(names):
        goal = goals[i]
        aim = "" if goal is None else f"≤ {goal:g}: {'met' if middle[i] <= goal else 'missed'}"
        ratio = spread([t[i] / t[-1] for t in taken], 1) if i < len(work) - 1 else "1"
        lines.append(f"| {name} | {middle[i]:.3g} | {ratio} | {published[i]} | {aim} |")
    lines += ["", "| N_U | N_E | tokens | vocabulary | influences with errors | one pass over E | peak, MiB |",
              "|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    sizes = [(16, 32, 64, 17), (64, 32, 64, 17), (16, 128, 64, 17), (16, 32, 256, 17), (16, 32, 64, 4096)]
    for size in sizes[:1] if options.quick else sizes:
        a, b, peak = child(",".join(str(s) for s in size))
        lines.append(f"| {' | '.join(str(s) for s in size)} | {a:.3g} | {b:.3g} | {peak:.0f} |")
    about = f"Medians of {rounds} rounds, with their range. CPU time."
    report("entropy_speed.py", "update_entropy speed", about, lines, options.write)


if __name__ == "__main__":
    main()
