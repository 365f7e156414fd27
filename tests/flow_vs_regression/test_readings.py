"""What a run says of itself: settings that would score nothing are refused; dopri5's evaluations are told."""

from __future__ import annotations

import json

import pytest

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import Evaluation, FlowVsRegression, InterpolationData, Piecewise
from lightning_toys.flows import Solver
from tests.conftest import Runner


def test_readouts_that_score_nothing_are_refused() -> None:
    solvers: list[Solver] = ["midpoint", "rk4"]
    with pytest.raises(ToyError, match=r"test_nfe: \[3\] is not allowed .* rk4 takes multiples of 4$"):
        FlowVsRegression("flow", evaluation=Evaluation(test_nfe=[3], test_solvers=solvers))
    FlowVsRegression("flow", evaluation=Evaluation(test_nfe=[2, 3], test_solvers=solvers))
    FlowVsRegression("flow", evaluation=Evaluation(test_nfe=[3], test_solvers=["dopri5"]))
    FlowVsRegression("flow", evaluation=Evaluation(test_nfe=[], test_solvers=solvers))
    FlowVsRegression("regression", evaluation=Evaluation(test_nfe=[3], test_solvers=solvers))


def test_too_few_evaluation_points_for_the_targets_metrics() -> None:
    module = FlowVsRegression()
    with pytest.raises(ToyError, match=r"^--data.num_eval: 8 points leave .*boundary.* without a value.*; give more$"):
        module.measure(InterpolationData(Piecewise(), num_eval=8))
    module.measure(InterpolationData(Piecewise(), num_eval=40))


def test_dopri5_tells_its_evaluations_and_replicas_are_alone(runner: Runner) -> None:
    flags = ("--model.evaluation.test_solvers", "[dopri5,euler]", "--trainer.max_steps", "40", "--model.lr", "0.02")
    found = {}
    for name, seeds in (("three", "[7,8,9]"), ("solo", "[8]")):
        for verb in ("fit", "test"):
            more = ("--ckpt_path", "last") if verb == "test" else ()
            runner.ok(verb, "flow", *flags, "--model.seeds", seeds, "--run.name", name, *more)
        found[name] = json.loads((runner.folder("flow", name) / "results.json").read_text())["metrics"]
    for start in ("zeros", "gaussian"):
        counts = found["three"][f"evaluations@{start}/dopri5"]["values"]
        assert min(counts) >= 25
        assert found["solo"][f"evaluations@{start}/dopri5"]["values"][0] == pytest.approx(counts[1], rel=0.02)
        l2 = found["three"][f"l2@{start}/dopri5"]["values"][1]
        assert found["solo"][f"l2@{start}/dopri5"]["values"][0] == pytest.approx(l2, rel=1e-3)
    assert "evaluations" not in found["three"]  # of the configured readout, which is Euler's
    l2 = found["three"]["l2"]
    assert l2["geometric_ci95"][0] < l2["geometric_mean"] < l2["mean"]
    assert l2["geometric_ci95"][0] > 0
