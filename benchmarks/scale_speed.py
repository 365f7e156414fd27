"""What more replicas and more chains cost on whatever device there is.

    python benchmarks/scale_speed.py [--accelerator gpu] [--largest 1024] [--chains 8] [--quick] [--write]

- replicas: `fit` of flow_vs_regression's flow and of generative_policy's MeanFlow, 1 to 1024 seeds in one network; time
  a step, and times that of one replica. On a GPU 256 replicas are meant to cost at most 2.5 times one.
- chains: ``pc_mala`` on 10^4 to 10^8 chains in blocks of 32768, keyed noise made on the host.

CPU: one thread, CPU time. GPU: wall time once the device has done all that it was given. Medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from measuring import StepClock, fit, gpu_wall_clock, machine, spread, write_section

from lightning_toys.mirror_descent.annealed import PCMALA
from lightning_toys.mirror_descent.joint import Joint
from lightning_toys.mirror_descent.kernels import BLOCK, Noise
from lightning_toys.mirror_descent.schedules import Linear
from lightning_toys.mirror_descent.tilt import StateReward
from lightning_toys.mirror_descent.world import World
from lightning_toys.training.allocator import keep_freed_memory

CONFIGS = {"flow, 3x256": "flow_vs_regression/flow.yaml", "MeanFlow": "generative_policy/meanflow.yaml"}
REPLICAS = (1, 16, 256, 1024)
GOAL = (256, 2.5)  # replicas that are to cost so many times one, on a GPU


def steps_for(replicas: int, quick: bool) -> int:
    """Return how many steps are timed: fewer where each is long."""
    return 10 if quick else max(20, 400 // replicas)


def chain_steps(chains: int, device: str) -> float:
    """Return chain-steps a second."""
    world = World(Joint(), StateReward(), Linear(), 1.5)
    sampler, like = PCMALA(world), torch.zeros((), device=device)
    blocks = -(-chains // BLOCK)
    begin = StepClock.clock()
    total = torch.zeros((), device=device, dtype=torch.float64)
    for block in range(blocks):
        total += sampler.draw(Noise(0, block, "benchmark", like, False)).a.double().sum()
    taken = StepClock.clock() - begin
    assert abs(float(total) / (blocks * BLOCK) - 0.93806) < 0.05
    return blocks * BLOCK * world.settings.K / taken


def replica_table(accelerator: str, largest: int, rounds: int, quick: bool) -> list[str]:
    """Return the lines of the first table."""
    lines = ["| network | replicas | ms a step | times one replica | target |", "|---|---:|---:|---:|---|"]
    for name, config in CONFIGS.items():
        counts = [r for r in REPLICAS if r <= largest]
        taken: dict[int, list[float]] = {r: [] for r in counts}
        for _ in range(rounds):
            for r in counts:
                flags = ["--figures.enabled", "false", "--checkpoint.every_n_steps", "0"]
                taken[r].append(1000 * fit(config, flags, r, steps_for(r, quick), accelerator))
        for r in counts:
            ratios = [a / b for a, b in zip(taken[r], taken[1], strict=True)]
            aim = ""
            if r == GOAL[0] and accelerator != "cpu":
                aim = f"≤ {GOAL[1]:g}: {'met' if statistics.median(ratios) <= GOAL[1] else 'missed'}"
            lines.append(f"| {name} | {r} | {spread(taken[r])} | {spread(ratios, 1)} | {aim} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accelerator", default="gpu" if torch.cuda.is_available() else "cpu", choices=("cpu", "gpu"))
    parser.add_argument("--largest", type=int, default=1024, help="most replicas")
    parser.add_argument("--chains", type=int, default=0, help="exponent of the most chains; 8 on a GPU, 7 on a CPU")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds; its numbers mean nothing")
    parser.add_argument("--write", action="store_true", help="write this script's section of RESULTS.md too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    gpu = options.accelerator == "gpu"
    StepClock.clock = gpu_wall_clock if gpu else time.process_time
    rounds = 1 if options.quick else 3
    most = min(options.largest, 16) if options.quick else options.largest
    lines = replica_table(options.accelerator, most, rounds, options.quick)
    lines += ["", "| chains | chain-steps per second |", "|---:|---:|"]
    device = "cuda" if gpu else "cpu"
    chain_steps(BLOCK, device)  # warm
    for exponent in range(4, 1 + (4 if options.quick else options.chains or (8 if gpu else 7))):
        lines.append(f"| 10^{exponent} | {chain_steps(10**exponent, device):.3g} |")
    kind = "wall time on the GPU" if gpu else "CPU time"
    text = "\n".join([machine(), "", f"Medians of {rounds} rounds, with their range; {kind}.", "", *lines]) + "\n"
    print(text)
    if options.write:
        section = f"scale_speed.py, {options.accelerator}"
        head = (
            f"# Scale, {options.accelerator}\n\nWritten by `benchmarks/scale_speed.py --write`, which explains it.\n\n"
        )
        write_section(section, head + text)


if __name__ == "__main__":
    main()
