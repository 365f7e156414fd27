"""The moving average of weights: what it is an average of, by both ways of taking steps; short runs are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_toys.flow_vs_regression import FlowVsRegression, InterpolationData
from lightning_toys.generative_policy import Evaluation, MeanFlowPolicy, MixtureData, ThreeModes
from lightning_toys.generative_policy.metrics import sliced_w2
from lightning_toys.nets import Network
from lightning_toys.training.averaging import average_decay


def fit(module: Any, data: Any, steps: int) -> None:
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}
    Trainer(accelerator="cpu", devices=1, max_steps=steps, enable_checkpointing=False, **quiet).fit(module, data)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_initial_weights_share(decay: float) -> None:
    """n! 9! / (n + 9)! until the decay is met, and a power of the decay from there on."""
    met = math.ceil((10 * decay - 1) / (1 - decay) - 1e-9)  # the first n with (1 + n) / (10 + n) >= decay
    share, steps = 1.0, min(met, 40)
    for n in range(steps):
        share *= average_decay(decay, n)
    assert share == pytest.approx(1 / math.comb(steps + 9, 9), rel=1e-12)
    assert average_decay(decay, met - 1) < decay
    assert average_decay(decay, met) == average_decay(decay, 10 * met) == decay


class Recorded(FlowVsRegression):
    """Steps by autograd, and the weights after each."""

    def configure_optimizers(self) -> Any:
        optimizer: Any = super().configure_optimizers()
        self.seen: list[list[Tensor]] = [[p.detach().clone() for p in self.net.parameters()]]
        optimizer.register_step_post_hook(
            lambda *args: self.seen.append([p.detach().clone() for p in self.net.parameters()])
        )
        return optimizer


def test_it_is_the_average_of_the_weights_whichever_way_steps_are_taken() -> None:
    """Against sum_k (1 - d_k) prod_{j > k} d_j w_k, over two blocks of steps; the decay .6 is met after 13."""
    modules = [
        kind("flow", seeds=[3, 5], network=Network(hidden=8), ema_decay=0.6) for kind in (Recorded, FlowVsRegression)
    ]
    for module in modules:
        fit(module, InterpolationData(num_eval=50), 60)
    recorded, written_out = modules
    assert isinstance(recorded, Recorded)
    assert (recorded.backward_by, written_out.backward_by) == ("autograd", "written out")
    assert len(recorded.seen) == 61
    weight, weights = 1.0, []
    for n in reversed(range(60)):
        decay = min(0.6, (1 + n) / (10 + n))
        weights.append(weight * (1 - decay))
        weight *= decay
    weights = [weight, *reversed(weights)]
    assert sum(weights) == pytest.approx(1)
    wanted = [sum(w * p for w, p in zip(weights, row, strict=True)) for row in zip(*recorded.seen, strict=True)]
    for module in modules:
        assert module.ema_net is not None
        for found, one in zip(module.ema_net.parameters(), wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)


def test_a_short_runs_average_is_no_worse_than_its_raw_weights() -> None:
    """With the constant decay .999 a third of the initial weights is left after 1000 steps, nearly all after 150."""

    def distances(ema_warmup: bool = True) -> tuple[float, float]:
        evaluation = Evaluation(samples=2000, pairs=500, nfe=[1], weights="ema")
        module = MeanFlowPolicy(
            seeds=[0], network=Network(hidden=32, layers=3, activation="silu"), form="plain", lr=5e-3, ema_decay=0.999,
            evaluation=evaluation, ema_warmup=ema_warmup,
        )  # fmt: skip
        fit(module, MixtureData(ThreeModes(0.1)), 150)
        data = MixtureData(ThreeModes(0.1))
        truth = data.sample(0, 2000, "test/truth")
        found = []
        for weights in ("ema", "raw"):
            module.evaluation.weights = weights  # type: ignore[assignment]
            found.append(sliced_w2(module.sample(2000)[0].double(), truth))
        return found[0], found[1]

    average, raw = distances()
    assert average < 1.25 * raw
    average, again = distances(ema_warmup=False)
    assert again == raw
    assert average > 3 * raw
