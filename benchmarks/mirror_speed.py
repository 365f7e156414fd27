"""Annealed MALA on many chains, beside the usual per-chain loop; speed and memory as the number of chains grows.

    python benchmarks/mirror_speed.py [--quick] [--write]

- research script: one chain after another in Python and NumPy, as such scripts are written: at each of K = 40 levels
  the level's mean and covariance from the formulas, a refresh of 20 particles of s' | a, one MALA step by functions
  that return a log density and its gradient, its acceptance.
- tight loop: the same chain with every constant computed beforehand, one particle, and nothing but scalars.
- batched: ``pc_mala`` as `test` runs it, in blocks of 32768 chains, float32, keyed noise, acceptance and a few paths
  noted, the last refresh drawn.
- batched, compiled: the same with ``--model.settings.compile true``; the compilation itself is not counted.

One thread, CPU time; rounds are interleaved and ratios are taken within a round. The second table grows the number of
chains; each size runs in a process of its own, whose peak memory is the system's figure.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from measuring import arguments, report, spread

from lightning_toys.mirror_descent.annealed import PCMALA
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.schedules import Linear
from lightning_toys.mirror_descent.tilt import StateReward
from lightning_toys.training.allocator import keep_freed_memory

PROBLEM = Problem(LinearGaussianJoint(), StateReward(), Linear(), 1.5)
GOAL = 1500
PUBLISHED = 929  # actions a second and core of the script that the target was set against, on its own machine


def script(chains: int, seed: int = 0) -> float:
    """Return actions per second of the usual script's loop over chains."""
    rng = np.random.default_rng(seed)
    clean, reward, K = PROBLEM.linear_joint.clean, PROBLEM.reward, PROBLEM.settings.K
    assert isinstance(reward, StateReward)

    def level(abar: float) -> tuple[np.ndarray, np.ndarray]:
        return np.sqrt(abar) * clean.m, abar * clean.C + (1 - abar) * np.eye(2)

    def log_density(a: float, m: np.ndarray, C: np.ndarray, beta: float) -> float:
        rho = C[0, 1] / C[0, 0]
        mean = rho * a + m[1] - rho * m[0]
        Q = -0.5 * (reward.r_wa * (a - reward.r_a) ** 2 + reward.r_ws * (mean - reward.r_s) ** 2)
        return float(-0.5 * (a - m[0]) ** 2 / C[0, 0] + beta * Q)

    def gradient(a: float, m: np.ndarray, C: np.ndarray, beta: float) -> float:
        rho = C[0, 1] / C[0, 0]
        mean = rho * a + m[1] - rho * m[0]
        slope = -reward.r_wa * (a - reward.r_a) - reward.r_ws * rho * (mean - reward.r_s)
        return float(-(a - m[0]) / C[0, 0] + beta * slope)

    out = np.empty((chains, 2))
    start = time.process_time()
    for i in range(chains):
        m, C = level(PROBLEM.settings.abar_min)
        a = rng.normal(m[0], np.sqrt(C[0, 0]))
        for abar in np.linspace(PROBLEM.settings.abar_min, 1.0, K):
            m, C = level(abar)
            beta = PROBLEM.beta(abar)
            rho, v = C[0, 1] / C[0, 0], C[1, 1] - C[0, 1] ** 2 / C[0, 0]
            s = rng.normal(m[1] + rho * (a - m[0]), np.sqrt(v), size=PROBLEM.settings.particles)
            eta = 0.7 / (1 / C[0, 0] + beta * (reward.r_wa + reward.r_ws * rho**2))
            g = gradient(a, m, C, beta)
            new = a + eta * g + np.sqrt(2 * eta) * rng.normal()
            back = gradient(new, m, C, beta)
            log_ratio = log_density(new, m, C, beta) - log_density(a, m, C, beta)
            log_ratio += ((new - a - eta * g) ** 2 - (a - new - eta * back) ** 2) / (4 * eta)
            if np.log(rng.uniform()) < log_ratio:
                a = new
        out[i] = a, s.mean()
    taken = time.process_time() - start
    assert abs(out[:, 0].mean() - 0.9375) < 0.1 + 3 / math.sqrt(chains)
    return chains / taken


