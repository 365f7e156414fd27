"""Forward and backward pass of the MLPs of ``nets.py``, written out over standing buffers.

Symbols: a = W h + b a layer's pre-activation, h' = act(a). A name that begins with d is the loss's gradient with
respect to what the rest of it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_toys.nets import ACTIVATION_DERIVATIVES, ConcatMLP, ConditionalNet, FiLMMLP, ReplicaLinear, fourier

aten: Any = torch.ops.aten


class Linear:
    """A :class:`~lightning_toys.nets.ReplicaLinear` of some replicas, with its gradients.

    Args:
        layer: of all replicas.
        parts: of each parameter the group's part of it and of its gradient.
    """

    def __init__(self, layer: ReplicaLinear, parts: Mapping[Tensor, tuple[Tensor, Tensor]]) -> None:
        assert layer.bias is not None
        self.weight, self.weight_grad = parts[layer.weight]
        self.bias, self.bias_grad = parts[layer.bias]
        self.transposed = self.weight.transpose(1, 2)
        self.accumulates = False

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Write x W + b to ``out``."""
        return torch.baddbmm(self.bias, x, self.weight, out=out)

    def backward(self, x: Tensor, d_out: Tensor) -> None:
        """Write (or, of a step's second term, add) the gradients of weight and bias."""
        if self.accumulates:  # a product of its own, as autograd's: one that begins at the sum may round otherwise
            self.weight_grad.add_(torch.bmm(x.transpose(1, 2), d_out))
            self.bias_grad.add_(d_out.sum(1, keepdim=True))
        else:
            torch.bmm(x.transpose(1, 2), d_out, out=self.weight_grad)
            torch.sum(d_out, 1, keepdim=True, out=self.bias_grad)

    def input_grad(self, d_out: Tensor, out: Tensor) -> Tensor:
        """Write d_out W^T to ``out``."""
        return torch.bmm(d_out, self.transposed, out=out)


# act(a) to ``out``
FORWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda a, out: torch.clamp_min(a, 0, out=out),
    "gelu": lambda a, out: aten.gelu.out(a, out=out),
    "silu": lambda a, out: aten.silu.out(a, out=out),
    "tanh": lambda a, out: torch.tanh(a, out=out),
}
# d times act'(a), to ``d`` itself, of a and h = act(a)
BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda d, a, h: aten.threshold_backward.grad_input(d, h, 0, grad_input=d),
    "gelu": lambda d, a, h: aten.gelu_backward.grad_input(d, a, grad_input=d),
    "silu": lambda d, a, h: aten.silu_backward.grad_input(d, a, grad_input=d),
    "tanh": lambda d, a, h: aten.tanh_backward.grad_input(d, h, grad_input=d),
}
assert FORWARD.keys() == BACKWARD.keys() == ACTIVATION_DERIVATIVES.keys()
IN_PLACE = ("relu", "tanh")  # whose derivative is a function of their value: a need not be kept


class Buffers:
    """What one forward and backward pass of B rows writes to.

    Args:
        like: a weight, for dtype and number of replicas (its first axis).
        rows: B.
        width: of the hidden layers.
        layers: number of hidden layers.
        keeps: whether pre-activations have tensors of their own.
        residual: whether sums of layers have.
        modulated: whether layers are modulated (FiLM).
    """

    def __init__(
        self, like: Tensor, rows: int, width: int, layers: int, keeps: bool, residual: bool, modulated: bool
    ) -> None:
        def hidden(n: int, size: int = width) -> list[Tensor]:
            return [like.new_empty(like.shape[0], rows, size) for _ in range(n)]

        self.updates = hidden(layers)  # act(a)
        self.pre = hidden(layers) if keeps else self.updates
        self.sums = [self.updates[0], *hidden(layers - 1)] if residual else self.updates  # h
        self.grads = hidden(2)
        n = layers - 1 if modulated else 0
        self.modulations, self.linear = hidden(n, 2 * width), hidden(n)  # (gamma, beta), and W h + b
        self.modulation_grad = hidden(1, 2 * width)[0] if modulated else self.grads[0]


