"""Responses drawn from a policy, many at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.sequences import Sequences, in_eval, takes


def uniforms(seed: int, step: int, stream: str, rows: Sequence[int], length: int) -> np.ndarray:
    """Return the uniforms (len(rows), length) that rows of a step are drawn with.

    Each row has a generator of its own: a sequence does not depend on which others are drawn beside it.

    Args:
        seed: of the replica.
        step: optimiser step or other number of the draw.
        stream: name of the use.
        rows: numbers of the sequences within the step, below 2^32.
        length: tokens at most.
    """
    return np.stack([keyed_generator(seed, (step << 32) + row, stream).random(length) for row in rows])


def inverse_cdf(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Return the tokens (N,) at which the distribution function passes u (N,); logits (N, V)."""
    p = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # the last sum may be a rounding below 1
    return torch.searchsorted(p, (u.unsqueeze(-1) * p[:, -1:]), right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)


@torch.no_grad()
def draw(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    prompt: Sequence[int],
    u: np.ndarray,
    ends: Sequence[int],
    temperature: float = 1.0,
    chunk: int = 256,
) -> Sequences:
    """Draw a response to each prompt, token by token, until an end token or until the uniforms are used up.

    Args:
        model: a causal language model of transformers' interface.
        prompts: token ids, one list a sequence.
        prompt: the group that each sequence belongs to.
        u: uniforms (N, T), a token each, see :func:`uniforms`.
        ends: tokens that end a response; they are part of it.
        temperature: of the softmax.
        chunk: sequences drawn at once.
    """
    responses: list[list[int]] = []
    with in_eval(model):
        for start in range(0, len(prompts), chunk):
            part = slice(start, start + chunk)
            responses += draw_chunk(model, prompts[part], u[part], ends, temperature)
    return Sequences([list(p) for p in prompts], responses, list(prompt))


def draw_chunk(
    model: nn.Module, prompts: Sequence[Sequence[int]], u: np.ndarray, ends: Sequence[int], temperature: float
) -> list[list[int]]:
    """Draw the responses of one chunk; see :func:`draw`."""
    device = next(model.parameters()).device
    n, width, steps = len(prompts), max(len(p) for p in prompts), u.shape[1]
    tokens = torch.zeros(n, width, dtype=torch.long, device=device)
    attention = torch.zeros(n, width, dtype=torch.long, device=device)
    for i, p in enumerate(prompts):  # on the left, so that all go on from the same column
        tokens[i, width - len(p) :] = torch.tensor(list(p), device=device)
        attention[i, width - len(p) :] = 1
    given = torch.from_numpy(u).to(device)
    stops = torch.tensor(list(ends), device=device)
    has_position = takes(model, "position_ids")
    position = (attention.cumsum(1) - 1).clamp(min=0)
    drawn = torch.zeros(n, steps, dtype=torch.long, device=device)
    length = torch.full((n,), steps, device=device)
    live, cache = torch.arange(n, device=device), None
    for k in range(steps):
        asked: dict[str, object] = {"input_ids": tokens, "attention_mask": attention, "past_key_values": cache}
        if has_position:
            asked["position_ids"] = position
        if takes(model, "logits_to_keep"):
            asked["logits_to_keep"] = 1
        with torch.autocast(device.type, enabled=False):
            out = model(**asked, use_cache=True)
        cache = out.past_key_values
        token = inverse_cdf(out.logits[:, -1], given[live, k], temperature)
        drawn[live, k] = token
        ended = torch.isin(token, stops)
        length[live[ended]] = k + 1
        if bool(ended.any()):  # what has ended costs nothing any more
            keep = (~ended).nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            cache.batch_select_indices(keep)
            live, token, attention, position = live[keep], token[keep], attention[keep], position[keep]
        tokens = token.unsqueeze(1)
        attention = torch.cat([attention, torch.ones_like(tokens)], 1)
        position = position[:, -1:] + 1
    return [row[:size].tolist() for row, size in zip(drawn, length.tolist(), strict=True)]
