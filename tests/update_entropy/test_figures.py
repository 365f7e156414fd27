"""Bars of 95 % are Student's t by the prompts: in the drawing of a probe and of predicted steps."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from lightning_toys.plotting import new_figure
from lightning_toys.update_entropy.figures import draw_decomposition, draw_predictions, interval_factor, t_quantiles

T_2, T_4 = 4.302652729749464, 2.7764451051977987  # 97.5 % of Student's t of 2 and 4 degrees of freedom (tables)


def test_quantiles() -> None:
    assert t_quantiles(np.array([[3.0, 5.0], [1.0, 1e12]])) == pytest.approx(
        np.array([[T_2, T_4], [np.inf, 1.959963985]]), rel=1e-8
    )
    of = [SimpleNamespace(entropy=SimpleNamespace(prompts=n)) for n in (3, 1)]
    assert [interval_factor(e) for e in of] == pytest.approx([T_2, 0.0])  # type: ignore[arg-type]


def drawn(update_se: dict[str, float]) -> list[float]:
    """Return the half widths of the bars of a probe of five prompts of E and three of U, in the order drawn."""
    derivatives = dict.fromkeys(("full", "momentum", "decay", "grad"), (1.0, 0.5))
    e = SimpleNamespace(entropy=SimpleNamespace(prompts=5), derivatives=derivatives, update_se=update_se)
    _, axes = new_figure(1, 1, size=(4, 3))
    update = SimpleNamespace(sequences=SimpleNamespace(prompt_index=[1, 1, 2, 3]))
    result: Any = SimpleNamespace(evaluations=[e], update=update)
    draw_decomposition(axes[0, 0], result, "nats")
    bars = [c for c in axes[0, 0].containers if isinstance(c, ErrorbarContainer)]
    ends = [bar.lines[2][0].get_segments()[0][:, 1] for bar in bars]
    return [float(high - low) / 2 for low, high in ends]


def test_the_bars_of_a_probe_are_students() -> None:
    assert drawn({}) == pytest.approx([0.5 * T_4] * 4)


def test_the_bars_of_a_probe_have_both_errors() -> None:
    """Beside E's bar the one of both draws: its errors add up as squares, its t is that of U's prompts."""
    both = (0.5**2 + 1.2**2) ** 0.5 * T_2
    assert drawn({"full": 1.2}) == pytest.approx([0.5 * T_4, both, *[0.5 * T_4] * 3])


@pytest.mark.parametrize(("clusters", "share"), [(3, "100%"), (None, "0%"), (1000, "0%")])
def test_the_share_within_is_students(tmp_path: Path, clusters: int | None, share: str) -> None:
    """Off by three errors of both: within the interval of three prompts, not within a normal one."""
    row = {"predicted": 9.0, "predicted_se": 1.0, "second_order": 0.0, "second_order_se": 3.0, "measured": 15.0,
           "measured_se": 4.0, "momentum": 0.0, "decay": 0.0, "batch": 9.0}  # fmt: skip
    row |= {} if clusters is None else {"clusters": float(clusters)}
    with (tmp_path / "metrics.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["step", *(f"entropy_step/{k}" for k in row)])
        writer.writerows([[step, *row.values()] for step in (1, 2, 3)])
    (figure,) = draw_predictions(tmp_path, [0]).values()
    title = figure.axes[0].get_title()
    assert f"second-order prediction's 95 % interval (both errors) at {share} of 3 steps" in title
    assert "sums (± one s.e.): 0.0000 ± 5.1962 predicted, 45.0000 ± 6.9282 measured" in title
