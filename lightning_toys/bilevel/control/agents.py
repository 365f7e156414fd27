"""The mathematics of learning a model that a value function is learned from: mle, vep, omd, funcbo.

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

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_toys.bilevel.control.nets import ForwardPass, MultiHeadMLP, Weights
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.control.world_model import ModelPass, ModelPrediction, WorldModel
from lightning_toys.bilevel.implicit import conjugate_gradient, hessian_operator
from lightning_toys.bilevel.vectors import Tensors, flatten, unflatten

FINE_ALPHA = 1e-3  # below it V's own rounding, divided by alpha, is no longer small in an exponent
InverseHessian = Literal["identity", "gauss_newton", "hessian"]


def min_over_heads(x: Tensor) -> Tensor:
    """Return the minimum over one or two heads (R, ...) of x (R, K, ...)."""
    return torch.minimum(x[:, 0], x[:, 1]) if x.shape[1] == 2 else x[:, 0]


@dataclass(frozen=True)
class SoftValue:
    """The soft value of a state, and targets.

    Args:
        alpha: temperature, in units of value.
        discount: gamma.

    >>> q = torch.tensor([[[[1.0, 2.0]], [[1.5, 0.5]]]])  # one replica, two heads, one state, two actions
    >>> SoftValue(alpha=0.01, discount=0.99).value(q)  # close to max_a min_k q
    tensor([[1.]])
    """

    alpha: float
    discount: float

    # an action at a time, and actions before rows: reductions over a last axis of two cost five times as much

    def value(self, q: Tensor) -> Tensor:
        """Return V (R, B) of action values (R, K, B, A): alpha logsumexp(min_k q / alpha)."""
        scaled = min_over_heads(q.mT) / self.alpha
        return self.alpha * reduce(torch.logaddexp, scaled.unbind(1))

    def grad(self, q: Tensor, v: Tensor) -> Tensor:
        """Return dV/dq (R, K, B, A) at V = v (R, B): softmax(min_k q / alpha) on the smaller head, half where equal."""
        least = min_over_heads(q.mT)
        if self.alpha < FINE_ALPHA:
            p = torch.softmax((least - least.amax(1, keepdim=True)) / self.alpha, 1)
        else:
            p = torch.exp((least - v.unsqueeze(1)) / self.alpha)
        if q.shape[1] == 1:
            return p.unsqueeze(1).mT
        first = p * (0.5 - 0.5 * torch.sign(q[:, 0] - q[:, 1]).mT)
        return torch.stack([first, p - first], 1).mT

    def bellman_target(self, reward: Tensor, not_terminated: Tensor, v: Tensor) -> Tensor:
        """Return r + gamma n V (R, B): a truncated episode's last step is bootstrapped, a terminated one's is not.

        Args:
            reward: r (R, B).
            not_terminated: n (R, B), 0 or 1.
            v: V of the next states (R, B).
        """
        return reward + self.discount * not_terminated * v


def softmax_policy(q: Tensor, alpha: float) -> Tensor:
    """Return action probabilities (R, B, A), softmax(mean_k Q / alpha) of q (R, K, B, A)."""
    return torch.softmax(q.mean(1) / alpha, -1)


def q_of_actions(q: Tensor, action: Tensor) -> Tensor:
    """Return d_k (R, K, B), the values of the actions (R, B) taken, of q (R, K, B, A).

    >>> q_of_actions(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[1, 0]]))
    tensor([[[2., 3.]]])
    """
    index = action.unsqueeze(1).unsqueeze(-1).expand(-1, q.shape[1], -1, 1)
    return q.gather(-1, index).squeeze(-1)


def half_squared_error(d: Tensor, y: Tensor) -> Tensor:
    """Return 1/2 sum_k mean (d_k - y)^2 (R,) of d (R, K, B) and y (R, B)."""
    return 0.5 * (d - y.unsqueeze(1)).square().mean(2).sum(1)


class ModelTargets(NamedTuple):
    """The model's targets of a batch, and the forward passes that they came from.

    Attributes:
        y: y_T (R, B).
        prediction: next states and rewards.
        model_pass: the model's forward pass.
        target_pass: the target network's forward pass over the next states.
        v: V of the next states (R, B).
    """

    y: Tensor
    prediction: ModelPrediction
    model_pass: ModelPass
    target_pass: ForwardPass
    v: Tensor


def model_errors(prediction: ModelPrediction, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return mean |s'_T - s'|^2 and mean (r_T - r)^2, each (R,)."""
    state = (prediction.next_state - batch.next_observation).square().sum(-1).mean(1)
    return state, (prediction.reward - batch.reward).square().mean(1)


def mle_loss(prediction: ModelPrediction, batch: Batch) -> Tensor:
    """Return mean |s'_T - s'|^2 + (r_T - r)^2 (R,): minus the log-likelihood of a unit Gaussian, but for constants."""
    state, reward = model_errors(prediction, batch)
    return state + reward


