"""One outer iteration of each agent: networks, optimiser steps, and metrics. No Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.agents import (
    Agent,
    InverseHessian,
    ModelTargets,
    Problem,
    SoftValue,
    WorldModel,
    funcbo_weights,
    mle_gradient,
    model_errors,
    omd_weights,
    vep_gradient,
)
from lightning_toys.bilevel.control.nets import MultiHeadMLP
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.vectors import Tensors, flatten, moving_average_, unflatten
from lightning_toys.errors import REPEATS, bounded, require
from lightning_toys.training.fused_adam import step_adam


@dataclass
class Solver:
    """How the bilevel problem of a batch is solved.

    Args:
        num_q_steps: inner steps of an outer iteration, all on one batch.
        num_t_steps: outer iterations of an environment step, a batch each.
        warm_start: start each inner loop from the present values; otherwise from the initial ones.
        warm_opt: keep the inner optimiser's moments from one outer iteration to the next, for every agent.
        inverse: of the inner Hessian in ``omd``: ``identity`` (as published), ``gauss_newton`` or ``hessian`` by
            conjugate gradient.
        cg_steps: iterations of conjugate gradient.
        cg_damping: c, added to the Hessian's diagonal.
        inner_value: ``funcbo`` treats the inner problem as solved (``exact``) or takes the present values (``lagged``).
        vep_values: random value functions of ``vep``.
        smoothing: the model follows the mean of the last so many outer gradients (arXiv 2601.15363); 1 is without.
        state_gradient: ``omd`` and ``funcbo`` send the gradient through V(s'_T) too; false trains the predicted reward
            alone, which is what the code published for funcbo does.

    Raises:
        ToyError: a value is not allowed.
    """

    num_q_steps: int = 1
    num_t_steps: int = 1
    warm_start: bool = True
    warm_opt: bool = True
    inverse: InverseHessian = "identity"
    cg_steps: int = 10
    cg_damping: float = 0.01
    inner_value: str = "exact"
    vep_values: int = 5
    smoothing: int = 1
    state_gradient: bool = True

    def __post_init__(self) -> None:
        for name in ("num_q_steps", "num_t_steps", "cg_steps", "vep_values", "smoothing"):
            value = getattr(self, name)
            bounded(f"--model.solver.{name}", value, 1, REPEATS)
        damping = self.cg_damping
        bounded("--model.solver.cg_damping", damping, 0.0)
        require(
            self.inner_value in ("exact", "lagged"),
            f"--model.solver.inner_value: {self.inner_value!r} is not allowed; give exact or lagged",
        )


class AgentNetworks(nn.Module):
    """An agent's networks: values ``q``, their slow copy ``target``, the ``model``, and what its algorithm asks for.

    ``values`` are the random value functions of ``vep``, ``start`` the initial values of cold starts, ``recent`` the
    last gradients (R, smoothing, P) and ``seen`` their number.

    Args:
        seeds: one seed a replica.
        states: S, dimensions of a state.
        actions: A, number of actions.
        hidden: width of the values' two hidden layers.
        model_hidden: width of the model's.
        heads: 2 is double Q-learning.
        agent: the algorithm.
        solver: how it is run.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        states: int,
        actions: int,
        hidden: int,
        model_hidden: int,
        heads: int,
        agent: Agent,
        solver: Solver,
    ) -> None:
        super().__init__()
        sizes = (states, hidden, hidden, actions)
        self.q = MultiHeadMLP(seeds, "q", sizes, heads)
        self.target = MultiHeadMLP(seeds, "q", sizes, heads).requires_grad_(False)
        self.model = WorldModel(seeds, states, actions, model_hidden)
        if agent == "vep":
            widths = (states, hidden, hidden, 1)
            self.values = MultiHeadMLP(seeds, "vep", widths, solver.vep_values).requires_grad_(False)
        if not solver.warm_start:
            self.start = MultiHeadMLP(seeds, "q", sizes, heads).requires_grad_(False)
        if solver.smoothing > 1:
            size = sum(p[0].numel() for p in self.model.parameters())
            self.register_buffer("recent", torch.zeros(len(seeds), solver.smoothing, size))
            self.register_buffer("seen", torch.zeros((len(seeds), 1)))

    def smooth_gradient(self, gradient: Tensors) -> Tensors:
        """Return the mean of the last gradients of the model, this one included (arXiv 2601.15363), by name."""
        recent, seen = self.recent, self.seen
        assert isinstance(recent, Tensor)
        assert isinstance(seen, Tensor)
        count = int(seen[0, 0])
        seen += 1
        return unflatten(moving_average_(recent, count, flatten(gradient)), gradient)


