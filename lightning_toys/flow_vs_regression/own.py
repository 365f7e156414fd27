"""Networks, objectives and metrics of somebody's own: what they give, and a trial of it before any work.

Each keeps the replica axis, the first of every tensor: what replica r gives depends on its own weights and rows alone,
and is what it would be with one replica. The trial holds a class to that, and says in one line what is wrong.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_toys.errors import require
from lightning_toys.flow_vs_regression.evaluation import Evaluation
from lightning_toys.flow_vs_regression.objectives import Objective, Readout
from lightning_toys.flow_vs_regression.targets import Target
from lightning_toys.nets import ConditionalNet, Network
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.own_classes import attempt, require_methods, trial_pair

ROWS = 3  # of a trial
METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
READOUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
TOLERANCE = 1e-4  # of single precision's rounding, in a batch of one replica or two


class Architecture(ABC):
    """A network of somebody's own, ``--model.network mine.Siren``; its constructor's arguments are settings.

    ``hidden``, where it has such an attribute, is the number of activations in a layer, by which evaluation is cut
    into pieces that fit in a cache.
    """

    @abstractmethod
    def build(
        self, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool, out_dim: int | None = None
    ) -> ConditionalNet:
        """Return the network of one replica a seed.

        Args:
            seeds: one a replica. Every parameter has them as its first axis (R, ...), and replica r is drawn by
                ``seeds[r]`` alone (:func:`lightning_toys.training.noise.keyed_generator`).
            x_dim: D, of the state x.
            c_dim: C, of the condition c.
            with_time: whether the network is called with the time t.
            out_dim: of the output; that of x if left out.

        Returns:
            a :class:`ConditionalNet`: x (R, B, D), c (R, B, C) and t (R, B, 1), or no t, to (R, B, D).
        """
        raise NotImplementedError

    def unused_settings(self, with_time: bool = True) -> dict[str, str]:
        """Return the flags that do nothing in this network, each with what it wants."""
        return {}


class Metric:
    """A metric of somebody's own, ``--model.metrics mine.Worst``.

    Attributes:
        name: as in results and tables: letters, digits and underscores.
    """

    name: str

    def __call__(self, prediction: Tensor, truth: Tensor, c: Tensor) -> Tensor:
        """Return one value a replica, (R,).

        Args:
            prediction: (R, K, M, D), K draws of x0, float64, in the data's units.
            truth: what they should be, (M, D).
            c: where, (M, C).
        """
        raise NotImplementedError


def trial_places(seeds: Sequence[int]) -> list[int]:
    """Return the places of two replicas to try an objective with; a run of one has the same one twice."""
    return [0, 1] if len(seeds) > 1 else [0, 0]


def trial_rows(*sizes: int) -> list[Tensor]:
    """Return a draw (2, ROWS, size) of each size: other rows for each of two replicas."""
    g = keyed_generator(0, 0, "own/trial")
    return [torch.from_numpy(g.standard_normal((2, ROWS, n))).float() for n in sizes]


def require_alike(where: str, both: Tensor, alone: Tensor, why: str) -> None:
    """Refuse values (2, ...) whose second differs from those of the second replica alone, (1, ...)."""
    scale = 1 + float(alone.abs().max()) if alone.numel() else 1.0
    require(bool(((both[1:] - alone).abs() <= TOLERANCE * scale).all()), f"{where}: {why}")


@torch.no_grad()
def check_architecture(
    network: Network | Architecture, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool
) -> None:
    """Hold a network to its contract, see :class:`Architecture`.

    Raises:
        ToyError: names the class and what is wrong.
    """
    where = f"--model.network: {type(network).__name__}"
    pair = trial_pair(seeds)
    nets = [attempt(f"{where}.build", partial(network.build, s, x_dim, c_dim, with_time)) for s in (pair, pair[1:])]
    for net in nets:
        require(isinstance(net, ConditionalNet), f"{where}.build gives a {type(net).__name__}; give a ConditionalNet")
    both, alone = (dict(net.named_parameters()) for net in nets)
    require(bool(both), f"{where}.build gives a network without parameters")
    for name, p in both.items():
        axis = p.dim() >= 1 and p.shape[0] == 2 and name in alone and alone[name].shape == (1, *p.shape[1:])
        shape = tuple(p.shape)
        require(axis, f"{where}: parameter {name!r} has shape {shape} for 2 seeds; give it the replica axis, (2, ...)")
        same = torch.equal(p[1:], alone[name])
        require(
            same, f"{where}: parameter {name!r} of a replica depends on more than its seed; draw by keyed_generator"
        )
    x, c, t = trial_rows(x_dim, c_dim, 1)
    inputs = (x, c, t.sigmoid()) if with_time else (x, c)
    out = attempt(f"{where}, called with x {tuple(x.shape)}, c {tuple(c.shape)}", lambda: nets[0](*inputs))
    found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    require(found == tuple(x.shape), f"{where} maps x {tuple(x.shape)} to {found}; give {tuple(x.shape)}")
    solo = attempt(f"{where}, called with one replica", lambda: nets[1](*(v[1:] for v in inputs)))
    require_alike(where, out, solo, "what a replica gives depends on its neighbours; keep to the replica axis")
    fewer = attempt(f"{where}, called with two rows", lambda: nets[0](*(v[:, :2] for v in inputs)))
    require_alike(where, out[:, :2], fewer[1:], "what a row gives depends on the other rows of its batch")


@torch.no_grad()
def check_objective(
    objective: Objective,
    network: Network | Architecture,
    evaluation: Evaluation,
    seeds: Sequence[int],
    x_dim: int,
    c_dim: int,
) -> None:
    """Hold an objective to its contract, see :class:`Objective`, with a network of two replicas.

    Raises:
        ToyError: names the class and what is wrong.
    """
    flag, name = "--model.objective", type(objective).__name__
    require_methods(flag, objective, Objective, "residuals", "readout")
    check_attributes(f"{flag}: {name}", objective)
    pair, places = trial_pair(seeds), trial_places(seeds)
    conditions, timed = c_dim + objective.extra_conditions, objective.with_time
    build = partial(network.build, x_dim=x_dim, c_dim=conditions, with_time=timed)
    nets = [attempt(f"--model.network: {type(network).__name__}.build", partial(build, s)) for s in (pair, pair[1:])]
    where = f"{flag}: {name}.of_replicas"
    parts = [attempt(where, partial(objective.of_replicas, p, len(seeds))) for p in (places, places[1:])]
    for part in parts:
        require(isinstance(part, Objective), f"{where} gives a {type(part).__name__}; give an Objective")
    c, x1, x0, t = trial_rows(c_dim, x_dim, x_dim, objective.times)
    t = t.sigmoid() if objective.samples_time else torch.full((2, 1, 1), torch.nan)
    where = f"{flag}: {name}.residuals"
    found = attempt(where, lambda: parts[0].residuals(nets[0], c, x1, x0, t))
    listed = isinstance(found, list) and found and all(isinstance(r, Tensor) for r in found)
    require(bool(listed), f"{where} gives {type(found).__name__}; give a list of tensors (R, B, D)")
    for r in found:
        require(
            r.dim() == 3 and r.shape[:2] == (2, ROWS), f"{where}: shape {tuple(r.shape)}; give (2, {ROWS}, {x_dim})"
        )
        hint = "" if objective.samples_time else "; set samples_time = True where t is used"
        require(bool(r.isfinite().all()), f"{where} is not finite{hint}")
    solo = attempt(where, lambda: parts[1].residuals(nets[1], c[1:], x1[1:], x0[1:], t[1:]))
    many = f"{where} gives {len(found)} terms for two replicas and {len(solo)} for one"
    require(len(solo) == len(found), many)
    for r, alone in zip(found, solo, strict=True):
        require_alike(where, r, alone, "a replica's residuals depend on its neighbours; keep to the replica axis")
    ways = attempt(f"{flag}: {name}.readout", lambda: [objective.readout(evaluation.solver, evaluation.nfe)])
    others = attempt(
        f"{flag}: {name}.readouts", lambda: objective.readouts(evaluation.test_solvers, evaluation.test_nfe)
    )
    require(isinstance(others, list), f"{flag}: {name}.readouts gives {type(others).__name__}; give a list of Readout")
    for way in [*ways, *others]:
        check_readout(way, name, nets, c, x0)


def check_attributes(where: str, objective: Objective) -> None:
    """Refuse attributes of an objective that are none of their kind, see :class:`Objective`."""
    for name, wanted in (("with_time", "whether the network gets t"), ("samples_time", "whether residuals use t")):
        given = getattr(objective, name, None)
        require(isinstance(given, bool), f"{where}.{name}: {given!r} is not allowed; give {wanted}")
    for name, least in (("times", 1), ("extra_conditions", 0)):
        given = getattr(objective, name)
        whole = isinstance(given, int) and given >= least
        require(whole, f"{where}.{name}: {given!r} is not allowed; give an integer >= {least}")
    given = objective.x0_distribution
    known = given in ("zeros", "gaussian")
    require(known, f"{where}.x0_distribution: {given!r} is not allowed; give 'zeros' or 'gaussian'")


def check_readout(way: Any, name: str, nets: Sequence[ConditionalNet], c: Tensor, x0: Tensor) -> None:
    """Hold a readout of somebody's objective to its contract; see :func:`check_objective`."""
    flag = "--model.objective"
    require(isinstance(way, Readout), f"{flag}: {name}.readout gives a {type(way).__name__}; give a Readout")
    named = isinstance(way.name, str) and READOUT_NAME.fullmatch(way.name) is not None
    require(named, f"{flag}: {name}.readout: the name {way.name!r} is not allowed; give letters, digits, and _ . + -")
    where = f"{flag}: {name}'s readout {way.name}"
    out = attempt(where, lambda: way.sample(nets[0], c, x0))
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    require(shape == tuple(x0.shape), f"{where} gives {shape}; give {tuple(x0.shape)}, as x0")
    alone = attempt(where, lambda: way.sample(nets[1], c[1:], x0[1:]))
    require_alike(where, out, alone, "a replica's prediction depends on its neighbours")


