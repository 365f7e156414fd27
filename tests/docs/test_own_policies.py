"""The files of docs/examples/own for generative_policy, used from another folder as a reader would."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_toys.cli import main
from lightning_toys.errors import ToyError
from lightning_toys.generative_policy import Coupling, Mixture, MixtureData
from tests.conftest import REPO

CONFIG = ("-c", "generative_policy/flow")
SMALL = (
    *("--model.seeds", "[0,1]", "--trainer.val_check_interval", "40", "--figures.enabled", "false"),
    *("--model.evaluation.samples", "400", "--model.evaluation.pairs", "200"),
)
NETWORK = ("--model.network.hidden", "16")
FOLDER = Path("lightning_logs/generative_policy/flow")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _from_the_repository: None) -> Path:
    for file in (REPO / "docs/examples/own").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def fit(capsys: pytest.CaptureFixture[str], name: str, *flags: str) -> dict[str, Any]:
    assert main(["fit", *CONFIG, *SMALL, *flags, "--run.name", name]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads((FOLDER / name / "results.json").read_text())
    return found


def test_a_sampler_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ring's integral is known; seeds shift the grid."""
    from my_density import Ring  # type: ignore[import-not-found]
    from my_sampler import Grid  # type: ignore[import-not-found]

    one, other = (Grid().draw(Ring(0.5, 0.05), seed, "train") for seed in (0, 1))
    assert one.log_z == pytest.approx(math.log(2 * math.pi * 0.5 * 0.05 * math.sqrt(2 * math.pi)), abs=1e-3)
    assert float(one.log_weights.exp().sum()) == pytest.approx(1)
    assert not torch.equal(one.points, other.points)
    assert float(one.points.abs().max()) <= 1
    own = ("--data.target", "my_density.Ring", "--data.sampler", "my_sampler.Grid", "--data.sampler.cells", "60")
    found = fit(capsys, "grid", *own, *NETWORK, "--trainer.max_steps", "40")
    assert 50 < min(found["metrics"]["effective_samples"]["values"]) < 3600


@pytest.mark.slow
def test_a_policy_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six Gaussians, on the target and on actions out of a file, where the data have three modes."""
    own = ("--model", "my_policy.MixturePolicy", "--model.components", "6", "--model.lr", "0.03")
    three = ("--data.target.std", "0.1", "--trainer.max_steps", "400")
    found = fit(capsys, "mixture", *own, *three)
    assert found["label"] == "MixturePolicy of 6"
    assert max(found["metrics"]["tv"]["values"]) < 0.15
    assert found["headline"] == ["tv", "off3", "entropy_knn"]
    file = ("--data", "OfflineActions", "--data.path", "actions.csv", "--trainer.max_steps", "400")
    offline = fit(capsys, "offline", *own, *file)
    reference = offline["references"]["training_rows"]
    assert max(offline["metrics"]["sliced_w2"]["values"]) < 2 * reference["sliced_w2"] + 0.05
    assert max(offline["metrics"]["nll"]["values"]) < 0.5
    assert main(["compare", str(FOLDER)]) == 0, capsys.readouterr().err
    from my_policy import MixturePolicy  # type: ignore[import-not-found]

    checkpoint = FOLDER / "mixture/checkpoints/last.ckpt"
    module = MixturePolicy.load_from_checkpoint(checkpoint, weights_only=True)
    assert module.sample(50).shape == (2, 50, 2)


def test_a_mixture_by_the_reverse_kl(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The divergence and its gradient in all parameters against quadrature on a line; then a fit, which has kl."""
    from my_policy import MixtureParameters

    target, net = Mixture([[-0.5], [0.6]], 0.2, [1.0, 2.0]), MixtureParameters([3], 2, 1).double()
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64).view(1, -1, 1)
    log_q = net.log_prob(x)
    exact = (log_q.exp() * (log_q - target.log_prob(x))).sum() * float(x[0, 1] - x[0, 0])
    e = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).expand(1, 2, -1)[..., None]
    found = net.reverse_kl(target.log_prob, e).sum()
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)
    wanted = torch.autograd.grad(exact, list(net.parameters()))
    for a, b in zip(torch.autograd.grad(found, list(net.parameters())), wanted, strict=True):
        assert torch.allclose(a, b, rtol=0.01, atol=1e-3)
    own = ("--model", "my_policy.MixturePolicy", "--model.components", "2", "--model.divergence", "reverse_kl")
    kl = fit(capsys, "reverse", *own, "--trainer.max_steps", "30")["metrics"]["kl"]["values"]
    longer = fit(capsys, "longer", *own, "--trainer.max_steps", "300")["metrics"]["kl"]["values"]
    assert all(0 < b < a for a, b in zip(kl, longer, strict=True))


