"""Responses that are given: the very batch of a step of somebody's training, and the evaluation sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from lightning_toys.errors import ToyError, bounded, note, require
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.update_entropy.data import EXTRA_TOKENS, ModelTextData
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.rollout_files import read_rollouts, to_sequences
from lightning_toys.update_entropy.sequences import Sequences, prompt_clusters
from lightning_toys.update_entropy.task import Problem

FILE, EVALUATION = "--data.file", "--data.evaluation"
UPDATE = "update"  # U itself is E
LOGP_TOLERANCE = 0.05  # nats a token, between engines of bfloat16 that sample from and score one policy


@dataclass(frozen=True)
class PromptIds(Problem):
    """A prompt that is known as token ids.

    Attributes:
        ids: of the prompt.
    """

    ids: tuple[int, ...] = field(default=())


class GivenPrompts:
    """The prompts of given responses as problems, without a reward.

    Args:
        prompts: token ids, each prompt once.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.rows = [PromptIds("", "", tuple(p)) for p in prompts]

    def problems(self, generator: np.random.Generator, count: int) -> list[Problem]:
        """See :meth:`Task.problems`: every prompt once before any comes again, in random order."""
        n = len(self.rows)
        order = np.concatenate([generator.permutation(n) for _ in range(-(-count // n))])[:count]
        return [self.rows[int(i)] for i in order]

    def solution(self, problem: Problem, generator: np.random.Generator) -> str:
        """See :meth:`Task.solution`.

        Raises:
            ToyError: always.
        """
        raise ToyError(f"{FILE}: RolloutData has a step's responses, and nothing to imitate")

    def reward(self, problem: Problem, response: str) -> float:
        """See :meth:`Task.reward`: not known."""
        return math.nan


class RolloutData(ModelTextData):
    """The batch U of a step of somebody's training, which `test` probes without sampling it.

    Args:
        file: JSONL (an object a line), Parquet or npz with token ids (``prompt_ids``, ``response_ids``) or texts
            (``prompt``, ``response``), and ``reward`` or ``advantage``; of both, advantages are taken. Optional are
            ``old_logp``, the log-probability of each response token under the policy that generated it (without it
            ratios are 1), and ``group``, common to the responses of a prompt (without it, those of equal prompts are a
            group).
        evaluation: where E comes from: null samples responses to U's prompts from the policy, a file of the same form
            gives them, and ``update`` takes U itself. E is taken as the policy's own draw: of ``old_logp`` in it no
            ratio is taken, and a line says so where they are not the policy's.
        tokens: model whose tokenizer is used; null: that of ``--model.backbone``.
        longest: tokens of a sampled response; null: as many as the longest of the file has.

    Raises:
        ToyError: a file cannot be read, or is none of responses.
    """

    gives_rewards = False

    def __init__(
        self,
        file: str | None = None,
        evaluation: str | None = None,
        tokens: str | None = None,
        longest: int | None = None,
    ) -> None:
        if longest is not None:
            bounded("--data.longest", longest, 1)
        super().__init__(tokens, 1)
        if file is None:
            raise ToyError(f"{FILE}: null is not allowed; give a JSONL, Parquet or npz file of responses")
        self.file, self.evaluation, self.longest = file, evaluation, longest
        self.rows = read_rollouts(file, FILE)
        require(
            self.rows[0].advantage is not None or not math.isnan(self.rows[0].reward),
            f"{FILE}: {file} has neither reward nor advantage; give one of them",
        )
        given = evaluation not in (None, UPDATE)
        self.evaluation_rows = read_rollouts(str(evaluation), EVALUATION) if given else []

    def setup(self, stage: str) -> None:
        """Refuse a training.

        Raises:
            ToyError: the stage is ``fit``.
        """
        require(stage != "fit", "--data: RolloutData has a step's responses and nothing to train on; give `test`")

    def bind_backbone(self, backbone: str) -> None:
        """See :meth:`TextData.bind_backbone`; texts are then read in the backbone's tokens."""
        before = self.source
        super().bind_backbone(backbone)
        for name in ("update", "task", "max_response_length") if self.source != before else ():
            self.__dict__.pop(name, None)

    @cached_property
    def update(self) -> Sequences:
        """U."""
        return to_sequences(self.rows, self.tokenizer)

    @cached_property
    def task(self) -> GivenPrompts:  # type: ignore[override]
        """U's prompts."""
        return GivenPrompts([list(p) for p in dict.fromkeys(map(tuple, self.update.prompts))])

    @cached_property
    def max_prompt_length(self) -> int:  # type: ignore[override]
        """Tokens of the longest prompt."""
        return max(map(len, self.update.prompts))

    @cached_property
    def max_response_length(self) -> int:  # type: ignore[override]
        """Tokens of a sampled response, less :data:`EXTRA_TOKENS`: it has as many as were asked for at most."""
        return (self.longest or max(self.update.lengths)) - EXTRA_TOKENS

    def encode_prompt(self, problem: Problem) -> list[int]:
        """See :meth:`TextData.encode_prompt`."""
        assert isinstance(problem, PromptIds)
        return list(problem.ids)

    def clusters(self, responses: Sequences) -> list[int]:
        """See :meth:`TextData.clusters`: a prompt that came twice is one cluster."""
        return prompt_clusters(responses)

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """See :meth:`TextData.rewards`: not known."""
        return [math.nan] * len(responses)

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """See :meth:`TextData.loader`.

        Raises:
            ToyError: always.
        """
        raise ToyError("--data: RolloutData has a step's responses and nothing to train on; give `test`")

    def given_update(self, model: nn.Module) -> Sequences:
        """See :meth:`TextData.given_update`."""
        check_fits(self.update, model, f"{FILE}: {self.file}")
        return self.update

    def given_evaluation(self, model: nn.Module) -> Sequences | None:
        """See :meth:`TextData.given_evaluation`."""
        if self.evaluation is None:
            return None
        if self.evaluation == UPDATE:
            return self.update
        found = to_sequences(self.evaluation_rows, self.tokenizer)
        check_fits(found, model, f"{EVALUATION}: {self.evaluation}")
        return found


def warn_of_another_policy(model: nn.Module, evaluation: Sequences, temperature: float) -> float:
    """Say so where E's own log-probabilities are not the policy's: E counts as the policy's draw.

    Args:
        model: the policy.
        evaluation: E, with ``old_logp`` or without.
        temperature: it was generated at.

    Returns:
        The greatest difference, nats a token; 0 where E has no log-probabilities.
    """
    if not evaluation.old_logp:
        return 0.0
    logp = evaluate(model, evaluation, temperature).logp
    difference: float = max(
        abs(x - y)
        for old, new in zip(evaluation.old_logp, logp.tolist(), strict=True)
        for x, y in zip(old, new, strict=False)  # the latter is padded
    )
    if difference > LOGP_TOLERANCE:
        note(
            f"{EVALUATION}: its old_logp are up to {difference:.2g} nats a token away from the policy's: the numbers "
            "describe these sequences as if the policy had generated them, no weight is put on that"
        )
    return difference


def check_fits(sequences: Sequences, model: nn.Module, where: str) -> None:
    """Refuse token ids that a model does not have, and texts longer than it reads.

    Args:
        sequences: of a file.
        model: a causal language model of transformers' interface.
        where: flag and file, for errors.

    Raises:
        ToyError: names the token or the length.
    """
    config: Any = model.config
    config = config.get_text_config()
    largest = max(i for x in (*sequences.prompts, *sequences.responses) for i in x)
    require(largest < config.vocab_size, f"{where} has the token {largest}; the model has {config.vocab_size}")
    longest = max(len(p) + len(r) - 1 for p, r in zip(sequences.prompts, sequences.responses, strict=True))
    positions = getattr(config, "max_position_embeddings", None) or longest
    require(longest <= positions, f"{where} has a text of {longest} tokens; the model reads {positions}")
