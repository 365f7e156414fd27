"""A small MLP of GELUs with its derivatives written out: gradient, Jacobian products, Hessian product.

R replicas side by side; a replica's parameters are one row of theta (R, P). At this size (128 rows, 4739 parameters)
autograd's second derivatives cost three times what the matrix products in them do, and every step of this experiment
takes several. Tested against :mod:`lightning_toys.bilevel.implicit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_toys.nets import keyed_uniform


@dataclass(frozen=True)
class MLP:
    """h(x) = W_n gelu(... gelu(W_1 x + b_1) ...) + b_n.

    Attributes:
        widths: inputs p, hidden widths, outputs d.

    >>> net = MLP((5, 64, 64, 3))
    >>> theta = net.init_parameters(seeds=[0, 1], name="h")
    >>> theta.shape, net(theta, torch.zeros(2, 7, 5)).shape
    (torch.Size([2, 4739]), torch.Size([2, 7, 3]))
    """

    widths: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """P, the number of parameters."""
        return sum((n + 1) * m for n, m in pairwise(self.widths))

    def init_parameters(self, seeds: Sequence[int], name: str) -> nn.Parameter:
        """Return new parameters (R, P), drawn as ``torch.nn.Linear`` does; ``name`` keys the draws."""
        parts: list[Tensor] = []
        for i, (n, m) in enumerate(pairwise(self.widths)):
            for letter, shape in (("weight", (n, m)), ("bias", (1, m))):
                drawn = keyed_uniform(seeds, f"{name}.{i}.{letter}", shape, 1 / math.sqrt(n))
                parts.append(drawn.detach().flatten(1))
        return nn.Parameter(torch.cat(parts, dim=1))

    def layers(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return views of theta (R, P): weight (R, in, out) and bias (R, 1, out) of each layer."""
        out, lo = [], 0
        for n, m in pairwise(self.widths):
            mid, hi = lo + n * m, lo + (n + 1) * m
            out.append((theta[:, lo:mid].view(-1, n, m), theta[:, mid:hi].unsqueeze(1)))
            lo = hi
        return out

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return h (R, B, d) at x (R, B, p); autograd can follow."""
        *hidden, (weight, bias) = self.layers(theta)
        for w, b in hidden:
            x = torch.nn.functional.gelu(torch.baddbmm(b, x, w))
        return torch.baddbmm(bias, x, weight)

    def forward_pass(self, theta: Tensor, x: Tensor, second_order: bool = True) -> ForwardPass:
        """Return the outputs at x and what their derivatives need (second ones if ``second_order``); no graph."""
        layers = self.layers(theta.detach())
        inputs, gelu_grad, gelu_grad2 = [x], [], []
        for w, b in layers[:-1]:
            a = torch.baddbmm(b, inputs[-1], w)
            cdf = torch.erf(a * math.sqrt(0.5)).add_(1).mul_(0.5)
            density = torch.exp(-0.5 * a * a).mul_(1 / math.sqrt(2 * math.pi))
            inputs.append(a * cdf)
            gelu_grad.append(torch.addcmul(cdf, a, density))  # gelu' = Phi + a phi
            if second_order:
                gelu_grad2.append((2 - a * a).mul_(density))  # gelu'' = (2 - a^2) phi
        h = torch.baddbmm(layers[-1][1], inputs[-1], layers[-1][0])
        return ForwardPass(self, layers, inputs, gelu_grad, gelu_grad2, h)


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass at B points, with what its derivatives need. J is the Jacobian of the outputs in theta.

    Attributes:
        net: the network.
        layers: weight (R, in, out) and bias (R, 1, out) of each layer.
        inputs: of each layer (R, B, in).
        gelu_grad: gelu' at each hidden layer (R, B, width).
        gelu_grad2: gelu'' there; empty without second order.
        h: the outputs (R, B, d).
    """

    net: MLP
    layers: list[tuple[Tensor, Tensor]]
    inputs: list[Tensor]
    gelu_grad: list[Tensor]
    gelu_grad2: list[Tensor]
    h: Tensor

    @property
    def features(self) -> Tensor:
        """The last hidden layer (R, B, width)."""
        return self.inputs[-1]

    def backward(self, u: Tensor) -> list[Tensor]:
        """Return the gradients of <u, h>, u (R, B, d), in each layer's affine output (R, B, out)."""
        out = [u]
        for (w, _), s in zip(self.layers[:0:-1], self.gelu_grad[::-1], strict=True):
            out.insert(0, torch.bmm(out[0], w.mT).mul_(s))
        return out

    def parameter_gradient(self, deltas: list[Tensor]) -> Tensor:
        """Return the parameters' gradient (R, P) from those of each layer's affine output."""
        parts = []
        for x, delta in zip(self.inputs, deltas, strict=True):
            parts += [torch.bmm(x.mT, delta).flatten(1), delta.sum(1)]
        return torch.cat(parts, dim=1)

    def vjp(self, u: Tensor) -> Tensor:
        """Return J' u (R, P) for u (R, B, d)."""
        return self.parameter_gradient(self.backward(u))

    def jvp(self, v: Tensor) -> Tensor:
        """Return J v (R, B, d) for v (R, P)."""
        return self.layer_tangents(v)[1][-1]

    def layer_tangents(self, v: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Return v (R, P) as layers, and each layer's affine output's tangent along v (R, B, out)."""
        v_layers = self.net.layers(v)
        (vw, vb) = v_layers[0]
        out = [torch.baddbmm(vb, self.inputs[0], vw)]
        for (w, _), (vw, vb), x, s in zip(self.layers[1:], v_layers[1:], self.inputs[1:], self.gelu_grad, strict=True):
            out.append(torch.baddbmm(torch.baddbmm(vb, x, vw), out[-1] * s, w))
        return v_layers, out

    def gauss_newton_product(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return J' diag(weight) J v (R, P) for v (R, P), weight broadcasting with (R, B, d)."""
        return self.vjp(weight * self.jvp(v))

    def hessian_product(self, v: Tensor, deltas: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return H v (R, P) and J v (R, B, d), H the Hessian of a loss of the values h.

        Args:
            v: the vector (R, P).
            deltas: :meth:`backward` of the loss's gradient in h.
            weight: the loss's second derivative in h, diagonal, broadcasting with (R, B, d).
        """
        v_layers, tangents = self.layer_tangents(v)
        dot = weight * tangents[-1]  # of a delta, along v
        dots = [dot]
        for i in range(len(self.gelu_grad) - 1, -1, -1):
            (w, _), (vw, _), delta = self.layers[i + 1], v_layers[i + 1], deltas[i + 1]
            grad = torch.bmm(delta, w.mT)
            dot = torch.baddbmm(torch.bmm(dot, w.mT), delta, vw.mT).mul_(self.gelu_grad[i])
            dot = torch.addcmul(dot, grad.mul_(self.gelu_grad2[i]), tangents[i])
            dots.insert(0, dot)
        parts = []
        for i, x in enumerate(self.inputs):
            product = torch.bmm(x.mT, dots[i])
            if i:  # the points do not move
                product = torch.baddbmm(product, (tangents[i - 1] * self.gelu_grad[i - 1]).mT, deltas[i])
            parts += [product.flatten(1), dots[i].sum(1)]
        return torch.cat(parts, dim=1), tangents[-1]
