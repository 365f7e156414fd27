"""Runs samplers over blocks of chains, shared out over ranks, and gathers what they drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_toys.mirror_descent.diagnostics import Sample
from lightning_toys.mirror_descent.kernels import BLOCK, Noise
from lightning_toys.mirror_descent.samplers import Sampler

# blocks side by side on a GPU: what a kernel costs there is its launch, up to a million chains or so
WIDE = {True: 64, False: 8}  # with the exact law, and with a learned one, whose graph needs the memory


def some_blocks(sampler: Sampler, keys: Sequence[tuple[int, int]], like: Tensor) -> list[dict[str, Any]]:
    """Return what a sampler draws in each block, as float64 arrays: a function of the block's (seed, index) alone."""
    noise = Noise(keys, f"sampler/{sampler.name}", like, sampler.world.settings.compile)
    found, n = sampler.draw(noise), len(keys)

    def parts(x: Tensor | None, dim: int) -> list[Any]:
        if x is None:
            return [None] * n
        whole = x.detach().cpu().double().numpy()
        return [part.squeeze(dim) if dim else part for part in np.split(whole, n, axis=dim)]

    # the blocks of chains lie along the last axis, those of what was noted along the second
    columns = {"a": parts(found.a, 0), "s": parts(found.s, 0)}
    columns |= {k: parts(getattr(found, k), 1) for k in ("accepted", "path", "jumps")}
    extra = {k: np.split(np.array(v), n) for k, v in (found.extra or {}).items()}
    return [
        {k: v[i] for k, v in columns.items()} | {"extra": {k: v[i].tolist() for k, v in extra.items()} or None}
        for i in range(n)
    ]


def parts_of(keys: Sequence[tuple[int, int]], most: int) -> Iterator[Sequence[tuple[int, int]]]:
    """Yield the keys in their order, ``most`` at once."""
    for i in range(0, len(keys), most):
        yield keys[i : i + most]


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
    wide: int = 0,
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
        wide: blocks drawn side by side, the same draws up to roundings; 0 takes WIDE's on a GPU, and 1 elsewhere.
    """
    each = dict(zip(seeds, samplers, strict=True)) if isinstance(samplers, Sequence) else dict.fromkeys(seeds, samplers)
    count = -(-chains // BLOCK)
    wanted = [(seed, block) for seed in seeds for block in range(count)]
    mine: dict[tuple[int, int], dict[str, Any]] = {}
    for sampler, own in groupby(wanted[rank::world], lambda key: each[key[0]]):
        keys, most = list(own), WIDE[sampler.world.model.exact] if like.device.type == "cuda" else 1
        for some in parts_of(keys, wide or most):
            mine |= dict(zip(some, some_blocks(sampler, some, like), strict=True))
            for _ in some:
                tick()
    found = mine
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, mine)
        found = {k: v for part in parts for k, v in part.items()}
    return [join([found[seed, block] for block in range(count)], chains) for seed in seeds]
