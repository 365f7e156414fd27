"""Prompts and rewards of one's own: a file of prompts, and a function that says what responses are worth."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_toys.errors import ToyError, bounded, check_settings, require
from lightning_toys.training import parquet_files
from lightning_toys.update_entropy.data import (
    Messages,
    ModelTextData,
    encode_chat,
    has_chat_template,
)
from lightning_toys.update_entropy.rewards import COMPARING, REWARD, checked_rewards, find_reward
from lightning_toys.update_entropy.sequences import Sequences, prompt_clusters
from lightning_toys.update_entropy.task import Problem

FILE = "--data.file"
PROMPT_COLUMNS = ("prompt", "messages", "question")  # looked for in this order
LARGEST_FILE = 1 << 30  # bytes


@dataclass(frozen=True)
class PromptRow(Problem):
    """A row of a file.

    Attributes:
        row: all of its columns; ``answer`` is the answer's.
        messages: of a chat, where the prompt is one.
    """

    row: dict[str, Any] = field(default_factory=dict)
    messages: Messages | None = None


def read_rows(path: Path, flag: str = FILE) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number (0: unknown) and columns of each row of a JSONL, CSV or Parquet file.

    Args:
        path: of the file.
        flag: that gave it, for errors.

    Raises:
        ToyError: it is no such file, or a line of it is none.
    """
    require(path.exists(), f"{flag}: {path} is not there; give a JSONL, CSV or Parquet file")
    require(path.is_file(), f"{flag}: {path} is no ordinary file; give a JSONL, CSV or Parquet file")
    require(path.stat().st_size <= LARGEST_FILE, f"{flag}: {path} is larger than 1 GiB; give a part of it")
    kind = path.suffix.lower()
    require(
        kind in (".jsonl", ".csv", parquet_files.SUFFIX),
        f"{flag}: {path} is not read; give .jsonl (an object a line), .csv (with a header) or {parquet_files.SUFFIX}",
    )
    if kind == parquet_files.SUFFIX:
        yield from ((0, row) for _, row in parquet_files.parquet_rows(path, flag))
        return
    try:
        with path.open(newline="" if kind == ".csv" else None, encoding="utf-8") as file:
            if kind == ".csv":
                for number, row in enumerate(csv.DictReader(file), 1):
                    require(None not in row, f"{flag}: {path} row {number} has more fields than the header")
                    yield 0, dict(row)
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ToyError(f"{flag}: {path} line {number} is no JSON: {str(error)[:80]}") from None
                require(isinstance(found, dict), f"{flag}: {path} line {number} is no object; give one a line")
                yield number, found
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ToyError(f"{flag}: {path} cannot be read: {type(error).__name__}: {str(error)[:80]}") from None


def is_messages(value: Any) -> bool:
    """Whether a value is a chat: a list of objects with the texts ``role`` and ``content``.

    >>> is_messages([{"role": "user", "content": "Hi"}]), is_messages("Hi")
    (True, False)
    """
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in value)
    )


