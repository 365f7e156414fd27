"""Policies of a state, for the bandit: how each draws actions, and what it minimises to improve."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_toys.generative_policy.flow_ode import flow_sample
from lightning_toys.generative_policy.gaussian import bounded_log_sigma, squash
from lightning_toys.generative_policy.meanflow import (
    AverageVelocity,
    Preconditioned,
    adaptive_loss,
    path,
    path_velocity,
    residual,
    sample,
)
from lightning_toys.nets import ConditionalNet

DATA_SCALE = 0.5  # root mean square of a coordinate of the hills' places, about


class Actor(nn.Module):
    """A policy pi(a | s) with a replica axis."""

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """Return actions (R, B, 2) at states (R, B, 2) from two standard normals of that shape."""
        raise NotImplementedError


class GaussianActor(Actor):
    """SAC's Gaussian: a = tanh(mu(s) + sigma(s) xi)."""

    def __init__(self, net: ConditionalNet) -> None:
        super().__init__()
        self.net = net

    def sample_with_log_prob(self, state: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions and their log-likelihoods."""
        mu, raw = self.net(state, state[..., :0]).chunk(2, dim=-1)
        return squash(mu, bounded_log_sigma(raw, "tanh"), e)

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`Actor.act`."""
        return self.sample_with_log_prob(state, e)[0]

    def losses(
        self, state: Tensor, e: Tensor, q_function: Callable[[Tensor, Tensor], Tensor], entropy: float
    ) -> Tensor:
        """Return entropy * log pi(a | s) - Q(s, a) for each row (R, B), through the action (Haarnoja et al. 2018)."""
        a, log_prob = self.sample_with_log_prob(state, e)
        return entropy * log_prob - q_function(state, a)


class MeanFlowActor(Actor):
    """Stochastic MeanFlow: a = e - u(e, 0, 1; s) + sigma xi."""

    def __init__(self, net: ConditionalNet, target_std: float) -> None:
        super().__init__()
        self.u = AverageVelocity(net, Preconditioned(DATA_SCALE), head=target_std > 0)
        self.target_std = target_std

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`Actor.act`: one evaluation."""
        a, log_sigma = sample(self.u, e, 1, state)
        return a if log_sigma is None else torch.addcmul(a, log_sigma.exp(), xi)

    def losses(self, state: Tensor, x: Tensor, e: Tensor, r: Tensor, t: Tensor, rows: int) -> Tensor:
        """Return the MeanFlow loss of each row (R, B) towards actions x; the first ``rows`` have r < t."""
        z, v = path(x, e, t), path_velocity(x, e)
        with torch.no_grad():
            tangent = self.u.velocity(z[:, :rows], t[:, :rows], state[:, :rows]).to(z) if rows else v[:, :0]
        u, log_sigma, du = self.u.jvp(z, r, t, tangent, state)
        loss = adaptive_loss(residual(u, du, (t - r)[:, :rows], v), 0.25, 1e-3)
        if log_sigma is not None:
            loss = loss + (log_sigma[..., 0] - math.log(self.target_std)).square()
        return loss


class FlowActor(MeanFlowActor):
    """Flow matching: u(z, t, t) alone is trained, and integrated by Euler steps.

    Args:
        net: the network.
        nfe: Euler steps to an action.
    """

    def __init__(self, net: ConditionalNet, nfe: int) -> None:
        super().__init__(net, 0.0)
        self.nfe = nfe

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`Actor.act`."""
        return flow_sample(lambda z, t: self.u.velocity(z, t, state), e, "euler", self.nfe)
