"""How the weights of the lags are found: an algorithm is one class, with the controls that learn nothing beside it.

A run asks its algorithm, in this order: :meth:`LagAlgorithm.measure` and :meth:`~LagAlgorithm.memory` once, and at each
time :meth:`~LagAlgorithm.weights_at`, :meth:`~LagAlgorithm.targets`, the inner steps, and
:meth:`~LagAlgorithm.hypergradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.checks import numbers
from lightning_toys.bilevel.inner_optimizers import AdamState
from lightning_toys.bilevel.regression.drift import simplex_minimum
from lightning_toys.bilevel.regression.hypergradients import (
    AdamMoments,
    AdjointNetwork,
    WeightedTargets,
    Window,
    aid_hypergradient,
    network_hypergradient,
    ridge_hypergradient,
    unrolled_hypergradient,
    weighted_targets,
)
from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.errors import bounded, did_you_mean, require

if TYPE_CHECKING:
    from lightning_toys.bilevel.regression.data import StreamData

Memory = dict[str, Tensor]


@dataclass(frozen=True)
class TimeStep:
    """What an algorithm sees at one time. No tensor has a graph.

    Attributes:
        net: the network h.
        theta: its parameters (R, P), after the inner steps that the run takes.
        lam: lambda (R, W), lag 1 first.
        window: the data.
        moments: returns the inner Adam's state.
        inner_lr: its learning rate.
        memory: what :meth:`LagAlgorithm.memory` returned, to be changed in place.
    """

    net: MLP
    theta: Tensor
    lam: Tensor
    window: Window
    moments: Callable[[], AdamMoments]
    inner_lr: float
    memory: Memory


class Found(NamedTuple):
    """What an algorithm found.

    Attributes:
        value: v = dF/dlambda (R, W), lag 1 first; lambda descends it.
        residual: a linear solver's relative residual (R,), where there is one.
        after: theta (R, P) and Adam's state, if the algorithm took inner steps itself.
    """

    value: Tensor
    residual: Tensor | None = None
    after: tuple[Tensor, AdamMoments] | None = None


class LagAlgorithm:
    """Base of algorithms; one that learns gives :meth:`hypergradient`, one that does not sets ``learns`` to False.

    R is the number of replicas, W that of lags, B that of inner points, d that of outputs, P that of the network's
    parameters. What replica r gives depends on its own rows of a :class:`TimeStep` and its own seed alone, and nothing
    but the memory is changed in place. One of somebody else's is tried at two times, on two replicas, before a run.

    Attributes:
        label: its name in tables and figures; by default the class's.
        learns: whether lambda moves along what :meth:`hypergradient` returns.
        has_weights: whether the network is fitted to lambda's weighted window, so that J(lambda) means something.
        own_steps: inner steps of each time that :meth:`hypergradient` takes itself, the last ones.
    """

    label = ""
    learns = True
    has_weights = True
    own_steps = 0

    def measure(self, data: StreamData) -> dict[str, Any]:
        """Return what it has to know of the stream, plain values by name: numbers, texts, lists of them.

        ``start``, a list of W weights, lag 1 first, none below 0 and one above, is where lambda starts. Their sum is
        free: they are scaled so that it is W ``--model.lambda0``. The names ``inputs``, ``outputs`` and ``window`` are
        taken.
        """
        return {}

    def memory(self, net: MLP, seeds: Sequence[int], sizes: Mapping[str, Any]) -> Memory:
        """Return what it keeps from one time to the next, tensors (R, ...) by name, which go into checkpoints.

        Row r is drawn by ``seeds[r]`` alone (:func:`lightning_toys.training.noise.keyed_generator`); what all replicas
        share, such as a count of times, is (1, ...). The names ``theta``, ``free``, ``recent``, ``mlp`` and ``kept``
        are taken.

        Args:
            net: the network h.
            seeds: one seed a replica, R of them.
            sizes: ``inputs``, ``outputs``, ``window`` and what :meth:`measure` returned.
        """
        return {}

    def weights_at(self, step: TimeStep) -> Tensor | None:
        """Return the weights (R, W) of this time, lag 1 first, in the place of lambda; None leaves it as it is.

        For an algorithm that works its weights out of the window. None is below 0 and one above. Their sum is free, as
        that of ``start``, which such an algorithm's :meth:`measure` has to give.
        """
        return None

    def targets(self, step: TimeStep) -> WeightedTargets:
        """Return what the network is fitted to at this time, a total (R,) and a mean (R, B, d): by default lambda's."""
        return weighted_targets(step.lam, step.window.past_y)

    def hypergradient(self, step: TimeStep) -> Found:
        """Return dF/dlambda (R, W), lag 1 first. Only asked of an algorithm that learns."""
        raise NotImplementedError


class FuncBO(LagAlgorithm):
    """The functional hypergradient (arXiv 2403.20233), its adjoint linear in h's last hidden layer."""

    label = "funcBO"

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    def hypergradient(self, step: TimeStep) -> Found:
        """See :meth:`LagAlgorithm.hypergradient`."""
        return Found(ridge_hypergradient(step.net, step.theta, step.lam, step.window, self.ridge).value)


