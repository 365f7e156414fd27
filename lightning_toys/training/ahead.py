"""Draws that other processes make ahead of training.

What a step is drawn from is a pure function of its replica and its number, so any process may draw it: torch's
DataLoader hands out parts (a block of steps, some of the replicas) to its workers in turn, and they are put together in
order. The numbers are those of a draw in this process, bit for bit.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_toys.training.loader import Block, DrawnBlock, DrawnLoader

Draw = Callable[[int, int], tuple[Tensor, ...]]


def chunks(replicas: int, workers: int) -> list[slice]:
    """Return the replicas' parts, one to a worker while there are enough replicas; sizes differ by one at most."""
    n = min(replicas, workers)
    return [slice(replicas * k // n, replicas * (k + 1) // n) for k in range(n)]


class Parts(Dataset[list[np.ndarray]]):
    """Part i: of block i // n, counted from the block that holds step ``begin``, the i % n-th of the n draws.

    Arrays, not tensors: those would go through shared memory, of which a container may have little.
    """

    def __init__(self, draws: Sequence[Draw], begin: int, end: int, block_steps: int) -> None:
        self.draws, self.begin, self.end, self.block_steps = draws, begin, end, block_steps

    def __len__(self) -> int:
        return (-(-self.end // self.block_steps) - self.begin // self.block_steps) * len(self.draws)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        k, part = divmod(i, len(self.draws))
        first = (self.begin // self.block_steps + k) * self.block_steps
        start, stop = max(first, self.begin), min(first + self.block_steps, self.end)
        return [x.numpy() for x in self.draws[part](start, stop)]


def as_it_is(part: list[np.ndarray]) -> list[np.ndarray]:
    """Return a part as it was drawn: no collation."""
    return part


def leave_signals(worker: int) -> None:
    """Let the main process alone act on Ctrl-C and on a scheduler's SIGTERM, which reach a whole group of processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class AheadLoader(DrawnLoader):
    """A :class:`DrawnLoader` whose draws are made by other processes, two parts ahead each.

    Args:
        draws: one draw for each of the replicas' :func:`chunks`, in their order.
        batch_size: rows a step.
        workers: processes; at least as many as there are draws.
    """

    def __init__(self, draws: Sequence[Draw], batch_size: int, workers: int) -> None:
        super().__init__(self.joined, batch_size)
        self.draws, self.workers = list(draws), workers
        self.coming: Iterator[Any] = iter(())

    def joined(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return the next block's columns, its parts put together."""
        parts = [next(self.coming) for _ in self.draws]
        return tuple(torch.from_numpy(np.concatenate(columns)) for columns in zip(*parts, strict=True))

    def __iter__(self) -> Iterator[Block | DrawnBlock]:
        n = len(self.draws)
        parts = Parts(self.draws, self.next_step, self.max_steps, self.block_steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more than there are cores: as asked
            self.coming = iter(
                DataLoader(
                    parts,
                    batch_size=None,
                    sampler=range(len(parts)),
                    num_workers=self.workers // n * n,  # each keeps to one part of the replicas, whose noise it has
                    collate_fn=as_it_is,
                    worker_init_fn=leave_signals,
                    generator=torch.Generator(),  # it seeds workers, which draw nothing from it; else the global one
                )
            )
        try:
            yield from super().__iter__()
        finally:
            self.coming = iter(())  # which ends the processes
