"""What an objective asks of its network: the inputs and targets of a step, recorded from the objective itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_toys.nets import ConditionalNet


class Term(NamedTuple):
    """One term of a loss, the norm of net(x, c, t) - target.

    Attributes:
        x: (R, B, D).
        c: (R, B, C).
        t: (R, B, 1), or None for a network without time.
        target: (R, B, D).
    """

    x: Tensor
    c: Tensor
    t: Tensor | None
    target: Tensor


class Recorder(ConditionalNet):
    """Notes what it is called with, and answers with zeros: a residual net(...) - target is then minus its target."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        """Note the inputs; return zeros, shaped as x."""
        self.calls.append((x, c, t))
        return torch.zeros_like(x)


def record_terms(residuals: Callable[[ConditionalNet], list[Tensor]]) -> list[Term]:
    """Return the terms of a loss whose residuals are net(x, c, t) - target, with inputs that no output goes into.

    Args:
        residuals: of a network, one tensor (R, B, D) for each time that the network is called.
    """
    recorder = Recorder()
    found = residuals(recorder)
    return [Term(*inputs, target=-r) for inputs, r in zip(recorder.calls, found, strict=True)]
