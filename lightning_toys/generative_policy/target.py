"""Target: what a distribution of actions gives, of which most may be unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.training.noise import keyed_generator

Array = NDArray[np.float64]


class Target:
    """A distribution of actions. A class of somebody's own gives :meth:`log_prob`, or :meth:`sample`, or both.

    Of a density alone (``--data.target mine.Density``) samples are drawn within ``bounds`` by ``--data.sampler``. All
    else is optional, and what a class does not give is left out or estimated from samples: modes (``mode_weights``,
    :meth:`nearest`, :meth:`mode_shapes`), the exact flow (:meth:`marginal_velocity`), exact distances
    (:meth:`mean_distance` with :meth:`mean_self_distance`), :meth:`entropy`, :meth:`marginal`, :meth:`deconvolved`.

    Attributes:
        dim: D, the number of coordinates.
        bounds: the box that holds the samples drawn by a sampler, and that figures show: its low and its high end, each
            a number, or one for each coordinate.
        normalised: whether the density of :meth:`log_prob` integrates to 1; a constant factor may be left out else.
        mode_weights: probability of each mode (M,), which sum to 1; M = 0 where modes are not named, and then nothing
            counts them.
        scale: root mean square of a coordinate's deviation from its mean; preconditioning uses it. None: from samples.
        tail_fractions: probability beyond 3, 5 and 10 standard deviations of every mode, where that is known.
    """

    dim = 2
    bounds: tuple[float | Sequence[float], float | Sequence[float]] = (-1.0, 1.0)
    normalised: bool = True
    mode_weights: Tensor = torch.zeros(0, dtype=torch.float64)
    scale: float | None = None
    tail_fractions: Mapping[int, float] = {}

    @property
    def has_density(self) -> bool:
        """Whether the class gives :meth:`log_prob`."""
        return type(self).log_prob is not Target.log_prob

    @property
    def has_samples(self) -> bool:
        """Whether the class gives :meth:`sample`."""
        return type(self).sample is not Target.sample

    @property
    def has_modes(self) -> bool:
        """Whether modes are named, and :meth:`nearest` finds them."""
        return len(self.mode_weights) > 0

    @property
    def has_velocity(self) -> bool:
        """Whether the class gives :meth:`marginal_velocity`."""
        return type(self).marginal_velocity is not Target.marginal_velocity

    @property
    def has_distances(self) -> bool:
        """Whether the class gives :meth:`mean_distance` and :meth:`mean_self_distance`."""
        kind = type(self)
        return (
            kind.mean_distance is not Target.mean_distance and kind.mean_self_distance is not Target.mean_self_distance
        )

    def box(self) -> tuple[Tensor, Tensor]:
        """Return the low and the high end (D,) of ``bounds``, float64."""
        low, high = (torch.as_tensor(b, dtype=torch.float64).expand(self.dim) for b in self.bounds)
        return low, high

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Map uniforms on [0, 1) (...) and standard normals (..., D) to samples (..., D), elementwise.

        A fixed map, so that a draw depends on the noise's key alone.
        """
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats (...) for x (..., D), in x's dtype; -inf outside of the support."""
        raise NotImplementedError

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest mode (...) of x (..., D) and the distance to it (...) in its standard deviations."""
        raise NotImplementedError

    def entropy(self) -> float:
        """Return the differential entropy in nats; NaN where it is not known."""
        return math.nan

    def weights_inside(self) -> Tensor:
        """Return the probability (M,) of each mode and of [-1, 1]^D, where actions are; all of it unless overridden."""
        return self.mode_weights

    def share_within(self, k: float) -> float:
        """Return the probability of at most ``k`` standard deviations from the nearest mode, from 40 000 samples.

        NaN where the class gives no samples of its own.
        """
        if not self.has_samples:
            return math.nan
        g = keyed_generator(0, 0, "target/within")
        u, z = g.random(40_000), g.standard_normal((40_000, self.dim))
        parts = zip(*(torch.split(torch.from_numpy(x), 4000) for x in (u, z)), strict=True)
        return float(np.mean([float((self.nearest(self.sample(*p))[1] <= k).double().mean()) for p in parts]))

    def mode_shapes(self) -> tuple[Tensor, Tensor] | None:
        """Return the centre (M, D) and the standard deviation (M,) of each mode; None where modes are no Gaussians."""
        return None

    def marginal_velocity(self, z: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
        """Return E[dz_t/dt | z_t = z] for z_t = (1 - t) x + (t + sigma_min (1 - t)) e, x and e independent.

        Without it there is no ``--model.tangent oracle``, and no row of the exact flow.

        Args:
            z: points (..., D).
            t: times, broadcast against z's leading axes with a last axis of 1.
            sigma_min: standard deviation left at t = 0.

        Returns:
            The velocity (..., D).
        """
        raise NotImplementedError

    def mean_distance(self, x: Array) -> Array:
        """Return E|x - Y| (n,) for Y from the distribution and x (n, D)."""
        raise NotImplementedError

    def mean_self_distance(self) -> float:
        """Return E|Y - Y'| for two independent samples."""
        raise NotImplementedError

    def marginal(self, axes: Sequence[int]) -> Target | None:
        """Return the distribution of some coordinates; None where it is not known."""
        return self if self.has_density and list(axes) == list(range(self.dim)) else None

    def deconvolved(self, std: float) -> Target:
        """Return the distribution whose convolution with N(0, std^2 I) is this one.

        Raises:
            ToyError: there is none.
        """
        raise ToyError(f"{type(self).__name__} is no distribution convolved with N(0, {std:g}² I)")


class Empirical(Target):
    """Rows of a file, equally likely: no density, no modes.

    Args:
        rows: (N, D), float64.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.dim = rows.shape[1]
        self.bounds = rows.amin(0).clamp(max=-1.0).tolist(), rows.amax(0).clamp(min=1.0).tolist()
        # of equal rows it would be 0, which nothing can be divided by
        self.scale = max(1e-6, math.sqrt(float((rows - rows.mean(0)).square().mean())))

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """See :meth:`Target.sample`: the uniform selects the row."""
        at = (uniform.double() * len(self.rows)).long().clamp(max=len(self.rows) - 1)
        return self.rows.to(normal)[at]
