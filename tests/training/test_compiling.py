"""``--model.compile true``: the same training, by compiled code; on a GPU, where there is one, by CUDA graphs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_toys.cli import main
from lightning_toys.training.module import ToyModule
from tests.conftest import REPO, Runner
from tests.shipped import FIRST, tiny

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
COMPILED = {kind.__name__: c for kind, c in FIRST.items() if "compile" in kind.__init__.__annotations__}
DOUBLE = ("--trainer.precision", "64-true")  # in single precision Muon rounds to 8 bits
ORACLE = ("--model.tangent", "oracle", "--data.coupling", "Independent")
CASES = [
    pytest.param("GaussianPolicy", DOUBLE, marks=pytest.mark.slow),  # mirror_descent compiles in the gate
    pytest.param("FlowVsRegression", ("--model.mode", "mip"), marks=pytest.mark.slow),
    pytest.param("FlowVsRegression", ("--model.network.kind", "film", "--model.mode", "flow"), marks=pytest.mark.slow),
    pytest.param("FlowVsRegression", ("--trainer.precision", "bf16-mixed"), marks=pytest.mark.slow),
    pytest.param("MeanFlowPolicy", DOUBLE, marks=pytest.mark.slow),
    pytest.param("MeanFlowPolicy", ("--model.target_std_as", "head", *DOUBLE), marks=pytest.mark.slow),
    pytest.param("MeanFlowPolicy", (*ORACLE, *DOUBLE), marks=pytest.mark.slow),
    pytest.param("FlowPolicy", DOUBLE, marks=pytest.mark.slow),
]


def test_what_takes_the_flag() -> None:
    assert set(COMPILED) == {"FlowVsRegression", "GaussianPolicy", "MeanFlowPolicy", "FlowPolicy"}


@compiler
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=gpu)])
@pytest.mark.parametrize(("name", "flags"), CASES)
def test_the_same_training(
    name: str, flags: tuple[str, ...], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a break in the graph; begun by one and ended by the other, too."""
    config, parts = COMPILED[name], set()
    quick = ToyModule.compiled

    def seen(self: ToyModule, f: Any) -> Any:
        out = quick(self, f)
        parts.update(self.compiled_parts)
        return out

    monkeypatch.setattr(ToyModule, "compiled", seen)

    def fit(run: str, steps: int, *more: str) -> dict[str, Any]:
        words = ["fit", "-c", str(config.relative_to(REPO)), *tiny(config), "--run.root", str(tmp_path), *flags]
        words += [] if name == "FlowVsRegression" else ["--model.lr_decay", "constant"]  # whatever the length
        words += ["--run.name", run, "--trainer.max_steps", str(steps), "--figures.enabled", "false", *more]
        assert main([*words, "--trainer.accelerator", device, "--trainer.devices", "1"]) == 0
        last = tmp_path / config.parent.name / config.stem / run / "checkpoints/last.ckpt"
        found: dict[str, Any] = torch.load(last, weights_only=True, map_location="cpu")["state_dict"]
        return found

    plain = fit("plain", 12)
    assert not parts
    torch._dynamo.reset()
    counters.clear()
    quickly = fit(
        "compiled", 12, "--model.compile", "true", "--trainer.val_check_interval", "5"
    )  # blocks of 5 and of 2
    batches = 2 if name == "FlowVsRegression" else 1  # of how many sizes
    assert counters["stats"]["unique_graphs"] == batches
    assert parts == {"losses"}
    assert not counters["graph_break"]
    assert sum(counters["frames"].values()) > 0
    fit("mixed", 5)
    mixed = fit("mixed", 12, "--ckpt_path", "last", "--model.compile", "true")
    close = {"rtol": 1e-4, "atol": 2e-5} if "bf16-mixed" not in flags else {"rtol": 2e-2, "atol": 1e-3}
    moved = 0.0
    begin = fit("begin", 1)
    for key, w in plain.items():
        for other in (quickly, mixed):
            assert torch.allclose(w, other[key], **close), key
        moved = max(moved, float((w - begin[key]).abs().nan_to_num(0.0).max()))
    assert moved > 10 * close["atol"]  # Adam moves a weight by its rate a step: a wrong gradient would be seen


def test_no_compiler_is_said_at_once(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr("lightning_toys.training.compiling.shutil.which", lambda _: None)
    code, err = runner.code("fit", "flow", "--model.compile", "true")
    assert code == 2
    assert "--model.compile: true is not allowed; there is no C++ compiler" in err
    assert err.count("\n") == 1
    assert not runner.folder("flow").exists()
