"""Samples of the target, each paired with noise by a coupling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import bounded, require
from lightning_toys.generative_policy.couplings import Coupling, Independent
from lightning_toys.generative_policy.mixture import Target, ThreeModes
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import BlockLoader, DrawnBlock, DrawnLoader, draw_nothing
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform
from lightning_toys.training.prefetch import PrefetchLoader, chunks


class Pairs:
    """Draws coupled pairs (x, e) for some replicas, keyed by (seed, step).

    Args:
        target: the distribution of x.
        coupling: which e goes with which x.
        seeds: one a replica.
        n: pairs of one step.
    """

    def __init__(self, target: Target, coupling: Coupling, seeds: Sequence[int], n: int) -> None:
        self.target, self.coupling = target, coupling
        self.component = NoiseStream(seeds, "data/component", (n,), uniform)
        self.place, self.noise = (NoiseStream(seeds, f"data/{k}", (n, target.dim)) for k in ("place", "noise"))

    def __call__(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return x and e, each (R, steps, n, D), of steps ``start`` to ``stop - 1``."""
        columns, like = [], torch.zeros(1)
        for step in range(start, stop):
            x = self.target.sample(self.component.at(step, like), self.place.at(step, like))
            rows = zip(x.numpy(), self.noise.at(step, like).numpy(), strict=True)
            e = np.stack([self.coupling.pair(a, b) for a, b in rows])
            columns.append(torch.cat([x, torch.from_numpy(e)], dim=-1))
        both = torch.stack(columns, dim=1)
        return both[..., : self.target.dim], both[..., self.target.dim :]


class MixtureData(ToyDataModule):
    """Fresh pairs (x, e) at every step: x from the target, e from N(0, I), coupled.

    Args:
        target: the distribution of x.
        coupling: which e goes with which x.
        batch_size: pairs of one optimiser step.
        num_workers: processes, on each rank, that prefetch draws; 0 draws in this process. The numbers are the same.
            With hundreds of replicas a GPU would wait for the draws.

    Raises:
        ToyError: a value is not allowed, or the batch is no multiple of the coupling's group.
    """

    drawn = True

    def __init__(
        self,
        target: Target | None = None,
        coupling: Coupling | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size)
        bounded("--data.num_workers", num_workers, 0, 1024)
        self.target = target if target is not None else ThreeModes()
        self.coupling = coupling if coupling is not None else Independent()
        self.num_workers = num_workers
        size = self.coupling.group_size
        require(
            batch_size % size == 0,
            f"--data.batch_size: {batch_size} is not allowed; give a multiple of --data.coupling.size {size}",
        )

    def loader(self, seeds: Sequence[int]) -> BlockLoader:
        """See :meth:`ToyDataModule.loader`."""
        n = self.batch_size
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if not getattr(module, "reads_data", True):
            return DrawnLoader(draw_nothing, n)
        target = getattr(module, "training_target", lambda target: target)(self.target)
        coupling = Independent() if self.pairs_on_device else self.coupling
        if self.num_workers == 0:
            return DrawnLoader(Pairs(target, coupling, seeds, n), n)
        parts = [Pairs(target, coupling, seeds[c], n) for c in chunks(len(seeds), self.num_workers)]
        return PrefetchLoader(parts, n, self.num_workers)

    @property
    def pairs_on_device(self) -> bool:
        """Whether draws are coupled on the training device; not in half precision, since Lightning rounds them."""
        assert self.trainer is not None
        halved = self.trainer.precision in ("bf16-true", "16-true")
        device = self.trainer.strategy.root_device
        fits = self.target.dim in self.coupling.device_dims
        return not halved and fits and self.coupling.supports_device(device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Couple a block of draws on the device, if :attr:`pairs_on_device`."""
        if not (isinstance(batch, DrawnBlock) and batch.columns and self.pairs_on_device):
            return batch
        x, e = batch.columns
        return batch._replace(columns=(x, self.coupling.pair_on_device(x, e)))

    def sample(self, seed: int, n: int, stream: str) -> Tensor:
        """Return n samples (n, D) of the target, float64, keyed by (seed, stream)."""
        generator = keyed_generator(seed, 0, stream)
        u, z = generator.random(n), generator.standard_normal((n, self.target.dim))
        return self.target.sample(torch.from_numpy(u), torch.from_numpy(z))
