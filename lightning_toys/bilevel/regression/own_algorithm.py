"""A trial of a lag algorithm of one's own: two times on two replicas, and on the second of them alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_toys.bilevel.regression.algorithms import Found, LagAlgorithm, TimeStep
from lightning_toys.bilevel.regression.hypergradients import AdamMoments, WeightedTargets, Window
from lightning_toys.bilevel.regression.learner import Learner
from lightning_toys.bilevel.trials import apart, copied, require_solo, require_tensor
from lightning_toys.errors import require
from lightning_toys.training.own_classes import attempt, is_own, require_methods, shape_of, trial_pair

if TYPE_CHECKING:
    from lightning_toys.bilevel.regression.data import StreamData

FLAG = "--model.algorithm"
TRIED = 2  # times: at the second one there is a memory of the first
TAKEN = ("inputs", "outputs", "window")  # names in what a module measures


@dataclass(frozen=True)
class Trial:
    """What a trial takes from the run.

    Attributes:
        data: the stream.
        make_learner: returns the run's networks and weights, of an algorithm and for replicas with some seeds.
        weights: returns their lambda (R, W).
        inner_lr: the network's learning rate.
        starts: whether the algorithm's ``measure`` gives ``start``.
    """

    data: StreamData
    make_learner: Callable[[LagAlgorithm, Sequence[int]], Learner]
    weights: Callable[[Learner], Tensor]
    inner_lr: float
    starts: bool


def measured(algorithm: LagAlgorithm, data: StreamData) -> dict[str, Any]:
    """Return what an algorithm has to know of a stream, see :meth:`LagAlgorithm.measure`.

    Raises:
        ToyError: it is no dictionary of plain values, a name is taken, or ``start`` is no W weights.
    """
    where = f"{FLAG}: {type(algorithm).__name__}.measure"
    found = attempt(where, lambda: algorithm.measure(data))
    require(isinstance(found, dict), f"{where} returns {type(found).__name__}; give a dictionary")
    for name, value in found.items():
        fits = isinstance(name, str) and name not in TAKEN
        require(fits, f"{where}: the name {name!r} is not allowed; {', '.join(TAKEN)} are the run's own")
        kind = unplain(value)
        require(not kind, f"{where}: {name} has a {kind} in it; give numbers, texts and lists (an array's .tolist())")
    if "start" in found:
        start, lags = found["start"], data.window
        fits = isinstance(start, list | tuple) and len(start) == lags and all(type(w) in (int, float) for w in start)
        fits = fits and all(0 <= w < math.inf for w in start) and 0 < sum(start) < math.inf
        require(
            fits, f"{where}: start {start!s:.60} is not allowed; give {lags} weights, none below 0 and one above it"
        )
    out: dict[str, Any] = found
    return out


def unplain(value: Any) -> str:
    """Return the kind of what a value has in it that a checkpoint cannot hold as a plain one; nothing if all is plain.

    >>> unplain({"a": [1, (2.0, None)]}), unplain([torch.tensor(1.0)])
    ('', 'Tensor')
    """
    if type(value) in (list, tuple):
        return next((kind for x in value if (kind := unplain(x))), "")
    if type(value) is dict:
        return unplain([*value, *value.values()])
    return "" if value is None or type(value) in (bool, int, float, str) else type(value).__name__


def try_algorithm(algorithm: LagAlgorithm, seeds: Sequence[int], trial: Trial) -> None:
    """Hold an algorithm of one's own to its contract, see :class:`LagAlgorithm`; one of the package's is not tried.

    It sees the stream's first times, and networks as a run begins with, which take no steps in between.

    Args:
        algorithm: of which a copy is tried, where it can be copied.
        seeds: of the run.
        trial: what is taken from the run.

    Raises:
        ToyError: names the class, its method, and what it has to return.
    """
    if not is_own(algorithm):
        return
    where, pair = f"{FLAG}: {type(algorithm).__name__}", trial_pair(seeds)
    if algorithm.learns:
        require_methods(FLAG, algorithm, LagAlgorithm, "hypergradient")
    with apart(), torch.no_grad():
        both, alone = (given_by(copied(algorithm), where, trial, some) for some in (pair, pair[1:]))
    started = trial.starts or "weights_at" not in both
    require(started, f"{where} gives weights_at, but no start in what measure returns; give it, a list of W weights")
    for name, x in both.items():
        require_solo(f"{where}.{name}", x, alone.get(name, torch.empty(0)))


def given_by(algorithm: LagAlgorithm, where: str, trial: Trial, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Return all that an algorithm gives at the first times for replicas with these seeds, tensors (R, ...).

    Raises:
        ToyError: it fails, gives something of another form, or changes what it is shown in place.
    """
    learner = attempt(f"{where}.memory", lambda: trial.make_learner(algorithm, seeds))
    found = {f"memory: {n}": x.clone() for n, x in replicated(where, learner, len(seeds)).items()}
    stream, theta = trial.data.stream(seeds), learner.theta.detach()
    (inner, outer), zero = stream.points(theta), torch.zeros_like(theta)
    times = TRIED if trial.data.steps is None else min(TRIED, trial.data.steps)
    for t in range(times):
        past, present = stream.window(t, trial.data.window, theta)
        window, lam = Window(inner, outer, past, present), trial.weights(learner)
        moments = partial(AdamMoments, zero, zero, 0)
        step = TimeStep(learner.mlp, theta.clone(), lam, window, moments, trial.inner_lr, learner.memory)
        shown = {"theta": step.theta, "lam": lam, **window._asdict()}
        before = {n: x.clone() for n, x in shown.items()}
        given = asked_at(algorithm, where, step)
        for n, x in shown.items():
            require(torch.equal(before[n], x), f"{where} changes {n} of its TimeStep in place; leave it as it is")
        found |= {f"{n} at time {t}" if t else n: x for n, x in given.items()}
    return found | {f"memory: {n}, later,": x for n, x in replicated(where, learner, len(seeds)).items()}


