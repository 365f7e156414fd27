"""Parquet files: the numbers are those of the CSV beside it, and what does not fit is one line."""

from __future__ import annotations

import decimal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_toys.bilevel.regression.csv_stream import CsvStream, read_stream
from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import Table
from lightning_toys.generative_policy.offline import OfflineActions
from lightning_toys.training import parquet_files
from lightning_toys.training.table_files import read_columns, read_table

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

ROWS = 40


def write(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def a_table() -> dict[str, np.ndarray]:
    g = np.random.default_rng(0)
    return {"a": g.normal(size=ROWS), "b": g.integers(0, 9, ROWS), "y": g.normal(size=ROWS).astype(np.float32)}


def as_csv(path: Path, columns: dict[str, Any]) -> str:
    rows = zip(*(x.tolist() for x in columns.values()), strict=True)
    path.write_text("\n".join([",".join(columns), *(",".join(map(repr, row)) for row in rows)]) + "\n")
    return str(path)


def refused(act: Callable[[], Any], *parts: str) -> str:
    with pytest.raises(ToyError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line
    return line


def test_a_table_of_parquet_is_that_of_the_csv(tmp_path: Path) -> None:
    columns = a_table()
    csv = as_csv(tmp_path / "points.csv", columns)
    parquet = write(tmp_path / "points.parquet", columns, row_group_size=7)  # several chunks
    wanted = np.stack([columns[n].astype(float) for n in ("y", "a")], 1)
    assert np.array_equal(read_columns(parquet, ["y", "a"]), wanted)  # the order asked for, not the file's
    first, second = (Table(path, ["a", "b"], ["y"], holdout=0.2) for path in (csv, parquet))
    for x, y in zip((*first.train, *first.test), (*second.train, *second.test), strict=True):
        assert x.equal(y)
    assert first.units == second.units


def test_numbers_of_every_kind(tmp_path: Path) -> None:
    kinds = {
        "half": pa.array(np.array([0.5, -2.0], np.float16)),
        "single": pa.array([0.25, 3.0], pa.float32()),
        "small": pa.array([-7, 8], pa.int8()),
        "large": pa.array([2**63, 5], pa.uint64()),
        "truth": pa.array([True, False]),
        "decimal": pa.array([decimal.Decimal("1.50"), decimal.Decimal("-2.25")]),
    }
    found = read_columns(write(tmp_path / "x.parquet", kinds), list(kinds))
    assert found.dtype == np.float64
    assert found.tolist() == [[0.5, 0.25, -7.0, 2.0**63, 1.0, 1.5], [-2.0, 3.0, 8.0, 5.0, 0.0, -2.25]]


GOOD = {"a": [1.0, 2.0, 3.0], "y": [1, 2, 3]}
WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "absent": (GOOD, ["alpha"], "has no column 'alpha', but a, y"),
    "typo": ({"alpha": [1.0]}, ["alpa"], "did you mean 'alpha'?"),
    "text": ({**GOOD, "a": ["1", "2", "3"]}, ["a", "y"], "column 'a': string is not allowed; give numbers"),
    "struct": ({**GOOD, "a": [{"b": 1}] * 3}, ["a"], "column 'a': struct<b: int64> is not allowed; give numbers"),
    "null": ({**GOOD, "y": [1, 2, None]}, ["a", "y"], "column 'y', row 2: the value is missing; drop such rows"),
    "all null": ({**GOOD, "a": pa.nulls(3)}, ["a"], "column 'a': null is not allowed; give numbers"),
    "nan": ({**GOOD, "a": [1.0, float("nan"), 2.0]}, ["a", "y"], "column 'a', row 1: missing or not finite"),
    "infinite": ({**GOOD, "a": [1.0, 2.0, float("inf")]}, ["a"], "column 'a', row 2: missing or not finite"),
    "empty": ({"a": pa.array([], pa.float64())}, ["a"], "has no rows"),
    "lists": ({"a": [[1.0, 2.0], [3.0, 4.0]]}, ["a"], "column 'a': shape (2, 2) of float64 is not allowed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_columns_that_do_not_fit_are_one_line(name: str, tmp_path: Path) -> None:
    columns, wanted, says = WRONG[name]
    path = write(tmp_path / "points.parquet", columns)
    line = refused(lambda: read_columns(path, wanted), "points.parquet", says)
    assert line.startswith("--data.path: ")


def test_what_is_no_parquet_file_is_one_line(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "whole.parquet", a_table())).read_bytes()
    bad = tmp_path / "bad.parquet"
    middle = bytearray(whole)
    middle[4:400] = bytes(396)  # pages that are none behind a footer that is right
    for content in (b"", b"PAR1", b"a,b\n1,2\n", whole[:-40], whole[len(whole) // 2 :], bytes(middle)):
        bad.write_bytes(content)
        refused(lambda: read_columns(str(bad), ["a"], "--data.test_path"), "--data.test_path", "no Parquet file")
    twice = pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0])], ["a", "a"])
    pq.write_table(twice, bad)
    refused(lambda: read_columns(str(bad), ["a"]), "has 2 columns 'a'; rename one")
    refused(lambda: list(parquet_files.parquet_rows(bad, "--data.file")), "has 2 columns 'a'; rename one")


