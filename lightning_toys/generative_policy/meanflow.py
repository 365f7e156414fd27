"""MeanFlow: the average velocity of a flow, its identity, and one-step sampling (Geng et al. 2025, arXiv 2505.13447).

Noise is at t = 1 and data at t = 0: z_t = (1 - t) x + b(t) e with b(t) = t + s (1 - t) and s = ``sigma_min``, so that
z_0 = x + s e. Its velocity is v = (1 - s) e - x. The average velocity from t back to r,

    u(z_t, r, t) = 1 / (t - r) int_r^t v(z_q, q) dq,

obeys u = v - (t - r) du/dt, where d/dt = v . grad_z + d/dt at fixed r. One step samples: a = e - u(e, 0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_toys.errors import LARGEST, bounded, check_settings, require
from lightning_toys.nets import ConditionalNet, Tangent

# path


def path(x: Tensor, e: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
    """Return z_t = (1 - t) x + (t + s (1 - t)) e, (..., D), for x and e (..., D) at t (..., 1)."""
    return (1 - t) * x + (t + sigma_min * (1 - t)) * e


def path_velocity(x: Tensor, e: Tensor, sigma_min: float = 0.0) -> Tensor:
    """Return v = dz_t/dt = (1 - s) e - x, (..., D)."""
    return (1 - sigma_min) * e - x


# distributions of (r, t)


@dataclass
class TimeDistribution:
    """Distribution of the pair r <= t.

    Args:
        kind: ``uniform`` on [0, 1], or ``logit_normal``: the sigmoid of N(mean, std^2).
        mean: mean of the logit.
        std: standard deviation of the logit.
        share: share of a batch's rows with r < t; the rest has r = t, where u is the velocity itself.

    Raises:
        ToyError: a value is not allowed.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = -0.4
    std: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.time.")
        bounded("--model.time.mean", self.mean, -LARGEST)
        bounded("--model.time.std", self.std, 0.0, above=True)
        require(0 <= self.share <= 1, f"--model.time.share: {self.share} is not allowed; give a share in [0, 1]")

    def unused_settings(self) -> dict[str, str]:
        """Return the flags that do nothing with this distribution, each with what it wants."""
        wants = "--model.time.kind logit_normal"
        return {} if self.kind == "logit_normal" else {f"--model.time.{n}": wants for n in ("mean", "std")}

    def sample(self, uniform: Tensor, local: slice) -> tuple[Tensor, Tensor, int]:
        """Turn a batch's uniforms into r and t of the local rows.

        Args:
            uniform: uniforms on [0, 1) for the whole batch (R, B, 2).
            local: the b rows that this process trains on.

        Returns:
            r (R, b, 1), t (R, b, 1), and k: r < t in the first k rows, r = t in the others.

        Example:
            >>> r, t, k = TimeDistribution(share=0.5).sample(torch.tensor([[[0.9, 0.2], [0.3, 0.6]]]), slice(0, 2))
            >>> k, [round(x, 1) for x in r.flatten().tolist()], [round(x, 1) for x in t.flatten().tolist()]
            (1, [0.2, 0.3], [0.9, 0.3])
        """
        rows = round(self.share * uniform.shape[-2])  # of the whole batch: its first
        both = uniform[:, local]
        if self.kind == "logit_normal":
            # float32 uniforms reach 0, whose quantile is -inf
            both = torch.sigmoid(self.mean + self.std * torch.special.ndtri(both.clamp(1e-7, 1 - 1e-7)))
        low, high = both.amin(-1, keepdim=True), both.amax(-1, keepdim=True)
        one = both[..., :1]
        k = min(max(rows - local.start, 0), both.shape[-2])
        return torch.cat([low[:, :k], one[:, k:]], dim=1), torch.cat([high[:, :k], one[:, k:]], dim=1), k


# networks as average velocities


