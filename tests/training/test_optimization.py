"""Optimisers of somebody's own keep their rates; those of the package take the rates that are given."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import FlowVsRegression, InterpolationData
from lightning_toys.nets import Network


class Own(FlowVsRegression):
    """Trained by SGD, its first layer at another rate."""

    first, rest = 0.5, 0.02

    def __init__(self, **settings: Any) -> None:
        super().__init__(seeds=[3, 5], network=Network(hidden=8), **settings)

    def configure_optimizers(self) -> Any:
        net: Any = self.net
        chosen = list(net.first.parameters())
        others = [p for p in net.parameters() if all(p is not q for q in chosen)]
        groups = [{"params": chosen, "lr": self.first}, {"params": others, "lr": self.rest, "weight_decay": 0.1}]
        return torch.optim.SGD(groups, momentum=0.9)


class Cosine(Own):
    def __init__(self) -> None:
        super().__init__()
        self.lr_decay = "cosine"


class Several(Own):
    def configure_optimizers(self) -> Any:
        return [super(Several, self).configure_optimizers() for _ in range(2)]


class Scheduled(Own):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(module: FlowVsRegression, steps: int, whole: int | None = None, **settings: Any) -> Trainer:
    """Train to a step, of a run of ``whole`` steps."""
    quiet: Any = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, enable_checkpointing=False, **quiet)
    if whole is not None:
        module.decayed = lambda step: 0.5 * (1 + math.cos(math.pi * step / whole))  # type: ignore[method-assign]
    trainer.fit(module, InterpolationData(num_eval=20), **settings)
    return trainer


def rates(trainer: Trainer) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups]


def test_an_optimiser_of_ones_own_keeps_its_rates() -> None:
    """And steps by them: of two runs one step long, the one at twice the rates goes twice as far."""
    start = Own()
    start.sizes = start.measure(InterpolationData(num_eval=20))
    start.configure_model()
    moved = []
    for factor in (1, 2):
        module = Own(lr=0.01, weight_decay=0.3)
        module.first, module.rest = factor * Own.first, factor * Own.rest
        assert rates(fit(module, 1)) == [(factor * 0.5, 0), (factor * 0.02, 0.1)]
        moved.append([p - q for p, q in zip(module.net.parameters(), start.net.parameters(), strict=True)])
    for one, two in zip(*moved, strict=True):
        torch.testing.assert_close(two, 2 * one)
        assert one.abs().max() > 1e-4


@pytest.mark.parametrize("kind", [Own, Cosine])
def test_it_goes_on_bit_for_bit(kind: Callable[[], Own], tmp_path: Path, bitwise: Callable[..., None]) -> None:
    whole, cut, resumed = kind(), kind(), kind()
    states = [fit(whole, 20, 20).optimizers[0].state_dict()]
    fit(cut, 7, 20).save_checkpoint(tmp_path / "cut.ckpt")
    states.append(fit(resumed, 20, 20, ckpt_path=str(tmp_path / "cut.ckpt")).optimizers[0].state_dict())
    bitwise(*(dict(module.net.state_dict()) for module in (whole, resumed)))
    bitwise(*states)


def test_a_checkpoint_without_moments_fits_an_optimiser_of_ones_own(tmp_path: Path) -> None:
    """Plain SGD keeps nothing; the package's AdamW has moments once it has taken a step, and a file without is cut."""
    own, ours = Own(), FlowVsRegression(seeds=[3, 5], network=Network(hidden=8))
    for module, said in ((own, ""), (ours, "optimizer_states holds no moments, at step 3")):
        fit(module, 3).save_checkpoint(tmp_path / "a.ckpt")
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        checkpoint["optimizer_states"][0]["state"] = {}
        net = copy.deepcopy(module.net)
        assert module.optimizer_mismatch(checkpoint, net) == said
    assert "groups" in own.optimizer_mismatch(checkpoint, net)


def test_cosine_takes_every_rate_of_its_own_to_0() -> None:
    module = Cosine()
    trainer = fit(module, 10)
    last = 0.5 * (1 + math.cos(0.9 * math.pi))  # of step 9, the last of ten
    assert [rate for rate, _ in rates(trainer)] == pytest.approx([0.5 * last, 0.02 * last])
    assert module.rate_at(5) == pytest.approx(0.25)


def test_the_rates_of_the_packages_optimiser_are_those_given(tmp_path: Path) -> None:
    settings: Any = {"seeds": [3, 5], "network": Network(hidden=8)}
    fit(FlowVsRegression(**settings), 3).save_checkpoint(tmp_path / "first.ckpt")
    module = FlowVsRegression(**settings, lr=0.125, weight_decay=0.25)
    assert rates(fit(module, 5, ckpt_path=str(tmp_path / "first.ckpt"))) == [(0.125, 0.25)]


def test_several_optimisers_and_schedulers(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ToyError, match=r"^Several.configure_optimizers gives several optimisers; give one, of several"):
        fit(Several(), 1)
    assert "scheduler" not in capfd.readouterr().err
    fit(Scheduled(), 1)
    assert "Scheduled.configure_optimizers: nothing steps its scheduler but your own code" in capfd.readouterr().err
