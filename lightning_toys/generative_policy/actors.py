"""Policies of a state: how each samples actions, and the loss by which it improves.

Shapes: states (R, B, S), actions (R, B, D), with a replica axis R.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy.flow_ode import flow_sample
from lightning_toys.generative_policy.gaussian import Bound, bounded_log_sigma, squash, tanh_gaussian_log_prob
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

EDGE = 1e-6
DATA_SCALE = 0.5  # about the root mean square of a coordinate of the modes' centres


class Actor(nn.Module):
    """A policy pi(a | s) with a replica axis. A class of somebody's own gives :meth:`act`; the others where known."""

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """Return actions (R, B, D) at states (R, B, S), from standard normals ``e`` and ``xi`` (R, B, D)."""
        raise self.lacks("act")

    def log_prob(self, state: Tensor, action: Tensor) -> Tensor:
        """Return log pi(a | s) in nats (R, B) of actions (R, B, D), as :meth:`act` gives them.

        Raises:
            ToyError: it is not known.
        """
        raise self.lacks("log_prob")

    def fit_losses(self, state: Tensor, x: Tensor) -> Tensor:
        """Return a loss for each row (R, B) of given actions x (R, B, D), which learning to draw them makes small.

        Raises:
            ToyError: there is none.
        """
        raise self.lacks("fit_losses")

    def lacks(self, method: str) -> ToyError:
        """Return the error of a method that a class does not give."""
        return ToyError(f"{type(self).__name__} has no {method}; give the class one (see Actor)")


class GaussianActor(Actor):
    """SAC's tanh-Gaussian policy (Haarnoja et al. 2018): a = tanh(mu(s) + sigma(s) e).

    Args:
        net: maps the state to (mu, raw log sigma), 2 D numbers.
    """

    def __init__(self, net: ConditionalNet) -> None:
        super().__init__()
        self.net = net

    def parameters_at(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and log sigma, each (R, B, D)."""
        mu, raw = self.net(state, state[..., :0]).chunk(2, dim=-1)
        return mu, bounded_log_sigma(raw, "tanh")

    def sample_with_log_prob(self, state: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions (R, B, D) and their log-likelihoods (R, B), differentiable in the weights."""
        mu, log_sigma = self.parameters_at(state)
        return squash(mu, log_sigma, e)

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`Actor.act`."""
        return self.sample_with_log_prob(state, e)[0]

    def losses(
        self, state: Tensor, e: Tensor, q_function: Callable[[Tensor, Tensor], Tensor], entropy: float | Tensor
    ) -> Tensor:
        """Return entropy * log pi(a | s) - Q(s, a) for each row (R, B), through the action (Haarnoja et al. 2018)."""
        return self.losses_and_log_prob(state, e, q_function, entropy)[0]

    def losses_and_log_prob(
        self, state: Tensor, e: Tensor, q_function: Callable[[Tensor, Tensor], Tensor], entropy: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return :meth:`losses`, and log pi(a | s) of the actions without a graph, each (R, B)."""
        a, log_prob = self.sample_with_log_prob(state, e)
        return entropy * log_prob - q_function(state, a), log_prob.detach()

    def fit_losses(self, state: Tensor, x: Tensor) -> Tensor:
        """Return -log pi(x | s) for each row (R, B) of given actions x (R, B, D): a fit by maximum likelihood.

        Actions on the edge of [-1, 1], where the density is nothing, count as 1e-6 inside.
        """
        mu, log_sigma = self.parameters_at(state)
        return -tanh_gaussian_log_prob(x.clamp(-1 + EDGE, 1 - EDGE), mu, log_sigma)


class ConstantGaussianActor(GaussianActor):
    """A tanh-Gaussian policy without a state.

    Args:
        net: returns mu and the raw log sigma (R, 1, 2 D), without an argument.
        bound: how log sigma is bounded.
    """

    def __init__(self, net: nn.Module, bound: Bound) -> None:
        Actor.__init__(self)
        self.parameters_of, self.bound = net, bound

    def parameters_at(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`GaussianActor.parameters_at`: the same at every row."""
        mu, raw = self.parameters_of().expand(-1, state.shape[1], -1).chunk(2, dim=-1)
        return mu, bounded_log_sigma(raw, self.bound)


class MirrorGaussianActor(GaussianActor):
    """The same tanh-Gaussian, fitted to mirror descent's targets: the policy class of SAC, the update of the others."""


class MeanFlowActor(Actor):
    """Stochastic MeanFlow policy (arXiv 2605.21282): a = e - u(e, 0, 1; s) + sigma xi, one network evaluation.

    Args:
        net: the network of u, or u; with ``target_std`` > 0 it has one output more, log sigma.
        target_std: s of the boundary condition N(x, s^2 I); 0 leaves the term with xi out.
        added_std: standard deviation of noise that is added to the map's action in place of a head's.
    """

    def __init__(self, net: ConditionalNet | AverageVelocity, target_std: float, added_std: float = 0.0) -> None:
        super().__init__()
        head = target_std > 0
        self.u = net if isinstance(net, AverageVelocity) else AverageVelocity(net, Preconditioned(DATA_SCALE), head)
        self.target_std, self.added_std = target_std, added_std

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise that is added to the map's actions; a head's is near it."""
        return self.target_std or self.added_std

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`Actor.act`: one evaluation."""
        a, log_sigma = sample(self.u, e, 1, state)
        if self.added_std:
            return a + self.added_std * xi
        return a if log_sigma is None else torch.addcmul(a, log_sigma.exp(), xi)

    def losses(self, state: Tensor, x: Tensor, e: Tensor, r: Tensor, t: Tensor, rows: int) -> Tensor:
        """Return the MeanFlow loss (R, B) of pairs x, e (R, B, D) at r, t (R, B, 1), r < t in the first ``rows``."""
        z, v = path(x, e, t), path_velocity(x, e)
        with torch.no_grad():
            tangent = self.u.velocity(z[:, :rows], t[:, :rows], state[:, :rows]).to(z) if rows else v[:, :0]
        u, log_sigma, du = self.u.jvp(z, r, t, tangent, state)
        loss = adaptive_loss(residual(u, du, (t - r)[:, :rows], v), 0.25, 1e-3)
        if log_sigma is not None:
            loss = loss + (log_sigma[..., 0] - math.log(self.target_std)).square()
        return loss


class FlowActor(MeanFlowActor):
    """Flow matching policy: u(z, t, t) alone is trained, and integrated by Euler steps.

    Args:
        net: the network.
        nfe: Euler steps per action.
        added_std: standard deviation of noise that is added to an action, the entropy term of the one-step policy.
    """

    def __init__(self, net: ConditionalNet | AverageVelocity, nfe: int, added_std: float = 0.0) -> None:
        super().__init__(net, 0.0, added_std)
        self.nfe = nfe

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        """See :meth:`Actor.act`."""
        a = flow_sample(lambda z, t: self.u.velocity(z, t, state), e, "euler", self.nfe)
        return a + self.added_std * xi if self.added_std else a
