"""The learned model of the world: next state and reward of a state and an action."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.nets import ForwardPass, MultiHeadMLP
from lightning_toys.bilevel.vectors import Tensors


class ModelPrediction(NamedTuple):
    """The model's prediction for a batch.

    Attributes:
        next_state: s'_T (R, B, S).
        reward: r_T (R, B).
    """

    next_state: Tensor
    reward: Tensor


class ModelPass(NamedTuple):
    """The model's forward pass.

    Attributes:
        passes: of each of its networks.
        output: next state and reward side by side (R, 1, B, S + 1).
        graph: the same with autograd's graph, of a model of one's own.
    """

    passes: tuple[ForwardPass, ...]
    output: Tensor
    graph: Tensor | None = None


class WorldModel(nn.Module):
    """T, the learned model: next state and reward of [s, onehot a], a ReLU network with two hidden layers.

    It does not predict whether an episode ends: that is taken from what happened.

    Args:
        seeds: one seed a replica.
        states: S, dimensions of a state.
        actions: A, number of actions.
        width: of the hidden layers.
        orthogonal: first weights, see :class:`MultiHeadMLP`.
        separate: a network of its own for the reward, of the same width.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        states: int,
        actions: int,
        width: int,
        orthogonal: bool = False,
        separate: bool = False,
    ) -> None:
        super().__init__()
        self.states, self.actions, self.separate = states, actions, separate
        outputs = states if separate else states + 1
        self.net = MultiHeadMLP(seeds, "model", (states + actions, width, width, outputs), orthogonal=orthogonal)
        if separate:
            self.reward = MultiHeadMLP(seeds, "reward", (states + actions, width, width, 1), orthogonal=orthogonal)

    @property
    def networks(self) -> dict[str, MultiHeadMLP]:
        """Its networks by name."""
        return {"net": self.net, "reward": self.reward} if self.separate else {"net": self.net}

    def output(self, inputs: Tensor) -> Tensor:
        """Return next state and reward side by side (R, 1, B, S + 1) of inputs (R, B, S + A); autograd can follow."""
        found = [net.values(inputs) for net in self.networks.values()]
        return torch.cat(found, -1) if self.separate else found[0]

    def forward_pass(self, inputs: Tensor) -> ModelPass:
        """Return :meth:`output` with what its derivatives need; no graph."""
        passes = tuple(net.forward_pass(inputs) for net in self.networks.values())
        return ModelPass(passes, torch.cat([p.output for p in passes], -1) if self.separate else passes[0].output)

    def one_hot(self, action: Tensor, like: Tensor) -> Tensor:
        """Return actions (R, B), integers, as vectors (R, B, A) in the dtype and on the device of ``like``."""
        actions = torch.arange(self.actions, device=action.device)[:, None]
        return (action.unsqueeze(1) == actions).to(like).mT

    def forward(self, state: Tensor, action: Tensor) -> ModelPrediction:
        """Predict next state (R, B, S) and reward (R, B).

        Args:
            state: s (R, B, S).
            action: a (R, B), integers from 0 to A - 1.
        """
        return self.to_prediction(self.output(torch.cat([state, self.one_hot(action, state)], -1)))

    @staticmethod
    def to_prediction(out: Tensor) -> ModelPrediction:
        """Split the output (R, 1, B, S + 1) into next state and reward."""
        return ModelPrediction(out[:, 0, :, :-1], out[:, 0, :, -1])

    def vjp(self, forward: ModelPass, next_state: Tensor, reward: Tensor) -> Tensors:
        """Return the vector-Jacobian product by the parameters' names, each (R, ...).

        Args:
            forward: the forward pass.
            next_state: cotangent of s'_T (R, B, S).
            reward: cotangent of r_T (R, B).
        """
        parts = (next_state, reward.unsqueeze(-1))
        cotangents = parts if self.separate else (torch.cat(parts, -1),)
        found: Tensors = {}
        for (name, net), passed, cotangent in zip(self.networks.items(), forward.passes, cotangents, strict=True):
            found |= {f"{name}.{n}": g for n, g in net.vjp(passed, cotangent.unsqueeze(1)).items()}
        return found