def test_a_file_that_says_one_value_a_billion_times_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = pa.array(["x" * 1000] * 20_000).dictionary_encode()
    path = Path(write(tmp_path / "x.parquet", {"prompt": many, "a": np.zeros(20_000)}))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(parquet_files, "MOST", 10_000)
    refused(lambda: read_columns(str(path), ["a"]), "has 20000 values in these columns; give at most 10000")
    monkeypatch.setattr(parquet_files, "MOST_BYTES", 10_000)
    refused(lambda: list(parquet_files.parquet_rows(path, "--data.file")), "--data.file", "a part of it")
    monkeypatch.setattr(parquet_files, "MOST_ROWS", 10_000)
    refused(lambda: list(parquet_files.parquet_rows(path, "--data.file")), "has 20000 rows; give at most 10000")


def test_lists_and_dictionaries_are_measured_by_what_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of it is read where the file says so, and before it is made objects where it does not."""
    lists = Path(write(tmp_path / "l.parquet", {"a": pa.array([[1.0] * 2000] * 300)}))
    assert lists.stat().st_size < 10_000
    with monkeypatch.context() as patch:
        patch.setattr(parquet_files, "MOST", 100_000)
        refused(lambda: read_table(str(lists)), "has 600000 values in these columns; give at most 100000")
        refused(lambda: list(parquet_files.parquet_rows(lists, "--data.file")), "has 600000 values")
    long = "x" * 1000
    texts: dict[str, Any] = {
        "plain": pa.array([long] * 2000),
        "dictionary": pa.array([long] * 2000).dictionary_encode(),
        "lists": pa.array([[long] * 200] * 10),
        "chat": pa.array([[{"role": "user", "content": long}] * 200] * 10),
    }
    for name, column in texts.items():
        path = Path(write(tmp_path / f"{name}.parquet", {"t": column}))
        rows = list(parquet_files.parquet_rows(path, "--data.file"))
        assert [row["t"] for _, row in rows] == column.to_pylist()
        with monkeypatch.context() as patch:
            patch.setattr(parquet_files, "MOST_BYTES", 1_000_000)
            refused(lambda p=path: list(parquet_files.parquet_rows(p, "--data.file")), "1 GiB in its rows")
            if name in ("plain", "dictionary"):
                refused(lambda p=path: parquet_files.parquet_values(p, "t", "--data.path"), "column 't', has more than")
        if name in ("plain", "dictionary"):
            assert parquet_files.parquet_values(path, "t", "--data.path") == [long] * 2000
    packed = Path(write(tmp_path / "p.parquet", {"t": ["y" * 2_000_000]}, compression="zstd", use_dictionary=False))
    assert packed.stat().st_size < 10_000
    monkeypatch.setattr(parquet_files, "MOST_BYTES", 1_000_000)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)  # nothing is read
    refused(lambda: list(parquet_files.parquet_rows(packed, "--data.file")), "unpacks to more than 1 GiB")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = write(tmp_path / "x.parquet", a_table()), parquet_files.importlib.import_module
    assert read_columns(path, ["a"]).shape == (ROWS, 1)

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(parquet_files.importlib, "import_module", absent)
    refused(
        lambda: Table(path, ["a"], ["y"]),
        "--data.path: ", "x.parquet' is a Parquet file, and pyarrow is not installed; give pip install "
        "'lightning-toys[parquet]'",
    )  # fmt: skip


def test_actions_of_numbers_and_of_lists(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    actions, speed = g.normal(size=(ROWS, 3)), g.normal(size=ROWS)
    lists = {
        "list": pa.array(list(actions)),
        "large": pa.array(list(actions), pa.large_list(pa.float64())),
        "fixed": pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 3),
    }
    for name, column in lists.items():
        path = write(tmp_path / f"{name}.parquet", {"action": column, "speed": speed}, row_group_size=9)
        names, table = read_table(path)
        assert names == ["action", "speed"]
        assert np.array_equal(table, np.column_stack([actions, speed]))
        assert np.array_equal(read_table(path, ["speed", "action"])[1], np.column_stack([speed, actions]))
    data = OfflineActions(path, ["action"], test_share=0.25)
    assert sorted(map(tuple, np.vstack([data.rows, data.held.numpy()]).tolist())) == sorted(
        map(tuple, actions.tolist())
    )
    ragged = write(tmp_path / "ragged.parquet", {"action": [[1.0, 2.0], [3.0]]})
    refused(lambda: read_table(ragged), "column 'action': row 1 is a list of 1, row 0 of 2; give lists of one length")
    holes = write(tmp_path / "holes.parquet", {"action": [[1.0, 2.0], [3.0, None]]})
    refused(lambda: read_table(holes), "column 'action', row 1: the value is missing")


def test_a_stream_of_parquet_is_that_of_the_csv(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    times, points = 12, 10
    x = np.tile(g.normal(size=points), times)
    columns = {"t": np.repeat(np.arange(times), points), "y1": g.normal(size=times * points), "x1": x}
    csv, parquet = as_csv(tmp_path / "s.csv", columns), write(tmp_path / "s.parquet", columns)
    for a, b in zip(read_stream(csv), read_stream(parquet), strict=True):
        assert np.array_equal(a, b)
    dates = np.datetime64("2026-01-01") + columns["t"]
    dated = write(tmp_path / "d.parquet", {**columns, "t": dates})
    assert np.array_equal(CsvStream(dated, 3).y, CsvStream(csv, 3).y)
    other = dict(columns, t=np.arange(times * points) // (points - 1))
    refused(lambda: read_stream(write(tmp_path / "o.parquet", other)), "has times of different lengths")
    nested = dict(columns, t=[[1]] * (times * points))
    refused(lambda: read_stream(write(tmp_path / "n.parquet", nested)), "column 't': list<", "give a text, number or")
    refused(
        lambda: read_stream(write(tmp_path / "a.parquet", a_table())), "has the columns a, b, y; give columns t, x1"
    )
    refused(lambda: read_stream(str(tmp_path / "none.parquet")), "no file")


def test_a_fresh_process_reads_repeated_texts(tmp_path: Path) -> None:
    """Parts of pyarrow that the reader asks for are imported by it, not by whoever came before."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["what is 1 + 1"] * 50, "answer": ["2"] * 50}), path)
    code = (
        "import sys; from pathlib import Path; from lightning_toys.training.parquet_files import parquet_rows; "
        "print(len(list(parquet_rows(Path(sys.argv[1]), '--data.file'))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "50"), done.stderr
