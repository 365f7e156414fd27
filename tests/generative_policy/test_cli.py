"""generative_policy through the command line: resume, replicas, ranks, precisions, and what a user may get wrong."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lightning_toys.training.metrics_reader import read_csv
from tests.conftest import Runner
from tests.processes import wait_for

SHORT = ("--model.seeds", "[4,1]", "--trainer.val_check_interval", "60", "--checkpoint.every_n_steps", "40")
VARIANTS = ["gaussian", "meanflow", "flow"]


def weights(runner: Runner, variant: str, name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = runner.checkpoint(variant, name)["state_dict"]
    return {k: v for k, v in state.items() if k.startswith("net.")}


@pytest.mark.slow  # tests/test_kill.py has it in the gate
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_going_on(policies: Runner, bitwise: Callable[..., None], variant: str) -> None:
    """SIGKILL mid-run, then --ckpt_path last: state, optimiser and metrics.csv are those of the run left alone."""
    flags = (*SHORT, "--trainer.max_steps", "3000", "--trainer.log_every_n_steps", "10")
    process = policies.start("fit", variant, *flags, "--run.name", "cut")
    last = policies.folder(variant, "cut") / "checkpoints" / "last.ckpt"
    wait_for(last, process, 90)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    stopped = policies.checkpoint(variant, "cut")["global_step"]
    until = str(stopped + 130)
    flags = (*flags[:-4], "--trainer.max_steps", until, "--trainer.log_every_n_steps", "10")
    constant = ("--model.lr_decay", "constant")  # the rate depends on max_steps, which this test changes
    policies.ok("fit", variant, *flags, *constant, "--run.name", "whole")
    policies.ok("fit", variant, *flags, *constant, "--run.name", "again", "--trainer.max_steps", str(stopped))
    policies.ok("fit", variant, *flags, *constant, "--run.name", "again", "--ckpt_path", "last")
    one, two = policies.checkpoint(variant, "whole"), policies.checkpoint(variant, "again")
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(one[key], two[key], key)


@pytest.mark.slow  # tests/test_kill.py has it in the gate
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", [120, 61])
def test_stopping_and_going_on(policies: Runner, bitwise: Callable[..., None], variant: str, cut: int) -> None:
    flags = (*SHORT, "--trainer.log_every_n_steps", "10", "--model.lr_decay", "constant")
    policies.ok("fit", variant, *flags, "--run.name", "whole", "--trainer.max_steps", "180")
    policies.ok("fit", variant, *flags, "--run.name", "cut", "--trainer.max_steps", str(cut))
    policies.ok("fit", variant, *flags, "--run.name", "cut", "--trainer.max_steps", "180", "--ckpt_path", "last")
    one, two = policies.checkpoint(variant, "whole"), policies.checkpoint(variant, "cut")
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(one[key], two[key], key)
    if cut == 120:  # a validation falls there in the whole run too
        rows = [read_csv(policies.folder(variant, name) / "metrics.csv") for name in ("whole", "cut")]
        assert rows[0] == rows[1]
        scores = [
            json.loads((policies.folder(variant, n) / "results.json").read_text())["metrics"] for n in ("whole", "cut")
        ]
        assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        ("gaussian", ()),
        ("gaussian", ("--model.parameters", "free")),
        ("meanflow", ("--model.optimizer", "adamw")),
        ("meanflow", ("--model.optimizer", "adamw", "--model.target_std", "0.1", "--model.target_std_as", "sigma_min")),
        ("meanflow", ("--model.optimizer", "adamw", "--model.tangent", "conditional", "--model.network.kind", "film")),
        ("meanflow", ("--trainer.precision", "64-true")),
        ("flow", ("--model.optimizer", "adamw")),
    ],
)
def test_replica_of_many_is_the_solo_run(policies: Runner, variant: str, flags: tuple[str, ...]) -> None:
    """Parameters within 1e-5 after 100 steps; Muon in double precision, since it rounds to bf16 in single."""
    flags = (*flags, "--trainer.max_steps", "100", "--trainer.limit_val_batches", "0", "--model.lr", "0.001")
    policies.ok("fit", variant, *flags, "--model.seeds", "[4,1,7]", "--run.name", "many")
    policies.ok("fit", variant, *flags, "--model.seeds", "[7]", "--run.name", "solo")
    many, solo = weights(policies, variant, "many"), weights(policies, variant, "solo")
    assert max((many[k][2] - solo[k][0]).abs().max().item() for k in many) < 1e-5
    assert max((many[k][1] - solo[k][0]).abs().max().item() for k in many) > 1e-2


@pytest.mark.slow  # tests/test_matrix.py has two ranks in the gate
@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp_is_one_process(policies: Runner, variant: str) -> None:
    """Two gloo processes share every batch; the rows with r < t lie on the first and a part of the second."""
    flags = ("--model.seeds", "[3,5]", "--trainer.max_steps", "50", "--trainer.accelerator", "cpu")
    if variant == "meanflow":
        flags += ("--model.time.share", "0.7")
    if variant != "gaussian":
        flags += (
            "--model.optimizer",
            "adamw",
            "--data.batch_size",
            "65",
            "--data.coupling",
            "OptimalTransport",
            "--data.coupling.size",
            "5",
        )
    policies.ok("fit", variant, *flags, "--run.name", "one")
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    process = policies.start("fit", variant, *flags, *ddp, "--run.name", "two")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    one, two = weights(policies, variant, "one"), weights(policies, variant, "two")
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 2e-6


@pytest.mark.slow  # tests/test_matrix.py has them in the gate
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_train(policies: Runner, variant: str, precision: str) -> None:
    flags = ("--trainer.precision", precision, "--model.seeds", "[0,1]", "--trainer.val_check_interval", "50")
    policies.ok("fit", variant, *flags, "--trainer.max_steps", "300", "--model.lr", "0.01")
    rows = [r for r in read_csv(policies.folder(variant) / "metrics.csv") if r["eval/tv"]]
    first, last = (float(r["eval/energy_distance"]) for r in (rows[0], rows[-1]))  # flow: by 8 Euler steps
    assert last < (first if variant == "gaussian" else 0.9 * first)


def test_predict_and_figures(policies: Runner) -> None:
    flags = ("--model.seeds", "[0,1]", "--figures.enabled", "true", "--figures.dpi", "30")
    policies.ok("fit", "meanflow", *flags, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2")
    policies.ok("test", "meanflow", *flags, "--ckpt_path", "last")
    policies.ok("predict", "meanflow", *flags, "--ckpt_path", "last")
    folder = policies.folder("meanflow")
    drawn = {p.stem for p in (folder / "figures").glob("*.png")}
    assert {"samples", "by_step", "training"} <= drawn
    assert {p.name for p in (folder / "samples").iterdir()} == {"step_00000002.npy", "step_00000004.npy"}
    with np.load(folder / "predictions.npz") as file:
        found = dict(file)
    assert found["samples"].shape == found["target"].shape == (2, 200, 2)
    assert found["log_prob"].shape == (2, 200)


def test_plain_metrics_are_those_of_the_first_nfe(policies: Runner) -> None:
    flags = ("--model.seeds", "[0,1]", "--model.evaluation.nfe", "[2,1]", "--model.evaluation.test_nfe", "[1,2,4]")
    policies.ok("fit", "flow", *flags, "--trainer.max_steps", "2")
    for verb in ("fit", "test"):
        if verb == "test":
            policies.ok("test", "flow", *flags, "--ckpt_path", "last")
        metrics = json.loads((policies.folder("flow") / "results.json").read_text())["metrics"]
        assert metrics["entropy_knn"]["values"] == metrics["entropy_knn@euler-2"]["values"]
        low, high = metrics["off3@euler-2"]["share_ci95"]
        assert 0 < low <= high <= 1
        assert "share_ci95" not in metrics["entropy_knn"]
        assert metrics["entropy_knn"]["values"] != metrics["entropy_knn@euler-1"]["values"]
    assert {"tv@euler-4", "tv@dopri5"} <= metrics.keys()


@pytest.mark.slow
def test_gaussian_settles_on_one_mode(policies: Runner) -> None:
    """Theory: the reverse KL ends at -log w of the mode that the seed falls into."""
    flags = ("--model.seeds", "[0,1,2,3,4,5,6,7]", "--trainer.max_steps", "4000", "--model.lr_decay", "cosine")
    policies.ok("fit", "gaussian", *flags, "--trainer.val_check_interval", "4000", "--model.lr", "0.01")
    metrics = json.loads((policies.folder("gaussian") / "results.json").read_text())["metrics"]
    assert max(metrics["kl_gap"]["values"]) < 0.02
    assert min(metrics["kl_gap"]["values"]) > -1e-3
    shares = [metrics[f"chose_mode{i}"]["values"] for i in range(3)]
    assert np.array(shares).sum(0).tolist() == [1.0] * 8


@pytest.mark.parametrize(  # Checkerboard has no density outside of its squares, and so no reverse KL
    ("variant", "target"),
    [
        ("meanflow", "EightGaussians"),
        ("gaussian", "TwoMoons"),
        pytest.param("meanflow", "Checkerboard", marks=pytest.mark.slow),
        pytest.param("meanflow", "TwoMoons", marks=pytest.mark.slow),
        pytest.param("gaussian", "EightGaussians", marks=pytest.mark.slow),
    ],
)
def test_every_target_runs(policies: Runner, variant: str, target: str) -> None:
    flags = ("--data.target", target, "--model.seeds", "[0]", "--trainer.max_steps", "2", "--figures.enabled", "true")
    policies.ok("fit", variant, *flags, "--figures.dpi", "20")


BAD = [
    ("meanflow", ("--model.target_std", "-1"), "--model.target_std: -1.0 is not allowed; give a number in [0, 1)"),
    ("meanflow", ("--model.time.share", "2"), "--model.time.share: 2.0 is not allowed"),
    ("meanflow", ("--model.tangent", "netwrk"), "did you mean 'network'?"),
    ("meanflow", ("--model.tangent", "oracle"), "give --data.coupling Independent"),
    ("meanflow", ("--model.network.kind", "transformer"), "give concat or film"),
    ("meanflow", ("--model.evaluation.nfe", "[]"), "--model.evaluation.nfe: [] is not allowed"),
    ("meanflow", ("--model.evaluation.samples", "3"), "--model.evaluation.samples: 3 is not allowed"),
    ("meanflow", ("--data.batch_size", "100"), "give a multiple of --data.coupling.size 64"),
    ("meanflow", ("--data.target", "TwoMoon"), "did you mean 'TwoMoons'?"),
    ("meanflow", ("--data.coupling", "OptimalTransprt"), "did you mean 'OptimalTransport'?"),
    ("meanflow", ("--trainer.max_steps", "-1"), "--trainer.max_steps: -1 is not allowed"),
    ("meanflow", ("--model.optimiser", "muon"), "did you mean --model.optimizer?"),
    ("meanflow", ("--model.lr", ".inf"), "--model.lr: inf is not allowed"),
    ("gaussian", ("--data.target", "Checkerboard"), "--data.target: Checkerboard is not allowed"),
    ("gaussian", ("--data.target.std", "0"), "--data.target.stds: 0.0 is not allowed"),
    ("gaussian", ("--data", "InterpolationData"), "--data: InterpolationData is not allowed; give MixtureData"),
]


@pytest.mark.parametrize(("variant", "flags", "says"), BAD, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_bad_input_is_one_line(policies: Runner, variant: str, flags: tuple[str, ...], says: str) -> None:
    code, err = policies.code("fit", variant, *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert says in err
    assert not policies.root.exists()
