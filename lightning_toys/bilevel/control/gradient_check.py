"""Check of the outer gradient against finite differences of the outer loss through the inner solution's response."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.control.agents import Problem, half_squared_error
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.implicit import conjugate_gradient, gradient, hessian_operator
from lightning_toys.bilevel.vectors import Tensors, flatten, unflatten
from lightning_toys.errors import ToyError
from lightning_toys.training.noise import keyed_generator

MAX_RESIDUAL = 1e-3  # relative residual above which there is no inner response


def to_double(nets: AgentNetworks, batch: Batch) -> tuple[AgentNetworks, Batch]:
    """Return copies of networks and batch in double precision, of which autograd may keep what was drawn without it."""
    return copy.deepcopy(nets).double(), Batch(*((x.double() if x.is_floating_point() else x).clone() for x in batch))


def inner_response(
    problem: Problem, y_model: Tensor, start: Tensors, start_gradient: Tensors, damping: float
) -> tuple[Tensors, Tensor]:
    """Return argmin_theta L_in(theta; y_T) - <g0, theta> + c/2 |theta - start|^2, and a residual (R,).

    With ``start_gradient`` g0, the gradient of L_in at ``start`` for the model as it is, ``start`` itself is the
    solution there, and the solution's derivative is -(H + c I)^-1 of the mixed derivative: what OMD's formula stands
    for, exactly, at a point that need not be optimal. By Newton's method. Where H + c I is not positive definite, far
    from the inner solution, there is no such minimum, conjugate gradient stops, and the residual of the first linear
    system, relative, is far from 0.
    """
    theta = {n: x.clone() for n, x in start.items()}
    residual = torch.zeros_like(y_model[:, 0])

    def inner_loss(weights: Tensors) -> Tensor:
        return problem.inner_loss(weights, y_model)

    for k in range(3):
        own = gradient(inner_loss, theta)
        g = {n: own[n] - start_gradient[n] + damping * (theta[n] - start[n]) for n in theta}
        product = hessian_operator(inner_loss, theta)
        solved = conjugate_gradient(lambda x: flatten(product(unflatten(x, theta))), flatten(g), 100, damping)  # noqa: B023
        if k == 0:  # later systems have next to nothing on the right, and residuals of rounding
            residual = solved.residual
        step = unflatten(solved.x, theta)
        theta = {n: theta[n] - step[n] for n in theta}
    return theta, residual


def directional_differences(
    problem: Problem,
    response: str,
    seeds: Sequence[int],
    num_directions: int,
    step: int,
    damping: float,
    fit_gradient: Callable[[], tuple[Tensors | None, Tensor]] | None = None,
    step_size: float = 1e-6,
) -> tuple[Tensors, Tensor]:
    """Return random directions of the model's weights, by name (R, D, ...), and L_out's central differences (R, D).

    A difference is NaN where the values' weights have no response, see :func:`inner_response`.

    Args:
        problem: in double precision, at the values that the gradient was taken at.
        response: of ``AgentUpdate``: ``weights``: the values' weights respond (see :func:`inner_response`); ``values``
            or ``solved``: the values themselves do, from where they are or from their targets; ``loss``: nothing does.
        seeds: one seed a replica; with ``step`` they key the directions.
        num_directions: D.
        step: of the run.
        damping: c of the response.
        fit_gradient: of ``loss``: returns gradient and loss of an agent that has no inner problem.
        step_size: length of a difference's step, in units of a direction of unit variance; a longer one steps over
            kinks of the ReLU networks, which the solution at an interpolating point lies close to.
    """
    model = problem.model
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    directions = {
        n: torch.from_numpy(
            np.stack(
                [keyed_generator(s, step, f"check/{n}").standard_normal((num_directions, *p.shape[1:])) for s in seeds]
            )
        ).to(p)
        for n, p in theta.items()
    }
    start = {n: p.detach().clone() for n, p in problem.q.named_parameters()}
    y0 = problem.y_model().detach()
    start_gradient = gradient(lambda weights: problem.inner_loss(weights, y0), start)
    solved = y0.unsqueeze(1).expand(-1, problem.q.heads, -1)
    d0 = (solved if response == "solved" else problem.d()).detach()
    out = torch.zeros(len(seeds), num_directions, dtype=torch.float64)
    for j in range(num_directions):
        values = []
        for sign in (1.0, -1.0):
            for n, p in model.named_parameters():
                p.data = theta[n] + sign * step_size * directions[n][:, j]
            y = problem.y_model().detach()
            if fit_gradient is not None:
                values.append(fit_gradient()[1])
            elif response == "weights":
                theta_star, residual = inner_response(problem, y, start, start_gradient, damping)
                value = problem.outer_loss(theta_star).detach()
                values.append(torch.where(residual < MAX_RESIDUAL, value, torch.nan))
            else:
                values.append(half_squared_error(d0 + (y - y0).unsqueeze(1), problem.y))
        out[:, j] = ((values[0] - values[1]) / (2 * step_size)).cpu()
    for n, p in model.named_parameters():
        p.data = theta[n]
    return directions, out


def cosine_similarity(gradient: Tensors, directions: Tensors, differences: Tensor) -> Tensor:
    """Return the cosine (R,) of <gradient, u_j> and the differences (R, D) along u_j, over the directions j.

    NaN where a difference is NaN.
    """
    predicted = torch.zeros_like(differences)
    for n, g in gradient.items():
        predicted += (directions[n].flatten(2) * g.double().flatten(1).unsqueeze(1)).sum(2).cpu()
    return torch.nn.functional.cosine_similarity(predicted, differences, dim=1)


@torch.inference_mode(False)
@torch.enable_grad()
def gradient_cosine(learner: Learner, batch: Batch, seeds: Sequence[int], num_directions: int, step: int) -> Tensor:
    """Return the cosine (R,) of a learner's outer gradient with finite differences, in double precision.

    Args:
        learner: left as it is.
        batch: transitions that both are taken at.
        seeds: one seed a replica; with ``step`` they key the directions.
        num_directions: of the finite differences.
        step: of the run.

    Raises:
        ToyError: the agent gives no gradient.
    """
    agent = learner.agent
    nets, batch = to_double(learner.nets, batch)
    double = Learner(nets, agent, learner.solver, learner.value, learner.tau, form=learner.form)
    problem = double.problem(batch)

    def found() -> tuple[Tensors | None, Tensor]:
        return double.model_gradient(problem, None if agent.fits else problem.model_targets())

    outer, _ = found()
    if outer is None:
        name = type(agent).__name__
        raise ToyError(f"--model.agent: {name}.gradient returns none to check; give --model.check_gradient 0")
    by_differences = found if agent.response == "loss" else None
    damping = learner.solver.cg_damping
    found_along = directional_differences(problem, agent.response, seeds, num_directions, step, damping, by_differences)
    return cosine_similarity(outer, *found_along)