def replicated(where: str, learner: Learner, replicas: int) -> dict[str, Tensor]:
    """Return the memory that has a replica axis; without one it is (1, ...), the same for all.

    Raises:
        ToyError: a first axis is another one, or numbers are not finite.
    """
    for name, x in learner.memory.items():
        fits, shape = x.dim() > 0 and x.shape[0] in (replicas, 1), tuple(x.shape)
        require(
            fits, f"{where}.memory: {name} is {shape}; give ({replicas}, ...), or (1, ...) if all replicas share it"
        )
        require(bool(x.isfinite().all()), f"{where}.memory: {name} has numbers that are not finite")
    return {name: x for name, x in learner.memory.items() if x.shape[0] == replicas}


def asked_at(algorithm: LagAlgorithm, where: str, step: TimeStep) -> dict[str, Tensor]:
    """Return what an algorithm gives at one time, tensors (R, ...) by the methods' names.

    Raises:
        ToyError: it fails, or gives something of another form.
    """
    replicas, lags = step.lam.shape
    given: dict[str, Tensor] = {}
    weights = attempt(f"{where}.weights_at", lambda: algorithm.weights_at(step))
    if weights is not None:
        require_tensor(f"{where}.weights_at", weights, (replicas, lags))
        fits = bool((weights >= 0).all()) and bool((weights.sum(1) > 0).all())
        require(fits, f"{where}.weights_at gives {weights.tolist()!s:.60}; give none below 0, and one above it")
        given["weights_at"] = weights
        step = replace(step, lam=weights * (step.lam.sum(1) / weights.sum(1))[:, None])
    targets = attempt(f"{where}.targets", lambda: algorithm.targets(step))
    kind = type(targets).__name__
    require(isinstance(targets, WeightedTargets), f"{where}.targets returns {kind}; give WeightedTargets")
    require_tensor(f"{where}.targets: total", targets.total, (replicas,))
    y = step.window.past_y
    require_tensor(f"{where}.targets: mean", targets.mean, (replicas, *y.shape[2:]))
    given |= {"targets: total": targets.total, "targets: mean": targets.mean}
    if not algorithm.learns:
        return given
    found = attempt(f"{where}.hypergradient", lambda: algorithm.hypergradient(step))
    require(isinstance(found, Found), f"{where}.hypergradient returns {type(found).__name__}; give Found")
    require_tensor(f"{where}.hypergradient", found.value, (replicas, lags))
    given["hypergradient"] = found.value
    if found.residual is not None:
        require_tensor(f"{where}.hypergradient: residual", found.residual, (replicas,))
    owes = algorithm.own_steps > 0 and found.after is None
    require(
        not owes, f"{where}.hypergradient gives no after, and own_steps is {algorithm.own_steps}; give what they led to"
    )
    if found.after is not None:
        check_after(f"{where}.hypergradient: after", found.after, step.theta)
    return given


def check_after(where: str, after: Any, theta: Tensor) -> None:
    """Refuse what is no parameters (R, P) with the state of their Adam."""
    pair = isinstance(after, tuple) and len(after) == 2 and isinstance(after[1], AdamMoments)
    require(pair, f"{where} is {shape_of(after)}; give theta and AdamMoments")
    stepped, moments = after
    for name, x in (("theta", stepped), ("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
        require_tensor(f"{where}: {name}", x, tuple(theta.shape))
