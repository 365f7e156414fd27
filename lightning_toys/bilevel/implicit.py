"""Implicit differentiation of bilevel problems, in pure functions with explicit state.

    min_lambda F(lambda) = L_out(lambda, theta*(lambda)),   theta*(lambda) = argmin_theta L_in(lambda, theta)

By the implicit function theorem, with H = d2 L_in / dtheta2 and H z = dL_out / dtheta,

    dF/dlambda = dL_out/dlambda - (d2 L_in / dlambda dtheta) z.

Variables are dictionaries of tensors with a leading replica axis R, losses return one value a replica (R,), and
replicas never mix: that is why the sum of the losses is differentiated throughout.

Sources: implicit differentiation with an approximate inner solution and conjugate gradient (AID), Pedregosa, arXiv
1602.02355; unrolling, Franceschi et al., arXiv 1703.01785; functional bilevel optimisation, Petrulionyte et al., arXiv
2403.20233.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from lightning_toys.bilevel.inner_optimizers import Optimizer
from lightning_toys.bilevel.vectors import Tensors, flatten, unflatten, zeros_like

Loss = Callable[[Tensors], Tensor]  # variables (R, ...) to one value a replica (R,)
LinearOperator = Callable[[Tensor], Tensor]  # of one tensor; shapes in and out are equal


def sum_over_replicas(loss: Loss) -> Loss:
    """Return the sum of a loss over replicas, whose gradient is every replica's own."""
    return lambda theta: loss(theta).sum()


def gradient(loss: Loss, theta: Tensors) -> Tensors:
    """Return the gradient of each replica's loss in its own variables, tensors (R, ...) as theta."""
    gradients: Tensors = grad(sum_over_replicas(loss))(theta)
    return gradients


# products with curvature


def hvp(loss: Loss, theta: Tensors, v: Tensors) -> Tensors:
    """Return H v for each replica, H the Hessian of its loss at theta: forward over reverse.

    >>> theta, v = {"x": torch.tensor([[1.0, 2.0]])}, {"x": torch.tensor([[1.0, 0.0]])}
    >>> hvp(lambda p: p["x"].pow(3).sum(1), theta, v)["x"]  # H = diag(6 x)
    tensor([[6., 0.]])
    """
    product: Tensors = jvp(grad(sum_over_replicas(loss)), (theta,), (v,))[1]
    return product


def hessian_operator(loss: Loss, theta: Tensors) -> Callable[[Tensors], Tensors]:
    """Return v -> H v for many v at one theta: the gradient's graph is built once and freed with the function.

    Reverse over reverse: a product costs one backward pass, half of :func:`hvp`'s, which is what conjugate gradient
    asks for. (A loss whose backward has no backward of its own needs :func:`hvp`.)
    """
    with torch.enable_grad():
        leaves = {k: x.detach().requires_grad_(True) for k, x in theta.items()}
        gradients = torch.autograd.grad(loss(leaves).sum(), list(leaves.values()), create_graph=True)

    def product(v: Tensors) -> Tensors:
        # a gradient that depends on no variable (a loss linear in theta) has no graph
        dependent = [(g, v[k]) for g, k in zip(gradients, leaves, strict=True) if g.requires_grad]
        if not dependent:
            return zeros_like(v)
        out = torch.autograd.grad(
            [g for g, _ in dependent],
            list(leaves.values()),
            [x for _, x in dependent],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, out, strict=True))

    return product


def gauss_newton_product(
    outputs: Callable[[Tensors], Tensor], theta: Tensors, v: Tensors, weight: Tensor | LinearOperator | None = None
) -> Tensors:
    """Return the Gauss-Newton product J' W J v, J the Jacobian of ``outputs`` at theta.

    Args:
        outputs: theta to (R, ...).
        theta: where J is taken.
        v: the vector, tensors (R, ...) as theta.
        weight: W: a diagonal that broadcasts with the outputs, a linear function of them, or none for the identity.
    """
    jv: Tensor = jvp(outputs, (theta,), (v,))[1]
    if weight is not None:
        jv = weight * jv if isinstance(weight, Tensor) else weight(jv)
    product: Tensors = vjp(outputs, theta)[1](jv)[0]
    return product


