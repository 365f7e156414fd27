"""EntropyProbe in transformers' Trainer, and in TRL's where that is installed: what it predicts is what happens."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.derivatives import score_jvp  # noqa: E402
from lightning_toys.update_entropy.estimators import entropy, entropy_derivative, prefix_importance_sampling  # noqa: E402
from lightning_toys.update_entropy.forward import evaluate  # noqa: E402
from lightning_toys.update_entropy.hf import EntropyProbe, PromptSampler, plain_forward, unwrapped  # noqa: E402
from lightning_toys.update_entropy.sequences import Sequences  # noqa: E402
from tests.conftest import REPO  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def example() -> Any:
    path = REPO / "docs" / "examples" / "entropy" / "trainer_probe.py"
    spec = importlib.util.spec_from_file_location("trainer_probe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer_probe"] = module
    spec.loader.exec_module(module)
    return module


def rows(trainer: Any) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [r for r in trainer.state.log_history if "entropy_step/predicted" in r]
    return found


@pytest.fixture(scope="module")
def run(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return example.main(str(tmp_path_factory.mktemp("run")))


def test_predictions_are_in_the_trainers_log(run: Any) -> None:
    found = rows(run)
    assert [r["step"] for r in found] == [2, 4, 6]
    names = {"predicted", "momentum", "decay", "batch", "second_order", "measured"}
    for r in found:
        assert {f"entropy_step/{n}{end}" for n in names for end in ("", "_se")} <= set(r)
        parts = sum(r[f"entropy_step/{n}"] for n in ("momentum", "decay", "batch"))
        assert parts == pytest.approx(r["entropy_step/predicted"], rel=1e-4, abs=1e-9)
        assert r["entropy_step/missed"] < 1e-3  # clipping, decay and the schedule's rate are all accounted for
        z = (r["entropy_step/second_order"] - r["entropy_step/measured"]) / math.hypot(
            r["entropy_step/second_order_se"], r["entropy_step/measured_se"]
        )
        assert abs(z) < 3.5
    assert max(abs(r["entropy_step/measured"]) / r["entropy_step/measured_se"] for r in found) > 3  # something happens
    losses = [r for r in run.state.log_history if "loss" in r]
    assert [r["step"] for r in losses] == [2, 4, 6]  # the Trainer's own lines are all there
    assert all(r["grad_norm"] > 0 for r in losses)


def test_the_training_is_the_same_bit_by_bit_without_it(
    run: Any, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.EntropyProbe, "attach", lambda self, trainer: self)
    plain = example.main(str(tmp_path))
    assert rows(plain) == []
    weights = plain.model.state_dict()
    assert weights
    assert all(torch.equal(p, weights[n]) for n, p in run.model.state_dict().items())
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (plain, run)]
    assert losses[0] == losses[1]


class Recomputed(EntropyProbe):
    """Notes weights before and after each step, and the responses."""

    def __init__(self, sampler: Any, **settings: Any) -> None:
        self.drawn: list[Sequences] = []
        self.places: list[dict[str, Tensor]] = []

        def noted(model: nn.Module, step: int, stream: str, count: int) -> Sequences:
            self.drawn.append(sampler(model, step, stream, count))
            return self.drawn[-1]

        super().__init__(noted, temperature=sampler.temperature, **settings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].enable_input_require_grads()  # as TRL does by default: no forward mode passes that hook
        super().on_train_begin(args, state, control, **kwargs)

    def place(self, model: nn.Module) -> None:
        self.places.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.place(kwargs["model"])
        super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.place(kwargs["model"])
        super().on_optimizer_step(args, state, control, **kwargs)


@pytest.mark.parametrize("keep", [True, False])
def test_numbers_recomputed_from_the_weights(
    keep: bool, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the difference of the weights alone, at a temperature; accumulated gradients and bf16 autocast."""
    sampler = PromptSampler(example.PROMPTS, 5, ends=[2], temperature=0.7, seed=3)
    probe = Recomputed(sampler, prompts=8, measure_prompts=8, keep_gradients=keep, every_n_steps=2)
    monkeypatch.setattr(example, "EntropyProbe", lambda *args, **settings: probe)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2, "bf16": True, "optim": "adamw_torch"}
    trainer = example.main(str(tmp_path), **settings)
    (row,), model = rows(trainer), trainer.model
    assert "_original_forward" in model.__dict__  # accelerate's autocast was there to be left out
    assert len(model.get_input_embeddings()._forward_hooks) == 1  # and is back in its place
    before, after = probe.places[-2:]
    predict, measure = probe.drawn[-2:]
    change = {n: after[n] - before[n] for n in before}
    model.load_state_dict(before)
    with plain_forward(model):
        scores = evaluate(model, predict, 0.7)
        slope = entropy_derivative(scores, *score_jvp(model, predict, change, 0.7))
        moved = [evaluate(model, measure, 0.7, x) for x in (before, after)]
    wanted = prefix_importance_sampling(*moved).change
    assert row["entropy_step/entropy"] == pytest.approx(entropy(scores).value, rel=1e-9)
    assert row["entropy_step/predicted"] == pytest.approx(slope.value, rel=1e-2, abs=1e-5)
    assert row["entropy_step/predicted_se"] == pytest.approx(slope.se, rel=1e-2)
    assert row["entropy_step/measured"] == pytest.approx(wanted.value, rel=1e-6, abs=1e-9)
    assert row["entropy_step/measured_se"] == pytest.approx(wanted.se, rel=1e-6)
    assert row["entropy_step/missed"] < 1e-3


