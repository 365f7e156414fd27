"""Made-up results for tests of recipes."""

from __future__ import annotations

from pathlib import Path


def write_results(folder: Path, text: str) -> None:
    """Write the results.json of a folder that is not there yet."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
