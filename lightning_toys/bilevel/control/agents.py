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
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.nets import HeadMLP, Trace, Weights
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.implicit import conjugate_gradient, hessian_product
from lightning_toys.bilevel.vectors import Tensors, flatten, unflatten

Agent = Literal["mle", "vep", "omd", "funcbo"]
Inverse = Literal["identity", "gauss_newton", "hessian"]


def least(x: Tensor) -> Tensor:
    """Return the least over one or two heads (R, ...) of x (R, K, ...)."""
    return torch.minimum(x[:, 0], x[:, 1]) if x.shape[1] == 2 else x[:, 0]


@dataclass(frozen=True)
class Value:
    """The soft value of a state, and targets.

    Args:
        alpha: temperature.
        discount: gamma.
    """

    alpha: float
    discount: float

    # an action at a time, and actions before rows: reductions over a last axis of two cost five times as much

    def of(self, q: Tensor) -> Tensor:
        """Return V (R, B) of action values (R, K, B, A): alpha logsumexp(min_k q / alpha)."""
        scaled = least(q.mT) / self.alpha
        return self.alpha * reduce(torch.logaddexp, scaled.unbind(1))

    def slope(self, q: Tensor, v: Tensor) -> Tensor:
        """Return dV/dq (R, K, B, A) at V = v (R, B): softmax(min_k q / alpha) on the lesser head, half where equal."""
        p = torch.exp((least(q.mT) - v.unsqueeze(1)) / self.alpha)
        if q.shape[1] == 1:
            return p.unsqueeze(1).mT
        first = p * (0.5 - 0.5 * torch.sign(q[:, 0] - q[:, 1]).mT)
        return torch.stack([first, p - first], 1).mT

    def target(self, reward: Tensor, not_terminated: Tensor, v: Tensor) -> Tensor:
        """Return r + gamma n V (R, B): a truncated episode's last step is bootstrapped, a terminated one's is not."""
        return reward + self.discount * not_terminated * v


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

    @staticmethod
    def read(out: Tensor) -> Dream:
        """Return what the network's output (R, 1, B, S + 1) says."""
        return Dream(out[:, 0, :, :-1], out[:, 0, :, -1])

    def pull(self, trace: Trace, state: Tensor, reward: Tensor) -> Tensors:
        """Return the gradient by the parameters' names, for slopes of s'_T (R, B, S) and r_T (R, B)."""
        slope = torch.cat([state, reward.unsqueeze(-1)], -1).unsqueeze(1)
        return {f"net.{n}": g for n, g in self.net.pull(trace, slope).items()}


class Imagined(NamedTuple):
    """The model's targets of a batch, and the passes that they came from.

    Attributes:
        y: y_T (R, B).
        dream: next states and rewards.
        model: the model's pass.
        target: the target values' pass over the next states.
        v: V of the next states (R, B).
    """

    y: Tensor
    dream: Dream
    model: Trace
    target: Trace
    v: Tensor


