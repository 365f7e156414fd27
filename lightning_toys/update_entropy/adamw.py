"""One AdamW step as a direction in parameter space, and what it is made of.

With t = step + 1, the clipped gradient c g, c = min(1, max_norm / |g|), and per unit learning rate (v = d theta / eta):

    m' = b1 m + (1 - b1) c g,    s' = b2 s + (1 - b2) (c g)^2,    D = sqrt(s') / sqrt(1 - b2^t) + eps,
    v = -m' / ((1 - b1^t) D) - wd theta

(Kingma and Ba 2015; Loshchilov and Hutter 2019). At the D and c of the whole batch v is linear in g, so that it splits
into momentum, weight decay and one part for each g_i of a sum g = sum_i g_i. That is an attribution at fixed D and c;
what the step would have been without a sequence is another question, and :meth:`AdamWStep.from_gradient` answers it
with the D and c of the gradient that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_toys.errors import ToyError

Tensors = dict[str, Tensor]  # by the parameter's name
# elements that double precision is taken of at a time: of a whole embedding it would be gibibytes, and out of the cache
SLICE = 1 << 16


class ComputedTensors(Mapping[str, Tensor]):
    """Tensors by name that are computed whenever they are asked for, and not kept.

    Args:
        names: of the tensors.
        compute: returns one of them.

    >>> twice = ComputedTensors(["a"], lambda name: torch.tensor([2.0]))
    >>> dict(twice)
    {'a': tensor([2.])}
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self.names, self.compute = tuple(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def tensors_of(names: Iterable[str], compute: Callable[[str], Tensor], keep: bool) -> Mapping[str, Tensor]:
    """Return tensors by name, computed once and kept, or whenever they are asked for."""
    return {n: compute(n) for n in names} if keep else ComputedTensors(names, compute)


def double_slices(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield the elements of tensors of one shape in double precision, :data:`SLICE` of each at a time."""
    flat = [t.detach().reshape(-1) for t in tensors]
    for start in range(0, max(1, flat[0].numel()), SLICE):
        yield [t[start : start + SLICE].double() for t in flat]


@dataclass(frozen=True)
class Hyperparameters:
    """AdamW's settings for one parameter, those of its parameter group.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: whether the denominator takes the running maximum of the second moment (Reddi et al. 2018).
        maximize: whether the gradient's sign is flipped.
        initial_lr: learning rate that a scheduler started from; None where there is none.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    initial_lr: float | None = None


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one parameter after ``step`` steps, under torch's names.

    Attributes:
        step: optimiser steps taken.
        exp_avg: m, of the parameter's shape.
        exp_avg_sq: s, of the parameter's shape.
        max_exp_avg_sq: running maximum of s, where amsgrad keeps one.
    """

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None

    @classmethod
    def zeros_like(cls, parameter: Tensor) -> Moments:
        """Return the state before the first step, of a parameter's shape and dtype."""
        zero = torch.zeros_like(parameter)
        return cls(0, zero, zero, zero)

    def for_betas(self, old: tuple[float, float], new: tuple[float, float]) -> Moments:
        """Return the moments whose bias-corrected values, m / (1 - b^t), are the same under other betas."""
        if old == new or self.step == 0:
            return self
        a, b = ((1 - y**self.step) / (1 - x**self.step) for x, y in zip(old, new, strict=True))
        maximum = None if self.max_exp_avg_sq is None else b * self.max_exp_avg_sq
        return replace(self, exp_avg=a * self.exp_avg, exp_avg_sq=b * self.exp_avg_sq, max_exp_avg_sq=maximum)

    def to(self, device: torch.device) -> Moments:
        """Return the moments on a device."""
        maximum = None if self.max_exp_avg_sq is None else self.max_exp_avg_sq.to(device)
        return Moments(self.step, self.exp_avg.to(device), self.exp_avg_sq.to(device), maximum)


@dataclass(frozen=True)
class AdamWState:
    """AdamW's settings and moments: what a step needs besides parameters and gradients.

    Attributes:
        hyperparameters: by parameter name.
        moments: by parameter name.
    """

    hyperparameters: dict[str, Hyperparameters]
    moments: dict[str, Moments]

    def without_momentum(self) -> AdamWState:
        """Return the state with the first moment set to zero, the second kept."""
        moments = {n: replace(m, exp_avg=torch.zeros_like(m.exp_avg)) for n, m in self.moments.items()}
        return AdamWState(self.hyperparameters, moments)

    def with_hyperparameters(self, **changes: Any) -> AdamWState:
        """Return the state with other settings in every group, such as ``betas=(0, .999)``.

        The bias-corrected moments, m / (1 - b^t), are kept where betas change: moments accumulated under .999 and
        corrected as if accumulated under .95 would be too small by that ratio.
        """
        hyperparameters = {n: replace(h, **changes) for n, h in self.hyperparameters.items()}
        moments = {
            n: m.for_betas(self.hyperparameters[n].betas, hyperparameters[n].betas) for n, m in self.moments.items()
        }
        return AdamWState(hyperparameters, moments)

    @property
    def lr(self) -> float:
        """The largest learning rate of any group: eta of a whole step."""
        return max(h.lr for h in self.hyperparameters.values())

    def relative_rates(self) -> dict[str, float]:
        """Return each parameter's learning rate in units of the largest, by name.

        At the end of a schedule all rates are 0; the ratios are then those of the rates that it started from.
        """
        if self.lr > 0:
            return {n: h.lr / self.lr for n, h in self.hyperparameters.items()}
        initial = {n: h.initial_lr or 0.0 for n, h in self.hyperparameters.items()}
        largest = max(initial.values())
        return {n: lr / largest if largest > 0 else 1.0 for n, lr in initial.items()}


def read_state(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> AdamWState:
    """Return the settings and moments of a live optimiser.

    Args:
        optimizer: a ``torch.optim.AdamW`` (or Adam with decoupled decay). Settings are those of the parameter groups,
            never ``optimizer.defaults``, which later changes to a group do not reach.
        named: names and parameters, such as ``model.named_parameters()``; all of the optimiser's have to be there.

    Raises:
        ToyError: the optimiser is no AdamW, or holds a parameter that has no name.
    """
    require_adamw(optimizer)
    names = {id(p): name for name, p in named}
    hyperparameters: dict[str, Hyperparameters] = {}
    moments: dict[str, Moments] = {}
    for group in optimizer.param_groups:
        settings = hyperparameters_from_group(group)
        for p in group["params"]:
            if id(p) not in names:
                raise ToyError(f"the optimiser holds a parameter {tuple(p.shape)} that the model does not name")
            name = names[id(p)]
            hyperparameters[name] = settings
            state = optimizer.state.get(p) or {}
            moments[name] = moments_from_state(state) if state else Moments.zeros_like(p.detach())
    return AdamWState(hyperparameters, moments)


def require_adamw(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimiser's step is AdamW's.

    Raises:
        ToyError: it is not.
    """
    decoupled = isinstance(optimizer, torch.optim.AdamW) or (
        isinstance(optimizer, torch.optim.Adam)
        and all(g.get("decoupled_weight_decay") or not g["weight_decay"] for g in optimizer.param_groups)
    )
    if not decoupled:
        raise ToyError(f"the optimiser is {type(optimizer).__name__}; its step is not AdamW's")


def hyperparameters_from_group(group: Mapping[str, Any]) -> Hyperparameters:
    """Return the settings of one of ``optimizer.param_groups``."""
    b1, b2 = group["betas"]
    lr, eps, decay = (float(group[k]) for k in ("lr", "eps", "weight_decay"))
    amsgrad, maximize = (bool(group.get(k, False)) for k in ("amsgrad", "maximize"))
    initial = None if group.get("initial_lr") is None else float(group["initial_lr"])
    return Hyperparameters(lr, (float(b1), float(b2)), eps, decay, amsgrad, maximize, initial)


def moments_from_state(state: Mapping[str, Any]) -> Moments:
    """Return the moments of one entry of ``optimizer.state``."""
    return Moments(int(state["step"]), state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"))


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all tensors together, summed in double precision."""
    return math.sqrt(sum(float(x.square().sum()) for t in tensors.values() for (x,) in double_slices(t)))


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product over the names of ``a``, summed in double precision."""
    return sum(float((x * y).sum()) for name, t in a.items() for x, y in double_slices(t, b[name]))


def sum_tensors(parts: Iterable[Mapping[str, Tensor]]) -> Tensors:
    """Return the sum of several sets of tensors, by name."""
    out: Tensors = {}
    for part in parts:
        for name, t in part.items():
            out[name] = out[name] + t if name in out else t.clone()
    return out


@dataclass(frozen=True)
class AdamWStep:
    """The step that AdamW takes next: theta' = theta + eta v, v per unit of the learning rate ``eta``.

    Where groups have learning rates of their own, eta is the largest of them, and each group's part of the direction
    carries the ratio of its own to that (:meth:`AdamWState.relative_rates`). Tensors are by parameter name, of the
    parameters' shapes and dtypes; of a step that keeps none, each is computed whenever it is asked for.

    Attributes:
        eta: learning rate of a whole step.
        direction: v = momentum + decay + d * g.
        momentum: -b1 m / ((1 - b1^t) D).
        decay: -wd theta.
        preconditioner: d = -(1 - b1) c / ((1 - b1^t) D), elementwise: a gradient g_i's part of v is v_i = d * g_i.
        clip_scale: c.
        grad_norm: |g| before clipping.
    """

    eta: float
    direction: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    decay: Mapping[str, Tensor]
    preconditioner: Mapping[str, Tensor]
    clip_scale: float
    grad_norm: float

    @classmethod
    def from_gradient(
        cls,
        parameters: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        state: AdamWState,
        max_norm: float | None = None,
        keep: bool = True,
    ) -> AdamWStep:
        """Return the step from ``parameters`` with the unclipped gradient of the whole batch.

        Args:
            parameters: theta, by name.
            gradient: g, by name, of every parameter that the optimiser steps.
            state: settings and moments.
            max_norm: bound on |g| over all parameters, as ``torch.nn.utils.clip_grad_norm_`` takes it; None: none.
            keep: whether the step's four tensors of a parameter are kept, or computed from the others whenever they are
                asked for; ``parameters``, ``gradient`` and ``state`` have to stay as they are then.
        """
        size, rates = norm(gradient), state.relative_rates()
        # torch's own guard against division by zero, which moves c by 1e-6 / |g|
        c = 1.0 if max_norm is None else min(1.0, max_norm / (size + 1e-6))

        def parts(name: str, wanted: Sequence[str]) -> dict[str, Tensor]:
            theta, old, h = parameters[name], state.moments[name], state.hyperparameters[name]
            return step_parts(theta, gradient[name], old, h, rates[name], c, wanted)

        found = {n: parts(n, STEP_PARTS) for n in gradient} if keep else {}

        def tensors(part: str) -> Mapping[str, Tensor]:
            if keep:
                return {n: x[part] for n, x in found.items()}
            return ComputedTensors(gradient, lambda n: parts(n, [part])[part])

        direction, momentum, decay, preconditioner = map(tensors, STEP_PARTS)
        return cls(state.lr, direction, momentum, decay, preconditioner, c, size)

    def precondition(self, gradient: Mapping[str, Tensor]) -> Tensors:
        """Return the part of the direction that a part of the batch's gradient makes, at the batch's D and c."""
        return {name: self.preconditioner[name] * g for name, g in gradient.items()}

    def precondition_in_place(self, gradient: Tensors) -> Tensors:
        """Turn a gradient into what :meth:`precondition` returns, and return it: no other copy is made."""
        for name, g in gradient.items():
            g.mul_(self.preconditioner[name])
        return gradient

    def residual(self, gradients: Iterable[Mapping[str, Tensor]]) -> float:
        """Return |v - momentum - decay - sum_i v_i| / |v|, which is rounding if the g_i sum to g."""
        parts = sum_tensors([self.momentum, self.decay, *(self.precondition(g) for g in gradients)])
        return norm({n: v - parts[n] for n, v in self.direction.items()}) / max(norm(self.direction), 1e-300)


STEP_PARTS = ("direction", "momentum", "decay", "preconditioner")


def step_parts(
    theta: Tensor,
    gradient: Tensor,
    moments: Moments,
    hyperparameters: Hyperparameters,
    relative: float,
    clip: float,
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Return some of :data:`STEP_PARTS` of one parameter by name, computed in double precision, of theta's dtype.

    Args:
        theta: the parameter.
        gradient: g, unclipped.
        moments: before the step.
        hyperparameters: of its group.
        relative: its learning rate in units of the largest.
        clip: c.
        wanted: which parts.
    """
    h, t = hyperparameters, moments.step + 1
    b1, b2 = h.betas
    sign = -1.0 if h.maximize else 1.0
    maximum = moments.max_exp_avg_sq if h.amsgrad else None
    out = {k: torch.empty(theta.shape, dtype=theta.dtype, device=theta.device) for k in wanted}
    given = [theta, gradient, moments.exp_avg, moments.exp_avg_sq, *([] if maximum is None else [maximum])]
    start = 0
    for x, g, m, s, *largest in double_slices(*given):
        second = b2 * s + (1 - b2) * (sign * clip * g).square()
        if largest:
            second = torch.maximum(second, largest[0])
        scale = -relative / ((1 - b1**t) * (second.sqrt() / math.sqrt(1 - b2**t) + h.eps))
        momentum, decay, d = scale * b1 * m, -relative * h.weight_decay * x, scale * (1 - b1) * sign * clip
        parts = {"direction": momentum + decay + d * g, "momentum": momentum, "decay": decay, "preconditioner": d}
        for k, whole in out.items():
            whole.view(-1)[start : start + len(g)] = parts[k]
        start += len(g)
    return out


def single_tensor_adamw(
    parameter: Tensor, gradient: Tensor, moments: Moments, hyperparameters: Hyperparameters
) -> Tensor:
    """Return theta' by the operations of ``torch.optim.AdamW(foreach=False)`` in their order: bit for bit its result.

    Args:
        parameter: theta.
        gradient: the clipped gradient.
        moments: before the step.
        hyperparameters: of its group.
    """
    g = -gradient if hyperparameters.maximize else gradient
    b1, b2 = hyperparameters.betas
    t = moments.step + 1
    theta = parameter.detach().clone().mul_(1 - hyperparameters.lr * hyperparameters.weight_decay)
    first = moments.exp_avg.clone().lerp_(g, 1 - b1)
    second = moments.exp_avg_sq.clone().mul_(b2).addcmul_(g, g, value=1 - b2)
    if hyperparameters.amsgrad and moments.max_exp_avg_sq is not None:
        second = torch.maximum(moments.max_exp_avg_sq, second)
    denominator = (second.sqrt() / (1 - b2**t) ** 0.5).add_(hyperparameters.eps)
    return theta.addcdiv_(first, denominator, value=-hyperparameters.lr / (1 - b1**t))