class LinearSolution(NamedTuple):
    """The solution of a linear system.

    Attributes:
        x: (R, P).
        residual: |b - A x| / |b| (R,), A damped, as conjugate gradient's recurrence has it; 0 where b = 0.
    """

    x: Tensor
    residual: Tensor


def conjugate_gradient(
    matvec: LinearOperator,
    b: Tensor,
    iterations: int,
    damping: float = 0.0,
    x0: Tensor | None = None,
    reorthogonalise: bool = True,
) -> LinearSolution:
    """Solve (A + damping I) x = b for each replica by conjugate gradient, A symmetric positive definite.

    The method of Hestenes & Stiefel (1952). A replica stops once its residual is at rounding, or at the first direction
    in which the curvature is not positive; the others go on. The number of products is fixed, so that no value decides
    what is computed. Each right-hand side is scaled to entries below 2 first, so that its size decides nothing.

    Args:
        matvec: p (R, P) to A p (R, P).
        b: right-hand sides (R, P).
        iterations: products with A (one more with ``x0``).
        damping: added to A's diagonal.
        x0: first guess (R, P); none is zero.
        reorthogonalise: keep each residual orthogonal to all before (in exact arithmetic it is), for a few inner
            products and the memory of ``iterations`` vectors. A network's curvature has few large and many tiny
            eigenvalues. As soon as the large ones are solved for, rounding errors grow: in single precision ten plain
            iterations can turn one in the last digit of theta into a tenth of the answer.

    >>> a = torch.tensor([[[2.0, 0.0], [0.0, 4.0]]])
    >>> conjugate_gradient(lambda p: (a @ p[..., None])[..., 0], torch.tensor([[2.0, 2.0]]), iterations=2).x
    tensor([[1.0000, 0.5000]])
    """

    def damped(p: Tensor) -> Tensor:
        return matvec(p) + damping * p

    scale = power_of_two(b)  # |b|^2 of a gradient of 1e-23 is 0 in single precision, and of 1e20 infinite
    b = b / scale
    x = torch.zeros_like(b) if x0 is None else x0 / scale
    r = b.clone() if x0 is None else b - damped(x)
    p = r
    bb, rr = b.square().sum(1), r.square().sum(1)
    active = torch.ones_like(bb, dtype=torch.bool)
    one = torch.ones_like(bb)
    previous = b.new_empty(b.shape[0], iterations if reorthogonalise else 0, b.shape[1])
    for i in range(iterations):
        if reorthogonalise:
            previous[:, i] = r / torch.where(rr > 0, rr, one).sqrt()[:, None]
        ap = damped(p)
        curvature = (p * ap).sum(1)
        active = active & (rr > torch.finfo(b.dtype).eps ** 2 * bb) & (curvature > 0)
        # where, on both sides of the division: 0 / 0 must not be computed at all
        step = torch.where(active, rr / torch.where(active, curvature, one), 0.0)
        x = torch.addcmul(x, step[:, None], p)
        r = torch.addcmul(r, -step[:, None], ap)
        if reorthogonalise:
            q = previous[:, : i + 1]
            projection = torch.bmm(torch.bmm(q, r[:, :, None]).mT, q)[:, 0]
            r = torch.where(active[:, None], r - projection, r)  # a stopped replica's r is q's last row
        rr_new = r.square().sum(1)
        p = torch.where(active[:, None], torch.addcmul(r, (rr_new / torch.where(active, rr, one))[:, None], p), p)
        rr = rr_new
    return LinearSolution(x * scale, torch.where(bb > 0, rr / torch.where(bb > 0, bb, one), 0.0).sqrt())


def power_of_two(b: Tensor) -> Tensor:
    """Return the power of two (R, 1) below the largest entry of b (R, P) in size, 1 where that is 0 or not finite.

    Dividing by it rounds nothing, so a linear system solved for b / scale has the digits of the one for b. Exponents
    stay within those whose own inverse is a normal number.

    >>> power_of_two(torch.tensor([[3.0, -5.0], [0.0, 0.0], [0.3, 0.1]])).flatten()
    tensor([4.0000, 1.0000, 0.2500])
    """
    largest = b.abs().amax(1, keepdim=True)
    usable = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    exponent = usable.log2().floor().clamp(-120, 120)
    return torch.ldexp(torch.ones_like(largest), exponent.int())


