"""Optimisers as pure functions, so that what they did can be differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_toys.bilevel.vectors import Tensors, zeros_like


class AdamState(NamedTuple):
    """Adam's state, as ``torch.optim.Adam`` names it.

    Attributes:
        exp_avg: running mean of the gradient, each (R, ...) as theta.
        exp_avg_sq: running mean of its square, likewise.
        step: steps taken, a float64 tensor without axes: replicas step together.
    """

    exp_avg: Tensors
    exp_avg_sq: Tensors
    step: Tensor


def adam_init(theta: Tensors) -> AdamState:
    """Return Adam's state before its first step, for variables theta."""
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
    """Take one step of Adam (arXiv 1412.6980), differentiable in theta, gradient and state; return theta and state.

    theta <- theta - lr m / sqrt(v + eps^2), m and v corrected for their start at zero. ``torch.optim.Adam`` divides by
    sqrt(v) + eps, whose derivative at v = 0 is infinite: a zero gradient would give NaN here. The two denominators are
    equal at v = 0 and where eps is negligible, and differ by a factor of sqrt(2) at most.
    """
    step = state.step + 1
    bias_correction1, bias_correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    new, exp_avg, exp_avg_sq = {}, {}, {}
    for k, x in theta.items():
        g = gradient[k]
        exp_avg[k] = torch.lerp(state.exp_avg[k], g, 1 - betas[0])
        exp_avg_sq[k] = betas[1] * state.exp_avg_sq[k] + (1 - betas[1]) * g * g
        new[k] = (
            x - (lr / bias_correction1).to(x) * exp_avg[k] / (exp_avg_sq[k] / bias_correction2.to(x) + eps**2).sqrt()
        )
    return new, AdamState(exp_avg, exp_avg_sq, step)


class Optimizer(Protocol):
    """A gradient rule as two pure functions. Both must be differentiable by torch and keep the replica axis apart."""

    def init(self, theta: Tensors) -> Any:
        """Return the state before the first step, for variables theta; any tree of tensors."""

    def step(self, theta: Tensors, gradient: Tensors, state: Any) -> tuple[Tensors, Any]:
        """Return the variables and the state after a step along ``gradient``, which has theta's names and shapes."""


@dataclass(frozen=True)
class GradientDescent:
    """Gradient descent, theta <- theta - lr gradient."""

    lr: float

    def init(self, theta: Tensors) -> Tensors:
        """See :meth:`Optimizer.init`: there is no state."""
        return {}

    def step(self, theta: Tensors, gradient: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        """See :meth:`Optimizer.step`."""
        return {k: x - self.lr * gradient[k] for k, x in theta.items()}, state


@dataclass(frozen=True)
class Adam:
    """Adam, see :func:`adam_step`."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, theta: Tensors) -> AdamState:
        """See :meth:`Optimizer.init`."""
        return adam_init(theta)

    def step(self, theta: Tensors, gradient: Tensors, state: AdamState) -> tuple[Tensors, AdamState]:
        """See :meth:`Optimizer.step`."""
        return adam_step(theta, gradient, state, self.lr, self.betas, self.eps)
