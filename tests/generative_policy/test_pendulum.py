"""The actor-critic of docs/generative_policy.md, as it stands on the page."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lightning_toys.generative_policy import PlainPolicy
from tests.conftest import REPO

pytest.importorskip("gymnasium")


def example() -> dict[str, Any]:
    page = (REPO / "docs" / "generative_policy.md").read_text()
    found = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Pendulum-v1" in code]
    assert len(found) == 1
    names: dict[str, Any] = {}
    exec(compile(found[0], "docs/generative_policy.md", "exec"), names)
    return names


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
