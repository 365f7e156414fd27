"""Prompts with responses, and a policy's log-probabilities and entropies of them, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from lightning_toys.errors import require

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Sequences:
    """N responses, each to a prompt.

    Attributes:
        prompts: token ids of each sequence's prompt, none empty.
        responses: token ids of each response, its end-of-sequence token included where there is one.
        prompt_index: number of each sequence's prompt: sequences of one number are one group.
        rewards: of each sequence, where they are known.
        advantages: of each sequence, where somebody's training has computed them; else a loss does, of the rewards.
        old_logp: log-probability of each response token under the policy that generated it, where that is another one.

    Raises:
        ToyError: the lists are of unequal lengths, or a prompt is empty.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    prompt_index: list[int]
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    old_logp: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = {len(self.prompts), len(self.responses), len(self.prompt_index)}
        require(len(sizes) == 1, "sequences: lists of unequal lengths")
        require(all(self.prompts), "sequences: an empty prompt is not allowed; a policy needs a token to start from")

    def __len__(self) -> int:
        return len(self.responses)

    def take(self, rows: Sequence[int]) -> Sequences:
        """Return the sequences of some rows, in the order of ``rows``."""
        columns: tuple[list[Any], ...] = (
            self.prompts, self.responses, self.prompt_index, self.rewards, self.advantages, self.old_logp,
        )  # fmt: skip
        return Sequences(*([x[i] for i in rows] if x else [] for x in columns))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(r) for r in self.responses]

    def id_arrays(self) -> dict[str, np.ndarray]:
        """Return the token ids as ``prompt_ids`` and ``response_ids`` (N, L), -1 after the end of each."""
        return {name: pad_ids(x) for name, x in (("prompt_ids", self.prompts), ("response_ids", self.responses))}

    def given_arrays(self) -> dict[str, np.ndarray]:
        """Return what came with a batch, beside its ids and rewards, and is wanted to rebuild it.

        ``advantage_given`` (N,) is true where advantages came with it; ``old_logp`` (N, T), 0 after the end of each, is
        left out where there is none.
        """
        out: dict[str, np.ndarray] = {"advantage_given": np.full(len(self), bool(self.advantages))}
        if self.old_logp:
            old = np.zeros((len(self), max(1, *self.lengths)))
            for i, row in enumerate(self.old_logp):
                old[i, : len(row)] = row
            out["old_logp"] = old
        return out

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Sequences:
        """Return the sequences of a probe's file, such as ``numpy.load("eval_00_sequences.npz")``.

        Args:
            arrays: ``prompt_ids``, ``response_ids`` (see :meth:`id_arrays`), ``prompt_number`` and ``reward``; and of
                sequences.npz what :meth:`given_arrays` has, and ``advantage``.
        """
        prompts, responses = (
            [row[row >= 0].tolist() for row in arrays[name]] for name in ("prompt_ids", "response_ids")
        )
        given = "advantage_given" in arrays and bool(arrays["advantage_given"].all())
        old = arrays["old_logp"].tolist() if "old_logp" in arrays else []
        return cls(
            prompts, responses, arrays["prompt_number"].tolist(), arrays["reward"].tolist(),
            arrays["advantage"].tolist() if given else [],
            [row[: len(r)] for row, r in zip(old, responses, strict=True)] if old else [],
        )  # fmt: skip


