"""Linear assignment problems in a batch on a GPU, each solved exactly by shortest augmenting paths.

Jonker and Volgenant (1987), as in scipy's ``linear_sum_assignment`` (Crouse 2016), which takes one problem at a time on
the host: with hundreds of replicas a GPU would wait for it. One Triton program solves one problem, its columns along
the lanes. Needs triton, which torch brings along where it is built for CUDA.

The rows' potentials are not kept: a pair that is assigned has reduced cost 0, which gives its row's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def solve(x_pointer, e_pointer, out_pointer, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Triton kernel: write the column assigned to each row of one problem, costs -x . e; N >= n is a power of 2."""
    problem = tl.program_id(0).to(tl.int64)
    x, e = x_pointer + problem * n * 2, e_pointer + problem * n * 2
    lane = tl.arange(0, N)
    inside = lane < n
    # products of single precision are exact in double: the costs are the same on every device
    e0 = tl.load(e + 2 * lane, mask=inside, other=0.0).to(tl.float64)
    e1 = tl.load(e + 2 * lane + 1, mask=inside, other=0.0).to(tl.float64)
    v = tl.zeros((N,), tl.float64)  # the columns' potentials
    row_of, column_of = tl.full((N,), -1, tl.int32), tl.full((N,), -1, tl.int32)
    for free in range(n):
        # Dijkstra's search from a free row for the nearest free column
        shortest, path = tl.full((N,), float("inf"), tl.float64), tl.full((N,), -1, tl.int32)
        done = lane >= n
        row, sink = free + tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
        low, potential = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        while sink < 0:
            x0, x1 = tl.load(x + 2 * row).to(tl.float64), tl.load(x + 2 * row + 1).to(tl.float64)
            through = low - (x0 * e0 + x1 * e1) - v - potential
            better = (through < shortest) & ~done
            shortest, path = tl.where(better, through, shortest), tl.where(better, row, path)
            reach = tl.where(done, float("inf"), shortest)
            low = tl.min(reach, 0)
            column = tl.min(tl.where(reach == low, lane, N), 0)
            here = lane == column
            done = done | here
            owner = tl.sum(tl.where(here, row_of, 0), 0)
            if owner < 0:
                sink = column
            else:
                row = owner
                y0, y1 = tl.load(x + 2 * row).to(tl.float64), tl.load(x + 2 * row + 1).to(tl.float64)
                f0, f1 = tl.load(e + 2 * column).to(tl.float64), tl.load(e + 2 * column + 1).to(tl.float64)
                potential = -(y0 * f0 + y1 * f1) - tl.sum(tl.where(here, v, 0.0), 0)
        v = tl.where(done & inside, v + shortest - low, v)
        # the pairs along the path change places
        column, row = sink, tl.full((), -1, tl.int32)
        while row != free:
            row = tl.sum(tl.where(lane == column, path, 0), 0)
            row_of = tl.where(lane == column, row, row_of)
            before = tl.sum(tl.where(lane == row, column_of, 0), 0)
            column_of = tl.where(lane == row, column, column_of)
            column = before
    tl.store(out_pointer + problem * n + lane, column_of.to(tl.int64), mask=inside)


def assign(x: Tensor, e: Tensor) -> Tensor:
    """Return the assignment of rows of x to rows of e with the largest sum of x . e.

    Args:
        x: points (..., n, 2) on a GPU, computed with in single precision.
        e: points (..., n, 2), likewise.

    Returns:
        (..., n) int64: row i of x goes with row ``out[..., i]`` of e.

    Raises:
        ValueError: a number is not finite, with which the search would not end.
    """
    x, e = x.float().contiguous(), e.float().contiguous()
    *shape, n, _ = x.shape
    if not bool(torch.isfinite(x).all() & torch.isfinite(e).all()):
        raise ValueError("an assignment of points that are not finite")
    out = torch.empty((*shape, n), dtype=torch.int64, device=x.device)
    if problems := out.numel() // n:
        N = triton.next_power_of_2(n)
        solve[(problems,)](x, e, out, n, N=N, num_warps=min(8, max(1, N // 128)))
    return out
