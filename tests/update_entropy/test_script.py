"""The probe in a script: of the policies that were just trained, by any Trainer, as of their checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from toy_text import OddData

from lightning_toys.update_entropy import Plan, Rollouts, TinyPolicy, UpdateEntropy


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _from_the_repository: None) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(**settings: Any) -> Trainer:
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet, **settings})


def found(module: UpdateEntropy) -> dict[str, list[float]]:
    assert module.last_report is not None
    return module.last_report.metrics


def test_the_next_step_is_probed_of_what_was_trained(
    bitwise: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(prompts=2, group=2, eval_prompts=4, eval_group=1, etas=[1e-2], filter_zero_advantage=False,
                counterfactuals=False, per_sequence=False, second_order=False)  # fmt: skip
    module = UpdateEntropy(
        [3, 5], TinyPolicy("gpt2", hidden=16, layers=1, heads=2), Rollouts(2, 2), 2, lr=0.1, eval_prompts=2, plan=plan
    )
    data, t = OddData(digits=1, batch_size=4), trainer(max_steps=4)
    t.fit(module, data)
    t.save_checkpoint("last.ckpt")
    capfd.readouterr()
    t.test(module, data, verbose=False)
    first = found(module)
    steps = {m.step for p in module.probe_results for m in p.update.state.moments.values()}
    assert steps == {2}  # of the policy gradient
    assert 0.0 not in (*first["slope_momentum"], *first["slope_batch"])
    trainer().test(module, data, verbose=False)
    bitwise(first, found(module))
    loaded = UpdateEntropy.load_from_checkpoint("last.ckpt")
    trainer().test(loaded, data, verbose=False)
    bitwise(first, found(loaded))
    assert "has not begun" not in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]  # nothing is logged, so nothing is written

    trainer(logger=CSVLogger("logs", version="one")).test(module, data, verbose=False)
    assert Path("logs/lightning_logs/one/probe/seed_5/summary.json").exists()
    untrained = UpdateEntropy(**{**module.hparams, "warm_steps": 0})
    trainer().test(untrained, data, verbose=False)
    assert "the policy gradient has not begun" in capfd.readouterr().err
    assert found(untrained)["slope_momentum"] == [0.0, 0.0]
