"""The local regret of a model, against its definition; what it is of is the agent's own gradient, not what Adam got."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightning_toys.bilevel.control.regret import LocalRegret, model_size
from lightning_toys.bilevel.regression.metrics import local_regret
from tests.bilevel.control.test_cli import QUIET, SMALL
from tests.conftest import Runner


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_it_is_its_definition() -> None:
    """Over 9 gradients and windows of 1 and 4; the regression's regret is the same function."""
    g = np.random.default_rng(4).normal(size=(9, 2, 5))
    for n in (1, 4):
        regret = LocalRegret(2, 5, n)
        terms = torch.stack([regret.add(torch.from_numpy(x)) for x in g])
        expected = np.stack([np.square(g[max(0, t - n + 1) : t + 1].mean(0)).sum(-1) for t in range(9)])
        np.testing.assert_allclose(terms, expected)
        np.testing.assert_allclose(regret.mean, expected.mean(0))
        np.testing.assert_allclose(local_regret(torch.from_numpy(g), n), expected)
    assert LocalRegret(1, 2).mean.isnan().all()
    assert model_size([torch.zeros(2, 3, 4), torch.zeros(2, 1)]) == 13


def test_averages_and_clips_are_not_in_it(runner: Runner) -> None:
    """After the first step of learning, of which the first mean is the gradient itself, the networks are the same."""
    torch.set_default_dtype(torch.float32)
    flags = (*SMALL, *QUIET, "--trainer.max_steps", "41", "--model.agent", "vaml", "--model.regret_every", "41")
    control = Runner(runner.root, runner.capture, "bilevel", flags)
    found = []
    for name, more in (
        ("plain", ()),
        ("smooth", ("--model.solver.smoothing", "5")),
        ("clipped", ("--model.clip_grad_norm", "1e-2")),
    ):
        control.ok("fit", "control", *more, "--run.name", name)
        state = control.checkpoint("control", name)["state_dict"]
        assert int(state["regret.count"]) == 1
        found.append(state["regret.total"])
    assert found[0].sqrt().min() > 10 * 1e-2  # the norm: the clip bites
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=0)
    err = control.ok("fit", "control", "--model.agent", "model_free", "--run.name", "none")
    assert "--model.regret_every" in err
    assert not [k for k in control.checkpoint("control", "none")["state_dict"] if k.startswith("regret")]
