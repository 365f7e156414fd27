"""One AdamW step as a direction in parameter space, and what it is made of.

With t = step + 1, the clipped gradient c g, c = min(1, max_norm / |g|), and per unit learning rate (v = d theta / eta):

    m' = b1 m + (1 - b1) c g,    s' = b2 s + (1 - b2) (c g)^2,    D = sqrt(s') / sqrt(1 - b2^t) + eps,
    v = -m' / ((1 - b1^t) D) - wd theta

(Kingma and Ba 2015; Loshchilov and Hutter 2019). At the D and c of the whole batch v is linear in g, so that it splits
into momentum, weight decay and one part for each g_i of a sum g = sum_i g_i. That is an attribution at fixed D and c;
what the step would have been without a sequence is another question, and :meth:`AdamWStep.of` answers it with the D and
c of the gradient that is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_toys.errors import ToyError

Tensors = dict[str, Tensor]  # by the parameter's name


@dataclass(frozen=True)
class Hyper:
    """AdamW's settings for one parameter, as they stand in its group.

    Args:
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: whether the denominator takes the running maximum of the second moment.
        maximize: whether the gradient's sign is turned.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one parameter after ``step`` steps."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None

    @classmethod
    def fresh(cls, parameter: Tensor) -> Moments:
        """Return the state before the first step."""
        zero = torch.zeros_like(parameter)
        return cls(0, zero, zero, zero)

    def rebiased(self, was: tuple[float, float], now: tuple[float, float]) -> Moments:
        """Return the moments with the same debiased means under other betas."""
        if was == now or self.step == 0:
            return self
        a, b = ((1 - y**self.step) / (1 - x**self.step) for x, y in zip(was, now, strict=True))
        most = None if self.max_exp_avg_sq is None else b * self.max_exp_avg_sq
        return replace(self, exp_avg=a * self.exp_avg, exp_avg_sq=b * self.exp_avg_sq, max_exp_avg_sq=most)

    def to(self, device: torch.device) -> Moments:
        """Return the moments on a device."""
        most = None if self.max_exp_avg_sq is None else self.max_exp_avg_sq.to(device)
        return Moments(self.step, self.exp_avg.to(device), self.exp_avg_sq.to(device), most)


@dataclass(frozen=True)
class AdamWState:
    """Settings and moments by parameter name: what a step needs besides parameters and gradients."""

    hyper: dict[str, Hyper]
    moments: dict[str, Moments]

    def without_momentum(self) -> AdamWState:
        """Return the state with the first moment set to zero, the second kept."""
        moments = {n: replace(m, exp_avg=torch.zeros_like(m.exp_avg)) for n, m in self.moments.items()}
        return AdamWState(self.hyper, moments)

    def with_hyper(self, **changes: Any) -> AdamWState:
        """Return the state with other settings in every group, such as ``betas=(0, .999)``.

        The moments' means, m / (1 - b^t), are kept where betas change: moments that were gathered under .999 and are
        read as if gathered under .95 would be too small by that ratio.
        """
        hyper = {n: replace(h, **changes) for n, h in self.hyper.items()}
        moments = {n: m.rebiased(self.hyper[n].betas, hyper[n].betas) for n, m in self.moments.items()}
        return AdamWState(hyper, moments)

    @property
    def lr(self) -> float:
        """The greatest learning rate of any group: eta of a whole step."""
        return max(h.lr for h in self.hyper.values())