class PromptTask:
    """The rows of a file as problems.

    Args:
        rows: of the file.
        reward: name of the reward, see :func:`~lightning_toys.update_entropy.rewards.find_reward`.
        arguments: of the reward.
    """

    def __init__(self, rows: list[PromptRow], reward: str, arguments: dict[str, Any] | None = None) -> None:
        self.rows, self.name, self.function = rows, reward, find_reward(reward, arguments)

    def problems(self, generator: np.random.Generator, count: int) -> list[Problem]:
        """See :meth:`Task.problems`: every row once before any comes again, in random order."""
        n = len(self.rows)
        order = np.concatenate([generator.permutation(n) for _ in range(-(-count // n))])[:count]
        return [self.rows[int(i)] for i in order]

    def solution(self, problem: Problem, generator: np.random.Generator) -> str:
        """See :meth:`Task.solution`: the answer.

        Raises:
            ToyError: the file has none.
        """
        assert isinstance(problem, PromptRow)
        if problem.row.get("answer") is None:
            raise ToyError(f"{FILE}: there is no answer to imitate in it; give --model.warm_steps 0")
        return problem.answer

    def reward(self, problem: Problem, response: str) -> float:
        """See :meth:`Task.reward`."""
        return self.rewards([problem], [response])[0]

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """Return the rewards of several responses, by one call of the function."""
        rows = [p.row for p in problems if isinstance(p, PromptRow)]
        return checked_rewards(self.function, self.name, [p.prompt for p in problems], list(responses), [*rows])


class PromptData(ModelTextData):
    """Prompts out of a file, answered by a pretrained model, with a reward of one's own.

    Args:
        file: JSONL (an object a line), CSV (with a header) or Parquet, in which messages are a list of structs.
        prompt: column of the prompt, a text or a list of messages; null: prompt, messages or question.
        answer: column of the answer; a file without it wants a reward that needs none.
        reward: ``exact``, ``last_number``, ``regex``, ``length``, or ``module.function`` of (prompts, responses, rows)
            that returns a number for each response; rows are the file's, as dictionaries.
        reward_arguments: of the reward's function, by name, such as ``{target: 200}`` of length.
        chat: whether a prompt that is a text becomes a user's turn in the tokenizer's chat template (TRL leaves such a
            prompt as it is: false); messages always do.
        system: text of a system's turn before it; null for none.
        tokens: model whose tokenizer is used; null: that of ``--model.backbone``.
        longest: tokens of an answer; what is longer is cut where it is learned from, and a line says so. A sampled
            response may be a little longer.
        batch_size: answers of one supervised step, over all ranks together.

    Raises:
        ToyError: a value is not allowed, the file cannot be read, or there is no such reward.
    """

    def __init__(
        self,
        file: str | None = None,
        prompt: str | None = None,
        answer: str = "answer",
        reward: str = "last_number",
        chat: bool = True,
        system: str | None = None,
        tokens: str | None = None,
        longest: int = 128,
        batch_size: int = 8,
        reward_arguments: dict[str, Any] | None = None,
    ) -> None:
        check_settings(PromptData, locals(), "--data.")
        bounded("--data.longest", longest, 1)
        super().__init__(tokens, batch_size)
        require(file is not None, f"{FILE}: null is not allowed; give a JSONL, CSV or Parquet file of prompts")
        path = Path(str(file)).expanduser()
        rows = [self.as_row(path, i, number, row, prompt, answer) for i, (number, row) in enumerate(read_rows(path), 1)]
        require(len(rows) > 0, f"{FILE}: {path} has no rows; give at least one prompt")
        self.chat, self.system, self.max_response_length = chat, system, longest
        self.prompt_task = PromptTask(rows, reward, reward_arguments)
        bare = next((i for i, row in enumerate(rows, 1) if row.row.get("answer") is None), 0)
        require(
            not bare or reward not in COMPARING,
            f"{REWARD}: {reward} compares with answers, and row {bare} of {path} has none in {answer!r}; give the "
            "column of answers as --data.answer, or another reward",
        )
        self.task = self.prompt_task

    @staticmethod
    def as_row(path: Path, index: int, line: int, row: dict[str, Any], prompt: str | None, answer: str) -> PromptRow:
        """Return a row of the file as a problem.

        Args:
            path: of the file, for errors.
            index: number of the row, from 1.
            line: of the file, 0 where it is not known.
            row: columns.
            prompt: column of the prompt, or None.
            answer: column of the answer.

        Raises:
            ToyError: it has no prompt.
        """
        where = f"{FILE}: {path} {f'line {line}' if line else f'row {index}'}"
        column = prompt or next((c for c in PROMPT_COLUMNS if c in row), PROMPT_COLUMNS[0])
        if column not in row:
            raise ToyError(f"{where} has no {column!r}; give --data.prompt, one of {', '.join(map(str, row))}"[:300])
        value = row[column]
        content = row if answer not in row else {**row, "answer": row[answer]}
        text = "" if row.get(answer) is None else str(row[answer])
        if is_messages(value):
            return PromptRow("\n".join(m["content"] for m in value), text, content, value)
        require(isinstance(value, str) and bool(value.strip()), f"{where}: {column} is neither a text nor messages")
        return PromptRow(value, text, content)

    def clusters(self, responses: Sequences) -> list[int]:
        """See :meth:`TextData.clusters`: a prompt that came twice is one cluster."""
        return prompt_clusters(responses)

    def rewards(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """See :meth:`TextData.rewards`: one call of the function for all."""
        return self.prompt_task.rewards(problems, responses)

    @cached_property
    def max_prompt_length(self) -> int:  # type: ignore[override]
        """Tokens of the longest prompt."""
        return max(len(self.encode_prompt(row)) for row in self.prompt_task.rows)

    def encode_prompt(self, problem: Problem) -> list[int]:
        """See :meth:`TextData.encode_prompt`."""
        messages = problem.messages if isinstance(problem, PromptRow) else None
        if messages is None and not (self.chat and has_chat_template(self.tokenizer)):
            return self.tokenizer.encode(f"{self.system}\n{problem.prompt}" if self.system else problem.prompt)
        turns = messages or [{"role": "user", "content": problem.prompt}]
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return encode_chat(self.tokenizer, [*system, *turns])
