"""Small word problems for language models that read: stories of sums and differences that a program can check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_toys.errors import require
from lightning_toys.update_entropy.task import Problem

INSTRUCTION = "Think briefly, then end with the number."
NAMES = ("Tom", "Anna", "Ben", "Maria", "Sam", "Lucy", "Omar", "Nina", "Jack", "Emma", "Leo", "Ida")
NUMBER = re.compile(r"((?<![\w)])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))")


@dataclass(frozen=True)
class Scene:
    """A kind of story. A template is its opening, as many events as there are steps, and its question.

    Args:
        opening: of ``{name}``, ``{n}`` and ``{things}``.
        more: events that add ``{n}``.
        less: events that take away ``{n}``.
        question: what is left.
        things: what is counted, in the plural.
    """

    opening: str
    more: tuple[str, ...]
    less: tuple[str, ...]
    question: str
    things: tuple[str, ...]


SCENES = (
    Scene(
        "{name} has {n} {things}.",
        ("{name} buys {n} more {things}.", "{name} finds {n} more {things}.", "A friend gives {name} {n} {things}."),
        ("{name} gives away {n} {things}.", "{name} loses {n} {things}.", "{name} sells {n} {things}."),
        "How many {things} does {name} have now?",
        ("apples", "marbles", "books", "stickers", "coins", "pencils"),
    ),
    Scene(
        "There are {n} {things} in a box.",
        ("{name} puts {n} more {things} into the box.", "Then {n} more {things} are added to the box."),
        ("{name} takes {n} {things} out of the box.", "Then {n} {things} are removed from the box."),
        "How many {things} are in the box now?",
        ("balls", "eggs", "candles", "oranges", "buttons"),
    ),
    Scene(
        "There are {n} people on a bus.",
        ("At the next stop {n} people get on.", "Then {n} more people board the bus."),
        ("At the next stop {n} people get off.", "Then {n} people leave the bus."),
        "How many people are on the bus now?",
        ("people",),
    ),
    Scene(
        "A farm has {n} {things}.",
        ("The farmer buys {n} more {things}.", "Then {n} {things} are born."),
        ("The farmer sells {n} {things}.", "Then {n} {things} run away."),
        "How many {things} does the farm have now?",
        ("sheep", "cows", "goats", "pigs", "horses"),
    ),
    Scene(
        "{name} bakes {n} {things}.",
        ("Then {name} bakes {n} more {things}.", "A neighbor brings {n} more {things}."),
        ("The children eat {n} {things}.", "{name} drops {n} {things} on the floor and throws them away."),
        "How many {things} are there now?",
        ("cookies", "muffins", "pies", "rolls"),
    ),
)


@dataclass(frozen=True)
class WordProblem(Problem):
    """A problem that knows how its story goes.

    Args:
        terms: the number of the opening, and what each event adds, negative if it takes away.
    """

    terms: tuple[int, ...]


class WordProblems:
    """Stories of additions and subtractions; no number in them is below 0, what is there between two events neither.

    Args:
        steps: events of a story, an operation each.
        largest: number in a story; sums may be larger.
        instruction: what follows the question.
    """

    def __init__(self, steps: int = 1, largest: int = 20, instruction: str = INSTRUCTION) -> None:
        require(1 <= steps <= 4, f"--data.steps: {steps} is not allowed; give an integer from 1 to 4")
        require(2 <= largest <= 10**6, f"--data.largest: {largest} is not allowed; give an integer from 2 to 1000000")
        self.steps, self.largest, self.instruction = steps, largest, instruction

    def problems(self, generator: np.random.Generator, count: int) -> list[Problem]:
        """See :meth:`Task.problems`."""
        # as many uniforms for each: the first problems are the same however many are drawn
        return [self.problem(u.tolist()) for u in generator.random((count, 4 + 2 * self.steps))]

    def problem(self, u: Sequence[float]) -> WordProblem:
        """Return the problem of uniforms: scene, name, things, the first number, then event and number of each step."""
        scene = pick(SCENES, u[0])
        words: dict[str, str | int] = {"name": pick(NAMES, u[1]), "things": pick(scene.things, u[2])}
        terms = [between(2, self.largest, u[3])]  # from 2: things are in the plural
        story = [scene.opening.format(n=terms[0], **words)]
        for which, size in zip(u[4::2], u[5::2], strict=True):
            left = sum(terms)
            event = pick(scene.more + scene.less if left >= 2 else scene.more, which)
            takes = event in scene.less
            n = between(2, min(left, self.largest) if takes else self.largest, size)
            terms.append(-n if takes else n)
            story.append(event.format(n=n, **words))
        question = scene.question.format(**words)
        return WordProblem(" ".join([*story, question, self.instruction]), str(sum(terms)), tuple(terms))

    def solution(self, problem: Problem, generator: np.random.Generator) -> str:
        """See :meth:`Task.solution`; always right."""
        assert isinstance(problem, WordProblem)
        total, lines = problem.terms[0], []
        for term in problem.terms[1:]:
            lines.append(f"{total} {'-' if term < 0 else '+'} {abs(term)} = {total + term}.")
            total += term
        return " ".join([*lines, f"The answer is {total}."])

    def reward(self, problem: Problem, response: str) -> float:
        """Return 1 where the last number of the response is the answer, and 0 otherwise."""
        return float(last_integer(response) == problem.answer)


def pick[T](options: Sequence[T], u: float) -> T:
    return options[int(u * len(options))]


def between(low: int, high: int, u: float) -> int:
    """Return the integer from low to high, both included, of a uniform."""
    return low + int(u * (high - low + 1))


def last_integer(text: str) -> str | None:
    """Return the last number of a text as an integer is written, None where there is none or it is a fraction.

    Commas between thousands are read, so are signs (a minus right behind a number or a word is an operation's), and a
    point that ends a sentence is not taken for a decimal one.
    """
    return None
