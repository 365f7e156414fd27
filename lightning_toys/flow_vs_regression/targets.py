"""Target functions f: [0, 1] -> R^D, exact in float64.

Trigonometric sums, the same projected on one subspace or on one subspace an interval, and curves of a rotation group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import MOST, WHOLE, bounded, check_settings, require
from lightning_toys.training.noise import keyed_generator

# (c (M, 1), the distribution of x0 that a metric wants, None: the evaluation's) -> predictions (R, K, M, D), float64
Predict = Callable[[Tensor, Literal["zeros", "gaussian"] | None], Tensor]

MAX_SIZE = 100_000  # components times dimensions: each has a prime number of its own
# half of 49 pi, the highest frequency that 50 points on a grid resolve: four points to the fastest period
DEFAULT_MAX_FREQUENCY = 77.0


def primes(n: int) -> list[int]:
    """Return the first n primes.

    >>> primes(5)
    [2, 3, 5, 7, 11]
    """
    most = 12 if n < 6 else math.ceil(n * (math.log(n) + math.log(math.log(n))))  # the n-th is below (Rosser 1941)
    sieve = np.ones(most + 1, dtype=bool)
    sieve[:2] = False
    for p in range(2, math.isqrt(most) + 1):
        if sieve[p]:
            sieve[p * p :: p] = False
    found: list[int] = np.flatnonzero(sieve)[:n].tolist()
    return found


def check_seed(name: str, seed: int | None) -> None:
    """Refuse a seed that is none with a :class:`ToyError` that names the setting."""
    if seed is not None:
        bounded(f"--data.target.{name}", seed, 0, WHOLE)


class Target:
    """A function of c on [0, 1] with values in R^dim.

    Attributes:
        dim: D, the number of outputs.
    """

    dim: int

    def __call__(self, c: Tensor) -> Tensor:
        """Map c (M, 1), computed with in float64, to f(c) (M, dim), float64."""
        raise NotImplementedError

    @property
    def highest_frequency(self) -> float:
        """The largest angular frequency in f, radians per unit of c; N grid points resolve up to pi (N - 1).

        0 where it is not known: then nobody is warned of too few points.
        """
        return 0.0

    def extra_metrics(self, c: Tensor, prediction: Tensor, predict: Predict) -> dict[str, Tensor]:
        """Return metrics of this target's own, by name, (R,) each; none here.

        Args:
            c: the evaluation grid (M, 1).
            prediction: predictions on it (R, K, M, D), float64.
            predict: predictions at any other points, for a metric that has points, or a distribution of x0, of its own.
        """
        return {}


class Trigonometric(Target):
    """f_d(c) = sum_j w_dj trig_j(omega_dj c + phi_dj), with sin for even j and cos for odd j.

    With m = d K + j and primes p_0 = 2, p_1 = 3, ...: omega = p_{2m}, phi = p_{2m+1} / 10 and w = 1 or 1 / omega.
    The default is sin(2c + .3) + cos(5c + .7) + sin(11c + 1.3).

    Args:
        dim: D, number of outputs.
        components: K, number of terms in each output.
        weights: ``uniform`` (w = 1) or ``inverse_freq`` (w = 1 / omega).
        frequency_rule: ``published`` keeps the primes; ``nyquist`` divides them all by one number, where it must, so
            that the largest is ``max_frequency``.
        max_frequency: bound of the ``nyquist`` rule, radians per unit of c; with the default four of 50 points fall
            into the shortest period.
        frequency_seed: draw a random subset of the first 2 D K primes instead of every second one.
        phase_seed: draw the phases from U(0, 2 pi) instead.
        weight_seed: multiply each weight by a draw from U(-1, 1).

    Raises:
        ToyError: a value is not allowed.

    Example:
        >>> f = Trigonometric()
        >>> c = torch.tensor([[0.5]], dtype=torch.float64)
        >>> round(f(c).item(), 6) == round(math.sin(1.3) + math.cos(3.2) + math.sin(6.8), 6)
        True
    """

    def __init__(
        self,
        dim: int = 1,
        components: int = 3,
        weights: Literal["uniform", "inverse_freq"] = "uniform",
        frequency_rule: Literal["nyquist", "published"] = "nyquist",
        max_frequency: float = DEFAULT_MAX_FREQUENCY,
        frequency_seed: int | None = None,
        phase_seed: int | None = None,
        weight_seed: int | None = None,
    ) -> None:
        check_settings(Trigonometric, locals(), "--data.target.")
        bounded("--data.target.dim", dim, 1)
        bounded("--data.target.components", components, 1)
        require(
            dim * components <= MAX_SIZE,
            f"--data.target.dim, --data.target.components: {dim} times {components} is not allowed; "
            f"give at most {MAX_SIZE}",
        )
        bounded("--data.target.max_frequency", max_frequency, 0.0, above=True)
        check_seed("frequency_seed", frequency_seed)
        check_seed("phase_seed", phase_seed)
        check_seed("weight_seed", weight_seed)
        self.dim, self.components = dim, components
        n = dim * components
        p = primes(2 * n)
        omega = np.array(p[0::2], dtype=np.float64)
        if frequency_seed is not None:
            omega = keyed_generator(frequency_seed, 0, "target/frequency").choice(p, n, replace=False).astype(float)
        phi = np.array(p[1::2], dtype=np.float64) / 10
        if phase_seed is not None:
            phi = keyed_generator(phase_seed, 0, "target/phase").uniform(0, 2 * math.pi, n)
        if frequency_rule == "nyquist":
            omega = omega * min(1.0, max_frequency / omega.max())
        w = np.ones(n) if weights == "uniform" else 1 / omega
        if weight_seed is not None:
            w = w * keyed_generator(weight_seed, 0, "target/weight").uniform(-1, 1, n)
        shape = (dim, components)
        self.omega, self.phi, self.w = (torch.from_numpy(a.reshape(shape).copy()) for a in (omega, phi, w))

    @property
    def highest_frequency(self) -> float:
        """See :attr:`Target.highest_frequency`."""
        return float(self.omega.max())

    def sums(self, c: Tensor) -> Tensor:
        """Evaluate the trigonometric sums, (M, 1) to (M, dim)."""
        angle = c.double().unsqueeze(-1) * self.omega + self.phi
        even = torch.arange(self.components) % 2 == 0
        return (torch.where(even, angle.sin(), angle.cos()) * self.w).sum(-1)

    def __call__(self, c: Tensor) -> Tensor:
        """See :meth:`Target.__call__`."""
        return self.sums(c)


def random_projector(dim: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the projector on a random subspace, and an orthonormal basis of it.

    P = A (A'A)^-1 A' for a Gaussian A (dim, rank) of that seed. Shapes (dim, dim) and (dim, rank), float64.
    """
    a = torch.from_numpy(keyed_generator(seed, 0, "target/projector").standard_normal((dim, rank)))
    basis = torch.linalg.qr(a).Q
    return basis @ basis.T, basis


