"""Samples of the target, each paired with noise by a coupling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_toys.errors import bounded, require
from lightning_toys.generative_policy.couplings import Coupling, Independent
from lightning_toys.generative_policy.mixture import ThreeModes
from lightning_toys.generative_policy.own import check_coupling, check_target, drawn_particles
from lightning_toys.generative_policy.samplers import AnnealedMala, Particles, Pool, Sampler, sampled_entropy
from lightning_toys.generative_policy.target import Target
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import BlockLoader, DrawnBlock, DrawnLoader, draw_nothing
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform
from lightning_toys.training.own_classes import is_own
from lightning_toys.training.prefetch import PrefetchLoader, chunks

TRAINING = "training"  # the stream of the particles that a policy learns from


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

    def samples(self, step: int, like: Tensor) -> Tensor:
        """Return x of one step (R, n, D), in the dtype of ``like``."""
        return self.target.sample(self.component.at(step, like), self.place.at(step, like)).to(like)

    def __call__(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return x and e, each (R, steps, n, D), of steps ``start`` to ``stop - 1``."""
        columns, like = [], torch.zeros(1)
        for step in range(start, stop):
            x = self.samples(step, like)
            rows = zip(x.numpy(), self.noise.at(step, like).numpy(), strict=True)
            e = np.stack([self.coupling.pair(a, b) for a, b in rows])
            columns.append(torch.cat([x, torch.from_numpy(e)], dim=-1))
        both = torch.stack(columns, dim=1)
        return both[..., : self.target.dim], both[..., self.target.dim :]


