"""Compiled noise and steps, against the uncompiled ones."""

from __future__ import annotations

import shutil

import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent import fused
from lightning_toys.mirror_descent.annealed import PCMALA
from lightning_toys.mirror_descent.joint import Joint
from lightning_toys.mirror_descent.kernels import Noise, gaussian, langevin_proposal, select, start
from lightning_toys.mirror_descent.problem import Settings, World
from lightning_toys.mirror_descent.schedules import TFGPlusFinalMALA
from lightning_toys.mirror_descent.tilt import StateReward
from tests.conftest import Runner

LIKE = torch.zeros(())
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_one_formula_and_the_other() -> None:
    """Uncompiled, so that a wrong formula would show as more than a rounding."""
    words = Noise([(1, 2)], "test", LIKE).words(4)
    assert torch.allclose(fused.normals_of(words), Noise([(1, 2)], "test", LIKE).normal(4), atol=2e-6)
    assert torch.equal(fused.uniforms_of(words), Noise([(1, 2)], "test", LIKE).uniform(4))
    noise, law, eta = Noise([(0, 0)], "test", LIKE), gaussian(0.7, 3.0), 0.3
    x = 2 * noise.normal()
    xi, u = Noise([(0, 1)], "test", LIKE).normal()[0], Noise([(0, 1)], "other", LIKE).uniform()[0]

    class Given(Noise):
        def normal(self, rows: int = 1) -> torch.Tensor:
            return xi.clone().unsqueeze(0)

        def uniform(self, rows: int = 1) -> torch.Tensor:
            return u.unsqueeze(0)

    state = start(x, law)
    new, info = langevin_proposal(Given([(0, 0)], "", LIKE), state, law, eta)
    after, accepted = fused.gaussian_mala(x[0], xi, u, torch.tensor([0.7, 3.0, (eta / 2) ** 0.5]))
    assert 0.3 < float(accepted.mean()) < 0.99
    same = accepted == info.accepted
    assert float(same.float().mean()) > 0.9999
    assert torch.allclose(after[same], select(info.accepted, new.x, state.x)[0][same], atol=1e-5)


@compiler
@torchs_own
def test_compiled_chains_are_the_same_chains() -> None:
    world = World(Joint(), StateReward(), TFGPlusFinalMALA(), 1.5, Settings(K=10, action_steps_per_level=2))
    plain, quick = (PCMALA(world).draw(Noise([(0, 0)], "test", LIKE, compiled)) for compiled in (False, True))
    close = (plain.a - quick.a).abs() < 1e-4
    assert float(close.float().mean()) > 0.999
    assert plain.accepted is not None
    assert quick.accepted is not None
    assert torch.allclose(plain.accepted, quick.accepted, atol=2e-3)
    assert plain.jumps.shape == quick.jumps.shape


def test_no_compiler_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToyError, match=r"--model.settings.compile: true is not allowed; there is no C"):
        Settings(compile=True)


@compiler
@torchs_own
def test_the_flag_by_the_command_line(runner: Runner) -> None:
    mirror = Runner(runner.root, runner.capture, "mirror_descent", ("--figures.enabled", "false"))
    flags = ("--model.samplers", "[pc_mala,ula]", "--model.chains", "2000", "--model.settings.compile", "true")
    assert "joint_kl" in mirror.ok("test", "analytic", *flags)