class Projected(Trigonometric):
    """g(c) = P f(c): a trigonometric f in R^D, projected on a subspace of dimension ``rank``.

    Args:
        rank: r, dimension of the subspace; at most ``dim``.
        projection_seed: seed of the Gaussian matrix that spans the subspace.
        dim: D.
        components: K.
        kwargs: as for :class:`Trigonometric`.

    Attributes:
        projector: P (D, D).
        basis: orthonormal basis of the subspace (D, r).
    """

    def __init__(
        self, rank: int = 2, projection_seed: int = 0, dim: int = 8, components: int = 3, **kwargs: Any
    ) -> None:
        check_settings(Projected, locals(), "--data.target.")
        super().__init__(dim=dim, components=components, **kwargs)
        require(1 <= rank <= dim, f"--data.target.rank: {rank} is not allowed; give an integer from 1 to dim = {dim}")
        check_seed("projection_seed", projection_seed)
        self.rank = rank
        self.projector, self.basis = random_projector(dim, rank, projection_seed)

    def __call__(self, c: Tensor) -> Tensor:
        """See :meth:`Target.__call__`."""
        return self.sums(c) @ self.projector


class Piecewise(Trigonometric):
    """g(c) = P_i f(c) on the i-th of equal intervals, each with a subspace of its own (seed ``projection_seed`` + i).

    Args:
        intervals: number of intervals of [0, 1].
        rank: dimension of each subspace; at most ``dim``.
        projection_seed: seed of the first interval's subspace.
        boundary_width: a point this near to an interior boundary counts as at the boundary (half-width).
        dim: D.
        components: K.
        kwargs: as for :class:`Trigonometric`.

    Attributes:
        projectors: P_i (intervals, D, D).
        bases: an orthonormal basis (D, rank) of each subspace.
    """

    def __init__(
        self,
        intervals: int = 10,
        rank: int = 3,
        projection_seed: int = 0,
        boundary_width: float = 0.03,
        dim: int = 8,
        components: int = 8,
        **kwargs: Any,
    ) -> None:
        check_settings(Piecewise, locals(), "--data.target.")
        super().__init__(dim=dim, components=components, **kwargs)
        require(1 <= rank <= dim, f"--data.target.rank: {rank} is not allowed; give an integer from 1 to dim = {dim}")
        bounded("--data.target.intervals", intervals, 2, 10_000)
        require(
            intervals * dim**2 <= MOST,
            f"--data.target.dim: {dim} is not allowed with {intervals} of --data.target.intervals, each of which has a "
            f"matrix of dim^2; give at most {math.isqrt(MOST // intervals)}",
        )
        require(
            0 < boundary_width <= 0.5 / intervals,
            f"--data.target.boundary_width: {boundary_width} is not allowed; give a number in (0, {0.5 / intervals}]",
        )
        check_seed("projection_seed", projection_seed)
        self.intervals, self.rank, self.boundary_width = intervals, rank, boundary_width
        pairs = [self.draw_projector(projection_seed + i) for i in range(intervals)]
        self.projectors = torch.stack([p for p, _ in pairs])
        self.bases = [b for _, b in pairs]

    def draw_projector(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return an interval's projector (D, D) and an orthonormal basis (D, rank), see :func:`random_projector`."""
        return random_projector(self.dim, self.rank, seed)

    def interval(self, c: Tensor) -> Tensor:
        """Return the interval's index of each c, (M, 1) to (M,); c = 1 belongs to the last."""
        return (c.double().squeeze(-1) * self.intervals).floor().long().clamp(0, self.intervals - 1)

    def __call__(self, c: Tensor) -> Tensor:
        """See :meth:`Target.__call__`."""
        return torch.einsum("md,mde->me", self.sums(c), self.projectors[self.interval(c)])

    def boundary_projectors(self) -> Tensor:
        """Return the projectors on span[P_{i-1}, P_i] at the interior boundaries i: (intervals - 1, D, D)."""
        spans = []
        for left, right in zip(self.bases[:-1], self.bases[1:], strict=True):
            u, s, _ = torch.linalg.svd(torch.cat([left, right], dim=1), full_matrices=False)
            u = u[:, s > 1e-10]
            spans.append(u @ u.T)
        return torch.stack(spans)


class Rotation(Target):
    """f(c) = concat_k w_k(c) exp(alpha_k c A) e_1 in R^{K n}, alpha = linspace(0, 6.28, K).

    Args:
        size: n, 2 or 3. A is the generator of the plane's rotations, or of those about a random axis.
        components: K.
        amplitude: ``constant`` (w_k from U(-1, 1)) or ``trigonometric`` (w_k(c) as in :class:`Trigonometric`).
        terms: terms in each trigonometric amplitude.
        seed: seed of the axis and the constant amplitudes.
        frequency_rule: as for :class:`Trigonometric`, for the trigonometric amplitudes.
        max_frequency: likewise.

    Attributes:
        alpha: the angular speeds (K,).
        generator: A (n, n), antisymmetric.
    """

    def __init__(
        self,
        size: int = 2,
        components: int = 8,
        amplitude: Literal["constant", "trigonometric"] = "constant",
        terms: int = 1,
        seed: int = 0,
        frequency_rule: Literal["nyquist", "published"] = "nyquist",
        max_frequency: float = DEFAULT_MAX_FREQUENCY,
    ) -> None:
        check_settings(Rotation, locals(), "--data.target.")
        require(size in (2, 3), f"--data.target.size: {size} is not allowed; give 2 or 3")
        bounded("--data.target.components", components, 1, MAX_SIZE)
        bounded("--data.target.terms", terms, 1)
        bounded("--data.target.max_frequency", max_frequency, 0.0, above=True)
        check_seed("seed", seed)
        self.size, self.components, self.dim = size, components, components * size
        self.alpha = torch.linspace(0, 6.28, components, dtype=torch.float64)
        if size == 2:
            self.generator = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        else:
            axis = keyed_generator(seed, 0, "target/axis").standard_normal(3)
            x, y, z = axis / np.linalg.norm(axis)
            self.generator = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
        self.constant_amplitudes = torch.from_numpy(
            keyed_generator(seed, 0, "target/amplitude").uniform(-1, 1, components)
        )
        self.trigonometric_amplitudes = None
        if amplitude == "trigonometric":
            self.trigonometric_amplitudes = Trigonometric(
                dim=components, components=terms, frequency_rule=frequency_rule, max_frequency=max_frequency
            )

    @property
    def highest_frequency(self) -> float:
        """See :attr:`Target.highest_frequency`; a product's frequencies add."""
        return float(self.alpha.max()) + (
            self.trigonometric_amplitudes.highest_frequency if self.trigonometric_amplitudes else 0.0
        )

    @property
    def start(self) -> Tensor:
        """The unit vector (n,) that is turned: the first axis."""
        return torch.eye(self.size, dtype=torch.float64)[0]

    def directions(self, c: Tensor) -> Tensor:
        """Return the unit vectors v_k(c) = exp(alpha_k c A) e_1, e_1 = :attr:`start`: c (M, 1) to (M, K, n)."""
        angle = c.double().view(-1, 1, 1, 1) * self.alpha.view(1, -1, 1, 1)
        rotation: Tensor = torch.linalg.matrix_exp(angle * self.generator)
        return rotation @ self.start

    def __call__(self, c: Tensor) -> Tensor:
        """See :meth:`Target.__call__`."""
        w = (
            self.trigonometric_amplitudes.sums(c)
            if self.trigonometric_amplitudes
            else self.constant_amplitudes.expand(c.shape[0], -1)
        )
        return (w.unsqueeze(-1) * self.directions(c)).flatten(1)
