"""The entropy probe's memory: the estimate for models of several sizes, and the peak of a process beside it.

    python benchmarks/entropy_memory.py [--quick] [--write] [--update 16] [--evaluation 64]

- estimate: gradients of U and E by what is trained, all kept (`--model.plan.keep_gradients true`) or none kept
  (`false`), as `test` estimates it before it samples anything. Activations and the model itself come on top.
- measured: a probe (slopes with errors, every sequence's and every token's influence, one step size) of a random
  decoder of all parameters in single precision, in a process of its own: the peak beyond what it had before
  (model, AdamW's state, imports).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import numpy as np
import torch
from measuring import arguments, report

from lightning_toys.update_entropy.adamw import AdamWState, Hyperparameters, Moments
from lightning_toys.update_entropy.derivatives import trainable_parameters
from lightning_toys.update_entropy.memory import memory_table, probe_bytes
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.policy import TinyPolicy
from lightning_toys.update_entropy.probe import probe
from lightning_toys.update_entropy.sequences import Sequences

MODELS = {  # trained parameters of published shapes
    "GPT-2, 124M, all parameters": 124_439_808,
    "Qwen2.5-0.5B, all parameters": 494_032_768,
    "Qwen2.5-1.5B, LoRA 16 at every linear layer": 18_464_768,
}
WIDTHS, QUICK = (256, 512, 768), (128,)
LAYERS, VOCABULARY, LENGTH = 8, 256, 16


def peak_bytes(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmHWM, the peak so far, or VmRSS, now."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def measure(width: int, n_u: int, n_e: int, keep: bool) -> tuple[int, int, int, float]:
    """Return trained parameters, the estimate, the peak beyond what there was before, in bytes, and seconds."""
    model = TinyPolicy(hidden=width, layers=LAYERS, heads=4, lora_rank=0).build(0, VOCABULARY, 64)
    theta = trainable_parameters(model)
    moments = {n: Moments(30, torch.zeros_like(p), torch.full_like(p, 1e-6)) for n, p in theta.items()}
    state = AdamWState(dict.fromkeys(theta, Hyperparameters()), moments)
    rng = np.random.default_rng(0)

    def some(n: int, group: int) -> Sequences:
        said, asked = (rng.integers(3, VOCABULARY, (n, k)).tolist() for k in (LENGTH, 4))
        return Sequences(asked, said, [i // group for i in range(n)], rng.random(n).tolist())

    plan = Plan(etas=[1e-3], per_sequence=False, counterfactuals=False, second_order=False, tf_batch_size=16,
                grad_chunk_size=4, keep_gradients=keep)  # fmt: skip
    before, begin = peak_bytes("VmRSS"), time.perf_counter()
    probe(model, some(n_u, 4), [some(n_e, 1)], state, plan, 1.0)
    estimate = probe_bytes(model, plan, 1, n_u, n_e, keep)
    count = sum(p.numel() for p in theta.values())
    return count, estimate, peak_bytes("VmHWM") - before, time.perf_counter() - begin


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--update", type=int, default=16, help="sequences of U")
    parser.add_argument("--evaluation", type=int, default=64, help="sequences of E")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        width, keep = options.child.split(",")
        print(*measure(int(width), options.update, options.evaluation, keep == "True"))
        return
    n_u, n_e = (4, 8) if options.quick else (options.update, options.evaluation)
    plan = Plan(prompts=max(1, n_u // 4), group=4, eval_prompts=n_e, eval_group=1)
    lines = [*memory_table(MODELS, plan), ""]
    lines += ["| measured: parameters | gradients | estimate, MiB | peak, MiB | seconds |", "|---:|---|---:|---:|---:|"]
    for width in QUICK if options.quick else WIDTHS:
        for keep in (True, False):
            sizes = ["--update", str(n_u), "--evaluation", str(n_e)]
            words = [sys.executable, __file__, "--child", f"{width},{keep}", *sizes]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            count, estimate, peak, seconds = done.stdout.split()[-4:]
            way = "kept" if keep else "none kept"
            mib = [f"{int(x) / 2**20:.0f}" for x in (estimate, peak)]
            lines.append(f"| {int(count):,} | {way} | {mib[0]} | {mib[1]} | {float(seconds):.1f} |")
    about = f"U of {n_u} sequences, E of {n_e}, {LENGTH} tokens each; single precision, one thread."
    report("entropy_memory.py", "update_entropy memory", about, lines, options.write)


if __name__ == "__main__":
    main()
