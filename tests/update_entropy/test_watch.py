"""The callback's numbers recomputed from the weights before and after each step; steps that it cannot predict."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from scipy.stats import t
from torch import Tensor, nn

from lightning_toys.update_entropy.callback import UpdateEntropyCallback
from lightning_toys.update_entropy.derivatives import perturbed, score_jvp
from lightning_toys.update_entropy.estimators import (
    Estimate,
    clustered_standard_error,
    entropy,
    entropy_derivative,
    prefix_importance_sampling,
)
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.rollouts import generate, uniforms
from lightning_toys.update_entropy.sequences import Sequences, prompt_clusters
from tests.update_entropy.test_callback import Imitation, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches.*",
)
LR, DECAY, TEMPERATURE = 3e-3, 0.3, 0.6
WARNING = "is not the one predicted"


class DoubleImitation(Imitation):
    """The imitation in double precision, at a temperature; it notes the policy's weights before each step."""

    entropy_temperature = TEMPERATURE

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.places: list[dict[str, Tensor]] = []

    def held(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.held(), lr=LR, weight_decay=DECAY)

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.lm.named_parameters()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.places.append(self.weights())


class Part(DoubleImitation):
    """The optimiser holds a part of the trainable parameters."""

    def held(self) -> list[nn.Parameter]:
        return [self.scale, *(p for n, p in self.lm.named_parameters() if "mlp" in n)]


class Unused(DoubleImitation):
    """A parameter of the policy is stepped, but has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.lm.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))


class Two(DoubleImitation):
    """Two optimisers, each with a part of the policy."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        mine = [p for n, p in self.named_parameters() if "mlp" in n]
        rest = [p for n, p in self.named_parameters() if "mlp" not in n]
        return [torch.optim.AdamW(x, lr=LR, weight_decay=DECAY) for x in (mine, rest)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        a, b = self.optimizers()
        for optimizer in (a, b):
            optimizer.zero_grad()
        self.manual_backward(loss)
        a.step()
        b.step()
        return loss


class Fused(DoubleImitation):
    """A policy with fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.lm.set_attn_implementation("sdpa")


class ClipsItself(Imitation):
    """Gradients change in the module's own hook, after the callbacks'."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.01 if self.global_step else 1.0)


class ClipsOtherwise(Imitation):
    """The module takes a bound of its own, whatever the Trainer was told."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **options: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.01 if self.global_step else 1.0)


def read(path: Path) -> dict[str, np.ndarray]:
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="")
    return {n.removeprefix("entropy_step/"): table[n] for n in table.dtype.names}


def generated(module: DoubleImitation, step: int, stream: str, count: int, temperature: float) -> Any:
    asked = module.entropy_prompts(0, step, stream, count)
    u = uniforms(0, step, f"tokens/{stream}", range(count), module.entropy_length)
    found = generate(module.lm, asked, range(count), u, module.entropy_ends, temperature)
    return replace(found, prompt_index=prompt_clusters(found))  # errors are those of prompts, some of which are equal


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in (DoubleImitation, Part, Unused, Two, Fused)),
        *((kind, {"gradient_clip_val": 0.05}) for kind in (DoubleImitation, Part, Unused)),
        (DoubleImitation, {"accumulate_grad_batches": 2}),
    ],
)
def test_every_number_of_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: type[DoubleImitation], options: dict[str, Any]
) -> None:
    """Responses are the module's, at its temperature; the step is the one that the optimiser took."""
    module = kind()
    watch = UpdateEntropyCallback(prompts=7, measure_prompts=9, chunk=4, kind="sequence" if kind is Fused else "token")
    assert watch.response_temperature(module) == TEMPERATURE
    found = read(fit(tmp_path, module, watch, **options))
    assert len(found["predicted"]) == len(module.places) == 6
    check(module, watch, found, TEMPERATURE)
    assert found["missed"].max() < 1e-8
    assert WARNING not in capsys.readouterr().err


def check(
    module: DoubleImitation, watch: UpdateEntropyCallback, found: dict[str, np.ndarray], temperature: float
) -> None:
    for k, (before, after) in enumerate(pairwise([*module.places, module.weights()])):
        step = int(found["step"][k])
        module.lm.load_state_dict(before, strict=False)
        v = {n: after[n] - x for n, x in before.items()}
        asked = generated(module, step, "predict", watch.prompts, temperature)
        scores = evaluate(module.lm, asked, temperature)

        def derivative_along(direction: dict[str, Tensor]) -> Estimate:
            return entropy_derivative(scores, *score_jvp(module.lm, asked, direction, temperature), watch.kind)  # noqa: B023

        still = {n for n, d in v.items() if not bool(d.any())}
        decay = {n: -LR * DECAY * x * (n not in still) for n, x in before.items()}
        wanted = {"predicted": derivative_along(v), "decay": derivative_along(decay)}
        fresh = generated(module, step, "measure", watch.measure_prompts, temperature)
        here, there = (evaluate(module.lm, fresh, temperature, p) for p in (None, perturbed(before, v, 1.0)))
        wanted["measured"] = prefix_importance_sampling(here, there, watch.kind).change
        d = 0.01  # of the step: the prefix-weighted change's second difference
        both = [
            prefix_importance_sampling(
                scores, evaluate(module.lm, asked, temperature, perturbed(before, v, s)), watch.kind
            )
            for s in (d, -d)
        ]
        influence = wanted["predicted"].influence + sum(x.change.influence for x in both) / (2 * d**2)
        bent = wanted["predicted"].value + sum(x.change.value for x in both) / (2 * d**2)
        assert found["second_order"][k] == pytest.approx(bent, rel=1e-4, abs=1e-8), step
        se = clustered_standard_error(influence, scores.prompt_index)[0]
        assert found["second_order_se"][k] == pytest.approx(se, rel=1e-4, abs=1e-8), step
        for name, x in wanted.items():
            assert found[name][k] == pytest.approx(x.value, rel=1e-6, abs=1e-11), (name, step)
            of = fresh if name == "measured" else asked
            se = clustered_standard_error(x.influence, torch.tensor(of.prompt_index))[0]
            assert found[f"{name}_se"][k] == pytest.approx(se, rel=1e-6, abs=1e-11), (name, step)
        assert found["entropy"][k] == pytest.approx(entropy(scores, watch.kind).value, rel=1e-9)
        rest = found["predicted"][k] - found["decay"][k] - found["momentum"][k]
        assert found["batch"][k] == pytest.approx(rest, rel=1e-6)
        assert asked.responses != fresh.responses[: len(asked)]
    assert abs(found["momentum"][-1]) > 0


def test_the_callbacks_own_temperature_comes_first(tmp_path: Path) -> None:
    module, watch = DoubleImitation(), UpdateEntropyCallback(prompts=6, measure_prompts=6, temperature=1.7)
    check(module, watch, read(fit(tmp_path, module, watch)), 1.7)


@pytest.mark.parametrize(
    ("kind", "options"), [(ClipsItself, {}), (ClipsOtherwise, {}), (ClipsOtherwise, {"gradient_clip_val": 5.0})]
)
def test_a_step_that_cannot_be_predicted_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: type[LightningModule], options: dict[str, Any]
) -> None:
    watch = UpdateEntropyCallback(prompts=4, measure_prompts=0)
    found = read(fit(tmp_path, kind(), watch, **options))
    assert (found["missed"] > 0.1).sum() > 2
    assert capsys.readouterr().err.count(WARNING) == 1


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}])
def test_single_precision_is_no_reason_to_warn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    found = read(fit(tmp_path, Imitation(), UpdateEntropyCallback(prompts=4, measure_prompts=0), **options))
    assert 0 < found["missed"].max() < 1e-2
    assert WARNING not in capsys.readouterr().err


