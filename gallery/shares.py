"""Mode weights and shares off the modes of a finished run, from as many actions as differences take to show.

``python -m gallery.shares --out FOLDER/table.md`` reads FOLDER/checkpoints/last.ckpt and FOLDER/config.yaml, and writes
the table of means, and shares.json with the values of every seed, which recipes read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from lightning_toys.generative_policy import GenerativePolicy, Target
from lightning_toys.generative_policy.meanflow import sample as one_step
from lightning_toys.generative_policy.metrics import knn_entropy
from lightning_toys.generative_policy.policy import CHUNK_ROWS
from lightning_toys.stats import format_estimate, mean_ci
from lightning_toys.training.noise import keyed_generator

CHUNK = 50_000  # actions of each seed drawn at once
NEIGHBOURS = 20_000  # actions that the entropy is estimated from, as evaluations have it
LAST = 0.01  # half of a mode's width: where logarithmic times stop before their step to 0
HELD_OUT = 5_000  # samples of the target whose likelihood chooses the noise
WIDTHS = (0.0, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.011, 0.012, 0.014, 0.016, 0.02)
Values = dict[str, list[float]]  # metric: one value a seed
Draw = Callable[[int, int], Tensor]  # (n, index) to actions (R, n, D)


def named(spec: dict[str, Any]) -> Any:
    """Return what a class_path with its arguments makes."""
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**(spec.get("init_args") or {}))


def load(folder: Path, checkpoint: str = "last") -> tuple[GenerativePolicy, Target]:
    """Return a run's policy as a checkpoint of its has it, and its target."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    module, _, name = config["model"]["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    policy = cls.load_from_checkpoint(
        folder / "checkpoints" / f"{checkpoint}.ckpt", weights_only=True, map_location="cpu"
    )
    return policy.eval(), named(config["data"]["init_args"]["target"])


def log_times(nfe: int) -> list[float]:
    """Return times from 1 to 0 whose logarithms are even down to LAST, then the step to 0; ``nfe`` steps.

    >>> [round(t, 3) for t in log_times(3)]
    [1.0, 0.1, 0.01, 0.0]
    """
    return [*np.geomspace(1.0, LAST, nfe).tolist(), 0.0]


def euler(velocity: Callable[[Tensor, Tensor], Tensor], e: Tensor, times: Sequence[float]) -> Tensor:
    """Return z_0 of dz/dt = velocity(z, t) from z_1 = e (R, n, D), by a step between each two times."""
    z = e
    for t, after in pairwise(times):
        z = z + (after - t) * velocity(z, torch.full_like(z[..., :1], t))
    return z


def drawer(policy: Any, readout: str) -> Draw:
    """Return what draws actions by a readout: one of the policy's own, ``log-N``, or ``map``: one step, no noise."""
    if not readout.startswith("log-") and readout != "map":
        return lambda n, index: policy.sample(n, readout, index)
    net = policy.evaluation_net

    @torch.no_grad()
    def draw(n: int, index: int) -> Tensor:
        rows = torch.split(policy.evaluation_noise("e", n, index).to(next(net.parameters())), CHUNK_ROWS, dim=1)
        if readout == "map":
            return torch.cat([one_step(net, e, 1)[0] for e in rows], dim=1)
        times = log_times(int(readout.partition("-")[2]))
        return torch.cat([euler(net.velocity, e, times) for e in rows], dim=1)

    return draw


def shares(draw: Draw, target: Target, samples: int) -> Values:
    """Return tv, off3, off5 and off10 of so many actions of each seed, and their k-NN entropy.

    Args:
        draw: the policy.
        target: what it should follow; its modes are named.
        samples: actions of each seed, a multiple of CHUNK.
    """
    sums: list[dict[str, float]] = []
    first: list[Tensor] = []
    chunks = samples // CHUNK
    for k in range(chunks):
        x = draw(CHUNK, k + 1).double()  # index 0 is the evaluations'
        if k == 0:
            sums, first = [{} for _ in x], [rows[:NEIGHBOURS] for rows in x]
        for total, rows in zip(sums, x, strict=True):
            found = weights_and_shares(rows, target)
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value / chunks
    weights = target.mode_weights.tolist()
    out: Values = {"tv": [sum(abs(s[f"weight{i}"] - w) for i, w in enumerate(weights)) / 2 for s in sums]}
    out |= {f"off{k}": [s[f"off{k}"] for s in sums] for k in (3, 5, 10)}
    out["entropy_knn"] = [knn_entropy(x.numpy()) for x in first]
    return out


def weights_and_shares(x: Tensor, target: Target) -> dict[str, float]:
    """Return the share of x (n, D) at each mode, and those beyond 3, 5 and 10 standard deviations of it."""
    mode, distance = target.nearest(x)
    counts = torch.bincount(mode, minlength=len(target.mode_weights)).double() / len(x)
    return {f"weight{i}": float(w) for i, w in enumerate(counts)} | {
        f"off{k}": float((distance > k).double().mean()) for k in (3, 5, 10)
    }


