"""A policy to take away: act, log_prob, entropy and a loss, without Lightning, for code of one's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.errors import WHOLE, bounded, require
from lightning_toys.generative_policy.actors import Actor, FlowActor, GaussianActor, MeanFlowActor
from lightning_toys.generative_policy.flow_ode import flow_log_prob, flow_sample
from lightning_toys.generative_policy.gaussian import log_tanh_derivative, tanh_gaussian_log_prob
from lightning_toys.generative_policy.inversion import Inverse, invert
from lightning_toys.generative_policy.meanflow import TimeDistribution, gaussian_entropy, log_det
from lightning_toys.nets import Network
from lightning_toys.training.inference import with_replica_axis
from lightning_toys.training.noise import keyed_generator

Kind = Literal["gaussian", "meanflow", "flow"]
INSIDE = 1e-3  # actions that a bounded flow is fitted to are at least so far from -1 and 1


class PlainPolicy(nn.Module):
    """A policy pi(a | s) of R replicas in a plain module.

    A Gaussian policy is bounded to (-1, 1) by tanh as it is; a one-step or flow policy where ``bounded`` is set: then
    its network's action y is squashed to tanh(y), and densities have the factor of it.

    Args:
        actor: the policy of y.
        seeds: one a replica; they key the noise.
        state_dim: numbers of a state; 0 for a policy without one.
        action_dim: numbers of an action.
        bounded: whether actions are squashed by tanh; a Gaussian's are by itself.

    Example:
        >>> policy = PlainPolicy.build("flow", state_dim=3, action_dim=1, seeds=[0, 1])
        >>> state = torch.zeros(5, 3)
        >>> action = policy.act(state, seed=7)
        >>> action.shape, policy.log_prob(action, state).shape, policy.replica(1).act(state, seed=7).shape
        (torch.Size([2, 5, 1]), torch.Size([2, 5]), torch.Size([1, 5, 1]))
    """

    def __init__(
        self, actor: Actor, seeds: Sequence[int], state_dim: int, action_dim: int, bounded: bool = True
    ) -> None:
        super().__init__()
        self.actor, self.seeds = actor, list(seeds)
        self.state_dim, self.action_dim = state_dim, action_dim
        self.squashes = bounded and not isinstance(actor, GaussianActor)

    @classmethod
    def build(
        cls,
        kind: Kind,
        state_dim: int,
        action_dim: int,
        seeds: Sequence[int] = (0,),
        network: Network | None = None,
        target_std: float = 0.0,
        nfe: int = 8,
        bounded: bool = True,
    ) -> PlainPolicy:
        """Return a new policy with its initial weights.

        Args:
            kind: ``gaussian``, ``meanflow`` (one evaluation an action) or ``flow`` (``nfe`` Euler steps).
            state_dim: numbers of a state.
            action_dim: numbers of an action.
            seeds: one a replica.
            network: the network.
            target_std: s of the one-step policy's noise; a policy with noise has no ``log_prob``.
            nfe: Euler steps of ``flow``.
            bounded: whether actions lie in (-1, 1).

        Raises:
            ToyError: a value is not allowed.
        """
        kinds = ("gaussian", "meanflow", "flow")
        require(kind in kinds, f"kind: {kind!r} is not allowed; give one of {', '.join(kinds)}")
        _sizes(state_dim, action_dim, nfe)
        spec = network or Network(hidden=64, layers=3, activation="silu")
        D = action_dim
        actor: Actor
        if kind == "gaussian":
            actor = GaussianActor(spec.build(seeds, state_dim, 0, False, 2 * D))
        else:
            head = kind == "meanflow" and target_std > 0
            net = spec.build(seeds, D, state_dim + 2, True, D + head)
            actor = MeanFlowActor(net, target_std) if kind == "meanflow" else FlowActor(net, nfe)
        return cls(actor, seeds, state_dim, D, bounded)

    def replica(self, r: int) -> PlainPolicy:
        """Return replica ``r`` alone, a copy.

        Raises:
            ToyError: there is none.
        """
        bounded("replica", r, 0, len(self.seeds) - 1)
        own = copy.deepcopy(self)
        own.seeds = [self.seeds[r]]
        for p in own.parameters():
            p.data = p.data[r : r + 1].clone()
            p.grad = None
        return own

    # acting

    def like(self) -> Tensor:
        """Return a parameter, whose device and dtype everything has."""
        return next(self.parameters())

    def noise(self, stream: str, seed: int, rows: int) -> Tensor:
        """Return standard normals (R, rows, D), keyed by each replica's seed, ``seed`` and the stream."""
        bounded("seed", seed, 0, WHOLE)
        drawn = [
            keyed_generator(s, seed, f"plain/{stream}").standard_normal((rows, self.action_dim)) for s in self.seeds
        ]
        return torch.from_numpy(np.stack(drawn)).to(self.like())

    def states(self, state: Tensor) -> Tensor:
        """Return states (R, M, S), given so or as (M, S)."""
        return with_replica_axis(state, len(self.seeds), (self.state_dim,), "state").to(self.like())

    def act(self, state: Tensor, seed: int = 0) -> Tensor:
        """Return one action for each state: (M, S) or (R, M, S) to (R, M, D), differentiable in state and weights.

        Args:
            state: the states.
            seed: other seeds give independent actions, the same the same ones.
        """
        at = self.states(state)
        y = self.actor.act(at, self.noise("e", seed, at.shape[1]), self.noise("xi", seed, at.shape[1]))
        return torch.tanh(y) if self.squashes else y

    def before_tanh(self, state: Tensor, seed: int = 0) -> Tensor:
        """Return what :meth:`act` squashes: y (R, M, D) of the actions tanh(y) that it gives for the same arguments."""
        at = self.states(state)
        e, xi = (self.noise(k, seed, at.shape[1]) for k in ("e", "xi"))
        if isinstance(self.actor, GaussianActor):
            mu, log_sigma = self.actor.parameters_at(at)
            return torch.addcmul(mu, log_sigma.exp(), e)
        require(self.squashes, "before_tanh: the policy's actions are not squashed by tanh")
        return self.actor.act(at, e, xi)

    # densities

    def log_prob(self, action: Tensor, state: Tensor) -> Tensor:
        """Return log pi(a | s) in nats (R, M) of actions (M, D) or (R, M, D).

        Of a Gaussian policy in closed form, and differentiable. Without gradients: of a flow by the trace of the
        Jacobian, for the flow itself, which Euler steps only follow; of a one-step map by the change of variables,
        summed over the noises that lead to the action
        (:meth:`inverse` says how many were found: the map is one to one where it is one).

        Raises:
            ToyError: a one-step policy has noise on top of its map, whose density is no closed form, or an actor of
                somebody's own gives no ``log_prob``.
        """
        at = self.states(state)
        a = with_replica_axis(action, len(self.seeds), (self.action_dim,), "action").to(self.like())
        if isinstance(self.actor, GaussianActor):
            mu, log_sigma = self.actor.parameters_at(at)
            return tanh_gaussian_log_prob(a, mu, log_sigma)
        y = torch.atanh(a) if self.squashes else a
        if isinstance(self.actor, FlowActor):
            self.require_no_noise()
            with torch.no_grad():
                found = flow_log_prob(lambda z, t: self.velocity_and_divergence(z, t, at), y)
        elif isinstance(self.actor, MeanFlowActor):
            found = self.inverse(action, state).log_prob
        else:  # of actions on the edge and beyond, which count as nothing below, y is no number
            found = self.actor.log_prob(at, torch.atanh(a.clamp(-1 + 1e-7, 1 - 1e-7)) if self.squashes else a)
        if self.squashes:
            outside = (a.abs() >= 1).any(-1)
            found = (found - log_tanh_derivative(y).sum(-1)).masked_fill(outside, -torch.inf)
        return found

    def inverse(self, action: Tensor, state: Tensor) -> Inverse:
        """Return the density of a one-step map's action before tanh, and how many noises lead to it, each (R, M).

        Raises:
            ToyError: the policy is no one-step map, or it has noise on top.
        """
        actor = self.actor
        one_step = isinstance(actor, MeanFlowActor) and not isinstance(actor, FlowActor)
        require(one_step, "inverse: the policy is no one-step map; ask log_prob")
        self.require_no_noise()
        assert isinstance(actor, MeanFlowActor)
        a = with_replica_axis(action, len(self.seeds), (self.action_dim,), "action").to(self.like())
        y = torch.atanh(a.clamp(-1 + 1e-7, 1 - 1e-7)) if self.squashes else a
        return invert(actor.u, y, self.states(state))

    def require_no_noise(self) -> None:
        """Raise a ToyError where a policy adds noise to its map."""
        std = self.actor.noise_std if isinstance(self.actor, MeanFlowActor) else 0.0
        require(
            std == 0,
            f"log_prob: actions have noise of {std:g} on top of a map, a density without a closed form; give a policy "
            "with target_std 0",
        )

    @torch.no_grad()
    def entropy(self, state: Tensor, draws: int = 256, seed: int = 0) -> Tensor:
        """Return the entropy in nats (R, M) of the policy at each state, a mean over ``draws`` actions.

        Of a one-step map H(N(0, I)) + E log|det|: an upper bound where it folds.

        Raises:
            ToyError: as :meth:`log_prob`.
        """
        bounded("draws", draws, 1)
        at = self.states(state)
        R, M, S = at.shape
        many = at.unsqueeze(2).expand(R, M, draws, S).reshape(R, M * draws, S)
        e = self.noise("entropy", seed, M * draws)
        if isinstance(self.actor, GaussianActor):
            value = -self.actor.sample_with_log_prob(many, e)[1]
        else:
            self.require_no_noise()
            if not isinstance(self.actor, MeanFlowActor):
                y = self.actor.act(many, e, self.noise("entropy/xi", seed, M * draws))
                value = -self.actor.log_prob(many, y)
            elif isinstance(self.actor, FlowActor):
                u = self.actor.u
                y = flow_sample(lambda z, t: u.velocity(z, t, many), e, "dopri5", 1)
                value = -flow_log_prob(lambda z, t: self.velocity_and_divergence(z, t, many), y)
            else:
                y = self.actor.act(many, e, e)
                value = gaussian_entropy(1.0, self.action_dim) + log_det(self.actor.u, e, many)[0]
            if self.squashes:
                value = value + log_tanh_derivative(y).sum(-1)
        return value.reshape(R, M, draws).mean(2)

    def velocity_and_divergence(self, z: Tensor, t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return a flow's velocity (R, B, D) and its divergence (R, B, 1)."""
        assert isinstance(self.actor, MeanFlowActor)
        velocity, divergence = z, torch.zeros_like(t)
        for i in range(z.shape[-1]):
            direction = torch.zeros_like(z)
            direction[..., i] = 1.0
            velocity, _, column = self.actor.u.jvp(z, t, t, direction, state, dt=0.0)
            divergence = divergence + column[..., i : i + 1]
        return velocity, divergence

    # learning

    def fit_loss(self, action: Tensor, state: Tensor, step: int = 0) -> Tensor:
        """Return each replica's loss (R,) for learning to draw given actions at given states.

        Maximum likelihood for a Gaussian policy; MeanFlow's loss or flow matching, whose noise and times are keyed by
        the replica's seed and ``step``; an actor's own ``fit_losses`` else. A resampling of actions by
        exp(Q / temperature) makes it a step of mirror descent.

        Raises:
            ToyError: an actor of somebody's own gives no ``fit_losses``.
        """
        at = self.states(state)
        a = with_replica_axis(action, len(self.seeds), (self.action_dim,), "action").to(self.like())
        x = torch.atanh(a.clamp(-1 + INSIDE, 1 - INSIDE)) if self.squashes else a
        if not isinstance(self.actor, MeanFlowActor):
            return self.actor.fit_losses(at, x).mean(1)
        n = x.shape[1]
        drawn = [keyed_generator(s, step, "plain/times").random((n, 2)) for s in self.seeds]
        share = 0.0 if isinstance(self.actor, FlowActor) else 0.5
        r, t, k = TimeDistribution(share=share).sample(torch.from_numpy(np.stack(drawn)).to(x), slice(0, n))
        return self.actor.losses(at, x, self.noise("fit", step, n), r, t, k).mean(1)


def _sizes(state_dim: int, action_dim: int, nfe: int) -> None:
    bounded("state_dim", state_dim, 0)
    bounded("action_dim", action_dim, 1)
    bounded("nfe", nfe, 1)
