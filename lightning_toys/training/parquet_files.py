"""Parquet files, of numbers or of rows of anything; pyarrow, an extra, is imported when there is one to read.

A file is checked by what it says of itself before it is read, and no larger than a table of another kind may be: a few
bytes of Parquet can say a value a billion times. Texts are read as Arrow's dictionaries, which hold each once, and
measured before they are made objects.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lightning_toys.errors import MOST, ToyError, one_line, require

SUFFIX = ".parquet"
MOST_ROWS = 10**7  # of a file whose rows are made objects
MOST_BYTES = 1 << 30  # of those rows, and of what a file unpacks to
ROWS_AT_ONCE = 256


def import_pyarrow(where: str) -> Any:
    """Return ``pyarrow`` with ``pyarrow.parquet`` and ``pyarrow.compute`` imported.

    Args:
        where: flag and file, for the error.

    Raises:
        ToyError: it is not installed.
    """
    try:
        for part in ("parquet", "compute"):  # pyarrow itself brings neither
            importlib.import_module(f"pyarrow.{part}")
        return importlib.import_module("pyarrow")
    except ImportError:
        advice = "give pip install 'lightning-toys[parquet]', or a file of another kind"
        raise ToyError(f"{where} is a Parquet file, and pyarrow is not installed; {advice}") from None


@contextmanager
def opened(path: Path, flag: str) -> Iterator[tuple[Any, Any]]:
    """Open a Parquet file meanwhile: pyarrow itself and the ``ParquetFile``; what is wrong with it is one line.

    Args:
        path: of an ordinary file.
        flag: that gave it, for errors.

    Raises:
        ToyError: pyarrow is not installed, or the file is no Parquet.
    """
    where = f"{flag}: {str(path)!r}"
    pa = import_pyarrow(where)
    try:
        with path.open("rb") as raw:
            with pa.parquet.ParquetFile(raw) as file:
                texts = text_columns(file)
            raw.seek(0)
            with pa.parquet.ParquetFile(raw, read_dictionary=texts) as file:
                yield pa, file
    # Arrow's own errors are of these kinds too
    except (OSError, ValueError, TypeError, NotImplementedError, KeyError, MemoryError, pa.ArrowException) as error:
        raise ToyError(f"{where} is no Parquet file that can be read: {one_line(error)[:120]}") from None


def text_columns(file: Any) -> list[str]:
    """Return the paths of the columns of texts or bytes, nested ones too."""
    columns = [file.schema.column(i) for i in range(len(file.schema))]
    plain = ("NONE", "STRING", "JSON", "ENUM")  # decimals may be bytes too
    return [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type in plain]


def require_room(file: Any, names: Sequence[str], where: str) -> None:
    """Refuse columns that say more than may be read, before anything of them is.

    Args:
        file: a ``ParquetFile``.
        names: of columns.
        where: flag and file, for the error.

    Raises:
        ToyError: they have too many values, those of lists among them, or unpack to too many bytes.
    """
    values = size = 0
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        for c in map(group.column, range(group.num_columns)):
            if any(c.path_in_schema == name or c.path_in_schema.startswith(f"{name}.") for name in names):
                values, size = values + c.num_values, size + c.total_uncompressed_size
    require(values <= MOST, f"{where} has {values} values in these columns; give at most {MOST}, a part of it")
    require(size <= MOST_BYTES, f"{where} unpacks to more than 1 GiB; give a part of it")


def expanded_bytes(pa: Any, array: Any) -> int:
    """Return the bytes of a column or array when each value stands for itself, where a dictionary has it once."""
    t = pa.types
    if isinstance(array, pa.ChunkedArray):
        return sum(expanded_bytes(pa, chunk) for chunk in array.chunks)
    if t.is_dictionary(array.type):
        held = array.dictionary
        if not (t.is_string(held.type) or t.is_large_string(held.type) or t.is_binary(held.type)):
            return int(array.nbytes) + 8 * len(array)
        lengths = pa.compute.binary_length(held).cast(pa.int64())
        return int(pa.compute.sum(lengths.take(array.indices)).as_py() or 0) + 4 * len(array)
    if t.is_map(array.type):
        return expanded_bytes(pa, array.keys) + expanded_bytes(pa, array.items) + 4 * len(array)
    if element_type(pa, array.type) != array.type:
        return expanded_bytes(pa, array.flatten()) + 4 * len(array)
    if t.is_struct(array.type):
        return sum(expanded_bytes(pa, part) for part in array.flatten())
    return int(array.nbytes)


def parquet_names(path: Path, names: Sequence[str], flag: str) -> list[str]:
    """Return the names of all columns; ``names`` are not looked at."""
    with opened(path, flag) as (_, file):
        return list(file.schema_arrow.names)


def parquet_arrays(
    path: Path, names: Sequence[str], flag: str, check: Callable[[Sequence[str]], None]
) -> list[np.ndarray]:
    """Return columns of numbers as arrays: (N,), or (N, k) of a column whose rows are lists of k numbers.

    Args:
        path: of an ordinary file.
        names: of the columns.
        flag: that gave the file, for errors.
        check: refuses names, given those of all columns.

    Raises:
        ToyError: names the file, the column, the row (from 0) and what is wrong there.
    """
    where = f"{flag}: {str(path)!r}"
    with opened(path, flag) as (pa, file):
        check(file.schema_arrow.names)
        numbers = file.metadata.num_rows * len(names)
        require(numbers <= MOST, f"{where} has {numbers} values in these columns; give at most {MOST}")
        require_room(file, names, where)
        for name in names:
            kind = file.schema_arrow.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) and not is_number(pa, kind.value_type) else kind
            fits = is_number(pa, element_type(pa, kind))
            require(fits, f"{where}, column {name!r}: {one_line(kind)[:80]} is not allowed; give numbers")
        table = file.read(columns=list(names), use_threads=False)
        return [column_array(pa, table.column(name), f"{where}, column {name!r}") for name in names]


def element_type(pa: Any, kind: Any) -> Any:
    """Return the type of what a list holds, or a type itself if it is none of lists."""
    t = pa.types
    return kind.value_type if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind) else kind


def is_number(pa: Any, kind: Any) -> bool:
    """Whether a type is one of numbers, truth values among them."""
    t = pa.types
    return bool(t.is_integer(kind) or t.is_floating(kind) or t.is_boolean(kind) or t.is_decimal(kind))


def column_array(pa: Any, column: Any, where: str) -> np.ndarray:
    """Return a column (N,) of numbers, or (N, k) of lists of k numbers, float64.

    Raises:
        ToyError: a value is missing, or lists differ in length.
    """
    require_no_nulls(column, 1, where)
    rows, width = len(column), 0
    lists = element_type(pa, column.type) != column.type
    if lists:
        lengths = pa.compute.list_value_length(column).to_numpy()
        width = int(lengths[0]) if rows else 0
        other = np.flatnonzero(lengths != width)
        place = f"row {other[0]} is a list of {lengths[other[0]]}" if other.size else ""
        require(not other.size, f"{where}: {place}, row 0 of {width}; give lists of one length")
        require(rows * width <= MOST, f"{where} has {rows * width} numbers; give at most {MOST}")
        column = pa.compute.list_flatten(column)
        require_no_nulls(column, width, where)
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    values = column.to_numpy().astype(np.float64)
    found: np.ndarray = values.reshape(rows, width) if lists else values
    return found


def require_no_nulls(column: Any, width: int, where: str) -> None:
    """Refuse a column with a missing value; ``width`` values make up a row."""
    empty = np.flatnonzero(column.is_null().to_numpy()) if column.null_count else np.zeros(0, int)
    row = f"row {empty[0] // max(width, 1)}" if empty.size else ""
    require(not empty.size, f"{where}, {row}: the value is missing; drop such rows, or fill them")


def parquet_values(path: Path, name: str, flag: str) -> list[Any]:
    """Return a column of texts, numbers or times as plain values; none may be missing.

    Args:
        path: of an ordinary file.
        name: of a column that it has once.
        flag: that gave the file, for errors.

    Raises:
        ToyError: names the file, the column and the row (from 0).
    """
    where = f"{flag}: {str(path)!r}"
    with opened(path, flag) as (pa, file):
        count, kind = file.metadata.num_rows, file.schema_arrow.field(name).type
        require(count <= MOST_ROWS, f"{where} has {count} rows; give at most {MOST_ROWS}")
        plain = not pa.types.is_nested(kind)
        require(plain, f"{where}, column {name!r}: {one_line(kind)[:80]} is not allowed; give a text, number or time")
        require_room(file, [name], where)
        column = file.read(columns=[name], use_threads=False).column(name)
        require_no_nulls(column, 1, f"{where}, column {name!r}")
        fits = expanded_bytes(pa, column) <= MOST_BYTES
        require(fits, f"{where}, column {name!r}, has more than 1 GiB in its rows; give a part of it")
        found: list[Any] = column.to_pylist()
    return found


def parquet_rows(path: Path, flag: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number (from 1) and columns of each row, as plain values: texts, numbers, lists, dictionaries, None.

    In a list of dictionaries keys without a value are left out: Parquet gives all of them the same keys, where JSON
    gives each its own (a chat's turns with and without ``name``).

    Args:
        path: of an ordinary file.
        flag: that gave it, for errors.

    Raises:
        ToyError: it is no Parquet file, two columns have one name, or it has too much in it.
    """
    where = f"{flag}: {str(path)!r}"
    with opened(path, flag) as (pa, file):
        names = file.schema_arrow.names
        twice = next((n for n in names if names.count(n) > 1), "")
        require(len(set(names)) == len(names), f"{where} has {names.count(twice)} columns {twice!r}; rename one")
        count = file.metadata.num_rows
        require(count <= MOST_ROWS, f"{where} has {count} rows; give at most {MOST_ROWS}")
        require_room(file, names, where)
        size = number = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
            size += sum(expanded_bytes(pa, column) for column in batch.columns)
            require(size <= MOST_BYTES, f"{where} has more than 1 GiB in its rows; give a part of it")
            for row in batch.to_pylist():
                number += 1
                yield number, {name: without_absent(value) for name, value in row.items()}


def without_absent(value: Any) -> Any:
    """Return a list of dictionaries without the keys that have no value; anything else as it is.

    >>> without_absent([{"role": "user", "name": None}]), without_absent([1, None]), without_absent(None)
    ([{'role': 'user'}], [1, None], None)
    """
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        return value
    return [{k: v for k, v in x.items() if v is not None} for x in value]
