"""One step of supervised learning, and one of a policy gradient, for one policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.errors import REPEATS, bounded, check_settings, require
from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.data import EXTRA_TOKENS, TextData
from lightning_toys.update_entropy.estimators import effective_sample_size
from lightning_toys.update_entropy.objective import Objective, ResponseWeights, kl_penalty
from lightning_toys.update_entropy.reference import batch_reference_logp
from lightning_toys.update_entropy.rollouts import generate, stop_tokens, uniforms
from lightning_toys.update_entropy.sequences import (
    Sequences,
    length_sorted_chunks,
    pad_batch,
    response_logits,
    score_tokens,
    token_logp,
    total_entropy,
)
from lightning_toys.update_entropy.task import Tokenizer


@dataclass
class Rollouts:
    """How responses are sampled in training.

    Args:
        prompts: of one policy-gradient step, over all ranks together.
        group: responses to each.
        temperature: of the softmax.
        inner_steps: optimiser steps on one set of responses; the ratio's clipping matters from the second on.
        micro_batch: responses of one pass; less memory, the same step; 0 for all at once.
        stop_tokens: token ids that end a response; null for those of tokenizer, configuration and generation
            configuration together.
        permute_rewards: give the rewards of each prompt's responses to those responses in a random order: a negative
            control, whose advantages have the same values and nothing to do with what was said.

    Raises:
        ToyError: a value is not allowed.
    """

    prompts: int = 16
    group: int = 8
    temperature: float = 1.0
    inner_steps: int = 1
    micro_batch: int = 0
    stop_tokens: list[int] | None = None
    permute_rewards: bool = False

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.rollouts.")
        for name, minimum in (("prompts", 1), ("group", 2), ("inner_steps", 1), ("micro_batch", 0)):
            value = getattr(self, name)
            bounded(f"--model.rollouts.{name}", value, minimum, REPEATS if name == "inner_steps" else None)
        bounded("--model.rollouts.temperature", self.temperature, 0.0, above=True)
        require(
            self.stop_tokens is None or (isinstance(self.stop_tokens, list) and len(self.stop_tokens) > 0),
            f"--model.rollouts.stop_tokens: {self.stop_tokens} is not allowed; give a list of token ids, or null",
        )
        for token in self.stop_tokens or []:
            bounded("--model.rollouts.stop_tokens", token, 0)

    def ends(self, model: nn.Module, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens that end a response of a model whose texts a tokenizer encodes."""
        return self.stop_tokens or stop_tokens(model, tokenizer.eos_token_id)


def sample_rollouts(
    model: nn.Module,
    data: TextData,
    seed: int,
    step: int,
    stream: str,
    prompts: range,
    group: int,
    temperature: float,
    total: int,
    ends: Sequence[int] | None = None,
    permute_rewards: bool = False,
) -> Sequences:
    """Return responses with their rewards; a response depends on its own key (seed, step, stream, row) only.

    Args:
        model: the policy.
        data: gives problems and rewards.
        seed: of the replica.
        step: optimiser step, or another number.
        stream: name of the use.
        prompts: numbers of the prompts to answer, of ``total``.
        group: responses to each.
        temperature: of the softmax.
        total: prompts of the step on all ranks together.
        ends: tokens that end a response; None for :func:`~lightning_toys.update_entropy.rollouts.stop_tokens`.
        permute_rewards: see :func:`permuted_within_prompts`.
    """
    problems = data.problems(seed, step, stream, total)
    chosen = [(number, problems[number]) for number in prompts for _ in range(group)]
    rows = [number * group + g for number in prompts for g in range(group)]
    u = uniforms(seed, step, f"tokens/{stream}", rows, data.max_response_length + EXTRA_TOKENS)
    encoded = [data.encode_prompt(problem) for _, problem in chosen]
    chosen_ends = ends or stop_tokens(model, data.tokenizer.eos_token_id)
    found = generate(model, encoded, [number for number, _ in chosen], u, chosen_ends, temperature)
    rewards = data.rewards([problem for _, problem in chosen], [data.tokenizer.decode(x) for x in found.responses])
    if permute_rewards:
        rewards = permuted_within_prompts(rewards, found.prompt_index, seed, step, stream)
    return Sequences(found.prompts, found.responses, found.prompt_index, rewards)


