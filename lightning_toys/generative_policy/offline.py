"""Actions out of a file: an offline data set without a known distribution, scored on rows that are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import WHOLE, bounded, check_settings, require
from lightning_toys.generative_policy.couplings import Coupling
from lightning_toys.generative_policy.data import MixtureData, PooledPairs
from lightning_toys.generative_policy.samplers import Pool
from lightning_toys.generative_policy.target import Empirical, Target
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.table_files import read_table

MAX_COLUMNS = 1000


class OfflineActions(MixtureData):
    """Actions (N, D) of CSV, npz or Parquet: steps train on rows drawn with replacement, keyed by (seed, step).

    Held-out rows, the same for all replicas, are what samples are compared with. There is no truth: no mode weights, no
    divergence; sliced W2 and energy distance to the held-out rows, and their likelihood where a policy has one.

    Args:
        path: the file: a CSV with a header, npz with arrays (N,) or (N, k), or Parquet with columns of numbers or of
            lists of k numbers.
        columns: of the CSV or Parquet, or arrays of the npz, side by side the action's coordinates; all columns, or the
            only array, if left out.
        test_path: a file of the same columns to score on; without it, ``test_share`` of the rows are.
        test_share: share of the rows that are held out.
        limits: the least and the greatest value that a coordinate may have; rows are mapped from there to [-1, 1].
            Without them they are taken as they are. Samples and metrics are of the mapped coordinates: a likelihood or
            an entropy of the file's own differs by D log((high - low) / 2), which is to be added to ``nll`` and to
            entropies.
        coupling: which noise goes with which row in a batch.
        batch_size: rows of one optimiser step.
        num_workers: processes, on each rank, that prefetch draws; 0 draws in this process.
        seed: which rows are held out. Intervals over replicas say nothing of this choice: try another.

    Raises:
        ToyError: a value is not allowed, or the file does not fit; names the column and the row.
    """

    baseline = "training_rows"

    def __init__(
        self,
        path: str = "",
        columns: Sequence[str] = (),
        test_path: str | None = None,
        test_share: float = 0.2,
        limits: Sequence[float] | None = None,
        coupling: Coupling | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_settings(OfflineActions, locals(), "--data.")
        bounded("--data.batch_size", batch_size, 1)
        bounded("--data.num_workers", num_workers, 0, 1024)
        bounded("--data.seed", seed, 0, WHOLE)
        require(0 <= test_share < 1, f"--data.test_share: {test_share} is not allowed; give a share in [0, 1)")
        check_limits(limits)
        words = not isinstance(columns, str) and all(isinstance(n, str) for n in columns)
        require(words, f"--data.columns: {columns!r} is not allowed; give a list of columns, such as '[a,b]'")
        require(bool(path), "--data.path: a file is missing; give a CSV, npz or Parquet file of actions")
        names, rows = read_table(path, columns)
        rows = scaled(rows, limits, "--data.path", path)
        if test_path is None:
            order = keyed_generator(seed, 0, "offline/test").permutation(len(rows))
            count = round(test_share * len(rows))
            rows, held = rows[np.sort(order[count:])], rows[np.sort(order[:count])]
            least = f"--data.test_share: {test_share} of {len(order)} rows"
        else:
            held = scaled(read_table(test_path, names, "--data.test_path")[1], limits, "--data.test_path", test_path)
            least = f"--data.test_path: {test_path!r}"
        require(len(held) >= 2, f"{least} leaves {len(held)} rows to score on; at least 2")
        require(len(rows) >= 2, f"--data.path: {path!r} leaves {len(rows)} rows to learn from; at least 2")
        require(rows.shape[1] <= MAX_COLUMNS, f"--data.columns: {rows.shape[1]} are not allowed; at most {MAX_COLUMNS}")
        super().__init__(Empirical(torch.from_numpy(rows)), coupling, batch_size, num_workers)
        self.names, self.rows, self.held = names, rows, torch.from_numpy(held)

    def pairs(self, target: Target, coupling: Coupling, seeds: Sequence[int]) -> PooledPairs:
        """See :meth:`MixtureData.pairs`."""
        return PooledPairs([Pool(self.rows)] * len(seeds), target, coupling, seeds, self.batch_size)

    def reference(self, seed: int, n: int) -> Tensor:
        """See :meth:`MixtureData.reference`: the held-out rows, or n of them, the same for all replicas."""
        return some_rows(self.held, n, "offline/reference")

    def another(self, seed: int, n: int) -> Tensor:
        """See :meth:`MixtureData.another`: training rows, none twice: a policy that knows them by heart."""
        return some_rows(torch.from_numpy(self.rows), n, "offline/another")


def some_rows(rows: Tensor, n: int, stream: str) -> Tensor:
    """Return n of some rows (N, D), none twice; all of them where there are no more."""
    if n >= len(rows):
        return rows
    return rows[torch.from_numpy(np.sort(keyed_generator(0, 0, stream).permutation(len(rows))[:n]))]


def check_limits(limits: Sequence[float] | None) -> None:
    """Refuse limits that are not two finite numbers, the first below the second."""
    if limits is None:
        return
    numbers = not isinstance(limits, str) and all(isinstance(v, int | float) for v in limits) and len(limits) == 2
    fits = numbers and bool(np.isfinite(limits).all()) and -1e9 <= limits[0] < limits[1] <= 1e9
    require(fits, f"--data.limits: {limits} is not allowed; give [LOW, HIGH], LOW below HIGH, up to 1e9 in size")


def scaled(rows: np.ndarray, limits: Sequence[float] | None, flag: str, path: str) -> np.ndarray:
    """Return rows (N, D) mapped from limits to [-1, 1].

    Raises:
        ToyError: a row lies outside; names the file and the row.
    """
    if limits is None:
        return rows
    low, high = float(limits[0]), float(limits[1])
    outside = np.flatnonzero(((rows < low) | (rows > high)).any(1))
    where = f"row {outside[0]}" if outside.size else ""
    require(not outside.size, f"{flag}: {path!r}, {where} lies outside of --data.limits [{low:g}, {high:g}]")
    out: np.ndarray = (2 * rows - low - high) / (high - low)
    return out
