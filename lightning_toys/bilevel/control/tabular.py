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
    """A learned decision process.

    Attributes:
        logits: (A, S, S); the next state after action a in state s has the distribution softmax(logits[a, s]).
        reward: (S, A).
    """

    logits: Tensor
    reward: Tensor

    @property
    def transition(self) -> Tensor:
        """Distributions of the next state, (A, S, S)."""
        return self.logits.softmax(dim=-1)


class TabularMDP(NamedTuple):
    """The true decision process.

    Attributes:
        transition: (A, S, S).
        reward: (S, A).
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
    """Return a process of two states and two actions (Dadashi et al. 2019, arXiv 1901.11524)."""
    float64 = torch.float64
    transition = torch.tensor([[[0.7, 0.3], [0.2, 0.8]], [[0.99, 0.01], [0.99, 0.01]]], dtype=float64)
    reward = torch.tensor([[-0.45, -0.1], [0.5, 0.5]], dtype=float64)
    return TabularMDP(transition, reward, torch.full((2,), 0.5, dtype=float64), 0.9)


def soft_value(q: Tensor, alpha: float) -> Tensor:
    """V(s) = alpha logsumexp(Q(s, .) / alpha), (S,)."""
    return alpha * torch.logsumexp(q / alpha, dim=-1)


def soft_policy(q: Tensor, alpha: float) -> Tensor:
    """pi(a|s) = softmax(Q(s, .) / alpha), (S, A)."""
    return torch.softmax(q / alpha, dim=-1)


def soft_bellman(q: Tensor, transition: Tensor, reward: Tensor, discount: float, alpha: float) -> Tensor:
    """r + gamma P V, (S, A)."""
    return reward + discount * (transition @ soft_value(q, alpha)).T


def bellman_jacobian(q: Tensor, transition: Tensor, discount: float, alpha: float) -> Tensor:
    """gamma P pi: the derivative of :func:`soft_bellman` by Q, (S A, S A), rows (s, a), columns (s', a')."""
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
    """J = initial' (I - gamma P_pi)^-1 r_pi: the discounted reward of a policy (S, A) in the true process, exactly."""
    step = torch.einsum("sa,ast->st", policy, mdp.transition)
    reward = (policy * mdp.reward).sum(dim=-1)
    eye = torch.eye(len(mdp.initial), dtype=policy.dtype)
    value: Tensor = torch.linalg.solve(eye - mdp.discount * step, reward)
    return (mdp.initial * value).sum()


def return_objective(mdp: TabularMDP, alpha: float) -> Callable[[Tensor], Tensor]:
    """Return F(Q) = J of Q's soft policy."""
    return lambda q: policy_return(mdp, soft_policy(q, alpha))


def bellman_error_objective(mdp: TabularMDP, alpha: float) -> Callable[[Tensor], Tensor]:
    """Return F(Q) = 1/2 mean (Q - B_true Q)^2: OMD's outer loss with every state and action seen once."""

    def loss(q: Tensor) -> Tensor:
        return 0.5 * (q - soft_bellman(q, mdp.transition, mdp.reward, mdp.discount, alpha)).square().mean()

    return loss


class ImplicitGradient(NamedTuple):
    """An outer value, its gradient in the model's parameters, and the fixed point that it was taken at."""

    value: Tensor
    model: TabularModel
    q: Tensor


def implicit_gradient(
    outer: Callable[[Tensor], Tensor], model: TabularModel, discount: float, alpha: float
) -> ImplicitGradient:
    """Differentiate ``outer`` of the model's Q* by the implicit function theorem.

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
