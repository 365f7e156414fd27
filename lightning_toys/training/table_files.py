"""Columns of numbers out of a CSV, npz or Parquet file; a file that does not fit is told of in one line."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from lightning_toys.errors import MOST, ToyError, did_you_mean, one_line, require
from lightning_toys.training import parquet_files

MOST_BYTES = 2**31  # of a file
DELIMITERS = ",;\t"
KINDS = (".csv", ".tsv", ".txt", ".npz", parquet_files.SUFFIX)
MISSING = ("", "na", "n/a", "nan", "null", "none", "?")


def number(word: str) -> float | None:
    """Return the number that a CSV's cell holds; None where it is none."""
    try:
        return float(word)
    except ValueError:
        return None


def is_missing(word: str) -> bool:
    """Whether a CSV's cell says that there is no value."""
    return word.strip().lower() in MISSING


def read_columns(path: str, names: Sequence[str], flag: str = "--data.path") -> np.ndarray:
    """Return columns of a table (N, len(names)), float64, all finite.

    Args:
        path: a ``.csv`` (also ``.tsv``, ``.txt``; with a header, separated by commas, semicolons or tabs), ``.npz``
            (an array (N,) for each name) or ``.parquet`` file.
        names: of the columns, in the order in which they are wanted.
        flag: that named the file.

    Raises:
        ToyError: names the file, the column, the row (of a CSV: its line) and what is wrong there.
    """
    file = checked_file(path, flag)
    readers = {".npz": read_npz_columns, parquet_files.SUFFIX: read_parquet_columns}
    table: np.ndarray = read_by(readers.get(file.suffix.lower(), read_csv_columns), file, names, flag)
    check_numbers(table, names, path, flag)
    return table


def read_table(path: str, names: Sequence[str] = (), flag: str = "--data.path") -> tuple[list[str], np.ndarray]:
    """Return the columns' names, and the table (N, C), float64, all finite; all columns where none are named.

    Of an npz file an array is (N,), one column, or (N, k), of which each is one; without names it has one array. A
    column of a Parquet file may hold lists of k numbers, which are k columns likewise.

    Args:
        path: as of :func:`read_columns`.
        names: of the columns, or of the npz file's arrays.
        flag: that named the file.

    Raises:
        ToyError: as of :func:`read_columns`.
    """
    file = checked_file(path, flag)
    arrays = {".npz": read_npz_arrays, parquet_files.SUFFIX: read_parquet_arrays}.get(file.suffix.lower())
    if arrays is None:
        found = list(names) or read_by(csv_names, file, (), flag)
        return found, read_columns(path, found, flag)
    found, table = read_by(arrays, file, names, flag)
    check_numbers(table, [f"{i}" for i in range(table.shape[1])], path, flag)
    return found, table


def checked_file(path: str, flag: str) -> Path:
    """Return the path of a table's file.

    Raises:
        ToyError: there is none, it is too large, or of another kind.
    """
    file = Path(path)
    require(file.exists(), f"{flag}: no file {path!r}")
    require(file.is_file(), f"{flag}: {path!r} is no file")
    size = file.stat().st_size
    require(size <= MOST_BYTES, f"{flag}: {path!r} has {size} bytes; give at most {MOST_BYTES}")
    require(
        file.suffix.lower() in KINDS, f"{flag}: {path!r} is not allowed; give a file of the kind {', '.join(KINDS)}"
    )
    return file


def read_by(reader: Callable[[Path, Sequence[str], str], Any], file: Path, names: Sequence[str], flag: str) -> Any:
    """Return what a reader makes of a file; one that cannot be read is told of in one line."""
    try:
        return reader(file, names, flag)
    except OSError as error:
        raise ToyError(f"{flag}: {str(file)!r} cannot be read ({error.strerror or one_line(error)})") from None


def check_numbers(table: np.ndarray, names: Sequence[str], path: str, flag: str) -> None:
    """Refuse a table without rows, of too many numbers, or with some that are not finite."""
    require(table.shape[0] > 0, f"{flag}: {path!r} has no rows")
    require(table.size <= MOST, f"{flag}: {path!r} has {table.size} numbers in these columns; give at most {MOST}")
    # of a CSV they are told of by line; here rows count from 0
    for column, name in zip(table.T, names, strict=True):
        wrong = np.flatnonzero(~np.isfinite(column))
        where = f"row {wrong[0]}" if wrong.size else ""
        require(not wrong.size, f"{flag}: {path!r}, column {name!r}, {where}: missing or not finite; drop such rows")


def check_names(found: Sequence[str], names: Sequence[str], path: Path, flag: str) -> None:
    """Refuse columns that a file has not, or more than once.

    Raises:
        ToyError: names the column, and those that there are.
    """
    for name in names:
        listed = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
        hint = did_you_mean(name, found)
        require(name in found, f"{flag}: {str(path)!r} has no column {name!r}, but {listed}{hint}")
        require(found.count(name) == 1, f"{flag}: {str(path)!r} has {found.count(name)} columns {name!r}; rename one")


def csv_header(file: TextIO, where: str) -> tuple[list[str], str]:
    """Read the first line of a CSV, and return its columns' names and the delimiter.

    Raises:
        ToyError: there is no header.
    """
    first = file.readline()
    require(bool(first.strip()), f"{where} has no header: its first line is empty")
    delimiter = max(DELIMITERS, key=first.count)
    header = [word.strip() for word in next(csv.reader([first], delimiter=delimiter))]
    bare = all(number(word) is not None for word in header)
    require(not bare, f"{where} has no header: its first line is {first.strip()[:40]!r}; name the columns there")
    return header, delimiter