def test_without_a_trainer_the_log_history_has_it(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.EntropyProbe, "attach", lambda self, trainer: trainer.add_callback(self))
    trainer = example.main(str(tmp_path), max_steps=2)
    (row,) = rows(trainer)
    assert row["step"] == 2
    assert row["epoch"] > 0


def test_prompts_are_ids_texts_or_chats() -> None:
    class Letters:
        eos_token_id = 2

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [3 + ord(c) - ord("a") for c in text]

        def apply_chat_template(self, chat: Any, tokenize: bool, add_generation_prompt: bool) -> str:
            assert (tokenize, add_generation_prompt) == (False, True)
            return "".join(m["content"] for m in chat) + "z"

    found = PromptSampler([[5, 6], "ab", [{"role": "user", "content": "c"}]], 4, Letters())
    assert found.prompts == [[5, 6], [3, 4], [5, 28]]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: PromptSampler([], 3), "prompts: [] is not allowed"),
        (lambda: PromptSampler([[]], 3), "prompts: an empty one is not allowed"),
        (lambda: PromptSampler(["a"], 3), "tokenizer: None is not allowed"),
        (lambda: PromptSampler([[3]], 0), "max_new_tokens: 0 is not allowed"),
        (lambda: PromptSampler([[3]], 3, temperature=0.0), "temperature: 0.0 is not allowed"),
        (lambda: PromptSampler([[3]], 3, seed=-1), "seed: -1 is not allowed"),
        (lambda: EntropyProbe(PromptSampler([[3]], 3), every_n_steps=0), "every_n_steps: 0 is not allowed"),
        (lambda: EntropyProbe(PromptSampler([[3]], 3), prompts=1), "prompts: 1 is not allowed"),
        (lambda: EntropyProbe(PromptSampler([[3]], 3), measure_prompts=1), "measure_prompts: 1 is not allowed"),
    ],
)
def test_settings_that_are_none(act: Any, said: str) -> None:
    with pytest.raises(ToyError) as caught:
        act()
    assert str(caught.value).startswith(said)


def test_what_cannot_be_predicted_is_refused_before_training(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ToyError, match="its step is not AdamW's"):
        example.main(str(tmp_path), optim="sgd")
    probe = EntropyProbe(PromptSampler([[99]], 3))  # no such token
    monkeypatch.setattr(example, "EntropyProbe", lambda *args, **settings: probe)
    with pytest.raises(ToyError, match="EntropyProbe: Qwen2ForCausalLM is no causal language model"):
        example.main(str(tmp_path))
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    arguments.deepspeed = "zero3.json"
    with pytest.raises(ToyError, match="deepspeed is not allowed"):
        probe.on_train_begin(arguments, None, None, model=nn.Linear(1, 1))
    inner = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    assert unwrapped(inner) is inner


@pytest.mark.filterwarnings("ignore")  # of trl and what it imports
def test_in_trls_grpo_trainer(tmp_path: Path) -> None:
    """A real GRPOTrainer on a tiny model: the predicted step is the step taken, and both logs are whole."""
    trl, datasets, pyarrow = (pytest.importorskip(name) for name in ("trl", "datasets", "pyarrow"))
    prompts = pyarrow.table({"prompt": ["ab=", "cd=", "ef=", "gh="]})
    from tests.update_entropy.test_checkpoints import a_model, a_tokenizer

    a_model("llama").save_pretrained(tmp_path / "base")
    a_tokenizer(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "base"), padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=6, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, beta=0.1,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [float(c.count("a") + len(c) % 2) for c in completions], args=arguments,
        train_dataset=datasets.Dataset(datasets.table.InMemoryTable(prompts), fingerprint="prompts"),
        processing_class=tokenizer,
    )  # fmt: skip
    probe = EntropyProbe(PromptSampler(["ab=", "cd="], 6, tokenizer), prompts=8, measure_prompts=8).attach(trainer)
    trainer.train()
    found = rows(trainer)
    assert [r["step"] for r in found] == [1, 2, 3]
    assert all(r["entropy_step/missed"] < 1e-2 for r in found)
    assert probe.num_predictions == 3
    own = [r for r in trainer.state.log_history if "reward" in r]
    assert [r["step"] for r in own] == [1, 2, 3]  # TRL's own metrics, all of them
