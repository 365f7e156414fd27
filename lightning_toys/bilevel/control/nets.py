"""Multilayer perceptrons for R replicas of K heads each, with derivatives written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.nets import keyed_uniform
from lightning_toys.training.noise import keyed_generator

Weights = Mapping[str, Tensor]


class ForwardPass(NamedTuple):
    """A forward pass, with what its derivatives need; no autograd graph.

    Attributes:
        inputs: what each layer was given (R K, B, n), a replica's heads side by side.
        weights: of each layer (R K, n, m).
        output: (R, K, B, out).
    """

    inputs: list[Tensor]
    weights: list[Tensor]
    output: Tensor


# Batched products of small matrices: those with the narrow side last are five times slower than their transposes, a
# transposed narrow factor costs twice what it does laid out anew, and an inner side of 1 is no product at all


def affine(b: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Return b + h w for b (N, 1 or B, m), h (N, B, n), w (N, n, m)."""
    if w.shape[2] < w.shape[1]:
        return torch.baddbmm(b.mT, w.mT.contiguous(), h.mT).mT
    return torch.baddbmm(b, h, w)


def add_matmul_(sum_: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Add h w to a sum (N, B, m) that :func:`affine` returned, in place; arguments as there."""
    if w.shape[2] < w.shape[1]:
        sum_.mT.baddbmm_(w.mT.contiguous(), h.mT)
        return sum_
    return sum_.baddbmm_(h, w)


def input_gradient(g: Tensor, w: Tensor) -> Tensor:
    """Return g w' (N, B, n), the gradient in a layer's input, for g (N, B, m) and w (N, n, m)."""
    if w.shape[2] == 1:
        return g * w.mT
    if w.shape[1] < w.shape[2]:
        return torch.bmm(w, g.mT).mT
    return torch.bmm(g, w.mT)


def weight_gradient(h: Tensor, g: Tensor) -> Tensor:
    """Return h'g (N, n, m), the gradient in a layer's weights, contiguous, for h (N, B, n) and g (N, B, m)."""
    if g.shape[2] < h.shape[2]:
        return torch.bmm(g.mT, h).mT.contiguous()
    return torch.bmm(h.mT, g)


def relu_backward_(g: Tensor, h: Tensor) -> Tensor:
    """Return g where h = relu(.) is above 0, and 0 elsewhere: relu's backward pass, in place (N, B, n)."""
    out: Tensor = torch.ops.aten.threshold_backward.grad_input(g, h, 0, grad_input=g)
    return out


def keyed_orthogonal(seeds: Sequence[int], name: str, shape: tuple[int, int, int], scale: float) -> nn.Parameter:
    """Return weights (R, K, n, m), each scale times a matrix with orthonormal columns, or rows where n < m.

    Uniform among them (Saxe et al. 2014, arXiv 1312.6120); row r depends on ``seeds[r]`` and ``name`` only.
    """
    heads, n, m = shape
    rows = []
    for seed in seeds:
        normal = keyed_generator(seed, 0, f"init/{name}").standard_normal((heads, max(n, m), min(n, m)))
        q, r = np.linalg.qr(normal)
        q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]  # else it is not uniform
        rows.append(q if n >= m else q.transpose(0, 2, 1))
    return nn.Parameter(torch.from_numpy(scale * np.stack(rows)).to(torch.get_default_dtype()).contiguous())


