"""Targets and couplings of somebody's own: a trial of what they give, before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import bounded, require
from lightning_toys.generative_policy.couplings import Coupling
from lightning_toys.generative_policy.target import Target
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.own_classes import attempt, is_own

ROWS = 5  # of a trial
MAX_DIM = 1000


def trial(name: str, *shape: int) -> Tensor:
    """Return standard normals, float64, always the same."""
    return torch.from_numpy(keyed_generator(0, 0, f"own/{name}").standard_normal(shape))


def check_target(target: Target) -> None:
    """Hold a target of somebody's own to its contract, see :class:`Target`.

    Raises:
        ToyError: names the class and what is wrong.
    """
    if not is_own(target):
        return
    where = f"--data.target: {type(target).__name__}"
    known = target.has_density or target.has_samples
    require(known, f"{where} has neither log_prob nor sample; give one (see Target)")
    D = target.dim
    bounded(f"{where}.dim", D, 1, MAX_DIM)
    low, high = attempt(f"{where}.bounds {target.bounds!r}"[:200], target.box)
    fits = bool((low.isfinite() & high.isfinite() & (low < high)).all())
    require(fits, f"{where}.bounds: {target.bounds!r} is not allowed; give two ends, the low below the high")
    if target.scale is not None:
        bounded(f"{where}.scale", target.scale, 0.0, above=True)
    inside = low + (high - low) * torch.special.ndtr(trial("target", 2, ROWS, D))
    if target.has_samples:
        uniform = torch.special.ndtr(trial("uniform", 2, ROWS))
        x = attempt(f"{where}.sample", lambda: target.sample(uniform, trial("normal", 2, ROWS, D)))
        require_shape(f"{where}.sample", x, (2, ROWS, D))
    if target.has_density:
        value = attempt(f"{where}.log_prob", lambda: target.log_prob(inside))
        require_shape(f"{where}.log_prob of x (2, {ROWS}, {D})", value, (2, ROWS))
        alone = target.log_prob(inside[1:, 2:])
        same = torch.allclose(value[1:, 2:], alone, rtol=1e-6, atol=1e-9, equal_nan=True)
        require(same, f"{where}.log_prob: what a row gives depends on the other rows of its batch")
    if target.has_modes:
        found = attempt(f"{where}.nearest", lambda: target.nearest(inside))
        pair = isinstance(found, tuple) and len(found) == 2
        require(pair, f"{where}.nearest gives {type(found).__name__}; give the mode and the distance to it")
        for part in found:
            require_shape(f"{where}.nearest", part, (2, ROWS))


def require_shape(where: str, found: Any, wanted: tuple[int, ...]) -> None:
    """Refuse what is no tensor of the wanted shape."""
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    require(shape == wanted, f"{where} gives {shape}; give a tensor {wanted}")


def check_coupling(coupling: Coupling, dim: int) -> None:
    """Hold a coupling of somebody's own to its contract: the rows of e in another order, the same at every call.

    Raises:
        ToyError: names the class and what is wrong.
    """
    if not is_own(coupling):
        return
    where = f"--data.coupling: {type(coupling).__name__}"
    size = coupling.group_size
    bounded(f"{where}.group_size", size, 1)
    n = size * max(1, 64 // size)  # rows
    x, e = (trial(name, n, dim).float().numpy() for name in ("x", "e"))
    kept = e.copy()
    found = attempt(f"{where}.pair", lambda: coupling.pair(x, e))
    shape = found.shape if isinstance(found, np.ndarray) else type(found).__name__
    require(shape == (n, dim), f"{where}.pair gives {shape}; give an array {(n, dim)}")
    require(bool((e == kept).all()), f"{where}.pair writes to e; give a new array")
    rows = sorted(map(tuple, found.tolist())) == sorted(map(tuple, e.tolist()))
    require(rows, f"{where}.pair: its rows are not those of e, each once; the noise would be no N(0, I) any more")
    same = bool((found == coupling.pair(x, e)).all())
    require(same, f"{where}.pair gives something else at the second call; draw by keyed_generator")
