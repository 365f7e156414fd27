"""One step of supervised learning, and one of Dr. GRPO, for one policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.errors import require
from lightning_toys.update_entropy import grpo
from lightning_toys.update_entropy.data import FREE, TextData
from lightning_toys.update_entropy.estimators import Kind, effective
from lightning_toys.update_entropy.rollouts import draw, uniforms
from lightning_toys.update_entropy.sequences import Sequences, pack, score_tokens, token_logits


@dataclass
class Rollouts:
    """How responses are drawn.

    Args:
        prompts: of one policy-gradient step, over all ranks together.
        group: responses to each.
        temperature: of the softmax.
        inner_steps: optimiser steps on one set of responses; the ratio's clipping matters from the second on.
    """

    prompts: int = 16
    group: int = 8
    temperature: float = 1.0
    inner_steps: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("group", 2), ("inner_steps", 1)):
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
    """Responses that are being learned from.

    Attributes:
        sequences: with rewards.
        old: l_k of the policy that drew them (N, T); None before the first pass.
    """

    sequences: Sequences
    old: Tensor | None = None


@dataclass(frozen=True)
class PolicyLook:
    """What a policy-gradient step sees: means over this rank's sequences."""

    reward: float
    entropy: float
    length: float
    clip_fraction: float
    ess: float


def policy_loss(
    model: nn.Module,
    batch: PolicyBatch,
    temperature: float,
    clipping: grpo.Clipping,
    prompts: int,
    kind: Kind = "token",
) -> tuple[Tensor, PolicyLook]:
    """Return this rank's share of Dr. GRPO's loss, in the ambient autocast, and what was seen on the way.

    Args:
        model: the policy.
        batch: responses; its ``old`` is filled at the first pass.
        temperature: they were drawn at.
        clipping: bounds of the ratio.
        prompts: of the step on all ranks together.
        kind: which entropy is reported.
    """
    device = next(model.parameters()).device
    packed = pack(batch.sequences, device)
    logp, h = score_tokens(token_logits(model, packed), packed, temperature)
    if batch.old is None:
        batch.old = logp.detach()
    value, outside = grpo.loss(logp, batch.old, batch.sequences, packed.mask, clipping)
    mine = len(grpo.groups(batch.sequences))
    weights = ((logp.detach() - batch.old) * packed.mask).sum(1).clamp(-10, 10).exp()
    share = 1.0 if kind == "sequence" else float(packed.mask.sum()) / len(batch.sequences)
    look = PolicyLook(
        sum(batch.sequences.rewards) / len(batch.sequences),
        float(h.detach().sum()) / len(batch.sequences) / share,
        float(packed.mask.sum()) / len(batch.sequences),
        float(outside),
        effective(weights) / len(weights),
    )
    return value * (mine / prompts), look


def clip_gradients(parameters: list[nn.Parameter], gradients: list[Tensor], max_norm: float | None) -> None:
    """Put gradients in place, scaled so that their norm is at most ``max_norm``."""
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    if max_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
