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

WIDE = 64  # blocks side by side on a GPU: what a kernel costs there is its launch, up to a million chains or so
WIDE_LEARNED = 8  # with a learned law, whose graph takes a quarter of a GiB a block in a narrow network


def some_blocks(sampler: Sampler, keys: Sequence[tuple[int, int]], like: Tensor) -> list[dict[str, Any]]:
    """Return what a sampler draws in each block, as float64 arrays: a function of the block's (seed, index).

    Of it alone on a CPU, bit for bit; on a GPU what lies beside it may change roundings, and a decision now and then.
    """
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


def blocks_at_once(sampler: Sampler, like: Tensor) -> int:
    """Return how many blocks to draw side by side: one where code is compiled, anew for each number of them."""
    if like.device.type != "cuda" or sampler.world.settings.compile:
        return 1
    return WIDE if sampler.world.model.exact else WIDE_LEARNED


def drawn(
    sampler: Sampler, keys: Sequence[tuple[int, int]], like: Tensor, most: int
) -> Iterator[dict[tuple[int, int], dict[str, Any]]]:
    """Yield :func:`some_blocks` by key, ``most`` at once; fewer from where the device's memory was too small on."""
    while keys:
        some, found = keys[:most], None
        try:
            found = some_blocks(sampler, some, like)
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
        if found is None:  # the error is gone by now, and the tensors that it held
            torch.cuda.empty_cache()
            most = len(some) // 2
            continue
        yield dict(zip(some, found, strict=True))
        keys = keys[len(some) :]


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
    tick: Callable[[int], None] = lambda blocks: None,
    wide: int = 0,
) -> list[Sample]:
    """Return each seed's draws, the same on every rank and, on a CPU, however many there are.

    Args:
        samplers: the sampler, or one of each seed.
        seeds: one a replica.
        chains: of each seed; whole blocks are drawn.
        like: gives dtype and device.
        rank: this process's rank.
        world: number of processes; block i is the rank's own if i % world == rank.
        tick: called with the number of blocks that have been drawn since.
        wide: blocks drawn side by side; 0 leaves it to :func:`blocks_at_once`.
    """
    each = dict(zip(seeds, samplers, strict=True)) if isinstance(samplers, Sequence) else dict.fromkeys(seeds, samplers)
    count = -(-chains // BLOCK)
    wanted = [(seed, block) for seed in seeds for block in range(count)]
    mine: dict[tuple[int, int], dict[str, Any]] = {}
    for sampler, own in groupby(wanted[rank::world], lambda key: each[key[0]]):
        for some in drawn(sampler, list(own), like, wide or blocks_at_once(sampler, like)):
            mine |= some
            tick(len(some))
    found = mine
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, mine)
        found = {k: v for part in parts for k, v in part.items()}
    return [join([found[seed, block] for block in range(count)], chains) for seed in seeds]
