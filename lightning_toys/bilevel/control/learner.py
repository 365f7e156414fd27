"""One outer iteration of each agent: networks, optimiser steps, and metrics. No Lightning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.agents import (
    ModelTargets,
    Problem,
    SoftValue,
    model_errors,
)
from lightning_toys.bilevel.control.nets import MultiHeadMLP
from lightning_toys.bilevel.control.own_model import Dynamics, OwnWorldModel
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.control.settings import FORMS, Form, Solver
from lightning_toys.bilevel.control.updates import AgentUpdate, make_agent
from lightning_toys.bilevel.control.world_model import WorldModel
from lightning_toys.bilevel.vectors import Tensors, flatten, moving_average_, unflatten
from lightning_toys.errors import require
from lightning_toys.training.fused_adam import step_adam

TAKEN = ("q", "target", "model", "start", "recent", "seen")  # names in AgentNetworks, of which some come and go


class AgentNetworks(nn.Module):
    """An agent's networks: values ``q``, their slow copy ``target``, the ``model``, and what its algorithm asks for.

    ``start`` are the initial values of cold starts, ``recent`` the last gradients (R, smoothing, P) and ``seen`` their
    number.

    Args:
        seeds: one seed a replica.
        states: S, dimensions of a state.
        actions: A, number of actions.
        hidden: width of the values' two hidden layers.
        model_hidden: width of the model's.
        heads: 2 is double Q-learning.
        agent: a name, or one's own.
        solver: how it is run.
        form: ours, or the published one.
        dynamics: a model of one's own; None is :class:`WorldModel`.

    Attributes:
        further: names of what the agent asked for.

    Raises:
        ToyError: it asked for something else than networks, or under a name that is taken.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        states: int,
        actions: int,
        hidden: int,
        model_hidden: int,
        heads: int,
        agent: AgentUpdate | str,
        solver: Solver,
        form: Form = FORMS["ours"],
        dynamics: Dynamics | None = None,
    ) -> None:
        super().__init__()
        sizes, orthogonal = (states, hidden, hidden, actions), form.orthogonal
        self.q = MultiHeadMLP(seeds, "q", sizes, heads, orthogonal)
        self.target = MultiHeadMLP(seeds, "q", sizes, heads, orthogonal).requires_grad_(False)
        if dynamics is None:
            self.model = WorldModel(seeds, states, actions, model_hidden, orthogonal, form.separate_reward)
        else:
            self.model = OwnWorldModel(dynamics, seeds, states, actions, model_hidden)
        method = make_agent(agent, solver, form)
        extra = method.networks(seeds, states, actions, hidden, form)
        self.further = check_further(type(method).__name__, extra, self)
        for name, net in extra.items():
            self.add_module(name, net)
        if not solver.warm_start:
            self.start = MultiHeadMLP(seeds, "q", sizes, heads, orthogonal).requires_grad_(False)
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


def check_further(name: str, extra: Any, nets: nn.Module) -> tuple[str, ...]:
    """Return the names of an agent's further networks.

    Args:
        name: of its class.
        extra: what its ``networks`` returned.
        nets: what they are added to.

    Raises:
        ToyError: it is no dictionary of networks, or a name is taken or none.
    """
    where = f"--model.agent: {name}.networks"
    require(isinstance(extra, dict), f"{where} returns {type(extra).__name__}; give a dictionary of Modules by name")
    for label, net in extra.items():
        fits = isinstance(label, str) and label.isidentifier() and label not in TAKEN and not hasattr(nets, label)
        require(fits, f"{where}: the name {label!r} is not allowed; give another one, of letters, digits and _")
        kind = type(net).__name__
        require(isinstance(net, nn.Module), f"{where}: {label} is a {kind}; give a Module")
    return tuple(extra)


