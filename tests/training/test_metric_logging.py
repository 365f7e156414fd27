"""Intervals that are logged: of errors those of the geometric mean, which reach no 0; of shares within [0, 1]."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_toys.bilevel import WindowRegression
from lightning_toys.flow_vs_regression import FlowVsRegression
from lightning_toys.generative_policy import BanditPolicy, GaussianPolicy, MeanFlowPolicy
from lightning_toys.mirror_descent import LearnedSampling, MixtureSampling
from lightning_toys.stats import geometric_ci, mean_ci, share_ci
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


def test_bands_of_shares_lie_between_0_and_1() -> None:
    """Three seeds off by .01, .02 and .2 of 1000 samples; and a choice that one seed of three made."""
    values = {"eval/off3": [0.01, 0.02, 0.2], "modes/chose_mode0": [1.0, 0.0, 0.0]}
    counts = {"eval/off3": 1000.0, "modes/chose_mode0": 1.0}
    row = FlowVsRegression(seeds=[0, 1, 2]).scalars({k: torch.tensor(v) for k, v in values.items()}, counts)
    for name, found in values.items():
        low, high = row[f"interval/{name}/lo"], row[f"interval/{name}/hi"]
        expected = share_ci(found, counts[name])
        assert (low, high) == pytest.approx((expected.lo, expected.hi), rel=1e-5)
        assert mean_ci(found).lo < 0 < low <= sum(found) / 3 <= high <= 1
        assert row[name] == pytest.approx(sum(found) / 3)
        assert f"interval/{name}/geometric_mean" not in row


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (MeanFlowPolicy, ("tv", "sliced_w2", "sigma", "loss_unweighted")),
        (WindowRegression, ("outer_loss_all", "local_regret_all")),
        (GaussianPolicy, ("tv", "sliced_w2", "kl")),
        (BanditPolicy, ("regret",)),
        (LearnedSampling, ("score_error", "joint_kl@pc_ula")),
        (MixtureSampling, ("w1", "moment_kl@mala", "mode_tv")),
    ],
)
def test_no_band_of_what_is_positive_goes_below_0(module: type, names: tuple[str, ...]) -> None:
    row = module(seeds=[0, 1, 2]).scalars({f"eval/{n}": torch.tensor(ERRORS) for n in names})
    assert all(row[f"interval/eval/{n}/lo"] > 0 for n in names)