def permuted_within_prompts(
    rewards: Sequence[float], prompt_index: Sequence[int], seed: int, step: int, stream: str
) -> list[float]:
    """Return rewards with those of each prompt's responses in a random order, of its own key (seed, step, stream).

    Args:
        rewards: of the responses.
        prompt_index: number of each response's prompt within the step, below 2^32.
        seed: of the replica.
        step: optimiser step, or another number.
        stream: name of the use.

    >>> sorted(permuted_within_prompts([1.0, 2.0, 3.0], [0, 0, 0], 0, 0, "example"))
    [1.0, 2.0, 3.0]
    """
    out = list(rewards)
    for number in dict.fromkeys(prompt_index):
        rows = [i for i, k in enumerate(prompt_index) if k == number]
        order = keyed_generator(seed, (step << 32) + number, f"permutation/{stream}").permutation(len(rows))
        for i, j in zip(rows, order.tolist(), strict=True):
            out[i] = rewards[rows[j]]
    return out


def supervised_loss(model: nn.Module, tokens: Tensor, response: Tensor, total: int) -> Tensor:
    """Return this rank's part of the cross-entropy of response tokens, in nats: mean over each response, then over all.

    Args:
        model: the policy.
        tokens: ids (B, L), padded on the right.
        response: true where a token is the response's (B, L).
        total: sequences of the step on all ranks together.
    """
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    live = response[:, 1:]
    means = (losses.view(live.shape) * live).sum(1) / live.sum(1).clamp(min=1)
    return means.sum() / total


