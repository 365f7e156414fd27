"""Replicas, ranks and precisions: the same numbers, however the work is laid out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_toys.commands.trainer.toys_cli import run_trainer
from lightning_toys.flow_vs_regression.module import FlowVsRegression
from lightning_toys.training import data as training_data
from tests.conftest import Runner
from tests.processes import torchrun

MODES = ["regression", "flow", "straight_flow", "mip"]


def weights(runner: Runner, name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = runner.checkpoint("flow", name)["state_dict"]
    return {k: v for k, v in state.items() if k.startswith("net.")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["concat", "film", "transformer"])
def test_replica_of_many_is_the_solo_run(runner: Runner, mode: str, kind: str) -> None:
    """Parameters within 1e-5 after 100 steps.

    The transformer with gelu: behind a layer norm, a relu's input can come within rounding of its kink, and Adam then
    walks the two runs apart (double precision, below, takes relu too).
    """
    flags = ("--model.mode", mode, "--model.network.kind", kind, "--trainer.max_steps", "100")
    flags += (
        "--trainer.limit_val_batches",
        "0",
        "--model.network.activation",
        "gelu" if kind == "transformer" else "relu",
    )
    runner.ok("fit", "flow", *flags, "--model.seeds", "[4,1,7]", "--run.name", "many")
    runner.ok("fit", "flow", *flags, "--model.seeds", "[7]", "--run.name", "solo")
    many, solo = weights(runner, "many"), weights(runner, "solo")
    assert max((many[k][2] - solo[k][0]).abs().max().item() for k in many) < 1e-5
    # negative control: the replica beside it is another run
    assert max((many[k][1] - solo[k][0]).abs().max().item() for k in many) > 1e-2


@pytest.mark.parametrize("kind", ["concat", "film", "transformer"])
def test_replicas_with_every_option(runner: Runner, kind: str) -> None:
    """Data, weight decay, clipping and averaging are per replica: in double precision nothing but rounding is left."""
    flags = (
        *("--model.network.kind", kind, "--trainer.max_steps", "100", "--trainer.precision", "64-true"),
        *("--model.weight_decay", "0.01", "--model.clip_grad_norm", "0.5", "--model.ema_decay", "0.9"),
        *("--model.network.fourier_c", "2", "--model.network.residual", "true", "--model.loss", "l1"),
        *("--data.sampling", "random", "--data.noise", "0.1", "--data.holdout", "0.1"),
    )
    runner.ok("fit", "flow", *flags, "--model.seeds", "[4,1,7]", "--run.name", "many")
    runner.ok("fit", "flow", *flags, "--model.seeds", "[7]", "--run.name", "solo")
    many, solo = (runner.checkpoint("flow", name)["state_dict"] for name in ("many", "solo"))
    assert max((many[k][2] - solo[k][0]).abs().max().item() for k in many) < 1e-9


@pytest.mark.slow  # tests/test_matrix.py has two ranks in the gate
def test_ddp_is_one_process(runner: Runner) -> None:
    """Two gloo processes share every batch, the last one of 18 and an odd one of 25 too."""
    flags = (
        "--model.seeds",
        "[3,5]",
        "--trainer.max_steps",
        "50",
        "--trainer.accelerator",
        "cpu",
        "--data.noise",
        "0.1",
    )
    for size in ("32", "25"):
        runner.ok("fit", "flow", *flags, "--run.name", f"one{size}", "--data.batch_size", size)
        ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
        process = runner.start("fit", "flow", *flags, *ddp, "--run.name", f"two{size}", "--data.batch_size", size)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        one, two = weights(runner, f"one{size}"), weights(runner, f"two{size}")
        assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-6
        assert sorted(p.name for p in runner.folder("flow").parent.iterdir() if size in p.name) == [
            f"one{size}",
            f"two{size}",
        ]


@pytest.mark.slow  # two processes
def test_ddp_chooses_one_folder(runner: Runner) -> None:
    """Without a name, both ranks write to the version that rank 0 chose."""
    flags = ("--trainer.max_steps", "4", "--trainer.accelerator", "cpu", "--model.seeds", "[0]")
    process = runner.start("fit", "flow", *flags, "--trainer.strategy", "ddp", "--trainer.devices", "2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [p.name for p in runner.folder("flow").parent.iterdir()] == ["version_0"]


SLOW_DISK = """
import os, sys, time
from pathlib import Path
from lightning_toys.cli import main

place = os.replace
def slowly(a, b):
    if str(b).endswith("last.ckpt"):
        time.sleep(2)
    place(a, b)
