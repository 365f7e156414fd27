"""A model of the world for bilevel's control: ``--model.world_model own_world_model.Residual``."""

import torch
from torch import nn

from lightning_toys.bilevel import Dynamics
from lightning_toys.nets import ReplicaLinear


class ResidualNet(nn.Module):
    """The next state is the state and a small change; every layer has a leading replica axis."""

    def __init__(self, seeds, states, actions, width, scale):
        super().__init__()
        self.scale = scale
        self.hidden = ReplicaLinear(seeds, "residual.hidden", states + actions, width)
        self.out = ReplicaLinear(seeds, "residual.out", width, states + 1)

    def forward(self, state, action):
        """Return next states (R, B, S) and rewards (R, B) of states (R, B, S) and one-hot actions (R, B, A)."""
        out = self.out(torch.tanh(self.hidden(torch.cat([state, action], -1))))
        return state + self.scale * out[..., :-1], out[..., -1]


class Residual(Dynamics):
    """Predicts the change of the state."""

    def __init__(self, scale: float = 0.1):
        self.scale = scale

    def build(self, seeds, states, actions, width):
        """Return the network."""
        return ResidualNet(seeds, states, actions, width, self.scale)