def check_metrics(metrics: Sequence[Metric], taken: Sequence[str], truth: Tensor, c: Tensor) -> None:
    """Hold metrics to their contract, see :class:`Metric`.

    Args:
        metrics: of somebody's own.
        taken: names that there are already.
        truth: some of what predictions should be, (M, D).
        c: where, (M, C).

    Raises:
        ToyError: names the class and what is wrong.
    """
    names = list(taken)
    g = keyed_generator(0, 0, "own/metrics")
    prediction = truth + torch.from_numpy(g.standard_normal((3, 2, *truth.shape)))
    for metric in metrics:
        kind = type(metric).__name__
        where = f"--model.metrics: {kind}"
        require_methods("--model.metrics", metric, Metric, "__call__")
        name = getattr(metric, "name", None)
        fits = isinstance(name, str) and METRIC_NAME.fullmatch(name) is not None
        fits = fits and "_dim" not in str(name) and "_mode" not in str(name)  # of a single output, or mode
        require(fits, f"{where}.name: {name!r} is not allowed; give letters, digits and underscores")
        require(name not in names, f"{where}.name: {name!r} is taken; give another")
        names.append(str(name))
        out = attempt(where, partial(metric, prediction, truth, c))
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        require(found == (3,), f"{where} maps 3 replicas to {found}; give one value a replica, (3,)")
        require_same(where, out, attempt(where, partial(metric, prediction[1:2], truth, c)))


