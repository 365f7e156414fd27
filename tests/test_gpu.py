"""On a GPU, where there is one: every configuration and verb, the CPU's numbers, resumes, and moves between devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_toys.cli import main
from lightning_toys.mirror_descent.annealed import PCMALA
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.schedules import Linear
from lightning_toys.mirror_descent.tilt import StateReward
from tests.conftest import assert_bitwise_equal
from tests.shipped import FIRST, module_class, refusal
from tests.test_matrix import CLOSE, Cell, cells, check, metrics, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = ("--trainer.accelerator", "gpu", "--trainer.devices", "1")
TRAINED = {kind.__name__: c for kind, c in FIRST.items() if kind.trains}


@pytest.mark.parametrize("cell", cells(False), ids=lambda c: c.label)
def test_every_verb(cell: Cell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs or is refused as on a CPU, and what `test` finds after two steps is the CPU's up to roundings."""
    for done, verb, root, words in cell.plan(tmp_path / "gpu", *GPU):
        capsys.readouterr()
        code = main(words)
        check(done, verb, code, capsys.readouterr().err, root)
    if refusal(cell.config, "test", cell.precision):
        return
    for verb in ("fit", "test"):
        if not refusal(cell.config, verb, cell.precision):
            assert main(cell.words(verb, tmp_path / "cpu")) == 0, capsys.readouterr().err
    one, two = (metrics(tmp_path / d / cell.folder("test") / "results.json") for d in ("cpu", "gpu"))
    assert one.keys() == two.keys()
    for name in one:
        # a rounding changes which particle is resampled: a few of two hundred chains are others then
        resampled = "@smc_twisted" in name and not name.startswith(("log_z", "evaluations"))
        close = max(CLOSE[cell.precision], 2e-2 if resampled else 0)
        for a, b in zip(one[name]["values"], two[name]["values"], strict=True):
            assert same(a, b, close), f"{cell.label} {name}: {a} and {b}"


def fit(root: Path, name: str, run: str, steps: int, *flags: str) -> dict[str, Any]:
    """Train to a step; return the last checkpoint."""
    cell = Cell(TRAINED[name], "32-true")
    words = cell.words("fit", root, *flags, "--run.name", run, "--trainer.max_steps", str(steps))
    if "lr_decay" in module_class(cell.config).__init__.__annotations__:
        words += ["--model.lr_decay", "constant"]  # the rate depends on max_steps
    assert main(words) == 0
    last = root / cell.config.parent.name / cell.config.stem / run / "checkpoints/last.ckpt"
    found: dict[str, Any] = torch.load(last, weights_only=True, map_location="cpu")
    return found


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Distance between the weights of two checkpoints."""
    pairs = [(x.double(), b["state_dict"][k].double()) for k, x in a["state_dict"].items() if k.startswith("net.")]
    return float(sum((x - y).square().sum() for x, y in pairs)) ** 0.5


@pytest.mark.parametrize("name", TRAINED)
def test_going_on(name: str, tmp_path: Path) -> None:
    """Stopped and gone on with on the GPU: bit for bit the run left alone. Begun on one device, ended on the other."""
    whole = fit(tmp_path, name, "whole", 6, *GPU)
    half = fit(tmp_path, name, "cut", 3, *GPU)
    cut = fit(tmp_path, name, "cut", 6, *GPU, "--ckpt_path", "last")
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert_bitwise_equal(whole[key], cut[key], key)
    for first, second, run in ((GPU, (), "to the CPU"), ((), GPU, "to the GPU")):
        fit(tmp_path, name, run, 3, *first)
        moved = fit(tmp_path, name, run, 6, *second, "--ckpt_path", "last")
        assert moved["global_step"] == whole["global_step"]
        # what the last three steps changed is the same change, up to roundings
        assert apart(moved, whole) < 0.1 * apart(half, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_see_the_cpus_numbers(dtype: torch.dtype) -> None:
    both = [Noise([(3, 5)], "test", torch.zeros((), dtype=dtype, device=d)) for d in ("cpu", "cuda")]
    for distribution in ("normal", "uniform"):
        one, two = (getattr(n, distribution)(3) for n in both)
        assert two.device.type == "cuda"
        assert (one - two.cpu()).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
        assert one.std() > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_side_by_side(dtype: torch.dtype) -> None:
    """Each block's numbers are its own, bit for bit; its chains are, but for a rounding's decision now and then."""
    keys, like = [(7, 0), (7, 1), (2, 0), (2, 1), (2, 2)], torch.zeros((), dtype=dtype, device="cuda")
    together, alone = Noise(keys, "test", like), [Noise([key], "test", like) for key in keys]
    for distribution in ("normal", "uniform", "normal", "normal"):
        assert torch.equal(
            getattr(together, distribution)(3), torch.cat([getattr(n, distribution)(3) for n in alone], 1)
        )
    sampler = PCMALA(Problem(LinearGaussianJoint(), StateReward(), Linear(), 1.5))
    for one, many in zip(
        *(run_chains(sampler, [7, 2], 2 * BLOCK_SIZE + 10, like, max_blocks=w) for w in (1, 4)), strict=True
    ):
        assert np.isclose(one.a, many.a, atol=1e-4).mean() > 0.999
        assert np.isclose(one.s, many.s, atol=1e-4).mean() > 0.999
