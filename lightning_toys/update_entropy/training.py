"""One step of supervised learning, and one of Dr. GRPO, for one policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.errors import require
from lightning_toys.update_entropy import grpo
from lightning_toys.update_entropy.data import FREE, TextData
from lightning_toys.update_entropy.estimators import effective
from lightning_toys.update_entropy.rollouts import draw, uniforms
from lightning_toys.update_entropy.sequences import Sequences, chunks, drawn_logp, entropy_sum, pack, token_logits


@dataclass
class Rollouts:
    """How responses are drawn.

    Args:
        prompts: of one policy-gradient step, over all ranks together.
        group: responses to each.
        temperature: of the softmax.
        inner_steps: optimiser steps on one set of responses; the ratio's clipping matters from the second on.
        micro_batch: responses of one pass; less memory, the same step; 0 for all at once.
    """

    prompts: int = 16
    group: int = 8
    temperature: float = 1.0
    inner_steps: int = 1
    micro_batch: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("group", 2), ("inner_steps", 1), ("micro_batch", 0)):
            value = getattr(self, name)
            require(value >= least, f"--model.rollouts.{name}: {value} is not allowed; give an integer >= {least}")
        require(
            0 < self.temperature < float("inf"),
            f"--model.rollouts.temperature: {self.temperature} is not allowed; give a number > 0",
        )


def sample(
    model: nn.Module,
    data: TextData,
    seed: int,
    step: int,
    stream: str,
    prompts: range,
    group: int,
    temperature: float,
    total: int,
) -> Sequences:
    """Draw responses with their rewards; a response depends on its own key only.

    Args:
        model: the policy.
        data: gives problems and rewards.
        seed: of the replica.
        step: number of the draw.
        stream: name of the use.
        prompts: numbers of the prompts to answer, of ``total``.
        group: responses to each.
        temperature: of the softmax.
        total: prompts of the draw on all ranks together.
    """
    problems = data.problems(seed, step, stream, total)
    chosen = [(number, problems[number]) for number in prompts for _ in range(group)]
    rows = [number * group + g for number in prompts for g in range(group)]
    u = uniforms(seed, step, f"tokens/{stream}", rows, data.longest_response + FREE)
    asked = [data.prompt(problem) for _, problem in chosen]
    found = draw(model, asked, [number for number, _ in chosen], u, [data.tokens.end], temperature)
    rewards = [
        data.task.reward(problem, data.tokens.decode(response))
        for (_, problem), response in zip(chosen, found.responses, strict=True)
    ]
    return Sequences(found.prompts, found.responses, found.prompt, rewards)


def supervised_loss(model: nn.Module, tokens: Tensor, response: Tensor, total: int) -> Tensor:
    """Return this rank's share of the mean cross-entropy of response tokens.

    Args:
        model: the policy.
        tokens: ids (B, L), padded on the right.
        response: true where a token is the response's (B, L).
        total: sequences of the step on all ranks together.
    """
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    live = response[:, 1:]
    # responses of a task are about as long as each other: the mean of sequences' means
    each = (losses.view(live.shape) * live).sum(1) / live.sum(1).clamp(min=1)
    return each.sum() / total


@dataclass
class PolicyBatch:
    """Responses that are being learned from, in parts that one pass takes.

    Attributes:
        sequences: with rewards.
        parts: rows of each part.
        old: l_k of the policy that drew each part (n, T); empty before the first pass.
    """

    sequences: Sequences
    parts: list[list[int]]
    old: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, sequences: Sequences, size: int) -> PolicyBatch:
        """Return a batch in parts of ``size`` responses, those of like lengths together; 0: in one part."""
        n = len(sequences)
        return cls(sequences, list(chunks(sequences, size)) if 0 < size < n else [list(range(n))])

    def stored(self) -> dict[str, Any]:
        """Return the responses and their l_k (N, T) as a checkpoint holds them: plain lists and a tensor."""
        first = self.old[0]
        whole = first.new_zeros(len(self.sequences), max(1, *self.sequences.lengths))
        for rows, old in zip(self.parts, self.old, strict=True):
            whole[rows, : old.shape[1]] = old
        return {**vars(self.sequences), "old": whole.cpu()}

    @classmethod
    def taken_up(cls, found: Mapping[str, Any], rows: list[int], size: int) -> PolicyBatch:
        """Return some rows of what :meth:`stored` returned, in parts of ``size`` responses."""
        sequences = Sequences(**{k: v for k, v in found.items() if k != "old"}).take(rows)
        out = cls.of(sequences, size)
        mine = found["old"][rows]
        out.old = [mine[part][:, : max(1, *(sequences.lengths[i] for i in part))] for part in out.parts]
        return out


def rows_of(prompts: Sequence[int], rank: int, world: int) -> list[int]:
    """Return which of a step's responses are a rank's: those to its share of the prompts, whole groups.

    Args:
        prompts: number of each response's prompt.
        rank: of this process.
        world: number of processes.

    Raises:
        ToyError: there are more processes than prompts.
    """
    numbers = list(dict.fromkeys(prompts))
    n = len(numbers)
    require(n >= world, f"--ckpt_path: responses to {n} prompts are in use; go on with at most {n} processes")
    mine = set(numbers[n * rank // world : n * (rank + 1) // world])
    return [i for i, number in enumerate(prompts) if number in mine]


def side_by_side(shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the ranks have :meth:`PolicyBatch.stored` as one batch, rank 0's rows first."""
    out = {k: [x for share in shares for x in share[k]] for k in STORED}
    width = max(share["old"].shape[1] for share in shares)
    return out | {"old": torch.cat([F.pad(share["old"], (0, width - share["old"].shape[1])) for share in shares])}


