"""AdamW steps of an MLP, a few replicas at a time, each group through a whole block of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_toys.manual_steps.mlp import ManualMLP, first_inputs
from lightning_toys.manual_steps.terms import Term
from lightning_toys.nets import ConcatMLP, ConditionalNet, FiLMMLP, ReplicaLinear
from lightning_toys.training.averaging import average_decay

# weights, gradients and moments that are worked on together: what stays in a cache from one step to the next. A
# constant, and not this machine's: groups of other sizes may round otherwise, and a run may go on elsewhere
GROUP_BYTES = 8 * 2**20
LANES = 16  # the most numbers of single precision that a vector register holds (AVX-512)


class Rows(NamedTuple):
    """A term's inputs and targets, of all replicas, as the network's layers see them."""

    x: Tensor
    condition: Tensor | None
    target: Tensor


class Group:
    """Some replicas: their weights, gradients, moments and averages, each in one flat buffer, and their network.

    One buffer, in which each parameter begins at a multiple of :data:`LANES`: torch's fused AdamW computes what does
    not fill a vector register in scalars, which round otherwise, and a small group's last layer would be such a rest.

    Args:
        net: of all replicas.
        replicas: which of them.
    """

    def __init__(self, net: ConcatMLP | FiLMMLP, replicas: slice) -> None:
        params = list(net.parameters())
        self.replicas = replicas
        self.shapes = [p[replicas].shape for p in params]
        sizes = [-(-shape.numel() // LANES) * LANES for shape in self.shapes]
        self.starts = [sum(sizes[:k]) for k in range(len(sizes))]
        # zeros, since the rests between parameters go through AdamW too
        buffers = params[0].new_zeros(5, sum(sizes))
        self.weights, self.grad, self.first_moment, self.second_moment, self.average = buffers.unbind()
        self.grads = self.views(self.grad)
        parts = zip(params, zip(self.views(self.weights), self.grads, strict=True), strict=True)
        self.net = ManualMLP(net, dict(parts))

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the parameters that a buffer holds, shaped as they are."""
        return [
            buffer[start : start + shape.numel()].view(shape)
            for start, shape in zip(self.starts, self.shapes, strict=True)
        ]

    def read(self, buffer: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy this group's replicas of some tensors to a buffer."""
        torch._foreach_copy_(self.views(buffer), [t.detach()[self.replicas] for t in tensors])

    def write(self, buffer: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy a buffer to this group's replicas of some tensors."""
        torch._foreach_copy_([t.detach()[self.replicas] for t in tensors], self.views(buffer))


def group_sizes(replicas: int, most: int) -> list[int]:
    """Return the sizes of groups of at most so many replicas (two, where ``most`` is less), as even as can be.

    None is of one replica only, unless there is only one: products of a single matrix round otherwise than those of a
    batch of them.
    """
    groups = max(1, min(-(-replicas // max(1, most)), replicas // 2))
    return [replicas // groups + (k < replicas % groups) for k in range(groups)]


def is_plain(net: nn.Module) -> bool:
    """Whether a network is a shipped MLP to which nothing was added that autograd would call: hooks, frozen weights."""
    if type(net) not in (ConcatMLP, FiLMMLP):
        return False
    params = list(net.parameters())
    linear = [m for m in net.modules() if isinstance(m, ReplicaLinear)]
    if any(type(m) is not ReplicaLinear or m.bias is None for m in linear) or 2 * len(linear) != len(params):
        return False
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(m, n) for m in net.modules() for n in names)
    hooked |= any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in params)
    usual = all(p.requires_grad and p.is_contiguous() and p.device.type == "cpu" for p in params)
    return usual and not hooked and params[0].dtype in (torch.float32, torch.float64)


def is_plain_adamw(optimizer: torch.optim.Optimizer, net: nn.Module) -> bool:
    """Whether an optimiser is torch's fused AdamW over all of a network's parameters, and nothing listens to it."""
    if type(optimizer) is not torch.optim.AdamW or len(optimizer.param_groups) != 1:
        return False
    group: Any = optimizer.param_groups[0]
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    same = [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    return bool(group.get("fused")) and not (group["amsgrad"] or group["maximize"] or hooks) and same


class ManualSteps:
    """Steps of one network and its optimiser.

    Args:
        net: of R replicas, for which :func:`is_plain` holds.
        optimizer: for which :func:`is_plain_adamw` holds. Its state and the weights are changed in place.
        loss: whether terms are squared (``l2``) or absolute (``l1``).
        clip_grad_norm: bound on each replica's gradient norm.
        ema_net: an average of the weights, moved at each step.
        ema_decay: its decay in the end, see :func:`~lightning_toys.training.averaging.average_decay`.
        group_bytes: of weights, gradients and moments of the replicas that are worked on together.
    """

    def __init__(
        self,
        net: ConditionalNet,
        optimizer: torch.optim.Optimizer,
        loss: Literal["l1", "l2"] = "l2",
        clip_grad_norm: float | None = None,
        ema_net: nn.Module | None = None,
        ema_decay: float | None = None,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        assert isinstance(net, ConcatMLP | FiLMMLP)
        self.model, self.optimizer, self.loss = net, optimizer, loss
        self.clip_grad_norm, self.ema_decay = clip_grad_norm, ema_decay
        params = list(net.parameters())
        each = 4 * sum(p[0].numel() * p.element_size() for p in params)
        ends = list(itertools.accumulate(group_sizes(params[0].shape[0], group_bytes // each), initial=0))
        self.groups = [Group(net, slice(a, b)) for a, b in itertools.pairwise(ends)]
        self.averages = list(ema_net.parameters()) if ema_net is not None and ema_decay is not None else []

    def is_of(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is still the network and the optimiser: either may have been replaced, or cast."""
        same = self.model is net and self.optimizer is optimizer
        return same and self.groups[0].weights.dtype == next(net.parameters()).dtype

    def states(self) -> list[dict[str, Any]]:
        """Return the optimiser's state of each parameter, made where it is not there yet."""
        for p in self.model.parameters():
            state: dict[str, Any] = self.optimizer.state[p]
            if not state:  # as torch's own first step makes it
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [self.optimizer.state[p] for p in self.model.parameters()]

    def rows(self, terms: Sequence[Term], sizes: Sequence[int]) -> list[list[Rows]]:
        """Return the terms of several steps as the layers see them.

        Args:
            terms: of all steps, whose rows lie one step after the other.
            sizes: rows of each step.
        """
        out: list[list[Rows]] = [[] for _ in sizes]
        for term in terms:
            x, condition = first_inputs(self.model, term.x, term.c, term.t)
            xs, targets = (torch.split(y, list(sizes), dim=1) for y in (x, term.target))
            conditions = [None] * len(sizes) if condition is None else torch.split(condition, list(sizes), dim=1)
            for step, part in zip(out, zip(xs, conditions, targets, strict=True), strict=True):
                step.append(Rows(*part))
        return out

    @torch.no_grad()
    def run(self, steps: Sequence[Sequence[Rows]], totals: Sequence[int], rates: Sequence[float]) -> Tensor:
        """Take optimiser steps; return each replica's losses (steps, R).

        Args:
            steps: of each step its terms, see :meth:`rows`.
            totals: of each step the rows that its loss is a mean over.
            rates: of each step the learning rate.
        """
        residuals = [[torch.empty_like(term.target) for term in terms] for terms in steps]
        params, states = list(self.model.parameters()), self.states()
        for p in params:
            if p.grad is None:  # left as autograd leaves it, for whoever looks between two blocks
                p.grad = torch.empty_like(p)
        for group in self.groups:
            held = [
                (group.weights, params),
                (group.first_moment, [s["exp_avg"] for s in states]),
                (group.second_moment, [s["exp_avg_sq"] for s in states]),
                *([(group.average, self.averages)] if self.averages else []),
            ]
            for buffer, tensors in held:
                group.read(buffer, tensors)
            count = states[0]["step"].clone()
            for terms, found, total, rate in zip(steps, residuals, totals, rates, strict=True):
                self.step(group, terms, found, total, rate, count)
            for buffer, tensors in (*held, (group.grad, [p.grad for p in params])):
                group.write(buffer, tensors)
        for state in states:
            state["step"].add_(len(steps))
        return self.losses(residuals, totals)

    def step(
        self, group: Group, terms: Sequence[Rows], found: Sequence[Tensor], total: int, rate: float, count: Tensor
    ) -> None:
        """Take one step of a group; write the residuals (R, B, D) of its replicas to ``found``."""
        part, net = group.replicas, group.net
        for k, (term, residual) in enumerate(zip(terms, found, strict=True)):
            x, r = term.x[part], residual[part]
            condition = None if term.condition is None else term.condition[part]
            net.forward(x, condition, r)
            r.sub_(term.target[part])
            scale = 1.0 / (total * r.shape[2])
            d_out = r * (2 * scale) if self.loss == "l2" else r.sign().mul_(scale)
            net.backward(x, condition, d_out, accumulates=k > 0)
        if self.clip_grad_norm is not None:
            squares = torch.stack([g.flatten(1).square().sum(1) for g in group.grads]).sum(0)
            factor = (self.clip_grad_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
            for g in group.grads:
                g.mul_(factor.view(-1, 1, 1))
        count.add_(1)
        self.descend(group, rate, count)

    def descend(self, group: Group, rate: float, count: Tensor) -> None:
        """Take AdamW's step along a group's gradient, the ``count``-th, and move its average."""
        settings: Any = self.optimizer.param_groups[0]
        torch._fused_adamw_(
            [group.weights],
            [group.grad],
            [group.first_moment],
            [group.second_moment],
            [],
            [count],
            lr=rate,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            amsgrad=False,
            maximize=False,
        )
        if self.ema_decay is not None and self.averages:
            # AdamW counts the run's steps, this one among them
            group.average.lerp_(group.weights, 1 - average_decay(self.ema_decay, int(count) - 1))

    def losses(self, residuals: Sequence[Sequence[Tensor]], totals: Sequence[int]) -> Tensor:
        """Return each replica's losses (steps, R) from the residuals; steps of as many rows are summed together."""
        out = residuals[0][0].new_zeros(len(residuals), residuals[0][0].shape[0])
        by_rows: dict[int, list[int]] = {}
        for i, found in enumerate(residuals):
            by_rows.setdefault(found[0].shape[1], []).append(i)
        norm = torch.square if self.loss == "l2" else torch.abs
        for numbers in by_rows.values():
            for k in range(len(residuals[numbers[0]])):
                r = torch.stack([residuals[i][k] for i in numbers])
                scale = torch.tensor([totals[i] * r.shape[3] for i in numbers], dtype=r.dtype)
                out[numbers] += norm(r).sum((2, 3)) / scale.unsqueeze(1)
        return out
