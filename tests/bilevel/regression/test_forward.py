"""Calling the module without a Trainer: what is predicted is what the commands wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.bilevel import DriftStream, WindowRegression
from lightning_toys.errors import ToyError
from tests.bilevel.regression.test_cli import TINY
from tests.conftest import Runner

SEEDS = [2, 5]
FLAGS = {
    "single": ("--model.algorithm", "funcbo"),
    "double": ("--model.algorithm", "aid", "--model.weights", "softmax", "--trainer.precision", "64-true"),
}


def data() -> DriftStream:
    return DriftStream(window=7, inner_points=12, outer_points=12)


def outer_points() -> Tensor:
    return torch.from_numpy(data().stream(SEEDS).x[:, 12:])


def built() -> WindowRegression:
    module = WindowRegression(seeds=SEEDS, hidden=6)
    module.sizes = module.measure(data())
    module.configure_model()
    return module


@pytest.mark.parametrize("precision", FLAGS)
def test_a_loaded_module_predicts_what_the_command_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    runner = Runner(tmp_path / "logs", capsys, "bilevel", TINY)
    runner.ok("fit", "regression", *FLAGS[precision], "--trainer.max_steps", "12")
    runner.ok("predict", "regression", *FLAGS[precision], "--ckpt_path", "last")
    folder = runner.folder("regression")
    with np.load(folder / "predictions.npz") as found:
        predicted, lag_weights = torch.from_numpy(found["prediction"]), torch.from_numpy(found["lambda"])
    module = WindowRegression.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert predicted.shape == (2, 12, 3)
    assert predicted.dtype == (torch.float64 if precision == "double" else torch.float32)
    assert torch.equal(module(outer_points()), predicted)
    assert torch.equal(module.lag_weights, lag_weights)
    assert (module(outer_points()) - built()(outer_points())).abs().max() > 1e-2  # not those at the start


def test_inputs_without_a_replica_axis_are_every_replicas() -> None:
    module, x = built(), outer_points()[0]
    found = module(x)
    assert found.shape == (2, 12, 3)
    assert torch.equal(found, module(torch.stack([x, x])))
    for r, seed in enumerate(SEEDS):
        solo = WindowRegression(seeds=[seed], hidden=6)
        solo.sizes = module.sizes
        solo.configure_model()
        torch.testing.assert_close(found[r], solo(x)[0], rtol=1e-6, atol=1e-7)
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_predictions_have_a_graph_unless_gradients_are_disabled() -> None:
    module, x = built(), outer_points().float().requires_grad_()
    found = module(x)
    (gradient,) = torch.autograd.grad(found[0].sum(), x)
    step = torch.zeros_like(x)
    step[0, 3, 1] = 1e-2
    with torch.no_grad():
        plus, minus = module(x + step), module(x - step)
    assert not plus.requires_grad
    assert float(gradient[0, 3, 1]) == pytest.approx(float((plus - minus)[0].sum()) / 2e-2, rel=1e-2)
    assert float(gradient[1].abs().max()) == 0


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 4, 5), (2, 4, 6), (1, 2, 4, 5)])
def test_other_shapes_are_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(ToyError) as caught:
        built()(torch.zeros(shape))
    assert str(caught.value) == f"x: shape {shape} is not allowed; give (M, 5) or (2, M, 5)"


def test_a_module_that_is_not_built_says_what_to_do() -> None:
    with pytest.raises(ToyError, match=r"^WindowRegression has no networks yet: .*load_from_checkpoint.*$"):
        WindowRegression(seeds=SEEDS)(torch.zeros(4, 5))