class Coefficients(NamedTuple):
    """u = c_skip z + c_out F(c_in z, ...), and the derivatives of the three in t at fixed r; each (..., 1)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    d_skip: Tensor
    d_out: Tensor
    d_in: Tensor


class Plain:
    """u = F(z, t - r, t), the network without preconditioning."""

    def coefficients(self, r: Tensor, t: Tensor) -> Coefficients:
        """Return the coefficients of u at r and t (..., 1): those of u = F."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return Coefficients(zero, one, one, zero, zero, zero)

    def c_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time that F is given, t itself, and its derivative in t, each (..., 1)."""
        return t, torch.ones_like(t)


class Preconditioned:
    """u = k(r, t) z + (d / s_t) F(z / s_t, ...), s_t the path's RMS for data of RMS d.

    Karras et al. 2022 (arXiv 2206.00364) carried over to average velocities: k is the exact average velocity of
    Gaussian data N(0, d^2 I), whose flow scales z by s_r / s_t, that is k = (1 - s_r / s_t) / (t - r). Since
    s_t^2 - s_r^2 has the factor t - r, it is written without a division by t - r. At r = t, F is left to predict a
    number of variance 1: v given z has the variance (d / s_t)^2 there.

    Args:
        scale: d.
        sigma_min: s.
        offset: added to t before the logarithm in :meth:`c_noise`.
    """

    def __init__(self, scale: float, sigma_min: float = 0.0, offset: float = 0.005) -> None:
        self.scale, self.sigma_min, self.offset = scale, sigma_min, offset

    def coefficients(self, r: Tensor, t: Tensor) -> Coefficients:
        """Return the coefficients of u and their derivatives in t."""
        d2, s = self.scale**2, self.sigma_min
        b_r, b_t = r + s * (1 - r), t + s * (1 - t)
        rms_r, rms_t = ((1 - r).square() * d2 + b_r.square()).sqrt(), ((1 - t).square() * d2 + b_t.square()).sqrt()
        d_rms_t = ((1 - s) * b_t - (1 - t) * d2) / rms_t
        numerator = (t + r - 2) * d2 + (1 - s) * (b_t + b_r)  # (s_t^2 - s_r^2) / (t - r)
        denominator = rms_t * (rms_t + rms_r)
        c_skip = numerator / denominator
        d_skip = (d2 + (1 - s) ** 2 - c_skip * d_rms_t * (2 * rms_t + rms_r)) / denominator
        c_in = 1 / rms_t
        d_in = -d_rms_t / rms_t.square()
        return Coefficients(c_skip, self.scale * c_in, c_in, d_skip, self.scale * d_in, d_in)

    def c_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time that F is given and its derivative: log(t + offset), scaled to run from -1 to 1.

        The velocity inside a mode of width s changes within t ~ s, which a network that is given t alone can hardly
        fit.
        """
        span = math.log1p(1 / self.offset) / 2
        return torch.log((t + self.offset) / self.offset) / span - 1, 1 / ((t + self.offset) * span)


