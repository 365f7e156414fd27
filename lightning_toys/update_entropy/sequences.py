"""Prompts with drawn responses, and what a policy says of them: log-probabilities and entropies, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_toys.errors import require

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Sequences:
    """N responses, each to a prompt.

    Attributes:
        prompts: token ids of each sequence's prompt, none empty.
        responses: token ids of each response, an end-of-sequence token included where one was drawn.
        prompt: number of each sequence's prompt: those of a number are one group.
        rewards: of each sequence, where they are known.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    prompt: list[int]
    rewards: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(len(self.prompts) == len(self.responses) == len(self.prompt), "sequences: lists of unequal lengths")
        require(all(self.prompts), "sequences: an empty prompt is not allowed; a policy needs a token to start from")

    def __len__(self) -> int:
        return len(self.responses)

    def take(self, rows: Sequence[int]) -> Sequences:
        """Return some of the sequences."""
        rewards = [self.rewards[i] for i in rows] if self.rewards else []
        prompts, responses = ([x[i] for i in rows] for x in (self.prompts, self.responses))
        return Sequences(prompts, responses, [self.prompt[i] for i in rows], rewards)

    @property
    def lengths(self) -> list[int]:
        """Length of each response."""
        return [len(r) for r in self.responses]


class Packed(NamedTuple):
    """Sequences as a batch of a causal language model.

    Attributes:
        tokens: ids (N, L).
        attention: 1 where there is a token (N, L).
        position: position of each token in its own sequence (N, L).
        column: column whose logits predict response token k (N, T).
        target: response tokens (N, T).
        mask: 1 where a response has a token (N, T), double precision.
        first: least of the columns.
    """

    tokens: Tensor
    attention: Tensor
    position: Tensor
    column: Tensor
    target: Tensor
    mask: Tensor
    first: int


def pack(sequences: Sequences, device: torch.device | str = "cpu", side: Side = "left") -> Packed:
    """Lay prompts and responses out in one rectangle.

    Args:
        sequences: to be laid out.
        device: where the tensors go.
        side: ``left`` ends all prompts in one column; ``right`` starts all of them in column 0.
    """
    n, p = len(sequences), max(len(x) for x in sequences.prompts)
    t = max(1, *sequences.lengths)
    tokens, attention = np.zeros((n, p + t), np.int64), np.zeros((n, p + t), np.int64)
    target, mask = np.zeros((n, t), np.int64), np.zeros((n, t))
    starts = np.zeros((n, 1), np.int64)
    for i, (prompt, response) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
        first = p - len(prompt) if side == "left" else 0
        last = first + len(prompt) + len(response)
        tokens[i, first:last] = prompt + response
        attention[i, first:last] = 1
        starts[i] = first + len(prompt) - 1
        target[i, : len(response)] = response
        mask[i, : len(response)] = 1
    # the last token predicts nothing
    tokens, attention = tokens[:, : p + t - 1], attention[:, : p + t - 1]
    column = np.minimum(starts + np.arange(t), p + t - 2)
    position = np.maximum(attention.cumsum(1) - 1, 0)
    arrays = (tokens, attention, position, column, target, mask)
    a, b, c, d, e, f = (torch.from_numpy(x).to(device) for x in arrays)
    return Packed(a, b, c, d, e, f, int(column.min()))


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and each module's mode back afterwards."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def attention(model: nn.Module, kind: str) -> Iterator[None]:
    """Let a model of transformers compute its attention so meanwhile: ``eager``, or fused where it can (``sdpa``)."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config: Any = getattr(inner, "config", None)
    was = getattr(config, "_attn_implementation", None)
    change = was in ("eager", "sdpa") and (kind == "eager" or getattr(inner, "_supports_sdpa", False))
    if change:
        config._attn_implementation = kind
    try:
        yield
    finally:
        if change:
            config._attn_implementation = was


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward has an argument; an adapter's is that of the model within."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return argument in inspect.signature(inner.forward).parameters


def token_logits(model: nn.Module, packed: Packed, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the logits that predict each response token (N, T, V).

    Args:
        model: a causal language model that takes ``input_ids`` and ``attention_mask`` and gives ``.logits``.
        packed: the sequences.
        parameters: values in the place of the model's own, by name.
    """
    asked = {"input_ids": packed.tokens, "attention_mask": packed.attention}
    if takes(model, "position_ids"):
        asked["position_ids"] = packed.position
    options: dict[str, object] = {"use_cache": False} if takes(model, "use_cache") else {}
    kept = packed.tokens.shape[1]
    if takes(model, "logits_to_keep"):  # no logits where no response token is predicted
        kept -= packed.first
        options["logits_to_keep"] = kept
    out = functional_call(model, dict(parameters or {}), (), asked | options)
    logits: Tensor = out.logits
    column = packed.column - (packed.tokens.shape[1] - kept)
    return logits.gather(1, column.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def score_tokens(logits: Tensor, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return l_k and H_k (N, T) in double precision, 0 where the mask is 0; with the graph of ``logits``."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    taken = logp.gather(-1, packed.target.unsqueeze(-1)).squeeze(-1)
    # a probability of 0 has a logarithm of -inf, and adds nothing
    h = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
    return taken * packed.mask, h * packed.mask


def drawn_logp(logits: Tensor, packed: Packed, temperature: float = 1.0) -> Tensor:
    """Return l_k (N, T) alone, in double precision, with the graph of ``logits`` (N, T, V) and less memory."""
    scaled = logits / temperature
    taken = scaled.gather(-1, packed.target.unsqueeze(-1)).squeeze(-1)
    return (taken.double() - torch.logsumexp(scaled.double(), -1)) * packed.mask


@torch.no_grad()
def entropy_sum(logits: Tensor, packed: Packed, temperature: float = 1.0) -> Tensor:
    """Return the sum of H_k over all tokens, a sequence at a time."""
    rows = range(len(logits))
    one = [packed._replace(target=packed.target[i : i + 1], mask=packed.mask[i : i + 1]) for i in rows]
    return torch.stack([score_tokens(logits[i : i + 1], one[i], temperature)[1].sum() for i in rows]).sum()


def policy_scores(
    model: nn.Module,
    packed: Packed,
    temperature: float = 1.0,
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return l_k and H_k (N, T) with their graph; the model as it is, its mode too."""
    with torch.autocast(packed.tokens.device.type, enabled=False):
        return score_tokens(token_logits(model, packed, parameters), packed, temperature)


def chunks(sequences: Sequences, size: int) -> Iterator[list[int]]:
    """Return rows in chunks of ``size``, those of like lengths together, so that little of a rectangle is empty."""
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences.responses[i]), len(sequences.prompts[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def gathered(parts: list[tuple[list[int], tuple[Tensor, ...]]], n: int, width: int) -> tuple[Tensor, ...]:
    """Put chunks of rows (n_c, T_c) back in order: tensors (n, width)."""
    out = tuple(torch.zeros(n, width, dtype=x.dtype, device=x.device) for x in parts[0][1])
    for rows, found in parts:
        for whole, x in zip(out, found, strict=True):
            whole[torch.tensor(rows, device=x.device), : x.shape[1]] = x
    return out
