"""Settings that cannot work are refused in one line, whoever gives them; a small temperature is one that can."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_toys.bilevel import (
    BilevelControl,
    CsvStream,
    Details,
    Disturbance,
    DriftStream,
    Linear,
    Piecewise,
    Sine,
    Solver,
    SwitchingSine,
    WindowRegression,
)
from lightning_toys.bilevel.control.agents import SoftValue
from lightning_toys.errors import ToyError
from tests.bilevel.control.test_cli import QUIET, SMALL
from tests.conftest import Runner

BAD: list[tuple[Any, dict[str, Any], str]] = [
    (BilevelControl, {"discount": 1.0}, "--model.discount: 1.0 is not allowed; give a number from 0 to below 1"),
    (BilevelControl, {"eps": 1.5}, "--model.eps: 1.5 is not allowed; give a share between 0 and 1"),
    (Solver, {"lag_damping": -0.5}, "--model.solver.lag_damping: -0.5 is not allowed; give a number from 0 to 1"),
    (Disturbance, {"drift": 12.0}, "--model.disturbance.drift: 12.0 is not allowed; give degrees from 0 to below 12"),
    (Sine, {"omega": 0.0}, "--data.drift.omega: 0.0 is not allowed; give radians a step, in (0, pi]"),
    (BilevelControl, {"discount": None}, "--model.discount: None is not allowed; give a number"),
    (BilevelControl, {"eps": "x"}, "--model.eps: 'x' is not allowed; give a number"),
    (BilevelControl, {"tau": None}, "--model.tau: None is not allowed"),
    (BilevelControl, {"alpha": 1e-38}, "--model.alpha: 1e-38 is not allowed; give a number >= 1e-30"),
    (BilevelControl, {"env": 3}, "--model.env: 3 is not allowed; give a name"),
    (BilevelControl, {"solver": "x"}, "--model.solver: 'x' is not allowed; give a Solver"),
    (BilevelControl, {"disturbance": 3}, "--model.disturbance: 3 is not allowed; give a Disturbance"),
    (BilevelControl, {"double_q": "no"}, "--model.double_q: 'no' is not allowed; give true or false"),
    (BilevelControl, {"record": "no"}, "--model.record: 'no' is not allowed; give true or false"),
    (Solver, {"warm_start": "no"}, "--model.solver.warm_start: 'no' is not allowed; give true or false"),
    (Solver, {"lag_damping": None}, "--model.solver.lag_damping: None is not allowed; give a number"),
    (Solver, {"smoothing_present": math.nan}, "--model.solver.smoothing_present: nan is not allowed"),
    (Details, {"orthogonal": "no"}, "--model.details.orthogonal: 'no' is not allowed; give true or false"),
    (Disturbance, {"distractors": 1.5}, "--model.disturbance.distractors: 1.5 is not allowed; give an integer"),
    (Disturbance, {"drift": "x"}, "--model.disturbance.drift: 'x' is not allowed; give a number"),
    (Disturbance, {"drift_width": None}, "--model.disturbance.drift_width: None is not allowed"),
    (WindowRegression, {"fixed_weights": 3}, "--model.fixed_weights: 3 is not allowed; give at least one weight, in a"),
    (WindowRegression, {"fixed_weights": [math.nan]}, "--model.fixed_weights: nan is not allowed"),
    (DriftStream, {"noise": 1e30}, "--data.noise: 1e+30 is not allowed; give a number >= 0, at most 1e+12"),
    (DriftStream, {"drift": 3}, "--data.drift: a int is not allowed; give a Drift"),
    (Sine, {"omega": None}, "--data.drift.omega: None is not allowed; give a number"),
    (Sine, {"amplitude": 1e30}, "--data.drift.amplitude: 1e+30 is not allowed; give a number from -1e+12 to 1e+12"),
    (SwitchingSine, {"omegas": None}, "--data.drift.omegas: None is not allowed; give at least one angle, in a list"),
    (Piecewise, {"levels": []}, "--data.drift.levels: [] is not allowed; give at least one level"),
    (Piecewise, {"levels": 3}, "--data.drift.levels: 3 is not allowed; give at least one level, in a list"),
    (Linear, {"slope": math.inf}, "--data.drift.slope: inf is not allowed"),
    (CsvStream, {"path": 3}, "--data.path: 3 is not allowed; give a CSV or Parquet file"),
]


@pytest.mark.parametrize(("kind", "settings", "says"), BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_what_cannot_work_is_one_line(kind: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ToyError) as error:
        kind(**settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_can_work_is_let_through() -> None:
    BilevelControl(alpha=1e-30, discount=0, eps=1, tau=1, solver={"lag_damping": 1})  # type: ignore[arg-type]
    Disturbance(distractors=3, drift=np.float32(4))  # type: ignore[arg-type]
    assert Piecewise(np.array([1.0, -1.0]), 2).power == 1  # type: ignore[arg-type]
    assert Sine(1e12, math.pi).power == 1e24 / 2


@pytest.mark.parametrize("alpha", [1e-30, 1e-8, 1e-6, 1e-5, 1e-4, 9e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_small_temperature(alpha: float, heads: int) -> None:
    """In single precision the gradient of V is a distribution over actions at any temperature, as in double."""
    q = 100 * torch.rand(1, heads, 500, 3, generator=torch.Generator().manual_seed(3))
    soft, double = SoftValue(alpha, 0.99), q.double()
    found = soft.grad(q, soft.value(q))
    p = torch.softmax(double.amin(1) / alpha, -1)
    assert torch.allclose(found.double().sum(1), p, atol=1e-2)
    assert torch.allclose(found.sum((1, 3)), torch.ones(1, 500), atol=1e-5 if alpha < 1e-3 else 1e-2)
    assert torch.allclose(soft.value(q), q.amin(1).amax(-1), atol=1e-4 + alpha * math.log(3))


def test_a_regret_that_is_never_measured_is_said(runner: Runner) -> None:
    control = Runner(runner.root, runner.capture, "bilevel", (*SMALL, *QUIET, "--trainer.max_steps", "60"))
    says = "no local regret will be measured: no step from 40 (--data.init_steps) to 60 (--trainer.max_steps)"
    assert says in control.ok("fit", "control", "--model.regret_every", "61")
    assert "no local regret" not in control.ok("fit", "control", "--model.regret_every", "60")
    found = control.checkpoint("control", "version_1")["state_dict"]
    assert float(found["regret.count"]) == 1
