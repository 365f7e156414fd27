"""Draws that other processes make ahead of training.

What a step is drawn from is a pure function of its replica and its number, so any process may draw it: parts (a block
of steps, some of the replicas) are handed out in order, and put together in order. The numbers are those of a draw in
this process, bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, tee

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.training.loader import Block, BlockLoader, DrawnBlock
from lightning_toys.training.replica_parallel import share

Draw = Callable[[int, int], tuple[Tensor, ...]]
PREFETCH = 2  # parts that are drawn or waiting for each process
draws: Sequence[Draw] = ()  # a worker's own


def chunks(replicas: int, workers: int) -> list[slice]:
    """Return the replicas' parts, one to a worker while there are enough replicas; sizes differ by one at most."""
    n = min(replicas, workers)
    return [share(replicas, k, n) for k in range(n)]


def end_with_parent() -> None:
    """End this process when the one that started it ends, however it does: nothing here is worth saving."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def begin(given: Sequence[Draw]) -> None:
    """Make ready a worker. The main process alone acts on Ctrl-C and SIGTERM, which reach whole groups of processes."""
    global draws
    draws = given
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def draw_part(part: int, start: int, stop: int) -> list[np.ndarray]:
    """Draw a part in a worker. Arrays: tensors would go through shared memory, of which a container may have little."""
    return [x.numpy() for x in draws[part](start, stop)]


class PrefetchLoader(BlockLoader):
    """A :class:`~lightning_toys.training.loader.DrawnLoader` whose draws are made by other processes.

    Args:
        draws: one draw for each of the replicas' :func:`chunks`, in their order; they can be pickled.
        batch_size: rows a step.
        workers: processes.
    """

    def __init__(self, draws: Sequence[Draw], batch_size: int, workers: int) -> None:
        super().__init__((), (), batch_size, 1, 1)
        self.draws, self.workers = list(draws), workers

    def __iter__(self) -> Iterator[Block | DrawnBlock]:
        bounds, more = tee(self.bounds())
        tasks = ((part, *ends) for ends in more for part in range(len(self.draws)))
        pool = ProcessPoolExecutor(self.workers, initializer=begin, initargs=(self.draws,))
        coming: deque[Future[list[np.ndarray]]] = deque()
        try:
            for start, stop in bounds:
                parts = []
                for _ in self.draws:
                    coming.extend(self.handed_out(pool, islice(tasks, PREFETCH * self.workers - len(coming))))
                    parts.append(coming.popleft().result())
                self.next_step = stop
                columns = tuple(torch.from_numpy(np.concatenate(x)) for x in zip(*parts, strict=True))
                yield DrawnBlock(start, stop, self.batch_size, self.rank, self.world_size, columns)
        except BrokenProcessPool:
            raise ToyError(
                f"--data.num_workers: one of {self.workers} processes has died (of too little memory?); give fewer"
            ) from None
        finally:
            # not without waiting: the interpreter's exit would write to a pipe that is being closed
            pool.shutdown(wait=True, cancel_futures=True)

    def handed_out(
        self, pool: ProcessPoolExecutor, tasks: Iterable[tuple[int, int, int]]
    ) -> list[Future[list[np.ndarray]]]:
        """Return what is to come of some tasks.

        Raises:
            ToyError: no more processes can be started.
        """
        before = set(multiprocessing.active_children())
        try:
            return [pool.submit(draw_part, *t) for t in tasks]
        except OSError as error:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()  # nobody would give it work, or wait for its end
            why = f"not all of them can be started ({error.strerror})"
            raise ToyError(f"--data.num_workers: {self.workers} is not allowed; {why}; give fewer") from None
