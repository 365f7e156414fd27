"""Couplings of data and noise: joint laws of (x, e) whose marginals are the target and N(0, I)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from lightning_toys.errors import require

Array = NDArray[np.float32]


class Coupling:
    """Which noise goes with which sample in a batch."""

    divides = 1  # rows that are coupled together; a batch holds a whole number of them

    def pair(self, x: Array, e: Array) -> Array:
        """Return e (B, 2) in the order in which its rows go with those of x (B, 2)."""
        raise NotImplementedError


class Independent(Coupling):
    """Samples and noise as they come."""

    def pair(self, x: Array, e: Array) -> Array:
        """See :meth:`Coupling.pair`."""
        return e


class OptimalTransport(Coupling):
    """Minibatch optimal transport: within each group, the assignment of least mean squared distance.

    Pooladian et al. 2023 (arXiv 2304.14772), Tong et al. 2023 (arXiv 2302.00482). A permutation within the group, so
    both marginals stay exactly what they were. Paths cross less, and a one-step map has less to bend.

    Args:
        size: rows of a group; the batch size is a multiple of it.
    """

    def __init__(self, size: int = 64) -> None:
        require(size >= 2, f"--data.coupling.size: {size} is not allowed; give an integer >= 2")
        self.divides = size

    def pair(self, x: Array, e: Array) -> Array:
        """See :meth:`Coupling.pair`."""
        out = np.empty_like(e)
        for k in range(0, len(x), self.divides):
            group = slice(k, k + self.divides)
            # |x - e|^2 = |x|^2 + |e|^2 - 2 x.e, and the first two do not depend on the assignment
            _, columns = linear_sum_assignment(x[group] @ e[group].T, maximize=True)
            out[group] = e[group][columns]
        return out
