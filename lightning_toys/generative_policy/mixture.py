"""Target distributions of actions in [-1, 1]^D: mixtures of isotropic Gaussians, all in closed form, and others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, hyp1f1, i0e, i1e
from scipy.stats import chi2
from torch import Tensor

from lightning_toys.errors import ToyError, bounded, check_settings, require
from lightning_toys.generative_policy.quadrature import normal_rule
from lightning_toys.generative_policy.target import Target

Array = NDArray[np.float64]
MAX_MAGNITUDE = 1e9  # of a mixture's parameters: the squares of samples stay finite in single precision


class Mixture(Target):
    """sum_i w_i N(mu_i, s_i^2 I).

    Args:
        means: centres (M, D).
        stds: one standard deviation for all components, or one each.
        weights: relative weights; equal ones if left out.
        modes: index of the mode that each component belongs to; each is its own if left out.

    Raises:
        ToyError: a value is not allowed.

    Example:
        >>> mixture = Mixture([[0.0, 0.0], [1.0, 0.0]], stds=0.1)
        >>> mixture.nearest(torch.tensor([0.8, 0.0]))[0].item()
        1
    """

    scale: float

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        stds: float | Sequence[float] = 0.02,
        weights: Sequence[float] | None = None,
        modes: Sequence[int] | None = None,
    ) -> None:
        n = len(means)
        flag = "--data.target"
        require(n >= 1, f"{flag}.means: [] is not allowed; give at least one centre [x, y]")
        lists = all(isinstance(m, Sequence) and len(m) == len(means[0]) > 0 for m in means)
        require(lists, f"{flag}.means: {list(means)} is not allowed; a centre is [x, y], each of as many coordinates")
        self.dim = len(means[0])
        for v in (float(v) for m in means for v in m):
            require(
                abs(v) <= MAX_MAGNITUDE,
                f"{flag}.means: {v} is not allowed; give numbers up to {MAX_MAGNITUDE:g} in size",
            )
        each = [float(stds)] * n if isinstance(stds, int | float) else [float(s) for s in stds]
        require(len(each) == n, f"{flag}.stds: {len(each)} numbers do not fit {n} means")
        for s in each:
            require(
                0 < s <= MAX_MAGNITUDE, f"{flag}.stds: {s} is not allowed; give numbers > 0, up to {MAX_MAGNITUDE:g}"
            )
        given = [1.0] * n if weights is None else [float(w) for w in weights]
        require(len(given) == n, f"{flag}.weights: {len(given)} numbers do not fit {n} means")
        for w in given:
            bounded(f"{flag}.weights", w, 0.0, MAX_MAGNITUDE, above=True)
        groups = list(range(n)) if modes is None else list(modes)
        require(
            len(groups) == n and max(groups) < n and set(groups) == set(range(max(groups) + 1)),
            f"{flag}.modes: {groups} is not allowed; give {n} integers that leave none out from 0 on",
        )
        self.means = torch.tensor([list(m) for m in means], dtype=torch.float64)
        self.stds = torch.tensor(each, dtype=torch.float64)
        self.weights = torch.tensor(given, dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        self.modes = torch.tensor(groups)
        self.mode_weights = torch.zeros(max(groups) + 1, dtype=torch.float64).index_add(0, self.modes, self.weights)
        centre = self.weights @ self.means
        spread = (self.means - centre).square().sum(1) / self.dim + self.stds.square()
        self.scale = math.sqrt(float(self.weights @ spread))
        gaps = torch.cdist(self.means, self.means).fill_diagonal_(torch.inf)
        self.separated = bool((gaps > 20 * self.stds.max()).all())
        # beyond k standard deviations of its own centre: exp(-k^2 / 2) in two dimensions
        self.tail_fractions = {k: float(chi2.sf(k**2, self.dim)) for k in (3, 5, 10)} if self.separated else {}
        self.cached_entropy: float | None = None

    def parameters_like(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means (M, 2), stds (M,) and weights (M,) on x's device and in its dtype."""
        return self.means.to(x), self.stds.to(x), self.weights.to(x)

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """See :meth:`Target.sample`: the uniform selects the component, the normal the point."""
        means, stds, weights = self.parameters_like(normal)
        edges = weights.cumsum(0)[:-1].contiguous()
        component = torch.searchsorted(edges, uniform.to(normal).contiguous(), right=True)
        return torch.addcmul(means[component], stds[component].unsqueeze(-1), normal)

    def log_prob(self, x: Tensor) -> Tensor:
        """See :meth:`Target.log_prob`."""
        means, stds, weights = self.parameters_like(x)
        # components along the first axis: reductions over a short last axis are slow, and this is in a training loss
        shape = (-1, *[1] * (x.dim() - 1))
        # |x - mu|^2 from differences: expanding the square would lose all digits at s = .02
        square = sum((x[..., i] - means[:, i].view(shape)).square() for i in range(self.dim))
        height = weights.log() - self.dim * (stds.log() + 0.5 * math.log(2 * math.pi))
        return torch.logsumexp(height.view(shape) - square * (0.5 / stds.square()).view(shape), dim=0)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Target.nearest`."""
        means, stds, _ = self.parameters_like(x)
        distance = (x.unsqueeze(-2) - means).square().sum(-1).sqrt() / stds
        smallest, component = distance.min(-1)
        return self.modes.to(component.device)[component], smallest

    def entropy(self) -> float:
        """Return the entropy in nats by quadrature per component, exact if they do not overlap."""
        if self.cached_entropy is None:
            xi, weight = normal_rule(self.dim, min(61, round(15_000 ** (1 / self.dim))))
            # log p + |xi|^2 / 2 is constant where components are apart, and |xi|^2 has the mean D
            half = 0.5 * xi.square().sum(-1)
            means = [
                float((self.log_prob(mu + s * xi) + half) @ weight) for mu, s in zip(self.means, self.stds, strict=True)
            ]
            self.cached_entropy = self.dim / 2 - sum(w * m for w, m in zip(self.weights.tolist(), means, strict=True))
        return self.cached_entropy

    def weights_inside(self) -> Tensor:
        """See :meth:`Target.weights_inside`."""
        std = self.stds.unsqueeze(1)
        inside = torch.special.ndtr((1 - self.means) / std) - torch.special.ndtr((-1 - self.means) / std)
        return torch.zeros_like(self.mode_weights).index_add(0, self.modes, self.weights * inside.prod(1))

    def share_within(self, k: float) -> float:
        """See :meth:`Target.share_within`; of components that are apart it is exact."""
        return float(chi2.cdf(k**2, self.dim)) if self.separated else super().share_within(k)

    def mode_shapes(self) -> tuple[Tensor, Tensor] | None:
        """See :meth:`Target.mode_shapes`: where each component is a mode."""
        return (self.means, self.stds) if self.modes.tolist() == list(range(len(self.means))) else None

    def marginal(self, axes: Sequence[int]) -> Mixture:
        """See :meth:`Target.marginal`: the same components and modes."""
        means = self.means[:, list(axes)].tolist()
        return Mixture(means, self.stds.tolist(), self.weights.tolist(), self.modes.tolist())

    def deconvolved(self, std: float) -> Mixture:
        """See :meth:`Target.deconvolved`: of a mixture the one with stds sqrt(s_i^2 - std^2)."""
        least = float(self.stds.min())
        if std >= least:
            raise ToyError(f"no distribution convolved with N(0, {std:g}² I) has a mode of width {least:g}")
        stds = (self.stds.square() - std**2).sqrt()
        return Mixture(self.means.tolist(), stds.tolist(), self.weights.tolist(), self.modes.tolist())

    def marginal_velocity(self, z: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
        """See :meth:`Target.marginal_velocity`.

        Within component i, (v, z) is Gaussian: E[v | z] = -mu_i + ((1 - s) b - (1 - t) s_i^2) / c_i (z - (1 - t) mu_i)
        with b = t + s (1 - t) and c_i = (1 - t)^2 s_i^2 + b^2, s = sigma_min (Lipman et al. 2022 for one component).
        Mixing them by their responsibilities gives the answer.
        """
        means, stds, weights = self.parameters_like(z)
        signal, noise = 1 - t, t + sigma_min * (1 - t)
        variance = (signal * stds).square() + noise.square()  # (..., M)
        offset = z.unsqueeze(-2) - signal.unsqueeze(-1) * means  # (..., M, D)
        log_weight = weights.log() - variance.log() * (self.dim / 2) - 0.5 * offset.square().sum(-1) / variance
        responsibility = log_weight.softmax(-1)
        slope = ((1 - sigma_min) * noise - signal * stds.square()) / variance
        return (responsibility.unsqueeze(-1) * (slope.unsqueeze(-1) * offset - means)).sum(-2)

    def mean_distance(self, x: Array) -> Array:
        """See :meth:`Target.mean_distance`: a weighted sum of means of Rice distributions."""
        out = np.zeros(len(x))
        for w, mu, s in zip(self.weights.numpy(), self.means.numpy(), self.stds.numpy(), strict=True):
            out += w * rice_mean(np.sqrt(np.square(x - mu).sum(-1)), s, self.dim)
        return out

    def mean_self_distance(self) -> float:
        """See :meth:`Target.mean_self_distance`."""
        mu, s, w = self.means.numpy(), self.stds.numpy(), self.weights.numpy()
        gap = np.sqrt(np.square(mu[:, None] - mu[None]).sum(-1))
        std = np.sqrt(s[:, None] ** 2 + s[None] ** 2)
        return float((w[:, None] * w[None] * rice_mean(gap, std, self.dim)).sum())


def rice_mean(offset: Any, std: Any, dim: int = 2) -> Array:
    """Return E|o + std N(0, I)| in ``dim`` dimensions, |o| = ``offset``, elementwise; the arguments broadcast.

    In the plane std sqrt(pi/2) e^{-q} ((1 + 2 q) I0(q) + 2 q I1(q)) with q = offset^2 / (4 std^2), the Rice
    distribution's mean; in D dimensions std sqrt(2) Gamma((D + 1) / 2) / Gamma(D / 2) 1F1(-1/2; D/2; -2 q).
    """
    q = np.square(offset) / (4 * np.square(std))
    if dim == 2:
        out: Array = std * math.sqrt(math.pi / 2) * ((1 + 2 * q) * i0e(q) + 2 * q * i1e(q))
        return out
    centred = math.sqrt(2) * math.exp(gammaln((dim + 1) / 2) - gammaln(dim / 2))
    out = std * centred * hyp1f1(-0.5, dim / 2, -2 * q)
    return out


class ThreeModes(Mixture):
    """The three peaks of the toy of Stochastic MeanFlow Policies (arXiv 2605.21282).

    Args:
        std: standard deviation of each peak.
    """

    def __init__(self, std: float = 0.02) -> None:
        check_settings(ThreeModes, locals(), "--data.target.")
        super().__init__([[0.0, 0.5], [-0.5, -0.5], [0.5, -0.5]], std, [1.4, 1.2, 1.0])


class EightGaussians(Mixture):
    """Eight equal peaks on a circle.

    Args:
        radius: the circle's radius.
        std: standard deviation of each peak.
    """

    def __init__(self, radius: float = 0.7, std: float = 0.02) -> None:
        check_settings(EightGaussians, locals(), "--data.target.")
        bounded("--data.target.radius", radius, -MAX_MAGNITUDE, MAX_MAGNITUDE)
        angles = [2 * math.pi * k / 8 for k in range(8)]
        super().__init__([[radius * math.cos(a), radius * math.sin(a)] for a in angles], std)


class TwoMoons(Mixture):
    """Two interleaved half circles, blurred: 64 equal Gaussians on each, two modes in all.

    Args:
        std: standard deviation across a moon.
    """

    def __init__(self, std: float = 0.03) -> None:
        check_settings(TwoMoons, locals(), "--data.target.")
        n = 64  # closer together than they are wide: the ridge is smooth to 1e-8
        angles = [math.pi * (k + 0.5) / n for k in range(n)]
        upper = [[0.5 * math.cos(a) - 0.25, 0.5 * math.sin(a) - 0.125] for a in angles]
        lower = [[0.25 - 0.5 * math.cos(a), 0.125 - 0.5 * math.sin(a)] for a in angles]
        super().__init__(upper + lower, std, modes=[0] * n + [1] * n)


class Checkerboard(Target):
    """Uniform on the dark squares of a board over [-1, 1]^2, each a mode; distances to a square are in units of .02.

    Args:
        cells: squares along an edge, an even number.

    Raises:
        ToyError: ``cells`` is odd or below 2.
    """

    scale: float

    def __init__(self, cells: int = 4) -> None:
        bounded("--data.target.cells", cells, 2, 100)  # as many squares as half of its square
        require(
            cells % 2 == 0,
            f"--data.target.cells: {cells} is not allowed; give an even integer >= 2",
        )
        self.cells, self.side = cells, 2.0 / cells
        squares = [(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0]
        self.corners = torch.tensor(squares, dtype=torch.float64) * self.side - 1.0
        m = len(squares)
        self.mode_weights = torch.full((m,), 1.0 / m, dtype=torch.float64)
        middle = self.corners + self.side / 2
        self.scale = math.sqrt(float(middle.square().mean()) + self.side**2 / 12)
        self.tail_fractions = dict.fromkeys((3, 5, 10), 0.0)

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """See :meth:`Target.sample`."""
        m = len(self.corners)
        square = (uniform * m).long().clamp(max=m - 1)
        # the edge itself belongs to the next square, and float32 reaches it
        within = torch.special.ndtr(normal).clamp(1e-6, 1 - 1e-6)
        x: Tensor = self.corners.to(normal)[square] + self.side * within
        return x

    def inside(self, x: Tensor) -> Tensor:
        """Whether x (..., 2) lies on a dark square, bool (...)."""
        cell = ((x + 1) / self.side).floor()
        return (cell >= 0).all(-1) & (cell < self.cells).all(-1) & (cell.sum(-1) % 2 == 0)

    def log_prob(self, x: Tensor) -> Tensor:
        """See :meth:`Target.log_prob`."""
        return torch.full_like(x[..., 0], -self.entropy()).masked_fill(~self.inside(x), -torch.inf)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Target.nearest`; the unit of distance is .02, the default standard deviation of a mixture."""
        low = self.corners.to(x)
        y = x.unsqueeze(-2)
        distance = (torch.relu(low - y) + torch.relu(y - low - self.side)).square().sum(-1).sqrt() / 0.02
        smallest, mode = distance.min(-1)
        return mode, smallest

    def entropy(self) -> float:
        """See :meth:`Target.entropy`: the logarithm of the dark area."""
        return math.log(len(self.corners) * self.side**2)
