"""Optimisers as pure functions, so that what they did can be differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_toys.bilevel.vectors import Tensors, zeros_like


class AdamState(NamedTuple):
    """Running means of the gradient and of its square, and the number of steps taken (a tensor without axes)."""

    mean: Tensors
    square: Tensors
    step: Tensor


def adam_state(theta: Tensors) -> AdamState:
    """Return Adam's state before its first step."""
    first = next(iter(theta.values()))
    return AdamState(zeros_like(theta), zeros_like(theta), torch.zeros((), dtype=torch.float64, device=first.device))


def adam_step(
    theta: Tensors,
    gradient: Tensors,
    state: AdamState,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensors, AdamState]:
    """Take one step of Adam, differentiable in all of theta, gradient and state.

    theta <- theta - lr m / sqrt(v + eps^2), m and v corrected for their start. ``torch.optim.Adam`` divides by
    sqrt(v) + eps, whose slope at v = 0 is infinite: a zero gradient would give NaN here. The two denominators are equal
    at v = 0 and where eps is negligible, and differ by a factor of sqrt(2) at most.
    """
    step = state.step + 1
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
    new, mean, square = {}, {}, {}
    for k, x in theta.items():
        g = gradient[k]
        mean[k] = torch.lerp(state.mean[k], g, 1 - betas[0])
        square[k] = betas[1] * state.square[k] + (1 - betas[1]) * g * g
        new[k] = x - (lr / first).to(x) * mean[k] / (square[k] / second.to(x) + eps**2).sqrt()
    return new, AdamState(mean, square, step)


class Optimizer(Protocol):
    """A rule that takes one step after another; ``begin`` makes its state."""

    def begin(self, theta: Tensors) -> Any:
        """Return the state before the first step."""

    def step(self, theta: Tensors, gradient: Tensors, state: Any) -> tuple[Tensors, Any]:
        """Return the variables and the state after a step."""


@dataclass(frozen=True)
class GradientDescent:
    """theta <- theta - lr gradient."""

    lr: float

    def begin(self, theta: Tensors) -> Tensors:
        """See :meth:`Optimizer.begin`: there is no state."""
        return {}

    def step(self, theta: Tensors, gradient: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        """See :meth:`Optimizer.step`."""
        return {k: x - self.lr * gradient[k] for k, x in theta.items()}, state


@dataclass(frozen=True)
class Adam:
    """:func:`adam_step` with its settings."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def begin(self, theta: Tensors) -> AdamState:
        """See :meth:`Optimizer.begin`."""
        return adam_state(theta)

    def step(self, theta: Tensors, gradient: Tensors, state: AdamState) -> tuple[Tensors, AdamState]:
        """See :meth:`Optimizer.step`."""
        return adam_step(theta, gradient, state, self.lr, self.betas, self.eps)
