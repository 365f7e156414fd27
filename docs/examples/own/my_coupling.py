"""A coupling of samples and noise: in each group the largest x goes with the largest e, along one coordinate.

lightning-toys fit -c generative_policy/flow --data.coupling my_coupling.Sorted --data.coupling.axis 1
"""

import numpy as np

from lightning_toys.generative_policy import Coupling


class Sorted(Coupling):
    """Optimal transport of one coordinate; the others follow.

    Args:
        axis: the coordinate.
        size: rows of a group; the batch size is a multiple of it.
    """

    def __init__(self, axis: int = 0, size: int = 64) -> None:
        self.axis, self.group_size = axis, size

    def pair(self, x: np.ndarray, e: np.ndarray) -> np.ndarray:
        """Return the rows of e (B, D) in the order in which they go with those of x (B, D)."""
        out = np.empty_like(e)
        for k in range(0, len(x), self.group_size):
            rows = slice(k, k + self.group_size)
            group = e[rows]
            out[rows][np.argsort(x[rows, self.axis])] = group[np.argsort(group[:, self.axis])]
        return out
