"""The damped bilevel agent: its error, its ends, the loop that it is, and that it settles where the undamped swings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lightning_toys.bilevel.control.agents import half_squared_error, q_of_actions
from lightning_toys.bilevel.control.lagged import damped_error, spectral_radius, wrong_side
from lightning_toys.bilevel.control.learner import Learner
from lightning_toys.bilevel.control.settings import Solver
from lightning_toys.bilevel.control.updates import Lagged
from lightning_toys.errors import ToyError
from tests.bilevel.control.test_agents import VALUE, batch_of, gradients
from tests.bilevel.control.test_cli import QUIET, SMALL
from tests.bilevel.control.test_updates import adams, d_of, nets_of, same, y_of
from tests.conftest import Runner


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_error() -> None:
    d, y_model, y = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    assert damped_error(d, y_model, y, 0.0).tolist() == [[[2, -1]]]
    assert damped_error(d, y_model, y, 1.0).tolist() == [[[1, -2]]]
    assert damped_error(d, y_model, y, 0.25).tolist() == [[[1.75, -1.25]]]
    assert damped_error(d, y_model, y, 0.25, clip=1.5).tolist() == [[[1.5, -1.25]]]
    error = torch.tensor([[[1.0, -1.0, 2.0, 3.0]], [[1.0, 1.0, 1.0, 1.0]]])
    x = torch.tensor([[1.0, 1.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert wrong_side(error, x, torch.zeros_like(x)).tolist() == [0.5, 0]


def test_its_ends_are_funcbo_and_vaml() -> None:
    out = []
    for agent, solver in (
        ("funcbo", Solver(inner_value="lagged")),
        ("lagged", Solver(lag_damping=0.0)),
        ("vaml", Solver()),
        ("lagged", Solver(lag_damping=1.0)),
        ("lagged", Solver()),
    ):
        nets = nets_of(agent, solver)
        learner, adam = Learner(nets, agent, solver, VALUE, 0.1), adams(nets)
        for k in range(3):
            learner.outer_iteration(batch_of(k), *adam)
        out.append(nets)
    assert same(out[0], out[1], 1e-11)
    assert same(out[2], out[3], 1e-11)
    assert not same(out[4], out[1], 1e-6)
    assert not same(out[4], out[3], 1e-6)


@pytest.mark.parametrize(
    "solver", [Solver(lag_damping=0.3), Solver(lag_damping=0.3, lag_target=True), Solver(lag_clip=0.2)]
)
def test_the_gradient_is_autograds(solver: Solver) -> None:
    """That of 1/2 sum_k mean e_k^2 where every e responds to its y_T one to one, and to nothing else."""
    nets, batch = nets_of("lagged", solver), batch_of()
    learner = Learner(nets, "lagged", solver, VALUE, 0.1)
    problem = learner.problem(batch)
    found, loss = learner.model_gradient(problem, problem.model_targets())
    y_model, y = y_of(nets, batch, True), y_of(nets, batch, False)
    d = q_of_actions(nets.target(batch.observation), batch.action) if solver.lag_target else d_of(nets, batch)
    c = solver.lag_damping
    e = (1 - c) * (d - y.unsqueeze(1)) + c * (y_model - y).unsqueeze(1)
    if solver.lag_clip is not None:
        assert 0.1 < float((e.abs() > solver.lag_clip).double().mean()) < 0.95
        e = e.clamp(-solver.lag_clip, solver.lag_clip)
    responding = e.detach() + (y_model - y_model.detach()).unsqueeze(1)
    expected = gradients(half_squared_error(responding, torch.zeros_like(y)), nets.model)
    assert found is not None
    assert all(torch.allclose(found[n], expected[n], atol=1e-13) for n in expected)
    assert torch.allclose(loss, half_squared_error(d_of(nets, batch), y))  # that of the values, whatever is descended
    found_side = learner.measure_errors(batch)["wrong_side"]
    as_they_are = d_of(nets, batch) - y.unsqueeze(1)  # neither damped nor clipped
    away = (as_they_are * (y_model - y).unsqueeze(1)).detach() < 0
    assert torch.allclose(found_side, away.double().mean((1, 2)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("damping", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("a", "b"), [(0.01, 0.05), (0.01, 0.5), (0.3, 0.02)])
def test_the_radius_is_what_the_loop_grows_by(a: float, b: float, damping: float, momentum: float) -> None:
    """The loop of the module's docstring, played; a swing is long, so that it takes thousands of steps to see."""
    d, x, m = 1.0, 0.5, 0.0
    sizes = []
    for _ in range(6000):
        d_new = d - a * (d - x)
        m = momentum * m + (1 - momentum) * ((1 - damping) * d_new + damping * x)
        d, x = d_new, x - b * m
        size = float(np.sqrt(d * d + x * x + m * m))
        sizes.append(size)
        if not 1e-200 < size < 1e200:
            break
    n = len(sizes) // 2
    # of the largest in either half, which a swing's phase has no part in
    factor = np.exp((np.log(max(sizes[-n // 2 :])) - np.log(max(sizes[n : n + n // 2]))) / (len(sizes) - n - n // 2))
    assert factor == pytest.approx(spectral_radius(a, b, damping, momentum), abs=2e-3)


def test_closed_forms_of_the_radius() -> None:
    assert spectral_radius(0.01, 0.1, 0.0) == pytest.approx(0.99**0.5)  # undamped: sqrt(1 - a), whatever b
    assert spectral_radius(0.01, 0.3, 0.0) == pytest.approx(0.99**0.5)
    assert spectral_radius(0.1, 0.3, 1.0) == pytest.approx(0.9)  # taken for solved: two modes, 1 - a and 1 - b
    # momentum's delay of 9 steps makes the undamped swing grow from about b = 1 / 9 on
    grows = [b for b in np.linspace(0.02, 0.4, 39) if spectral_radius(1e-3, float(b), 0.0, 0.9) > 1]
    assert 0.1 < min(grows) < 0.125
    assert all(spectral_radius(1e-3, float(b), 0.5, 0.9) < 1 for b in np.linspace(0.02, 0.4, 39))


def test_it_settles_where_the_undamped_swings() -> None:
    """One batch, Adam for both problems: y_T comes to y with damping, and goes back and forth without."""
    left = {}
    for damping in (0.0, 0.5):
        solver = Solver(lag_damping=damping)
        nets = nets_of("lagged", solver)
        learner, batch = Learner(nets, "lagged", solver, VALUE, 1e-9), batch_of()
        outer = torch.optim.Adam(nets.model.parameters(), 1e-2)
        inner = torch.optim.Adam(nets.q.parameters(), 1e-3)
        sizes = []
        for _ in range(240):
            learner.outer_iteration(batch, outer, inner)
            problem = learner.problem(batch)
            sizes.append(float((problem.model_targets().y - problem.y).square().mean().sqrt()))
        left[damping] = max(sizes[120:])
    assert left[0.5] < 0.3 * left[0.0], left


def test_what_is_refused() -> None:
    for kind, flag in ((Solver, "--model.solver.lag_"), (Lagged, "--model.agent.")):
        prefix = "lag_" if kind is Solver else ""
        for name, value in (("damping", 1.5), ("damping", float("nan")), ("clip", 0.0)):
            with pytest.raises(ToyError, match=f"{flag}{name}: "):
                kind(**{prefix + name: value})
    assert [Lagged(c).response for c in (0.0, 0.5, 1.0)] == ["values", "none", "solved"]
    assert Lagged(0.0, clip=1.0).response == "none"


def test_a_run_and_its_resume(runner: Runner, bitwise: Any) -> None:
    torch.set_default_dtype(torch.float32)
    flags = (*SMALL, *QUIET, "--trainer.max_steps", "100", "--model.agent", "lagged", "--model.solver.lag_clip", "2")
    control = Runner(runner.root, runner.capture, "bilevel", flags)
    control.ok("fit", "control", "--run.name", "whole", "--model.regret_every", "10")
    regret = ("--run.name", "cut", "--model.regret_every", "10")
    control.ok("fit", "control", *regret, "--trainer.max_steps", "70")
    control.ok("fit", "control", *regret, "--ckpt_path", "last")
    one, two = (control.checkpoint("control", n) for n in ("whole", "cut"))
    bitwise(one["state_dict"], two["state_dict"], "lagged")
    assert int(one["state_dict"]["regret.count"]) == 6  # after the 40 random steps
    control.ok("test", "control", *regret, "--ckpt_path", "last")
    found = json.loads((control.folder("control", "cut") / "results.json").read_text())
    assert found["label"] == "lagged, model width 4"
    assert all(0 <= v <= 1 for v in found["metrics"]["wrong_side"]["values"])
    mean = one["state_dict"]["regret.total"] / 6
    assert found["metrics"]["local_regret"]["values"] == pytest.approx(mean.tolist(), rel=1e-5)
    # a test that does not ask for the regret reads the same checkpoint
    control.ok("test", "control", "--run.name", "whole", "--model.regret_every", "0", "--ckpt_path", "last")
    found = json.loads((control.folder("control", "whole") / "results.json").read_text())
    assert "local_regret" not in found["metrics"]
