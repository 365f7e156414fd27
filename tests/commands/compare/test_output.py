"""Everything is made before anything is written; a folder that cannot be written is told of in one line."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightning_toys.cli import main
from lightning_toys.commands.compare import output, report
from lightning_toys.plotting import new_figure
from tests.commands.compare.runs_of_others import WHOLE, a_run
from tests.malformed import Refusal, tree
from tests.test_house import imported

OUTS = {
    "empty": "", "nul": "a\0b", "long": "x" * 300, "deep_and_long": "new/" + "x" * 300, "file": "file",
    "in_a_file": "file/below", "loop": "loop", "in_a_loop": "loop/below", "no_folder_there": "/proc/nowhere/out",
    "device": "/dev/null", "run_itself": "a/results.json", "dangling": "dangling",
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTS)
def test_a_folder_that_cannot_be_written(kind: str, refuse: Refusal) -> None:
    """Neither files nor folders on the way to it are left."""
    a_run(refuse.folder / "a")
    refuse.file("", "file")
    (refuse.folder / "loop").symlink_to("loop")
    (refuse.folder / "dangling").symlink_to("nowhere")
    said = refuse(["compare", "a", "--out", OUTS[kind]], "--out: ", "is not allowed (", "); give a folder")
    assert len(said) < 400


def test_a_folder_that_may_not_be_written(refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(refuse.folder / "a")
    (refuse.folder / "closed").mkdir(mode=0o500)
    true_access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "closed" not in str(p) and true_access(p, mode))  # root may
    refuse(
        ["compare", "a", "--out", "closed/new"], "--out: 'closed/new' is not allowed (", "closed' may not be written"
    )


def fail_writes(after: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Have the disk turn read-only after so many files; return what is tried from here on."""
    true_write, tried = output.write_atomic, []

    def write(path: Path, content: bytes) -> None:
        tried.append(path)
        if len(tried) > after:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        true_write(path, content)

    monkeypatch.setattr(output, "write_atomic", write)
    return tried