class Learner:
    """Runs outer iterations of one agent on its networks.

    Args:
        nets: stepped in place.
        agent: the algorithm.
        solver: how it is run.
        value: V and targets.
        tau: the target network's step towards the values at each outer iteration, target += tau (q - target).
        max_grad_norm: bound on each replica's outer gradient norm.
    """

    def __init__(
        self,
        nets: AgentNetworks,
        agent: Agent,
        solver: Solver,
        value: SoftValue,
        tau: float,
        max_grad_norm: float | None = None,
    ) -> None:
        self.nets, self.agent, self.solver, self.value = nets, agent, solver, value
        self.tau, self.max_grad_norm = tau, max_grad_norm
        # the optimiser's object, by the parameters' names and in their order
        self.q_params, self.model_params = list(nets.q.parameters()), list(nets.model.parameters())
        self.target_params: list[Tensor] = list(nets.target.parameters())
        self.residual: Tensor | None = None  # of the last inner Hessian system (R,)
        self.nan_if_diverged = torch.zeros(())  # 0, or NaN where the values are no longer finite (R,)

    def problem(self, batch: Batch) -> Problem:
        """Return the bilevel problem of a batch."""
        return Problem(self.nets.q, self.nets.target, self.nets.model, self.value, batch)

    def outer_iteration(self, batch: Batch, outer: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> Tensor:
        """Make one outer iteration; return the model's loss (R,), not finite where the values are not.

        Args:
            batch: transitions, the same for the inner and the outer problem.
            outer: steps the model.
            inner: steps the values.
        """
        problem = self.problem(batch)
        if self.agent in ("mle", "vep"):
            gradient, loss = self.fit_gradient(problem)
            self.step_model(gradient, outer)
            self.take_inner_steps(problem, problem.model_targets().y, inner)
        else:
            targets = problem.model_targets()
            self.take_inner_steps(problem, targets.y, inner)
            gradient, loss = self.implicit_gradient(problem, targets)
            self.step_model(gradient, outer)
        torch._foreach_lerp_(self.target_params, [p.detach() for p in self.q_params], self.tau)
        return loss + self.nan_if_diverged

    def fit_gradient(self, problem: Problem) -> tuple[Tensors, Tensor]:
        """Return the model's gradient, by name, and loss (R,) of ``mle`` or ``vep``."""
        forward = self.nets.model.net.forward_pass(problem.inputs)
        if self.agent == "mle":
            return mle_gradient(problem, forward)
        return vep_gradient(problem, forward, self.nets.values)

    def implicit_gradient(self, problem: Problem, targets: ModelTargets) -> tuple[Tensors, Tensor]:
        """Return the model's gradient, by name, and L_out (R,) of ``omd`` or ``funcbo``.

        Args:
            problem: at the inner solution.
            targets: the model's targets.
        """
        solver = self.solver
        if self.agent == "omd":
            w, loss, self.residual = omd_weights(problem, solver.inverse, solver.cg_steps, solver.cg_damping, targets.y)
        else:
            w, loss = funcbo_weights(problem, targets.y, solver.inner_value == "exact")
        return problem.model_vjp(targets, w, solver.state_gradient), loss

    def take_inner_steps(self, problem: Problem, y_model: Tensor, inner: torch.optim.Optimizer) -> None:
        """Take ``num_q_steps`` inner steps of the values on the model's targets y_T (R, B)."""
        if not self.solver.warm_start:
            torch._foreach_copy_([p.detach() for p in self.q_params], list(self.nets.start.parameters()))
        if not self.solver.warm_opt:
            inner.state.clear()
        problem.clear_q_pass()
        for _ in range(self.solver.num_q_steps):
            error = problem.td_error(y_model)
            self.nan_if_diverged = 0 * error.sum((1, 2))
            gradient = problem.q_gradient(error)
            for p, g in zip(self.q_params, gradient.values(), strict=True):
                p.grad = g
            step_adam(inner)
            problem.clear_q_pass()

    def step_model(self, gradient: Tensors, outer: torch.optim.Optimizer) -> None:
        """Step the model along its gradient, by name: smoothed, and clipped by each replica's own norm, if set so."""
        if self.solver.smoothing > 1:
            gradient = self.nets.smooth_gradient(gradient)
        scale: Tensor | None = None
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (flatten(gradient).norm(dim=1) + 1e-6)).clamp(max=1.0)
        for p, g in zip(self.model_params, gradient.values(), strict=True):
            scaled = g if scale is None else g * scale.view(-1, *[1] * (g.dim() - 1))
            p.grad = scaled.contiguous()  # torch 2.13's fused Adam reads strided gradients as if they were not
        step_adam(outer)

    @torch.no_grad()
    def measure_errors(self, batch: Batch) -> dict[str, Tensor]:
        """Return the errors of values and model on a batch, each (R,).

        ``td_error``: RMS of d - y; ``inner_error``: RMS of d - y_T; ``model_error``: RMS error of a coordinate of the
        next state; ``reward_error``: RMS error of the reward; ``value``: mean of d.
        """
        problem = self.problem(batch)
        targets = problem.model_targets()
        state, reward = model_errors(targets.prediction, batch)
        error = problem.td_error(problem.y)
        return {
            "td_error": error.square().mean((1, 2)).sqrt(),
            "inner_error": problem.td_error(targets.y).square().mean((1, 2)).sqrt(),
            "model_error": (state / batch.observation.shape[-1]).sqrt(),
            "reward_error": reward.sqrt(),
            "value": (error + problem.y.unsqueeze(1)).mean((1, 2)),
        }