class AverageVelocity(nn.Module):
    """u(z, r, t) of a network F(x, c, c_noise(t)), c = [state, t - r, t], and log sigma where the policy has a head.

    Args:
        net: the network; its output's first D components are F.
        form: how u is made of F.
        head: whether the component after them is log sigma.
    """

    def __init__(self, net: ConditionalNet, form: Plain | Preconditioned, head: bool = False) -> None:
        super().__init__()
        self.net, self.form, self.head = net, form, head

    def condition(self, r: Tensor, t: Tensor, state: Tensor | None) -> Tensor:
        """Return the condition c = [state, t - r, t], (R, B, C)."""
        return torch.cat([t - r, t] if state is None else [state, t - r, t], dim=-1)

    def combine(self, z: Tensor, k: Coefficients, f: Tensor) -> Tensor:
        """Return u (R, B, D) from z (R, B, D), the coefficients and the network's output (R, B, D or D + 1)."""
        return k.c_skip * z + k.c_out * f[..., : z.shape[-1]]

    def forward(self, z: Tensor, r: Tensor, t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return u (R, B, D), and log sigma (R, B, 1) where there is a head; r and t are (R, B, 1)."""
        k = self.form.coefficients(r, t)
        f = self.net(k.c_in * z, self.condition(r, t, state), self.form.c_noise(t)[0])
        return self.combine(z, k, f), self.log_sigma(f)

    def log_sigma(self, f: Tensor) -> Tensor | None:
        """Return log sigma (R, B, 1) in [-12, 2] from the last of the network's outputs, None without a head."""
        return 5 * torch.tanh(f[..., -1:]) * 1.4 - 5 if self.head else None

    def jvp(
        self, z: Tensor, r: Tensor, t: Tensor, dz: Tensor, state: Tensor | None = None, dt: float = 1.0
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return u and log sigma of :meth:`forward`, and the derivative of u along (dz, dr = 0, dt), without a graph.

        Args:
            z: (R, B, D).
            r: (R, B, 1).
            t: (R, B, 1).
            dz: direction of z (R, K, D), for the first K <= B rows.
            state: (R, B, S), where the policy has one.
            dt: direction of t; 0 differentiates in z alone.

        Returns:
            u (R, B, D), log sigma (R, B, 1) or None, and du (R, K, D).
        """
        k = self.form.coefficients(r, t)
        n = dz.shape[1]
        with torch.no_grad():
            first = Coefficients(*(x[:, :n] for x in k))
            dx = first.c_in * dz + dt * first.d_in * z[:, :n]
            dts = torch.full_like(t[:, :n], dt)
            c_noise, rate = self.form.c_noise(t)
            d_state = [] if state is None else [torch.zeros_like(state[:, :n])]
            dc = torch.cat([*d_state, dts, dts], dim=-1)
        tangent = Tangent(dx, dc, rate[:, :n] * dts)
        f, df = self.net.jvp(k.c_in * z, self.condition(r, t, state), c_noise, tangent)
        with torch.no_grad():
            D = z.shape[-1]
            du = (
                dt * (first.d_skip * z[:, :n] + first.d_out * f[:, :n, :D])
                + first.c_skip * dz
                + first.c_out * df[..., :D]
            )
        return self.combine(z, k, f), self.log_sigma(f), du

    def velocity(self, z: Tensor, t: Tensor, state: Tensor | None = None) -> Tensor:
        """Return u(z, t, t) (R, B, D), the velocity of the flow at z (R, B, D) and t (R, B, 1)."""
        u: Tensor = self(z, t, t, state)[0]
        return u


# training


def residual(u: Tensor, du: Tensor, t_minus_r: Tensor, v: Tensor) -> Tensor:
    """Return V - v with V = u + (t - r) sg(du/dt); zero where the MeanFlow identity holds.

    Args:
        u: average velocity (R, B, D), with its graph.
        du: its derivative du/dt (R, K, D) in the first K rows; r = t in the others.
        t_minus_r: t - r of the first K rows (R, K, 1).
        v: what V is regressed on (R, B, D).
    """
    out = u - v
    if du.shape[1] == 0:
        return out
    first = out[:, : du.shape[1]] + t_minus_r * du.detach()
    return first if du.shape[1] == u.shape[1] else torch.cat([first, out[:, du.shape[1] :]], dim=1)


def squared_error(error: Tensor) -> Tensor:
    """Return |error|^2 (R, B) without a graph, for errors (R, B, D): what :func:`adaptive_loss` weighs."""
    return error.detach().square().sum(-1)


def adaptive_loss(error: Tensor, power: float, floor: float) -> Tensor:
    """Return |error|^2 / sg(|error|^2 + floor)^power, (R, B), for errors (R, B, D); MeanFlow's adaptive weight."""
    square = error.square().sum(-1)
    if power == 0:
        return square
    return square * (square.detach() + floor).pow(-power)


# sampling


def sample(u: AverageVelocity, e: Tensor, nfe: int, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Sample by ``nfe`` equal steps z <- z - (t - r) u(z, r, t) from z = e at t = 1 to t = 0.

    Args:
        u: the average velocity.
        e: standard normals (R, B, D).
        nfe: network evaluations, one a step.
        state: (R, B, S), where the policy has one.

    Returns:
        z_0 (R, B, D), and the last step's log sigma (R, B, 1) or None.
    """
    z, log_sigma = e, None
    for k in range(nfe, 0, -1):
        t = torch.full_like(e[..., :1], k / nfe)
        r = torch.full_like(t, (k - 1) / nfe)
        velocity, log_sigma = u(z, r, t, state)
        z = z - velocity / nfe
    return z, log_sigma


@torch.no_grad()
def one_step_jacobian(u: AverageVelocity, e: Tensor, state: Tensor | None = None) -> Tensor:
    """Return df/de (R, B, D, D) of the one-step map f(e) = e - u(e, 0, 1; state) at e (R, B, D)."""
    t = torch.ones_like(e[..., :1])
    r = torch.zeros_like(t)
    columns = []
    for i in range(e.shape[-1]):
        direction = torch.zeros_like(e)
        direction[..., i] = 1.0
        columns.append(direction - u.jvp(e, r, t, direction, state, dt=0.0)[2])
    return torch.stack(columns, dim=-1)


def log_det(u: AverageVelocity, e: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return log|det| and the sign of det, each (R, B), of :func:`one_step_jacobian` at e (R, B, D)."""
    sign, log_abs = torch.linalg.slogdet(one_step_jacobian(u, e, state))
    return log_abs.clamp_min(math.log(torch.finfo(log_abs.dtype).tiny)), sign


def gaussian_entropy(std: float = 1.0, dim: int = 2) -> float:
    """Return the entropy of N(0, std^2 I) in ``dim`` dimensions, in nats; -inf for std = 0.

    >>> round(gaussian_entropy(), 4)
    2.8379
    """
    return dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(std)) if std > 0 else -math.inf
