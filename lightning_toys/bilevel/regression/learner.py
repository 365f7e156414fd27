"""The parameters and buffers in a checkpoint: h, lambda, hypergradients that are averaged, an algorithm's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.bilevel.vectors import moving_average_
from lightning_toys.errors import require


class Learner(nn.Module):
    """Parameters of R replicas: ``theta`` (R, P) of h, and ``free`` (R, W), lambda itself or its logits, lag 1 first.

    ``recent`` (R, smoothing, W) holds the last hypergradients. What an algorithm keeps is in buffers of its names.

    Args:
        mlp: the network h.
        seeds: one seed a replica.
        window: W, the number of lags.
        initial_weight: lambda at the start: one number, or W; none makes logits, which start at 0.
        smoothing: hypergradients that are averaged.
        memory: an algorithm's, by name.

    Raises:
        ToyError: a memory is no tensor, or its name is taken.
    """

    recent: Tensor

    def __init__(
        self,
        mlp: MLP,
        seeds: Sequence[int],
        window: int,
        initial_weight: float | np.ndarray | None,
        smoothing: int,
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.theta = mlp.init_parameters(seeds, "h")
        start = torch.as_tensor(0.0 if initial_weight is None else initial_weight, dtype=torch.get_default_dtype())
        self.free = nn.Parameter(start.expand(len(seeds), window).clone())
        self.register_buffer("recent", torch.zeros(len(seeds), smoothing, window))
        self.kept = tuple(memory or {})
        for name, value in (memory or {}).items():
            fits = isinstance(name, str) and name.isidentifier() and not hasattr(self, name)
            where = "--model.algorithm: memory"
            require(fits, f"{where}: the name {name!r} is not allowed; give another one, of letters, digits and _")
            kind = type(value).__name__
            require(isinstance(value, Tensor), f"{where}: {name} is a {kind}; give a tensor (R, ...)")
            self.register_buffer(name, value.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return h (R, M, d) at x (R, M, p)."""
        return self.mlp(self.theta, x)

    @property
    def memory(self) -> dict[str, Tensor]:
        """What the algorithm keeps, by name; change it in place."""
        return {name: self.get_buffer(name) for name in self.kept}

    def smooth_gradient(self, v: Tensor, step: int) -> Tensor:
        """Return the mean of the last hypergradients (R, W), with v (R, W) that of this step (arXiv 2601.15363)."""
        return v if self.recent.shape[1] == 1 else moving_average_(self.recent, step, v)