def mle_gradient(problem: Problem, forward: ModelPass) -> tuple[Tensors, Tensor]:
    """Return the gradient of :func:`mle_loss` by the model's names, and the loss (R,).

    Args:
        problem: whose batch and model are meant.
        forward: the model's forward pass over it.
    """
    batch, prediction = problem.batch, problem.model.to_prediction(forward.output)
    scale = 2 / batch.reward.shape[1]
    next_state, reward = prediction.next_state - batch.next_observation, prediction.reward - batch.reward
    return problem.model.vjp(forward, scale * next_state, scale * reward), mle_loss(prediction, batch)


def vep_gradient(
    problem: Problem, forward: ModelPass, value_nets: MultiHeadMLP, weight: float = 1.0
) -> tuple[Tensors, Tensor]:
    """Return by the model's names the gradient of c mean_jb (V_j(s'_T) - V_j(s'))^2 + mean (r_T - r)^2 (R,), and that.

    Value equivalence (Grimm et al. 2020, arXiv 2011.03506): only what the functions V_j see of a state has to be right.

    Args:
        problem: whose batch and model are meant.
        forward: the model's forward pass over it.
        value_nets: the V_j, drawn at random and not trained.
        weight: c; the number of V_j makes a sum over j of the mean.
    """
    batch, prediction = problem.batch, problem.model.to_prediction(forward.output)
    truth = value_nets.forward_pass(batch.next_observation).output
    predicted = value_nets.forward_pass(prediction.next_state)
    error = predicted.output - truth
    reward, n = prediction.reward - batch.reward, batch.reward.shape[1]
    next_state = value_nets.vjp_input(predicted, error * (2 * weight / (n * value_nets.heads)))
    loss = weight * error.square().mean((1, 2, 3)) + reward.square().mean(1)
    return problem.model.vjp(forward, next_state, reward * (2 / n)), loss


class Problem:
    """The bilevel problem of one batch: what the losses need, each worked out once.

    The training's derivatives are written out (``q_gradient``, ``q_jvp``, ``model_vjp``); ``y_model``, ``inner_loss``
    and ``outer_loss`` are the same with autograd's graph, which second derivatives and the tests take.

    Args:
        q: the action values, (R, B, S) to (R, K, B, A).
        target: their slowly updated copy, of which V is taken.
        model: T.
        value: V and targets.
        batch: transitions.
    """

    def __init__(
        self, q: MultiHeadMLP, target: MultiHeadMLP, model: WorldModel, value: SoftValue, batch: Batch
    ) -> None:
        self.q, self.target_net, self.model, self.value, self.batch = q, target, model, value, batch
        self.action_one_hot = model.one_hot(batch.action, batch.observation)  # (R, B, A)
        self.inputs = torch.cat([batch.observation, self.action_one_hot], -1)
        self._y: Tensor | None = None
        self._q_pass: ForwardPass | None = None  # of q on the batch, until q is stepped

    @property
    def y(self) -> Tensor:
        """The targets y of the observed transitions (R, B), no graph."""
        if self._y is None:
            batch = self.batch
            q = self.target_net.forward_pass(batch.next_observation).output
            self._y = self.value.bellman_target(batch.reward, batch.not_terminated, self.value.value(q))
        return self._y

    def clear_y(self) -> None:
        """Drop the cached targets: the target values were moved."""
        self._y = None

    # with autograd's graph

    def predict(self) -> ModelPrediction:
        """Return the model's prediction for the batch, with its graph to the model."""
        return self.model.to_prediction(self.model.output(self.inputs))

    def y_model(self) -> Tensor:
        """Return y_T (R, B), with its graph to the model."""
        prediction = self.predict()
        # whether an episode ends is taken from what happened: the model does not predict it
        v = self.value.value(self.target_net(prediction.next_state))
        return self.value.bellman_target(prediction.reward, self.batch.not_terminated, v)

    def d(self, weights: Weights | None = None) -> Tensor:
        """Return d_k (R, K, B), with its graph to ``weights``: q's own, or those given in their place."""
        return q_of_actions(self.q(self.batch.observation, weights), self.batch.action)

    def inner_loss(self, weights: Weights, y_model: Tensor) -> Tensor:
        """Return L_in (R,) for q's weights and y_T (R, B)."""
        return half_squared_error(self.d(weights), y_model)

    def outer_loss(self, weights: Weights) -> Tensor:
        """Return L_out (R,) for q's weights."""
        return half_squared_error(self.d(weights), self.y)

    # written out, on forward passes without a graph

    def model_targets(self) -> ModelTargets:
        """Return y_T with what :meth:`model_vjp` needs."""
        model_pass = self.model.forward_pass(self.inputs)
        prediction = self.model.to_prediction(model_pass.output)
        target_pass = self.target_net.forward_pass(prediction.next_state)
        v = self.value.value(target_pass.output)
        y = self.value.bellman_target(prediction.reward, self.batch.not_terminated, v)
        return ModelTargets(y, prediction, model_pass, target_pass, v)

    def model_vjp(self, targets: ModelTargets, w: Tensor, through_state: bool = True) -> Tensors:
        """Return sum_i w_i grad_T y_T,i by the model's names, each (R, ...).

        Args:
            targets: the model's targets.
            w: weights (R, B).
            through_state: False leaves out the part through V(s'_T): only the predicted reward gets a gradient.
        """
        if not through_state:
            return self.model.vjp(targets.model_pass, torch.zeros_like(targets.prediction.next_state), w)
        scale = self.value.discount * self.batch.not_terminated * w
        cotangent = self.value.grad(targets.target_pass.output, targets.v) * scale.unsqueeze(1).unsqueeze(-1)
        next_state = self.target_net.vjp_input(targets.target_pass, cotangent)
        return self.model.vjp(targets.model_pass, next_state, w)

    def q_pass(self) -> ForwardPass:
        """Return q's forward pass on the batch, cached until :meth:`clear_q_pass`."""
        if self._q_pass is None:
            self._q_pass = self.q.forward_pass(self.batch.observation)
        return self._q_pass

    def clear_q_pass(self) -> None:
        """Drop the cached forward pass: q's weights were stepped."""
        self._q_pass = None

    def td_error(self, y: Tensor) -> Tensor:
        """Return d_k - y (R, K, B) for y (R, B)."""
        return (self.q_pass().output * self.action_one_hot.unsqueeze(1)).sum(-1) - y.unsqueeze(1)

    def q_gradient(self, td_error: Tensor) -> Tensors:
        """Return the gradient of 1/2 sum_k mean (d_k - y)^2 in q's weights, by name, given d_k - y (R, K, B)."""
        cotangent = (td_error / td_error.shape[2]).unsqueeze(-1) * self.action_one_hot.unsqueeze(1)
        return self.q.vjp(self.q_pass(), cotangent)

    def q_jvp(self, tangent: Weights) -> Tensor:
        """Return J_k v (R, K, B), d_k's directional derivative along a tangent v of q's weights."""
        return (self.q.jvp(self.q_pass(), tangent) * self.action_one_hot.unsqueeze(1)).sum(-1)