def pad_ids(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return token ids of unequal lengths as one array (N, L), -1 after the end of each.

    >>> pad_ids([[5], [6, 7]]).tolist()
    [[5, -1], [6, 7]]
    """
    out = np.full((len(rows), max(1, *map(len, rows))), -1, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def prompt_clusters(responses: Sequences) -> list[int]:
    """Return a number for each response, the same for those to equal prompts: their entropies are alike.

    Where there is one prompt only, its draws stay apart: errors are then those of its responses, the prompt given.

    >>> prompt_clusters(Sequences([[5, 6], [7], [5, 6]], [[1], [2], [3]], [0, 1, 2]))
    [0, 1, 0]
    >>> prompt_clusters(Sequences([[5, 6], [5, 6]], [[1], [2]], [0, 1]))
    [0, 1]
    """
    numbers: dict[tuple[int, ...], int] = {}
    found = [numbers.setdefault(tuple(p), len(numbers)) for p in responses.prompts]
    return found if len(numbers) > 1 else list(responses.prompt_index)


class PaddedBatch(NamedTuple):
    """Sequences as a padded batch of a causal language model.

    Attributes:
        input_ids: (N, L).
        attention_mask: 1 where there is a token (N, L).
        position_ids: position of each token in its own sequence (N, L).
        logit_columns: column whose logits predict response token k (N, T).
        targets: response tokens (N, T).
        mask: 1 where a response has a token (N, T), double precision.
        first_column: least of the logit columns.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    logit_columns: Tensor
    targets: Tensor
    mask: Tensor
    first_column: int


def pad_batch(sequences: Sequences, device: torch.device | str = "cpu", side: PaddingSide = "left") -> PaddedBatch:
    """Return prompts and responses as one padded batch; the last token, which predicts nothing, is left out.

    Args:
        sequences: N of them.
        device: of the tensors.
        side: of the padding: ``left`` ends all prompts in one column, ``right`` starts all of them in column 0.
    """
    n, p = len(sequences), max(len(x) for x in sequences.prompts)
    t = max(1, *sequences.lengths)
    ids, attention = np.zeros((n, p + t), np.int64), np.zeros((n, p + t), np.int64)
    targets, mask = np.zeros((n, t), np.int64), np.zeros((n, t))
    starts = np.zeros((n, 1), np.int64)
    for i, (prompt, response) in enumerate(zip(sequences.prompts, sequences.responses, strict=True)):
        first = p - len(prompt) if side == "left" else 0
        last = first + len(prompt) + len(response)
        ids[i, first:last] = prompt + response
        attention[i, first:last] = 1
        starts[i] = first + len(prompt) - 1
        targets[i, : len(response)] = response
        mask[i, : len(response)] = 1
    ids, attention = ids[:, : p + t - 1], attention[:, : p + t - 1]
    columns = np.minimum(starts + np.arange(t), p + t - 2)
    positions = np.maximum(attention.cumsum(1) - 1, 0)
    arrays = (ids, attention, positions, columns, targets, mask)
    a, b, c, d, e, f = (torch.from_numpy(x).to(device) for x in arrays)
    return PaddedBatch(a, b, c, d, e, f, int(columns.min()))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode (no dropout), and each of its modules back into its own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


class DoubleSoftmax(TorchFunctionMode):
    """Takes a softmax of double precision in double precision while it is entered, where a model asks for single.

    The attention of Llama, Qwen2 and others does, and masks by the least number of its own precision, which is -inf in
    single. A query at padding on the left may look at nothing: its row is NaN then, the next layer's values there are
    NaN, and 0 times that reaches every token.

    >>> row = torch.full((2,), torch.finfo(torch.float64).min, dtype=torch.float64)
    >>> with DoubleSoftmax():
    ...     torch.nn.functional.softmax(row, dim=-1, dtype=torch.float32)
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, a softmax without the precision that is asked for."""
        options, given = dict(kwargs or {}), list(args)
        place = SOFTMAXES.get(func)
        if place is not None and given and given[0].dtype is torch.float64:
            if options.get("dtype") is torch.float32:
                options["dtype"] = None
            elif given[place:] == [torch.float32]:
                given[place] = None
        return func(*given, **options)


# which argument the precision is
SOFTMAXES = {torch.nn.functional.softmax: 3, torch.softmax: 2, Tensor.softmax: 2}


def require_numbers(model: nn.Module, values: Tensor, weights: Iterable[Tensor] = ()) -> None:
    """Refuse NaN out of a model in double precision whose weights are finite.

    Some models (MPT) cast to single precision before their softmax, which :class:`DoubleSoftmax` cannot see.

    Args:
        model: of finite weights, or it is no fault of its padding.
        values: what it made of tokens, none of padding.
        weights: that stood in the place of some of its own.

    Raises:
        ToyError: there is NaN.
    """
    if not isinstance(exact_softmax(model), DoubleSoftmax) or not bool(values.isnan().any()):
        return
    require(
        not all(bool(p.isfinite().all()) for p in (*model.parameters(), *weights)),
        f"{type(model).__name__}: its logits are not finite in double precision where prompts of unequal length are "
        "padded; its attention works in single precision. Give it in single precision",
    )


def exact_softmax(model: nn.Module) -> AbstractContextManager[Any]:
    """Return :class:`DoubleSoftmax` for a model in double precision, and a context that does nothing for others."""
    first = next(model.parameters(), None)
    return DoubleSoftmax() if first is not None and first.dtype is torch.float64 else nullcontext()


@contextmanager
def attention_implementation(model: nn.Module, kind: str) -> Iterator[None]:
    """Set the attention implementation of a transformers model meanwhile: ``eager``, or ``sdpa`` where it has that."""
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


def accepts_argument(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward has an argument; of a peft model, the base model's forward."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return argument in inspect.signature(inner.forward).parameters


def response_logits(model: nn.Module, batch: PaddedBatch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the logits that predict each response token (N, T, V).

    Args:
        model: a causal language model that takes ``input_ids`` and ``attention_mask`` and returns ``.logits``.
        batch: the sequences.
        parameters: values in the place of the model's own, by name.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if accepts_argument(model, "position_ids"):
        inputs["position_ids"] = batch.position_ids
    options: dict[str, object] = {"use_cache": False} if accepts_argument(model, "use_cache") else {}
    kept = batch.input_ids.shape[1]
    if accepts_argument(model, "logits_to_keep"):  # no logits where no response token is predicted
        kept -= batch.first_column
        options["logits_to_keep"] = kept
    with exact_softmax(model):
        out = functional_call(model, dict(parameters or {}), (), inputs | options)
    logits: Tensor = out.logits
    columns = batch.logit_columns - (batch.input_ids.shape[1] - kept)
    return logits.gather(1, columns.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def next_token_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the logits (B, T, V) that follow each token of padded texts, in eval mode, without autocast.

    Args:
        model: a causal language model of transformers' interface.
        input_ids: (B, T).
        attention_mask: 1 where there is a token, 0 at padding (B, T).
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if accepts_argument(model, "position_ids"):
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    options: dict[str, object] = {"use_cache": False} if accepts_argument(model, "use_cache") else {}
    with eval_mode(model), torch.autocast(input_ids.device.type, enabled=False), exact_softmax(model):
        logits: Tensor = model(**inputs, **options).logits
    return logits


def score_tokens(logits: Tensor, batch: PaddedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return l_k and H_k (N, T) of logits (N, T, V), double precision, 0 where the mask is 0; with their graph."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    chosen = logp.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    # a probability of 0 has a logarithm of -inf, and adds nothing
    h = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
    return chosen * batch.mask, h * batch.mask


def token_logp(logits: Tensor, batch: PaddedBatch, temperature: float = 1.0) -> Tensor:
    """Return l_k (N, T) alone of logits (N, T, V), double precision, with its graph: less memory than both."""
    scaled = logits / temperature
    chosen = scaled.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    return (chosen.double() - torch.logsumexp(scaled.double(), -1)) * batch.mask


@torch.no_grad()
def total_entropy(logits: Tensor, batch: PaddedBatch, temperature: float = 1.0) -> Tensor:
    """Return the sum of H_k over all tokens of logits (N, T, V), computed a sequence at a time to save memory."""
    rows = range(len(logits))
    one = [batch._replace(targets=batch.targets[i : i + 1], mask=batch.mask[i : i + 1]) for i in rows]
    return torch.stack([score_tokens(logits[i : i + 1], one[i], temperature)[1].sum() for i in rows]).sum()


def policy_scores(
    model: nn.Module,
    batch: PaddedBatch,
    temperature: float = 1.0,
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return l_k and H_k (N, T) with their graph, without autocast; the model's mode is not changed.

    Args:
        model: the policy.
        batch: the sequences.
        temperature: of the distribution that tokens are sampled from.
        parameters: values in the place of the model's own, by name.
    """
    with torch.autocast(batch.input_ids.device.type, enabled=False):
        return score_tokens(response_logits(model, batch, parameters), batch, temperature)


def length_sorted_chunks(sequences: Sequences, size: int) -> Iterator[list[int]]:
    """Yield rows in chunks of ``size``, sequences of similar lengths together, so that there is little padding."""
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences.responses[i]), len(sequences.prompts[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def merge_chunks(parts: list[tuple[list[int], tuple[Tensor, ...]]], n: int, width: int) -> tuple[Tensor, ...]:
    """Return the tensors (n, width) of all rows, in order, from chunks of rows (n_c, T_c) that were computed apart."""
    out = tuple(torch.zeros(n, width, dtype=x.dtype, device=x.device) for x in parts[0][1])
    for rows, found in parts:
        for whole, x in zip(out, found, strict=True):
            whole[torch.tensor(rows, device=x.device), : x.shape[1]] = x
    return out
