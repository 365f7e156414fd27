"""Rows of a file to learn from: any number of inputs and outputs, scored on rows that training does not see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import WHOLE, bounded, check_settings, require
from lightning_toys.flow_vs_regression.data import PointData, Points
from lightning_toys.flow_vs_regression.scattered import scattered_predictions
from lightning_toys.flow_vs_regression.units import Units
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.table_files import read_columns

MAX_COLUMNS = 1000


def check_columns(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Refuse lists of columns that are empty, or name one twice.

    Raises:
        ToyError: names the flag and the column.
    """
    for flag, names in (("--data.inputs", inputs), ("--data.outputs", outputs)):
        words = not isinstance(names, str) and all(isinstance(n, str) for n in names)
        require(words, f"{flag}: {names!r} is not allowed; give a list of columns, such as '[a,b]'")
        count = len(names)
        require(count > 0, f"{flag}: [] is not allowed; give the names of columns of --data.path, such as '[a,b]'")
        require(count <= MAX_COLUMNS, f"{flag}: {count} columns are not allowed; give at most {MAX_COLUMNS}")
    seen: set[str] = set()
    for name in (*inputs, *outputs):
        require(name not in seen, f"--data.inputs, --data.outputs: column {name!r} is given twice")
        seen.add(name)


class Table(PointData):
    """Rows of a CSV, npz or Parquet file: what the inputs say of the outputs, without a known truth.

    The network sees each column less its mean, over its standard deviation, of the training rows (unless
    ``standardise`` is false). Predictions, errors and figures are in the file's units.

    Args:
        path: the file; a CSV has a header.
        inputs: columns that make up the condition c.
        outputs: columns that are predicted.
        test_path: a file of the same columns to score on; without it, ``test_share`` of the rows are.
        test_share: share of the rows that are tested on, the same rows for all replicas.
        holdout: share of the training rows that each replica holds out, by its own seed, for ``evaluation.weights:
            best``.
        standardise: whether columns are scaled for the network.
        batch_size: rows of one optimiser step; the last batch of an epoch is kept.
        seed: which rows are tested on. Intervals over replicas say nothing of this choice: try another.

    Raises:
        ToyError: a value is not allowed, or the file does not fit; names the column and the row.
    """

    def __init__(
        self,
        path: str = "",
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
        test_path: str | None = None,
        test_share: float = 0.2,
        holdout: float = 0.0,
        standardise: bool = True,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        check_settings(Table, locals(), "--data.")
        super().__init__(batch_size)
        bounded("--data.seed", seed, 0, WHOLE)
        for flag, share in (("test_share", test_share), ("holdout", holdout)):
            require(0 <= share < 1, f"--data.{flag}: {share} is not allowed; give a share in [0, 1)")
        require(bool(path), "--data.path: a file is missing; give a CSV, npz or Parquet file")
        check_columns(inputs, outputs)
        names = [*inputs, *outputs]
        rows = read_columns(path, names)
        order = keyed_generator(seed, 0, "table/test").permutation(len(rows))
        if test_path is None:
            number = round(test_share * len(rows))
            require(
                number >= 1,
                f"--data.test_share: {test_share} of {len(rows)} rows is none; give more, or --data.test_path",
            )
            test, rows = rows[np.sort(order[:number])], rows[np.sort(order[number:])]
        else:
            test = read_columns(test_path, names, "--data.test_path")
        self.num_holdout = round(holdout * len(rows))
        require(holdout == 0 or self.num_holdout >= 1, f"--data.holdout: {holdout} of {len(rows)} rows is none")
        left = len(rows) - self.num_holdout
        require(left >= 2, f"--data.path: {path!r} leaves {left} rows to learn from; at least 2")
        C = len(inputs)
        self.path, self.test_path, self.test_share, self.seed = path, test_path, test_share, seed
        self.condition_dim, self.output_dim = C, len(outputs)
        self.condition_names, self.output_names = list(inputs), list(outputs)
        self.train = torch.from_numpy(rows[:, :C]), torch.from_numpy(rows[:, C:])
        # in the order of the first input, so that a few of them, evenly spaced, are spread over it
        test = test[np.argsort(test[:, 0], kind="stable")]
        self.test = torch.from_numpy(test[:, :C]), torch.from_numpy(test[:, C:])
        if standardise:
            m, s = rows.mean(0), rows.std(0)
            s[s == 0] = 1.0  # a constant column says nothing, and is left where it is
            self.units = Units(m[:C].tolist(), s[:C].tolist(), m[C:].tolist(), s[C:].tolist())
        tested = f"{len(test)} test rows"
        self.metric_labels = {"l2": f"RMSE on {tested} (l2)", "l1": f"mean absolute error on {tested} (l1)"}

    def points(self, seeds: Sequence[int]) -> Points:
        """See :meth:`PointData.points`."""
        return Points(*(torch.stack(x) for x in zip(*(self.split(s) for s in seeds), strict=True)))

    def split(self, seed: int) -> Points:
        """Return the training and held-out rows of the replica with this seed, without the replica axis."""
        c, x1 = self.train
        held = torch.zeros(len(c), dtype=torch.bool)
        if self.num_holdout:
            chosen = keyed_generator(seed, 0, "data/holdout").choice(len(c), self.num_holdout, replace=False)
            held[torch.from_numpy(chosen)] = True
        return Points(c[~held], x1[~held], c[held], x1[held])

    def evaluation_points(self, max_points: int | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`PointData.evaluation_points`: test rows, in the order of the first input."""
        c, x1 = self.test
        if max_points is None or len(c) <= max_points:
            return c, x1
        kept = torch.linspace(0, len(c) - 1, max_points, dtype=torch.float64).round().long()
        return c[kept], x1[kept]

    def baseline_rows(self, seeds: Sequence[int], c_eval: Tensor) -> list[dict[str, Tensor]]:
        """See :meth:`PointData.baseline_rows`; distances are those of scaled inputs."""
        scale = self.units or Units([0.0] * self.condition_dim, [1.0] * self.condition_dim, [0.0], [1.0])
        points = self.points(seeds if self.num_holdout else seeds[:1])
        at, out = scale.scaled_c(c_eval.double()), []
        for c, x1 in zip(points.c, points.x1, strict=True):
            found = scattered_predictions(scale.scaled_c(c), scale.scaled_x(x1), at)
            out.append({name: scale.unscaled_x(values) for name, values in found.items()})
        return out
