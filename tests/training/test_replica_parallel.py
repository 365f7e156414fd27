"""Replicas shared out over processes: the run of one process, checkpoint, curves and results, at any number of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys.cli import main
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.replica_parallel import share
from tests.conftest import REPO, Runner
from tests.processes import two_ranks
from tests.shipped import FIRST, WHOLE, module_class, tiny

ABLE = {kind: c for kind, c in FIRST.items() if "parallel" in kind.__init__.__annotations__}
# in the gate, the one with the most to share; `make test-all` has all
SHARED = [c for kind, c in ABLE.items() if WHOLE or kind.__name__ == "MeanFlowPolicy"]
SEEDS = "[4,1,7]"  # over two processes: one and two
OPTIONS = {  # all that has a replica axis: shadow copies, best weights, Muon's momenta
    "FlowVsRegression": ("--model.ema_decay", "0.9", "--data.holdout", "0.2", "--data.noise", "0.1"),
    "MeanFlowPolicy": ("--model.optimizer", "muon", "--model.ema_decay", "0.9"),
}


def words(config: Path, root: Path, *flags: str) -> list[str]:
    return [
        *("fit", "-c", str(config.relative_to(REPO)), "--run.root", str(root), "--run.name", "run", *tiny(config)),
        *("--model.seeds", SEEDS, "--trainer.accelerator", "cpu", "--trainer.precision", "64-true"),
        *("--trainer.val_check_interval", "10", "--trainer.log_every_n_steps", "5", "--figures.enabled", "false"),
        *("--model.clip_grad_norm", "1.0", *OPTIONS.get(module_class(config).__name__, ()), *flags),
    ]


def close(a: Any, b: Any, where: str, tolerance: float = 1e-8) -> None:
    """Compare two trees; the products of three replicas and of two round differently."""
    assert isinstance(a, dict) == isinstance(b, dict), where
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape, where
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            close(a[k], b[k], f"{where}/{k}", tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{where}/{i}", tolerance)
    elif isinstance(a, float):
        assert isinstance(b, float), where
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance, nan_ok=True), where
    else:
        assert a == b, where


def numbers(rows: list[dict[str, str]]) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in r.items() if v} for r in rows]


def test_shares_are_whole_and_even() -> None:
    for replicas in range(1, 12):
        for world_size in range(1, replicas + 1):
            parts = [list(range(replicas))[share(replicas, r, world_size)] for r in range(world_size)]
            assert [r for part in parts for r in part] == list(range(replicas))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert max(map(len, parts)) == -(-replicas // world_size)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Trained apart, cut off and gone on with by one process and by two: the checkpoint is that of one process."""
    apart = ("--model.parallel", "replicas", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    first, rest = ("--trainer.max_steps", "15"), ("--trainer.max_steps", "30", "--ckpt_path", "last")
    jobs = [words(c, tmp_path / k, *flags, *apart) for c in SHARED for k, flags in
            (("two", first), ("two", rest), ("half", first))]  # fmt: skip
    assert len(ABLE) >= 6
    assert len(SHARED) == (len(ABLE) if WHOLE else 1)
    for codes in two_ranks(jobs, tmp_path):
        assert [code for code, _ in codes] == [0] * len(jobs), [said for code, said in codes if code]
    for config in SHARED:
        assert main(words(config, tmp_path / "one", *first)) == 0
        assert main(words(config, tmp_path / "one", *rest)) == 0
        assert main(words(config, tmp_path / "half", *rest)) == 0  # begun by two, ended by one
        folders = {k: tmp_path / k / config.parent.name / config.stem / "run" for k in ("one", "two", "half")}
        found = {k: torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for k, f in folders.items()}
        for k in ("two", "half"):
            for key in ("state_dict", "optimizer_states", "global_step"):
                close(found["one"][key], found[k][key], f"{config.stem} {k} {key}")
            assert found[k]["toy"]["seeds"] == [4, 1, 7]
            rows = [numbers(read_csv(folders[x] / "metrics.csv")) for x in ("one", k)]
            close(rows[0], rows[1], f"{config.stem} {k} rows", 1e-6)
            results = [json.loads((folders[x] / "results.json").read_text()) for x in ("one", k)]
            close(results[0]["metrics"], results[1]["metrics"], f"{config.stem} {k} results", 1e-6)
        # negative control: the replicas differ, so that a wrong order would be seen
        name = next(n for n, v in found["one"]["state_dict"].items() if n.startswith("net.") and v.dim() > 1)
        moved = found["one"]["state_dict"][name].flip(0)
        assert not torch.allclose(moved, found["two"]["state_dict"][name])


def test_refusals(runner: Runner) -> None:
    two = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--model.parallel", "replicas")
    for flags, says in [
        (("--model.seeds", "[0]", *two), "--model.parallel: replicas is not allowed with 1 of --model.seeds on 2"),
        (("--model.seeds", "[0,1]", *two, "--trainer.strategy", "fsdp"), "--trainer.strategy: 'fsdp' is not allowed"),
        (("--model.parallel", "rows"), "--model.parallel: 'rows' is not allowed; give one of batch, replicas"),
    ]:
        code, err = runner.code("fit", "flow", "--trainer.max_steps", "4", *flags)
        assert code == 2
        assert says in err
        assert err.count("\n") == 1, err
        assert not runner.folder("flow").exists()
    # alone, there is nothing to share out
    runner.ok("fit", "flow", "--trainer.max_steps", "4", "--model.seeds", "[0,1]", "--model.parallel", "replicas")
