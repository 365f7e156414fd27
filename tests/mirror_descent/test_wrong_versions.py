"""Every wrong version is caught, by more errors than a family of some hundred rows allows; the right one is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_toys.mirror_descent.wrong_versions import WRONG_VERSIONS, WrongVersion, largest, main

QUICK = 3  # of them in the gate; the others have tests of their own


@pytest.mark.parametrize(
    "version",
    [pytest.param(v, marks=[pytest.mark.slow] if i >= QUICK else []) for i, v in enumerate(WRONG_VERSIONS)],
    ids=lambda v: f"{v.words}, {v.problem_name}",
)
def test_wrong_versions_are_caught(version: WrongVersion) -> None:
    seeds = range(4)
    assert abs(largest(version, version.right, seeds, 1).z) < 4.5
    assert abs(largest(version, version.wrong, seeds, 1).z) > 6


def test_a_file_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "table.md"
    there.write_text("mine")
    for out in (there, tmp_path / "nowhere" / "table.md"):
        assert main(["--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --out: '{out}' is not allowed; give a new file")
    assert there.read_text() == "mine"
