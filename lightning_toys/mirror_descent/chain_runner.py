"""Runs samplers over blocks of chains, distributed over ranks, and gathers their samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_toys.mirror_descent.diagnostics import Sample
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.problem import Settings
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.training.compiling import has_compiler

GPU_BLOCKS = 64  # blocks side by side on a GPU, where up to a million chains or so a kernel's cost is its launch
# chain-steps of pc_mala from which `compile: auto` compiles. CPU time of PCMALA.draw on one thread, as in
# benchmarks/mirror_speed.py: a block of 32768 chains and 40 steps takes 29 ms plain and 17 ms compiled, and the first
# compiled call, with nothing in torch's cache on disk, 21 s. That is repaid after 21 / .012 = 1750 blocks, 2.3e9
# chain-steps (with a full cache, 5 s, after 6e8). Other samplers gain a tenth by compiled noise: not counted.
REPAID_STEPS = 2_300_000_000
GPU_BLOCKS_LEARNED = 8  # with a learned energy, whose graph takes a quarter of a GiB a block in a narrow network


def draw_blocks(
    sampler: Sampler, keys: Sequence[tuple[int, int]], like: Tensor, compiled: bool = False
) -> list[dict[str, Any]]:
    """Return what a sampler draws in each block, as float64 arrays: a function of the block's (seed, index).

    They are in the coordinates of the original problem, whatever those are that chains run in.

    On a CPU it does not depend on the other blocks, bit for bit; on a GPU they may change roundings, and now and then
    a Metropolis-Hastings decision.
    """
    noise = Noise(keys, f"sampler/{sampler.name}", like, compiled)
    draws, n = sampler.draw(noise), len(keys)
    origin = sampler.problem.origin

    def split(x: Tensor | None, dim: int, shift: Any = 0.0) -> list[Any]:
        if x is None:
            return [None] * n
        whole = x.detach().cpu().double().numpy()
        whole = whole + (np.reshape(shift, (-1, 1)) if whole.ndim == 2 and dim == -1 else np.squeeze(shift))
        return [part.squeeze(dim) if dim > 0 else part for part in np.split(whole, n, axis=dim)]

    # blocks of chains lie along the last axis, blocks of diagnostics along the second
    d = sampler.problem.joint.action_dim
    columns = {"a": split(without_rows(draws.a), -1, origin[:d]), "s": split(without_rows(draws.s), -1, origin[d:])}
    columns |= {k: split(getattr(draws, k), 1) for k in ("accepted", "squared_jumps")}
    columns |= {"trace": split(draws.trace, 1, origin[0]), "states": split(draws.states, 1, origin[d])}
    extra = {k: np.split(np.array(v), n) for k, v in (draws.extra or {}).items()}
    return [
        {k: v[i] for k, v in columns.items()} | {"extra": {k: v[i].tolist() for k, v in extra.items()} or None}
        for i in range(n)
    ]


def blocks_at_once(sampler: Sampler, like: Tensor) -> int:
    """Return how many blocks to draw side by side; one where code is compiled, since each number would be anew."""
    if like.device.type != "cuda" or sampler.problem.settings.compile is True:
        return 1
    return GPU_BLOCKS if sampler.problem.model.exact else GPU_BLOCKS_LEARNED


def draw_in_groups(
    sampler: Sampler, keys: Sequence[tuple[int, int]], like: Tensor, max_blocks: int, compiled: bool = False
) -> Iterator[dict[tuple[int, int], dict[str, Any]]]:
    """Yield :func:`draw_blocks` by key, ``max_blocks`` at once; fewer once the device's memory was too small."""
    while keys:
        group, found = keys[:max_blocks], None
        try:
            found = draw_blocks(sampler, group, like, compiled)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
        if found is None:  # the error is gone by now, and the tensors that it held
            torch.cuda.empty_cache()
            max_blocks = len(group) // 2
            continue
        yield dict(zip(group, found, strict=True))
        keys = keys[len(group) :]


