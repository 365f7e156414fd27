"""update_entropy through the command line: training, resume, ranks, the probe's files, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_toys.update_entropy.evaluation_probe as probing
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.update_entropy.optimizer_files import save_optimizer_state
from lightning_toys.update_entropy.policy import TinyPolicy, initialise, is_adapter
from tests.conftest import Runner
from tests.processes import two_ranks

SMALL = (
    "--model.policy.hidden", "16", "--model.policy.layers", "1", "--model.policy.heads", "2",
    "--model.policy.lora_rank", "4", "--model.warm_steps", "6", "--trainer.max_steps", "10",
    "--model.rollouts.prompts", "3", "--model.rollouts.group", "4", "--model.eval_prompts", "8",
    "--model.plan.eval_prompts", "6", "--model.plan.eval_group", "2", "--model.plan.prompts", "2",
    "--data", "toy_text.OddData", "--data.digits", "1",
    "--model.plan.etas", "[0.001,0.01]", "--model.plan.filter_zero_advantage", "false",
    "--data.batch_size", "8", "--trainer.val_check_interval", "5", "--checkpoint.every_n_steps", "5",
)  # fmt: skip
QUIET = ("--figures.enabled", "false")
HERE = {"PYTHONPATH": str(Path(__file__).parents[1] / "own_classes")}  # toy_text, for a process of its own


@pytest.fixture
def entropy(runner: Runner) -> Runner:
    return Runner(runner.root, runner.capture, "update_entropy", SMALL)


def weights(runner: Runner, name: str) -> dict[str, Any]:
    found: dict[str, Any] = runner.checkpoint("arithmetic", name)
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints' contents are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def metrics(runner: Runner, name: str = "version_0") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runner.folder("arithmetic", name) / "results.json").read_text())["metrics"]
    return found


def test_fit_and_probe_leave_what_is_promised(entropy: Runner) -> None:
    entropy.ok("fit", "arithmetic", "--model.seeds", "[0,1]")
    said = entropy.ok("test", "arithmetic", "--model.seeds", "[0,1]")
    assert "seed 1: H " in said
    assert "eta 0.01: dH " in said
    folder = entropy.folder("arithmetic")
    drawn = {f"{n}{end}.png" for n in ("probe", "tokens", "tradeoff", "directions") for end in ("", "_seed_1")} | {
        "training.png"
    }
    assert {p.name for p in (folder / "figures").iterdir()} == drawn
    rows = read_csv(folder / "metrics.csv")
    for name in ("train/reward", "train/entropy", "train/clip_fraction", "train/length", "train/ess", "eval/reward"):
        assert any(r.get(name) for r in rows), name
    inside = folder / "probe" / "seed_1"
    summary = json.loads((inside / "summary.json").read_text())
    n_u, n_e = 8, 12
    assert summary["update_sequences"] == n_u
    assert summary["closure_residual"] < 1e-6
    assert (summary["loss"]["name"], summary["loss"]["scale_rewards"]) == ("dr_grpo", "none")
    assert f"the loss that the step is of: {summary['loss']['text']}" in said
    assert summary["adamw_step"] == 4
    (evaluation,) = summary["evaluations"]
    assert evaluation["sequences"] == n_e
    assert set(evaluation["changes"]) == {"full", "baseline", "grad", "baseline_plus_grad"}
    change = evaluation["changes"]["full"]["0.001"]
    assert {"value", "se", "half_width", "ess", "clipped", "entropy"} <= change.keys()
    # arrays by the published names and shapes
    matrix = np.load(inside / "eval_00_delta_matrix.npy")
    assert matrix.shape == (n_e, n_u)
    assert np.load(inside / "eval_00_first_order_matrix.npy").shape == (n_e, n_u)
    assert evaluation["changes"]
    for flavour in evaluation["changes"]:
        one = np.load(inside / "eval_00_per_sequence" / flavour / "eta_0.001.npy")
        assert one.shape == (n_e,)
        assert float(one.sum()) == pytest.approx(evaluation["changes"][flavour]["0.001"]["value"], abs=1e-12)
    assert np.load(inside / "eval_00_grad_eta" / "eta_0.01.npy").shape == (n_e, n_u)
    assert len(json.loads((inside / "eval_00_grad_eta" / "diagnostics.json").read_text())["0.01"]) == n_u
    full, rebuilt = (evaluation["changes"][k]["0.01"]["value"] for k in ("full", "baseline_plus_grad"))
    assert full == pytest.approx(rebuilt, abs=1e-6)
    # the tables join influence to text
    with np.load(inside / "sequences.npz") as sequences, np.load(inside / "tokens.npz") as tokens:
        assert len(sequences["response"]) == n_u
        assert all(p.endswith("=") for p in sequences["prompt"])
        by_row = np.bincount(tokens["row"], tokens["influence"], n_u)
        size = np.abs(sequences["influence"]).max() + 1e-9
        assert by_row == pytest.approx(sequences["influence"], rel=1e-4, abs=1e-4 * size)
        assert len(tokens["text"]) == sequences["length"].sum()
        row = int(sequences["row"][3])
        assert "".join(tokens["text"][tokens["row"] == row]) == sequences["response"][row]
    found = metrics(entropy)
    for name in (
        "slope",
        "slope_se",
        "slope_momentum",
        "slope_batch",
        "change@eta_0.01",
        "curvature",
        "slope@no_momentum",
    ):
        assert len(found[name]["values"]) == 2, name
    # a second probe moves the first one aside
    entropy.ok("test", "arithmetic", "--model.seeds", "[0,1]", *QUIET)
    assert (folder / "probe-1" / "seed_0" / "summary.json").exists()
    again = json.loads((inside / "summary.json").read_text())
    for s in (again, summary):
        s.pop("seconds")
    assert again == summary  # dropout, time and order play no part


PENALTIES = ("--model.beta", "0.5", "--model.entropy_coef", "0.1")


@pytest.mark.parametrize(
    ("inner", "more"), [("1", ()), ("3", ()), pytest.param("3", PENALTIES, marks=pytest.mark.slow)]
)
def test_resume_is_bitwise(entropy: Runner, inner: str, more: tuple[str, ...]) -> None:
    """From a checkpoint within the policy gradient, between two steps on the same responses too."""
    flags = (
        *more,
        "--model.rollouts.inner_steps",
        inner,
        "--trainer.max_steps",
        "14",
        "--model.policy.lora_dropout",
        "0.0",
        *QUIET,
    )
    stop = ("--trainer.max_steps", "10")
    entropy.ok("fit", "arithmetic", *flags, *stop, "--run.name", "parts")
    entropy.ok("fit", "arithmetic", *flags, "--run.name", "parts", "--ckpt_path", "last")
    entropy.ok("fit", "arithmetic", *flags, "--run.name", "whole")
    parts, whole = weights(entropy, "parts"), weights(entropy, "whole")
    assert same(parts["state_dict"], whole["state_dict"])
    assert same(parts["optimizer_states"], whole["optimizer_states"])
    tables = [read_csv(entropy.folder("arithmetic", n) / "metrics.csv") for n in ("parts", "whole")]
    late = [[r for r in t if int(r["step"]) > 10] for t in tables]
    assert len(late[0]) >= 4
    keys = {k for k in late[1][0] if k.startswith(("train/", "eval/"))}
    assert ("train/kl" in keys) == bool(more)
    assert not more or max(float(r["train/kl"]) for r in late[0]) > 0
    assert [{k: r[k] for k in keys} for r in late[0]] == [{k: r[k] for k in keys} for r in late[1]]


def test_parts_of_a_batch_are_the_batch(entropy: Runner) -> None:
    flags = ("--trainer.precision", "64-true", "--model.rollouts.inner_steps", "2", *QUIET)
    entropy.ok("fit", "arithmetic", *flags, "--run.name", "whole")
    entropy.ok("fit", "arithmetic", *flags, "--model.rollouts.micro_batch", "5", "--run.name", "parts")
    whole, parts = (weights(entropy, n)["state_dict"] for n in ("whole", "parts"))
    for name, w in whole.items():
        if name.startswith("net."):
            assert torch.allclose(w, parts[name], atol=1e-9), name
    tables = [read_csv(entropy.folder("arithmetic", n) / "metrics.csv") for n in ("whole", "parts")]
    for name in ("train/entropy", "train/reward", "train/clip_fraction", "train/ess"):
        a, b = ([float(r[name]) for r in t if r.get(name)] for t in tables)
        assert a == pytest.approx(b, rel=1e-6)
        assert len(a) == 4


@pytest.mark.slow  # the probe's own tests have replicas
def test_a_replica_is_the_solo_run(entropy: Runner) -> None:
    entropy.ok("fit", "arithmetic", "--model.seeds", "[3,5]", *QUIET, "--run.name", "pair")
    entropy.ok("fit", "arithmetic", "--model.seeds", "[5]", *QUIET, "--run.name", "solo")
    pair, solo = (weights(entropy, n)["state_dict"] for n in ("pair", "solo"))
    for name, w in solo.items():
        if name.startswith("net.0."):
            assert torch.equal(w, pair[name.replace("net.0.", "net.1.")]), name
    for name in ("pair", "solo"):
        entropy.ok(
            "test", "arithmetic", "--run.name", name, *QUIET, "--model.seeds", "[3,5]" if name == "pair" else "[5]"
        )
    a, b = metrics(entropy, "pair"), metrics(entropy, "solo")
    for key in ("slope", "slope_se", "change@eta_0.01", "entropy_on_e"):
        assert a[key]["values"][1] == b[key]["values"][0]


@pytest.mark.slow  # tests/test_matrix.py has two ranks in the gate
def test_two_ranks_are_one(entropy: Runner) -> None:
    """Prompts, solutions, evaluation sequences and a loss's averages are shared out over gloo ranks."""
    loss = (*QUIET, "--model.loss", "dapo", "--model.scale_rewards", "batch")
    entropy.ok("fit", "arithmetic", *loss, "--run.name", "one")
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu", *loss)
    process = entropy.start("fit", "arithmetic", *ddp, "--run.name", "two", **HERE)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    one, two = (weights(entropy, n)["state_dict"] for n in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    # the probe of the same checkpoint
    entropy.ok("test", "arithmetic", "--run.name", "one", *loss)
    alone = metrics(entropy, "one")
    process = entropy.start("test", "arithmetic", *ddp, "--run.name", "one", **HERE)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    shared = metrics(entropy, "one")
    assert alone.keys() == shared.keys()
    for name in alone:
        if None in alone[name]["values"]:  # eta* where the slope is noise
            assert shared[name]["values"] == alone[name]["values"], name
        elif name != "closure":
            assert shared[name]["values"] == pytest.approx(alone[name]["values"], rel=1e-6, abs=1e-8), name


@pytest.mark.slow  # tests/test_matrix.py has two ranks in the gate
def test_ranks_stop_between_two_steps_on_the_same_responses(entropy: Runner, tmp_path: Path) -> None:
    """Each rank goes on with its own responses; so does one process with those of two ranks."""
    flags = ("--trainer.precision", "64-true", "--model.rollouts.inner_steps", "3", "--trainer.accelerator", "cpu")
    flags = (*flags, "--model.policy.lora_dropout", "0.0", "--model.seeds", "[0,1]", *QUIET)
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    first, rest = ("--trainer.max_steps", "11"), ("--trainer.max_steps", "14", "--ckpt_path", "last")
    jobs = [
        entropy.words("fit", "arithmetic", *flags, *ddp, *part, "--run.name", name)
        for name, part in (("two", first), ("two", rest), ("half", first))
    ]
    for codes in two_ranks(jobs, tmp_path):
        assert [code for code, _ in codes] == [0] * len(jobs), codes
    entropy.ok("fit", "arithmetic", *flags, *rest, "--run.name", "half")
    entropy.ok("fit", "arithmetic", *flags, "--trainer.max_steps", "14", "--run.name", "one")
    found = {n: weights(entropy, n)["state_dict"] for n in ("one", "two", "half")}
    for name, w in found["one"].items():
        for other in ("two", "half"):
            assert torch.allclose(w, found[other][name], rtol=1e-7, atol=1e-9), (other, name)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(entropy: Runner, precision: str) -> None:
    flags = ("--trainer.precision", precision, *QUIET)
    entropy.ok("fit", "arithmetic", *flags)
    entropy.ok("test", "arithmetic", *flags)
    assert metrics(entropy)["closure"]["values"][0] < (1e-12 if precision == "64-true" else 1e-6)
    kinds = {w.dtype for n, w in weights(entropy, "version_0")["state_dict"].items() if n.startswith("net.")}
    assert kinds == {torch.float64 if precision == "64-true" else torch.float32}


def test_without_an_adapter_everything_is_trained(entropy: Runner) -> None:
    flags = ("--model.policy.lora_rank", "0", "--model.policy.family", "gpt2", *QUIET)
    entropy.ok("fit", "arithmetic", *flags)
    entropy.ok("test", "arithmetic", *flags)
    assert metrics(entropy)["closure"]["values"][0] < 1e-6
    assert not any("lora" in n for n in weights(entropy, "version_0")["state_dict"])


def test_the_policy_gradient_leaves_the_base_alone(entropy: Runner) -> None:
    entropy.ok("fit", "arithmetic", *QUIET, "--trainer.max_steps", "6", "--run.name", "warm")
    entropy.ok("fit", "arithmetic", *QUIET, "--run.name", "on")
    warm, on = (weights(entropy, n)["state_dict"] for n in ("warm", "on"))
    for name in warm:
        moved = not torch.equal(warm[name], on[name])
        assert not moved or ".lora_" in name, name
    assert any(not torch.equal(warm[n], on[n]) for n in warm if ".lora_B" in n)
    # the first phase begins where it should: without a policy-gradient step the state is fresh, and the probe says so
    said = entropy.ok("test", "arithmetic", *QUIET, "--run.name", "warm")
    assert "the policy gradient has not begun" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model.plan.etas", "[]"), "--model.plan.etas: [] is not allowed"),
        (("--model.plan.etas", "[0.1,-1]"), "--model.plan.etas: -1.0 is not allowed"),
        (("--model.rollouts.group", "1"), "--model.rollouts.group: 1 is not allowed"),
        (("--model.rollouts.temperature", "0"), "--model.rollouts.temperature: 0.0 is not allowed"),
        (("--model.warm_steps", "-1"), "--model.warm_steps: -1 is not allowed"),
        (("--model.clip_low", "1.5"), "--model.clip_low: 1.5 is not allowed"),
        (("--model.betas", "[0.9,1.0]"), "--model.betas: [0.9, 1.0] is not allowed"),
        (("--model.plan.kind", "tokens"), "tokens"),
        (("--model.policy.family", "gtp2"), "gtp2"),
        (("--data.digits", "0"), "--data.digits: 0 is not allowed"),
        (("--model.plan.clip_cov_low", "9"), "--model.plan.clip_cov_low: 9.0 is not allowed"),
        (("--trainer.precision", "16-mixed"), "--trainer.precision: '16-mixed' is not allowed here; give one of"),
        (
            ("--model.optimizer_state", "pyproject.toml"),
            "--model.optimizer_state: pyproject.toml is not allowed without --model.backbone",
        ),
        (("--data", "LinearGaussian"), "LinearGaussian is not allowed; give TextData"),
    ],
)
def test_bad_input_is_one_line(entropy: Runner, flags: tuple[str, ...], said: str) -> None:
    small = SMALL if flags[0] != "--data" else ()
    code, err = Runner(entropy.root, entropy.capture, "update_entropy", small).code("fit", "arithmetic", *flags)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert not (entropy.root / "update_entropy").exists()


