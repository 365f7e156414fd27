"""An agent of somebody's own, whose model is fitted to rewards alone, and a model of the world that draws wrongly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_toys.bilevel import AgentUpdate, Dynamics, ModelGradient
from lightning_toys.bilevel.control.agents import ModelTargets, Problem


class RewardOnly(AgentUpdate):
    """The model descends c mean (r_T - r)^2; the values learn from its targets."""

    response = "loss"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight, self.label = weight, f"rewards times {weight:g}"

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        forward = problem.model.forward_pass(problem.inputs)
        prediction = problem.model.to_prediction(forward.output)
        error: Tensor = prediction.reward - problem.batch.reward
        scale = 2 * self.weight / error.shape[1]
        found = problem.model.vjp(forward, torch.zeros_like(prediction.next_state), scale * error)
        return ModelGradient(found, self.weight * error.square().mean(1))


class GlobalDraws(Dynamics):
    """A model whose first weights are torch's global generator's."""

    def build(self, seeds: Sequence[int], states: int, actions: int, width: int) -> nn.Module:
        return LinearNet(torch.randn(len(seeds), states + actions, states + 1))


class LinearNet(nn.Module):
    """Next state and reward are linear in state and action."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.cat([state, action], -1) @ self.weight
        return out[..., :-1], out[..., -1]


class Mixing(RewardOnly):
    """A replica's gradient is the mean over all."""

    def gradient(self, nets: nn.Module, problem: Problem, targets: ModelTargets | None) -> ModelGradient:
        found, loss, _ = super().gradient(nets, problem, targets)
        assert found is not None
        return ModelGradient({n: g.mean(0, keepdim=True).expand_as(g) for n, g in found.items()}, loss)
