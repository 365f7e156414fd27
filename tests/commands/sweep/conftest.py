from __future__ import annotations

import pytest


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Note what is compared in place of drawing it."""
    found: list[list[str]] = []
    note = lambda folder, runs: found.append([f"{folder.parent.name}/{r.name}" for r in runs])  # noqa: E731
    monkeypatch.setattr("lightning_toys.commands.compare.report.compare_folder", note)
    return found