def merge_blocks(blocks: Sequence[dict[str, Any]], chains: int) -> Sample:
    """Return one seed's sample of ``chains`` chains, given its blocks in order."""
    first = blocks[0]
    extra = {k: [v for b in blocks for v in b["extra"][k]] for k in first["extra"]} if first["extra"] else None

    def mean(name: str) -> float | None:
        return None if first[name] is None else float(np.mean([b[name] for b in blocks]))

    trace, states = (
        None if first[k] is None else np.concatenate([b[k] for b in blocks], axis=1) for k in ("trace", "states")
    )
    steps = 0 if first["squared_jumps"] is None else len(first["squared_jumps"])
    a, s = (np.concatenate([b[k] for b in blocks], axis=-1)[..., :chains] for k in ("a", "s"))
    return Sample(a, s, mean("accepted"), trace, mean("squared_jumps"), extra, steps, states)


def compiles(settings: Settings, like: Tensor, samplers: Sequence[Sampler], blocks: int) -> bool:
    """Return whether chains are drawn by compiled code: as the settings say, or, by ``auto``, where it is repaid.

    A function of the whole work, not of one process's part of it, so that any number of processes draws the same.

    Args:
        settings: have ``compile``.
        like: has the chains' device and dtype.
        samplers: all that are run with the compiled code.
        blocks: blocks of chains of each.
    """
    if settings.compile != "auto":
        return settings.compile
    if like.device.type != "cpu" or like.dtype != torch.float32 or not has_compiler():
        return False
    chain_steps = sum(compiled_steps(sampler) for sampler in samplers) * blocks * BLOCK_SIZE
    return chain_steps >= REPAID_STEPS


def compiled_steps(sampler: Sampler) -> int:
    """Return how many steps of a chain gain by compiled code: those with random numbers, pc_mala's as a whole."""
    return sampler.fast_steps() if sampler.problem.model.exact else 0


@torch.no_grad()
def run_chains(
    samplers: Sampler | Sequence[Sampler],
    seeds: Sequence[int],
    chains: int,
    like: Tensor,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int], None] = lambda blocks: None,
    max_blocks: int = 0,
    compiled: bool | None = None,
) -> list[Sample]:
    """Return each seed's sample, the same on every rank and, on a CPU, for any number of ranks.

    >>> from lightning_toys.mirror_descent.problem import LinearGaussianJoint, Problem
    >>> from lightning_toys.mirror_descent import ActionValue, Linear
    >>> from lightning_toys.mirror_descent.samplers import MALA
    >>> problem = Problem(LinearGaussianJoint(), ActionValue(), Linear(), 1.5)
    >>> samples = run_chains(MALA(problem), [0, 1], 1000, torch.zeros(()))
    >>> len(samples), samples[0].a.shape, samples[0].trace.shape
    (2, (1000,), (100, 64))

    Args:
        samplers: the sampler, or one a seed.
        seeds: one a replica.
        chains: chains a seed; whole blocks are drawn.
        like: a tensor with the dtype and device wanted.
        rank: this process's rank.
        world_size: number of processes; this one draws the blocks i with i % world_size == rank.
        on_progress: called with the number of blocks drawn since the last call.
        max_blocks: blocks drawn side by side; 0 leaves it to :func:`blocks_at_once`.
        compiled: whether by compiled code; None: as the settings say, ``auto`` for these chains alone.
    """
    by_seed = (
        dict(zip(seeds, samplers, strict=True)) if isinstance(samplers, Sequence) else dict.fromkeys(seeds, samplers)
    )
    count = -(-chains // BLOCK_SIZE)
    keys = [(seed, block) for seed in seeds for block in range(count)]
    local: dict[tuple[int, int], dict[str, Any]] = {}
    for sampler, of_sampler in groupby(keys[rank::world_size], lambda key: by_seed[key[0]]):
        fast = compiles(sampler.problem.settings, like, [sampler], len(keys)) if compiled is None else compiled
        at_once = max_blocks or blocks_at_once(sampler, like)
        for group in draw_in_groups(sampler, list(of_sampler), like, at_once, fast):
            local |= group
            on_progress(len(group))
    blocks = local
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, local)
        blocks = {k: v for part in parts for k, v in part.items()}
    return [merge_blocks([blocks[seed, block] for block in range(count)], chains) for seed in seeds]
