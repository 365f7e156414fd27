"""A learned model of a tiny decision process, and the exact gradient of its planner's return in the true one.

S states, A actions, all of it known, float64: the planner solves the learned model by the soft Bellman equation

    Q = r + gamma P V,    V(s) = alpha logsumexp(Q(s, .) / alpha),    pi(a|s) = softmax(Q(s, .) / alpha),

and an outer function F of its Q* is differentiated through the fixed point. With B the right-hand side,

    dF/dtheta = (dB/dtheta)' lambda,    (I - dB/dQ)' lambda = dF/dQ    at Q*,

where dB/dQ = gamma P pi, since logsumexp's derivative is the policy. (Nikishin et al., "Control-oriented model-based
reinforcement learning with implicit differentiation", arXiv 2106.03273.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TabularModel(NamedTuple):
    """A learned model of a decision process.

    Attributes:
        logits: (A, S, S); the next state after action a in state s has the distribution softmax(logits[a, s]).
        reward: r (S, A).
    """

    logits: Tensor
    reward: Tensor

    @property
    def transition(self) -> Tensor:
        """P (A, S, S), P[a, s] the distribution of the next state."""
        return self.logits.softmax(dim=-1)


class TabularMDP(NamedTuple):
    """The true decision process.

    Attributes:
        transition: P (A, S, S).
        reward: r (S, A).
        initial: distribution of the first state, (S,).
        discount: gamma.
    """

    transition: Tensor
    reward: Tensor
    initial: Tensor
    discount: float

    def true_model(self) -> TabularModel:
        """Return the model that equals the process."""
        return TabularModel(self.transition.log(), self.reward.clone())


def two_state_mdp() -> TabularMDP:
    """Return a process of two states and two actions (Dadashi et al. 2019, arXiv 1901.11524).

    >>> mdp = two_state_mdp()
    >>> q = plan(mdp.true_model(), mdp.discount, alpha=0.01)
    >>> round(float(return_objective(mdp, 0.01)(q)), 7)
    1.0272551
    """
    float64 = torch.float64
    transition = torch.tensor([[[0.7, 0.3], [0.2, 0.8]], [[0.99, 0.01], [0.99, 0.01]]], dtype=float64)
    reward = torch.tensor([[-0.45, -0.1], [0.5, 0.5]], dtype=float64)
    return TabularMDP(transition, reward, torch.full((2,), 0.5, dtype=float64), 0.9)


def soft_value(q: Tensor, alpha: float) -> Tensor:
    """Return V (S,) of q (S, A): V(s) = alpha logsumexp(Q(s, .) / alpha)."""
    return alpha * torch.logsumexp(q / alpha, dim=-1)


def soft_policy(q: Tensor, alpha: float) -> Tensor:
    """Return pi (S, A) of q (S, A): pi(a|s) = softmax(Q(s, .) / alpha)."""
    return torch.softmax(q / alpha, dim=-1)


def soft_bellman(q: Tensor, transition: Tensor, reward: Tensor, discount: float, alpha: float) -> Tensor:
    """Return the soft Bellman backup r + gamma P V (S, A) of q (S, A)."""
    return reward + discount * (transition @ soft_value(q, alpha)).T


def bellman_jacobian(q: Tensor, transition: Tensor, discount: float, alpha: float) -> Tensor:
    """Return gamma P pi, the derivative of :func:`soft_bellman` in Q: (S A, S A), rows (s, a), columns (s', a')."""
    pairs = q.numel()
    return discount * torch.einsum("ast,tb->satb", transition, soft_policy(q, alpha)).reshape(pairs, pairs)


@torch.no_grad()
def soft_value_iteration(
    transition: Tensor, reward: Tensor, discount: float, alpha: float, max_steps: int = 100
) -> Tensor:
    """Return Q* (S, A), the fixed point of :func:`soft_bellman`, to machine precision.

    Each step is a backup, which contracts by the discount, and then Newton's step, which is soft policy iteration: it
    converges from anywhere, and quadratically.

    Raises:
        RuntimeError: ``max_steps`` steps did not get there.
    """
    q = torch.zeros_like(reward)
    eye = torch.eye(q.numel(), dtype=q.dtype)
    for _ in range(max_steps):
        q = soft_bellman(q, transition, reward, discount, alpha)
        residual = soft_bellman(q, transition, reward, discount, alpha) - q
        if float(residual.abs().max()) <= 8 * torch.finfo(q.dtype).eps * max(1.0, float(q.abs().max())):
            return q
        step = torch.linalg.solve(eye - bellman_jacobian(q, transition, discount, alpha), residual.flatten())
        q = q + step.view_as(q)
    raise RuntimeError(f"a backup still moves Q by {float(residual.abs().max()):.1e} after {max_steps} steps")


def plan(model: TabularModel, discount: float, alpha: float) -> Tensor:
    """Return the learned model's Q*, (S, A), without a graph."""
    return soft_value_iteration(model.transition, model.reward, discount, alpha)


def policy_return(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """Return J = initial' (I - gamma P_pi)^-1 r_pi, the exact discounted return of a policy (S, A), a scalar."""
    step = torch.einsum("sa,ast->st", policy, mdp.transition)
    reward = (policy * mdp.reward).sum(dim=-1)
    eye = torch.eye(len(mdp.initial), dtype=policy.dtype)
    value: Tensor = torch.linalg.solve(eye - mdp.discount * step, reward)
    return (mdp.initial * value).sum()


def return_objective(mdp: TabularMDP, alpha: float) -> Callable[[Tensor], Tensor]:
    """Return the outer function F(Q) = J of Q's soft policy, Q (S, A) to a scalar; to be maximised."""
    return lambda q: policy_return(mdp, soft_policy(q, alpha))


def bellman_error_objective(mdp: TabularMDP, alpha: float) -> Callable[[Tensor], Tensor]:
    """Return the outer function F(Q) = 1/2 mean (Q - B_true Q)^2: OMD's loss over every state and action."""

    def loss(q: Tensor) -> Tensor:
        return 0.5 * (q - soft_bellman(q, mdp.transition, mdp.reward, mdp.discount, alpha)).square().mean()

    return loss


class ImplicitGradient(NamedTuple):
    """An outer function's gradient through the planner.

    Attributes:
        value: F(Q*), a scalar.
        model: the gradient in logits (A, S, S) and reward (S, A).
        q: Q* (S, A).
    """

    value: Tensor
    model: TabularModel
    q: Tensor


def implicit_gradient(
    outer: Callable[[Tensor], Tensor], model: TabularModel, discount: float, alpha: float
) -> ImplicitGradient:
    """Differentiate ``outer`` of the model's Q* by the implicit function theorem, see the module.

    Args:
        outer: a scalar function of Q (S, A), such as :func:`return_objective` or :func:`bellman_error_objective`.
        model: where to differentiate.
        discount: gamma.
        alpha: temperature.
    """
    q = plan(model, discount, alpha).requires_grad_()
    value = outer(q)
    (outer_grad,) = torch.autograd.grad(value, q)
    q = q.detach()
    leaf = TabularModel(*(x.detach().clone().requires_grad_() for x in model))
    jacobian = bellman_jacobian(q, leaf.transition.detach(), discount, alpha)
    eye = torch.eye(q.numel(), dtype=q.dtype)
    adjoint = torch.linalg.solve((eye - jacobian).T, outer_grad.flatten()).reshape(q.shape)
    backup = soft_bellman(q, leaf.transition, leaf.reward, discount, alpha)
    return ImplicitGradient(value.detach(), TabularModel(*torch.autograd.grad(backup, tuple(leaf), adjoint)), q)