# hypergradients


class BilevelProblem(NamedTuple):
    """The two losses of a bilevel problem, each a function of (lambda, theta) with one value a replica (R,)."""

    inner_loss: Callable[[Tensors, Tensors], Tensor]
    outer_loss: Callable[[Tensors, Tensors], Tensor]


class Hypergradient(NamedTuple):
    """A hypergradient.

    Attributes:
        value: dF/dlambda, tensors (R, ...) as lambda.
        adjoint: z, tensors (R, ...) as theta, or the coefficients of the adjoint function.
        residual: the linear solver's relative residual (R,).
    """

    value: Tensors
    adjoint: Tensors
    residual: Tensor


def outer_gradients(problem: BilevelProblem, lam: Tensors, theta: Tensors) -> tuple[Tensors, Tensors]:
    """Return the outer loss's partial gradients dL_out/dlambda and dL_out/dtheta at (lam, theta)."""
    gradients: tuple[Tensors, Tensors] = grad(lambda a, b: problem.outer_loss(a, b).sum(), argnums=(0, 1))(lam, theta)
    return gradients


def cross_derivative_product(
    loss: Callable[[Tensors, Tensors], Tensor], lam: Tensors, at: Tensors, z: Tensors
) -> Tensors:
    """Return (d2 loss / dlambda d at) z: the gradient in lambda of the directional derivative of the loss along z.

    Reverse over forward: the directional derivative is one number a replica, so no second-order graph is made.
    """
    product: Tensors = grad(lambda a: jvp(lambda b: loss(a, b), (at,), (z,))[1].sum())(lam)
    return product


def aid_hypergradient(
    problem: BilevelProblem,
    lam: Tensors,
    theta: Tensors,
    iterations: int,
    damping: float = 0.0,
    curvature: Callable[[Tensors], Tensors] | None = None,
    z0: Tensors | None = None,
) -> Hypergradient:
    """Return the hypergradient by approximate implicit differentiation (AID, arXiv 1602.02355).

    z solves (H + damping I) z = dL_out/dtheta by conjugate gradient.

    Args:
        problem: the losses.
        lam: outer variables.
        theta: the inner solution, as good as it is.
        iterations: of conjugate gradient.
        damping: added to H's diagonal.
        curvature: v to H v; none is the inner Hessian, which far from the solution need not be positive.
        z0: first guess of z.

    With L_in = (theta - lambda)^2 and L_out = theta^2 the inner solution is lambda, and dF/dlambda = 2 lambda:

    >>> problem = BilevelProblem(
    ...     lambda a, p: (p["theta"] - a["lam"]).square().sum(1), lambda a, p: p["theta"].square().sum(1)
    ... )
    >>> lam = torch.tensor([[3.0]])
    >>> aid_hypergradient(problem, {"lam": lam}, {"theta": lam}, iterations=1).value["lam"]
    tensor([[6.]])
    """
    partial, b = outer_gradients(problem, lam, theta)
    product = curvature or hessian_operator(lambda p: problem.inner_loss(lam, p), theta)
    solved = conjugate_gradient(
        lambda p: flatten(product(unflatten(p, theta))),
        flatten(b),
        iterations,
        damping,
        None if z0 is None else flatten(z0),
    )
    z = unflatten(solved.x, theta)
    cross = cross_derivative_product(problem.inner_loss, lam, theta, z)
    return Hypergradient({k: x - cross[k] for k, x in partial.items()}, z, solved.residual)


class UnrolledHypergradient(NamedTuple):
    """A hypergradient by unrolling.

    Attributes:
        value: dF_k/dlambda of F_k = L_out after k steps, tensors (R, ...) as lambda.
        theta: the inner variables after the steps.
        state: the optimiser's state after them.
    """

    value: Tensors
    theta: Tensors
    state: Any


