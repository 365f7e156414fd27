"""The parameters and buffers in a checkpoint: h, lambda, the hypergradients that are averaged, an adjoint network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.inner_optimizers import AdamState
from lightning_toys.bilevel.regression.hypergradients import AdjointNetwork
from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.bilevel.vectors import moving_average_


class Learner(nn.Module):
    """Parameters of R replicas: ``theta`` (R, P) of h, and ``free`` (R, W), lambda itself or its logits, lag 1 first.

    ``recent`` (R, smoothing, W) holds the last hypergradients; ``psi`` (R, P), ``psi_mean``, ``psi_square`` and
    ``psi_step`` an adjoint network and its Adam.

    Args:
        mlp: the network h.
        seeds: one seed a replica.
        window: W, the number of lags.
        initial_weight: every weight lambda at the start; none makes logits, which start at 0.
        smoothing: hypergradients that are averaged.
        adjoint: whether there is an adjoint network.
    """

    recent: Tensor
    psi: Tensor
    psi_mean: Tensor
    psi_square: Tensor
    psi_step: Tensor

    def __init__(
        self, mlp: MLP, seeds: Sequence[int], window: int, initial_weight: float | None, smoothing: int, adjoint: bool
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.theta = mlp.init_parameters(seeds, "h")
        self.free = nn.Parameter(
            torch.full((len(seeds), window), initial_weight if initial_weight is not None else 0.0)
        )
        self.register_buffer("recent", torch.zeros(len(seeds), smoothing, window))
        if adjoint:
            psi = mlp.init_parameters(seeds, "adjoint").detach()
            for name, value in (
                ("psi", psi),
                ("psi_mean", torch.zeros_like(psi)),
                ("psi_square", torch.zeros_like(psi)),
            ):
                self.register_buffer(name, value)
            self.register_buffer("psi_step", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return h (R, M, d) at x (R, M, p)."""
        return self.mlp(self.theta, x)

    def smooth_gradient(self, v: Tensor, step: int) -> Tensor:
        """Return the mean of the last hypergradients (R, W), with v (R, W) that of this step (arXiv 2601.15363)."""
        return v if self.recent.shape[1] == 1 else moving_average_(self.recent, step, v)

    @property
    def adjoint_network(self) -> AdjointNetwork:
        """The adjoint network and its optimiser's state."""
        return AdjointNetwork(
            self.psi, AdamState({"psi": self.psi_mean}, {"psi": self.psi_square}, self.psi_step.squeeze(0))
        )

    @adjoint_network.setter
    def adjoint_network(self, after: AdjointNetwork) -> None:
        exp_avg, exp_avg_sq, step = after.state
        self.psi.copy_(after.psi)
        self.psi_mean.copy_(exp_avg["psi"])
        self.psi_square.copy_(exp_avg_sq["psi"])
        self.psi_step.fill_(float(step))