def fine_uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniforms on [0, 1) in float64: in float32 they are too few for a choice among a million points."""
    return generator.random(shape)


class PooledPairs(Pairs):
    """Pairs whose x are drawn from weighted points.

    Args:
        pools: the points, one pool a replica.
        target: what they are of.
        coupling: which e goes with which x.
        seeds: one a replica.
        n: pairs of one step.
    """

    def __init__(self, pools: Sequence[Pool], target: Target, coupling: Coupling, seeds: Sequence[int], n: int) -> None:
        super().__init__(target, coupling, seeds, n)
        self.pools = list(pools)
        self.component = NoiseStream(seeds, "data/component", (n,), fine_uniform)

    def samples(self, step: int, like: Tensor) -> Tensor:
        """See :meth:`Pairs.samples`."""
        u = self.component.at(step, torch.zeros(1, dtype=torch.float64)).numpy()
        x = np.stack([pool.at(row) for pool, row in zip(self.pools, u, strict=True)])
        return torch.from_numpy(x).to(like)


def warn_of_integral(target: Target, found: Particles) -> None:
    """Warn where a density that should integrate to 1 does not, by more than five errors of the sampler and .1.

    It is no error: some of a density may lie out of the bounds.
    """
    far = abs(found.log_z) > 0.1 + 5 / math.sqrt(max(1.0, found.effective))
    if target.has_density and target.normalised and far:
        rank_zero_warn(
            f"--data.target: {type(target).__name__}.log_prob integrates to exp({found.log_z:.3g}) over its bounds, "
            "not to 1; set normalised = False where a constant is left out, or give wider bounds"
        )


class MixtureData(ToyDataModule):
    """Fresh pairs (x, e) at every step: x from the target, e from N(0, I), coupled.

    Args:
        target: the distribution of x: a shipped one, or somebody's own, of which a density is enough.
        coupling: which e goes with which x.
        batch_size: pairs of one optimiser step.
        num_workers: processes, on each rank, that prefetch draws; 0 draws in this process. The numbers are the same.
            With hundreds of replicas a GPU would wait for the draws.
        sampler: draws the samples that a policy learns from, by the target's density alone, and where the target has
            none of its own those that it is compared with; each replica its own. By default the target's own samples,
            and :class:`AnnealedMala` where it has none.

    Raises:
        ToyError: a value is not allowed, or the batch is no multiple of the coupling's group.
    """

    drawn = True
    baseline = "target"  # the row of results that other samples of the target have

    def __init__(
        self,
        target: Target | None = None,
        coupling: Coupling | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__(batch_size)
        bounded("--data.num_workers", num_workers, 0, 1024)
        self.target = target if target is not None else ThreeModes()
        self.coupling = coupling if coupling is not None else Independent()
        self.num_workers = num_workers
        check_target(self.target)
        check_coupling(self.coupling, self.target.dim)
        size = self.coupling.group_size
        what = f"{type(self.coupling).__name__}.group_size" if is_own(self.coupling) else "--data.coupling.size"
        require(
            batch_size % size == 0,
            f"--data.batch_size: {batch_size} is not allowed; give a multiple of {what} {size}",
        )
        name = type(self.target).__name__
        require(
            sampler is None or self.target.has_density,
            f"--data.sampler: {type(sampler).__name__} is not allowed with {name}, which has no log_prob",
        )
        draws = sampler is None or type(sampler).draw is not Sampler.draw
        require(draws, f"--data.sampler: {type(sampler).__name__} has no draw; give one (see Sampler)")
        self.sampler = sampler if sampler is not None or self.target.has_samples else AnnealedMala()
        self.cache: dict[tuple[int, str], Particles] = {}

    @property
    def training_target(self) -> Target:
        """The distribution of the samples for training: the target, or what the module makes of it."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        made: Target = getattr(module, "training_target", lambda target: target)(self.target)
        return made

    @property
    def scale(self) -> float:
        """The target's root mean square deviation of a coordinate from its mean, or that of samples."""
        if self.target.scale is not None:
            return self.target.scale
        if self.target.has_samples:
            return float((x := self.sample(0, 20_000, "scale")).sub(x.mean(0)).square().mean().sqrt())
        found = self.particles(0, "scale")
        weights = found.log_weights.exp().unsqueeze(-1)
        centre = (weights * found.points).sum(0)
        return float((weights * (found.points - centre).square()).sum().div(self.target.dim).sqrt())

    # for training

    def pairs(self, target: Target, coupling: Coupling, seeds: Sequence[int]) -> Pairs:
        """Return the draw of some replicas' pairs."""
        if self.sampler is None:
            return Pairs(target, coupling, seeds, self.batch_size)
        pools = [Pool.of(self.particles(s, TRAINING)) for s in seeds]
        return PooledPairs(pools, target, coupling, seeds, self.batch_size)

    def loader(self, seeds: Sequence[int]) -> BlockLoader:
        """See :meth:`ToyDataModule.loader`."""
        n = self.batch_size
        assert self.trainer is not None
        if not getattr(self.trainer.lightning_module, "reads_data", True):
            return DrawnLoader(draw_nothing, n)
        target = self.training_target
        coupling = Independent() if self.pairs_on_device else self.coupling
        if self.num_workers == 0:
            return DrawnLoader(self.pairs(target, coupling, seeds), n)
        parts = [self.pairs(target, coupling, seeds[c]) for c in chunks(len(seeds), self.num_workers)]
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

    # for evaluation

    def particles(self, seed: int, stream: str) -> Particles:
        """Return the sampler's weighted particles of the target, keyed by (seed, stream); drawn once.

        Args:
            seed: of a replica.
            stream: :data:`TRAINING`, or the name of another use.
        """
        if (seed, stream) not in self.cache:
            assert self.sampler is not None
            target = self.training_target if stream == TRAINING else self.target
            found = self.cache[seed, stream] = drawn_particles(self.sampler, target, seed, stream)
            warn_of_integral(target, found)
        return self.cache[seed, stream]

    def sample(self, seed: int, n: int, stream: str) -> Tensor:
        """Return n samples (n, D) of the target, float64, keyed by (seed, stream)."""
        generator = keyed_generator(seed, 0, stream)
        u = generator.random(n)
        if not self.target.has_samples:
            return torch.from_numpy(Pool.of(self.particles(seed, stream)).at(u))
        z = generator.standard_normal((n, self.target.dim))
        return self.target.sample(torch.from_numpy(u), torch.from_numpy(z)).double()

    def reference(self, seed: int, n: int) -> Tensor:
        """Return at most n samples (m, D), float64, that those of the replica with this seed are compared with."""
        return self.sample(seed, n, "evaluation/target")

    def another(self, seed: int, n: int) -> Tensor:
        """Return other samples (m, D) of the target, float64: what no policy can do better than."""
        return self.sample(seed, n, "evaluation/another")

    def baseline_metrics(self, seeds: Sequence[int]) -> dict[str, float]:
        """Return what is known of the target itself, for its row of results."""
        if self.target.has_samples or self.sampler is None:
            exact = self.target.entropy()
            return {"entropy_exact": exact} if np.isfinite(exact) else {}
        found = [sampled_entropy(self.particles(s, "evaluation/target"), self.target) for s in seeds]
        return {"entropy_sampled": float(np.mean(found))}

    def sampler_metrics(self, seeds: Sequence[int], trained: bool) -> dict[str, list[float]]:
        """Return metrics of the sampler, one value a replica; none where the target's own samples are taken.

        Args:
            seeds: the replicas'.
            trained: whether the policy learns from samples: then they are of those, and of the evaluation's else.
        """
        if self.sampler is None or not (trained or not self.target.has_samples):
            return {}
        found = [self.particles(s, TRAINING if trained else "evaluation/target") for s in seeds]
        return {"effective_samples": [p.effective for p in found], "log_z": [p.log_z for p in found]}

    def log_z(self, seeds: Sequence[int]) -> list[float] | None:
        """Return the logarithm of the density's integral for each replica: 0, an estimate, or None where unknown."""
        if not self.target.has_density:
            return None
        if self.target.normalised:
            return [0.0] * len(seeds)
        if self.sampler is None:
            return None
        return [self.particles(s, "evaluation/target").log_z for s in seeds]