class FuncBONetwork(LagAlgorithm):
    """The functional hypergradient with a network for adjoint, trained along."""

    label = "funcBO"

    def __init__(self, steps: int, lr: float) -> None:
        self.steps, self.lr = steps, lr

    def memory(self, net: MLP, seeds: Sequence[int], sizes: Mapping[str, Any]) -> Memory:
        """See :meth:`LagAlgorithm.memory`: the adjoint network and its Adam."""
        psi = net.init_parameters(seeds, "adjoint").detach()
        zero = torch.zeros_like(psi)
        return {
            "psi": psi,
            "psi_mean": zero,
            "psi_square": zero.clone(),
            "psi_step": torch.zeros(1, dtype=torch.float64),
        }

    def hypergradient(self, step: TimeStep) -> Found:
        """See :meth:`LagAlgorithm.hypergradient`."""
        m = step.memory
        before = AdjointNetwork(
            m["psi"], AdamState({"psi": m["psi_mean"]}, {"psi": m["psi_square"]}, m["psi_step"].squeeze(0))
        )
        found, after = network_hypergradient(step.net, step.theta, step.lam, step.window, before, self.steps, self.lr)
        exp_avg, exp_avg_sq, count = after.state
        m["psi"].copy_(after.psi)
        m["psi_mean"].copy_(exp_avg["psi"])
        m["psi_square"].copy_(exp_avg_sq["psi"])
        m["psi_step"].fill_(float(count))
        return Found(found.value)


class AID(LagAlgorithm):
    """Approximate implicit differentiation (arXiv 1602.02355)."""

    label = "AID"

    def __init__(self, iterations: int, damping: float, gauss_newton: bool) -> None:
        self.iterations, self.damping, self.gauss_newton = iterations, damping, gauss_newton

    def hypergradient(self, step: TimeStep) -> Found:
        """See :meth:`LagAlgorithm.hypergradient`."""
        found = aid_hypergradient(
            step.net, step.theta, step.lam, step.window, self.iterations, self.damping, self.gauss_newton
        )
        return Found(found.value, found.residual)


class Unroll(LagAlgorithm):
    """Differentiates through the last inner steps (arXiv 1703.01785)."""

    def __init__(self, steps: int) -> None:
        self.own_steps, self.label = steps, f"unroll {steps}"

    def hypergradient(self, step: TimeStep) -> Found:
        """See :meth:`LagAlgorithm.hypergradient`."""
        done = unrolled_hypergradient(
            step.net, step.theta, step.moments(), step.lam, step.window, self.own_steps, step.inner_lr
        )
        return Found(done.value, None, (done.theta, done.moments))


class Uniform(LagAlgorithm):
    """Control: lambda stays as it is, every lag alike."""

    label = "uniform"
    learns = False


class FixedWeights(LagAlgorithm):
    """Control: weights of one's own, which stay.

    Args:
        weights: of lags 1, 2, ...; lags beyond them have 0.

    Raises:
        ToyError: a weight is not allowed, or there are more than lags.
    """

    learns = False
    flag = "--model.fixed_weights"

    def __init__(self, weights: Sequence[float], label: str = "fixed") -> None:
        for w in weights:
            bounded(self.flag, w, 0.0)
        require(sum(weights) > 0, f"{self.flag}: {list(weights)} is not allowed; give one weight above 0 at least")
        self.weights, self.label = list(weights), label

    def measure(self, data: StreamData) -> dict[str, Any]:
        """See :meth:`LagAlgorithm.measure`.

        Raises:
            ToyError: there are more weights than lags.
        """
        given, lags = len(self.weights), data.window
        require(given <= lags, f"{self.flag}: {given} weights are not allowed; give at most --data.window, {lags}")
        return {"start": [float(w) for w in self.weights] + [0.0] * (lags - given)}


class Optimum(LagAlgorithm):
    """Control: the weights that are best with an exact inner solver, given to the network from the start.

    What it loses against that solver is the network's error; what an algorithm loses against it is the weights'.
    """

    label = "optimum"
    learns = False

    def measure(self, data: StreamData) -> dict[str, Any]:
        """See :meth:`LagAlgorithm.measure`."""
        return {"start": data.exact_loss.oracle().tolist()}


class NoTracking(LagAlgorithm):
    """Control: the network is fitted to the mean of all that was observed so far, so that it follows no drift.

    The mean begins with the window before time 0.
    """

    label = "no tracking"
    learns = False
    has_weights = False

    def measure(self, data: StreamData) -> dict[str, Any]:
        """See :meth:`LagAlgorithm.measure`."""
        return {"points": data.shape.inner}

    def memory(self, net: MLP, seeds: Sequence[int], sizes: Mapping[str, Any]) -> Memory:
        """See :meth:`LagAlgorithm.memory`: the mean so far, and of how many times."""
        mean = torch.zeros(len(seeds), sizes["points"], sizes["outputs"])
        return {"mean_so_far": mean, "times_so_far": torch.zeros(1, dtype=torch.float64)}

    def targets(self, step: TimeStep) -> WeightedTargets:
        """See :meth:`LagAlgorithm.targets`."""
        mean, times = step.memory["mean_so_far"], step.memory["times_so_far"]
        new = step.window.past_y if float(times) == 0 else step.window.past_y[:, -1:]
        times += new.shape[1]
        mean += (new - mean[:, None]).sum(1) / float(times)
        return WeightedTargets(step.lam.sum(1), mean.clone())


