"""Random numbers that are a pure function of (seed, index, stream).

No state is kept between draws, so a resumed run, a batched replica and a second rank all see the numbers that an
uninterrupted solo run sees, and a checkpoint needs no RNG state. The generator is the counter-based Philox (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the key holds seed and stream, the counter holds the index,
so two streams can never run into each other. (Torch's CPU generator keeps only 32 bits of its seed: keyed draws by the
thousand would collide.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def keyed_generator(seed: int, index: int, stream: str) -> np.random.Generator:
    """Return the generator of ``(seed, index, stream)``; every call starts it anew.

    Args:
        seed: non-negative replica seed.
        index: non-negative position in the stream (a step, a block of steps, an epoch).
        stream: name of the use, such as ``"x0"``; different names give independent numbers.
    """
    key = np.array([seed, tag_of(stream)], dtype=np.uint64)
    # numpy counts in word 0 and carries upwards: word 2 leaves 2^128 draws to each index
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, 0], dtype=np.uint64)))


def keyed_bits(seed: int, index: int, stream: str) -> np.random.SFC64:
    """Return a source of raw 64-bit words of ``(seed, index, stream)``: half of Philox's time a word.

    Its state is hashed from the key by :class:`numpy.random.SeedSequence` (128 bits): that two streams meet is out of
    reach.
    """
    return np.random.SFC64(np.random.SeedSequence([seed, index, tag_of(stream)]))


def tag_of(stream: str) -> int:
    """Return the 64-bit number that stands for a stream's name."""
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


@contextmanager
def keyed_torch(seed: int, index: int, stream: str, device: torch.device) -> Iterator[None]:
    """Have torch's own generators, which dropout draws from, begin at (seed, index, stream), and put them back after.

    Args:
        seed: as of :func:`keyed_generator`.
        index: likewise.
        stream: likewise.
        device: where is drawn.

    Example:
        >>> drawn = []
        >>> for _ in range(2):
        ...     with keyed_torch(3, 7, "dropout", torch.device("cpu")):
        ...         drawn.append(torch.rand(2))
        >>> torch.equal(*drawn)
        True
    """
    number = int(keyed_generator(seed, index, stream).integers(2**63))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield


def sent(x: np.ndarray, device: torch.device) -> Tensor:
    """Return ``x`` as a tensor on a device; a GPU fetches it while this process goes on."""
    found = torch.from_numpy(x)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normals in float32."""
    return generator.standard_normal(shape, dtype=np.float32)


def uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniforms on [0, 1) in float32."""
    return generator.random(shape, dtype=np.float32)


class NoiseStream:
    """Per-step noise with a leading replica axis, drawn in blocks of steps so that keying costs nothing.

    ``stream.at(step)`` is the same tensor whenever and in whatever order it is asked for.

    Args:
        seeds: one seed a replica.
        name: the stream's name.
        shape: shape of one replica's draw at one step.
        distribution: :func:`normal` or :func:`uniform`.
        block: steps drawn at once. Part of the key: changing it changes the numbers.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        name: str,
        shape: tuple[int, ...],
        distribution: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = normal,
        block: int = 64,
    ) -> None:
        self.seeds, self.name, self.shape, self.distribution, self.block = (
            tuple(seeds),
            name,
            shape,
            distribution,
            block,
        )
        self._index = -1
        self._cache = torch.empty(0)

    def at(self, step: int, like: Tensor) -> Tensor:
        """Return the draw of ``step``, (R, *shape), on the device and in the dtype of ``like``."""
        index, offset = divmod(step, self.block)
        if index != self._index or self._cache.device != like.device or self._cache.dtype != like.dtype:
            draws = [
                self.distribution(keyed_generator(seed, index, self.name), (self.block, *self.shape))
                for seed in self.seeds
            ]
            self._cache = sent(np.stack(draws, axis=1), like.device).to(like.dtype)
            self._index = index
        return self._cache[offset]
