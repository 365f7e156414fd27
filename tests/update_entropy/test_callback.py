"""UpdateEntropyCallback on somebody else's LightningModule, with automatic optimisation and the Trainer's clipping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy import callback as under_test
from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Hyperparameters, Moments
from lightning_toys.update_entropy.callback import UpdateEntropyCallback
from lightning_toys.update_entropy.entropy_derivatives import sequence_entropy_gradients
from lightning_toys.update_entropy.policy import TinyPolicy
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.step_prediction import PredictionSettings, predict_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    # an interval of logging beyond the run's few steps
    "ignore:The number of training batches.*",
)


class Imitation(LightningModule):
    """Somebody's training of a small language model: a learned scale beside the policy, two groups, AdamW."""

    entropy_ends = (2,)
    entropy_length = 6

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.lm = TinyPolicy("gpt2", hidden=16, layers=1, heads=2, lora_rank=0).build(0, 9, 16)
        g = torch.Generator().manual_seed(0)
        for p in self.lm.parameters():
            p.data += 0.2 * torch.randn(p.shape, generator=g)
        self.scale = nn.Parameter(torch.ones(()))
        self.kind = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.lm(input_ids=batch, labels=batch).loss
        return loss * self.scale.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        groups = [{"params": self.lm.parameters(), "lr": 3e-3}, {"params": [self.scale], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        rows = torch.from_numpy(np.random.default_rng(0).integers(3, 9, (24, 8)))
        return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]

    def entropy_policies(self) -> list[tuple[int, nn.Module]]:
        return [(0, self.lm)]

    def entropy_prompts(self, seed: int, step: int, stream: str, count: int) -> list[list[int]]:
        return [[3 + i % 5] for i in range(count)]


def fit(folder: Path, module: LightningModule, watch: UpdateEntropyCallback, **options: Any) -> Path:
    logger = CSVLogger(folder, name="", version="run")
    trainer = Trainer(
        max_steps=6, logger=logger, callbacks=[watch], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu", **options,
    )  # fmt: skip
    trainer.fit(module)
    return Path(logger.log_dir) / "metrics.csv"


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_predicted_step_is_the_step_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None
) -> None:
    module, steps, places = Imitation(), [], []
    real = under_test.restrict_to_policy

    def noted(model: nn.Module, *rest: Any) -> AdamWStep:
        step = real(model, *rest)
        steps.append(step)
        places.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return step

    monkeypatch.setattr(under_test, "restrict_to_policy", noted)
    watch = UpdateEntropyCallback(prompts=6, measure_prompts=0)
    fit(tmp_path, module, watch, gradient_clip_val=clip)
    assert len(steps) == 6
    assert watch.num_predictions == 6
    assert watch.seconds > 0
    if clip is not None:
        assert min(s.clip_scale for s in steps) < 1
    after = [*places[1:], {n: p.detach() for n, p in module.lm.named_parameters()}]
    for step, before, then in zip(steps, places, after, strict=True):
        for name, v in step.direction.items():
            assert torch.allclose(then[name] - before[name], step.eta * v, atol=3e-7, rtol=1e-4), name


class FivePrompts(Imitation):
    """The same, where its five prompts are all that there are: errors are those of the responses to them."""

    def entropy_clusters(self, responses: Sequences) -> list[int]:
        return list(range(len(responses)))


def test_prediction_and_measurement_agree(tmp_path: Path) -> None:
    """Entropy falls as the policy learns to imitate: both say so, within their errors."""
    path = fit(tmp_path, FivePrompts(), UpdateEntropyCallback(prompts=200, measure_prompts=200))
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="")
    rows = {
        k: table[f"entropy_step/{k}"]
        for k in ("predicted", "predicted_se", "measured", "measured_se", "momentum", "decay", "batch")
    }
    assert len(rows["predicted"]) == 6
    z = (rows["predicted"] - rows["measured"]) / np.hypot(rows["predicted_se"], rows["measured_se"])
    assert np.abs(z).max() < 4
    assert np.abs(rows["measured"] / rows["measured_se"]).max() > 3  # there is something to predict
    assert rows["momentum"] + rows["decay"] + rows["batch"] == pytest.approx(rows["predicted"], rel=1e-4)
    assert rows["momentum"][0] == 0  # nothing is remembered before the first step
    assert np.all(table["step"] == np.arange(1, 7))