@pytest.mark.parametrize("after", [0, 1, 3])
def test_nothing_is_left_where_writing_fails(after: int, refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that turns read-only between two files."""
    a_run(refuse.folder / "a")
    tried = fail_writes(after, monkeypatch)
    refuse(["compare", "a", "--out", "new/out"], "--out: 'new/out' is not allowed (Read-only file system)")
    refuse(["compare", "a"], "comparison' is not allowed (Read-only file system)")
    assert len(tried) >= 2


def test_what_was_there_is_set_aside(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    out = tmp_path / "out"
    for _ in range(3):
        assert main(["compare", str(tmp_path / "a"), "--out", str(out)]) == 0
    wanted = {f"comparison{k}.{end}" for k in ("", "-1", "-2") for end in ("md", "csv", "tex")}
    assert {p.name for p in out.iterdir()} == wanted | {"l2.png", "l2-1.png", "l2-2.png"}
    assert not any(p.stat().st_mode & 0o077 == 0 for p in out.iterdir())  # nor is a file its owner's alone


def no_dict(runs: dict[str, Path]) -> Any:
    return 3


def no_figure(runs: dict[str, Path]) -> Any:
    return {"x": "a figure"}


def key_error(runs: dict[str, Path]) -> Any:
    return {}["a\nkey"]


def leaves(runs: dict[str, Path]) -> Any:
    sys.exit(3)


def endless(runs: dict[str, Path]) -> Any:
    return endless(runs)


def too_large(runs: dict[str, Path]) -> dict[str, Figure]:
    return {"large": new_figure(size=(1e6, 1e6))[0]}


def bad_mathematics(runs: dict[str, Path]) -> dict[str, Figure]:
    figure, axes = new_figure()
    axes[0, 0].set_title(r"$\nothing{$")
    return {"mathematics": figure}


FAILING = {
    no_dict: "TypeError", no_figure: "AttributeError", key_error: r"KeyError: 'a\nkey'", leaves: "SystemExit: 3",
    endless: "RecursionError", too_large: "ValueError", bad_mathematics: "ValueError",
}  # fmt: skip
OWN = "somebodys_own.compare_figures"


@pytest.mark.parametrize("function", FAILING, ids=lambda f: f.__name__)
def test_figures_of_ones_own_that_fail(function: Any, refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the function, and where it failed; nothing is written."""
    module = type(sys)("somebodys_own")
    module.compare_figures = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_own", module)
    a_run(refuse.folder / "a", WHOLE | {"comparison_figures": OWN})
    said = refuse(["compare", "a"], f"compare: {OWN} failed", FAILING[function], "nothing was written")
    if function is key_error:
        line = key_error.__code__.co_firstlineno + 1
        assert f" at test_output.py, line {line} (" in said


def test_a_module_of_ones_own_that_fails(refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(refuse.folder))
    a_run(refuse.folder / "a", WHOLE | {"comparison_figures": "broken_of_mine.compare_figures"})
    refuse.file("x = 1 +\n", "broken_of_mine.py")
    refuse(["compare", "a"], "compare: broken_of_mine.compare_figures failed", "SyntaxError")


def test_a_module_of_ones_own_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control: a run from elsewhere is compared without its own figures, which is said."""
    a_run(tmp_path / "a", WHOLE | {"comparison_figures": "nowhere_at_all.compare_figures"})
    assert main(["compare", str(tmp_path / "a")]) == 0
    assert "no figures by nowhere_at_all.compare_figures: No module named" in capsys.readouterr().err


def test_a_picture_that_fails_comes_before_the_first_file(
    refuse: Refusal, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    a_run(refuse.folder / "a")
    before = tree(refuse.folder)

    def fail(figure: Figure) -> bytes:
        raise MemoryError

    monkeypatch.setattr(report, "png", fail)
    assert main(["compare", "a"]) == 1
    assert capfd.readouterr().err.startswith("error: there is not enough memory")
    assert tree(refuse.folder) == before


FLAGS = [
    (["--nonsense"], "--nonsense: no such flag; give --baseline, --out, --html"),
    (["--ou", "x"], "--ou: no such flag; give --baseline, --out, --html; did you mean '--out'?"),
    (["--basline=x"], "--basline: no such flag; give --baseline, --out, --html; did you mean '--baseline'?"),
    (["-x"], "-x: no such flag; give --baseline, --out, --html; a run of that name is ./-x"),
    (["--out"], "--out: a value is missing; give a folder"),
    (["--baseline", "--out", "x"], "--baseline: a value is missing; give the label"),
    (["--baseline", "-zzz"], "--baseline: '-zzz' fits 0 of the runs; give one of 'a'"),
]


@pytest.mark.parametrize(("words", "says"), FLAGS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_flags(words: list[str], says: str, refuse: Refusal) -> None:
    a_run(refuse.folder / "a")
    assert refuse(["compare", "a", *words]).startswith(f"error: {says}")
    assert refuse(["compare", *words, "a"][: None if len(words) > 1 or "=" in words[0] or words == ["-x"] else 2])


def test_names_that_look_like_flags(refuse: Refusal) -> None:
    """Negative control: a value may begin with a dash, and runs may stand on both sides of a flag."""
    for name in ("-x", "--y", "z"):
        a_run(refuse.folder / name, WHOLE | {"label": name})
    assert main(["compare", "./-x", "--out", "-o", "z", "--baseline", "-x", "--", "--y"]) == 0
    text = (refuse.folder / "-o" / "comparison.md").read_text(encoding="utf-8")
    assert "run minus -x" in text
    assert "| --y |" in text
    refuse(["compare"], "compare: RUN_OR_FOLDER is required; give run folders")


def test_a_comparison_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    a_run(tmp_path / "runs" / "a")
    a_run(tmp_path / "runs" / "b", WHOLE | {"label": "b"})
    assert imported(("compare", "runs"), tmp_path) == []
    assert (tmp_path / "runs" / "comparison" / "l2.png").is_file()
