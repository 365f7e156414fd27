"""Compiled noise and steps, against the uncompiled ones."""

from __future__ import annotations

import shutil

import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent import compiled_kernels
from lightning_toys.mirror_descent.annealed import PCMALA
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.kernels import Noise, gaussian_target, init_state, langevin_proposal, select
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.schedules import TFGPlusFinalMALA
from lightning_toys.mirror_descent.tilt import StateReward
from tests.conftest import Runner

LIKE = torch.zeros(())
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_formulas_agree_uncompiled() -> None:
    """Uncompiled, so that a wrong formula would show as more than a rounding."""
    words = Noise([(1, 2)], "test", LIKE).words(4)
    assert torch.allclose(compiled_kernels.box_muller(words), Noise([(1, 2)], "test", LIKE).normal(4), atol=2e-6)
    assert torch.equal(compiled_kernels.uniforms_from_words(words), Noise([(1, 2)], "test", LIKE).uniform(4))
    noise, target, eta = Noise([(0, 0)], "test", LIKE), gaussian_target(0.7, 3.0), 0.3
    x = 2 * noise.normal()
    xi, u = Noise([(0, 1)], "test", LIKE).normal()[0], Noise([(0, 1)], "other", LIKE).uniform()[0]

    class Given(Noise):
        def normal(self, rows: int = 1) -> torch.Tensor:
            return xi.clone().unsqueeze(0)

        def uniform(self, rows: int = 1) -> torch.Tensor:
            return u.unsqueeze(0)

    state = init_state(x, target)
    new, info = langevin_proposal(Given([(0, 0)], "", LIKE), state, target, eta)
    after, accepted = compiled_kernels.gaussian_mala(x[0], xi, u, torch.tensor([0.7, 3.0, (eta / 2) ** 0.5]))
    assert 0.3 < float(accepted.mean()) < 0.99
    same = accepted == info.accepted
    assert float(same.float().mean()) > 0.9999
    assert torch.allclose(after[same], select(info.accepted, new.x, state.x)[0][same], atol=1e-5)


@pytest.mark.slow  # it compiles each sampler; the flag's test compiles one
@compiler
@torchs_own
def test_compiled_chains_match_uncompiled() -> None:
    problem = Problem(
        LinearGaussianJoint(), StateReward(), TFGPlusFinalMALA(), 1.5, Settings(K=10, action_steps_per_level=2)
    )
    eager, fast = (PCMALA(problem).draw(Noise([(0, 0)], "test", LIKE, compiled)) for compiled in (False, True))
    close = (eager.a - fast.a).abs() < 1e-4
    assert float(close.float().mean()) > 0.999
    assert eager.accepted is not None
    assert fast.accepted is not None
    assert torch.allclose(eager.accepted, fast.accepted, atol=2e-3)
    assert eager.squared_jumps.shape == fast.squared_jumps.shape


def test_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToyError, match=r"--model.settings.compile: true is not allowed; there is no C"):
        Settings(compile=True)


@pytest.mark.slow  # a compiler takes its time; the same formulas are held uncompiled above
@compiler
@torchs_own
def test_flag(runner: Runner) -> None:
    mirror = Runner(runner.root, runner.capture, "mirror_descent", ("--figures.enabled", "false"))
    flags = ("--model.samplers", "[pc_mala,ula]", "--model.chains", "2000", "--model.settings.compile", "true")
    assert "joint_kl" in mirror.ok("test", "analytic", *flags)