def test_prompts_that_repeat_are_one_cluster_of_the_errors(tmp_path: Path) -> None:
    """As the probe counts them; of one prompt alone the errors are those of its responses."""
    module, watch = Imitation(), UpdateEntropyCallback(prompts=30, measure_prompts=40)
    responses = watch.sample_responses(module, module.lm, 0, 1, "predict", 30)
    assert responses.prompt_index == [i % 5 for i in range(30)]
    assert len({tuple(r) for r in responses.responses[::5]}) > 1  # of one prompt, and yet drawn apart
    gradients = {n: torch.ones_like(p) for n, p in module.lm.named_parameters()}
    state = AdamWState(
        {n: Hyperparameters() for n in gradients},
        {n: Moments.zeros_like(p.detach()) for n, p in module.lm.named_parameters()},
    )
    step = AdamWStep.from_gradient(dict(module.lm.named_parameters()), gradients, state)
    found = predict_step(module.lm, step, responses, None, PredictionSettings(second_order=False)).metrics
    slope = sequence_entropy_gradients(module.lm, responses, "token", 1.0, 32).directional_derivative(step.direction)
    sums = torch.zeros(5, dtype=torch.float64).index_add_(0, torch.arange(30) % 5, slope.influence)
    by_hand = step.eta * math.sqrt(5 / 4 * float(sums.square().sum()))
    assert found["predicted_se"] == pytest.approx(by_hand, rel=1e-9)
    apart = step.eta * math.sqrt(30 / 29 * float(slope.influence.square().sum()))
    assert by_hand != pytest.approx(apart, rel=0.05)

    class Alone(Imitation):
        def entropy_prompts(self, seed: int, step: int, stream: str, count: int) -> list[list[int]]:
            return [[3]] * count

    own = FivePrompts()
    assert watch.sample_responses(own, own.lm, 0, 1, "predict", 30).prompt_index == list(range(30))
    path = fit(tmp_path, Alone(), UpdateEntropyCallback(prompts=8, measure_prompts=8))
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="")
    assert len(table) == 6
    for name in ("predicted_se", "measured_se", "second_order_se"):
        assert np.all(table[f"entropy_step/{name}"] > 0)


def test_every_n_steps_from_the_first_on(tmp_path: Path) -> None:
    path = fit(
        tmp_path, Imitation(), UpdateEntropyCallback(every_n_steps=2, first_step=2, prompts=4, measure_prompts=4)
    )
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="")
    assert table["step"].tolist() == [4, 6]


def test_other_modules_and_optimisers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ToyError, match="SGD; its step is not AdamW's"):
        fit(tmp_path / "a", Imitation("sgd"), UpdateEntropyCallback(prompts=4))
    with pytest.raises(ToyError, match="LightningModule offers no entropy_policies"):
        UpdateEntropyCallback().source(LightningModule())
    with pytest.raises(ToyError, match="gradient_clip_algorithm 'value' is not allowed"):
        fit(
            tmp_path / "b",
            Imitation(),
            UpdateEntropyCallback(prompts=4),
            gradient_clip_val=1.0,
            gradient_clip_algorithm="value",
        )
    with pytest.raises(ToyError, match="every_n_steps: 0 is not allowed"):
        UpdateEntropyCallback(every_n_steps=0)
    with pytest.raises(ToyError, match="prompts: 1 is not allowed"):
        UpdateEntropyCallback(prompts=1)


class NoCache(nn.Module):
    """A language model of one's own, which returns logits and knows nothing of transformers' arguments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


def test_a_policy_of_another_interface_is_refused_before_training(tmp_path: Path) -> None:
    module = Imitation()
    module.lm = NoCache(module.lm)
    before = [p.detach().clone() for p in module.parameters()]
    said = "NoCache is no causal language model of transformers' interface .*TypeError: .*attention_mask"
    with pytest.raises(ToyError, match=said):
        fit(tmp_path, module, UpdateEntropyCallback(first_step=4, prompts=4))
    assert module.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
