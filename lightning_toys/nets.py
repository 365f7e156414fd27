"""Multilayer perceptrons and a small transformer for R replicas at once.

Every parameter has a leading replica axis and every layer is one batched matrix product, so replica r of many computes
what it would compute alone. Weights are stored as (R, in, out), the layout in which ``baddbmm`` and its backward run
without a transpose (measured: 20 % faster than (R, out, in) at width 256).

Initialisation is that of ``torch.nn.Linear``, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight and bias, drawn from the
replica's own seed and the layer's own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.errors import bounded, check_settings, require
from lightning_toys.training.noise import keyed_generator

DEEPEST = 1000  # layers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def gelu_derivative(a: Tensor) -> Tensor:
    """Return d gelu / da = Phi(a) + a phi(a), elementwise."""
    derivative: Tensor = torch.special.ndtr(a) + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return derivative


def silu_derivative(a: Tensor) -> Tensor:
    """Return d silu / da = s (1 + a (1 - s)), s = sigmoid(a), elementwise."""
    s = torch.sigmoid(a)
    derivative: Tensor = torch.addcmul(s, s * a, 1 - s)
    return derivative


ACTIVATION_DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda a: (a > 0).to(a),
    "gelu": gelu_derivative,
    "silu": silu_derivative,
    "tanh": lambda a: 1 - torch.tanh(a).square(),
}


def keyed_uniform(seeds: Sequence[int], name: str, shape: tuple[int, ...], bound: float) -> nn.Parameter:
    """Return a parameter (R, *shape) with entries U(-bound, bound); row r depends on ``seeds[r]`` and ``name`` only."""
    rows = [keyed_generator(seed, 0, f"init/{name}").uniform(-bound, bound, shape) for seed in seeds]
    return nn.Parameter(torch.from_numpy(np.stack(rows)).to(torch.get_default_dtype()))


class ReplicaLinear(nn.Module):
    """y_r = x_r W_r + b_r for every replica r; x (R, B, in), W (R, in, out), b (R, 1, out) or none."""

    def __init__(self, seeds: Sequence[int], name: str, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = keyed_uniform(seeds, f"{name}.weight", (in_features, out_features), bound)
        self.bias = keyed_uniform(seeds, f"{name}.bias", (1, out_features), bound) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, B, in) to (R, B, out)."""
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)

    def jvp(self, dx: Tensor) -> Tensor:
        """Map an input tangent (R, B, in) to the output tangent (R, B, out), dx W; no graph to the weights is kept."""
        return torch.bmm(dx, self.weight.detach().to(dx))