class Hurried(DoubleImitation):
    """The same at a rate at which steps are bent; its five prompts are all that there are."""

    def entropy_clusters(self, responses: Sequences) -> list[int]:
        return list(range(len(responses)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.lm.parameters(), lr=0.004)


def test_a_long_step_is_predicted_with_its_curvature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the measured changes are further off than their errors allow."""
    watch = UpdateEntropyCallback(prompts=300, measure_prompts=300)
    found = read(fit(tmp_path, Hurried(), watch))
    z = {
        k: np.abs(found[k] - found["measured"]) / np.hypot(found[f"{k}_se"], found["measured_se"])
        for k in ("predicted", "second_order")
    }
    assert np.square(z["predicted"]).sum() > 12.6  # the 95 % quantile of chi-square with six degrees of freedom
    assert np.square(z["second_order"]).sum() < 12.6
    inside = int((z["second_order"] <= t.ppf(0.975, 299)).sum())
    said = f"{inside} of 6 measured changes are within the second-order prediction's 95 % interval (both errors)"
    assert said in capsys.readouterr().err


def test_the_curvature_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read(
        fit(tmp_path, DoubleImitation(), UpdateEntropyCallback(prompts=4, measure_prompts=4, second_order=False))
    )
    assert "second_order" not in found
    z = np.abs(found["predicted"] - found["measured"]) / np.hypot(found["predicted_se"], found["measured_se"])
    inside = int((z <= t.ppf(0.975, 3)).sum())  # of four prompts
    assert f"{inside} of 6 measured changes are within the first-order" in capsys.readouterr().err