def inner_hessian_operator(problem: Problem, inverse: InverseHessian, y_model: Tensor) -> Callable[[Tensors], Tensors]:
    """Return v -> H v, H the Hessian of L_in in q's weights, or its Gauss-Newton part sum_k J_k'J_k / B."""
    if inverse == "hessian":
        theta = {n: p.detach() for n, p in problem.q.named_parameters()}
        return hessian_operator(lambda weights: problem.inner_loss(weights, y_model), theta)
    return lambda v: problem.q_gradient(problem.q_jvp(v))


def omd_weights(
    problem: Problem, inverse: InverseHessian, steps: int, damping: float, y_model: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w (R, B) of OMD (arXiv 2106.03273), L_out (R,), and the linear system's relative residual (R,).

    Args:
        problem: at the inner solution.
        inverse: of the inner Hessian: the ``identity``, or by conjugate gradients ``gauss_newton`` (J'J/B, never
            indefinite) or the ``hessian`` of L_in itself.
        steps: iterations of conjugate gradient.
        damping: c.
        y_model: y_T (R, B), detached.
    """
    error = problem.td_error(problem.y)
    v = problem.q_gradient(error)
    loss = 0.5 * error.square().mean(2).sum(1)
    residual = torch.zeros_like(loss)
    if inverse != "identity":
        product, like = inner_hessian_operator(problem, inverse, y_model), v
        solved = conjugate_gradient(lambda flat: flatten(product(unflatten(flat, like))), flatten(v), steps, damping)
        v, residual = unflatten(solved.x, like), solved.residual
    return problem.q_jvp(v).sum(1) / error.shape[2], loss, residual


def funcbo_weights(problem: Problem, y_model: Tensor, solved: bool) -> tuple[Tensor, Tensor]:
    """Return w (R, B) of functional bilevel optimisation (arXiv 2403.20233), and L_out (R,).

    Args:
        problem: with the values as they are.
        y_model: y_T (R, B), detached.
        solved: treat the inner problem as solved, d_k = y_T: the gradient is that of mean (y_T - y)^2 for two heads.
            Otherwise d_k are the present values.
    """
    exact = (y_model - problem.y).unsqueeze(1).expand(-1, problem.q.heads, -1)
    error = exact if solved else problem.td_error(problem.y)
    return error.sum(1) / error.shape[2], 0.5 * error.square().mean(2).sum(1)