def model_errors(dream: Dream, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return mean |s'_T - s'|^2 and mean (r_T - r)^2, each (R,)."""
    state = (dream.state - batch.next_observation).square().sum(-1).mean(1)
    return state, (dream.reward - batch.reward).square().mean(1)


def mle_loss(dream: Dream, batch: Batch) -> Tensor:
    """Return mean |s'_T - s'|^2 + (r_T - r)^2 (R,): minus the log-likelihood of a unit Gaussian, but for constants."""
    state, reward = model_errors(dream, batch)
    return state + reward


def mle_gradient(problem: Problem, seen: Trace) -> tuple[Tensors, Tensor]:
    """Return the gradient of :func:`mle_loss` by the model's names, and the loss (R,), for the model's pass."""
    batch, dream = problem.batch, problem.model.read(seen.output)
    scale = 2 / batch.reward.shape[1]
    state, reward = dream.state - batch.next_observation, dream.reward - batch.reward
    return problem.model.pull(seen, scale * state, scale * reward), mle_loss(dream, batch)


def vep_gradient(problem: Problem, seen: Trace, values: HeadMLP) -> tuple[Tensors, Tensor]:
    """Return by the model's names the gradient of mean_jb (V_j(s'_T) - V_j(s'))^2 + mean (r_T - r)^2 (R,), and that.

    Value equivalence (Grimm et al. 2020, arXiv 2011.03506): only what the functions V_j see of a state has to be right.

    Args:
        problem: whose batch and model are meant.
        seen: the model's pass over it.
        values: the V_j, drawn at random and left so.
    """
    batch, dream = problem.batch, problem.model.read(seen.output)
    wanted = values.trace(batch.next_observation).output
    there = values.trace(dream.state)
    off = there.output - wanted
    reward, n = dream.reward - batch.reward, batch.reward.shape[1]
    state = values.pull_input(there, off * (2 / (n * values.heads)))
    loss = off.square().mean((1, 2, 3)) + reward.square().mean(1)
    return problem.model.pull(seen, state, reward * (2 / n)), loss


class Problem:
    """The bilevel problem of one batch: what the losses need, each worked out once.

    The training's derivatives are written out (``gradient``, ``along``, ``pull``); ``y_model``, ``inner`` and ``outer``
    are the same with autograd's graph, which second derivatives and the tests take.

    Args:
        q: the twin values, d.
        target: their slow copy, which V is of.
        model: T.
        value: V and targets.
        batch: what happened.
    """

    def __init__(self, q: HeadMLP, target: HeadMLP, model: WorldModel, value: Value, batch: Batch) -> None:
        self.q, self.target_net, self.model, self.value, self.batch = q, target, model, value, batch
        actions = torch.arange(model.actions, device=batch.action.device)[:, None]
        # (R, B, A), one where an action was taken
        self.chosen = (batch.action.unsqueeze(1) == actions).to(batch.observation).mT
        self.inputs = torch.cat([batch.observation, self.chosen], -1)
        self.known: Tensor | None = None
        self.values: Trace | None = None  # of q on the batch, until q moves

    @property
    def y(self) -> Tensor:
        """The targets of what happened (R, B), no graph."""
        if self.known is None:
            batch = self.batch
            q = self.target_net.trace(batch.next_observation).output
            self.known = self.value.target(batch.reward, batch.not_terminated, self.value.of(q))
        return self.known

    # with autograd's graph

    def dream(self) -> Dream:
        """Return what the model makes of the batch."""
        return self.model.read(self.model.net(self.inputs))

    def y_model(self) -> Tensor:
        """Return y_T (R, B), with its graph to the model."""
        dream = self.dream()
        # whether an episode ends is taken from what happened: the model does not predict it
        v = self.value.of(self.target_net(dream.state))
        return self.value.target(dream.reward, self.batch.not_terminated, v)

    def d(self, weights: Weights | None = None) -> Tensor:
        """Return d_k (R, K, B)."""
        return taken(self.q(self.batch.observation, weights), self.batch.action)

    def inner(self, weights: Weights, y_model: Tensor) -> Tensor:
        """Return L_in (R,)."""
        return half_squares(self.d(weights), y_model)

    def outer(self, weights: Weights) -> Tensor:
        """Return L_out (R,)."""
        return half_squares(self.d(weights), self.y)

    # written out, upon passes that have no graph

    def imagine(self) -> Imagined:
        """Return y_T with what :meth:`pull` needs."""
        model = self.model.net.trace(self.inputs)
        dream = self.model.read(model.output)
        target = self.target_net.trace(dream.state)
        v = self.value.of(target.output)
        y = self.value.target(dream.reward, self.batch.not_terminated, v)
        return Imagined(y, dream, model, target, v)

    def pull(self, seen: Imagined, w: Tensor, through_state: bool = True) -> Tensors:
        """Return sum_i w_i grad_T y_T,i by the model's names.

        Args:
            seen: the model's targets.
            w: weights (R, B).
            through_state: False leaves V(s'_T) out, so that the reward's part is all there is.
        """
        if not through_state:
            return self.model.pull(seen.model, torch.zeros_like(seen.dream.state), w)
        scale = self.value.discount * self.batch.not_terminated * w
        slope = self.value.slope(seen.target.output, seen.v) * scale.unsqueeze(1).unsqueeze(-1)
        state = self.target_net.pull_input(seen.target, slope)
        return self.model.pull(seen.model, state, w)

    def trace(self) -> Trace:
        """Return the values on the batch; made anew only after :meth:`moved`."""
        if self.values is None:
            self.values = self.q.trace(self.batch.observation)
        return self.values

    def moved(self) -> None:
        """Forget the values: their weights were stepped."""
        self.values = None

    def off(self, y: Tensor) -> Tensor:
        """Return d_k - y (R, K, B) for y (R, B)."""
        return (self.trace().output * self.chosen.unsqueeze(1)).sum(-1) - y.unsqueeze(1)

    def gradient(self, off: Tensor) -> Tensors:
        """Return the gradient in the values' weights of 1/2 sum_k mean (d_k - y)^2, given d_k - y (R, K, B)."""
        slope = (off / off.shape[2]).unsqueeze(-1) * self.chosen.unsqueeze(1)
        return self.q.pull(self.trace(), slope)

    def along(self, direction: Weights) -> Tensor:
        """Return J_k v (R, K, B), d_k's derivative along a direction of the values' weights."""
        return (self.q.push(self.trace(), direction) * self.chosen.unsqueeze(1)).sum(-1)


def inner_product(problem: Problem, inverse: Inverse, y_model: Tensor) -> Callable[[Tensors], Tensors]:
    """Return v -> H v, H the Hessian of L_in in the values' weights, or its Gauss-Newton part sum_k J_k'J_k / B."""
    if inverse == "hessian":
        theta = {n: p.detach() for n, p in problem.q.named_parameters()}
        return hessian_product(lambda weights: problem.inner(weights, y_model), theta)
    return lambda v: problem.gradient(problem.along(v))


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
    off = problem.off(problem.y)
    v = problem.gradient(off)
    loss = 0.5 * off.square().mean(2).sum(1)
    residual = torch.zeros_like(loss)
    if inverse != "identity":
        product, like = inner_product(problem, inverse, y_model), v
        solved = conjugate_gradient(lambda flat: flatten(product(unflatten(flat, like))), flatten(v), steps, damping)
        v, residual = unflatten(solved.x, like), solved.residual
    return problem.along(v).sum(1) / off.shape[2], loss, residual


def funcbo_weights(problem: Problem, y_model: Tensor, solved: bool) -> tuple[Tensor, Tensor]:
    """Return w (R, B) of functional bilevel optimisation, and L_out (R,).

    Args:
        problem: with the values as they are.
        y_model: y_T (R, B), detached.
        solved: take the inner problem for solved, d_k = y_T: the gradient is that of mean (y_T - y)^2 for two heads.
            Otherwise d_k is what the values say now.
    """
    exact = (y_model - problem.y).unsqueeze(1).expand(-1, problem.q.heads, -1)
    off = exact if solved else problem.off(problem.y)
    return off.sum(1) / off.shape[2], 0.5 * off.square().mean(2).sum(1)
