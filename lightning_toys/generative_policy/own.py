"""Targets, couplings and samplers of somebody's own: a trial of what they give, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import ToyError, bounded, require
from lightning_toys.generative_policy.couplings import Coupling
from lightning_toys.generative_policy.samplers import Particles, Sampler
from lightning_toys.generative_policy.target import Target
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.own_classes import attempt, is_own, shape_of

ROWS = 5  # of a trial
MAX_DIM = 1000
WEIGHTS = 1e-4  # by which the sum of weights may miss 1: single precision


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
    check_modes(where, target, inside)
    if target.has_velocity:
        z, t = trial("velocity", 2, ROWS, D), torch.special.ndtr(trial("time", 2, ROWS, 1))
        v = attempt(f"{where}.marginal_velocity", lambda: target.marginal_velocity(z, t, 0.1))
        require_shape(f"{where}.marginal_velocity", v, (2, ROWS, D))
    if target.has_distances:
        x = inside[0].numpy()
        far = attempt(f"{where}.mean_distance", lambda: target.mean_distance(x))
        shape = far.shape if isinstance(far, np.ndarray) else type(far).__name__
        require(shape == (ROWS,), f"{where}.mean_distance gives {shape}; give an array {(ROWS,)}")
        own = attempt(f"{where}.mean_self_distance", target.mean_self_distance)
        bounded(f"{where}.mean_self_distance()", own, 0.0)
    axes = list(range(D))[:2]
    marginal = attempt(f"{where}.marginal", lambda: target.marginal(axes))
    fits = marginal is None or (isinstance(marginal, Target) and marginal.has_density)
    require(fits, f"{where}.marginal gives {type(marginal).__name__}; give a Target with a log_prob, or None")
    entropy = attempt(f"{where}.entropy", target.entropy)
    number = isinstance(entropy, int | float | np.floating)
    require(number, f"{where}.entropy gives {type(entropy).__name__}; give a float, or NaN")


def check_modes(where: str, target: Target, x: Tensor) -> None:
    """Hold what a target of somebody's own says of its modes to the contract.

    Args:
        where: the target, for errors.
        target: the target.
        x: points (2, ROWS, D) within its bounds.
    """
    weights = target.mode_weights
    require_weights(f"{where}.mode_weights", weights)
    if not target.has_modes:
        return
    M, D = len(weights), x.shape[-1]
    near = abs(float(weights.sum()) - 1) < WEIGHTS
    require(near, f"{where}.mode_weights: their sum is {float(weights.sum()):.6g}, not 1; divide them by it")
    found = attempt(f"{where}.nearest", lambda: target.nearest(x))
    pair = isinstance(found, tuple) and len(found) == 2
    require(pair, f"{where}.nearest gives {type(found).__name__}; give the mode and the distance to it")
    for part in found:
        require_shape(f"{where}.nearest", part, (2, ROWS))
    mode = found[0]
    whole = not mode.is_floating_point() and mode.dtype != torch.bool
    known = whole and bool(((mode >= 0) & (mode < M)).all())
    require(known, f"{where}.nearest gives modes {mode.flatten().tolist()}; give integers from 0 to {M - 1}"[:200])
    tails = target.tail_fractions
    require(
        isinstance(tails, Mapping), f"{where}.tail_fractions: {tails!r} is not allowed; give {{3: ..., 5: ...}}"[:200]
    )
    inside = attempt(f"{where}.weights_inside", target.weights_inside)
    require_weights(f"{where}.weights_inside()", inside)
    require_shape(f"{where}.weights_inside", inside, (M,))
    shapes = attempt(f"{where}.mode_shapes", target.mode_shapes)
    if shapes is not None:
        pair = isinstance(shapes, tuple) and len(shapes) == 2
        require(pair, f"{where}.mode_shapes gives {type(shapes).__name__}; give centres and standard deviations")
        require_shape(f"{where}.mode_shapes: centres", shapes[0], (M, D))
        require_shape(f"{where}.mode_shapes: standard deviations", shapes[1], (M,))
        require(bool((shapes[1] > 0).all()), f"{where}.mode_shapes: a standard deviation is not above 0")


def require_weights(where: str, weights: Any) -> None:
    """Refuse what is no tensor (M,) of numbers from 0 on."""
    fits = isinstance(weights, Tensor) and weights.dim() == 1 and not weights.requires_grad
    fits = fits and bool((weights >= 0).all()) and bool(weights.isfinite().all())
    given = f"{weights!r}"[:80].replace("\n", " ")
    require(fits, f"{where}: {given} is not allowed; give a tensor (M,) of numbers >= 0, one a mode")


def require_shape(where: str, found: Any, wanted: tuple[int, ...]) -> None:
    """Refuse what is no tensor of the wanted shape."""
    shape = shape_of(found)
    require(shape == wanted, f"{where} gives {shape}; give a tensor {wanted}")


def require_velocity(target: Target) -> None:
    """Refuse a target whose exact velocity is not known.

    Raises:
        ToyError: names the target.
    """
    require(
        target.has_velocity,
        f"--model.tangent: 'oracle' is not allowed with {type(target).__name__}, which has no marginal_velocity; give "
        "a mixture of Gaussians",
    )


def check_deconvolved(target: Target, std: float, sampled: bool) -> Target:
    """Return the distribution whose convolution with N(0, std^2 I) a target is.

    Args:
        target: the target.
        std: of the noise.
        sampled: whether a density is enough.

    Raises:
        ToyError: there is none, or nothing to learn from.
    """
    flag = "--model.target_std_as: 'deconvolved' is not allowed here"
    try:
        found = attempt(f"{type(target).__name__}.deconvolved", lambda: target.deconvolved(std))
    except ToyError as error:
        raise ToyError(f"{flag}: {error}") from error
    fits = isinstance(found, Target) and (found.has_samples or (found.has_density and sampled))
    require(fits, f"{flag}: {type(target).__name__}.deconvolved gives {type(found).__name__}, no Target with a sample")
    made: Target = found
    return made


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
    require(isinstance(size, int), f"{where}.group_size: {size!r} is not allowed; give an integer")
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


def drawn_particles(sampler: Sampler, target: Target, seed: int, stream: str) -> Particles:
    """Return what a sampler draws; of somebody's own it is held to its contract, see :meth:`Sampler.draw`.

    Raises:
        ToyError: names the class and what is wrong.
    """
    if not is_own(sampler):
        return sampler.draw(target, seed, stream)
    where = f"--data.sampler: {type(sampler).__name__}.draw"
    found = attempt(where, lambda: sampler.draw(target, seed, stream))
    require(isinstance(found, Particles), f"{where} gives {type(found).__name__}; give Particles")
    points, log_weights, log_z, effective = found
    shape = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
    fits = isinstance(points, Tensor) and points.dim() == 2 and points.shape[1] == target.dim and len(points) > 0
    require(fits, f"{where}: points are {shape}; give a tensor (N, {target.dim}), a point a row")
    require(bool(points.isfinite().all()), f"{where}: a point is not finite")
    require_shape(f"{where}: log_weights", log_weights, (len(points),))
    total = float(log_weights.double().exp().sum())
    require(abs(total - 1) < WEIGHTS, f"{where}: exp(log_weights) sums to {total:.6g}, not 1; take off its logarithm")
    for name, value in (("log_z", log_z), ("effective", effective)):
        number = isinstance(value, int | float) and math.isfinite(value)
        require(number, f"{where}: {name} is {value!r}; give a finite number"[:200])
    bounded(f"{where}: effective", effective, 0.0, above=True)
    points, log_weights = (x.detach().cpu().double() for x in (points, log_weights))
    return Particles(points, log_weights, float(log_z), float(effective))