def test_a_density_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ring's integral is 2 pi radius width sqrt(2 pi), for a width so small; both samplers, each policy."""
    ring = ("--data.target", "my_density.Ring", "--data.target.width", "0.1", "--trainer.max_steps", "2")
    log_z = math.log(2 * math.pi * 0.6 * 0.1 * math.sqrt(2 * math.pi))
    annealed = ("--data.sampler", "AnnealedMala", "--data.sampler.particles", "1000")
    uniform = ("--data.sampler", "ImportanceResampling", "--data.sampler.draws", "20000")
    for name, flags in (("annealed", (*annealed, *NETWORK)), ("uniform", (*uniform, *NETWORK))):
        found = fit(capsys, name, *ring, *flags)
        effective = found["metrics"]["effective_samples"]["values"]
        assert all(100 < n < 20_000 for n in effective)
        assert np.abs(np.array(found["metrics"]["log_z"]["values"]) - log_z).max() < 4 / math.sqrt(min(effective))
        assert found["references"]["target"]["entropy_sampled"] == pytest.approx(
            math.log(2 * math.pi * 0.6) + 0.5 * math.log(2 * math.pi * math.e * 0.01), abs=0.15
        )
        assert "tv" not in found["metrics"]
    gaussian = ("--model", "GaussianPolicy", "--model.parameters", "free", *uniform)
    found = fit(capsys, "gaussian", *ring[:-1], "200", *gaussian, "--model.lr", "0.05")
    # an arc of the ring: above 0, and below what any one point of it is from the whole circle
    assert all(0.3 < v < 2.5 for v in found["metrics"]["kl"]["values"])
    assert found["headline"][0] == "kl"


def test_a_coupling_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from my_coupling import Sorted  # type: ignore[import-not-found]

    coupling = ("--data.coupling", "my_coupling.Sorted", "--data.coupling.axis", "1", "--trainer.max_steps", "2")
    found = fit(capsys, "sorted", *coupling, *NETWORK)
    assert any("my_coupling.Sorted" in str(v) for v in found["settings"].values())
    x, e = np.array([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0]]), np.array([[1.0, -1.0], [2.0, 5.0], [3.0, 0.0]])
    assert Sorted(1, 3).pair(x, e).tolist() == [[2.0, 5.0], [1.0, -1.0], [3.0, 0.0]]


class Drawing(Coupling):
    """What a coupling of somebody's own may get wrong."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def pair(self, x: np.ndarray, e: np.ndarray) -> np.ndarray:
        if self.fault == "in place":
            e += 1
        out = {"shape": e[:, :1], "repeated": np.repeat(e[:1], len(e), 0), "random": np.random.permutation(e)}
        return out.get(self.fault, e)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("shape", r"pair gives \(64, 1\); give an array \(64, 2\)"),
        ("repeated", "its rows are not those of e, each once"),
        ("in place", "writes to e; give a new array"),
        ("random", "gives something else at the second call"),
    ],
)
def test_couplings_that_break_the_contract(fault: str, says: str) -> None:
    with pytest.raises(ToyError, match=f"--data.coupling: Drawing.*{says}"):
        MixtureData(coupling=Drawing(fault))
