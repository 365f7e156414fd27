"""A stream that somebody observed, read from a CSV or Parquet file: y over time at points x that stay."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.regression.data import StreamData
from lightning_toys.bilevel.regression.drift import EmpiricalLoss
from lightning_toys.bilevel.regression.stream import StreamShape
from lightning_toys.errors import ToyError, bounded, one_line, require
from lightning_toys.training import parquet_files
from lightning_toys.training.table_files import checked_file, csv_header, read_by, read_columns

MOST_ROWS = 10**7
FLAG = "--data.path"
FORM = "give columns t, x1, x2, ..., y1, y2, ..., and every time the same points in the same order"


class ObservedStream:
    """The same observations for every replica; time 0 of the run comes after the first ``lags`` times of the file.

    Args:
        replicas: R.
        x: points, inner ones first (N, p).
        y: observations (T, N, d).
        inner: B, the number of inner points.
        lags: W.
    """

    def __init__(self, replicas: int, x: np.ndarray, y: np.ndarray, inner: int, lags: int) -> None:
        self.replicas, self.x, self.y, self.inner, self.lags = replicas, x, y, inner, lags
        self._cache: tuple[Tensor, Tensor] | None = None

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        cached = self._cache
        if cached is None or cached[0].device != like.device or cached[0].dtype != like.dtype:
            self._cache = cached = (torch.from_numpy(self.x).to(like), torch.from_numpy(self.y).to(like))
        return cached

    def points(self, like: Tensor) -> list[Tensor]:
        """Return the inner points (R, B, p) and the outer ones (R, B', p), in dtype and on the device of ``like``."""
        x = self._tensors(like)[0].expand(self.replicas, -1, -1)
        return [x[:, : self.inner].contiguous(), x[:, self.inner :].contiguous()]

    def window(self, t: int, lags: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the observations of step t, see :meth:`Stream.window`."""
        start = t + self.lags - lags
        y = self._tensors(like)[1][start : start + lags + 1].expand(self.replicas, -1, -1, -1)
        return y[:, :-1, : self.inner].contiguous(), y[:, -1, self.inner :].contiguous()


class CsvStream(StreamData):
    """A stream from a CSV or Parquet file with a row for each time and point: columns t, x1, x2, ..., y1, y2, ....

    A CSV has a header, and is separated by commas, semicolons or tabs. A time is a number or a text, such as a date.

    Times are in the order of the file, and each has the same points in the same order. The first ``window`` times are
    the past of step 0, so a run has at most as many steps as there are times after them. Every replica sees the same
    stream.

    Args:
        path: of the file: ``.csv`` (also ``.tsv``, ``.txt``) or ``.parquet``.
        window: W, the largest lag in the inner problem, in times.
        inner_points: B, the first points, on which the inner problem is solved; the rest is for the outer one. None is
            half of them.

    Raises:
        ToyError: a value is not allowed, or the file is not such a stream.
    """

    def __init__(self, path: str = "", window: int = 60, inner_points: int | None = None) -> None:
        bounded("--data.window", window, 1, 10_000)
        if inner_points is not None:
            bounded("--data.inner_points", inner_points, 4)
        named = isinstance(path, str | os.PathLike) and bool(str(path))
        require(named, f"{FLAG}: {path!r} is not allowed; give a CSV or Parquet file")
        path = str(path)
        x, y = read_stream(path)
        points = len(x)
        inner = points // 2 if inner_points is None else inner_points
        require(
            4 <= inner <= points - 4,
            f"--data.inner_points: {inner} of {points} points is not allowed; leave 4 at least on either side",
        )
        require(len(y) > window, f"--data.window: {window} is not allowed; give less than the {len(y)} times of {path}")
        super().__init__(window, StreamShape(x.shape[1], y.shape[2], 0, inner, points - inner, math.nan))
        self.path, self.x, self.y = path, x, y

    @property
    def steps(self) -> int | None:
        """See :attr:`StreamData.steps`."""
        return len(self.y) - self.window

    @cached_property
    def exact_loss(self) -> EmpiricalLoss:
        """See :attr:`StreamData.exact_loss`: over the whole file, outer points alone."""
        return EmpiricalLoss(self.y[:, self.shape.inner :], self.window)

    def stream(self, seeds: Sequence[int]) -> ObservedStream:
        """See :meth:`StreamData.stream`."""
        return ObservedStream(len(seeds), self.x, self.y, self.shape.inner, self.window)


def read_stream(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the points x (N, p) and the observations y (T, N, d) of a CSV or Parquet file, see :class:`CsvStream`.

    Raises:
        ToyError: names the file and the line.
    """
    parquet = Path(path).suffix.lower() == parquet_files.SUFFIX
    head, stamps, found = parquet_stream(path) if parquet else csv_stream(path)
    _, xs, _ = columns_of(head, path)
    points = next((i for i, s in enumerate(stamps) if s != stamps[0]), len(stamps))
    require(points > 0 and len(found) % points == 0, f"--data.path: {path} has times of different lengths; {FORM}")
    table = found.reshape(-1, points, len(head) - 1)
    at = np.array(stamps, dtype=object).reshape(-1, points)
    same = (at == at[:, :1]).all() and len(set(at[:, 0])) == len(at)
    same = same and (table[:, :, : len(xs)] == table[:1, :, : len(xs)]).all()
    require(bool(same), f"--data.path: {path} has other points at other times; {FORM}")
    return table[0, :, : len(xs)].copy(), table[:, :, len(xs) :].copy()


def columns_of(head: Sequence[str], path: str) -> tuple[int, list[int], list[int]]:
    """Return where the columns of time, of x and of y are.

    Raises:
        ToyError: the file has others.
    """
    times, xs, ys = ([i for i, n in enumerate(head) if n[:1] == letter] for letter in "txy")
    require(
        len(times) == 1 and bool(xs and ys) and len(times) + len(xs) + len(ys) == len(head),
        f"--data.path: {path} has the columns {', '.join(head)[:60]}; {FORM}",
    )
    return times[0], xs, ys


def csv_stream(path: str) -> tuple[list[str], list[Any], np.ndarray]:
    """Return the names of a CSV's columns, the time of each row as it stands there, and its numbers, those of x first.

    Raises:
        ToyError: names the file, the line and the column.
    """
    file = checked_file(path, FLAG)
    require(file.suffix.lower() != ".npz", f"{FLAG}: {path!r} is not allowed; give a CSV or Parquet file")
    head, stamps = read_by(csv_times, file, (), FLAG)
    _, xs, ys = columns_of(head, path)
    return head, stamps, read_columns(path, [head[i] for i in (*xs, *ys)], FLAG)


def csv_times(path: Path, names: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Return the names of a CSV's columns, and the time of each row; ``names`` are not looked at.

    Raises:
        ToyError: it is no CSV, has other columns than those of a stream, or too many rows.
    """
    where = f"{flag}: {str(path)!r}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            head, delimiter = csv_header(file, where)
            t, _, _ = columns_of(head, str(path))
            rows = (row for row in csv.reader(file, delimiter=delimiter) if row)
            # a row that is too short is told of where its numbers are read
            stamps = [row[t].strip() if t < len(row) else "" for row in islice(rows, MOST_ROWS + 1)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ToyError(f"{where} is no CSV in UTF-8: {one_line(error)}") from None
    require(len(stamps) <= MOST_ROWS, f"{where} has more than {MOST_ROWS} rows; give a part of it")
    return head, stamps


def parquet_stream(path: str) -> tuple[list[str], list[Any], np.ndarray]:
    """Return the same as :func:`csv_stream` of a Parquet file.

    Raises:
        ToyError: names the file, the column and the row.
    """
    file = checked_file(path, FLAG)
    head = parquet_files.parquet_names(file, (), FLAG)
    t, xs, ys = columns_of(head, path)
    numbers = read_columns(path, [head[i] for i in (*xs, *ys)], FLAG)
    stamps = parquet_files.parquet_values(file, head[t], FLAG)
    return head, stamps, numbers