def test_a_batch_without_advantage_is_refused(entropy: Runner) -> None:
    """An untrained policy knows no sums: there is no gradient to probe."""
    flags = (
        "--model.warm_steps",
        "1",
        "--trainer.max_steps",
        "2",
        "--data",
        "ArithmeticData",
        "--data.digits",
        "2",
        *QUIET,
    )
    entropy.ok("fit", "arithmetic", *flags)
    asked = ("--model.plan.filter_zero_advantage", "true", "--model.plan.max_resample_attempts", "3")
    code, err = entropy.code("test", "arithmetic", *flags, *asked)
    assert code == 2
    assert (
        "--model.plan.max_resample_attempts: after 3 draws of 2 prompts only 0 had responses of different reward" in err
    )
    assert len(err.strip().splitlines()) == 1


def test_the_callback_changes_nothing_and_logs_every_step(entropy: Runner, tmp_path: Path) -> None:
    config = tmp_path / "watch.yaml"
    config.write_text(
        "trainer: {callbacks: [{class_path: lightning_toys.update_entropy.UpdateEntropyCallback, "
        "init_args: {first_step: 6, prompts: 8, measure_prompts: 8}}]}"
    )
    said = entropy.ok("fit", "arithmetic", "-c", str(config), "--run.name", "watched")
    assert "UpdateEntropyCallback: 4 measurements of" in said
    entropy.ok("fit", "arithmetic", *QUIET, "--run.name", "plain")
    watched, plain = (weights(entropy, n)["state_dict"] for n in ("watched", "plain"))
    assert all(torch.equal(watched[n], plain[n]) for n in plain)  # measuring changes nothing
    folder = entropy.folder("arithmetic", "watched")
    rows = [r for r in read_csv(folder / "metrics.csv") if r.get("entropy_step/predicted")]
    assert [int(r["step"]) for r in rows] == [7, 8, 9, 10]
    for r in rows:
        parts = sum(float(r[f"entropy_step/{k}"]) for k in ("momentum", "decay", "batch"))
        assert parts == pytest.approx(float(r["entropy_step/predicted"]), rel=1e-4, abs=1e-9)
        assert float(r["entropy_step/measured_se"]) > 0
        assert r["entropy_step/covariance"]
    assert (folder / "figures" / "predictions.png").exists()


