"""Intervals that are logged: of errors those of the geometric mean, which reach no 0."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_toys.flow_vs_regression import FlowVsRegression
from lightning_toys.stats import geometric_ci, mean_ci
from lightning_toys.training.tensorboard_layout import layout_of

ERRORS = [0.01, 0.012, 0.4]  # one bad seed: the arithmetic mean's interval begins below 0


@pytest.mark.parametrize("name", ["eval/l2", "eval/l1@zeros/euler-9", "train/loss"])
def test_bands_of_errors_are_geometric(name: str) -> None:
    row = FlowVsRegression(seeds=[0, 1, 2]).scalars({name: torch.tensor(ERRORS, dtype=torch.float64)})
    expected = geometric_ci(ERRORS)
    assert expected is not None
    assert row[name] == pytest.approx(sum(ERRORS) / 3)
    assert mean_ci(ERRORS).lo < 0 < expected.lo
    assert row[f"interval/{name}/geometric_mean"] == pytest.approx(math.exp(sum(map(math.log, ERRORS)) / 3))
    assert (row[f"interval/{name}/lo"], row[f"interval/{name}/hi"]) == pytest.approx((expected.lo, expected.hi))


def test_others_are_arithmetic_and_an_exact_zero_too() -> None:
    module = FlowVsRegression(seeds=[0, 1, 2])
    row = module.scalars({"eval/subspace_alignment": torch.tensor(ERRORS), "eval/l2": torch.tensor([0.0, 0.1, 0.2])})
    assert "interval/eval/subspace_alignment/geometric_mean" not in row
    assert row["interval/eval/subspace_alignment/lo"] == pytest.approx(mean_ci(ERRORS).lo, rel=1e-5)
    assert row["interval/eval/l2/geometric_mean"] == pytest.approx(0.1)
    assert row["interval/eval/l2/lo"] == pytest.approx(mean_ci([0.0, 0.1, 0.2]).lo, rel=1e-5)
    charts = layout_of(module.interval_names, module.seeds)["mean and 95 % interval over 3 seeds"]
    assert charts["eval/l2"][1][0] == "interval/eval/l2/geometric_mean"
    assert charts["eval/subspace_alignment"][1][0] == "eval/subspace_alignment"
