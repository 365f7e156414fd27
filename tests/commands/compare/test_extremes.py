"""What no run of ours writes into a results.json: shown where it means something, else refused in one line."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from lightning_toys.cli import main
from lightning_toys.commands.compare import plots
from lightning_toys.commands.compare.plots import draw, png
from lightning_toys.commands.compare.runs import find_results, load_runs
from lightning_toys.errors import ToyError
from lightning_toys.stats import format_estimate, mean_ci, paired_difference
from lightning_toys.training import metrics_reader, results_format
from tests.commands.compare.runs_of_others import METRIC, WHOLE, a_run, edited
from tests.malformed import Refusal, tree


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """End what hangs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


KINDS = {"fifo": "a FIFO", "folder": "a folder", "socket": "a socket", "device": "a device", "zero": "a device"}


def put_something(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put something that is no file at a path."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else "/dev/null")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["results.json", "config.yaml"])
def test_what_is_no_file(kind: str, name: str, refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not opened: a FIFO would be waited for."""
    a_run(refuse.folder / "runs" / "a", edited("settings", ...))
    folder = a_run(refuse.folder / "runs" / "b", edited("settings", ...))
    (folder / "results.json").rename(folder / "kept.json")
    put_something(folder / name, kind, monkeypatch)
    if name == "config.yaml":
        (folder / "kept.json").rename(folder / "results.json")
    monkeypatch.chdir(refuse.folder)
    with at_most(20):
        refuse(["compare", "runs"], "compare: ", f"b/{name}", f"it is {KINDS[kind]}, no file")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_is_no_file(kind: str, refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandit's comparison draws curves out of metrics.csv."""
    bandit = {"module": "lightning_toys.generative_policy.BanditPolicy", "metrics": {"regret": METRIC}}
    folder = a_run(refuse.folder / "runs" / "a", WHOLE | bandit | {"headline": ["regret"]})
    put_something(folder / "metrics.csv", kind, monkeypatch)
    monkeypatch.chdir(refuse.folder)
    with at_most(20):
        refuse(["compare", "runs"], "a/metrics.csv", KINDS[kind])


def test_a_fifo_that_is_named_itself(refuse: Refusal) -> None:
    os.mkfifo(refuse.folder / "pipe")
    with at_most(20):
        refuse(["compare", "pipe"], "compare: pipe ", "it is a FIFO")


def test_files_that_are_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are not read to find out; the limit is named."""
    folder = a_run(tmp_path / "a", edited("settings", ...))
    for name, most in (("config.yaml", 2**22), ("results.json", 2**28)):
        with (folder / name).open("ab") as f:
            f.truncate(2**40)  # a hole
        assert main(["compare", str(folder)]) == 2
        err = capsys.readouterr().err
        assert f"a/{name}" in err
        assert f"(it has {2**40} bytes; at most {most} are read)" in err
        assert err.count("\n") == 1
    monkeypatch.setattr(metrics_reader, "MOST_BYTES", 10)
    (folder / "metrics.csv").write_text("step,l2\n1,2.0\n")
    with pytest.raises(ToyError, match=r"metrics\.csv is not .*it has 14 bytes; at most 10 are read"):
        metrics_reader.read_run(folder)


DIGITS = b"9" * 400
WORDS = {
    "metric": (b'{"values": [1.0, %s]' % DIGITS, "metrics/l2/values/1 is an integer of 400 digits"),
    "longer": (b'{"values": [1.0, %s]' % (b"-" + b"9" * 5000), "metrics/l2/values/1 is an integer of 5000 digits"),
    "float": (b'{"values": [1.0, 1e400]', "metrics/l2/values/1 is 1e400; give a number that a double holds, or null"),
    "nan": (b'{"values": [NaN, 1.0]', "metrics/l2/values/0 is NaN; give"),
    "infinity": (b'{"values": [1.0, -Infinity]', "metrics/l2/values/1 is -Infinity; give"),
    "elsewhere": (b'{"values": [1.0, 2.0], "x": [{"y": [0, %s]}]' % DIGITS, "metrics/l2/x/0/y/1 is an integer of 400"),
    "twice": (b'{"values": [1.0, 2.0], "values": [1.0, 2.0]', "the key 'values' is given twice"),
    "surrogate": (rb'{"values": [1.0, 2.0], "\ud800": 1', r"metrics/l2/\ud800 holds half of a surrogate pair"),
    "surrogate_value": (rb'{"values": [1.0, 2.0], "x": "a\udfff"', "metrics/l2/x holds half of a surrogate pair"),
    "deep": (b'{"values": [1.0, 2.0], "x": ' + b"[" * 40 + b"]" * 40, "metrics/l2/x/... is nested deeper than 32"),
}


@pytest.mark.parametrize("name", WORDS)
def test_values_that_mean_nothing(name: str, refuse: Refusal) -> None:
    """File and place in it are named."""
    text, says = WORDS[name]
    whole = json.dumps(edited("metrics", {"l2": "HERE"})).encode()
    a_run(refuse.folder / "runs" / "a", whole.replace(b'"HERE"', text + b"}"))
    refuse(["compare", "runs"], "compare: runs/a/results.json is not a results.json of lightning_toys (", says)


def test_a_surrogate_pair_is_a_character(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control."""
    a_run(tmp_path / "a", json.dumps(WHOLE | {"label": "😀"}, ensure_ascii=True).encode())
    assert main(["compare", str(tmp_path / "a")]) == 0
    assert "😀" in capsys.readouterr().out


def test_metrics_of_which_there_are_too_many(refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_format, "MOST_METRICS", 3)
    a_run(refuse.folder / "a", edited("metrics", {f"m{i}": METRIC for i in range(3)} | {"m@r": METRIC}))
    assert main(["compare", "a"]) == 0
    a_run(refuse.folder / "b", edited("metrics", {f"m{i}": METRIC for i in range(4)}))
    refuse(["compare", "b"], "metrics are 4; at most 3")


BIG = 1e308


@pytest.mark.parametrize("exponent", [-300, -150, 150, 300])
def test_intervals_of_extreme_values_against_scaled_ones(exponent: int) -> None:
    """Squares would overflow, or vanish: the interval is that of ordinary values, times the scale."""
    x, y = np.random.default_rng(0).normal(2, 1, (2, 7))
    scale = 2.0 ** (exponent * 3)
    plain, scaled = mean_ci(x), mean_ci(x * scale)
    assert (scaled.mean, scaled.lo, scaled.hi) == pytest.approx(
        (plain.mean * scale, plain.lo * scale, plain.hi * scale), rel=1e-12
    )
    a, b = (
        paired_difference(dict(enumerate(x)), dict(enumerate(y))),
        paired_difference(dict(enumerate(x * scale)), dict(enumerate(y * scale))),
    )
    assert a is not None
    assert b is not None
    assert b.p_value == pytest.approx(a.p_value, rel=1e-12)
    assert b.p_value == pytest.approx(scipy_stats.ttest_rel(x, y).pvalue, rel=1e-9)
    assert b.estimate.lo == pytest.approx(a.estimate.lo * scale, rel=1e-12)


def test_an_interval_that_no_double_holds() -> None:
    estimate = mean_ci([BIG, BIG / 2, 1.7 * BIG])
    assert estimate.mean == pytest.approx(BIG / 3 * 3.2)
    assert estimate.hi == math.inf
    assert estimate.half_width == math.inf
    assert format_estimate(estimate) == "1.067e+308 ± inf"
    assert format_estimate(mean_ci([BIG, BIG])) == "1e+308 ± 0"
    difference = paired_difference({0: BIG, 1: BIG}, {0: -BIG, 1: -BIG})
    assert difference is not None
    assert difference.estimate.mean == math.inf
    assert difference.p_value == 0.0


VALUES: dict[str, list[float | int | None]] = {
    "big": [BIG, BIG / 2], "both_signs": [BIG, -BIG], "wide": [BIG, 1e-308], "small": [5e-324, 1e-320],
    "equal": [BIG, BIG], "with_ordinary": [BIG, 1.0], "integer": [10**308, 3], "no_zero": [0.0, 5e-324],
    "negative": [-BIG, -1.0], "null": [None, None], "zero": [0.0, -0.0],
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_near_the_ends_of_a_double(name: str, tmp_path: Path) -> None:
    """They are shown, in tables and pictures, beside ordinary ones."""
    a_run(tmp_path / "runs" / "a", edited("metrics/l2", {"values": VALUES[name]}))
    a_run(tmp_path / "runs" / "b", edited("references/zero/l2", BIG) | {"label": "b"})
    out = tmp_path / "out"
    assert main(["compare", str(tmp_path / "runs"), "--out", str(out)]) == 0
    with (out / "comparison.csv").open(encoding="utf-8", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["run"] == "a (a)" or r["run"] == "a"]
    found = [float(x) for r in rows if r["metric"] == "l2" and not r["readout"] for x in r["values"].split()]
    assert found == [float(v) for v in VALUES[name] if v is not None]
    assert (out / "l2.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_large_values_says_its_unit(tmp_path: Path) -> None:
    (run,) = load_runs(find_results([a_run(tmp_path / "a", edited("metrics/l2", {"values": [BIG, BIG / 2]}))]))
    ax = draw([run], "l2").axes[0]
    assert ax.get_xlabel() == "RMSE, in units of 1e+308"
    points = next(line.get_xdata() for line in ax.lines if line.get_label() == "_seeds")
    assert np.asarray(points) == pytest.approx([1.0, 0.5])
    assert all(abs(x) < 100 for x in ax.get_xlim())


def test_runs_that_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture has at most 65 536 pixels a side: rows become narrower."""
    assert plots.MOST_INCHES * 150 < 2**16
    monkeypatch.setattr(plots, "MOST_INCHES", 4.0)
    (run,) = load_runs(find_results([a_run(tmp_path / "a", edited("label", "x" * 300))]))
    figure = draw([run] * 12, "l2")
    assert figure.get_figheight() == 4.0
    assert figure.axes[0].get_yticklabels()[0].get_fontsize() <= 6


def test_a_metric_of_three_hundred_characters(tmp_path: Path) -> None:
    (run,) = load_runs(find_results([a_run(tmp_path / "b", WHOLE | {"metrics": {"m" * 300: METRIC}})]))
    assert png(draw([run], "m" * 300)).startswith(b"\x89PNG")


# ---- results.json at random

JUNK = st.one_of(
    st.sampled_from(
        [None, True, "", [], {}, 0, -1, 10**400, BIG, -BIG, 5e-324, math.nan, math.inf, 2**70, "\ud800", "x" * 300]
    ),
    st.sampled_from(
        ["$x$", "[/b]", "a|b", "=1+1", "& % _ # { } ^ ~", "a\nb", "\x00", "../../up", "_x", "@", "l2@", "🙂"]
    ),
    st.lists(st.floats() | st.integers() | st.text(max_size=5), max_size=3),
    st.recursive(st.integers(0, 1), lambda inner: st.lists(inner, max_size=2), max_leaves=3),
    st.integers(0, 60).map(lambda n: json.loads("[" * n + "]" * n) if n else 0),
)


KEYS = ["l2", "seeds", "\ud800", "$x$", "x" * 300, "references", "step"]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree but its root."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [p for k in keys for p in ((*path, k), *places(node[k], (*path, k)))]


@st.composite
def mutated(draw_from: st.DrawFn) -> bytes:
    """Draw whole results with one to three changes: a value or a key is another, absent or doubled; then some bytes."""
    content = copy.deepcopy(WHOLE)
    for _ in range(draw_from(st.integers(1, 3))):
        if not (found := places(content)):
            break
        *heads, last = draw_from(st.sampled_from(found))
        node: Any = content
        for head in heads:
            node = node[head]
        change = draw_from(st.sampled_from(["value", "value", "value", "key", "absent"]))
        if change == "value":
            node[last] = draw_from(JUNK)
        elif change == "key" and isinstance(node, dict):
            node[draw_from(st.text(max_size=8) | st.sampled_from(KEYS))] = node[last]
        else:
            del node[last]
    text = json.dumps(content).encode()
    if draw_from(st.integers(0, 9)) == 0:
        k = draw_from(st.integers(0, len(text) - 1))
        text = text[:k] + draw_from(st.binary(max_size=3)) + text[k + draw_from(st.integers(0, 3)) :]
    return text


@settings(
    max_examples=50, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@pytest.mark.slow  # the ends of doubles by name are in the gate
@given(content=mutated())
def test_results_at_random(refuse: Refusal, content: bytes) -> None:
    """They are compared, or refused in one line that names the file; nothing hangs, and nothing is half written."""
    refuse.file(content, "runs/a/results.json")
    refuse.file(json.dumps(WHOLE | {"label": "b"}), "runs/b/results.json")
    before = tree(refuse.folder)
    refuse.capture.readouterr()
    with at_most(60):
        code = main(["compare", "runs", "--out", "out"])
    _, err = refuse.capture.readouterr()
    assert "Traceback" not in err
    if code == 0:
        assert (refuse.folder / "out" / "comparison.md").is_file()
        for path in (refuse.folder / "out").iterdir():
            path.unlink()
        (refuse.folder / "out").rmdir()
    else:
        assert code == 2, (code, err)
        assert err.startswith("error: compare: "), err
        assert err.count("\n") == 1, err
        assert "runs/" in err or "different experiments" in err, err
        assert tree(refuse.folder) == before
    OUTCOMES.append(code)


OUTCOMES: list[int] = []


def test_results_at_random_were_of_both_kinds() -> None:
    """A corpus that is all refused, or all read, would test little."""
    if OUTCOMES:
        assert OUTCOMES.count(0) > 3
        assert OUTCOMES.count(2) > 15