class LeastSquares(LagAlgorithm):
    """Control: at each time the weights that would have been the best so far, were the inner problem solved exactly.

    With q_t,kl = mean over inner points and outputs of (y_t - y_{t-k}) (y_t - y_{t-l}), the weights w on the simplex
    minimise w' (sum_t q_t) w over the times t that were observed: non-negative least squares of each observation on its
    own lags. No network and no hypergradient is asked. At time 0, when no observation has a whole past, the weights are
    equal.
    """

    label = "least squares"
    learns = False

    def measure(self, data: StreamData) -> dict[str, Any]:
        """See :meth:`LagAlgorithm.measure`: equal weights, which are kept themselves and not as logits."""
        return {"start": [1.0] * data.window, "points": data.shape.inner}

    def memory(self, net: MLP, seeds: Sequence[int], sizes: Mapping[str, Any]) -> Memory:
        """See :meth:`LagAlgorithm.memory`: the quadratic form so far, and the window of the time before."""
        replicas, window = len(seeds), sizes["window"]
        return {
            "form_so_far": torch.zeros(replicas, window, window, dtype=torch.float64),
            "window_before": torch.zeros(replicas, window, sizes["points"], sizes["outputs"]),
            "times_before": torch.zeros(1, dtype=torch.float64),
        }

    def weights_at(self, step: TimeStep) -> Tensor:
        """See :meth:`LagAlgorithm.weights_at`."""
        form, before, times = (step.memory[k] for k in ("form_so_far", "window_before", "times_before"))
        now = step.window.past_y
        if float(times) > 0:
            # the newest observation, and its whole past, which the window of the time before is: lag 1 last
            gaps = (now[:, -1:] - before).flatten(2).double().flip(1)
            form += gaps @ gaps.mT / gaps.shape[2]
        before.copy_(now)
        times += 1
        if float(times) == 1:
            return torch.ones_like(step.lam)
        found = np.stack([simplex_minimum(q) for q in form.cpu().numpy()])
        return torch.from_numpy(found).to(step.lam)


def lag_1() -> FixedWeights:
    """Return the control that fits the last observation alone."""
    return FixedWeights([1.0], "lag 1")


def scaled(start: Sequence[float], total: float) -> np.ndarray:
    """Return weights (W,) scaled to the sum ``total``, float64."""
    w = np.asarray(start, dtype=np.float64)
    out: np.ndarray = w * (total / w.sum())
    return out


# the algorithms that have a name, each made of the module's own settings
NAMED: dict[str, Callable[[Any], LagAlgorithm]] = {
    "funcbo": lambda m: FuncBO(m.ridge) if m.adjoint == "ridge" else FuncBONetwork(m.adjoint_steps, m.adjoint_lr),
    "aid": lambda m: AID(m.cg_iterations, m.damping, m.curvature == "gauss_newton"),
    "unroll1": lambda m: Unroll(m.unroll_steps),
    "uniform": lambda m: Uniform(),
    "lag_1": lambda m: lag_1(),
    "fixed": lambda m: FixedWeights(m.fixed_weights or ()),
    "optimum": lambda m: Optimum(),
    "no_tracking": lambda m: NoTracking(),
    "least_squares": lambda m: LeastSquares(),
}


def make_algorithm(given: LagAlgorithm | str, settings: Any) -> tuple[str, LagAlgorithm]:
    """Return an algorithm's name, or the path of a class of one's own, and itself.

    Args:
        given: a name, or one's own.
        settings: what has the settings of those with a name, as :class:`WindowRegression` has.

    Raises:
        ToyError: there is none of that name, it is no algorithm, or ``fixed`` has no weights.
    """
    if not isinstance(given, str):
        kind = type(given).__name__
        require(isinstance(given, LagAlgorithm), f"--model.algorithm: a {kind} is not allowed; give a LagAlgorithm")
        return f"{type(given).__module__}.{type(given).__qualname__}", given
    # a script's checkpoint of a class of one's own holds its path, which is not imported for it
    own = f"; load_from_checkpoint takes it: algorithm={given.rpartition('.')[2]}(...)" if "." in given else ""
    require(
        given in NAMED,
        f"--model.algorithm: {given!r} is not allowed; give one of {', '.join(NAMED)}, or MODULE.CLASS{own}"
        f"{did_you_mean(given, NAMED)}",
    )
    require(
        given != "fixed" or bool(settings.fixed_weights),
        "--model.fixed_weights: none is not allowed with --model.algorithm fixed; give '[1,0,0.5]', lag 1 first",
    )
    if settings.fixed_weights:
        for w in numbers(FixedWeights.flag, settings.fixed_weights, "weight"):
            bounded(FixedWeights.flag, w, 0.0)
    return given, NAMED[given](settings)
