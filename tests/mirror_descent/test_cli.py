"""mirror_descent through the command line: outputs, flags that change what they should, ranks, precision, bad input."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_toys.mirror_descent import sample_figures
from tests.conftest import Runner

SMALL = (
    *(
        "--model.seeds",
        "[0,1]",
        "--model.chains",
        "400",
        "--model.sweep_max_refresh",
        "0",
        "--figures.enabled",
        "false",
    ),
    *("--model.settings.mcmc_steps", "12", "--model.settings.predictor_K", "10", "--model.settings.smc_K", "5"),
    *("--model.settings.smc_particles", "128"),
)


@pytest.fixture
def mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "logs", capsys, "mirror_descent", SMALL)


def results(runner: Runner, *flags: str, name: str = "version_0") -> dict[str, Any]:
    runner.ok("test", "analytic", "--run.name", name, *flags)
    loaded: dict[str, Any] = json.loads((runner.folder("analytic", name) / "results.json").read_text())
    return loaded


def test_outputs(mirror: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_figures, "FRAMES", 3)  # each costs a tenth of a second
    flags = ("--model.samplers", "[pc_mala,gibbs,sde_poe]", "--figures.enabled", "true", "--figures.dpi", "30")
    err = mirror.ok("test", "analytic", *flags, "--model.sweep_max_refresh", "1", "--model.sweep_chains", "200", *(
        "--model.gif", "true", "--model.settings.K", "5", "--model.settings.mcmc_steps", "40"))  # fmt: skip
    folder = mirror.folder("analytic")
    figures = {p.name for p in (folder / "figures").iterdir()}
    assert {"match_pc_mala.png", "match_gibbs.png", "frontier.png", "kl_vs_refresh.png", "ranks.png"} <= figures
    for name in ("pc_mala", "gibbs", "sde_poe"):
        assert (folder / "figures" / f"anim_{name}.gif").read_bytes()[:3] == b"GIF"
    table = (folder / "facts.md").read_text()
    assert table in err + "\n"
    assert "| gibbs | lag-1 autocorrelation | 0.50000 |" in table
    assert "| target | 0.9375 | 0.2500 | 1.0000 | 1.0000 | 0 | - |" in table
    assert "\n| sde_poe | 0." in table
    assert "\n| gibbs | 0.9375 | 0.2500" not in table.partition("| target |")[2]  # correct, and so left out
    found = json.loads((folder / "results.json").read_text())
    assert {"joint_kl", "joint_kl@gibbs", "acceptance@pc_mala", "rhat@gibbs", "ess_per_step@gibbs"} <= found[
        "metrics"
    ].keys()
    assert found["metrics"]["joint_kl"]["values"] == found["metrics"]["joint_kl@pc_mala"]["values"]
    for kind in ("action", "state", "residual"):
        raw, adjusted = (found["arrays"]["p_values"][f"{kind}_ks_{p}@gibbs"] for p in ("p", "p_holm"))
        assert all(b >= a for a, b in zip(raw, adjusted, strict=True))
    mirror.ok("validate", "analytic", "--model.samplers", "[mala]", "--run.name", "validated")
    assert json.loads((mirror.folder("analytic", "validated") / "validation.json").read_text())["metrics"]["action_kl"]
    mirror.ok("predict", "analytic", "--model.samplers", "[mala]", "--run.name", "predicted")
    with np.load(mirror.folder("analytic", "predicted") / "predictions.npz") as file:
        pairs = file["mala"]
    assert pairs.shape == (2, 400, 2)


# every setting of the published script, by our name, and the sampler and metric that it has to change
EFFECTS = [
    ("--data.sigma_a", "0.7", "pc_mala", "action_mean"),
    ("--data.mu_a", "0.4", "pc_mala", "action_mean"),
    ("--model.reward.r_wa", "2.0", "pc_mala", "action_mean"),
    ("--model.reward.r_a", "1.0", "pc_mala", "action_mean"),
    ("--model.reward.r_ws", "2.0", "pc_mala", "action_mean"),
    ("--model.reward.r_s", "0.5", "pc_mala", "action_mean"),
    ("--data.alpha", "0.5", "pc_mala", "slope"),
    ("--data.sigma_sprime", "0.9", "pc_mala", "state_var"),
    ("--data.mu_eps", "0.5", "pc_mala", "state_mean"),
    ("--model.lambda_scale", "0.5", "pc_mala", "action_mean"),
    ("--model.settings.K", "3", "pc_mala", "action_mean"),
    ("--model.settings.abar_min", "0.5", "pc_mala", "action_mean"),
    ("--model.settings.refresh_L", "0", "pc_ula", "action_mean"),
    ("--model.settings.action_steps_per_level", "3", "pc_mala", "action_mean"),
    ("--model.settings.mala_step", "0.1", "pc_mala", "acceptance"),
    ("--model.settings.abar_max", "0.9", "pc_mala", "action_mean"),
    ("--model.settings.ula_step", "0.2", "pc_ula", "action_var"),
    ("--model.settings.particles", "1", "pc_ula", "action_mean"),
    ("--model.settings.final_refresh", "false", "pc_joint_mala", "state_mean"),
    ("--model.settings.mcmc_steps", "4", "mala", "action_mean"),
    ("--model.settings.predictor_K", "20", "sde_poe", "action_mean"),
    ("--model.settings.smc_K", "9", "smc_twisted", "action_mean"),
    ("--model.settings.smc_particles", "64", "smc_twisted", "log_z"),
    ("--model.settings.smc_twist", "dps", "smc_twisted", "action_mean"),
    ("--model.settings.ess_threshold", "1.0", "smc_twisted", "resampled"),
    ("--model.bins", "20", "pc_mala", "action_kl_hist"),
    ("--model.seeds", "[4,5]", "pc_mala", "action_mean"),
    ("--model.schedule", "LateRamp", "pc_mala", "action_mean"),
    ("--model.schedule", "LateConstant", "pc_mala", "action_mean"),
    ("--model.schedule", "SigmaPower", "pc_mala", "action_mean"),
    ("--model.schedule", "TFGPlusFinalMALA", "pc_mala", "action_mean"),
]


unchanged: dict[str, dict[str, Any]] = {}  # by sampler: what is found with no flag but SMALL's


@pytest.mark.parametrize(("flag", "value", "sampler", "metric"), EFFECTS, ids=lambda x: x)
def test_every_flag_changes_a_metric(mirror: Runner, flag: str, value: str, sampler: str, metric: str) -> None:
    flags = ("--model.samplers", f"[{sampler}]")
    if sampler not in unchanged:
        unchanged[sampler] = results(mirror, *flags, name="before")["metrics"]
    before = unchanged[sampler][metric]["values"]
    after = results(mirror, *flags, flag, value, name="after")["metrics"][metric]["values"]
    assert np.abs(np.array(before) - np.array(after)).min() > 1e-6


@pytest.mark.slow  # tests/commands/sweep has sweeps in the gate
def test_sweep_without_training(mirror: Runner) -> None:
    flags = ("--model.samplers", "[mala,ula]", "--grid.model.lambda_scale", "[0.5,1.5]")
    mirror.ok("sweep", "analytic", *flags)
    folder = mirror.folder("analytic-sweep", "comparison")
    text = (folder / "comparison.md").read_text()
    assert "| lambda_scale=0.5 | 2 |" in text
    assert "joint_kl by readout" in text
    assert "2 of 2 cells are done already" in mirror.ok("sweep", "analytic", *flags)


def test_state_enters_by_d_and_s(mirror: Runner) -> None:
    flags = ("--model.samplers", "[pc_mala]", "--data.mu_eps", "0.0")
    zero = results(mirror, *flags, "--data.d", "0.5", name="zero")["metrics"]["state_mean"]["mean"]
    shifted = results(mirror, *flags, "--data.d", "0.5", "--data.s", "2.0", name="shifted")["metrics"]["state_mean"][
        "mean"
    ]
    assert shifted - zero > 0.1


def test_action_value_and_its_flags(mirror: Runner) -> None:
    flags = ("--model.samplers", "[mala]", "--model.reward", "ActionValue", "--model.settings.mcmc_steps", "60")
    base = results(mirror, *flags, "--model.chains", "20000", name="base")["metrics"]
    assert base["action_mean"]["mean"] == pytest.approx(0.9, abs=0.02)
    assert base["action_var"]["mean"] == pytest.approx(0.4, abs=0.02)
    for flag, value in (("--model.reward.q_a", "3.0"), ("--model.reward.mu_q", "0.5")):
        found = results(mirror, *flags, flag, value, name=flag[-3:])["metrics"]["action_mean"]["mean"]
        assert abs(found - base["action_mean"]["mean"]) > 0.1


def test_off_target_schedules_warn(mirror: Runner) -> None:
    err = mirror.ok("test", "analytic", "--model.samplers", "[pc_mala]", "--model.schedule", "SigmaPower")
    assert "warning: schedule SigmaPower does not end at the target N(0.938, 0.250)" in err
    assert "action KL 2" in err
    err = mirror.ok("test", "analytic", "--model.samplers", "[pc_mala]")
    assert "warning" not in err


BAD = [
    (("--model.samplers", "[pc_malla]"), "--model.samplers: 'pc_malla' is not allowed", "did you mean 'pc_mala'?"),
    (("--model.samplers", "[mala,mala]"), "--model.samplers", "twice"),
    (("--model.samplers", "[]"), "--model.samplers: []", "at least one"),
    (("--data.sigma_a", "0"), "--data.sigma_a: 0.0 is not allowed", "> 0"),
    (("--data.sigma_sprime", "-1"), "--data.sigma_sprime: -1.0 is not allowed", "> 0"),
    (("--model.settings.K", "0"), "--model.settings.K: 0 is not allowed", ">= 1"),
    (
        ("--model.settings.ula_step", "0.6"),
        "--model.settings.ula_step: 0.6 is not allowed here, ula and pc_ula",
        "= 0.5",
    ),
    (("--model.settings.smc_particles", "4096"), "--model.chains: 400 is not allowed with smc_twisted", "4096"),
    (("--model.settings.abar_min", "1.0"), "--model.settings.abar_min: 1.0", "(0, 1)"),
    (("--model.settings.smc_particles", "1000"), "--model.settings.smc_particles: 1000", "power of 2"),
    (
        ("--model.schedule", "LateRamp", "--model.schedule.w_lo", "0.8", "--model.schedule.w_hi", "0.2"),
        "--model.schedule.w_lo, --model.schedule.w_hi: 0.8, 0.2",
        "w_lo < w_hi",
    ),
    (("--model.schedule", "Lineer"), "--model.schedule: no class 'Lineer'", "did you mean 'Linear'?"),
    (("--model.reward.q_a", "1.0"), "--model.reward.q_a", ""),
    (("--model.lamda_scale", "2"), "--model.lamda_scale: no such option", "did you mean --model.lambda_scale?"),
    (("--model.setings.K", "2"), "--model.setings.K: no such flag", "did you mean '--model.settings.K'?"),
    (("--model.lr", "2"), "--model.lr: the class chosen by --model does not take it", ""),
    (("--model.network.hidden", "2"), "--model.network.hidden: the class chosen by --model does not take it", ""),
    (
        ("--model.reward", "ActionValue", "--model.reward.r_wa", "2"),
        "--model.reward.r_wa: the class chosen by --model.reward does not take it",
        "",
    ),
    (("--model.lambda_scale", "-1"), "--model.lambda_scale: -1.0 is not allowed", ">= 0"),
    (("--model.chains", "5"), "--model.chains: 5 is not allowed", ">= 100"),
]


@pytest.mark.parametrize(("flags", "start", "hint"), BAD, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_bad_input_is_one_line(mirror: Runner, flags: tuple[str, ...], start: str, hint: str) -> None:
    code, err = mirror.code("test", "analytic", *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert start in err
    assert hint in err
    assert not mirror.root.exists()


def test_double_precision_agrees_with_single(mirror: Runner) -> None:
    flags = ("--model.samplers", "[pc_mala]", "--model.chains", "20000")
    single = results(mirror, *flags, name="single")["metrics"]["action_mean"]["values"]
    double = results(mirror, *flags, "--trainer.precision", "64-true", name="double")["metrics"]["action_mean"][
        "values"
    ]
    assert single != double
    np.testing.assert_allclose(single, double, atol=0.03)


@pytest.mark.slow  # tests/test_matrix.py has two ranks in the gate
def test_two_processes_are_one(mirror: Runner) -> None:
    """Chains distributed over gloo ranks: the same samples, counts and results."""
    flags = ("--model.samplers", "[pc_mala,smc_twisted]", "--model.chains", "40000")
    one = results(mirror, *flags, name="one")
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    process = mirror.start("test", "analytic", *flags, *ddp, "--run.name", "two")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    two = json.loads((mirror.folder("analytic", "two") / "results.json").read_text())
    assert one["metrics"] == two["metrics"]


@pytest.mark.slow  # tests/test_signals.py has every verb in the gate
def test_sigterm_ends_a_test(mirror: Runner) -> None:
    process = mirror.start("test", "analytic", "--model.chains", "20000000", "--model.samplers", "[pc_mala]")
    # nothing is written before the end: that the chains are there shows that they are being drawn
    status, deadline, kilobytes = Path(f"/proc/{process.pid}/status"), time.monotonic() + 120, 0
    while kilobytes < 700_000:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
        kilobytes = int(re.search(r"^VmRSS:\s*(\d+) kB", status.read_text(), re.M)[1])  # type: ignore[index]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
