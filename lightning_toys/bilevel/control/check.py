"""The judge: the outer gradient against finite differences of the outer loss through the inner solution's response."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.control.agents import Agent, Problem, half_squares
from lightning_toys.bilevel.control.learner import Nets
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.implicit import conjugate_gradient, gradient, hessian_product
from lightning_toys.bilevel.vectors import Tensors, flatten, unflatten
from lightning_toys.training.noise import keyed_generator

SOLVED = 1e-3  # relative residual above which a response is none


def in_double(nets: Nets, batch: Batch) -> tuple[Nets, Batch]:
    """Return copies in double precision."""
    return copy.deepcopy(nets).double(), Batch(*(x.double() if x.is_floating_point() else x for x in batch))


def response(
    problem: Problem, y_model: Tensor, start: Tensors, slope: Tensors, damping: float
) -> tuple[Tensors, Tensor]:
    """Return argmin_theta L_in(theta; y_T) - <slope, theta> + c/2 |theta - start|^2, and how far it is solved (R,).

    With ``slope`` the gradient of L_in at ``start`` for the model as it is, ``start`` itself is the solution there, and
    the solution's derivative is -(H + c I)^-1 of the mixed derivative: what OMD's formula stands for, exactly, at a
    point that need not be optimal. By Newton's method; where H + c I is not positive definite, far from the inner
    solution, there is no such minimum, conjugate gradient stops, and the second value, the worst relative residual of
    its systems, is far from 0.
    """
    theta = {n: x.clone() for n, x in start.items()}
    worst = torch.zeros_like(y_model[:, 0])

    def inner(weights: Tensors) -> Tensor:
        return problem.inner(weights, y_model)

    for k in range(3):
        own = gradient(inner, theta)
        g = {n: own[n] - slope[n] + damping * (theta[n] - start[n]) for n in theta}
        product = hessian_product(inner, theta)
        solved = conjugate_gradient(lambda x: flatten(product(unflatten(x, slope))), flatten(g), 100, damping)  # noqa: B023
        if k == 0:  # later systems have next to nothing on the right, and residuals of rounding
            worst = solved.residual
        step = unflatten(solved.x, slope)
        theta = {n: theta[n] - step[n] for n in theta}
    return theta, worst


def differences(
    problem: Problem,
    agent: Agent,
    seeds: Sequence[int],
    directions: int,
    step: int,
    damping: float,
    solved: bool = True,
    fitted: Callable[[], tuple[Tensors, Tensor]] | None = None,
    size: float = 1e-6,
) -> tuple[Tensors, Tensor]:
    """Return random directions of the model's weights (R, D, ...) and the outer loss's central differences (R, D).

    A difference is NaN where the values' weights have no response, see :func:`response`.

    Args:
        problem: in double precision, at the values that the gradient was taken at.
        agent: ``omd``: the values' weights respond (see :func:`response`); ``funcbo``: the values themselves do.
        seeds: of the replicas; they key the directions.
        directions: D.
        step: keys the directions too.
        damping: c of the response.
        solved: funcbo's inner problem is taken for solved.
        fitted: gives gradient and loss of ``mle`` and ``vep``: there is no inner problem in them.
        size: length of a difference's step, in units of a direction of unit variance; a longer one steps over
            kinks of the ReLU networks, which the solution at an interpolating point lies close to.
    """
    model = problem.model
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    drawn = {
        n: torch.from_numpy(
            np.stack(
                [keyed_generator(s, step, f"check/{n}").standard_normal((directions, *p.shape[1:])) for s in seeds]
            )
        ).to(p)
        for n, p in theta.items()
    }
    start = {n: p.detach().clone() for n, p in problem.q.named_parameters()}
    y0 = problem.y_model().detach()
    slope = gradient(lambda weights: problem.inner(weights, y0), start)
    d0 = (y0.unsqueeze(1).expand(-1, problem.q.heads, -1) if solved else problem.d()).detach()
    out = torch.zeros(len(seeds), directions, dtype=torch.float64)
    for j in range(directions):
        ends = []
        for sign in (1.0, -1.0):
            for n, p in model.named_parameters():
                p.data = theta[n] + sign * size * drawn[n][:, j]
            y = problem.y_model().detach()
            if fitted is not None:
                ends.append(fitted()[1])
            elif agent == "omd":
                theta_there, residual = response(problem, y, start, slope, damping)
                value = problem.outer(theta_there).detach()
                ends.append(torch.where(residual < SOLVED, value, torch.nan))
            else:
                ends.append(half_squares(d0 + (y - y0).unsqueeze(1), problem.y))
        out[:, j] = ((ends[0] - ends[1]) / (2 * size)).cpu()
    for n, p in model.named_parameters():
        p.data = theta[n]
    return drawn, out


def cosine(claimed_gradient: Tensors, drawn: Tensors, found: Tensor) -> Tensor:
    """Return the cosine (R,) of <gradient, u_j> and the differences along u_j, over the directions."""
    claimed = torch.zeros_like(found)
    for n, g in claimed_gradient.items():
        claimed += (drawn[n].flatten(2) * g.double().flatten(1).unsqueeze(1)).sum(2).cpu()
    return torch.nn.functional.cosine_similarity(claimed, found, dim=1)
