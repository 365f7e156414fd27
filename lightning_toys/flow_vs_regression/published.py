"""The targets and geometric metrics of the published tables (toyexp), with the metric that each was meant to be.

Everything is exact in float64; the published code computes in float32, which moves its errors by some 1e-7.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import check_settings
from lightning_toys.flow_vs_regression.targets import Piecewise, Predict, Rotation, check_seed

RIDGE = 1e-10  # of the published projector
POINTS = 20  # of each interval and of each boundary


def legacy_normal(seed: int, *shape: int) -> Tensor:
    """Return ``numpy.random.seed(seed); numpy.random.randn(*shape)``, float64."""
    return torch.from_numpy(np.asarray(np.random.RandomState(seed).randn(*shape)))


def spread_points(low: float, high: float) -> Tensor:
    """Return POINTS evenly spaced points, both ends included: (POINTS, 1), float64."""
    return torch.from_numpy(np.linspace(low, high, POINTS)).unsqueeze(1)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Return |part| / |whole| over the last axis, and 0 where whole = 0, as the published code does."""
    norm = whole.norm(dim=-1)
    out: Tensor = torch.where(norm > 0, part.norm(dim=-1) / norm.where(norm > 0, 1.0), 0.0)
    return out


class PublishedPiecewise(Piecewise):
    """The published piecewise target: P_i = A (A'A + 1e-10 I)^-1 A', A numpy's ``RandomState(seed + i).randn(D, r)``.

    Metrics of its own, from :data:`POINTS` points of each interval i, both ends included, with e = f - f*:

    - ``published_subspace_diagonal`` and ``published_subspace_off_diagonal``: means of the diagonal and of the rest of
      M_ij = mean |(I - P_j) e| / |e|. Predictions start from Gaussian x0, in every mode, and f* is P_i times the sums
      at linspace(0, 1, 20) in place of the interval's points: an oversight, by which f* itself does not score 0.
    - ``published_boundary``: |(I - Q_i) f| / |f| at as many points in i / 10 ± ``boundary_width``, from Gaussian x0.
    - ``subspace_diagonal``, ``subspace_off_diagonal``: what M was meant to be, from the evaluation's x0 and with f* at
      the points themselves. ``boundary`` on the grid is the published one's counterpart.

    Args:
        projection_seed: seed of the first interval's subspace.
        dim: D.
        components: K.
        frequency_rule: as for :class:`~lightning_toys.flow_vs_regression.targets.Trigonometric`.
        kwargs: as for :class:`~lightning_toys.flow_vs_regression.targets.Piecewise`.

    Example:
        >>> PublishedPiecewise().highest_frequency
        709.0
    """

    def __init__(
        self,
        projection_seed: int = 46,
        dim: int = 8,
        components: int = 8,
        frequency_rule: Literal["nyquist", "published"] = "published",
        **kwargs: Any,
    ) -> None:
        check_settings(PublishedPiecewise, locals(), "--data.target.")
        super().__init__(
            projection_seed=projection_seed, dim=dim, components=components, frequency_rule=frequency_rule, **kwargs
        )

    def draw_projector(self, seed: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Piecewise.draw_projector`."""
        a = legacy_normal(seed, self.dim, self.rank)
        ridge = RIDGE * torch.eye(self.rank, dtype=torch.float64)
        return a @ torch.linalg.solve(a.T @ a + ridge, a.T), torch.linalg.qr(a).Q

    @cached_property
    def interval_points(self) -> Tensor:
        """The points of all intervals, one after the other: (intervals * POINTS, 1)."""
        n = self.intervals
        return torch.cat([spread_points(i / n, (i + 1) / n) for i in range(n)])

    @cached_property
    def boundary_points(self) -> Tensor:
        """The points of all interior boundaries: ((intervals - 1) * POINTS, 1)."""
        n, w = self.intervals, self.boundary_width
        return torch.cat([spread_points(i / n - w, i / n + w) for i in range(1, n)])

    def misplaced_truth(self) -> Tensor:
        """Return f* as the published matrix has it: each point's projector, the sums at linspace(0, 1, 20)."""
        sums = self.sums(spread_points(0, 1)).repeat(self.intervals, 1)
        return torch.einsum("md,mde->me", sums, self.projectors[self.interval(self.interval_points)])

    def error_matrix(self, f: Tensor, truth: Tensor) -> Tensor:
        """Return M_ij for predictions f (R, K, intervals * POINTS, D) and f* at the same rows: (R, i, j)."""
        e = (f - truth).reshape(*f.shape[:2], self.intervals, POINTS, self.dim)
        rows = [share(e - e @ p, e).mean((1, 3)) for p in self.projectors]
        return torch.stack(rows, dim=-1)

    def extra_metrics(self, c: Tensor, prediction: Tensor, predict: Predict) -> dict[str, Tensor]:
        """See :meth:`Target.extra_metrics`."""
        points = self.interval_points
        out = {}
        for prefix, distribution, truth in (
            ("published_", "gaussian", self.misplaced_truth()),
            ("", None, self(points)),
        ):
            m = self.error_matrix(predict(points, distribution), truth)  # type: ignore[arg-type]
            diagonal = m.diagonal(dim1=1, dim2=2)
            others = (m.sum((1, 2)) - diagonal.sum(1)) / (self.intervals * (self.intervals - 1))
            out[f"{prefix}subspace_diagonal"], out[f"{prefix}subspace_off_diagonal"] = diagonal.mean(1), others
        f = predict(self.boundary_points, "gaussian")
        f = f.reshape(*f.shape[:2], self.intervals - 1, POINTS, self.dim)
        shares = [share(f[:, :, i] - f[:, :, i] @ q, f[:, :, i]) for i, q in enumerate(self.boundary_projectors())]
        out["published_boundary"] = torch.stack(shares).mean((0, 2, 3))
        return out


class PublishedRotation(Rotation):
    """The published rotation target: weights of 8 trigonometric terms, and e_1 = numpy's ``RandomState(42).randn(2)``.

    Metrics of its own, on the evaluation grid and from the evaluation's x0 (the published code takes zeros there, as
    for l1 and l2): ``published_cosine_mean`` and ``published_cosine_min``, mean and least over components of the mean
    signed cosine of f_k and v_k. Since the weights change sign, the truth itself scores .034: they measure nothing.
    ``cosine`` and ``cosine_min``, of |cos|, are what they were meant to be. The published perpendicular shares are
    ``perpendicular`` and ``perpendicular_max``.

    Args:
        start_seed: seed of e_1; None: the first axis.
        amplitude: as for :class:`~lightning_toys.flow_vs_regression.targets.Rotation`.
        terms: likewise.
        frequency_rule: likewise.
        kwargs: likewise.

    Example:
        >>> [round(x, 5) for x in PublishedRotation().start.tolist()]
        [0.96337, -0.26816]
    """

    def __init__(
        self,
        start_seed: int | None = 42,
        amplitude: Literal["constant", "trigonometric"] = "trigonometric",
        terms: int = 8,
        frequency_rule: Literal["nyquist", "published"] = "published",
        **kwargs: Any,
    ) -> None:
        check_settings(PublishedRotation, locals(), "--data.target.")
        super().__init__(amplitude=amplitude, terms=terms, frequency_rule=frequency_rule, **kwargs)
        check_seed("start_seed", start_seed)
        self.start_seed = start_seed

    @cached_property
    def start(self) -> Tensor:
        """See :attr:`Rotation.start`."""
        if self.start_seed is None:
            return super().start
        e = legacy_normal(self.start_seed, self.size)
        unit: Tensor = e / e.norm()
        return unit

    def extra_metrics(self, c: Tensor, prediction: Tensor, predict: Predict) -> dict[str, Tensor]:
        """See :meth:`Target.extra_metrics`."""
        v = self.directions(c)
        parts = prediction.reshape(*prediction.shape[:-1], self.components, self.size)
        norm = parts.norm(dim=-1)
        cosine = torch.where(norm > 0, (parts * v).sum(-1) / norm.where(norm > 0, 1.0), 0.0).mean((1, 2))
        return {"published_cosine_mean": cosine.mean(1), "published_cosine_min": cosine.min(1).values}
