"""A lag algorithm from outside the package is tried before a run: what does not fit is one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.bilevel import DriftStream, Found, LagAlgorithm, TimeStep, WindowRegression
from lightning_toys.bilevel.regression.hypergradients import WeightedTargets
from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.errors import ToyError
from tests.bilevel.regression.test_cli import TINY
from tests.conftest import REPO, Runner

LAGS = 7


@dataclass
class Faulty(LagAlgorithm):
    """Moves every weight by how much it is above the mean, but for one fault."""

    fault: str = ""
    calls: int = 0

    def __post_init__(self) -> None:
        if self.fault in ("steps", "below"):
            self.own_steps = 1 if self.fault == "steps" else -1
        self.learns = not self.fault.startswith("weights")

    def measure(self, data: Any) -> Any:
        found: dict[str, Any] = {
            "start -1": {"start": [1.0] * (LAGS - 1) + [-1.0]},
            "start 0": {"start": [0.0] * LAGS},
            "start short": {"start": [1.0]},
            "start nan": {"start": [float("nan")] * LAGS},
            "measure none": None,
            "measure taken": {"window": 3},
            "measure array": {"noise": [np.float64(1.0)]},
            "start": {"start": list(range(LAGS))},
            "weights": {"start": [1.0] * LAGS},
            "weights below": {"start": [1.0] * LAGS},
        }
        return found.get(self.fault, {"noise": [1.0, None, "a"]})

    def memory(self, net: MLP, seeds: Sequence[int], sizes: Mapping[str, Any]) -> Any:
        fault, replicas = self.fault, len(seeds)
        value: Any = torch.zeros(replicas, LAGS)
        if fault == "memory draws":
            value = torch.randn(replicas, LAGS)
        if fault == "memory axis":
            value = torch.zeros(replicas + 3)
        name = {"memory taken": "recent", "memory dotted": "a.b", "memory method": "forward"}.get(fault, "seen")
        return {name: [1] if fault == "memory list" else value, "count": torch.zeros(1)}

    def weights_at(self, step: TimeStep) -> Tensor | None:
        if self.fault == "weights shape":
            return torch.ones(LAGS)
        if self.fault in ("weights", "weights without start"):
            return torch.ones_like(step.lam)
        return -torch.ones_like(step.lam) if self.fault == "weights below" else None

    def targets(self, step: TimeStep) -> Any:
        found = super().targets(step)
        if self.fault == "targets":
            return found.mean
        return WeightedTargets(found.total[:1], found.mean) if self.fault == "targets shape" else found

    def hypergradient(self, step: TimeStep) -> Any:
        fault = self.fault
        self.calls += 1
        step.memory["count"] += 1
        step.memory["seen"] += step.lam  # (R, W) of a replica alone
        v = step.lam - step.lam.mean(1, keepdim=True) + step.window.past_y.mean((2, 3)).flip(1)
        if fault == "later" and float(step.memory["count"]) == 2:
            v = v[:, :3]
        if fault == "mixes":
            v = v - v.mean(0)
        if fault == "noise":
            v = v + torch.randn_like(v)
        if fault == "in place":
            step.window.past_y.mul_(2)
        if fault == "shape":
            v = v.sum(1)
        if fault == "not finite":
            v = v / 0
        if fault == "raises":
            raise KeyError("no\nsuch")
        if fault == "tensor":
            return v
        return None if fault == "none" else Found(v, torch.zeros(1, 1) if fault == "residual" else None)


BAD = [
    ("start -1", "Faulty.measure: start [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0] is not allowed; give 7 weights"),
    ("start 0", "Faulty.measure: start [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] is not allowed; give 7 weights"),
    ("start short", "Faulty.measure: start [1.0] is not allowed; give 7 weights"),
    ("start nan", "give 7 weights, none below 0 and one above it"),
    ("measure none", "Faulty.measure returns NoneType; give a dictionary"),
    ("measure taken", "Faulty.measure: the name 'window' is not allowed"),
    ("measure array", "Faulty.measure: noise has a float64 in it; give numbers, texts and lists"),
    ("memory taken", "memory: the name 'recent' is not allowed"),
    ("memory dotted", "memory: the name 'a.b' is not allowed"),
    ("memory method", "memory: the name 'forward' is not allowed"),
    ("memory list", "memory: seen is a list; give a tensor (R, ...)"),
    ("memory axis", "Faulty.memory: seen is (5,); give (2, ...), or (1, ...)"),
    ("memory draws", "Faulty.memory: seen mixes replicas, or draws from a generator"),
    ("weights shape", "Faulty.weights_at is (7,); give a tensor (2, 7)"),
    ("weights below", "Faulty.weights_at gives [[-1.0"),
    ("weights without start", "Faulty gives weights_at, but no start in what measure returns"),
    ("targets", "Faulty.targets returns Tensor; give WeightedTargets"),
    ("targets shape", "Faulty.targets: total is (1,); give a tensor (2,)"),
    ("mixes", "Faulty.hypergradient mixes replicas"),
    ("noise", "Faulty.hypergradient mixes replicas, or draws from a generator"),
    ("in place", "Faulty changes past_y of its TimeStep in place"),
    ("shape", "Faulty.hypergradient is (2,); give a tensor (2, 7)"),
    ("later", "Faulty.hypergradient is (2, 3); give a tensor (2, 7)"),
    ("not finite", "Faulty.hypergradient has numbers that are not finite"),
    ("residual", "Faulty.hypergradient: residual is (1, 1); give a tensor (2,)"),
    ("raises", "Faulty.hypergradient fails: KeyError: 'no\\nsuch'"),
    ("tensor", "Faulty.hypergradient returns Tensor; give Found"),
    ("none", "Faulty.hypergradient returns NoneType; give Found"),
    ("steps", "Faulty.hypergradient gives no after, and own_steps is 1"),
]


def module_of(fault: str, seeds: list[int], **settings: Any) -> WindowRegression:
    return WindowRegression(Faulty(fault), seeds=seeds, hidden=6, inner_steps=3, **settings)


def stream() -> DriftStream:
    return DriftStream(LAGS, inner_points=6, outer_points=6)


@pytest.fixture(autouse=True)
def single() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seeds", [[2, 5], [2]], ids=["two seeds", "one seed"])
@pytest.mark.parametrize(("fault", "says"), BAD, ids=lambda x: "" if "Faulty" in x or ";" in x else x)
def test_what_is_no_algorithm_is_one_line(fault: str, says: str, seeds: list[int]) -> None:
    with pytest.raises(ToyError) as error:
        module_of(fault, seeds).measure(stream())
    assert str(error.value).startswith("--model.algorithm: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["clip", "softmax"])
@pytest.mark.parametrize("fault", ["", "start", "weights"])
@pytest.mark.parametrize("seeds", [[2], [2, 5], [2, 5, 7]], ids=len)
def test_an_algorithm_that_is_right_is_let_through(fault: str, weights: Any, seeds: list[int]) -> None:
    """What it counts is not what the trial's copy counted, and the stream is what it was."""
    module, data = module_of(fault, seeds, weights=weights), stream()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    assert module.measure(data)["window"] == LAGS
    assert torch.equal(torch.rand(3), wanted)
    assert module.method.calls == 0  # type: ignore[attr-defined]
    if fault == "start":
        assert module.measure(data)["start"] == list(range(LAGS))


