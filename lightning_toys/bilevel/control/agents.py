"""Four ways to learn a model that a value function is learned from: mle, vep, omd, funcbo.

With d_k = Q_k(s, a), n = 1 - terminated, V(s) = alpha logsumexp(min_k Qtarget_k(s, .) / alpha):

    y   = r + gamma n V(s')                   target of what happened
    y_T = r_T(s, a) + gamma n V(s'_T(s, a))   target of the model
    L_in  = 1/2 sum_k mean (d_k - y_T)^2      the value function's loss, given the model
    L_out = 1/2 sum_k mean (d_k - y)^2        the model's loss, by way of the value function

``mle`` and ``vep`` fit the model to what happened; ``omd`` (Nikishin et al. 2021, arXiv 2106.03273) and ``funcbo``
(Petrulionyte et al. 2024, arXiv 2403.20233) descend L_out through the inner solution. Since y_T enters L_in linearly in
d's gradient, the model's gradient is one vector-Jacobian product of y_T in both:

    grad_T L_out = sum_i w_i grad_T y_T,i
    omd:    w_i = (1/B) sum_k J_k,i v,  v = (H + c I)^-1 grad_theta L_out, or v = grad_theta L_out (identity)
    funcbo: w_i = (1/B) sum_k (d_k,i - y_i): in the space of values the inner Hessian is diagonal, 1/B

Tensors have a leading replica axis R; replicas never mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.bilevel.control.nets import HeadMLP, Weights
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.implicit import (
    Tensors,
    conjugate_gradient,
    flatten,
    gauss_newton_product,
    hessian_product,
    unflatten,
)

Agent = Literal["mle", "vep", "omd", "funcbo"]
Inverse = Literal["identity", "gauss_newton", "hessian"]


@dataclass(frozen=True)
class Value:
    """The soft value of a state, and targets.

    Args:
        alpha: temperature.
        discount: gamma.
    """

    alpha: float
    discount: float

    def of(self, q: Tensor) -> Tensor:
        """Return V (R, B) of action values (R, K, B, A): alpha logsumexp(min_k q / alpha)."""
        least = q.amin(1) if q.shape[1] > 1 else q[:, 0]
        return self.alpha * torch.logsumexp(least / self.alpha, -1)

    def target(self, reward: Tensor, not_terminated: Tensor, q: Tensor) -> Tensor:
        """Return r + gamma n V (R, B): a truncated episode's last step is bootstrapped, a terminated one's is not."""
        return reward + self.discount * not_terminated * self.of(q)


def policy(q: Tensor, alpha: float) -> Tensor:
    """Return action probabilities (R, B, A), softmax(mean_k Q / alpha) of q (R, K, B, A)."""
    return torch.softmax(q.mean(1) / alpha, -1)


def taken(q: Tensor, action: Tensor) -> Tensor:
    """Return d_k (R, K, B), the values of the actions (R, B) that were taken, of q (R, K, B, A)."""
    index = action.unsqueeze(1).unsqueeze(-1).expand(-1, q.shape[1], -1, 1)
    return q.gather(-1, index).squeeze(-1)


def half_squares(d: Tensor, y: Tensor) -> Tensor:
    """Return 1/2 sum_k mean (d_k - y)^2 (R,) of d (R, K, B) and y (R, B)."""
    return 0.5 * (d - y.unsqueeze(1)).square().mean(2).sum(1)


class Dream(NamedTuple):
    """What the model makes of a batch.

    Attributes:
        state: s'_T (R, B, S).
        reward: r_T (R, B).
    """

    state: Tensor
    reward: Tensor


class WorldModel(nn.Module):
    """T: next state and reward of [s, onehot a], a perceptron with two hidden layers.

    Args:
        seeds: one seed a replica.
        states: S, dimensions of a state.
        actions: A, number of actions.
        width: of the hidden layers.
    """

    def __init__(self, seeds: Sequence[int], states: int, actions: int, width: int) -> None:
        super().__init__()
        self.states, self.actions = states, actions
        self.net = HeadMLP(seeds, "model", (states + actions, width, width, states + 1))

    def forward(self, state: Tensor, action: Tensor, weights: Weights | None = None) -> Dream:
        """Map s (R, B, S) and a (R, B) to s'_T and r_T."""
        chosen = F.one_hot(action, self.actions).to(state)
        out = self.net(torch.cat([state, chosen], -1), weights)[:, 0]
        return Dream(out[..., :-1], out[..., -1])


