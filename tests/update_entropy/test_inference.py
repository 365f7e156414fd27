"""A trained module without a Trainer: what it returns is what validation and test computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_text import OddData

from lightning_toys.errors import ToyError
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.update_entropy import ArithmeticData, Rollouts, TinyPolicy, UpdateEntropy
from lightning_toys.update_entropy.data import EXTRA_TOKENS
from lightning_toys.update_entropy.estimators import Scores, entropy
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.policy import initialise
from lightning_toys.update_entropy.rollouts import inverse_cdf, uniforms
from lightning_toys.update_entropy.sequences import Sequences, pad_batch, score_tokens
from tests.conftest import Runner
from tests.update_entropy.test_cli import QUIET, SMALL

SEEDS, PROMPTS, TEMPERATURE = (3, 5), 8, 0.7


@pytest.fixture(scope="module")
def module() -> UpdateEntropy:
    """A module that no Trainer has seen, its policies not at their initial values."""
    rollouts = Rollouts(temperature=TEMPERATURE)
    policy = TinyPolicy("gpt2", hidden=16, layers=1, heads=2, lora_rank=4, lora_dropout=0.5)
    out = UpdateEntropy(SEEDS, policy, rollouts)
    out.sizes = out.measure(ArithmeticData(digits=1))
    out.configure_model()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in out.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)
    return out


def scores(logits: Tensor, sequences: Sequences, temperature: float) -> Scores:
    """l_k and H_k of responses by the logits (B, T, V) of the whole text."""
    batch = pad_batch(sequences)
    index = batch.logit_columns.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    logp, h = score_tokens(logits.gather(1, index), batch, temperature)
    return Scores(logp, h, batch.mask, torch.tensor(sequences.prompt_index))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_loaded_module_gives_the_validations_numbers(runner: Runner, family: str) -> None:
    entropy_runner = Runner(runner.root, runner.capture, "update_entropy", SMALL)
    flags = (
        *("--model.seeds", "[3,5]", "--model.rollouts.temperature", f"{TEMPERATURE}"),
        *("--model.policy.family", family, "--model.policy.lora_dropout", "0.4", "--model.lr", "0.02", *QUIET),
    )
    entropy_runner.ok("fit", "arithmetic", *flags)
    folder = entropy_runner.folder("arithmetic")
    row = next(r for r in read_csv(folder / "metrics.csv") if r["step"] == "10" and r.get("eval/reward"))
    loaded = UpdateEntropy.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    data = OddData(digits=1)
    assert (loaded.seeds, loaded.rollouts.temperature, loaded.policy.family) == ([3, 5], TEMPERATURE, family)
    problems = [data.problems(seed, 0, "validation", PROMPTS) for seed in SEEDS]
    prompts = [[data.encode_prompt(p) for p in each] for each in problems]
    length = data.max_response_length + EXTRA_TOKENS
    responses = loaded.generate(prompts, length, stream="tokens/validation")
    with torch.no_grad():
        for r, (seed, found) in enumerate(zip(SEEDS, responses, strict=True)):
            pairs = zip(problems[r], found.responses, strict=True)
            rewards = [data.task.reward(p, data.tokenizer.decode(x)) for p, x in pairs]
            assert sum(rewards) / PROMPTS == pytest.approx(float(row[f"replicas/eval/reward/seed_{seed}"]), rel=1e-6)
            assert sum(found.lengths) / PROMPTS == pytest.approx(
                float(row[f"replicas/eval/length/seed_{seed}"]), rel=1e-6
            )
            batch = pad_batch(found)
            logits = loaded(batch.input_ids, batch.attention_mask)[r]
            wanted = float(row[f"replicas/eval/entropy/seed_{seed}"])
            assert entropy(scores(logits, found, TEMPERATURE)).value == pytest.approx(wanted, rel=1e-6)
    # the replicas can be told from each other, and from nothing
    assert len({float(row[f"replicas/eval/entropy/seed_{seed}"]) for seed in SEEDS}) == len(SEEDS)
    assert all(float(row[f"replicas/eval/reward/seed_{seed}"]) > 0 for seed in SEEDS)


def test_logits_are_those_of_every_policy(module: UpdateEntropy) -> None:
    ids = torch.tensor([[7, 3, 13, 16], [5, 5, 4, 2]])
    out = module(ids)
    assert out.shape == (2, 2, 4, 17)
    assert out.requires_grad
    assert module.training  # as it was; but nothing is dropped
    assert torch.equal(out, module(ids))
    for r, policy in enumerate(module.policies):
        assert torch.allclose(out[r], policy.eval()(input_ids=ids).logits, atol=1e-6)
        policy.train()
    assert not torch.allclose(out[0], out[1], atol=1e-2)
    both = torch.stack([ids, ids.flip(0)])
    each = module(both)
    assert torch.equal(each[0], out[0])
    assert torch.allclose(each[1], out[1].flip(0), atol=1e-6)
    assert torch.equal(module(both, torch.ones_like(both, dtype=torch.bool)), each)


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([0, 0, 7, 3, 13], [0, 0, 1, 1, 1]),
        ([7, 3, 13, 0, 0], [1, 1, 1, 0, 0]),
        ([7, 0, 3, 0, 13], [1, 0, 1, 0, 1]),
    ],
    ids=["left", "right", "within"],
)
def test_padding_changes_nothing(module: UpdateEntropy, ids: list[int], mask: list[int]) -> None:
    alone = module(torch.tensor([[7, 3, 13]]))[:, 0]
    texts, masks = torch.tensor([ids, [4, 5, 6, 7, 8]]), torch.tensor([mask, [1] * 5])
    live = masks[0].bool()
    assert torch.allclose(module(texts, masks)[:, 0, live], alone, atol=1e-5)
    if ids[2] != 13:  # a causal model does not see what follows
        assert not torch.allclose(module(texts)[:, 0, live], alone, atol=1e-2)


def test_autocast_around_it_changes_nothing(module: UpdateEntropy) -> None:
    ids = torch.tensor([[7, 3, 13, 16]])
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(ids)
    assert torch.equal(inside, module(ids))


def test_responses_follow_the_logits_and_their_keys(module: UpdateEntropy) -> None:
    """Each token is the one at which the distribution function passes the uniform of its key."""
    prompts = [[7, 13], [4, 13, 5], [9, 13]]
    found = module.generate(prompts, 6, step=4, stream="s")
    assert [x.prompts for x in found] == [prompts, prompts]
    assert found[0].responses != found[1].responses
    for seed, each in zip(SEEDS, found, strict=True):
        u = uniforms(seed, 4, "s", range(3), 6)
        for i, (prompt, response) in enumerate(zip(prompts, each.responses, strict=True)):
            assert 1 <= len(response) <= 6
            assert response[-1] == 2 or len(response) == 6
            for k, token in enumerate(response):
                logits = module(torch.tensor([prompt + response[:k]]))[SEEDS.index(seed), :, -1]
                assert int(inverse_cdf(logits, torch.tensor([u[i, k]]), TEMPERATURE)) == token
    again = module.generate([prompts, prompts[::-1]], 6, step=4, stream="s")
    assert again[0].responses == found[0].responses
    assert again[1].responses != found[1].responses
    for other in ({"step": 5}, {"stream": "t"}, {"temperature": 3.0}):
        assert module.generate(prompts, 6, **{"step": 4, "stream": "s", **other})[0].responses != found[0].responses
    first = {"step": 4, "stream": "s", "eos_token_id": found[0].responses[0][0]}
    assert module.generate(prompts, 6, **first)[0].responses[0] == found[0].responses[0][:1]
    assert module.training
    assert evaluate(module.policies[0], found[0]).logp.shape[0] == 3  # what an evaluation takes


def refusals(module: UpdateEntropy) -> dict[str, tuple[Callable[[], Any], str]]:
    ids, f = torch.tensor([[7, 3]]), module
    return {
        "one axis": (
            lambda: f(ids[0]),
            "input_ids: (2,) of torch.int64 is not allowed; give integers (B, T) or (2, B, T)",
        ),
        "three replicas": (lambda: f(ids.expand(3, 1, 2)), "input_ids: (3, 1, 2) of torch.int64 is not allowed"),
        "no token": (lambda: f(ids[:, :0]), "input_ids: (1, 0) of torch.int64 is not allowed"),
        "floats": (lambda: f(ids.float()), "input_ids: (1, 2) of torch.float32 is not allowed"),
        "mask": (lambda: f(ids, ids[0]), "attention_mask: (2,) is not allowed; give the shape of input_ids, (1, 2)"),
        "vocabulary": (lambda: f(ids + 14), "input_ids: token 21 is not allowed; give tokens from 0 to 16"),
        "negative": (lambda: f(ids - 4), "input_ids: token -1 is not allowed"),
        "long": (lambda: f(ids.repeat(1, 20)), "input_ids: 40 tokens are not allowed; the policies have 18 positions"),
        "no prompt": (
            lambda: f.generate([], 3),
            "prompts: these are not allowed; give lists of token ids, none empty, or 2 of",
        ),
        "empty prompt": (lambda: f.generate([[1], []], 3), "prompts: these are not allowed"),
        "flat prompt": (lambda: f.generate([1, 2], 3), "prompts: these are not allowed"),
        "three lists": (lambda: f.generate([[[1]]] * 3, 3), "or 2 of such lists"),
        "a prompt's token": (lambda: f.generate([[17]], 3), "prompts: token 17 is not allowed"),
        "long response": (lambda: f.generate([[1]], 19), "prompts: 19 tokens are not allowed; the policies have 18"),
        "no new token": (lambda: f.generate([[1]], 0), "max_new_tokens: 0 is not allowed"),
        "cold": (lambda: f.generate([[1]], 3, 0.0), "temperature: 0.0 is not allowed"),
        "not built": (lambda: UpdateEntropy()(ids), "UpdateEntropy: there are no policies yet; fit, or load_from_ch"),
        "not built to sample": (lambda: UpdateEntropy().generate([[1]], 3), "UpdateEntropy: there are no policies yet"),
    }


NAMES = list(refusals(UpdateEntropy()))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_in_one_line(module: UpdateEntropy, name: str) -> None:
    act, said = refusals(module)[name]
    with pytest.raises(ToyError, match=re.escape(said)) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_all_positions_can_be_used(module: UpdateEntropy) -> None:
    positions = module.sizes["positions"]
    assert module(torch.full((1, positions), 4)).shape == (2, 1, positions, 17)
    (response,) = module.generate([[1]], positions, eos_token_id=99)[0].responses
    assert len(response) == positions


def test_a_pretrained_backbone_without_a_trainer(tmp_path: Path, runner: Runner) -> None:
    """A checkpoint keeps what was trained; the rest is read from the model's own files again."""
    spec = TinyPolicy(hidden=16, layers=1, heads=2, lora_rank=4)
    base: Any = spec.build_decoder(17, 40)
    initialise(base, 0)
    base.save_pretrained(tmp_path / "base")
    small = Runner(runner.root, runner.capture, "update_entropy", SMALL)
    flags = ("--model.backbone", str(tmp_path / "base"), "--model.warm_steps", "0", "--trainer.max_steps", "2")
    small.ok("fit", "arithmetic", *flags, "--model.lr", "0.1", *QUIET)
    checkpoint = small.folder("arithmetic") / "checkpoints" / "last.ckpt"
    loaded = UpdateEntropy.load_from_checkpoint(checkpoint, weights_only=True)
    ids = torch.tensor([[7, 3, 13, 16]])
    with torch.no_grad():
        logits, before = loaded(ids)[0], base.eval()(input_ids=ids).logits
        with loaded.policies[0].disable_adapter():  # type: ignore[operator]
            assert torch.allclose(loaded(ids)[0], before, atol=1e-6)
    assert not torch.allclose(logits, before, atol=1e-4)


def test_dropout_is_keyed(runner: Runner, bitwise: Callable[..., None]) -> None:
    """What was drawn before in the process changes no training, and a replica's dropout is its solo run's."""
    entropy_runner = Runner(runner.root, runner.capture, "update_entropy", SMALL)
    dropped = ("--model.policy.lora_dropout", "0.4", "--model.lr", "0.02", "--trainer.limit_val_batches", "0", *QUIET)
    for k, (name, seeds) in enumerate((("a", "[3,5]"), ("b", "[3,5]"), ("solo", "[5]"))):
        torch.manual_seed(k)
        entropy_runner.ok("fit", "arithmetic", *dropped, "--model.seeds", seeds, "--run.name", name)
    a, b, solo = (entropy_runner.checkpoint("arithmetic", n)["state_dict"] for n in ("a", "b", "solo"))
    bitwise(a, b)
    own = {k.replace("net.1.", "net.0."): v for k, v in a.items() if k.startswith("net.1.")}
    assert own
    for key, value in own.items():
        torch.testing.assert_close(value, solo[key], atol=1e-5, rtol=0)