class ReplicaLayerNorm(nn.Module):
    """Layer normalisation over the last axis with a gain and a bias for each replica; x (R, ..., width)."""

    def __init__(self, replicas: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(replicas, width))
        self.bias = nn.Parameter(torch.zeros(replicas, width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each row of x, then scale and shift it by its replica's gain and bias."""
        shape = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        return F.layer_norm(x, x.shape[-1:]) * self.gain.view(shape) + self.bias.view(shape)


def fourier(u: Tensor, features: int) -> Tensor:
    """Append sin(pi k u) and cos(pi k u), k = 1..features, to u: (..., d) to (..., d (1 + 2 features)).

    >>> fourier(torch.zeros(5, 3), 2).shape
    torch.Size([5, 15])
    """
    if features == 0:
        return u
    k = torch.arange(1, features + 1, device=u.device, dtype=u.dtype) * math.pi
    angle = (u.unsqueeze(-1) * k).flatten(-2)
    return torch.cat([u, angle.sin(), angle.cos()], dim=-1)


def fourier_jvp(u: Tensor, du: Tensor, features: int) -> Tensor:
    """Return the derivative of :func:`fourier` at u in the direction du: both (..., d) to (..., d (1 + 2 features))."""
    if features == 0:
        return du
    k = torch.arange(1, features + 1, device=u.device, dtype=u.dtype) * math.pi
    angle = (u.unsqueeze(-1) * k).flatten(-2)
    derivative = (du.unsqueeze(-1) * k).flatten(-2)
    return torch.cat([du, derivative * angle.cos(), -derivative * angle.sin()], dim=-1)


class Tangent(NamedTuple):
    """A direction in which a network is differentiated, for the first K rows of a batch.

    Attributes:
        x: (R, K, D).
        c: (R, K, C).
        t: (R, K, 1).
    """

    x: Tensor
    c: Tensor
    t: Tensor


class ConditionalNet(nn.Module):
    """Base of the networks (x, c, t) -> R^D with a replica axis; without ``t`` where the objective has no time."""

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        """Map x (R, B, D), c (R, B, C) and t (R, B, 1) to (R, B, D)."""
        raise NotImplementedError

    def jvp(self, x: Tensor, c: Tensor, t: Tensor, tangent: Tangent) -> tuple[Tensor, Tensor]:
        """Return the output (R, B, D) with its graph, and its directional derivative (R, K, D) without one.

        The derivative is that of ``torch.func.jvp`` for the first K <= B rows, carried through the layers beside the
        values. It shares their pre-activations and keeps nothing for a backward pass, which makes it much cheaper in a
        loss that takes it for a constant.

        Raises:
            NotImplementedError: the network has no forward derivative (:class:`TokenTransformer`).
        """
        raise NotImplementedError(f"{type(self).__name__} has no tangent")


@dataclass
class Network:
    """The network of an experiment.

    Args:
        kind: ``concat`` feeds [x, c, t] to an MLP; ``film`` feeds x and lets c, t scale and shift every hidden layer
            (FiLM, arXiv 1709.07871); ``transformer`` attends over one token each for x, c and t.
        hidden: width of the hidden layers.
        layers: number of hidden layers (transformer: of attention blocks).
        activation: nonlinearity.
        fourier_c: sin and cos features appended to c, so many frequencies pi k.
        fourier_t: the same for t.
        residual: add each hidden layer's input to its output.
        heads: attention heads of the transformer.

    Raises:
        ToyError: a value is not allowed.
    """

    kind: Literal["concat", "film", "transformer"] = "concat"
    hidden: int = 256
    layers: int = 3
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    fourier_c: int = 0
    fourier_t: int = 0
    residual: bool = False
    heads: int = 4

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.network.")
        for name in ("hidden", "layers", "heads"):
            value = getattr(self, name)
            bounded(f"--model.network.{name}", value, 1, DEEPEST if name == "layers" else None)
        require(
            self.kind != "film" or self.layers >= 2,
            f"--model.network.layers: {self.layers} is not allowed with film, whose first layer does not see the "
            "condition; give at least 2",
        )
        for name in ("fourier_c", "fourier_t"):
            value = getattr(self, name)
            bounded(f"--model.network.{name}", value, 0)
        require(
            self.kind != "transformer" or self.hidden % self.heads == 0,
            f"--model.network.heads: {self.heads} does not divide --model.network.hidden {self.hidden}",
        )

    def unused_settings(self, with_time: bool = True) -> dict[str, str]:
        """Return the flags that do nothing in this network, each with what it wants."""
        out = {} if with_time else {"--model.network.fourier_t": "a network that is fed a time"}
        if self.kind == "transformer":
            return out | {"--model.network.residual": "--model.network.kind concat or film"}
        return out | {"--model.network.heads": "--model.network.kind transformer"}

    def build(
        self, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool, out_dim: int | None = None
    ) -> ConditionalNet:
        """Build the network for one replica a seed.

        Args:
            seeds: one a replica; each draws its own initial weights.
            x_dim: dimension of x.
            c_dim: dimension of the condition c.
            with_time: whether the network is given t.
            out_dim: dimension of the output; that of x if left out.

        Example:
            >>> net = Network(hidden=8).build(seeds=[0, 1], x_dim=2, c_dim=1, with_time=True)
            >>> net(torch.zeros(2, 5, 2), torch.zeros(2, 5, 1), torch.zeros(2, 5, 1)).shape
            torch.Size([2, 5, 2])
        """
        kinds = {"concat": ConcatMLP, "film": FiLMMLP, "transformer": TokenTransformer}
        return kinds[self.kind](self, seeds, x_dim, c_dim, with_time, out_dim or x_dim)


class ConcatMLP(ConditionalNet):
    """h = act(W [x, c, t] + b), then hidden layers, then a linear read-out."""

    def __init__(
        self, spec: Network, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool, out_dim: int
    ) -> None:
        super().__init__()
        self.spec, self.act = spec, ACTIVATIONS[spec.activation]
        inputs = x_dim + c_dim * (1 + 2 * spec.fourier_c) + with_time * (1 + 2 * spec.fourier_t)
        h = spec.hidden
        self.first = ReplicaLinear(seeds, "first", inputs, h)
        self.hidden = nn.ModuleList(ReplicaLinear(seeds, f"hidden.{i}", h, h) for i in range(spec.layers - 1))
        self.last = ReplicaLinear(seeds, "last", h, out_dim)

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        """See :meth:`ConditionalNet.forward`."""
        parts = [x, fourier(c, self.spec.fourier_c)]
        if t is not None:
            parts.append(fourier(t, self.spec.fourier_t))
        h = self.act(self.first(torch.cat(parts, dim=-1)))
        for layer in self.hidden:
            update = self.act(layer(h))
            h = h + update if self.spec.residual else update
        out: Tensor = self.last(h)
        return out

    def jvp(self, x: Tensor, c: Tensor, t: Tensor, tangent: Tangent) -> tuple[Tensor, Tensor]:
        """See :meth:`ConditionalNet.jvp`."""
        spec, derivative, k = self.spec, ACTIVATION_DERIVATIVES[self.spec.activation], tangent.x.shape[1]
        with torch.no_grad():
            dc = fourier_jvp(c[:, :k], tangent.c, spec.fourier_c)
            dt = fourier_jvp(t[:, :k], tangent.t, spec.fourier_t)
            dh = self.first.jvp(torch.cat([tangent.x, dc, dt], dim=-1))
        a = self.first(torch.cat([x, fourier(c, spec.fourier_c), fourier(t, spec.fourier_t)], dim=-1))
        h = self.act(a)
        with torch.no_grad():
            dh = derivative(a[:, :k]).mul_(dh)
        for layer in self.hidden:
            assert isinstance(layer, ReplicaLinear)
            a = layer(h)
            update = self.act(a)
            with torch.no_grad():
                d_update = derivative(a[:, :k]).mul_(layer.jvp(dh))
                dh = dh + d_update if spec.residual else d_update
            h = h + update if spec.residual else update
        return self.last(h), self.last.jvp(dh).detach()


class FiLMMLP(ConditionalNet):
    """h = act(W x + b); then h <- act(gamma (W h + b) + beta), (gamma, beta) linear in [c, t]; then a read-out."""

    def __init__(
        self, spec: Network, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool, out_dim: int
    ) -> None:
        super().__init__()
        self.spec, self.act = spec, ACTIVATIONS[spec.activation]
        conditions = c_dim * (1 + 2 * spec.fourier_c) + with_time * (1 + 2 * spec.fourier_t)
        h, n = spec.hidden, spec.layers - 1
        self.first = ReplicaLinear(seeds, "first", x_dim, h)
        self.hidden = nn.ModuleList(ReplicaLinear(seeds, f"hidden.{i}", h, h) for i in range(n))
        self.film = nn.ModuleList(ReplicaLinear(seeds, f"film.{i}", conditions, 2 * h) for i in range(n))
        self.last = ReplicaLinear(seeds, "last", h, out_dim)

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        """See :meth:`ConditionalNet.forward`."""
        condition = fourier(c, self.spec.fourier_c)
        if t is not None:
            condition = torch.cat([condition, fourier(t, self.spec.fourier_t)], dim=-1)
        h = self.act(self.first(x))
        for layer, film in zip(self.hidden, self.film, strict=True):
            gamma, beta = film(condition).chunk(2, dim=-1)
            update = self.act(gamma * layer(h) + beta)
            h = h + update if self.spec.residual else update
        out: Tensor = self.last(h)
        return out

    def jvp(self, x: Tensor, c: Tensor, t: Tensor, tangent: Tangent) -> tuple[Tensor, Tensor]:
        """See :meth:`ConditionalNet.jvp`."""
        spec, derivative, k = self.spec, ACTIVATION_DERIVATIVES[self.spec.activation], tangent.x.shape[1]
        condition = torch.cat([fourier(c, spec.fourier_c), fourier(t, spec.fourier_t)], dim=-1)
        a = self.first(x)
        h = self.act(a)
        with torch.no_grad():
            dc = fourier_jvp(c[:, :k], tangent.c, spec.fourier_c)
            dt = fourier_jvp(t[:, :k], tangent.t, spec.fourier_t)
            d_condition = torch.cat([dc, dt], dim=-1)
            dh = derivative(a[:, :k]).mul_(self.first.jvp(tangent.x))
        for layer, film in zip(self.hidden, self.film, strict=True):
            assert isinstance(layer, ReplicaLinear)
            assert isinstance(film, ReplicaLinear)
            gamma, beta = film(condition).chunk(2, dim=-1)
            y = layer(h)
            a = gamma * y + beta
            update = self.act(a)
            with torch.no_grad():
                d_gamma, d_beta = film.jvp(d_condition).chunk(2, dim=-1)
                d_update = derivative(a[:, :k]) * (d_gamma * y[:, :k] + gamma[:, :k] * layer.jvp(dh) + d_beta)
                dh = dh + d_update if spec.residual else d_update
            h = h + update if spec.residual else update
        return self.last(h), self.last.jvp(dh).detach()


class AttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual connection; tokens (R, B, T, width)."""

    def __init__(self, spec: Network, seeds: Sequence[int], name: str) -> None:
        super().__init__()
        h = spec.hidden
        self.heads, self.act = spec.heads, ACTIVATIONS[spec.activation]
        self.norm1, self.norm2 = ReplicaLayerNorm(len(seeds), h), ReplicaLayerNorm(len(seeds), h)
        self.query = ReplicaLinear(seeds, f"{name}.query", h, h)
        # no bias: a softmax does not see it, its gradient is rounding noise, and Adam would walk it at full speed
        self.key = ReplicaLinear(seeds, f"{name}.key", h, h, bias=False)
        self.value = ReplicaLinear(seeds, f"{name}.value", h, h)
        self.proj = ReplicaLinear(seeds, f"{name}.proj", h, h)
        self.up = ReplicaLinear(seeds, f"{name}.up", h, 4 * h)
        self.down = ReplicaLinear(seeds, f"{name}.down", 4 * h, h)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (R, B, T, width) to the same shape."""
        R, B, T, h = tokens.shape
        flat = self.norm1(tokens).view(R, B * T, h)
        q, k, v = (
            layer(flat).view(R * B, T, self.heads, h // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(R, B * T, h)
        tokens = tokens + self.proj(mixed).view(R, B, T, h)
        update: Tensor = self.down(self.act(self.up(self.norm2(tokens).view(R, B * T, h))))
        return tokens + update.view(R, B, T, h)


class TokenTransformer(ConditionalNet):
    """One token each for x, c and t; the token of x is read out after ``layers`` attention blocks."""

    def __init__(
        self, spec: Network, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool, out_dim: int
    ) -> None:
        super().__init__()
        self.spec = spec
        h = spec.hidden
        self.embed_x = ReplicaLinear(seeds, "embed_x", x_dim, h)
        self.embed_c = ReplicaLinear(seeds, "embed_c", c_dim * (1 + 2 * spec.fourier_c), h)
        self.embed_t = ReplicaLinear(seeds, "embed_t", 1 + 2 * spec.fourier_t, h) if with_time else None
        self.blocks = nn.ModuleList(AttentionBlock(spec, seeds, f"block.{i}") for i in range(spec.layers))
        self.norm = ReplicaLayerNorm(len(seeds), h)
        self.last = ReplicaLinear(seeds, "last", h, out_dim)

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        """See :meth:`ConditionalNet.forward`."""
        tokens = [self.embed_x(x), self.embed_c(fourier(c, self.spec.fourier_c))]
        if self.embed_t is not None and t is not None:
            tokens.append(self.embed_t(fourier(t, self.spec.fourier_t)))
        h = torch.stack(tokens, dim=2)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.last(self.norm(h[:, :, 0]))
        return out


def count_parameters(net: nn.Module) -> int:
    """Count the parameters of one replica."""
    return sum(p[0].numel() for p in net.parameters())
