"""AdamW steps of an MLP, a few replicas at a time, each group through a whole block of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_toys.manual_steps.mlp import ManualMLP, first_inputs
from lightning_toys.manual_steps.terms import Term
from lightning_toys.nets import ConcatMLP, ConditionalNet, FiLMMLP, ReplicaLinear

# weights, gradients and moments that are worked on together: what stays in a cache from one step to the next. A
# constant, and not this machine's: groups of other sizes may round otherwise, and a run may go on elsewhere
GROUP_BYTES = 8 * 2**20


class Rows(NamedTuple):
    """A term's inputs and targets, of all replicas, as the network's layers see them."""

    x: Tensor
    condition: Tensor | None
    target: Tensor


@dataclass
class Group:
    """Some replicas: their network, and their part of each parameter, gradient, moment and average."""

    replicas: slice
    net: ManualMLP
    params: list[Any]
    grads: list[Tensor]
    first_moments: list[Tensor]
    second_moments: list[Tensor]
    averages: list[Any]


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
        ema_decay: its decay.
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
        self.states = []
        for p in params:
            state: dict[str, Any] = optimizer.state[p]
            if not state:  # as torch's own first step makes it
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            self.states.append(state)
        grads: dict[Tensor, Tensor] = {p: torch.empty_like(p) for p in params}
        self.grads = grads
        each = 4 * sum(p[0].numel() * p.element_size() for p in params)
        R = params[0].shape[0]
        size = min(R, max(1, group_bytes // each))
        averages = list(ema_net.parameters()) if ema_net is not None and ema_decay is not None else []
        self.groups = []
        for first in range(0, R, size):
            part = slice(first, min(first + size, R))
            self.groups.append(
                Group(
                    part,
                    ManualMLP(net, grads, part),
                    [p.detach()[part] for p in params],
                    [grads[p][part] for p in params],
                    [s["exp_avg"][part] for s in self.states],
                    [s["exp_avg_sq"][part] for s in self.states],
                    [a.detach()[part] for a in averages],
                )
            )

    def is_of(self, net: ConditionalNet, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it still holds this network's weights and this optimiser's state: either may have been replaced."""
        if self.model is not net or self.optimizer is not optimizer:
            return False
        states = [optimizer.state[p] for p in net.parameters()]
        held = zip(self.groups[0].params, self.groups[0].first_moments, net.parameters(), states, strict=True)
        same = all(a.data_ptr() == p.data_ptr() and m.data_ptr() == s["exp_avg"].data_ptr() for a, m, p, s in held)
        return same and all(s is t for s, t in zip(states, self.states, strict=True))

    def rows(self, terms: Sequence[Term]) -> list[Rows]:
        """Return a step's terms as the layers see them."""
        return [Rows(*first_inputs(self.model, x.x, x.c, x.t), x.target) for x in terms]

    @torch.no_grad()
    def run(self, steps: Sequence[Sequence[Rows]], totals: Sequence[int], rates: Sequence[float]) -> Tensor:
        """Take optimiser steps; return each replica's losses (steps, R).

        Args:
            steps: of each step its terms, see :meth:`rows`.
            totals: of each step the rows that its loss is a mean over.
            rates: of each step the learning rate.
        """
        residuals = [[torch.empty_like(term.target) for term in terms] for terms in steps]
        before = self.states[0]["step"]
        for group in self.groups:
            count = before.clone()
            for terms, found, total, rate in zip(steps, residuals, totals, rates, strict=True):
                self.step(group, terms, found, total, rate, count)
        for state in self.states:
            state["step"].add_(len(steps))
        for p, grad in self.grads.items():
            p.grad = grad  # as autograd leaves it, for whoever looks between two blocks
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
        settings: Any = self.optimizer.param_groups[0]
        torch._fused_adamw_(
            group.params,
            group.grads,
            group.first_moments,
            group.second_moments,
            [],
            [count] * len(group.params),
            lr=rate,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            amsgrad=False,
            maximize=False,
        )
        if self.ema_decay is not None and group.averages:
            torch._foreach_lerp_(group.averages, group.params, 1 - self.ema_decay)

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
