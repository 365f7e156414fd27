"""Adam's step without Python's share of it: bit for bit torch's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_toys.training.fused_adam import step_adam
from lightning_toys.training.noise import keyed_generator


def draw(step: int, shape: torch.Size) -> Tensor:
    return torch.from_numpy(keyed_generator(0, step, "test/fused_adam").standard_normal(tuple(shape))).float()


def walked(quick: bool, steps: int = 5, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and optimiser's state after some steps."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for i, p in enumerate(net.parameters()):
        p.data = draw(100 + i, p.shape)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, **options)
    for k in range(steps):
        for i, p in enumerate(net.parameters()):
            p.grad = draw(10 * k + i, p.shape)
        if quick:
            step_adam(optimizer)
        else:
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9  # a schedule is heeded
    state = [t for s in optimizer.state.values() for t in s.values()]
    return [p.detach() for p in net.parameters()], state


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"fused": True, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        {"fused": True, "amsgrad": True},
        {"fused": True, "maximize": True},
        {"foreach": True},
    ],
)
def test_the_step_is_that_of_torch(options: dict[str, Any]) -> None:
    for found, wanted in zip(walked(True, **options), walked(False, **options), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_state_is_torchs_own() -> None:
    net = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        for i, p in enumerate(net.parameters()):
            p.grad = draw(i, p.shape)
        step_adam(optimizer)
    assert [float(s["step"]) for s in optimizer.state.values()] == [3, 3]
    again = torch.optim.Adam(copy.deepcopy(net).parameters(), lr=1e-2, fused=True)
    again.load_state_dict(optimizer.state_dict())
    optimizer.state.clear()  # as a cold start does: the next step makes the state anew
    step_adam(optimizer)
    assert [float(s["step"]) for s in optimizer.state.values()] == [1, 1]
