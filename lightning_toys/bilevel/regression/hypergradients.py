"""The window's inner and outer problem, and what moves its weights, for R replicas at once.

    L_in(lambda, h) = sum_s lambda_s (1/B) sum_i |h(x_i) - y_s(x_i)|^2         over the inner points, lags s = 1..W
    L_out(h)        = (1/(B' d)) sum_j |h(x_j) - y_t(x_j)|^2                   over the outer points, now

With L = sum_s lambda_s and ybar = sum_s lambda_s y_s / L the inner loss is L (1/B) sum_i |h - ybar|^2 and a constant in
h: B rows in place of W B. Every hypergradient has the form (functional bilevel optimisation, arXiv 2403.20233)

    v_s = dL_out / dlambda_s = (2/B) sum_i <h - y_s, a>(x_i)

with an adjoint function a. It minimises L (1/B) sum_i |a|^2(x_i) + (1/B') sum_j <a, g>(x_j), g = 2 (h - y_t) / d,
over a space of functions. AID's is a = -J z, unrolling's the sum over steps of J q. (The sign is a plus; that the code
published with the paper has it reversed shows against finite differences.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_toys.bilevel.implicit import conjugate_gradient
from lightning_toys.bilevel.inner_optimizers import AdamState, adam_step
from lightning_toys.bilevel.regression.mlp import MLP, Pass


class Window(NamedTuple):
    """What one step is given.

    Attributes:
        inside: inner points (R, B, p).
        outside: outer points (R, B', p).
        past: y at the inner points, oldest first (R, W, B, d).
        now: y at the outer points (R, B', d).
    """

    inside: Tensor
    outside: Tensor
    past: Tensor
    now: Tensor


class Collapsed(NamedTuple):
    """L (R,) and ybar (R, B, d)."""

    total: Tensor
    mean: Tensor

    @property
    def weight(self) -> Tensor:
        """2 L / B (R, 1, 1), the inner loss's second derivative in a value of h."""
        return (2 / self.mean.shape[1]) * self.total[:, None, None]


def inverse(total: Tensor) -> Tensor:
    """Return 1 / L, and 0 where L is 0."""
    some = total > 0
    return torch.where(some, 1 / torch.where(some, total, torch.ones_like(total)), torch.zeros_like(total))


def collapse(lam: Tensor, past: Tensor) -> Collapsed:
    """Return L and ybar of weights (R, W), lag 1 first; ybar is 0 where L is."""
    R, W, B, d = past.shape
    total = lam.sum(1)
    mixed = torch.bmm(lam.flip(1).unsqueeze(1), past.reshape(R, W, B * d)).view(R, B, d)
    return Collapsed(total, mixed * inverse(total)[:, None, None])


def inner_slope(here: Pass, to: Collapsed) -> Tensor:
    """Return the slope (R, B, d) of L (1/B) sum_i |h - ybar|^2 in h's values."""
    return to.weight * (here.h - to.mean)


def outer_loss(h: Tensor, now: Tensor) -> Tensor:
    """Return mean (h - y_t)^2 (R,)."""
    return (h - now).square().mean((1, 2))


def outer_slope(h: Tensor, now: Tensor) -> Tensor:
    """Return g = 2 (h - y_t) / d (R, B', d): the slope of the outer loss in h's values, times B'."""
    return 2 * (h - now) / h.shape[-1]


def weigh(past: Tensor, a: Tensor, ha: Tensor) -> Tensor:
    """Return v_s = (2/B) (sum_i <h, a>(x_i) - sum_i <y_s, a>(x_i)), lag 1 first: (R, W).

    Args:
        past: y_s at the inner points, oldest first (R, W, B, d).
        a: the adjoint function there (R, B, d).
        ha: sum_i <h, a>(x_i) (R,).
    """
    R, W, B, d = past.shape
    along = torch.bmm(past.reshape(R, W, B * d), a.reshape(R, B * d, 1))[..., 0].flip(1)
    return (2 / B) * (ha[:, None] - along)


def weigh_at(h: Tensor, past: Tensor, a: Tensor) -> Tensor:
    """Return :func:`weigh` for one h (R, B, d)."""
    return weigh(past, a, (h * a).sum((1, 2)))


class Found(NamedTuple):
    """v (R, W), the adjoint at the inner points (R, B, d), and the linear solver's relative residual (R,)."""

    value: Tensor
    adjoint: Tensor
    residual: Tensor


def outer_gradient(net: MLP, theta: Tensor, window: Window) -> Tensor:
    """Return dL_out/dtheta (R, P)."""
    there = net.at(theta, window.outside, curved=False)
    return there.pull(outer_slope(there.h, window.now) / window.now.shape[1])


def by_aid(
    net: MLP, theta: Tensor, lam: Tensor, window: Window, iterations: int, damping: float, gauss_newton: bool = False
) -> Found:
    """(H + damping) z = dL_out/dtheta by conjugate gradient, H the inner Hessian or its Gauss-Newton part; a = -J z."""
    to, here = collapse(lam, window.past), net.at(theta, window.inside, not gauss_newton)
    deltas, weight = here.back(inner_slope(here, to)), to.weight

    def product(v: Tensor) -> Tensor:
        return here.gauss_newton(v, weight) if gauss_newton else here.hessian(v, deltas, weight)[0]

    solved = conjugate_gradient(product, outer_gradient(net, theta, window), iterations, damping)
    a = -here.push(solved.x)
    return Found(weigh_at(here.h, window.past, a), a, solved.residual)


def ridge_adjoint(
    features_in: Tensor, features_out: Tensor, slope: Tensor, total: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return the adjoint that is linear in features, exactly: its coefficients (R, k, d), its inner values (R, B, d).

    a = Phi c minimises L ((1/B) |Phi_in c|^2 + ridge s |c|^2) + (1/B') <Phi_out c, g>, s the features' mean square:

        2 L (Phi_in' Phi_in / B + ridge s I) c = -Phi_out' g / B'.

    Without the ridge the objective has no minimum where features that are zero at all inner points are not at outer
    ones. c is zero where L is.

    Args:
        features_in: Phi at the inner points (R, B, k).
        features_out: Phi at the outer points (R, B', k).
        slope: g (R, B', d).
        total: L (R,).
        ridge: > 0.
    """
    B, k = features_in.shape[1:]
    gram = features_in.mT @ features_in / B
    size = torch.diagonal(gram, dim1=1, dim2=2).mean(1)
    gram = gram + (ridge * size)[:, None, None] * torch.eye(k, dtype=gram.dtype, device=gram.device)
    right = features_out.mT @ slope * (-0.5 / slope.shape[1])
    c = torch.cholesky_solve(right, torch.linalg.cholesky(gram)) * inverse(total)[:, None, None]
    return c, features_in @ c


def by_ridge(net: MLP, theta: Tensor, lam: Tensor, window: Window, ridge: float) -> Found:
    """The functional hypergradient with an adjoint linear in the last hidden layer and a constant."""
    here, there = net.at(theta, window.inside, False), net.at(theta, window.outside, False)
    inside, outside = (torch.nn.functional.pad(p.features, (0, 1), value=1.0) for p in (here, there))
    a = ridge_adjoint(inside, outside, outer_slope(there.h, window.now), lam.sum(1), ridge)[1]
    return Found(weigh_at(here.h, window.past, a), a, torch.zeros_like(lam[:, 0]))


def adjoint_objective(a_in: Tensor, a_out: Tensor, slope: Tensor) -> Tensor:
    """Return mean_in |a|^2 + mean_out <a, g> (R,): what L times the adjoint function minimises, whatever L."""
    return a_in.square().sum(-1).mean(-1) + (a_out * slope).sum(-1).mean(-1)


class AdjointNetwork(NamedTuple):
    """An adjoint function's parameters psi (R, P), and Adam's state (under the name "psi")."""

    psi: Tensor
    state: AdamState


def by_network(
    net: MLP, theta: Tensor, lam: Tensor, window: Window, adjoint: AdjointNetwork, steps: int, lr: float
) -> tuple[Found, AdjointNetwork]:
    """The functional hypergradient with an adjoint network of h's own shape, which goes on from where it was.

    A flexible network makes its objective on separate finite samples as small as it likes. So ``steps`` steps of Adam
    see three quarters of the points, and of the parameters on the way, the first ones included, those are taken whose
    objective on the other quarter is least. The network is L a, which does not depend on lambda.
    """
    here, there = net.at(theta, window.inside, False), net.at(theta, window.outside, False)
    g = outer_slope(there.h, window.now)
    n, m = window.inside.shape[1] * 3 // 4, window.outside.shape[1] * 3 // 4

    def judged(psi: Tensor) -> Tensor:
        return adjoint_objective(net(psi, window.inside[:, n:]), net(psi, window.outside[:, m:]), g[:, m:])

    psi, state = adjoint
    best, least = psi, judged(psi)
    for _ in range(steps):
        inside, outside = net.at(psi, window.inside[:, :n], False), net.at(psi, window.outside[:, :m], False)
        slope = inside.pull((2 / n) * inside.h) + outside.pull(g[:, :m] / m)
        moved, state = adam_step({"psi": psi}, {"psi": slope}, state, lr)
        psi = moved["psi"]
        score = judged(psi)
        best = torch.where((score < least)[:, None], psi, best)
        least = torch.minimum(score, least)
    a = net(best, window.inside) * inverse(lam.sum(1))[:, None, None]
    return Found(weigh_at(here.h, window.past, a), a, torch.zeros_like(least)), AdjointNetwork(best, state)


class Moments(NamedTuple):
    """Adam's running means of the gradient and its square (R, P), and the steps taken."""

    mean: Tensor
    square: Tensor
    step: int


class Unrolling(NamedTuple):
    """v (R, W), the adjoint at the inner points (R, B, d), and theta (R, P) and Adam's state after the steps."""

    value: Tensor
    adjoint: Tensor
    theta: Tensor
    moments: Moments


class Trace(NamedTuple):
    """What the way back through one step of Adam needs."""

    here: Pass
    slope: Tensor
    gradient: Tensor
    mean: Tensor
    root: Tensor
    rates: tuple[float, float]


def by_unrolling(
    net: MLP,
    theta: Tensor,
    moments: Moments,
    lam: Tensor,
    window: Window,
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Unrolling:
    """Take ``steps`` steps of Adam on the inner loss and differentiate the outer loss through them.

    What comes before, theta and Adam's running means, is held constant: with one step this is "unroll1". Adam is
    :func:`lightning_toys.bilevel.inner_optimizers.adam_step`. On the way back a step whose gradient has the adjoint q
    adds H q to theta's, and J q to the adjoint function's, of which v is made as everywhere else.
    """
    to = collapse(lam, window.past)
    (first, second), (mean, square, count) = betas, moments
    traces: list[Trace] = []
    for _ in range(steps):
        here = net.at(theta, window.inside)
        slope = inner_slope(here, to)
        gradient = here.pull(slope)
        count += 1
        mean = torch.lerp(mean, gradient, 1 - first)
        square = (second * square).addcmul_(gradient, gradient, value=1 - second)
        rates = (lr / (1 - first**count), 1 - second**count)
        root = (square / rates[1] + eps**2).sqrt_()
        traces.append(Trace(here, slope, gradient, mean, root, rates))
        theta = torch.addcdiv(theta, mean, root, value=-rates[0])
    after = Moments(mean, square, count)
    q_theta = outer_gradient(net, theta, window)
    q_mean, q_square = torch.zeros_like(theta), torch.zeros_like(theta)
    a, ha = torch.zeros_like(to.mean), torch.zeros_like(to.total)
    for trace in reversed(traces):
        rate, correction = trace.rates
        q_mean = q_mean - rate * q_theta / trace.root
        q_square = q_square + (0.5 * rate / correction) * q_theta * trace.mean / trace.root**3
        q = (1 - first) * q_mean + (2 * (1 - second)) * trace.gradient * q_square
        curved, pushed = trace.here.hessian(q, trace.here.back(trace.slope), to.weight)
        a, ha = a + pushed, ha + (trace.here.h * pushed).sum((1, 2))
        q_theta = q_theta + curved
        q_mean, q_square = first * q_mean, second * q_square
    return Unrolling(weigh(window.past, a, ha), a, theta, after)


def to_logits(v: Tensor, lam: Tensor) -> Tensor:
    """Return the gradient (R, W) in the logits of lambda = L softmax(logits), from that in lambda."""
    mean = (lam * v).sum(1, keepdim=True) / lam.sum(1, keepdim=True)
    return lam * (v - mean)
