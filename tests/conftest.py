from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from lightning_toys.cli import main
from tests.malformed import Refusal

REPO = Path(__file__).resolve().parent.parent
SMALL = (
    "--model.network.hidden",
    "16",
    "--figures.enabled",
    "false",
    "--model.evaluation.draws",
    "2",
    "--data.num_eval",
    "101",
)


SAMPLED = ("test_malformed_", "test_names.py")  # long lists of faults and of names


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave four of five items of the long lists to `make test-all`: by their names, the first of each test stays."""
    seen: set[str] = set()
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.path.name.startswith(SAMPLED):
            family = item.nodeid.partition("[")[0]
            if family in seen and crc32(item.nodeid.encode()) % 5:
                item.add_marker(pytest.mark.slow)
            seen.add(family)


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    torch.set_num_threads(1)


class Runner:
    """Runs command lines against a private root."""

    def __init__(
        self,
        root: Path,
        capture: pytest.CaptureFixture[str],
        experiment: str = "flow_vs_regression",
        small: tuple[str, ...] = SMALL,
    ) -> None:
        self.root, self.capture, self.experiment, self.small = root, capture, experiment, small

    def words(self, verb: str, variant: str, *flags: str) -> list[str]:
        config = f"configs/{self.experiment}/{variant}.yaml"
        return [verb, "-c", config, "--run.root", str(self.root), *self.small, *flags]

    def ok(self, verb: str, variant: str, *flags: str) -> str:
        code, err = self.code(verb, variant, *flags)
        assert code == 0, err
        return err

    def code(self, verb: str, variant: str, *flags: str) -> tuple[int, str]:
        return self.raw(*self.words(verb, variant, *flags))

    def raw(self, *words: str) -> tuple[int, str]:
        self.capture.readouterr()
        code = main(list(words))
        return code, self.capture.readouterr().err

    def folder(self, variant: str, name: str = "version_0") -> Path:
        return self.root / self.experiment / variant / name

    def checkpoint(self, variant: str, name: str = "version_0", which: str = "last") -> dict[str, Any]:
        path = self.folder(variant, name) / "checkpoints" / f"{which}.ckpt"
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
        return loaded

    def start(self, verb: str, variant: str, *flags: str, **env: str) -> subprocess.Popen[str]:
        """Start the real launcher in a process of its own."""
        words = [sys.executable, "cli.py", *self.words(verb, variant, *flags)]
        full = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        return subprocess.Popen(words, cwd=REPO, env=full, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "logs", capsys)


def assert_bitwise_equal(a: Any, b: Any, where: str = "") -> None:
    """Hold two trees of tensors and plain values against each other, bit by bit."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: differs by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


SMALL_POLICY = (
    *("--model.network.hidden", "16", "--figures.enabled", "false"),
    *("--model.evaluation.samples", "200", "--model.evaluation.pairs", "50"),
)


@pytest.fixture
def policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "logs", capsys, "generative_policy", SMALL_POLICY)


@pytest.fixture
def bitwise() -> Callable[..., None]:
    return assert_bitwise_equal


@pytest.fixture
def refuse(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    monkeypatch.chdir(tmp_path)  # what is written beside the point is seen too
    return Refusal(tmp_path, capfd)