def unrolled_hypergradient(
    problem: BilevelProblem, lam: Tensors, theta: Tensors, steps: int, optimizer: Optimizer, state: Any = None
) -> UnrolledHypergradient:
    """Return the hypergradient by unrolling: through ``steps`` inner steps that start from a constant theta.

    Reverse mode (arXiv 1703.01785); from an inner solution the error falls geometrically with ``steps``.

    Args:
        problem: the losses.
        lam: outer variables.
        theta: inner variables before the steps.
        steps: inner steps differentiated through.
        optimizer: the inner rule.
        state: its state before the steps, constant too; none is that before a first step.
    """
    initial_state = optimizer.init(theta) if state is None else state

    def run(a: Tensors) -> tuple[Tensor, tuple[Tensors, Any]]:
        p, s = theta, initial_state
        for _ in range(steps):
            p, s = optimizer.step(p, gradient(lambda q: problem.inner_loss(a, q), p), s)
        return problem.outer_loss(a, p).sum(), (p, s)

    value, (after, state) = grad(run, has_aux=True)(lam)
    return UnrolledHypergradient(value, after, state)


def finite_differences(
    problem: BilevelProblem,
    lam: Tensors,
    solve: Callable[[Tensors], Tensors],
    step: float = 1e-5,
    entries: Sequence[int] | None = None,
) -> Tensor:
    """Return central differences of F, the inner problem solved again on either side: (R, number of entries).

    Every replica is perturbed at once, since none sees another.

    Args:
        problem: the losses.
        lam: outer variables.
        solve: lambda to the inner solution.
        step: half the distance between the two evaluations of F.
        entries: which of lambda's flat entries; none is all.
    """
    flat = flatten(lam)
    columns = []
    for i in range(flat.shape[1]) if entries is None else entries:
        perturbation = torch.zeros_like(flat)
        perturbation[:, i] = step
        perturbed = [unflatten(flat + sign * perturbation, lam) for sign in (1, -1)]
        plus, minus = (problem.outer_loss(x, solve(x)) for x in perturbed)
        columns.append((plus - minus) / (2 * step))
    return torch.stack(columns, dim=1)


def functional_hypergradient(
    problem: BilevelProblem,
    lam: Tensors,
    inner_values: Tensor,
    outer_values: Tensor,
    basis: Callable[[Tensors], tuple[Tensor, Tensor]],
    like: Tensors,
    iterations: int,
    ridge: float = 0.0,
) -> Hypergradient:
    """Return the hypergradient in function space (arXiv 2403.20233), the adjoint a linear combination of a basis.

    The losses are functions of the predictor's values, not of its parameters: ``problem.inner_loss(lambda, {"h": h})``,
    h (R, ...), at the inner points, ``problem.outer_loss`` at the outer ones. The adjoint a minimises

        1/2 <a, C a>_inner points + <g, a>_outer points + ridge/2 |c|^2,   C = d2 L_in / dh2,  g = dL_out / dh

    over its coefficients c, and dF/dlambda = dL_out/dlambda + (d2 L_in / dlambda dh) a: note the plus. With the
    Jacobian of a network for its basis this is AID with the Gauss-Newton matrix.

    Args:
        problem: the losses, in values.
        lam: outer variables.
        inner_values: h at the inner points (R, ...).
        outer_values: h at the outer points (R, ...).
        basis: coefficients to a at the inner and at the outer points; linear.
        like: tensors with the coefficients' shapes.
        iterations: of conjugate gradient.
        ridge: weight of the coefficients' size. Without it the objective is unbounded below as soon as the basis can
            vary at outer points while it is zero at all inner ones.
    """
    h_in, h_out = {"h": inner_values}, {"h": outer_values}
    partial, g = outer_gradients(problem, lam, h_out)
    linearised: tuple[Any, ...] = vjp(basis, zeros_like(like))
    (zero_in, zero_out), basis_vjp = linearised
    value_hessian = hessian_operator(lambda h: problem.inner_loss(lam, h), h_in)

    def product(flat: Tensor) -> Tensor:
        a = basis(unflatten(flat, like))[0]
        return flatten(basis_vjp((value_hessian({"h": a})["h"], torch.zeros_like(zero_out)))[0])

    b = -flatten(basis_vjp((torch.zeros_like(zero_in), g["h"]))[0])
    solved = conjugate_gradient(product, b, iterations, ridge)
    coefficients = unflatten(solved.x, like)
    cross = cross_derivative_product(problem.inner_loss, lam, h_in, {"h": basis(coefficients)[0]})
    return Hypergradient({k: x + cross[k] for k, x in partial.items()}, coefficients, solved.residual)