def test_double_precision_is_tried_in_itself() -> None:
    torch.set_default_dtype(torch.float64)
    assert module_of("", [2]).measure(stream())["window"] == LAGS


def test_what_is_refused_when_it_is_made() -> None:
    with pytest.raises(ToyError, match=r"own_steps: -1 is not allowed; give an integer >= 0"):
        module_of("below", [2])
    with pytest.raises(ToyError, match=r"--model.algorithm: a int is not allowed; give a LagAlgorithm"):
        WindowRegression(3)  # type: ignore[arg-type]
    with pytest.raises(ToyError, match=r"Silent has no hypergradient; give it"):
        WindowRegression(type("Silent", (LagAlgorithm,), {})()).measure(stream())


@pytest.mark.usefixtures("_from_the_repository")
def test_an_algorithm_is_tried_before_a_run(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "tests" / "own_classes"))
    regression = Runner(runner.root, runner.capture, "bilevel", (*TINY, "--trainer.max_steps", "12"))
    for algorithm, says in (
        ("lag_rules.Overwriting", "memory: the name 'recent' is not allowed"),
        ("lag_rules.Mixing", "Mixing.hypergradient mixes replicas"),
    ):
        code, err = regression.code("fit", "regression", "--model.algorithm", algorithm, "--model.seeds", "[2]")
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert says in err
    code, err = regression.code(
        "fit", "regression", "--model.algorithm", "lag_rules.Towards", "--model.algorithm.lag", "9"
    )
    assert code == 2, err
    assert "--model.algorithm: Towards.hypergradient fails: IndexError: index 8 is out of bounds" in err
