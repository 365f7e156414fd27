"""Couplings of data and noise: joint distributions of (x, e) whose marginals are the target and N(0, I)."""

from __future__ import annotations

import functools
from collections.abc import Container
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_toys.errors import bounded, note

Array = NDArray[np.float32]


@functools.cache
def gpu_assignment_works(device: str) -> bool:
    """Whether a GPU solves assignments, tried by solving one: Triton needs a recent GPU, and a C compiler."""
    if find_spec("triton") is None:  # torch for CUDA brings it on Linux
        return False
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    try:
        from lightning_toys.generative_policy.assignment import assign

        return assign(points, points).tolist() == [0, 1]
    except Exception as error:  # whatever triton raises: the host can do it too
        why = " ".join(str(error).split())[:200]
        note(f"optimal transport is solved on the host: triton does not work here ({why})")
        return False


class Coupling:
    """Which noise goes with which sample in a batch.

    Attributes:
        group_size: rows that are coupled together; a batch holds a whole number of groups.
        device_dims: the numbers of coordinates that :meth:`pair_on_device` can pair.
    """

    group_size = 1
    device_dims: Container[int] = (2,)

    def pair(self, x: Array, e: Array) -> Array:
        """Return the rows of e (B, D) in the order in which they go with those of x (B, D)."""
        raise NotImplementedError

    def supports_device(self, device: torch.device) -> bool:
        """Whether :meth:`pair_on_device` takes the place of :meth:`pair` where training runs on ``device``."""
        return False

    def pair_on_device(self, x: Tensor, e: Tensor) -> Tensor:
        """Return e (..., B, D) paired with x (..., B, D) as by :meth:`pair`, computed on the tensors' device."""
        raise NotImplementedError


class Independent(Coupling):
    """Samples and noise as drawn, independent.

    >>> Independent().pair(np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """

    def pair(self, x: Array, e: Array) -> Array:
        """See :meth:`Coupling.pair`."""
        return e


class OptimalTransport(Coupling):
    """Minibatch optimal transport: within each group, the assignment of smallest mean squared distance.

    Pooladian et al. 2023 (arXiv 2304.14772), Tong et al. 2023 (arXiv 2302.00482). A permutation within the group, so
    both marginals stay exactly as they were. Paths cross less, which makes the one-step map easier to learn.

    Args:
        size: rows of a group; the batch size is a multiple of it.

    Raises:
        ToyError: ``size`` is below 2.

    Example:
        >>> x = np.array([[0.0, 0.0], [1.0, 1.0]], np.float32)
        >>> OptimalTransport(2).pair(x, x[::-1]).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, size: int = 64) -> None:
        bounded("--data.coupling.size", size, 2)
        self.group_size = size

    def pair(self, x: Array, e: Array) -> Array:
        """See :meth:`Coupling.pair`."""
        out = np.empty_like(e)
        for k in range(0, len(x), self.group_size):
            group = slice(k, k + self.group_size)
            # |x - e|^2 = |x|^2 + |e|^2 - 2 x.e, and the first two do not depend on the assignment
            _, columns = linear_sum_assignment(x[group] @ e[group].T, maximize=True)
            out[group] = e[group][columns]
        return out

    def supports_device(self, device: torch.device) -> bool:
        """See :meth:`Coupling.supports_device`: a GPU would wait for the host's assignments."""
        return device.type == "cuda" and gpu_assignment_works(str(device))

    def pair_on_device(self, x: Tensor, e: Tensor) -> Tensor:
        """See :meth:`Coupling.pair_on_device`: the pairs of :meth:`pair`, up to ties within single precision."""
        from lightning_toys.generative_policy.assignment import assign  # not where there is no triton

        points, groups = (t.reshape(*t.shape[:-2], -1, self.group_size, 2) for t in (x, e))
        return groups.take_along_dim(assign(points, groups).unsqueeze(-1), -2).view(e.shape)
