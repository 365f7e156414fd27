"""Padding on the left changes nothing: a batch has the numbers of its sequences alone, in double precision too.

transformers' eager attention takes its softmax in single precision; before it was kept in the model's own, a query at
padding of a model in double precision was NaN, and with it everything from the second layer on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.derivatives import score_jvp, score_second_jvp  # noqa: E402
from lightning_toys.update_entropy.entropy_derivatives import sequence_entropy_gradients  # noqa: E402
from lightning_toys.update_entropy.forward import evaluate  # noqa: E402
from lightning_toys.update_entropy.rollouts import generate, uniforms  # noqa: E402
from lightning_toys.update_entropy.sequences import (  # noqa: E402
    DoubleSoftmax,
    Sequences,
    exact_softmax,
    next_token_logits,
    pad_batch,
    policy_scores,
)

CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}
SEQUENCES = Sequences([[5], [6, 7, 8, 9, 10, 11], [5, 6, 7]], [[3, 4, 2], [9], [4, 5, 6, 7, 8, 2]], [0, 1, 2])


def a_model(family: str, attention: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, CONFIGS[family])(
        vocab_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation=attention, hidden_size=16,
        intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_padded_batch_in_double_precision_is_its_sequences_alone(family: str, attention: str) -> None:
    model = a_model(family, attention)
    batch = pad_batch(SEQUENCES)
    assert int((batch.attention_mask[:, 0] == 0).sum()) == 2  # there are queries that may look at nothing
    scores = evaluate(model, SEQUENCES)
    g = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in model.named_parameters()}
    first, second = score_second_jvp(model, SEQUENCES, direction)
    for found in (score_jvp(model, SEQUENCES, direction), first):
        for i in range(3):
            alone = score_jvp(model, SEQUENCES.take([i]), direction)
            for a, b in zip(found, alone, strict=True):
                torch.testing.assert_close(a[i, : b.shape[1]], b[0], rtol=1e-6, atol=1e-8)
    assert all(bool(x.isfinite().all()) for x in second)
    for i in range(3):
        one = evaluate(model, SEQUENCES.take([i]))
        n = one.logp.shape[1]
        torch.testing.assert_close(scores.logp[i, :n], one.logp[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(scores.entropy[i, :n], one.entropy[0], rtol=1e-6, atol=1e-8)
    sum(x.sum() for x in policy_scores(model, batch)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    _, values, errors = sequence_entropy_gradients(model, SEQUENCES, "token", 1.0, 32).directional_derivatives(
        [direction]
    )
    assert bool(values.isfinite().all())
    assert bool((errors > 0).all())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_change_what_is_generated(attention: str) -> None:
    model = a_model("llama", attention)
    u = uniforms(0, 0, "x", range(3), 6)
    together = generate(model, SEQUENCES.prompts, range(3), u, [2]).responses
    alone = [generate(model, [p], [0], u[i : i + 1], [2]).responses[0] for i, p in enumerate(SEQUENCES.prompts)]
    assert together == alone
    assert len(set(map(tuple, together))) == 3
    batch = pad_batch(SEQUENCES)
    assert bool(next_token_logits(model, batch.input_ids, batch.attention_mask).isfinite().all())


def test_transformers_alone_still_has_it() -> None:
    """Tells when transformers has mended it, and :class:`DoubleSoftmax` may go."""
    model, batch = a_model("llama", "eager"), pad_batch(SEQUENCES)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    assert bool(logits.isnan().any())


def test_only_a_softmax_of_doubles_is_kept() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4)))
    with DoubleSoftmax():
        for softmax in (torch.nn.functional.softmax, torch.softmax):
            assert torch.equal(softmax(x, dim=-1, dtype=torch.float32), torch.softmax(x, -1))
        assert torch.equal(x.softmax(-1, dtype=torch.float32), torch.softmax(x, -1))
        for found in (
            torch.softmax(x, -1, torch.float32),
            x.softmax(-1, torch.float32),
            torch.nn.functional.softmax(x, -1, 3, torch.float32),
        ):
            assert torch.equal(found, torch.softmax(x, -1))
        assert torch.softmax(x, dim=-1, dtype=torch.float16).dtype is torch.float16
        assert torch.softmax(x.bfloat16(), dim=-1, dtype=torch.float32).dtype is torch.float32
    assert isinstance(exact_softmax(a_model("llama", "eager")), DoubleSoftmax)
    assert not isinstance(exact_softmax(a_model("llama", "eager", torch.float32)), DoubleSoftmax)


def test_a_model_that_casts_before_its_softmax_is_refused_in_one_line() -> None:
    torch.manual_seed(0)
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=32, max_seq_len=64)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    u = uniforms(0, 0, "x", range(3), 4)
    for act in (
        lambda: evaluate(model, SEQUENCES),
        lambda: generate(model, SEQUENCES.prompts, range(3), u, [2]),
    ):
        with pytest.raises(ToyError, match="MptForCausalLM: its logits are not finite in double precision"):
            act()
    assert bool(evaluate(model, SEQUENCES.take([1])).logp.isfinite().all())
    gone = {n: torch.full_like(p, float("nan")) for n, p in model.named_parameters()}
    assert bool(evaluate(model, SEQUENCES, parameters=gone).logp.isnan().any())  # a step too far is none of this
    model = model.float()
    assert bool(evaluate(model, SEQUENCES).logp.isfinite().all())
    model.double()
    next(model.parameters()).data[:] = float("nan")  # a training that has diverged is none of this
    assert bool(evaluate(model, SEQUENCES).logp.isnan().any())
