"""Runs samplers over blocks of chains, shared out over ranks, and gathers what they drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_toys.mirror_descent.diagnostics import Sample
from lightning_toys.mirror_descent.kernels import BLOCK, Noise
from lightning_toys.mirror_descent.samplers import Draws, Sampler


def one_block(sampler: Sampler, seed: int, block: int, like: Tensor) -> dict[str, Any]:
    """Return what a sampler draws in one block of chains, as float64 arrays; a function of (seed, block) alone."""
    found: Draws = sampler.draw(Noise(seed, block, f"sampler/{sampler.name}", like, sampler.world.settings.compile))

    def kept(x: Tensor | None) -> Any:
        return None if x is None else x.detach().cpu().double().numpy()

    fields = ("a", "s", "accepted", "path", "jumps")
    return {**{name: kept(getattr(found, name)) for name in fields}, "extra": found.extra}


def join(blocks: Sequence[dict[str, Any]], chains: int) -> Sample:
    """Put the blocks of one seed together."""
    first = blocks[0]
    extra = {k: [v for b in blocks for v in b["extra"][k]] for k in first["extra"]} if first["extra"] else None

    def mean(name: str) -> float | None:
        return None if first[name] is None else float(np.mean([b[name] for b in blocks]))

    path = None if first["path"] is None else np.concatenate([b["path"] for b in blocks], axis=1)
    a, s = (np.concatenate([b[k] for b in blocks])[:chains] for k in ("a", "s"))
    return Sample(a, s, mean("accepted"), path, mean("jumps"), extra)


@torch.no_grad()
def run(
    samplers: Sampler | Sequence[Sampler],
    seeds: Sequence[int],
    chains: int,
    like: Tensor,
    rank: int = 0,
    world: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Return each seed's draws, the same on every rank and however many there are.

    Args:
        samplers: the sampler, or one of each seed.
        seeds: one a replica.
        chains: of each seed; whole blocks are drawn.
        like: gives dtype and device.
        rank: this process's rank.
        world: number of processes; block i is the rank's own if i % world == rank.
        tick: called after each block.
    """
    each = dict(zip(seeds, samplers, strict=True)) if isinstance(samplers, Sequence) else dict.fromkeys(seeds, samplers)
    count = -(-chains // BLOCK)
    wanted = [(seed, block) for seed in seeds for block in range(count)]
    mine = {}
    for key in wanted[rank::world]:
        mine[key] = one_block(each[key[0]], *key, like)
        tick()
    found = mine
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, mine)
        found = {k: v for part in parts for k, v in part.items()}
    return [join([found[seed, block] for block in range(count)], chains) for seed in seeds]
