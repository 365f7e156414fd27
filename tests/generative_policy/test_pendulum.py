"""The actor-critic of docs/generative_policy.md, as it stands on the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lightning_toys.generative_policy import PlainPolicy
from tests.conftest import REPO

pytest.importorskip("gymnasium")


def of_page() -> str:
    page = (REPO / "docs" / "generative_policy.md").read_text()
    found: list[str] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Pendulum-v1" in code]
    assert len(found) == 1
    return found[0]


def example() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(of_page(), "docs/generative_policy.md", "exec"), names)
    return names


def test_the_script_is_the_pages() -> None:
    script = (REPO / "docs" / "examples" / "pendulum.py").read_text()
    head, _, body = of_page().partition("\n\n\ndef train")
    assert f"\n\n\ndef train{body}" in script
    assert set(filter(None, head.splitlines())) <= set(script.splitlines())


def test_the_script_prints_means_of_episodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Returns 1, 2, ... 30 of each seed: the first ten have the mean 5.5, the last 25.5; torques at random -1200."""
    from docs.examples import pendulum

    monkeypatch.setattr(pendulum, "train", lambda steps, kind, seed: [float(k + seed) for k in range(1, 31)])
    monkeypatch.setattr(sys, "argv", ["pendulum.py", "--seeds", "0", "1", "--out", str(tmp_path / "table.md")])
    pendulum.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["uniform torques", "meanflow"]
    assert [float(cell.split(" ± ")[0]) for cell in lines[1][1:]] == [6.0, 26.0]
    assert -1700 < float(lines[0][1].split(" ± ")[0]) < -700
    assert (tmp_path / "table.md").read_text().endswith(" |\n")


@pytest.mark.parametrize("kind", ["meanflow", "gaussian"])
def test_the_pages_example_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An episode and a few updates: actions within the torque's bounds, losses that are finite and learned from."""
    seen: list[Tensor] = []
    plain = PlainPolicy.fit_loss

    def watched(self: PlainPolicy, action: Tensor, state: Tensor, step: int = 0) -> Tensor:
        assert action.abs().max() < 1
        assert action.shape == (128, 1)
        seen.append(plain(self, action, state, step))
        return seen[-1]

    monkeypatch.setattr(PlainPolicy, "fit_loss", watched)
    (found,) = example()["train"](steps=240, kind=kind)
    assert -2000 < found < 0  # 200 steps of at most -16.3
    losses = np.array([float(x.detach()) for x in seen])
    assert len(losses) == 40
    assert np.isfinite(losses).all()