def csv_names(path: Path, names: Sequence[str], flag: str) -> list[str]:
    """Return the names of all columns of a CSV."""
    where = f"{flag}: {str(path)!r}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return csv_header(file, where)[0]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ToyError(f"{where} is no CSV in UTF-8: {one_line(error)}") from None


def read_csv_columns(path: Path, names: Sequence[str], flag: str) -> np.ndarray:
    """Return columns of a CSV with a header, see :func:`read_columns`."""
    where = f"{flag}: {str(path)!r}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, delimiter = csv_header(file, where)
            check_names(header, names, path, flag)
            at = [header.index(name) for name in names]
            rows = csv.reader(file, delimiter=delimiter)
            table = [csv_row(row, at, names, f"{where}, line {rows.line_num + 1}", len(header)) for row in rows if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ToyError(f"{where} is no CSV in UTF-8: {one_line(error)}") from None
    return np.array(table, dtype=np.float64).reshape(-1, len(names))


def csv_row(row: Sequence[str], at: Sequence[int], names: Sequence[str], where: str, width: int) -> list[float]:
    """Return some cells of a row as numbers, all finite.

    Args:
        row: of a CSV.
        at: where the cells are.
        names: of their columns, for the error.
        where: file and line, for the error.
        width: cells of the header.

    Raises:
        ToyError: the row has another length, or a cell is missing or no finite number.
    """
    require(len(row) == width, f"{where}: {len(row)} cells, where the header has {width}")
    values = []
    for i, name in zip(at, names, strict=True):
        word = row[i]
        missing = is_missing(word)
        require(not missing, f"{where}, column {name!r}: the value is missing ({word!r}); drop such rows, or fill them")
        value = number(word)
        if value is None or not np.isfinite(value):
            raise ToyError(f"{where}, column {name!r}: {word[:40]!r} is no finite number")
        values.append(value)
    return values


def stacked(columns: Sequence[np.ndarray], names: Sequence[str], where: str) -> np.ndarray:
    """Return columns side by side, float64.

    Raises:
        ToyError: one is no list of numbers, or they differ in length.
    """
    for name, column in zip(names, columns, strict=True):
        kind = f"shape {column.shape} of {column.dtype}"
        fits = column.ndim == 1 and column.dtype.kind in "fiub"
        require(fits, f"{where}, column {name!r}: {kind} is not allowed; give numbers (N,)")
        rows = len(columns[0])
        same = len(column) == rows
        require(same, f"{where}: column {name!r} has {len(column)} rows, {names[0]!r} has {rows}")
    return np.stack([column.astype(np.float64) for column in columns], axis=1)


def read_npz_columns(path: Path, names: Sequence[str], flag: str) -> np.ndarray:
    """Return columns of an npz file, an array (N,) each, see :func:`read_columns`; nothing in it is unpickled."""
    where = f"{flag}: {str(path)!r}"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            check_names(list(file.files), names, path, flag)
            return stacked([file[name] for name in names], names, where)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ToyError(f"{where} is no npz file of numbers: {one_line(error)}") from None


def read_npz_arrays(path: Path, names: Sequence[str], flag: str) -> tuple[list[str], np.ndarray]:
    """Return the names of arrays of an npz file, and the arrays side by side (N, C), see :func:`read_table`."""
    where = f"{flag}: {str(path)!r}"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            there = list(file.files)
            one = bool(names) or len(there) == 1
            require(one, f"{where} has {len(there)} arrays, {', '.join(there[:20])}; give --data.columns '[NAME]'")
            found = list(names) or there
            check_names(there, found, path, flag)
            return found, side_by_side({name: file[name] for name in found}, where)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ToyError(f"{where} is no npz file of numbers: {one_line(error)}") from None


def side_by_side(arrays: Mapping[str, np.ndarray], where: str) -> np.ndarray:
    """Return arrays (N,) and (N, k) as the columns of one table (N, C), float64.

    Raises:
        ToyError: one is no array of numbers of that form, or they differ in length.
    """
    parts = {}
    for name, array in arrays.items():
        kind = f"shape {array.shape} of {array.dtype}"
        fits = array.ndim in (1, 2) and array.dtype.kind in "fiub"
        require(fits, f"{where}, array {name!r}: {kind} is not allowed; give numbers (N,) or (N, k)")
        parts[name] = array.astype(np.float64).reshape(len(array), -1 if array.size else math.prod(array.shape[1:]))
    first = next(iter(parts))
    rows = len(parts[first])
    for name, part in parts.items():
        require(len(part) == rows, f"{where}: array {name!r} has {len(part)} rows, {first!r} has {rows}")
    table: np.ndarray = np.concatenate(list(parts.values()), axis=1)
    require(table.shape[1] > 0, f"{where} has no columns")
    return table


def read_parquet_columns(path: Path, names: Sequence[str], flag: str) -> np.ndarray:
    """Return columns of a Parquet file, see :func:`read_columns`."""
    arrays = parquet_files.parquet_arrays(path, names, flag, lambda found: check_names(found, names, path, flag))
    return stacked(arrays, names, f"{flag}: {str(path)!r}")


def read_parquet_arrays(path: Path, names: Sequence[str], flag: str) -> tuple[list[str], np.ndarray]:
    """Return the names of columns of a Parquet file, and what they hold side by side (N, C), see :func:`read_table`."""
    found = list(names) or parquet_files.parquet_names(path, (), flag)
    require(bool(found), f"{flag}: {str(path)!r} has no columns")
    arrays = parquet_files.parquet_arrays(path, found, flag, lambda there: check_names(there, found, path, flag))
    return found, side_by_side(dict(zip(found, arrays, strict=True)), f"{flag}: {str(path)!r}")
