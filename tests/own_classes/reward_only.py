"""An agent of somebody's own: its model is fitted to rewards alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_toys.bilevel import AgentUpdate, ModelGradient
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
