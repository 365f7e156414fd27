"""The inner Adam's state, read by algorithms that take inner steps themselves, and put back after these."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_toys.bilevel.regression.hypergradients import AdamMoments


def adam_moments(optimizer: torch.optim.Optimizer, theta: Tensor) -> AdamMoments:
    """Return the state that Adam has of a parameter theta (R, P), as torch makes it where no step was taken yet."""
    state = optimizer.state[theta]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=theta.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(theta), torch.zeros_like(theta)
    return AdamMoments(state["exp_avg"], state["exp_avg_sq"], int(state["step"]))


def put_back(optimizer: torch.optim.Optimizer, theta: Tensor, moved: Tensor, moments: AdamMoments) -> None:
    """Write into theta (R, P) where steps by somebody else have ``moved`` it, and into Adam's state their moments."""
    state = optimizer.state[theta]
    theta.copy_(moved)
    for name, value in zip(("exp_avg", "exp_avg_sq"), moments[:2], strict=True):
        state[name].copy_(value)
    state["step"].fill_(moments.step)