class ManualMLP:
    """A network of some replicas whose gradients are written to standing buffers.

    Args:
        net: of all replicas.
        parts: of each parameter the group's part of it and of its gradient.
    """

    def __init__(self, net: ConcatMLP | FiLMMLP, parts: Mapping[Tensor, tuple[Tensor, Tensor]]) -> None:
        spec = net.spec
        self.residual, self.width = spec.residual, spec.hidden
        self.act, self.act_backward = FORWARD[spec.activation], BACKWARD[spec.activation]
        self.keeps = spec.activation not in IN_PLACE
        self.first, self.last = (Linear(x, parts) for x in (net.first, net.last))
        self.hidden = [Linear(x, parts) for x in net.hidden if isinstance(x, ReplicaLinear)]
        films = list(net.film) if isinstance(net, FiLMMLP) else []
        self.film = [Linear(x, parts) for x in films if isinstance(x, ReplicaLinear)]
        self.linears = [self.first, *self.hidden, *self.film, self.last]
        self.buffers: dict[int, Buffers] = {}

    def buffers_of(self, rows: int) -> Buffers:
        """Return what passes of so many rows write to."""
        if rows not in self.buffers:
            layers = len(self.hidden) + 1
            args = (self.first.weight, rows, self.width, layers, self.keeps, self.residual, bool(self.film))
            self.buffers[rows] = Buffers(*args)
        return self.buffers[rows]

    def forward(self, x: Tensor, condition: Tensor | None, out: Tensor) -> None:
        """Write the network's output (G, B, D) to ``out``.

        Args:
            x: (G, B, in) what the first layer sees.
            condition: (G, B, C) what modulates the others, of FiLM.
            out: (G, B, D).
        """
        b = self.buffers_of(x.shape[1])
        h = self.act(self.first.forward(x, b.pre[0]), b.updates[0])
        for k, layer in enumerate(self.hidden, start=1):
            if condition is None:
                a = layer.forward(h, b.pre[k])
            else:
                y = layer.forward(h, b.linear[k - 1])
                modulation = self.film[k - 1].forward(condition, b.modulations[k - 1])
                gamma, beta = modulation[..., : self.width], modulation[..., self.width :]
                a = torch.mul(gamma, y, out=b.pre[k]).add_(beta)
            update = self.act(a, b.updates[k])
            h = torch.add(h, update, out=b.sums[k]) if self.residual else update
        self.last.forward(h, out)

    def backward(self, x: Tensor, condition: Tensor | None, d_out: Tensor, accumulates: bool = False) -> None:
        """Write the gradients of the pass before, or add them to those that are there.

        Args:
            x: as in :meth:`forward`.
            condition: as in :meth:`forward`.
            d_out: (G, B, D) the loss's gradient with respect to the output.
            accumulates: whether they are added.
        """
        b = self.buffers_of(x.shape[1])
        for linear in self.linears:
            linear.accumulates = accumulates
        h, other = b.grads
        self.last.backward(b.sums[-1], d_out)
        d = self.last.input_grad(d_out, h)
        for k in range(len(self.hidden), 0, -1):
            layer = self.hidden[k - 1]
            da = other.copy_(d) if self.residual else d
            da = self.act_backward(da, b.pre[k], b.updates[k])
            if condition is not None:
                gamma = b.modulations[k - 1][..., : self.width]
                d_gamma, d_beta = b.modulation_grad[..., : self.width], b.modulation_grad[..., self.width :]
                torch.mul(da, b.linear[k - 1], out=d_gamma)
                d_beta.copy_(da)
                self.film[k - 1].backward(condition, b.modulation_grad)
                da.mul_(gamma)
            layer.backward(b.sums[k - 1], da)
            if self.residual:
                d = d.baddbmm_(da, layer.transposed)
            else:
                d, other = layer.input_grad(da, other), d
        self.first.backward(x, self.act_backward(d, b.pre[0], b.updates[0]))


def first_inputs(net: ConditionalNet, x: Tensor, c: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return what the first layer of a network sees, and what modulates the others; arguments as the network's."""
    assert isinstance(net, ConcatMLP | FiLMMLP)
    parts = [fourier(c, net.spec.fourier_c)]
    if t is not None:
        parts.append(fourier(t, net.spec.fourier_t))
    if isinstance(net, FiLMMLP):
        return x, torch.cat(parts, dim=-1)
    return torch.cat([x, *parts], dim=-1), None