def model_errors(dream: Dream, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return mean |s'_T - s'|^2 and mean (r_T - r)^2, each (R,)."""
    state = (dream.state - batch.next_observation).square().sum(-1).mean(1)
    return state, (dream.reward - batch.reward).square().mean(1)


def mle_loss(dream: Dream, batch: Batch) -> Tensor:
    """Return mean |s'_T - s'|^2 + (r_T - r)^2 (R,): minus the log-likelihood of a unit Gaussian, but for constants."""
    state, reward = model_errors(dream, batch)
    return state + reward


def vep_loss(dream: Dream, batch: Batch, values: HeadMLP) -> Tensor:
    """Return mean_jb (V_j(s'_T) - V_j(s'))^2 + mean (r_T - r)^2 (R,).

    Value equivalence (Grimm et al. 2020, arXiv 2011.03506): only what the functions V_j see of a state has to be right.

    Args:
        dream: of the model.
        batch: what happened.
        values: the V_j, drawn at random and left so.
    """
    with torch.no_grad():
        wanted = values(batch.next_observation)
    off: Tensor = values(dream.state) - wanted
    return off.square().mean((1, 2, 3)) + model_errors(dream, batch)[1]


class Problem:
    """The bilevel problem of one batch: what the losses need, each worked out once.

    Args:
        q: the twin values, d.
        target: their slow copy, which V is of.
        model: T.
        value: V and targets.
        batch: what happened.
    """

    def __init__(self, q: HeadMLP, target: HeadMLP, model: WorldModel, value: Value, batch: Batch) -> None:
        self.q, self.target_net, self.model, self.value, self.batch = q, target, model, value, batch
        with torch.no_grad():
            self.y = value.target(batch.reward, batch.not_terminated, target(batch.next_observation))

    def y_model(self, weights: Weights | None = None) -> Tensor:
        """Return y_T (R, B), with its graph to the model."""
        dream = self.model(self.batch.observation, self.batch.action, weights)
        return self.y_of(dream)

    def y_of(self, dream: Dream) -> Tensor:
        """Return the target of a dream (R, B)."""
        # whether an episode ends is taken from what happened: the model does not predict it
        return self.value.target(dream.reward, self.batch.not_terminated, self.target_net(dream.state))

    def d(self, weights: Weights | None = None) -> Tensor:
        """Return d_k (R, K, B)."""
        return taken(self.q(self.batch.observation, weights), self.batch.action)

    def inner(self, weights: Weights, y_model: Tensor) -> Tensor:
        """Return L_in (R,)."""
        return half_squares(self.d(weights), y_model)

    def outer(self, weights: Weights) -> Tensor:
        """Return L_out (R,)."""
        return half_squares(self.d(weights), self.y)


def gradients(losses: Tensor, net: nn.Module) -> Tensors:
    """Return the gradient of each replica's loss (R,) in a network's weights, by name."""
    named = dict(net.named_parameters())
    found = torch.autograd.grad(losses.sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def inner_product(problem: Problem, inverse: Inverse, y_model: Tensor) -> Callable[[Tensors], Tensors]:
    """Return v -> H v, H the Hessian of L_in in the values' weights, or its Gauss-Newton part sum_k J_k'J_k / B."""
    theta = {n: p.detach() for n, p in problem.q.named_parameters()}
    if inverse == "hessian":
        return hessian_product(lambda weights: problem.inner(weights, y_model), theta)
    share = torch.tensor(1 / y_model.shape[1]).to(y_model)
    return lambda v: gauss_newton_product(problem.d, theta, v, share)


def omd_weights(
    problem: Problem, inverse: Inverse, steps: int, damping: float, y_model: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w (R, B) of OMD, L_out (R,), and the relative residual of the linear system (R,).

    Args:
        problem: at the inner solution.
        inverse: of the inner Hessian: the ``identity``, or by conjugate gradients ``gauss_newton`` (J'J/B, never
            indefinite) or the ``hessian`` of L_in itself.
        steps: iterations of conjugate gradients.
        damping: c.
        y_model: y_T (R, B), detached.
    """
    loss = problem.outer(problem.q.weights())
    v = gradients(loss, problem.q)
    batch, q = problem.batch, problem.q
    residual = torch.zeros_like(loss.detach())
    if inverse != "identity":
        product, like = inner_product(problem, inverse, y_model), v
        solved = conjugate_gradient(lambda flat: flatten(product(unflatten(flat, like))), flatten(v), steps, damping)
        v, residual = unflatten(solved.x, like), solved.residual
    w = taken(q.along(batch.observation, v), batch.action).sum(1) / batch.action.shape[1]
    return w, loss.detach(), residual


def funcbo_weights(problem: Problem, y_model: Tensor, solved: bool) -> tuple[Tensor, Tensor]:
    """Return w (R, B) of functional bilevel optimisation, and L_out (R,).

    Args:
        problem: with the values as they are.
        y_model: y_T (R, B), detached.
        solved: take the inner problem for solved, d_k = y_T: the gradient is that of mean (y_T - y)^2 for two heads.
            Otherwise d_k is what the values say now.
    """
    with torch.no_grad():
        d = y_model.unsqueeze(1).expand(-1, problem.q.heads, -1) if solved else problem.d()
        off = d - problem.y.unsqueeze(1)
        return off.sum(1) / off.shape[2], half_squares(d, problem.y)