def require_same(where: str, out: Tensor, alone: Any) -> None:
    """Refuse values (3,) of three replicas whose second differs from that of the second replica alone, (1,)."""
    equal = isinstance(alone, Tensor) and bool(torch.isclose(out[1:2], alone, equal_nan=True).all())
    require(equal, f"{where}: a replica's value depends on its neighbours; keep to the replica axis")


def check_extra_metrics(target: Target, taken: Sequence[str], truth: Tensor, c: Tensor) -> list[str]:
    """Hold a target's own metrics to their contract, see :meth:`Target.extra_metrics`, and return their names.

    Args:
        target: the function that is learned.
        taken: names that there are already.
        truth: what predictions should be, (M, D).
        c: where, (M, 1).

    Raises:
        ToyError: names the class and what is wrong.
    """
    where = f"--data.target: {type(target).__name__}.extra_metrics"

    def drawn(replicas: slice, at: Tensor, distribution: Any = None) -> Tensor:
        """Return predictions (R, 2, M, D) at points (M, 1); those of a replica are the same among others."""
        g = keyed_generator(0, 0, "own/extra_metrics")
        return torch.from_numpy(g.standard_normal((3, 2, len(at), truth.shape[1])))[replicas]

    both, alone = (
        attempt(where, partial(target.extra_metrics, c, drawn(r, c), partial(drawn, r)))
        for r in (slice(0, 3), slice(1, 2))
    )
    require(isinstance(both, dict), f"{where} gives {type(both).__name__}; give a dict of tensors (R,) by name")
    for name, out in both.items():
        fits = isinstance(name, str) and METRIC_NAME.fullmatch(name) is not None
        require(fits, f"{where}: the name {name!r} is not allowed; give letters, digits and underscores")
        require(name not in taken, f"{where}: the name {name!r} is taken; give another")
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        require(found == (3,), f"{where}: {name} of 3 replicas is {found}; give one value a replica, (3,)")
        require_same(f"{where}: {name}", out, alone.get(name) if isinstance(alone, dict) else None)
    return list(both)


Thing = TypeVar("Thing")


def to_hparam(thing: object) -> dict[str, str]:
    """Return what a checkpoint's hyper-parameters hold of an object of somebody's class: its path."""
    kind = type(thing)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}"}


def from_hparam(thing: Thing, name: str) -> Thing:
    """Return an object as it was given; a checkpoint's path of its class is refused, and not imported.

    Raises:
        ToyError: says how to load such a checkpoint.
    """
    path = thing.get("class_path") if isinstance(thing, dict) else None
    require(
        path is None, f"{name}: the checkpoint was made with {path}; give it: load_from_checkpoint(..., {name}=...)"
    )
    return thing