@pytest.mark.slow  # the resume of a fit is in the gate
def test_an_interrupted_probe_resumes(entropy: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy.ok("fit", "arithmetic", *QUIET)
    entropy.ok("test", "arithmetic", *QUIET)
    whole = metrics(entropy)
    real, passes = probing.prefix_importance_sampling, []

    def cut(*rest: Any) -> Any:
        passes.append(1)
        if len(passes) == 9:
            raise KeyboardInterrupt
        return real(*rest)

    monkeypatch.setattr(probing, "prefix_importance_sampling", cut)
    code, _ = entropy.code("test", "arithmetic", *QUIET)
    assert code != 0
    partial = entropy.folder("arithmetic") / "probe-partial"
    assert len(list(partial.iterdir())) == 9
    monkeypatch.setattr(probing, "prefix_importance_sampling", real)
    said = entropy.ok("test", "arithmetic", *QUIET)
    assert "9 passes were those of a probe that had been cut off" in said
    assert metrics(entropy) == whole
    assert not partial.exists()


def test_files_of_somebodys_training_are_probed_without_a_run(entropy: Runner, tmp_path: Path) -> None:
    spec = TinyPolicy(hidden=16, layers=1, heads=2, lora_rank=4)
    base = spec.build_decoder(17, 40)
    initialise(base, 0)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model: Any = spec.with_adapter(base, 0)
    trained = []
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
        if is_adapter(name):
            trained.append(p)
            p.data += 0.05
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    model(input_ids=torch.arange(3, 12).view(1, 9)).logits.square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    save_optimizer_state(optimizer, model, tmp_path / "adamw.pt")
    files = ("--model.backbone", str(tmp_path / "base"), "--model.adapter", str(tmp_path / "adapter"))
    said = entropy.ok("test", "arithmetic", *files, "--model.optimizer_state", str(tmp_path / "adamw.pt"), *QUIET)
    assert "eta 0.01: dH " in said
    (summary,) = entropy.folder("arithmetic").glob("probe/seed_0/summary.json")
    found = json.loads(summary.read_text())
    assert found["adamw_step"] == 1
    assert found["learning_rate"] == 3e-4  # the file's, not the configuration's
    code, err = entropy.code("test", "arithmetic", *files, "--model.optimizer_state", "nowhere.pt", "--run.name", "x")
    assert code == 2
    assert "--model.optimizer_state: nowhere.pt is not there" in err
    assert not entropy.folder("arithmetic", "x").exists()
    short = ("--model.warm_steps", "0", "--trainer.max_steps", "1", "--run.name", "tuned")
    entropy.ok("fit", "arithmetic", *files[:2], *QUIET, *short)
    held = entropy.checkpoint("arithmetic", "tuned")["state_dict"].keys() - {"best_score"}
    assert held  # what was trained, and nothing of the backbone
    assert all(name.startswith("net.0.") and is_adapter(name) for name in held)


@pytest.mark.slow
def test_flags_beat_the_optimisers_settings_in_a_checkpoint(entropy: Runner) -> None:
    """The probe is of the step that AdamW would take with the settings asked for."""
    entropy.ok("fit", "arithmetic", *QUIET)
    found = []
    for flags in ((), ("--model.weight_decay", "0.8"), ("--model.betas", "[0.5,0.999]"), ("--model.lr", "0.5")):
        entropy.ok("test", "arithmetic", "--ckpt_path", "last", *flags, *QUIET)
        found.append({k: v["values"][0] for k, v in metrics(entropy).items() if k.startswith("slope")})
    plain, decayed, betas, lr = found
    dapo = ("--model.loss", "dapo", "--model.scale_rewards", "group", "--model.clip_high", "0.28")
    said = entropy.ok("test", "arithmetic", "--ckpt_path", "last", *dapo, *QUIET)
    assert (
        "the loss that the step is of: dapo (mean over all tokens of the step; advantages divided by the group's "
        in said
    )
    other = {k: v["values"][0] for k, v in metrics(entropy).items() if k.startswith("slope")}
    assert other["slope_batch"] != pytest.approx(plain["slope_batch"], rel=1e-2)
    assert other["slope_decay"] == pytest.approx(plain["slope_decay"], rel=1e-4)
    assert decayed["slope_decay"] == pytest.approx(80 * plain["slope_decay"], rel=1e-4)
    assert decayed["slope_batch"] == pytest.approx(plain["slope_batch"], rel=1e-4)
    assert betas["slope_batch"] != pytest.approx(plain["slope_batch"], rel=1e-2)
    assert lr == pytest.approx(plain, rel=1e-4)  # slopes are by the step size


def test_a_run_within_its_imitation_says_so(entropy: Runner) -> None:
    said = entropy.ok("fit", "arithmetic", "--model.warm_steps", "10", *QUIET)
    assert "the policy gradient will not begin: --trainer.max_steps 10" in said
