"""The control experiment through the command line: resume, replicas, ranks, flags, and what a user may get wrong."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_toys.training.metrics_reader import read_csv
from tests.conftest import Runner
from tests.processes import wait_for

SMALL = (
    *("--data.batch_size", "16", "--data.init_steps", "40", "--data.capacity", "100", "--model.seeds", "[4,1]"),
    *("--model.hidden_dim", "8", "--model.model_hidden_dim", "4", "--model.test_episodes", "3"),
    *("--model.eval_episodes", "2", "--figures.dpi", "30", "--trainer.accelerator", "cpu"),
    *("--trainer.val_check_interval", "60", "--trainer.log_every_n_steps", "20", "--checkpoint.every_n_steps", "20"),
)
QUIET = ("--figures.enabled", "false")
HERE = {"MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def control(runner: Runner) -> Runner:
    return Runner(runner.root, runner.capture, "bilevel", SMALL)


def metrics(runner: Runner, name: str = "version_0", file: str = "results.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runner.folder("control", name) / file).read_text())["metrics"]
    return found


KEYS = ("state_dict", "optimizer_states", "global_step", "toy")


def contents(runner: Runner, name: str) -> dict[str, Any]:
    found = runner.checkpoint("control", name)
    found["toy"].pop("config")
    return {k: found[k] for k in KEYS}


def test_fit_and_test_leave_what_is_promised(control: Runner) -> None:
    control.ok("fit", "control", "--trainer.max_steps", "120", "--model.check_gradient", "2")
    folder = control.folder("control")
    rows = read_csv(folder / "metrics.csv")
    assert [int(r["step"]) for r in rows if r.get("eval/return")] == [60, 120]
    named = {k for r in rows for k, v in r.items() if v}
    assert {"train/loss", "train/outer_gradient_norm", "train/inner_gradient_norm", "train/return"} <= named
    assert {f"eval/{k}" for k in ("return", "td_error", "model_error", "reward_error", "gradient_cosine")} <= named
    assert (folder / "figures" / "learning.png").exists()
    control.ok("test", "control", "--ckpt_path", "last", "--model.record", "true")
    found = metrics(control)
    assert all(8 <= v <= 500 for v in found["return"]["values"])
    random = json.loads((folder / "results.json").read_text())["references"]["random actions"]
    assert 8 <= random["return"] == random["length"] <= 100
    for seed in (4, 1):
        with Image.open(folder / "figures" / f"episode_seed_{seed}.gif") as gif:
            assert gif.n_frames > 1
    # global_step counts environment steps, not those of two optimisers
    checkpoint = control.checkpoint("control")
    assert checkpoint["global_step"] == 120
    assert int(checkpoint["state_dict"]["replay.added"]) == 120
    steps = {int(s["step"]) for o in checkpoint["optimizer_states"] for s in o["state"].values()}
    assert steps == {120 - 40}


AGENTS = [
    ("--model.agent", "omd", "--model.solver.inverse", "gauss_newton", "--model.solver.num_q_steps", "2"),
    ("--model.agent", "funcbo", "--model.solver.smoothing", "5", "--model.solver.num_t_steps", "2"),
    ("--model.agent", "mle", "--model.solver.warm_opt", "false", "--model.env", "Acrobot-v1"),
    ("--model.agent", "vep", "--model.disturbance.distractors", "2", "--model.disturbance.drift", "4"),
]


@pytest.mark.parametrize("flags", AGENTS, ids=lambda f: f[1])
@pytest.mark.parametrize("cut", [60, pytest.param(95, marks=pytest.mark.slow)])
def test_resume_is_bitwise(control: Runner, bitwise: Callable[..., None], flags: tuple[str, ...], cut: int) -> None:
    """Networks, optimisers, replay (full, and turning over), environments and the episodes within them."""
    flags = (*flags, *QUIET)
    control.ok("fit", "control", *flags, "--run.name", "whole", "--trainer.max_steps", "180")
    control.ok("fit", "control", *flags, "--run.name", "cut", "--trainer.max_steps", str(cut))
    control.ok("fit", "control", *flags, "--run.name", "cut", "--trainer.max_steps", "180", "--ckpt_path", "last")
    one, two = (contents(control, n) for n in ("whole", "cut"))
    bitwise(one, two)
    if cut == 60:
        rows = [read_csv(control.folder("control", n) / "metrics.csv") for n in ("whole", "cut")]
        assert rows[0] == rows[1]


def test_going_on_before_anything_is_learned(control: Runner, bitwise: Callable[..., None]) -> None:
    """Among the random steps no optimiser holds moments; after them, one without is refused."""
    control.ok("fit", "control", *QUIET, "--run.name", "whole", "--trainer.max_steps", "70")
    control.ok("fit", "control", *QUIET, "--run.name", "cut", "--trainer.max_steps", "30")
    assert not any(o["state"] for o in control.checkpoint("control", "cut")["optimizer_states"])
    control.ok("fit", "control", *QUIET, "--run.name", "cut", "--trainer.max_steps", "70", "--ckpt_path", "last")
    bitwise(*(contents(control, n) for n in ("whole", "cut")))
    last = control.folder("control", "cut") / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    for optimizer in checkpoint["optimizer_states"]:
        optimizer["state"] = {}
    torch.save(checkpoint, last)
    more = ("--run.name", "cut", "--trainer.max_steps", "90", "--ckpt_path", "last")
    code, err = control.code("fit", "control", *QUIET, *more)
    assert code == 2
    assert "optimizer_states holds no moments, at step 70" in err


@pytest.mark.slow  # tests/test_kill.py has it in the gate
def test_killed_and_going_on(control: Runner, bitwise: Callable[..., None]) -> None:
    flags = ("--trainer.max_steps", "5000", *QUIET)
    process = control.start("fit", "control", *flags, "--run.name", "cut")
    last = control.folder("control", "cut") / "checkpoints" / "last.ckpt"
    wait_for(last, process, 120)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    until = str(control.checkpoint("control", "cut")["global_step"] + 70)
    control.ok("fit", "control", "--run.name", "cut", "--trainer.max_steps", until, *QUIET, "--ckpt_path", "last")
    control.ok("fit", "control", "--run.name", "whole", "--trainer.max_steps", until, *QUIET)
    bitwise(contents(control, "whole"), contents(control, "cut"))


@pytest.mark.parametrize("flags", AGENTS, ids=lambda f: f[1])
def test_a_replica_is_the_solo_run(control: Runner, flags: tuple[str, ...]) -> None:
    flags = (*flags, *QUIET, "--trainer.max_steps", "100")
    control.ok("fit", "control", *flags, "--run.name", "both")
    control.ok("fit", "control", *flags, "--run.name", "one", "--model.seeds", "[1]")
    both, one = (control.checkpoint("control", n)["state_dict"] for n in ("both", "one"))
    assert torch.equal(both["replay.rows"][1:], one["replay.rows"])  # all that was seen and done
    assert any(name.startswith("net.") and w.dim() for name, w in one.items())
    for name, w in one.items():
        if name.startswith("net.") and w.dim():
            assert torch.allclose(both[name][1:], w, atol=1e-5), name
    a, b = metrics(control, "both"), metrics(control, "one")
    for key in b:
        assert a[key]["values"][1] == pytest.approx(b[key]["values"][0], rel=1e-4, abs=1e-6), key


@pytest.mark.slow  # tests/test_matrix.py has two ranks in the gate
def test_two_ranks_are_one(control: Runner, bitwise: Callable[..., None]) -> None:
    """Every rank does the same work: the checkpoint is bit for bit that of one process."""
    flags = ("--trainer.max_steps", "100", *QUIET)
    process = control.start(
        *("fit", "control", *flags, "--run.name", "two", "--trainer.strategy", "ddp", "--trainer.devices", "2"), **HERE
    )
    control.ok("fit", "control", *flags, "--run.name", "one")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    one, two = (contents(control, n) for n in ("one", "two"))
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(one[key], two[key], key)
    assert metrics(control, "one") == metrics(control, "two")


def test_double_precision(control: Runner) -> None:
    control.ok("fit", "control", "--trainer.precision", "64-true", "--trainer.max_steps", "60", *QUIET)
    kinds = {w.dtype for n, w in control.checkpoint("control")["state_dict"].items() if n.startswith("net.")}
    assert kinds == {torch.float64}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model.alpha", "0"), "--model.alpha: 0.0 is not allowed"),
        (("--model.discount", "1.2"), "--model.discount: 1.2 is not allowed"),
        (("--data.batch_size", "50"), "--data.batch_size: 50 is not allowed; give at most --data.init_steps (40)"),
        (("--data.capacity", "5"), "--data.capacity: 5 is not allowed"),
        (("--model.env", "Pendulum-v1"), "--model.env: 'Pendulum-v1' is not allowed"),
        (("--model.env", "CartPole-v7"), "--model.env: 'CartPole-v7' is not allowed"),
        (("--model.env", "CartPoel-v1"), "did you mean 'CartPole-v1'?"),
        (("--model.env", "Acrobot-v1", "--model.disturbance.drift", "2"), "--model.disturbance.drift: 2.0"),
        (("--model.eps", "-0.1"), "--model.eps: -0.1 is not allowed"),
        (("--model.tau", "0"), "--model.tau: 0.0 is not allowed"),
        (("--model.inner_lr", "0"), "--model.inner_lr: 0.0 is not allowed"),
        (("--model.agent", "funcBO"), "did you mean 'funcbo'?"),
        (("--model.solver.inverse", "exact"), "--model.solver.inverse"),
        (("--model.solver.inner_value", "now"), "--model.solver.inner_value"),
        (("--model.solver.num_q_steps", "0"), "--model.solver.num_q_steps: 0 is not allowed"),
        (("--model.solver.smoothing", "0"), "--model.solver.smoothing: 0 is not allowed"),
        (("--model.solver.smoothing_present", "1.5"), "--model.solver.smoothing_present: 1.5 is not allowed"),
        (("--model.disturbance.drift_shape", "lin"), "--model.disturbance.drift_shape: 'lin' is not allowed"),
        (("--trainer.precision", "bf16-mixed"), "--trainer.precision: 'bf16-mixed' is not allowed"),
    ],
)
def test_bad_input_is_one_line(control: Runner, flags: tuple[str, ...], said: str) -> None:
    code, err = control.code("fit", "control", *flags)
    assert code == 2, err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (control.root / "bilevel").exists()


def test_predict_says_that_there_is_nothing_to_predict(control: Runner) -> None:
    control.ok("fit", "control", "--trainer.max_steps", "20", *QUIET)
    code, err = control.code("predict", "control", "--ckpt_path", "last")
    assert code == 2
    assert "predict: BilevelControl has no predictions to write; give the verb test" in err


def test_another_capacity_is_refused_on_resume(control: Runner) -> None:
    control.ok("fit", "control", "--trainer.max_steps", "60", *QUIET)
    flags = ("--trainer.max_steps", "90", "--data.capacity", "200", *QUIET, "--ckpt_path", "last")
    code, err = control.code("fit", "control", *flags)
    assert code == 2
    assert "--data.capacity: 200 is not allowed" in err


PLAIN: dict[str, Any] = {}
FLAGS = [
    *(("--model.agent", a) for a in ("mle", "vep", "funcbo")),
    *(("--model.alpha", "0.5"), ("--model.discount", "0.5"), ("--model.eps", "0.9"), ("--model.lr", "0.1")),
    *(("--model.inner_lr", "0.1"), ("--model.tau", "0.9"), ("--model.double_q", "false")),
    *(("--model.hidden_dim", "9"), ("--model.model_hidden_dim", "5"), ("--model.clip_grad_norm", "0.001")),
    *((f"--model.solver.{n}", "3") for n in ("num_q_steps", "num_t_steps", "smoothing")),
    ("--model.solver.state_gradient", "false"),
    *(("--model.solver.warm_start", "false"), ("--model.solver.warm_opt", "false")),
    *(("--model.solver.inverse", "gauss_newton"), ("--model.solver.inverse", "hessian")),
    *(("--data.batch_size", "17"), ("--data.init_steps", "50"), ("--data.capacity", "60")),
    *(("--model.disturbance.distractors", "1"), ("--model.disturbance.drift", "8")),
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: f"{f[0].rpartition('.')[2]}={f[1]}")
def test_every_flag_moves_what_is_learned(control: Runner, flags: tuple[str, str]) -> None:
    common = ("--trainer.max_steps", "80", *QUIET, "--trainer.val_check_interval", "80")
    if not PLAIN:  # once a process
        control.ok("fit", "control", *common, "--run.name", "plain")
        PLAIN.update(metrics(control, "plain"))
    control.ok("fit", "control", *common, *flags, "--run.name", "other")
    names = ("td_error", "inner_error", "model_error", "reward_error", "value")
    other = metrics(control, "other")
    assert any(not np.allclose(PLAIN[n]["values"], other[n]["values"], rtol=1e-6) for n in names)


@pytest.mark.parametrize(
    ("flag", "value", "with_it"),
    [
        ("solver.cg_damping", "2", ("--model.solver.inverse", "gauss_newton")),
        ("solver.cg_steps", "2", ("--model.solver.inverse", "gauss_newton")),
        ("solver.vep_values", "2", ("--model.agent", "vep")),
        ("solver.inner_value", "lagged", ("--model.agent", "funcbo")),
        ("solver.smoothing_present", "0.5", ("--model.solver.smoothing", "3")),
        ("disturbance.drift_shape", "linear", ("--model.disturbance.drift", "8")),
        ("disturbance.drift_period", "50", ("--model.disturbance.drift", "8")),
        ("disturbance.drift_width", "3", ("--model.disturbance.drift", "8")),
    ],
)
def test_flags_that_need_another(control: Runner, flag: str, value: str, with_it: tuple[str, str]) -> None:
    common = ("--trainer.max_steps", "80", *QUIET, *with_it)
    control.ok("fit", "control", *common, "--run.name", "plain")
    control.ok("fit", "control", *common, f"--model.{flag}", value, "--run.name", "other")
    assert metrics(control, "plain")["model_error"] != metrics(control, "other")["model_error"]


@pytest.mark.slow  # tests/test_sweep_compare.py has sweeps in the gate
def test_sweep_puts_agents_side_by_side(control: Runner) -> None:
    flags = ("--trainer.max_steps", "60", "--grid.model.agent", "[omd,mle]", "--grid.model.model_hidden_dim", "[3,4]")
    flat = control.words("sweep", "control", *flags)
    at = flat.index("--model.model_hidden_dim")
    code, err = control.raw(*flat[:at], *flat[at + 2 :])
    assert code == 0, err
    assert list(control.root.rglob("agents.png"))