os.replace = slowly
code = main(sys.argv[2:])
Path(sys.argv[1], os.environ["RANK"]).write_text(f"{code} {len(list(Path(sys.argv[1]).rglob('last.ckpt')))}")
"""


@pytest.mark.slow  # two processes
def test_no_rank_ends_before_the_checkpoint_is_in_place(runner: Runner, tmp_path: Path) -> None:
    """A launcher stops the other ranks when one ends in other ways than well, as at SIGTERM: rank 0 would lose it."""
    script = tmp_path / "slow_disk.py"
    script.write_text(SLOW_DISK)
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    torchrun(script, tmp_path, *runner.words("fit", "flow", *ddp, "--trainer.max_steps", "2"))
    assert [(tmp_path / r).read_text() for r in "01"] == ["0 1"] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_train(runner: Runner, mode: str, precision: str) -> None:
    flags = ("--model.mode", mode, "--trainer.precision", precision, "--trainer.val_check_interval", "50")
    runner.ok("fit", "flow", *flags, "--model.seeds", "[0,1]", "--trainer.max_steps", "600", "--model.lr", "0.005")
    state = runner.checkpoint("flow")["state_dict"]
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert {v.dtype for k, v in state.items() if k.startswith("net.")} == {wanted}
    from lightning_toys.training.metrics_reader import read_csv

    rows = [r for r in read_csv(runner.folder("flow") / "metrics.csv") if r["eval/l2"]]
    assert float(rows[-1]["eval/l2"]) < 0.8 * float(rows[0]["eval/l2"])


def test_double_follows_single(runner: Runner) -> None:
    """In double precision a run draws the same numbers: after few steps it differs by rounding alone."""
    flags = ("--trainer.max_steps", "10", "--model.seeds", "[0]")
    runner.ok("fit", "flow", *flags, "--run.name", "single")
    runner.ok("fit", "flow", *flags, "--run.name", "double", "--trainer.precision", "64-true")
    a, b = weights(runner, "single"), weights(runner, "double")
    assert max((a[k].double() - b[k]).abs().max().item() for k in a) < 1e-5


@pytest.mark.parametrize(("precision", "off"), [("64-true", 0.0), ("32-true", 2**-24)])
def test_training_points_are_as_exact_as_the_training(runner: Runner, precision: str, off: float) -> None:
    """Rounded to single precision, a target of slope s could not be interpolated to better than s 2^-25."""
    cli = run_trainer(runner.words("fit", "flow", "--trainer.max_steps", "1", "--trainer.precision", precision))
    c, x1 = cli.datamodule.train_columns([0])
    exact = torch.linspace(0, 1, c.shape[1], dtype=torch.float64).view(1, -1, 1)
    assert 0 <= off / 8 <= float((c - exact).abs().max()) <= off
    assert 0 <= off / 8 <= float((x1 - cli.datamodule.target(exact[0])).abs().max()) <= 4 * off


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_in_a_block_change_nothing(runner: Runner, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step to a Trainer batch or fifty: the same bits. A cache of bf16 casts across steps would break this."""
    flags = ("--trainer.max_steps", "30", "--trainer.precision", precision, "--model.seeds", "[0]")
    runner.ok("fit", "flow", *flags, "--run.name", "many")
    monkeypatch.setattr(training_data, "MAX_BLOCK", 1)
    runner.ok("fit", "flow", *flags, "--run.name", "one")
    a, b = weights(runner, "many"), weights(runner, "one")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_adam_is_torchs_adam(runner: Runner) -> None:
    """Regression with one replica equals a plain loop of nn.Linear, MSE and torch.optim.Adam on the same batches."""
    runner.ok("fit", "regression", "--trainer.max_steps", "60", "--model.seeds", "[3]")
    got = runner.checkpoint("regression")["state_dict"]

    from lightning_toys.flow_vs_regression.data import InterpolationData
    from lightning_toys.nets import Network
    from lightning_toys.training.loader import BlockLoader

    net = Network(hidden=16).build([3], 1, 1, False)
    layers: list[torch.nn.Module] = []
    for ours in (net.first, *net.hidden, net.last):  # type: ignore[union-attr, misc]
        layer = torch.nn.Linear(ours.weight.shape[1], ours.weight.shape[2])  # type: ignore[union-attr, arg-type]
        layer.weight.data = ours.weight[0].detach().T.clone()  # type: ignore[union-attr, operator, index]
        layer.bias.data = ours.bias[0, 0].detach().clone()  # type: ignore[union-attr, index]
        layers += [layer, torch.nn.ReLU()]
    plain = torch.nn.Sequential(*layers[:-1])
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    data = InterpolationData()
    block = BlockLoader(data.train_columns([3]), [3], 32, 60, 60).block(0, 60)
    for step in range(60):
        c, x1 = (x[0] for x in block.batch(step).columns)
        adam.zero_grad()
        torch.nn.functional.mse_loss(plain(torch.cat([torch.zeros_like(x1), c], 1)), x1).backward()
        adam.step()
    for name, layer in (("net.first", plain[0]), ("net.hidden.1", plain[4]), ("net.last", plain[6])):
        assert (got[f"{name}.weight"][0] - layer.weight.T).abs().max() < 1e-5  # type: ignore[union-attr, operator]


def test_replicas_need_their_own_seeds() -> None:
    module = FlowVsRegression(seeds=[1, 2])
    assert module.seeds == [1, 2]