def read_state(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> AdamWState:
    """Read settings and moments out of a live optimiser.

    Args:
        optimizer: a ``torch.optim.AdamW`` (or Adam with decoupled decay). Settings are those of the parameter groups,
            never ``optimizer.defaults``, which later changes to a group do not reach.
        named: names of the parameters, which must hold all of the optimiser's.

    Raises:
        ToyError: the optimiser is no AdamW, or holds a parameter that has no name.
    """
    check_kind(optimizer)
    names = {id(p): name for name, p in named}
    hyper: dict[str, Hyper] = {}
    moments: dict[str, Moments] = {}
    for group in optimizer.param_groups:
        settings = hyper_of(group)
        for p in group["params"]:
            if id(p) not in names:
                raise ToyError(f"the optimiser holds a parameter {tuple(p.shape)} that the model does not name")
            name = names[id(p)]
            hyper[name] = settings
            state = optimizer.state.get(p) or {}
            moments[name] = moments_of(state) if state else Moments.fresh(p.detach())
    return AdamWState(hyper, moments)


def check_kind(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose step is not AdamW's."""
    decoupled = isinstance(optimizer, torch.optim.AdamW) or (
        isinstance(optimizer, torch.optim.Adam)
        and all(g.get("decoupled_weight_decay") or not g["weight_decay"] for g in optimizer.param_groups)
    )
    if not decoupled:
        raise ToyError(f"the optimiser is {type(optimizer).__name__}; its step is not AdamW's")


def hyper_of(group: Mapping[str, Any]) -> Hyper:
    """Return the settings of a parameter group."""
    b1, b2 = group["betas"]
    lr, eps, decay = (float(group[k]) for k in ("lr", "eps", "weight_decay"))
    amsgrad, maximize = (bool(group.get(k, False)) for k in ("amsgrad", "maximize"))
    return Hyper(lr, (float(b1), float(b2)), eps, decay, amsgrad, maximize)


def moments_of(state: Mapping[str, Any]) -> Moments:
    """Return the moments of one entry of an optimiser's state."""
    return Moments(int(state["step"]), state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"))


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors.values()))


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product over the names of ``a``, summed in double precision."""
    return sum(float((t.double() * b[name].double()).sum()) for name, t in a.items())


def total(parts: Iterable[Mapping[str, Tensor]]) -> Tensors:
    """Return the sum of several sets of tensors of the same names."""
    out: Tensors = {}
    for part in parts:
        for name, t in part.items():
            out[name] = out[name] + t if name in out else t.clone()
    return out


@dataclass(frozen=True)
class AdamWStep:
    """The step that AdamW takes next; every direction is per unit of the learning rate ``eta``.

    Where groups have learning rates of their own, eta is the greatest of them, and each group's part of the direction
    carries the ratio of its own to that: theta + eta v is the step as it is taken.

    Attributes:
        eta: learning rate of a whole step.
        direction: v.
        momentum: -b1 m / ((1 - b1^t) D).
        decay: -wd theta.
        gain: -(1 - b1) c / ((1 - b1^t) D), elementwise: v's part of a gradient g_i is gain * g_i.
        clip_scale: c.
        grad_norm: |g| before clipping.
    """

    eta: float
    direction: Tensors
    momentum: Tensors
    decay: Tensors
    gain: Tensors
    clip_scale: float
    grad_norm: float

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        state: AdamWState,
        max_norm: float | None = None,
    ) -> AdamWStep:
        """Return the step from ``parameters`` with the unclipped gradient of the whole batch.

        Args:
            parameters: theta.
            gradient: g, of every parameter that the optimiser steps.
            state: settings and moments.
            max_norm: bound on |g| over all parameters, as ``torch.nn.utils.clip_grad_norm_`` takes it.
        """
        size, eta = norm(gradient), state.lr
        # torch's own guard against division by zero, which moves c by 1e-6 / |g|
        c = 1.0 if max_norm is None else min(1.0, max_norm / (size + 1e-6))
        direction: Tensors = {}
        momentum: Tensors = {}
        decay: Tensors = {}
        gain: Tensors = {}
        for name, g in gradient.items():
            h, old, theta = state.hyper[name], state.moments[name], parameters[name].detach()
            b1, b2 = h.betas
            t, relative = old.step + 1, h.lr / eta if eta > 0 else 1.0
            sign = -1.0 if h.maximize else 1.0
            clipped = sign * c * g.detach().double()
            second = b2 * old.exp_avg_sq.double() + (1 - b2) * clipped.square()
            if h.amsgrad and old.max_exp_avg_sq is not None:
                second = torch.maximum(second, old.max_exp_avg_sq.double())
            scale = -relative / ((1 - b1**t) * (second.sqrt() / math.sqrt(1 - b2**t) + h.eps))
            parts = (scale * b1 * old.exp_avg.double(), -relative * h.weight_decay * theta.double())
            slope = scale * (1 - b1) * sign * c
            momentum[name], decay[name] = (p.to(theta.dtype) for p in parts)
            gain[name] = slope.to(theta.dtype)
            direction[name] = (parts[0] + parts[1] + slope * g.detach().double()).to(theta.dtype)
        return cls(eta, direction, momentum, decay, gain, c, size)

    def part(self, gradient: Mapping[str, Tensor]) -> Tensors:
        """Return the share of the direction that a part of the batch's gradient has, at the batch's D and c."""
        return {name: self.gain[name] * g for name, g in gradient.items()}

    def residual(self, gradients: Iterable[Mapping[str, Tensor]]) -> float:
        """Return |v - momentum - decay - sum_i v_i| / |v|."""
        parts = total([self.momentum, self.decay, *(self.part(g) for g in gradients)])
        return norm({n: v - parts[n] for n, v in self.direction.items()}) / max(norm(self.direction), 1e-300)


def replay(parameter: Tensor, gradient: Tensor, moments: Moments, hyper: Hyper) -> Tensor:
    """Return theta' by the very operations, in their order, of ``torch.optim.AdamW``'s for-loop form.

    Args:
        parameter: theta.
        gradient: the clipped gradient.
        moments: before the step.
        hyper: settings.
    """
    g = -gradient if hyper.maximize else gradient
    b1, b2 = hyper.betas
    t = moments.step + 1
    theta = parameter.detach().clone().mul_(1 - hyper.lr * hyper.weight_decay)
    first = moments.exp_avg.clone().lerp_(g, 1 - b1)
    second = moments.exp_avg_sq.clone().mul_(b2).addcmul_(g, g, value=1 - b2)
    if hyper.amsgrad and moments.max_exp_avg_sq is not None:
        second = torch.maximum(moments.max_exp_avg_sq, second)
    denominator = (second.sqrt() / (1 - b2**t) ** 0.5).add_(hyper.eps)
    return theta.addcdiv_(first, denominator, value=-hyper.lr / (1 - b1**t))