def tight(chains: int, seed: int = 0) -> float:
    """Return actions per second of the same loop with all that can be taken out of it."""
    rng = np.random.default_rng(seed)
    levels = [(x.mu, x.tau, 0.7 / x.tau, x.level.rho, x.level.c, math.sqrt(x.level.v)) for x in PROBLEM.levels]
    first = PROBLEM.levels[0].level
    out = np.empty((chains, 2))
    start = time.process_time()
    for i in range(chains):
        a = first.m[0] + math.sqrt(first.C[0, 0]) * rng.standard_normal()
        s = 0.0
        for mu, tau, eta, rho, c, std in levels:
            s = rho * a + c + std * rng.standard_normal()
            drift = a - eta * tau * (a - mu)
            new = drift + math.sqrt(2 * eta) * rng.standard_normal()
            back = new - eta * tau * (new - mu)
            log_ratio = -0.5 * tau * ((new - mu) ** 2 - (a - mu) ** 2)
            log_ratio += ((new - drift) ** 2 - (a - back) ** 2) / (4 * eta)
            if math.log(rng.random()) < log_ratio:
                a = new
        out[i] = a, s
    taken = time.process_time() - start
    assert abs(out[:, 0].mean() - 0.9375) < 0.1 + 3 / math.sqrt(chains)
    return chains / taken


def batched(chains: int, compiled: bool = False) -> float:
    """Return actions per second of `pc_mala`, moments alone being kept."""
    sampler, like = PCMALA(PROBLEM), torch.zeros(())
    blocks = -(-chains // BLOCK_SIZE)
    total = 0.0
    start = time.process_time()
    for block in range(blocks):
        total += float(sampler.draw(Noise([(0, block)], "benchmark", like, compiled)).a.sum())
    taken = time.process_time() - start
    assert abs(total / (blocks * BLOCK_SIZE) - 0.93806) < 0.02
    return blocks * BLOCK_SIZE / taken


def grown(chains: int) -> tuple[float, float]:
    """Return chain-steps per second and peak memory (MiB) of a process that draws ``chains`` chains."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(chains)], capture_output=True, text=True, check=True
    )
    speed, memory = done.stdout.split()[-2:]
    return float(speed), float(memory)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.child:
        speed = batched(options.child) * PROBLEM.settings.K
        print(speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    rounds, few, many = (1, 50, BLOCK_SIZE) if options.quick else (5, 1000, 4 * BLOCK_SIZE)
    batched(BLOCK_SIZE)  # warm
    batched(BLOCK_SIZE, True)
    taken = [(script(few, i), tight(few, i), batched(many), batched(many, True)) for i in range(rounds)]
    met = "met" if statistics.median(t[3] / t[0] for t in taken) >= GOAL else "missed"
    lines = ["| row | MALA actions per second, K = 40 | times the script's speed | target |", "|---|---|---|---|"]
    batch = f"batched, {many} chains"
    for i, name in enumerate(
        (f"research script, {few} chains", f"tight loop, {few} chains", batch, batch.replace(",", ", compiled,"))
    ):
        word = f"{statistics.median(t[i] for t in taken):.3g}"
        ratio = spread([t[i] / t[0] for t in taken], 0 if i >= 2 else 1) if i else "1"
        lines.append(f"| {name} | {word} | {ratio} | {f'≥ {GOAL}: {met}' if i == 3 else ''} |")
    times = statistics.median(t[3] for t in taken) / PUBLISHED
    lines += [
        "",
        f"The published script made {PUBLISHED} actions per second and core where it was timed: {times:.0f} times.",
    ]
    lines += ["", "| chains | chain-steps per second | peak memory, MiB |", "|---:|---:|---:|"]
    for exponent in (3, 4) if options.quick else range(3, 8):
        speed, memory = grown(10**exponent)
        lines.append(f"| 10^{exponent} | {speed:.3g} | {memory:.0f} |")
    about = f"Medians of {rounds} rounds, with their range. CPU time."
    report("mirror_speed.py", "mirror_descent speed", about, lines, options.write)


if __name__ == "__main__":
    main()
