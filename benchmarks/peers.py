"""What the tables of ours beside peers share: columns, met or missed, and the machine's limit, measured on the spot.

benchmarks/summary.py reads these columns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from measuring import spread
from torch import nn

UNITS = {"µs": 1e6, "ns": 1e9, "s": 1.0}


def verdict(ratios: Sequence[float], aim: float | None) -> str:
    """Return the aim for the median of the ratios and whether it is met; nothing without an aim."""
    return "" if aim is None else f"≤ {aim:g}: {'met' if statistics.median(ratios) <= aim else 'missed'}"


def peer_head(names: Sequence[str], unit: str) -> Iterator[str]:
    """Yield the head of a table whose first columns have these names."""
    columns = [*names, f"ours, {unit}", f"best peer, {unit}", "which", "ours / best peer", "aim"]
    columns += [f"limit, {unit}", "its share of ours", "JAX compiles, s", "repaid after steps"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def peer_line(
    cells: Sequence[object],
    found: Sequence[Mapping[str, float]],
    unit: str,
    aim: float | None,
    compiling: Mapping[str, float] | None = None,
    replicas: int = 1,
) -> str:
    """Return a line of a table.

    Args:
        cells: the first columns.
        found: of each round, seconds by row: ``ours``, the peers, and ``limit`` where there is one.
        unit: of the numbers shown.
        aim: the most that ours / best peer should be.
        compiling: seconds that peers take to compile, by row.
        replicas: how many steps the seconds of ``found`` are to be multiplied by, for a step of all.
    """
    middle = {name: statistics.median(f[name] for f in found) for name in found[0]}
    best = min((n for n in middle if n not in ("ours", "limit")), key=lambda n: middle[n])
    ratios = [f["ours"] / f[best] for f in found]

    def shown(name: str) -> str:
        value = middle[name] * UNITS[unit]
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    line = [*cells, shown("ours"), shown(best), best, spread(ratios), verdict(ratios, aim)]
    line += [shown("limit"), f"{middle['limit'] / middle['ours']:.0%}"] if "limit" in middle else ["", ""]
    name = min(compiling or {}, key=lambda n: middle[n], default=None)
    if compiling and name is not None:
        gain = (middle["ours"] - middle[name]) * replicas
        line += [f"{compiling[name]:.1f}", f"{compiling[name] / gain:.0f}" if gain > 0 else "never"]
    else:
        line += ["", ""]
    return f"| {' | '.join(map(str, line))} |"


def product_speed(n: int = 1024, times: int = 4) -> float:
    """Return floating-point operations per CPU second of a product of two large matrices."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    torch.mm(a, b)
    start = time.process_time()
    for _ in range(times):
        torch.mm(a, b)
    return times * 2 * n**3 / (time.process_time() - start)


def adam_seconds(parameters: int, times: int = 200) -> float:
    """Return CPU seconds of a fused AdamW step of so many parameters, over and over: in the cache if it holds them."""
    flat = nn.Parameter(torch.randn(parameters))
    optimizer = torch.optim.AdamW([flat], lr=1e-3, weight_decay=0.0, fused=True)
    flat.grad = torch.randn_like(flat)
    optimizer.step()
    state: Any = optimizer.state[flat]
    moments = [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]]
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    settings |= {"amsgrad": False, "maximize": False}
    kernel: Any = torch._fused_adamw_
    start = time.process_time()
    with torch.no_grad():
        for _ in range(times):
            kernel([flat], [flat.grad], *moments, **settings)
    return (time.process_time() - start) / times
