"""Adam's step on small networks without the Python around its kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def step_adam(optimizer: torch.optim.Optimizer) -> None:
    """Take the step of a fused ``torch.optim.Adam``: the same kernel on the same state, bit for bit.

    ``optimizer.step`` spends .12 ms of Python to find what its kernel of .03 ms needs. Its first step makes the state
    and is its own, as is every step of an optimiser that asks for more than Adam's plain step; hooks are not called.

    Args:
        optimizer: with every parameter's gradient in place, in one piece: the kernel reads a strided one as if it were.
    """
    for group in optimizer.param_groups:
        plain = group.get("fused") and not group["amsgrad"] and not group["maximize"]
        if not plain or not all(optimizer.state.get(p) for p in group["params"]):
            optimizer.step()
            return
    for group in optimizer.param_groups:
        params: list[Any] = group["params"]
        states = [optimizer.state[p] for p in params]
        fused_step(torch._fused_adam_, params, states, group, group["eps"])


@torch.no_grad()
def fused_step(
    kernel: Callable[..., None],
    params: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    group: Mapping[str, Any],
    eps: float,
) -> None:
    """Count the step and call Adam's or AdamW's kernel once for every parameter, in place.

    Args:
        kernel: ``torch._fused_adam_`` or ``torch._fused_adamw_``.
        params: with gradients.
        states: of each parameter: ``step``, ``exp_avg``, ``exp_avg_sq``.
        group: the parameter group: ``lr``, ``betas``, ``weight_decay``.
        eps: added to the root of the second moment.
    """
    steps = [s["step"] for s in states]
    torch._foreach_add_(steps, 1)
    beta1, beta2 = group["betas"]
    kernel(
        params,
        [p.grad for p in params],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
