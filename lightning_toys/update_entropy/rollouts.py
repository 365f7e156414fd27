"""Responses sampled from a policy, many at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.errors import require
from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.sequences import (
    Sequences,
    accepts_argument,
    eval_mode,
    exact_softmax,
    require_numbers,
)


def uniforms(seed: int, step: int, stream: str, rows: Sequence[int], length: int) -> np.ndarray:
    """Return the uniform random numbers (len(rows), length) that the rows of a step are sampled with.

    Each row has its own key (seed, step, stream, row): a sequence does not depend on which others are sampled with it.

    Args:
        seed: of the replica.
        step: optimiser step, or another number.
        stream: name of the use.
        rows: numbers of the sequences within the step, below 2^32.
        length: of a sequence, tokens.

    >>> bool((uniforms(0, 0, "example", [1], 3)[0] == uniforms(0, 0, "example", [0, 1], 3)[1]).all())
    True
    """
    return np.stack([keyed_generator(seed, (step << 32) + row, stream).random(length) for row in rows])


def stop_tokens(model: nn.Module, tokenizer_end: int | None = None) -> list[int]:
    """Return every token that ends a response of a model: its tokenizer's, its configuration's, its generation's.

    The three often differ: a chat model's generation_config.json names the ends of a text and of a turn, its
    configuration one of them.

    Args:
        model: a causal language model of transformers' interface, with or without an adapter.
        tokenizer_end: the tokenizer's, if there is a tokenizer.

    Raises:
        ToyError: a configuration names what is no token of the model's: nothing would end with it.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(x, "eos_token_id", None) for x in (text, getattr(inner, "generation_config", None))]
    ends = [i for x in found for i in (x if isinstance(x, list | tuple) else [x]) if i is not None]
    size = getattr(text, "vocab_size", None)
    for i in ends:
        require(
            type(i) is int and 0 <= i < (size or i + 1),
            f"--model.backbone: it has {size} tokens, and its configuration ends texts with token {i!r}; give "
            "--model.rollouts.stop_tokens",
        )
    return sorted({*ends, *([] if tokenizer_end is None else [tokenizer_end])})


def inverse_cdf(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Return tokens (N,) sampled from logits (N, V) by inverting the distribution function at uniforms u (N,).

    >>> inverse_cdf(torch.log(torch.tensor([[0.25, 0.75]])), torch.tensor([0.3], dtype=torch.float64), 1.0)
    tensor([1])
    """
    p = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # the last sum may be a rounding below 1
    return torch.searchsorted(p, (u.unsqueeze(-1) * p[:, -1:]), right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    prompt_index: Sequence[int],
    u: np.ndarray,
    stop_tokens: Sequence[int],
    temperature: float = 1.0,
    chunk: int = 256,
) -> Sequences:
    """Return a response to each prompt, sampled token by token, in eval mode and without autocast.

    Args:
        model: a causal language model of transformers' interface.
        prompts: token ids, one list a sequence.
        prompt_index: number of each sequence's prompt, see :class:`~lightning_toys.update_entropy.sequences.Sequences`.
        u: uniforms (N, T), one a token, see :func:`uniforms`; T is the most tokens of a response.
        stop_tokens: tokens that end a response; they are part of it.
        temperature: of the softmax.
        chunk: sequences sampled at once.
    """
    responses: list[list[int]] = []
    with eval_mode(model):
        for start in range(0, len(prompts), chunk):
            part = slice(start, start + chunk)
            responses += generate_chunk(model, prompts[part], u[part], stop_tokens, temperature)
    return Sequences([list(p) for p in prompts], responses, list(prompt_index))


def generate_chunk(
    model: nn.Module, prompts: Sequence[Sequence[int]], u: np.ndarray, stop_tokens: Sequence[int], temperature: float
) -> list[list[int]]:
    """Return the responses of one chunk; arguments as :func:`generate`."""
    device = next(model.parameters()).device
    n, width, steps = len(prompts), max(len(p) for p in prompts), u.shape[1]
    tokens = torch.zeros(n, width, dtype=torch.long, device=device)
    attention = torch.zeros(n, width, dtype=torch.long, device=device)
    for i, p in enumerate(prompts):  # padded on the left, so that all go on from the same column
        tokens[i, width - len(p) :] = torch.tensor(list(p), device=device)
        attention[i, width - len(p) :] = 1
    uniform = torch.from_numpy(u).to(device)
    stops = torch.tensor(list(stop_tokens), device=device)
    has_position = accepts_argument(model, "position_ids")
    position = (attention.cumsum(1) - 1).clamp(min=0)
    responses = torch.zeros(n, steps, dtype=torch.long, device=device)
    length = torch.full((n,), steps, device=device)
    live, cache = torch.arange(n, device=device), None
    for k in range(steps):
        inputs: dict[str, object] = {"input_ids": tokens, "attention_mask": attention, "past_key_values": cache}
        if has_position:
            inputs["position_ids"] = position
        if accepts_argument(model, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        with torch.autocast(device.type, enabled=False), exact_softmax(model):
            out = model(**inputs, use_cache=True)
        cache = out.past_key_values
        if k == 0:
            require_numbers(model, out.logits[:, -1])
        token = inverse_cdf(out.logits[:, -1], uniform[live, k], temperature)
        responses[live, k] = token
        ended = torch.isin(token, stops)
        length[live[ended]] = k + 1
        if bool(ended.any()):  # finished responses leave the batch
            keep = (~ended).nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            cache.batch_select_indices(keep)
            live, token, attention, position = live[keep], token[keep], attention[keep], position[keep]
        tokens = token.unsqueeze(1)
        attention = torch.cat([attention, torch.ones_like(tokens)], 1)
        position = position[:, -1:] + 1
    return [row[:size].tolist() for row, size in zip(responses, length.tolist(), strict=True)]
