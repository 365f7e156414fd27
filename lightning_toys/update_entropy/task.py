"""Tasks for a policy: additions with worked steps, whose answers a program can check.

``37+45=`` is answered by ``7+5=12,3+4+1=08;082``: the digits from the right, each sum with its carry in two digits,
then the result. Solutions to learn from contain slips that a pupil would make, so that a policy trained on them has
its entropy where one can go wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightning_toys.errors import require


@dataclass(frozen=True)
class Problem:
    """A prompt, and the answer that earns the reward, as text."""

    prompt: str
    answer: str


class Task(Protocol):
    """Problems, solutions to imitate, and a verifiable reward."""

    def problems(self, generator: np.random.Generator, count: int) -> list[Problem]:
        """Return ``count`` problems, drawn from the generator."""

    def solution(self, problem: Problem, generator: np.random.Generator) -> str:
        """Return a response to imitate, which may contain slips drawn from the generator."""

    def reward(self, problem: Problem, response: str) -> float:
        """Return the reward of a response."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        eos_token_id: token that ends a response.
        vocab_size: number of tokens.
    """

    eos_token_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without beginning- or end-of-sequence tokens."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""


class CharacterTokenizer:
    """A token for each of a few characters, after padding (0), beginning (1) and end of sequence (2).

    Args:
        symbols: the characters.

    >>> CharacterTokenizer("01").encode("10")
    [4, 3]
    """

    SPECIAL = ("<pad>", "<bos>", "<end>")

    def __init__(self, symbols: str) -> None:
        self.symbols = symbols
        self.index = {c: i + len(self.SPECIAL) for i, c in enumerate(symbols)}
        self.eos_token_id, self.vocab_size = 2, len(symbols) + len(self.SPECIAL)

    def encode(self, text: str) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        return [self.index[c] for c in text]

    def decode(self, ids: list[int]) -> str:
        """See :meth:`Tokenizer.decode`; a backbone may have more tokens than there are characters: U+FFFD."""
        first = len(self.SPECIAL)
        return "".join(self.symbols[i - first] if i < self.vocab_size else "\ufffd" for i in ids if i >= first)


class Addition:
    """The task of adding two numbers with worked steps.

    Args:
        digits: of each number.
        slips: fraction of the solutions that contain a slip: a carry forgotten, or a sum that is off by one.

    Raises:
        ToyError: a value is not allowed.

    >>> Addition().worked_solution(Addition().problem(37, 45))
    '7+5=12,3+4+1=08;082'
    """

    symbols = "0123456789+=,;"

    def __init__(self, digits: int = 2, slips: float = 0.2) -> None:
        require(1 <= digits <= 9, f"--data.digits: {digits} is not allowed; give an integer from 1 to 9")
        require(0 <= slips <= 1, f"--data.slips: {slips} is not allowed; give a number from 0 to 1")
        self.digits, self.slips = digits, slips

    @property
    def max_solution_length(self) -> int:
        """Tokens of a solution, the end-of-sequence token included."""
        return len("7+5=12") + (self.digits - 1) * len(",3+4+1=08") + 1 + self.digits + 1 + 1

    def problems(self, generator: np.random.Generator, count: int) -> list[Problem]:
        """See :meth:`Task.problems`."""
        drawn = generator.integers(0, 10**self.digits, (count, 2))
        return [self.problem(int(a), int(b)) for a, b in drawn]

    def problem(self, a: int, b: int) -> Problem:
        """Return the problem a + b."""
        n = self.digits
        return Problem(f"{a:0{n}d}+{b:0{n}d}=", f"{a + b:0{n + 1}d}")

    def solution(self, problem: Problem, generator: np.random.Generator) -> str:
        """See :meth:`Task.solution`."""
        slips, where, kind, sign = generator.random(4)
        at = int(where * self.digits) if slips < self.slips else -1
        return self.worked_solution(problem, at, "carry" if kind < 0.5 else "sum", 1 if sign < 0.5 else -1)

    def worked_solution(self, problem: Problem, slip_at: int = -1, kind: str = "sum", by: int = 1) -> str:
        """Return the worked solution; what comes after a slip follows from it.

        Args:
            problem: a + b.
            slip_at: column of the slip, from the right; -1 for none.
            kind: ``carry``, which is taken for 0 where it was 1 (and the other way round), or ``sum``.
            by: error of the sum.
        """
        a, b = problem.prompt.rstrip("=").split("+")
        carry, lines, result = 0, [], ""
        for k in range(self.digits):
            x, y = int(a[-1 - k]), int(b[-1 - k])
            if k == slip_at and kind == "carry" and k > 0:
                carry = 1 - carry
            total = x + y + carry
            if k == slip_at and (kind == "sum" or k == 0):
                total = min(max(total + by, 0), 19)
            lines.append(f"{x}+{y}{f'+{carry}' if k else ''}={total:02d}")
            carry, digit = divmod(total, 10)
            result = f"{digit}{result}"
        return f"{','.join(lines)};{carry}{result}"

    def reward(self, problem: Problem, response: str) -> float:
        """Return 1 for the right result after the one semicolon, whatever the lines before it say, and 0 otherwise."""
        lines, separator, result = response.partition(";")
        return float(bool(separator) and bool(lines) and result == problem.answer)