class Learner:
    """Runs outer iterations of one agent on its networks.

    Args:
        nets: stepped in place.
        agent: a name, or one's own.
        solver: how it is run.
        value: V and targets.
        tau: the target network's step towards the values at each outer iteration, target += tau (q - target).
        max_grad_norm: bound on each replica's outer gradient norm.
        form: ours, or the published one.
    """

    def __init__(
        self,
        nets: AgentNetworks,
        agent: AgentUpdate | str,
        solver: Solver,
        value: SoftValue,
        tau: float,
        max_grad_norm: float | None = None,
        form: Form = FORMS["ours"],
    ) -> None:
        self.nets, self.solver, self.value, self.form = nets, solver, value, form
        self.agent = make_agent(agent, solver, form)
        anew = form.fresh_moments and not self.agent.fits
        self.keeps_moments = solver.warm_opt if solver.warm_opt is not None else not anew
        self.tau, self.max_grad_norm = tau, max_grad_norm
        # the optimiser's object, by the parameters' names and in their order
        self.q_params, self.model_params = list(nets.q.parameters()), dict(nets.model.named_parameters())
        self.target_params: list[Tensor] = list(nets.target.parameters())
        self.residual: Tensor | None = None  # of the last inner Hessian system (R,)
        self.nan_if_diverged = torch.zeros(())  # 0, or NaN where the values are no longer finite (R,)

    def problem(self, batch: Batch) -> Problem:
        """Return the bilevel problem of a batch."""
        return Problem(self.nets.q, self.nets.target, self.nets.model, self.value, batch)

    @property
    def batches(self) -> int:
        """How many batches an environment step takes."""
        steps = self.solver.num_t_steps
        if not self.form.fresh_batches:
            return steps
        return steps + self.solver.num_q_steps if self.agent.fits else 1

    def environment_step(
        self, sample: Callable[[int], Batch], outer: torch.optim.Optimizer, inner: torch.optim.Optimizer
    ) -> Tensor:
        """Learn what an environment step allows; return the last loss of the model (R,), see :meth:`outer_iteration`.

        Args:
            sample: returns batch 0, 1, ..., below :attr:`batches`.
            outer: steps the model.
            inner: steps the values.
        """
        if self.form.fresh_batches and self.agent.fits:
            return self.fit_then_learn(sample, outer, inner)
        loss = torch.zeros(())
        for k in range(self.batches):
            loss = self.outer_iteration(sample(k), outer, inner)
        return loss

    def outer_iteration(self, batch: Batch, outer: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> Tensor:
        """Make one outer iteration; return the model's loss (R,), not finite where the values are not.

        Args:
            batch: transitions, the same for the inner and the outer problem.
            outer: steps the model.
            inner: steps the values.
        """
        problem = self.problem(batch)
        if self.agent.fits:
            found_loss = self.step_on(problem, None, outer)
            self.start_inner_loop(problem)
            self.take_inner_steps(problem, self.agent.targets(problem), inner)
        else:
            self.start_inner_loop(problem)
            targets = problem.model_targets()  # of the target values that a cold start has set
            self.take_inner_steps(problem, self.agent.targets(problem, targets), inner)
            if self.form.target_each_step:  # which has moved
                problem = self.problem(batch)
                targets = problem.model_targets()
            found_loss = self.step_on(problem, targets, outer)
        if not self.form.target_each_step:
            self.move_target()
        return found_loss + self.nan_if_diverged

    def fit_then_learn(
        self, sample: Callable[[int], Batch], outer: torch.optim.Optimizer, inner: torch.optim.Optimizer
    ) -> Tensor:
        """Take steps of the model, then of the values, a batch each; arguments as :meth:`environment_step`."""
        loss, steps = torch.zeros(()), self.solver.num_t_steps
        for k in range(steps):
            loss = self.step_on(self.problem(sample(k)), None, outer)
        for k in range(self.solver.num_q_steps):
            problem = self.problem(sample(steps + k))
            if not self.keeps_moments and k == 0:
                inner.state.clear()
            self.take_inner_step(problem, self.agent.targets(problem), inner)
            if self.form.target_each_step:
                self.move_target()
        if not self.form.target_each_step:
            self.move_target()
        return loss + self.nan_if_diverged

    def move_target(self) -> None:
        """Move the target values towards the values: target += tau (q - target)."""
        torch._foreach_lerp_(self.target_params, [p.detach() for p in self.q_params], self.tau)

    def step_on(self, problem: Problem, targets: ModelTargets | None, outer: torch.optim.Optimizer) -> Tensor:
        """Step the model by the agent's gradient, arguments as :meth:`model_gradient`; return its loss (R,)."""
        gradient, loss = self.model_gradient(problem, targets)
        if gradient is not None:
            self.step_model(gradient, outer)
        return loss

    def model_gradient(self, problem: Problem, targets: ModelTargets | None = None) -> tuple[Tensors | None, Tensor]:
        """Return the model's gradient, by name (none leaves it as it is), and loss (R,).

        Args:
            problem: at the values as they are.
            targets: the model's targets, for an agent that does not fit its model.
        """
        gradient, loss, self.residual = self.agent.gradient(self.nets, problem, targets)
        if gradient is not None and any(g.requires_grad for g in gradient.values()):  # an agent's of one's own
            gradient = {n: g.detach() for n, g in gradient.items()}
        return gradient, loss.detach()

    def start_inner_loop(self, problem: Problem) -> None:
        """Set the values to the first ones if the start is cold, and the target values if ``cold_target`` says so.

        What ``problem`` remembers of what was set is dropped: targets are to be asked for after this.
        """
        if self.solver.warm_start:
            return
        start: list[Tensor] = list(self.nets.start.parameters())
        torch._foreach_copy_([p.detach() for p in self.q_params], start)
        problem.clear_q_pass()
        if self.form.cold_target:
            torch._foreach_copy_(self.target_params, start)
            problem.clear_y()

    def take_inner_steps(self, problem: Problem, y: Tensor, inner: torch.optim.Optimizer) -> None:
        """Take ``num_q_steps`` inner steps of the values on targets y (R, B), which move with the target values."""
        if not self.keeps_moments:
            inner.state.clear()
        problem.clear_q_pass()
        for k in range(self.solver.num_q_steps):
            if k and self.form.target_each_step:
                problem.clear_y()
                y = self.agent.targets(problem)
            self.take_inner_step(problem, y, inner)
            if self.form.target_each_step:
                self.move_target()

    def take_inner_step(self, problem: Problem, y: Tensor, inner: torch.optim.Optimizer) -> None:
        """Take one step of the values on targets y (R, B)."""
        error = problem.td_error(y)
        self.nan_if_diverged = 0 * error.sum((1, 2))
        gradient = problem.q_gradient(error)
        for p, g in zip(self.q_params, gradient.values(), strict=True):
            p.grad = g
        step_adam(inner)
        problem.clear_q_pass()

    def step_model(self, gradient: Tensors, outer: torch.optim.Optimizer) -> None:
        """Step the model along its gradient, by name: smoothed, and clipped by each replica's own norm, if set so."""
        if self.solver.smoothing > 1:
            b, mean = self.solver.smoothing_present, self.nets.smooth_gradient(gradient)
            gradient = {name: b * gradient[name] + (1 - b) * g for name, g in mean.items()} if b else mean
        scale: Tensor | None = None
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (flatten(gradient).norm(dim=1) + 1e-6)).clamp(max=1.0)
        for name, p in self.model_params.items():  # an agent's gradient may have them in another order
            g = gradient[name]
            scaled = g if scale is None else g * scale.view(-1, *[1] * (g.dim() - 1))
            p.grad = scaled.contiguous()  # torch 2.13's fused Adam reads strided gradients as if they were not
        step_adam(outer)

    @torch.no_grad()
    def measure_errors(self, batch: Batch) -> dict[str, Tensor]:
        """Return the errors of values and model on a batch, each (R,).

        ``td_error``: RMS of d - y; ``inner_error``: RMS of d - y_T; ``model_error``: RMS error of a coordinate of the
        next state; ``reward_error``: RMS error of the reward; ``value``: mean of d. Those of the model are left out
        where nothing learns from it.
        """
        problem = self.problem(batch)
        if not self.agent.uses_model:
            d = problem.td_error(torch.zeros_like(problem.y))
            error = d - problem.y.unsqueeze(1)
            return {"td_error": error.square().mean((1, 2)).sqrt(), "value": d.mean((1, 2))}
        targets = problem.model_targets()
        state, reward = model_errors(targets.prediction, batch)
        error = problem.td_error(problem.y)
        return {
            "td_error": error.square().mean((1, 2)).sqrt(),
            "inner_error": problem.td_error(targets.y).square().mean((1, 2)).sqrt(),
            "model_error": (state / batch.observation.shape[-1]).sqrt(),
            "reward_error": reward.sqrt(),
            "value": (error + problem.y.unsqueeze(1)).mean((1, 2)),
            **self.agent.measures(problem, targets),
        }