@dataclass
class PolicyBatch:
    """Responses that the policy gradient takes a step on, in micro-batches.

    Attributes:
        sequences: with rewards.
        micro_batches: rows of each.
        old_logp: l_k of the policy that generated them, for each micro-batch (n, T); empty before the first pass.
        reference_logp: likewise of the KL penalty's reference, where there is one; a checkpoint holds none.
    """

    sequences: Sequences
    micro_batches: list[list[int]]
    old_logp: list[Tensor] = field(default_factory=list)
    reference_logp: list[Tensor] = field(default_factory=list)

    @classmethod
    def split(cls, sequences: Sequences, size: int) -> PolicyBatch:
        """Return a batch in micro-batches of ``size`` responses of similar lengths; 0: in one."""
        n = len(sequences)
        return cls(sequences, list(length_sorted_chunks(sequences, size)) if 0 < size < n else [list(range(n))])

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the responses and their l_k (N, T) as a checkpoint holds them: plain lists and a tensor."""
        first = self.old_logp[0]
        whole = first.new_zeros(len(self.sequences), max(1, *self.sequences.lengths))
        for rows, old in zip(self.micro_batches, self.old_logp, strict=True):
            whole[rows, : old.shape[1]] = old
        x = self.sequences
        return {"prompts": x.prompts, "responses": x.responses, "prompt": x.prompt_index, "rewards": x.rewards,
                "old": whole.cpu()}  # fmt: skip

    @classmethod
    def from_checkpoint(cls, found: Mapping[str, Any], rows: list[int], size: int) -> PolicyBatch:
        """Return some rows of what :meth:`to_checkpoint` returned, in micro-batches of ``size`` responses."""
        sequences = Sequences(found["prompts"], found["responses"], found["prompt"], found["rewards"]).take(rows)
        out = cls.split(sequences, size)
        old = found["old"][rows]
        out.old_logp = [old[part][:, : max(1, *(sequences.lengths[i] for i in part))] for part in out.micro_batches]
        return out


def rows_of_rank(prompts: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Return which of a step's responses are a rank's: those to its part of the prompts, whole groups.

    Args:
        prompts: number of each response's prompt.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ToyError: there are more processes than prompts.

    >>> rows_of_rank([4, 4, 7, 7, 9, 9], 1, 2)
    [2, 3, 4, 5]
    """
    numbers = list(dict.fromkeys(prompts))
    n = len(numbers)
    require(n >= world_size, f"--ckpt_path: responses to {n} prompts are in use; go on with at most {n} processes")
    local = set(numbers[n * rank // world_size : n * (rank + 1) // world_size])
    return [i for i, number in enumerate(prompts) if number in local]


def concatenate_ranks(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ranks' :meth:`PolicyBatch.to_checkpoint` as one batch, rank 0's rows first."""
    out = {k: [x for part in parts for x in part[k]] for k in RESPONSES_FORMAT}
    width = max(part["old"].shape[1] for part in parts)
    return out | {"old": torch.cat([F.pad(part["old"], (0, width - part["old"].shape[1])) for part in parts])}


# of responses in a checkpoint, beside ``old``
RESPONSES_FORMAT: dict[str, Any] = {"prompts": [[0]], "responses": [], "prompt": [0], "rewards": [0.0]}


def responses_mismatch(found: Mapping[str, Any], vocabulary: int) -> str:
    """Say what is wrong with a checkpoint's responses that have the form of :data:`RESPONSES_FORMAT`; empty if nothing.

    Args:
        found: the responses.
        vocabulary: number of tokens; 0 where it is not known.
    """
    n = len(found["responses"])
    if not all(isinstance(x, list) and all(type(i) is int and i >= 0 for i in x) for x in found["responses"]):
        return ".responses are no lists of tokens"
    if not n:
        return ".responses are none"
    lengths = {k: len(found[k]) for k in ("prompts", "prompt", "rewards")}
    if uneven := [k for k, m in lengths.items() if m != n]:
        return f".{uneven[0]} has {lengths[uneven[0]]} entries, there are {n} responses"
    most = max(i for x in (*found["prompts"], *found["responses"]) for i in x)
    if vocabulary and most >= vocabulary:
        return f" has the token {most}, there are {vocabulary}"
    old, shape = found.get("old"), (n, max(1, *map(len, found["responses"])))
    if not isinstance(old, Tensor) or not old.is_floating_point() or tuple(old.shape) != shape:
        return f".old is no tensor {shape} of numbers"
    return ""


@dataclass
class PolicyStepMetrics:
    """Metrics of a policy-gradient step over this rank's sequences, by the names that they are logged under.

    Attributes:
        reward: mean over sequences.
        entropy: nats a token.
        length: mean number of tokens of a response.
        clip_fraction: fraction of tokens whose probability ratio was clipped.
        ess: effective sample size of the sequences' importance weights, as a fraction of their number.
        kl: the penalty's estimate of KL(policy || reference), nats a token; 0 without a penalty.
    """

    reward: float
    entropy: float
    length: float
    clip_fraction: float
    ess: float
    kl: float = 0.0


def policy_gradient(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: PolicyBatch,
    temperature: float,
    objective: Objective,
    weights: ResponseWeights,
    reference: nn.Module | None = None,
) -> tuple[Tensor, list[Tensor], PolicyStepMetrics]:
    """Return this rank's part of the loss and of its gradient, and the step's metrics.

    The forward passes, the reference's too, are in the ambient autocast, the backward pass is not.

    Args:
        model: the policy.
        parameters: what is trained.
        batch: responses; its ``old_logp`` is filled at the first pass.
        temperature: they were sampled at.
        objective: the loss.
        weights: of these responses, by the whole step on all ranks.
        reference: of the KL penalty; None: the policy without its adapter.
    """
    device, sequences = parameters[0].device, batch.sequences
    first, wants_reference = not batch.old_logp, objective.beta > 0 and not batch.reference_logp
    total, gradients = torch.zeros((), dtype=torch.float64, device=device), [torch.zeros_like(p) for p in parameters]
    entropy = clipped = kl = 0.0
    log_weights = []
    for k, rows in enumerate(batch.micro_batches):
        padded = pad_batch(sequences.take(rows), device)
        if wants_reference:
            batch.reference_logp.append(batch_reference_logp(model, reference, padded, temperature))
        logits = response_logits(model, padded)
        logp = token_logp(logits, padded, temperature)
        entropy += float(total_entropy(logits.detach(), padded, temperature))
        if first:
            batch.old_logp.append(logp.detach())
        old = batch.old_logp[k].to(logp)
        w = weights.take(rows)
        value, outside = objective.value(logp, old, padded.mask, w.advantage, w.normalization)
        if w.kl is not None:
            there = batch.reference_logp[k]
            value = value + kl_penalty(logp, there, padded.mask, w.kl)
            kl += float(kl_penalty(logp.detach(), there, padded.mask, torch.ones(len(rows))))
        if w.entropy:
            value = value - w.entropy * score_tokens(logits, padded, temperature)[1].sum()
        with torch.autocast(device.type, enabled=False):
            for g, part in zip(gradients, torch.autograd.grad(value, parameters), strict=True):
                g += part
        total += value.detach()
        clipped += float(outside)
        log_weights.append((logp.detach() - old).sum(1))
    n, tokens = len(sequences), sum(sequences.lengths)
    importance = torch.cat(log_weights).clamp(-10, 10).exp()
    ess = effective_sample_size(importance) / n
    reward = sum(sequences.rewards) / n
    metrics = PolicyStepMetrics(reward, entropy / tokens, tokens / n, clipped / tokens, ess, kl / tokens)
    return total, gradients, metrics


def set_clipped_gradients(parameters: list[nn.Parameter], gradients: list[Tensor], max_norm: float | None) -> None:
    """Set ``.grad`` of parameters, scaled so that the norm of all is at most ``max_norm``; None does not scale."""
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    if max_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
