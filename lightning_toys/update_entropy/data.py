"""Problems to learn from and to be asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.task import Addition, Characters, Problem, Task, Tokens

FREE = 4  # tokens that a drawn response may be longer than a right one


class TextData(ToyDataModule):
    """Base of the data modules of language-model policies: a task and its tokens.

    Args:
        batch_size: solutions of one supervised step, over all ranks together.
    """

    drawn = True
    task: Task
    tokens: Tokens
    longest_prompt: int  # tokens
    longest_response: int  # tokens, the end included; what is drawn may go on a little longer

    def problems(self, seed: int, step: int, stream: str, count: int) -> list[Problem]:
        """Return the problems of (seed, step, stream)."""
        return self.task.problems(keyed_generator(seed, step, f"problems/{stream}"), count)

    def prompt(self, problem: Problem) -> list[int]:
        """Return a prompt's tokens."""
        return self.tokens.encode(problem.prompt)

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """Return a loader of supervised batches: tokens (R, steps, B, L), and which of them are the response's."""
        width = self.longest_prompt + self.longest_response

        def draw(start: int, stop: int) -> tuple[Tensor, ...]:
            shape = (len(seeds), stop - start, self.batch_size, width)
            tokens, response = np.zeros(shape, np.int64), np.zeros(shape, bool)
            for r, seed in enumerate(seeds):
                for k, step in enumerate(range(start, stop)):
                    generator = keyed_generator(seed, step, "solutions")
                    for b, problem in enumerate(self.problems(seed, step, "supervised", self.batch_size)):
                        asked = self.prompt(problem)
                        said = [*self.tokens.encode(self.task.solution(problem, generator)), self.tokens.end]
                        whole = (asked + said)[:width]
                        tokens[r, k, b, : len(whole)] = whole
                        response[r, k, b, len(asked) : len(whole)] = True
            return torch.from_numpy(tokens), torch.from_numpy(response)

        return DrawnLoader(draw, self.batch_size)


class ArithmeticData(TextData):
    """Sums of two numbers with worked steps, such as ``37+45=`` answered by ``7+5=12,3+4+1=08;082``.

    Args:
        digits: of each number.
        slips: share of the solutions to learn from that contain a slip.
        batch_size: solutions of one supervised step, over all ranks together.
    """

    def __init__(self, digits: int = 2, slips: float = 0.2, batch_size: int = 64) -> None:
        super().__init__(batch_size)
        task = Addition(digits, slips)
        self.task, self.tokens = task, Characters(task.symbols)
        self.longest_prompt, self.longest_response = 2 * digits + 2, task.longest