def likeliest_width(points: Tensor, held_out: Tensor, widths: Sequence[float] = WIDTHS) -> float:
    """Return the s at which (1/n) sum_j N(x; y_j, s^2 I) gives held-out samples x the highest likelihood.

    It is how a policy's noise can be chosen where nothing is known of the target but samples. Widths of 0 are passed
    over: the density of points has no likelihood of other points.

    Args:
        points: actions y of the map without noise (n, D).
        held_out: samples of the target x (m, D).
        widths: those to choose from.

    >>> x = torch.from_numpy(keyed_generator(0, 0, "doc").standard_normal((4000, 2)))
    >>> likeliest_width(x[:2000] * math.sqrt(0.75), x[2000:], [0.25, 0.5, 1.0])
    0.5
    """
    square = [torch.cdist(rows, points).square() for rows in torch.split(held_out, 500)]
    dim, found = points.shape[1], {}
    for s in widths:
        if s > 0:
            each = torch.cat([torch.logsumexp(-d / (2 * s * s), 1) for d in square])
            found[s] = float(each.mean()) - dim * math.log(s)
    return max(found, key=lambda s: found[s])


def with_noise(draw: Draw, widths: Sequence[float], seeds: Sequence[int]) -> Draw:
    """Return a policy with N(0, s^2 I) added to its actions, s one a seed, keyed by the seed."""
    s = torch.tensor(widths, dtype=torch.float64).view(-1, 1, 1)

    def noisy(n: int, index: int) -> Tensor:
        x = draw(n, index).double()
        xi = [keyed_generator(seed, index, "shares/noise").standard_normal((n, x.shape[-1])) for seed in seeds]
        return x + s * torch.from_numpy(np.stack(xi))

    return noisy


def learned_noise(policy: Any, target: Target, samples: int) -> Values:
    """Return the shares of the one-step map with noise whose width held-out likelihood chose, and that width."""
    draw = drawer(policy, "map")
    points = draw(NEIGHBOURS, 1).double()
    chosen = []
    for seed, rows in zip(policy.seeds, points, strict=True):
        g = keyed_generator(seed, 0, "shares/held out")
        uniform, normal = g.random((1, HELD_OUT)), g.standard_normal((1, HELD_OUT, target.dim))
        chosen.append(likeliest_width(rows, target.sample(torch.from_numpy(uniform), torch.from_numpy(normal))[0]))
    return {**shares(with_noise(draw, chosen, policy.seeds), target, samples), "width": chosen}


def measure(
    folder: Path, readouts: Sequence[str], weights: Sequence[str], samples: int, checkpoint: str = "last"
) -> dict[str, Any]:
    """Return the shares of a run by readout and weights: ``1``, ``1 raw``, ``log-8``, ``noise``."""
    policy, target = load(folder, checkpoint)
    rows: dict[str, Values] = {}
    for kind in weights:
        policy.evaluation.weights = kind  # type: ignore[assignment]
        for readout in readouts:
            label = readout if kind == "ema" else f"{readout} {kind}"
            if readout == "noise":
                rows[label] = learned_noise(policy, target, samples)
            else:
                rows[label] = shares(drawer(policy, readout), target, samples)
    floor = np.mean([target_tv(target, seed, samples) for seed in policy.seeds])
    return {"seeds": list(policy.seeds), "samples": samples, "rows": rows, "target": {"tv": float(floor)}}


def target_tv(target: Target, seed: int, samples: int) -> float:
    """Return the total variation that so many samples of the target itself have by chance."""
    u = keyed_generator(seed, 0, "shares/floor").multinomial(samples, target.mode_weights.numpy()) / samples
    return float(np.abs(u - target.mode_weights.numpy()).sum() / 2)


def written(content: dict[str, Any]) -> str:
    """Write the table of means with their 95 % intervals."""
    names = list(dict.fromkeys(name for row in content["rows"].values() for name in row))
    lines = [f"| {' | '.join(['actions', *names])} |", "|---|" + "---:|" * len(names)]
    for label, row in content["rows"].items():
        cells = [format_estimate(mean_ci(row[n])) if n in row else "-" for n in names]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write shares.json and the table beside a run."""
    parser = argparse.ArgumentParser(prog="python -m gallery.shares", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="FOLDER/table.md, in the run's folder")
    parser.add_argument("--readouts", nargs="+", default=["1"])
    parser.add_argument("--weights", nargs="+", default=["ema"], choices=["ema", "raw"])
    parser.add_argument("--samples", type=int, default=500_000)
    parser.add_argument("--ckpt_path", default="last", help="which checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    content = measure(args.out.parent, args.readouts, args.weights, args.samples, args.ckpt_path)
    (args.out.parent / "shares.json").write_text(json.dumps(content, indent=1) + "\n")
    args.out.write_text(written(content))
    print(written(content), end="")


if __name__ == "__main__":
    main()