STORED: dict[str, Any] = {"prompts": [[0]], "responses": [], "prompt": [0], "rewards": [0.0]}  # in a checkpoint


def stored_misfit(found: Mapping[str, Any], vocabulary: int) -> str:
    """Say what is wrong with a batch of a checkpoint that has the form of :data:`STORED`, if something is.

    Args:
        found: the batch.
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
class PolicyLook:
    """What a policy-gradient step sees of this rank's sequences."""

    reward: float
    entropy: float
    length: float
    clip_fraction: float
    ess: float


def policy_gradient(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: PolicyBatch,
    temperature: float,
    clipping: grpo.Clipping,
    prompts: int,
) -> tuple[Tensor, list[Tensor], PolicyLook]:
    """Return this rank's share of Dr. GRPO's loss and of its gradient, and what was seen on the way.

    The forward pass is in the ambient autocast, the backward pass is not.

    Args:
        model: the policy.
        parameters: what is trained.
        batch: responses; its ``old`` is filled at the first pass.
        temperature: they were drawn at.
        clipping: bounds of the ratio.
        prompts: of the step on all ranks together.
    """
    device, sequences = parameters[0].device, batch.sequences
    A, share = grpo.advantages(sequences), grpo.shares(sequences) * len(grpo.groups(sequences)) / prompts
    first = not batch.old
    total, gradients = torch.zeros((), dtype=torch.float64, device=device), [torch.zeros_like(p) for p in parameters]
    entropy = clipped = 0.0
    log_weights = []
    for k, rows in enumerate(batch.parts):
        packed = pack(sequences.take(rows), device)
        logits = token_logits(model, packed)
        logp = drawn_logp(logits, packed, temperature)
        entropy += float(entropy_sum(logits.detach(), packed, temperature))
        if first:
            batch.old.append(logp.detach())
        old = batch.old[k].to(logp)
        value, outside = grpo.loss(logp, old, packed.mask, A[rows], share[rows], clipping)
        with torch.autocast(device.type, enabled=False):
            for g, part in zip(gradients, torch.autograd.grad(value, parameters), strict=True):
                g += part
        total += value.detach()
        clipped += float(outside)
        log_weights.append((logp.detach() - old).sum(1))
    n, tokens = len(sequences), sum(sequences.lengths)
    weights = torch.cat(log_weights).clamp(-10, 10).exp()
    ess = effective(weights) / n
    look = PolicyLook(sum(sequences.rewards) / n, entropy / tokens, tokens / n, clipped / tokens, ess)
    return total, gradients, look


def clip_gradients(parameters: list[nn.Parameter], gradients: list[Tensor], max_norm: float | None) -> None:
    """Put gradients in place, scaled so that their norm is at most ``max_norm``."""
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    if max_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
