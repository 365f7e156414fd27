"""An in-memory loader that hands out several optimiser steps at once and can be resumed at any of them.

In a tiny model the Trainer's bookkeeping for one batch costs as much as the step itself, so a *block* carries many
steps' data and the module runs them in one ``training_step``. Which rows step s sees is a pure function of (seed, s):
block boundaries, ranks and resumes change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import bounded
from lightning_toys.training.noise import keyed_generator

ENDLESS = 2**31
SHUFFLE_BLOCK = 64  # passes whose permutations come from one generator; part of the key
CHUNK_ROWS = 2**16  # rows whose order is drawn at once


class Batch(NamedTuple):
    """One step's rows on this rank.

    Attributes:
        columns: tensors (R, rows, ...).
        total: rows of the step on all ranks together.
        first: position of the first local row among them.
        last: position after the last local row.
    """

    columns: tuple[Tensor, ...]
    total: int
    first: int
    last: int


class Block(NamedTuple):
    """Steps ``start`` to ``stop - 1``: whole shuffled passes, of which each step takes a slice."""

    start: int
    stop: int
    first_pass: int
    batch_size: int
    rank: int
    world_size: int
    columns: tuple[Tensor, ...]  # each (R, passes, rows, ...)
    pass_rows: int  # rows of a whole pass
    first_row: int  # of each pass, the first row that is in ``columns``

    def batch(self, step: int) -> Batch:
        """Return the rows of one optimiser step: a contiguous share of its batch for each rank."""
        n = self.pass_rows
        per_pass = -(-n // self.batch_size)
        p, k = divmod(step, per_pass)
        lo, hi = k * self.batch_size, min((k + 1) * self.batch_size, n)
        total = hi - lo
        first, last = total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size
        p, at = p - self.first_pass, lo - self.first_row
        return Batch(tuple(x[:, p, at + first : at + last] for x in self.columns), total, first, last)


@dataclass
class ShuffleStreams:
    """The generators that a block of passes takes its orders from, one a replica, and how far they are.

    Attributes:
        index: of the block of passes.
        generators: one a seed.
        next: pass within the block that they draw next.
    """

    index: int
    generators: list[np.random.Generator]
    next: int = 0


class BlockLoader:
    """Iterates over blocks of optimiser steps until ``max_steps``.

    Args:
        columns: tensors (R, N, ...): replica r draws rows from ``columns[i][r]``.
        seeds: one seed a replica; seeds the shuffles.
        batch_size: rows a step; the last batch of a pass is kept, and is smaller where it must be.
        max_steps: total number of optimiser steps; the last block is cut there.
        block_steps: steps in a block.
        rank: this process's rank.
        world_size: number of processes; each takes its share of every batch.
    """

    def __init__(
        self,
        columns: Sequence[Tensor],
        seeds: Sequence[int],
        batch_size: int,
        max_steps: int,
        block_steps: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        bounded("--data.batch_size", batch_size, 1)
        self.columns, self.seeds = tuple(columns), tuple(seeds)
        self.batch_size, self.max_steps, self.block_steps = batch_size, max_steps, block_steps
        self.rank, self.world_size = rank, world_size
        self.next_step = 0
        self.orders: dict[int, np.ndarray] = {}  # of a pass, (R, N)
        self.streams: ShuffleStreams | None = None

    @property
    def steps_per_pass(self) -> int | None:
        """Optimiser steps that it takes to see every row once; None where rows are drawn anew at every step."""
        return -(-self.columns[0].shape[1] // self.batch_size) if self.columns else None

    def __len__(self) -> int:
        # The run is one long Lightning epoch that max_steps ends. A known length keeps Lightning from prefetching, so
        # that the saved position is the position trained.
        return ENDLESS

    def permutations(self, first_pass: int, passes: int) -> np.ndarray:
        """Return the row order of each replica in passes ``first_pass`` ...: (R, passes, N)."""
        # the next block mostly begins in the pass that this one ends with
        self.orders = {p: order for p, order in self.orders.items() if p >= first_pass}
        for p in range(first_pass, first_pass + passes):
            while p not in self.orders:
                self.draw_orders(p)
        return np.stack([self.orders[p] for p in range(first_pass, first_pass + passes)], axis=1)

    def draw_orders(self, wanted: int) -> None:
        """Draw the row orders of some passes, up to one that is wanted at the least.

        A generator gives those of SHUFFLE_BLOCK passes, one after the other: few are drawn at a time where there are
        many rows, so that a short run does not wait for passes that it never makes.
        """
        index, offset = divmod(wanted, SHUFFLE_BLOCK)
        if self.streams is None or self.streams.index != index or self.streams.next > offset:
            self.streams = ShuffleStreams(index, [keyed_generator(seed, index, "shuffle") for seed in self.seeds])
        n, streams = self.columns[0].shape[1], self.streams
        count = min(SHUFFLE_BLOCK - streams.next, max(1, CHUNK_ROWS // max(1, n)))
        rows = np.tile(np.arange(n), (count, 1))
        drawn = [g.permuted(rows, axis=1).astype(np.int32) for g in streams.generators]
        for k in range(count):
            if streams.next + k >= offset:
                self.orders[index * SHUFFLE_BLOCK + streams.next + k] = np.stack([x[k] for x in drawn])
        streams.next += count

    def block(self, start: int, stop: int) -> Block | DrawnBlock:
        """Gather the rows of steps ``start`` to ``stop - 1``."""
        per_pass = self.steps_per_pass
        assert per_pass is not None
        first = start // per_pass
        passes = (stop - 1) // per_pass - first + 1
        n, low = self.columns[0].shape[1], 0
        order = torch.from_numpy(self.permutations(first, passes))
        if passes == 1:  # of a long pass, the rows of these steps alone
            low = (start - first * per_pass) * self.batch_size
            order = order[:, :, low : (stop - first * per_pass) * self.batch_size]
        replica = torch.arange(order.shape[0])[:, None, None]
        columns = tuple(x[replica, order] for x in self.columns)
        return Block(start, stop, first, self.batch_size, self.rank, self.world_size, columns, n, low)

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Yield first step and end of each block that is left."""
        if self.next_step >= self.max_steps:
            # a Trainer that still wants steps has lost count, and would ask for ever
            raise RuntimeError(
                f"the loader is at step {self.next_step} of {self.max_steps}, and more steps are asked for"
            )
        start = self.next_step
        while start < self.max_steps:
            # blocks end on multiples of their size, so that a cut one does not shift those after it
            stop = min((start // self.block_steps + 1) * self.block_steps, self.max_steps)
            yield start, stop
            start = stop

    def __iter__(self) -> Iterator[Block | DrawnBlock]:
        for start, stop in self.bounds():
            self.next_step = stop
            yield self.block(start, stop)

    def state_dict(self) -> dict[str, Any]:
        """Return the position; all else follows from the seeds."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.next_step = int(state["next_step"])


class DrawnBlock(NamedTuple):
    """Steps ``start`` to ``stop - 1`` of data that are drawn anew at every step."""

    start: int
    stop: int
    batch_size: int
    rank: int
    world_size: int
    columns: tuple[Tensor, ...]  # each (R, steps, batch_size, ...)

    def batch(self, step: int) -> Batch:
        """Return this rank's contiguous share of one step's rows."""
        n, k = self.batch_size, step - self.start
        first, last = n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size
        return Batch(tuple(x[:, k, first:last] for x in self.columns), n, first, last)


def draw_nothing(start: int, stop: int) -> tuple[Tensor, ...]:
    """Draw no columns, where only the steps are wanted."""
    return ()


class DrawnLoader(BlockLoader):
    """A :class:`BlockLoader` whose rows come from ``draw(start, stop)``, a pure function of the steps.

    Args:
        draw: returns each column (R, steps, batch_size, ...), every rank's rows.
        batch_size: rows a step.
    """

    def __init__(self, draw: Callable[[int, int], tuple[Tensor, ...]], batch_size: int) -> None:
        super().__init__((), (), batch_size, 1, 1)
        self.draw = draw

    def block(self, start: int, stop: int) -> DrawnBlock:
        """Draw the rows of steps ``start`` to ``stop - 1``."""
        return DrawnBlock(start, stop, self.batch_size, self.rank, self.world_size, self.draw(start, stop))


class OneBatch:
    """A loader of a single batch. (Lightning takes a list for several loaders.)"""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Tensor]:
        yield self.batch
