"""The drifting stream y_t(x) = f*(x) + m(t) u + sigma eps_t(x) at fixed points x; any y_t can be recomputed exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import truncnorm
from torch import Tensor

from lightning_toys.bilevel.regression.drift import Drift
from lightning_toys.training.noise import keyed_generator

BLOCK_STEPS = 64  # times whose noise is drawn at once; part of the key


@dataclass(frozen=True)
class StreamShape:
    """Sizes of a stream.

    Attributes:
        inputs: p, the dimension of x.
        outputs: d, the dimension of y.
        hidden: hidden units of f*.
        inner: B, points of the inner problem.
        outer: B', points of the outer problem, others.
        sigma: standard deviation of the noise on one output.
    """

    inputs: int = 5
    outputs: int = 3
    hidden: int = 64
    inner: int = 128
    outer: int = 128
    sigma: float = 1.0


def true_function(seed: int, shape: StreamShape, x: np.ndarray) -> np.ndarray:
    """Return f*(x) (N, d) for x (N, p), float64: one hidden layer of tanh-GELUs.

    Weights are .1 + z, z standard normal within [-2, 2]; biases are .1.
    """
    draws = []
    for i, size in enumerate([(shape.inputs, shape.hidden), (shape.hidden, shape.outputs)]):
        u = keyed_generator(seed, i, "stream/truth").random(size)
        draws.append(torch.from_numpy(truncnorm.ppf(u, -2, 2) + 0.1))
    h = F.gelu(torch.from_numpy(x) @ draws[0] + 0.1, approximate="tanh")
    out: np.ndarray = (h @ draws[1] + 0.1).numpy()
    return out


class Stream:
    """The stream of each replica's seed: its own points, f*, direction u and noise.

    Times run from minus infinity, so that the first window is full. Noise is keyed by (seed, block of times, stream),
    and cached for the blocks that were asked for last.

    Args:
        seeds: one seed a replica.
        shape: the sizes.
        drift: m(t).

    Attributes:
        x: the points, inner ones first (R, B + B', p).
        f_star: f* at the points (R, B + B', d).
        direction: u, of length 1 (R, d).

    >>> from lightning_toys.bilevel.regression.drift import Sine
    >>> stream = Stream([0, 1], StreamShape(), Sine())
    >>> past_y, current_y = stream.window(0, lags=40, like=torch.empty(0))
    >>> past_y.shape, current_y.shape
    (torch.Size([2, 40, 128, 3]), torch.Size([2, 128, 3]))
    """

    def __init__(self, seeds: Sequence[int], shape: StreamShape, drift: Drift) -> None:
        self.seeds, self.shape, self.drift = tuple(seeds), shape, drift
        points = shape.inner + shape.outer
        x = [keyed_generator(s, 0, "stream/x").standard_normal((points, shape.inputs)) for s in seeds]
        u = np.stack([keyed_generator(s, 0, "stream/u").standard_normal(shape.outputs) for s in seeds])
        self.x = np.stack(x)
        self.direction = u / np.linalg.norm(u, axis=-1, keepdims=True)
        self.f_star = np.stack([true_function(s, shape, row) for s, row in zip(seeds, x, strict=True)])
        self._points: list[Tensor] = []
        self._first, self._last = 0, -1
        self._cache = torch.empty(0)

    def points(self, like: Tensor) -> list[Tensor]:
        """Return the inner points (R, B, p) and the outer ones (R, B', p), in dtype and on the device of ``like``."""
        cached = self._points
        if not (cached and cached[0].device == like.device and cached[0].dtype == like.dtype):
            n = self.shape.inner
            self._points = [torch.from_numpy(x).to(like) for x in (self.x[:, :n], self.x[:, n:])]
        return self._points

    def observation_block(self, index: int) -> np.ndarray:
        """Return y at the times of block ``index``, which may be negative: (R, BLOCK_STEPS, B + B', d), float64."""
        shape = (BLOCK_STEPS, *self.f_star.shape[1:])
        name, key = ("stream/noise", index) if index >= 0 else ("stream/noise_before", -1 - index)
        noise = np.stack([keyed_generator(s, key, name).standard_normal(shape, dtype=np.float32) for s in self.seeds])
        m = self.drift.mean(index * BLOCK_STEPS + np.arange(BLOCK_STEPS))
        mean = self.f_star[:, None] + (m[:, None] * self.direction[:, None])[:, :, None]
        y: np.ndarray = mean + self.shape.sigma * noise
        return y

    def observations(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Return y at times start..stop-1 and every point, (R, stop - start, B + B', d); do not write to it."""
        first, last = start // BLOCK_STEPS, (stop - 1) // BLOCK_STEPS
        cached = self._cache
        if not (
            self._first <= first and last <= self._last and cached.device == like.device and cached.dtype == like.dtype
        ):
            blocks = [torch.from_numpy(self.observation_block(i)).to(like) for i in range(first, last + 1)]
            self._cache, self._first, self._last = torch.cat(blocks, dim=1), first, last
        lo = start - self._first * BLOCK_STEPS
        return self._cache[:, lo : lo + stop - start]

    def window(self, t: int, lags: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the observations of step t.

        Returns:
            y at times t - lags .. t - 1, oldest first, and the inner points (R, lags, B, d); y at time t and the outer
            points (R, B', d).
        """
        y = self.observations(t - lags, t + 1, like)
        return y[:, :-1, : self.shape.inner], y[:, -1, self.shape.inner :]
