"""Rewards as functions of clean actions, for problems in which q is no Gaussian: quadratic, quartic, a step, any."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import LARGEST, ToyError, bounded, require
from lightning_toys.mirror_descent.energy import grad_without_autocast
from lightning_toys.mirror_descent.joint import NoiseLevel
from lightning_toys.mirror_descent.joint_distribution import ActionFunction
from lightning_toys.mirror_descent.tilt import Quadratic, QuadraticForm, Reward

SPACING = 0.22  # of the trapezoidal rule's nodes, in standard deviations, where the reward is flat
HALF_WIDTH = 7.0  # standard deviations that its nodes cover at first
MAX_NODES = 2049
TOLERANCE = 1e-4  # of the logarithm between a rule and every other of its nodes, beyond which it is made finer
TAIL = 22.0  # nats by which the integrand has to have fallen at the ends
UNRESOLVED = 0.05  # error of the logarithm that is refused, where more than RARE of the points have it
RARE = 0.01


class RewardFunction(ActionFunction):
    """beta Q of a reward of any form; gradients are autograd's, and 0 where Q has none.

    Args:
        reward: gives Q.
        beta: its factor.
    """

    def __init__(self, reward: Reward, beta: float = 1.0) -> None:
        self.reward, self.beta = reward, beta

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.value`."""
        return self.beta * self.reward.value(a)

    def gradient(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.gradient`."""
        with grad_without_autocast(a.device.type):
            inputs = a.detach().requires_grad_(True)
            total = self.reward.value(inputs).sum()
            if not total.requires_grad:
                return torch.zeros_like(a)
            (out,) = torch.autograd.grad(total, inputs, allow_unused=True)
        return torch.zeros_like(a) if out is None else self.beta * out

    def scaled(self, beta: float) -> RewardFunction:
        """See :meth:`ActionFunction.scaled`."""
        return RewardFunction(self.reward, beta * self.beta)

    def smoothed(self, scale: float, variance: float, beta: float) -> ActionFunction:
        """See :meth:`ActionFunction.smoothed`; of several actions it is not known."""
        if variance <= 0 or scale == 0:
            return self.scaled(beta)
        return SmoothedReward(self.reward, self.beta * scale, math.sqrt(variance), beta / scale)


class SmoothedReward(ActionFunction):
    """factor log E exp(scale Q(a + std z)) of one action, by the reward's :meth:`log_mean_exp` or by quadrature.

    The derivative is E[exp(scale Q(a + std z)) z] / (std E exp(...)): Q need not have one.

    Args:
        reward: gives Q.
        scale: its factor within the exponential.
        std: standard deviation of the smoothing, above 0.
        factor: of the logarithm.
    """

    def __init__(self, reward: Reward, scale: float, std: float, factor: float) -> None:
        self.reward, self.scale, self.std, self.factor = reward, scale, std, factor

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.value`."""
        return self.factor * self.logarithm(a)[0]

    def gradient(self, a: Tensor) -> Tensor:
        """See :meth:`ActionFunction.gradient`."""
        return (self.factor * self.logarithm(a)[1]).unsqueeze(0)

    def logarithm(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return log E exp(scale Q(a + std z)) (...) at actions a (1, ...), and its derivative (...)."""
        if len(a) != 1:
            raise ToyError(
                f"--model.reward: {type(self.reward).__name__} is not allowed here with {len(a)} actions, a rule "
                "smooths it; give a quadratic reward, one action, or samplers without tfg"
            )
        found = self.reward.log_mean_exp(a[0], self.std, self.scale)
        return log_mean_exp(self.reward, a[0], self.std, self.scale) if found is None else found

    def scaled(self, beta: float) -> ActionFunction:
        """See :meth:`ActionFunction.scaled`."""
        return SmoothedReward(self.reward, self.scale, self.std, beta * self.factor)

    def smoothed(self, scale: float, variance: float, beta: float) -> ActionFunction:
        """See :meth:`ActionFunction.smoothed`: once is enough."""
        raise NotImplementedError


def log_mean_exp(reward: Reward, a: Tensor, std: float, scale: float) -> tuple[Tensor, Tensor]:
    """Return log E exp(scale Q(a + std z)) (...) at actions a (...), z standard normal, and its derivative in a.

    By the trapezoidal rule, which for smooth Q is exact to rounding once its nodes are close enough: their distance is
    that of the reward's ``curvature``, and is halved at points where every other node gives another result, and the
    range doubled where the integrand has not ended. At points so far off that it does not end within ``MAX_NODES`` the
    result is what those give. Mass beyond a gap of ``TAIL`` nats is not found.

    Raises:
        ToyError: more than a few points are not known to ``UNRESOLVED``.
    """
    flat = a.detach().double().flatten()
    value, grad = torch.empty_like(flat), torch.empty_like(flat)
    error = torch.zeros_like(flat)
    left = torch.arange(flat.numel(), device=flat.device)
    half, spacing = HALF_WIDTH, SPACING / math.sqrt(1 + std * std * abs(scale) * reward.curvature)
    spacing = max(spacing, 2 * half / (MAX_NODES - 1))
    while len(left):
        value[left], grad[left], error[left], end = trapezoidal(reward, flat[left], std, scale, half, spacing)
        cut = end > -TAIL
        error[left[cut]] = 0.0  # its range is too short: more nodes do not help
        rough = error[left] > TOLERANCE
        left = left[rough | cut]
        half, spacing = half * (2 if bool(cut.any()) else 1), spacing / (2 if bool(rough.any()) else 1)
        if 2 * half / spacing > MAX_NODES:
            break
    wrong = float((error > UNRESOLVED).double().mean()) if flat.numel() else 0.0
    require(
        wrong <= RARE,
        f"--model.reward: {type(reward).__name__} is not allowed here, its smoothing is not known to {UNRESOLVED:g} "
        f"with {MAX_NODES} nodes; give a weaker reward, a class with log_mean_exp, or samplers without tfg",
    )
    return value.view(a.shape).to(a), grad.view(a.shape).to(a)


def trapezoidal(
    reward: Reward, a: Tensor, std: float, scale: float, half: float, spacing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log E exp(scale Q(a + std z)) (n,) at actions a (n,) by one rule, and what is known of it.

    Returns:
        The logarithm, its derivative in a, how far it is from that of every other node, and the logarithm of the
        largest term at an end over the largest of all (n,).
    """
    k = math.ceil(half / (2 * spacing)) * 2
    nodes = spacing * np.arange(-k, k + 1)
    log_w = -0.5 * np.square(nodes) + math.log(spacing / math.sqrt(2 * math.pi))
    top, end = torch.full_like(a, -torch.inf), torch.full_like(a, -torch.inf)
    total, even, first = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
    for i, (z, w) in enumerate(zip(nodes.tolist(), log_w.tolist(), strict=True)):
        # a running maximum: nothing of size (nodes, n)
        exponent = scale * reward.value((a + std * z).unsqueeze(0)) + w
        higher = torch.maximum(top, exponent)
        old, new = (top - higher).exp(), (exponent - higher).exp()
        total, first, even, top = total * old + new, first * old + z * new, even * old, higher
        if i % 2 == 0:
            even = even + new
        if i in (0, 2 * k):
            end = torch.maximum(end, exponent)
    return top + total.log(), first / total / std, (total.log() - (2 * even).log()).abs(), end - top


class QuadraticReward(Reward):
    """Q(a) = -sum_i weights_i (a_i - optimum_i)^2 / 2, of an action with as many coordinates.

    Args:
        weights: one for each coordinate, not below 0.
        optimum: the best action.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(self, weights: Sequence[float] = (1.0,), optimum: Sequence[float] = (1.5,)) -> None:
        for w in weights:
            bounded("--model.reward.weights", w, 0.0)
        for m in optimum:
            bounded("--model.reward.optimum", m, -LARGEST)
        require(
            len(weights) == len(optimum) > 0,
            f"--model.reward.optimum: {len(optimum)} numbers are not allowed with {len(weights)} of "
            "--model.reward.weights; give as many",
        )
        self.weights, self.optimum = np.array(weights, np.float64), np.array(optimum, np.float64)

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`Reward.value`."""
        columns = (torch.from_numpy(v).to(a).view(-1, *[1] * (a.dim() - 1)) for v in (self.weights, self.optimum))
        w, m = columns
        return -0.5 * (w * (a - m).square()).sum(0)

    def quadratic(self, action_dim: int) -> QuadraticForm:
        """See :meth:`Reward.quadratic`.

        Raises:
            ToyError: actions have another number of coordinates.
        """
        require(
            len(self.weights) == action_dim,
            f"--model.reward.weights: {len(self.weights)} numbers are not allowed where actions have {action_dim} "
            "(--data.action_dim); give as many",
        )
        const = -0.5 * float(self.weights @ np.square(self.optimum))
        return QuadraticForm(np.diag(self.weights), self.weights * self.optimum, const)

    def action_value(self, level: NoiseLevel) -> Quadratic:
        """See :meth:`Reward.action_value`: the same at every level.

        Raises:
            ToyError: it is of several actions, and the linear-Gaussian problem has one.
        """
        form = self.quadratic(1)
        return Quadratic(float(form.A[0, 0]), float(form.b[0]), form.const)

    @property
    def curvature(self) -> float:
        """See :attr:`Reward.curvature`."""
        return float(self.weights.max())


class Quartic(Reward):
    """Q(a) = -height (((a - centre) / width)^2 - 1)^2: best at centre - width and centre + width, summed over actions.

    Args:
        height: how much worse the middle is, not below 0.
        width: of a well, above 0.
        centre: between the wells.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(self, height: float = 1.0, width: float = 1.0, centre: float = 0.0) -> None:
        bounded("--model.reward.height", height, 0.0)
        bounded("--model.reward.width", width, 0.0, above=True)
        bounded("--model.reward.centre", centre, -LARGEST)
        self.height, self.width, self.centre = height, width, centre

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`Reward.value`."""
        return -self.height * (((a - self.centre) / self.width).square() - 1).square().sum(0)

    @property
    def curvature(self) -> float:
        """See :attr:`Reward.curvature`: at the optima."""
        return 8 * self.height / self.width**2


class Step(Reward):
    """Q(a) = height where a > edge, else 0: there is no gradient. Of the first coordinate.

    Args:
        height: of the step.
        edge: where it is.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(self, height: float = 1.0, edge: float = 0.5) -> None:
        bounded("--model.reward.height", height, -100.0, 100.0)
        bounded("--model.reward.edge", edge, -LARGEST)
        self.height, self.edge = height, edge

    def value(self, a: Tensor) -> Tensor:
        """See :meth:`Reward.value`."""
        return self.height * (a[0] > self.edge).to(a)

    def log_mean_exp(self, a: Tensor, std: float, scale: float) -> tuple[Tensor, Tensor]:
        """See :meth:`Reward.log_mean_exp`: E = Phi(-u) + exp(c) Phi(u), u = (a - edge) / std, c = scale height.

        In logarithms and in double, so that neither a large exp(c) nor a small E is lost.
        """
        u, c = (a.double() - self.edge) / std, scale * self.height
        log_mean = torch.logaddexp(torch.special.log_ndtr(-u), c + torch.special.log_ndtr(u))
        if c == 0:
            return torch.zeros_like(a), torch.zeros_like(a)
        # log |exp(c) - 1|, without overflow
        log_difference = max(c, 0.0) + math.log(-math.expm1(-abs(c)))
        log_density = -0.5 * u.square() - 0.5 * math.log(2 * math.pi)
        grad = math.copysign(1 / std, c) * torch.exp(log_difference + log_density - log_mean)
        return log_mean.to(a), grad.to(a)

    @property
    def breakpoints(self) -> Sequence[float]:
        """See :attr:`Reward.breakpoints`."""
        return (self.edge,)
