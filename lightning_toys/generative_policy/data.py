"""Samples of the target law, each with the noise that a coupling gives it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import require
from lightning_toys.generative_policy.couplings import Coupling, Independent
from lightning_toys.generative_policy.mixture import Target, ThreeModes
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform


class MixtureData(ToyDataModule):
    """Fresh pairs (x, e) at every step: x from the target, e from N(0, I), coupled.

    Args:
        target: the law of x.
        coupling: which e goes with which x.
        batch_size: pairs of one optimiser step.
    """

    drawn = True

    def __init__(self, target: Target | None = None, coupling: Coupling | None = None, batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.target = target if target is not None else ThreeModes()
        self.coupling = coupling if coupling is not None else Independent()
        size = self.coupling.divides
        require(
            batch_size % size == 0,
            f"--data.batch_size: {batch_size} is not allowed; give a multiple of --data.coupling.size {size}",
        )

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """See :meth:`ToyDataModule.loader`."""
        n = self.batch_size
        component = NoiseStream(seeds, "data/component", (n,), uniform)
        place, noise = NoiseStream(seeds, "data/place", (n, 2)), NoiseStream(seeds, "data/noise", (n, 2))
        like = torch.zeros(1)
        assert self.trainer is not None
        reads = getattr(self.trainer.lightning_module, "reads_data", True)

        def draw(start: int, stop: int) -> tuple[Tensor, ...]:
            if not reads:
                return ()
            columns = []
            for step in range(start, stop):
                x = self.target.sample(component.at(step, like), place.at(step, like))
                rows = zip(x.numpy(), noise.at(step, like).numpy(), strict=True)
                e = np.stack([self.coupling.pair(a, b) for a, b in rows])
                columns.append(torch.cat([x, torch.from_numpy(e)], dim=-1))
            both = torch.stack(columns, dim=1)
            return both[..., :2], both[..., 2:]

        return DrawnLoader(draw, n)

    def sample(self, seed: int, n: int, stream: str) -> Tensor:
        """Return n samples (n, 2) of the target, float64, keyed by (seed, stream)."""
        generator = keyed_generator(seed, 0, stream)
        u, z = generator.random(n), generator.standard_normal((n, 2))
        return self.target.sample(torch.from_numpy(u), torch.from_numpy(z))
