"""A module predicts outside of a Trainer what `predict`, `test` and validations computed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import FlowVsRegression, InterpolationData, Projected
from lightning_toys.flow_vs_regression.metrics import compute_metrics
from lightning_toys.nets import Network
from tests.conftest import Runner

SHORT = ("--trainer.max_steps", "6", "--model.seeds", "[3,4]", "--model.lr", "0.01")
GAUSSIAN = ("--model.evaluation.x0", "gaussian")
CASES = [
    ("regression", ()),
    ("flow", ()),
    ("flow", GAUSSIAN),
    ("flow", ("--model.evaluation.solver", "dopri5")),
    (
        "flow",
        ("--model.network.kind", "transformer", "--model.evaluation.solver", "rk4", "--model.evaluation.nfe", "8"),
    ),
    ("straight_flow", GAUSSIAN),
    ("mip", GAUSSIAN),
    ("mip", ("--model.mode", "mip_one_step", "--model.network.kind", "film")),
    ("flow", ("--model.ema_decay", "0.5", "--model.evaluation.weights", "ema")),
    ("flow", ("--data.holdout", "0.2", "--model.evaluation.weights", "best", "--trainer.val_check_interval", "2")),
    ("published_rotation", GAUSSIAN),
]


def load(runner: Runner, variant: str) -> FlowVsRegression:
    path = runner.folder(variant) / "checkpoints" / "last.ckpt"
    return FlowVsRegression.load_from_checkpoint(path, weights_only=True)


def grid(n: int = 101) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64).unsqueeze(1)


def untrained(mode: str = "flow", data: InterpolationData | None = None, **settings: object) -> FlowVsRegression:
    module = FlowVsRegression(mode, [3, 4, 5], network=Network(hidden=16), **settings)  # type: ignore[arg-type]
    module.sizes = module.measure(data or InterpolationData())
    module.configure_model()
    return module


@pytest.mark.parametrize(("variant", "flags"), CASES)
def test_a_loaded_module_predicts_what_predict_wrote(runner: Runner, variant: str, flags: tuple[str, ...]) -> None:
    runner.ok("fit", variant, *SHORT, *flags)
    runner.ok("predict", variant, *SHORT, *flags)
    with np.load(runner.folder(variant) / "predictions.npz") as file:
        wanted = torch.from_numpy(file["prediction"])
    module = load(runner, variant)
    found = module.predict(grid())
    assert found.shape == wanted.shape == (2, 2 if flags == GAUSSIAN else 1, 101, wanted.shape[-1])
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found.double(), wanted)
    one = module(grid())
    assert one.shape == (2, 101, wanted.shape[-1])
    torch.testing.assert_close(one.double(), wanted[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(module(grid().expand(2, -1, -1)), one, rtol=0, atol=0)
    assert (one[0] - one[1]).abs().max() > 1e-3  # replicas differ
    if flags == GAUSSIAN:
        assert (one.double() - wanted.mean(1)).abs().max() > 1e-3  # one draw, and not the draws' mean


@pytest.mark.parametrize(
    ("weights", "flags"), [("ema", ("--model.ema_decay", "0.5")), ("best", ("--data.holdout", "0.2"))]
)
def test_the_weights_are_those_that_are_evaluated(runner: Runner, weights: str, flags: tuple[str, ...]) -> None:
    runner.ok("fit", "regression", *SHORT, *flags, "--model.evaluation.weights", weights)
    module, c = load(runner, "regression"), grid(9).float().expand(2, -1, -1)
    kept = {"ema": module.ema_net, "best": module.best_net}[weights]
    assert kept is not None
    for p in module.net.parameters():
        p.data += 1
    zeros = torch.zeros(2, 9, 1)
    torch.testing.assert_close(module(c), kept(zeros, c))
    assert (module(c) - module.net(zeros, c)).abs().max() > 1e-3


def test_a_loaded_module_scores_as_test_and_validation(runner: Runner) -> None:
    flags = (*SHORT, *GAUSSIAN, "--model.evaluation.test_nfe", "[1,4]")
    runner.ok("fit", "flow", *flags)
    results = runner.folder("flow") / "results.json"
    validated = json.loads(results.read_text())["metrics"]["l2"]["values"]
    runner.ok("test", "flow", *flags)
    tested = json.loads(results.read_text())["metrics"]
    module, target, c = load(runner, "flow"), InterpolationData().target, grid()

    def l2(prediction: Tensor) -> list[float]:
        found: list[float] = compute_metrics(prediction, target(c), c, target)[0]["l2"].tolist()
        return found

    assert l2(module.predict(c)) == tested["l2"]["values"] == validated
    readouts = {r.name: r for r in module.objective.readouts(["euler", "rk4", "dopri5"], [4])}
    assert set(readouts) == {"euler-4", "rk4-4", "dopri5"}
    for name, readout in readouts.items():
        assert l2(module.predict(c, 2, "gaussian", readout)) == tested[f"l2@gaussian/{name}"]["values"]
        assert l2(module.predict(c, x0="zeros", readout=readout)) == tested[f"l2@zeros/{name}"]["values"]
    assert len({tuple(tested[f"l2@{x0}/{n}"]["values"]) for x0 in ("zeros", "gaussian") for n in readouts}) == 6


def test_draws_are_the_first_of_more() -> None:
    module = untrained(data=InterpolationData(Projected()))
    few, many = module.predict(grid(), 2, "gaussian"), module.predict(grid(), 5, "gaussian")
    assert many.shape == (3, 5, 101, 8)
    torch.testing.assert_close(few, many[:, :2], rtol=0, atol=1e-6)
    assert many.std(1).min() > 1e-3
    assert module.predict(grid(), 5).shape == (3, 1, 101, 8)  # zeros are one start


def test_points_of_its_own_for_each_replica() -> None:
    module, c = untrained(), torch.stack([grid(7), grid(7) / 2, 1 - grid(7)])
    found = module(c)
    for r in range(3):
        torch.testing.assert_close(found[r], module(c[r])[r], rtol=0, atol=1e-6)
    assert (found - module(grid(7))).abs().max() > 1e-3


def test_forward_before_any_training_is_the_initial_network() -> None:
    module = untrained("regression")
    c = grid(7).float().expand(3, -1, -1)
    torch.testing.assert_close(module(c), module.net(torch.zeros(3, 7, 1), c))


@pytest.mark.parametrize("mode", ["regression", "flow", "straight_flow", "mip"])
def test_forward_is_differentiable_in_c(mode: str) -> None:
    module = untrained(mode, evaluation={"nfe": 3, "x0": "gaussian"}).double()
    c = grid(7).requires_grad_()
    (slope,) = torch.autograd.grad(module(c).sum(), c)
    with torch.no_grad():
        difference = (module(c + 1e-6) - module(c - 1e-6)).sum((0, 2)) / 2e-6
    torch.testing.assert_close(slope.squeeze(1), difference, rtol=1e-4, atol=1e-6)
    assert slope.abs().max() > 0.01
    assert not module.predict(c).requires_grad


@pytest.mark.parametrize("shape", [(5,), (5, 2), (2, 5, 1), (3, 5, 2), (1, 3, 5, 1), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    module = untrained()
    for predict in (module, module.predict):
        with pytest.raises(ToyError) as error:
            predict(torch.zeros(shape))
        said = f"c: shape {shape} is not allowed; give (M, 1) or (3, M, 1)"
        assert str(error.value) == said


def test_no_draws_and_no_network_are_refused() -> None:
    with pytest.raises(ToyError, match=r"^draws: 0 is not allowed; give an integer >= 1, at most \d+$"):
        untrained().predict(grid(), 0)
    module = FlowVsRegression()
    for predict in (module, module.predict):
        with pytest.raises(
            ToyError, match=r"^FlowVsRegression has no networks yet: .* call module.configure_model\(\)$"
        ):
            predict(grid())
