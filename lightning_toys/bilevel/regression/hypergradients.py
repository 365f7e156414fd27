"""The window's inner and outer problem, and the hypergradients of its weights, for R replicas at once.

    L_in(lambda, h) = sum_s lambda_s (1/B) sum_i |h(x_i) - y_s(x_i)|^2         over the inner points, lags s = 1..W
    L_out(h)        = (1/(B' d)) sum_j |h(x_j) - y_t(x_j)|^2                   over the outer points, now

With L = sum_s lambda_s and ybar = sum_s lambda_s y_s / L the inner loss is L (1/B) sum_i |h - ybar|^2 and a constant in
h: B rows in place of W B. Every hypergradient has the form (functional bilevel optimisation, arXiv 2403.20233)

    v_s = dL_out / dlambda_s = (2/B) sum_i <h - y_s, a>(x_i)

with an adjoint function a. In function space a minimises

    L (1/B) sum_i |a|^2(x_i) + (1/B') sum_j <a, g>(x_j),   g = 2 (h - y_t) / d,

over a space of functions. AID's is a = -J z, unrolling's the sum over steps of J q. (The sign is a plus: finite
differences show that the code published with the paper has it reversed.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_toys.bilevel.implicit import conjugate_gradient
from lightning_toys.bilevel.inner_optimizers import AdamState, adam_step
from lightning_toys.bilevel.regression.mlp import MLP, ForwardPass


class Window(NamedTuple):
    """The data of one step t.

    Attributes:
        inner_points: x of the inner problem (R, B, p).
        outer_points: x of the outer problem (R, B', p).
        past_y: y at the inner points and times t - W .. t - 1, oldest first (R, W, B, d).
        current_y: y at the outer points and time t (R, B', d).
    """

    inner_points: Tensor
    outer_points: Tensor
    past_y: Tensor
    current_y: Tensor


class WeightedTargets(NamedTuple):
    """The inner problem's one target in place of W.

    Attributes:
        total: L (R,).
        mean: ybar (R, B, d).
    """

    total: Tensor
    mean: Tensor

    @property
    def curvature(self) -> Tensor:
        """2 L / B (R, 1, 1), the inner loss's second derivative in a value of h."""
        return (2 / self.mean.shape[1]) * self.total[:, None, None]


def safe_inverse(total: Tensor) -> Tensor:
    """Return 1 / L (R,), and 0 where L is 0."""
    positive = total > 0
    return torch.where(positive, 1 / torch.where(positive, total, torch.ones_like(total)), torch.zeros_like(total))


def weighted_targets(lam: Tensor, past_y: Tensor) -> WeightedTargets:
    """Return L and ybar; ybar is 0 where L is.

    Args:
        lam: lambda (R, W), lag 1 first.
        past_y: oldest first (R, W, B, d).
    """
    R, W, B, d = past_y.shape
    total = lam.sum(1)
    weighted_sum = torch.bmm(lam.flip(1).unsqueeze(1), past_y.reshape(R, W, B * d)).view(R, B, d)
    return WeightedTargets(total, weighted_sum * safe_inverse(total)[:, None, None])


def inner_value_gradient(inner: ForwardPass, targets: WeightedTargets) -> Tensor:
    """Return the gradient (R, B, d) of L (1/B) sum_i |h - ybar|^2 in h's values."""
    return targets.curvature * (inner.h - targets.mean)


def outer_loss(h: Tensor, current_y: Tensor) -> Tensor:
    """Return mean (h - y_t)^2 (R,)."""
    return (h - current_y).square().mean((1, 2))


def outer_value_gradient(h: Tensor, current_y: Tensor) -> Tensor:
    """Return g = 2 (h - y_t) / d (R, B', d): the gradient of the outer loss in h's values, times B'."""
    return 2 * (h - current_y) / h.shape[-1]


def hypergradient_of_adjoint(past_y: Tensor, a: Tensor, ha: Tensor) -> Tensor:
    """Return v_s = (2/B) (sum_i <h, a>(x_i) - sum_i <y_s, a>(x_i)), lag 1 first: (R, W).

    Args:
        past_y: y_s at the inner points, oldest first (R, W, B, d).
        a: the adjoint function at the same points (R, B, d).
        ha: sum_i <h, a>(x_i) (R,).
    """
    R, W, B, d = past_y.shape
    products = torch.bmm(past_y.reshape(R, W, B * d), a.reshape(R, B * d, 1))[..., 0].flip(1)
    return (2 / B) * (ha[:, None] - products)


def hypergradient_at(h: Tensor, past_y: Tensor, a: Tensor) -> Tensor:
    """Return :func:`hypergradient_of_adjoint` where <h, a> is that of one h (R, B, d)."""
    return hypergradient_of_adjoint(past_y, a, (h * a).sum((1, 2)))


class Hypergradient(NamedTuple):
    """A hypergradient.

    Attributes:
        value: v = dL_out / dlambda (R, W), lag 1 first.
        adjoint: a at the inner points (R, B, d).
        residual: the linear solver's relative residual (R,); 0 where there is none.
    """

    value: Tensor
    adjoint: Tensor
    residual: Tensor


def outer_parameter_gradient(net: MLP, theta: Tensor, window: Window) -> Tensor:
    """Return dL_out/dtheta (R, P) at theta (R, P)."""
    outer = net.forward_pass(theta, window.outer_points, second_order=False)
    return outer.vjp(outer_value_gradient(outer.h, window.current_y) / window.current_y.shape[1])


def aid_hypergradient(
    net: MLP, theta: Tensor, lam: Tensor, window: Window, iterations: int, damping: float, gauss_newton: bool = False
) -> Hypergradient:
    """Return the hypergradient by approximate implicit differentiation (arXiv 1602.02355), a = -J z.

    (H + damping) z = dL_out/dtheta is solved by conjugate gradient, H the inner Hessian or its Gauss-Newton part.

    Args:
        net: h.
        theta: its parameters (R, P).
        lam: lambda (R, W), lag 1 first.
        window: the data.
        iterations: of conjugate gradient.
        damping: added to H's diagonal.
        gauss_newton: whether H is the Gauss-Newton part.
    """
    targets = weighted_targets(lam, window.past_y)
    inner = net.forward_pass(theta, window.inner_points, second_order=not gauss_newton)
    deltas, curvature = inner.backward(inner_value_gradient(inner, targets)), targets.curvature

    def matvec(v: Tensor) -> Tensor:
        if gauss_newton:
            return inner.gauss_newton_product(v, curvature)
        return inner.hessian_product(v, deltas, curvature)[0]

    solved = conjugate_gradient(matvec, outer_parameter_gradient(net, theta, window), iterations, damping)
    a = -inner.jvp(solved.x)
    return Hypergradient(hypergradient_at(inner.h, window.past_y, a), a, solved.residual)


def ridge_adjoint(
    features_in: Tensor, features_out: Tensor, value_gradient: Tensor, total: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return the adjoint linear in features: coefficients c (R, k, d), and values at the inner points (R, B, d).

    a = Phi c minimises L ((1/B) |Phi_in c|^2 + ridge s |c|^2) + (1/B') <Phi_out c, g>, s the features' mean square:

        2 L (Phi_in' Phi_in / B + ridge s I) c = -Phi_out' g / B'.

    Without the ridge the objective has no minimum where features that are zero at all inner points are not at outer
    ones. c is zero where L is, and NaN of a replica whose features overflow.

    Args:
        features_in: Phi at the inner points (R, B, k).
        features_out: Phi at the outer points (R, B', k).
        value_gradient: g (R, B', d).
        total: L (R,).
        ridge: > 0.
    """
    B, k = features_in.shape[1:]
    gram = features_in.mT @ features_in / B
    mean_square = torch.diagonal(gram, dim1=1, dim2=2).mean(1)
    gram = gram + (ridge * mean_square)[:, None, None] * torch.eye(k, dtype=gram.dtype, device=gram.device)
    rhs = features_out.mT @ value_gradient * (-0.5 / value_gradient.shape[1])
    # where features are so large that their products overflow there is no factor; the run then says which replica's
    factor, fault = torch.linalg.cholesky_ex(gram)
    c = torch.cholesky_solve(rhs, factor) * safe_inverse(total)[:, None, None]
    c = torch.where((fault == 0)[:, None, None], c, torch.nan)
    return c, features_in @ c


def ridge_hypergradient(net: MLP, theta: Tensor, lam: Tensor, window: Window, ridge: float) -> Hypergradient:
    """Return the functional hypergradient (arXiv 2403.20233) with an adjoint linear in h's last hidden layer and 1.

    Args:
        net: h.
        theta: its parameters (R, P).
        lam: lambda (R, W), lag 1 first.
        window: the data.
        ridge: see :func:`ridge_adjoint`.
    """
    inner = net.forward_pass(theta, window.inner_points, second_order=False)
    outer = net.forward_pass(theta, window.outer_points, second_order=False)
    features_in, features_out = (torch.nn.functional.pad(p.features, (0, 1), value=1.0) for p in (inner, outer))
    a = ridge_adjoint(features_in, features_out, outer_value_gradient(outer.h, window.current_y), lam.sum(1), ridge)[1]
    return Hypergradient(hypergradient_at(inner.h, window.past_y, a), a, torch.zeros_like(lam[:, 0]))


def adjoint_objective(a_in: Tensor, a_out: Tensor, value_gradient: Tensor) -> Tensor:
    """Return mean_in |a|^2 + mean_out <a, g> (R,), which L times the adjoint function minimises, for any L.

    Args:
        a_in: at the inner points (R, B, d).
        a_out: at the outer points (R, B', d).
        value_gradient: g (R, B', d).
    """
    return a_in.square().sum(-1).mean(-1) + (a_out * value_gradient).sum(-1).mean(-1)


class AdjointNetwork(NamedTuple):
    """An adjoint network.

    Attributes:
        psi: its parameters (R, P).
        state: Adam's state, under the name ``"psi"``.
    """

    psi: Tensor
    state: AdamState


def network_hypergradient(
    net: MLP, theta: Tensor, lam: Tensor, window: Window, adjoint: AdjointNetwork, steps: int, lr: float
) -> tuple[Hypergradient, AdjointNetwork]:
    """Return the functional hypergradient (arXiv 2403.20233) with a network of h's shape for adjoint, and the network.

    A flexible network makes its objective on separate finite samples as small as it likes. So ``steps`` steps of Adam
    see three quarters of the points, and of the parameters on the way, the first ones included, those with the lowest
    objective on the other quarter are returned. The network is L a, which does not depend on lambda.

    Args:
        net: h, and the shape of the adjoint network.
        theta: h's parameters (R, P).
        lam: lambda (R, W), lag 1 first.
        window: the data.
        adjoint: the network of the step before.
        steps: of Adam.
        lr: Adam's learning rate.
    """
    inner = net.forward_pass(theta, window.inner_points, second_order=False)
    outer = net.forward_pass(theta, window.outer_points, second_order=False)
    g = outer_value_gradient(outer.h, window.current_y)
    n, m = window.inner_points.shape[1] * 3 // 4, window.outer_points.shape[1] * 3 // 4

    def validation_objective(psi: Tensor) -> Tensor:
        return adjoint_objective(net(psi, window.inner_points[:, n:]), net(psi, window.outer_points[:, m:]), g[:, m:])

    psi, state = adjoint
    best, lowest = psi, validation_objective(psi)
    for _ in range(steps):
        train_in = net.forward_pass(psi, window.inner_points[:, :n], second_order=False)
        train_out = net.forward_pass(psi, window.outer_points[:, :m], second_order=False)
        gradient = train_in.vjp((2 / n) * train_in.h) + train_out.vjp(g[:, :m] / m)
        stepped, state = adam_step({"psi": psi}, {"psi": gradient}, state, lr)
        psi = stepped["psi"]
        score = validation_objective(psi)
        best = torch.where((score < lowest)[:, None], psi, best)
        lowest = torch.minimum(score, lowest)
    a = net(best, window.inner_points) * safe_inverse(lam.sum(1))[:, None, None]
    found = Hypergradient(hypergradient_at(inner.h, window.past_y, a), a, torch.zeros_like(lowest))
    return found, AdjointNetwork(best, state)


class AdamMoments(NamedTuple):
    """Adam's state of theta.

    Attributes:
        exp_avg: running mean of the gradient (R, P).
        exp_avg_sq: running mean of its square (R, P).
        step: steps taken.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


class UnrolledHypergradient(NamedTuple):
    """A hypergradient by unrolling.

    Attributes:
        value: v (R, W), lag 1 first.
        adjoint: a at the inner points (R, B, d).
        theta: after the steps (R, P).
        moments: Adam's state after the steps.
    """

    value: Tensor
    adjoint: Tensor
    theta: Tensor
    moments: AdamMoments


class AdamStepRecord(NamedTuple):
    """What the backward pass through one step of Adam needs.

    Attributes:
        inner: forward pass at the inner points.
        value_gradient: the inner loss's gradient in h's values (R, B, d).
        gradient: its gradient in theta (R, P).
        exp_avg: running mean after the step (R, P).
        denominator: sqrt(v + eps^2) of the step, v corrected (R, P).
        rates: learning rate over the first moment's correction, and the second moment's correction.
    """

    inner: ForwardPass
    value_gradient: Tensor
    gradient: Tensor
    exp_avg: Tensor
    denominator: Tensor
    rates: tuple[float, float]


def unrolled_hypergradient(
    net: MLP,
    theta: Tensor,
    moments: AdamMoments,
    lam: Tensor,
    window: Window,
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> UnrolledHypergradient:
    """Take ``steps`` steps of Adam on the inner loss and differentiate the outer loss through them (arXiv 1703.01785).

    What comes before, theta and Adam's running means, is held constant: with one step this is "unroll1". Adam is
    :func:`lightning_toys.bilevel.inner_optimizers.adam_step`. In the backward pass a step whose gradient has the
    adjoint q adds H q to theta's adjoint and J q to the adjoint function, of which v is made as everywhere else.

    Args:
        net: h.
        theta: its parameters before the steps (R, P).
        moments: Adam's state before them.
        lam: lambda (R, W), lag 1 first.
        window: the data.
        steps: steps taken.
        lr: Adam's learning rate.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
    """
    targets = weighted_targets(lam, window.past_y)
    (beta1, beta2), (exp_avg, exp_avg_sq, step) = betas, moments
    records: list[AdamStepRecord] = []
    for _ in range(steps):
        inner = net.forward_pass(theta, window.inner_points)
        value_gradient = inner_value_gradient(inner, targets)
        gradient = inner.vjp(value_gradient)
        step += 1
        exp_avg = torch.lerp(exp_avg, gradient, 1 - beta1)
        exp_avg_sq = (beta2 * exp_avg_sq).addcmul_(gradient, gradient, value=1 - beta2)
        rates = (lr / (1 - beta1**step), 1 - beta2**step)
        denominator = (exp_avg_sq / rates[1] + eps**2).sqrt_()
        records.append(AdamStepRecord(inner, value_gradient, gradient, exp_avg, denominator, rates))
        theta = torch.addcdiv(theta, exp_avg, denominator, value=-rates[0])
    after = AdamMoments(exp_avg, exp_avg_sq, step)
    q_theta = outer_parameter_gradient(net, theta, window)
    q_exp_avg, q_exp_avg_sq = torch.zeros_like(theta), torch.zeros_like(theta)
    a, ha = torch.zeros_like(targets.mean), torch.zeros_like(targets.total)
    for record in reversed(records):
        rate, correction = record.rates
        q_exp_avg = q_exp_avg - rate * q_theta / record.denominator
        q_exp_avg_sq = q_exp_avg_sq + (0.5 * rate / correction) * q_theta * record.exp_avg / record.denominator**3
        q = (1 - beta1) * q_exp_avg + (2 * (1 - beta2)) * record.gradient * q_exp_avg_sq
        hv, jv = record.inner.hessian_product(q, record.inner.backward(record.value_gradient), targets.curvature)
        a, ha = a + jv, ha + (record.inner.h * jv).sum((1, 2))
        q_theta = q_theta + hv
        q_exp_avg, q_exp_avg_sq = beta1 * q_exp_avg, beta2 * q_exp_avg_sq
    return UnrolledHypergradient(hypergradient_of_adjoint(window.past_y, a, ha), a, theta, after)


def logit_gradient(v: Tensor, lam: Tensor) -> Tensor:
    """Return the gradient (R, W) in the logits of lambda = L softmax(logits), given v (R, W), that in lambda."""
    mean = (lam * v).sum(1, keepdim=True) / lam.sum(1, keepdim=True)
    return lam * (v - mean)