class MultiHeadMLP(nn.Module):
    """K perceptrons with ReLU for each of R replicas; x (R, B, in) to (R, K, B, out).

    Weights are ``w0`` (R, K, in, h), ``b0`` (R, K, 1, h), ``w1`` ... Replica r depends on its own seed alone.

    Args:
        seeds: one seed a replica.
        name: of the draws; other names are other initial weights.
        sizes: widths, input and output included.
        heads: K.
        orthogonal: first weights orthogonal, of scale sqrt(2) and in the last layer .01, and biases 0 (as in the code
            published with OMD); otherwise ``torch.nn.Linear``'s.

    >>> net = MultiHeadMLP([0, 1, 2], "q", (4, 32, 32, 2), heads=2)
    >>> net(torch.zeros(3, 7, 4)).shape
    torch.Size([3, 2, 7, 2])
    """

    def __init__(
        self, seeds: Sequence[int], name: str, sizes: Sequence[int], heads: int = 1, orthogonal: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.layers = heads, len(sizes) - 1
        self._views: list[tuple[Tensor, Tensor]] = []
        self._places: list[int] = []  # in memory, of the parameters that the views are of
        for i, (n, m) in enumerate(pairwise(sizes)):
            if orthogonal:
                scale = 2**0.5 if i < self.layers - 1 else 1e-2
                self.register_parameter(f"w{i}", keyed_orthogonal(seeds, f"{name}.w{i}", (heads, n, m), scale))
                self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(len(seeds), heads, 1, m)))
                continue
            # torch.nn.Linear's initial weights, U(-1/sqrt(fan_in), 1/sqrt(fan_in))
            for letter, shape in (("w", (heads, n, m)), ("b", (heads, 1, m))):
                self.register_parameter(f"{letter}{i}", keyed_uniform(seeds, f"{name}.{letter}{i}", shape, n**-0.5))

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters by name, in their order, ``w0`` (R, K, in, h), ``b0`` (R, K, 1, h), ``w1`` ..."""
        found: dict[str, Any] = self._parameters
        return dict(found)

    def side_by_side(self) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's weights (R K, n, m) and biases (R K, 1, m), views without a graph.

        They are kept while the parameters lie where they lay: to make them anew takes as long as a product.
        """
        places = [p.data_ptr() for p in self._parameters.values() if p is not None]
        if places != self._places:
            p = self.weights()
            flat = [(p[f"w{i}"].detach().flatten(0, 1), p[f"b{i}"].detach().flatten(0, 1)) for i in range(self.layers)]
            self._views, self._places = flat, places
        return self._views

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Map inputs (R, B, in) to (R, K, B, out).

        Args:
            x: the same for all heads.
            weights: in the place of the own.
        """
        p: Weights = weights if weights is not None else self.weights()
        h = x if self.heads == 1 else x.unsqueeze(1).expand(-1, self.heads, -1, -1).flatten(0, 1)
        for i in range(self.layers):
            h = torch.baddbmm(p[f"b{i}"].flatten(0, 1), h, p[f"w{i}"].flatten(0, 1))
            if i < self.layers - 1:
                h = torch.relu(h)
        return h.view(x.shape[0], self.heads, *h.shape[1:])

    def values(self, x: Tensor) -> Tensor:
        """Return :meth:`forward` of x (R, K, B, out); with gradients disabled, :meth:`forward_pass`'s output."""
        return self(x) if torch.is_grad_enabled() else self.forward_pass(x).output

    # by hand, without autograd's graph: a small network's backward pass is mostly that graph

    # (no_grad() costs as much as a product: it is not asked for where no tensor has a graph)

    def forward_pass(self, x: Tensor) -> ForwardPass:
        """Return the output for inputs (R, B, in), and what its derivatives need."""
        h = x.detach()
        if self.heads > 1:
            h = h.unsqueeze(1).expand(-1, self.heads, -1, -1).flatten(0, 1)
        inputs, weights = [], []
        for i, (w, b) in enumerate(self.side_by_side()):
            inputs.append(h)
            weights.append(w)
            h = affine(b, h, w)
            if i < self.layers - 1:
                h = h.relu_()
        return ForwardPass(inputs, weights, h.view(x.shape[0], self.heads, *h.shape[1:]))

    def vjp(self, forward: ForwardPass, cotangent: Tensor) -> dict[str, Tensor]:
        """Return sum <cotangent, d output / d weights> by the weights' names: one reverse pass.

        Args:
            forward: of the inputs.
            cotangent: of the output (R, K, B, out).
        """
        g, grads = cotangent.detach().flatten(0, 1), {}
        for i in reversed(range(self.layers)):
            h = forward.inputs[i]
            grads[f"w{i}"] = weight_gradient(h, g).view(-1, self.heads, h.shape[-1], g.shape[-1])
            grads[f"b{i}"] = g.sum(1, keepdim=True).view(-1, self.heads, 1, g.shape[-1])
            if i:
                g = relu_backward_(input_gradient(g, forward.weights[i]), h)
        return {n: grads[n] for n in self._parameters}

    @torch.no_grad()
    def vjp_input(self, forward: ForwardPass, cotangent: Tensor) -> Tensor:
        """Return sum <cotangent, d output / d x> (R, B, in) over heads; arguments as :meth:`vjp`."""
        g = cotangent.flatten(0, 1)
        for i in reversed(range(self.layers)):
            g = input_gradient(g, forward.weights[i])
            if i:
                g = relu_backward_(g, forward.inputs[i])
        return g.view(-1, self.heads, *g.shape[1:]).sum(1)

    @torch.no_grad()
    def jvp(self, forward: ForwardPass, tangent: Weights) -> Tensor:
        """Return the output's derivative (R, K, B, out) along a tangent of the weights: J v.

        Args:
            forward: of the inputs.
            tangent: v, by the weights' names.
        """
        dh: Tensor | None = None
        for i, (h, w) in enumerate(zip(forward.inputs, forward.weights, strict=True)):
            if dh is not None:
                dh = relu_backward_(dh, h)
            own = affine(tangent[f"b{i}"].flatten(0, 1), h, tangent[f"w{i}"].flatten(0, 1))
            dh = own if dh is None else add_matmul_(own, dh, w)
        assert dh is not None
        return dh.view(-1, self.heads, *dh.shape[1:])
