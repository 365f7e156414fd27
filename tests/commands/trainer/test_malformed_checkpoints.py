"""Checkpoints that are none, are cut, come from elsewhere, or hold something else than they should."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_toys.cli import main
from lightning_toys.errors import ToyError
from lightning_toys.training.checkpoint_format import malformed
from lightning_toys.training.run_folder import read_checkpoint
from tests.malformed import CORPUS, GOOD, Refusal, Trap, at, put

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps, as it should be."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "good.yaml").write_text(json.dumps(GOOD))
    assert main(["fit", "-c", str(folder / "good.yaml"), "--run.root", str(folder / "logs"), "--run.name", "a"]) == 0
    return folder / "logs/flow_vs_regression/good/a/checkpoints/last.ckpt"


class Bench:
    """Puts checkpoints to `fit`, or to another verb, and wants them refused by name."""

    def __init__(self, refuse: Refusal, whole: Path) -> None:
        self.refuse, self.whole = refuse, whole
        self.config = refuse.file(GOOD, "good.yaml")
        self.path = refuse.folder / "wrong.ckpt"

    def tree(self) -> Tree:
        content: Tree = torch.load(self.whole, weights_only=True)
        return content

    def __call__(self, *parts: str, verb: str = "fit") -> str:
        flags = ("--ckpt_path", str(self.path), "--trainer.max_steps", "4")
        return self.refuse.fit(self.config, *parts, verb=verb, flags=flags)

    def of(self, content: object, *parts: str, verb: str = "fit") -> str:
        torch.save(content, self.path)
        return self(*parts, "wrong.ckpt", verb=verb)


@pytest.fixture
def bench(refuse: Refusal, whole: Path) -> Bench:
    return Bench(refuse, whole)


NAN = torch.full((2, 3, 8), torch.nan)
FIT = "loops/fit_loop"
STEPS = f"{FIT}/epoch_loop.manual_optimization.optim_step_progress"
ADAM = "optimizer_states/0"
EDITS: list[tuple[str, Any, str]] = [
    ("toy", ..., "is not a checkpoint of lightning_toys"),
    *((key, ..., f"{key} is missing") for key in ("state_dict", "global_step", "loops", "callbacks", "epoch")),
    ("optimizer_states", ..., "optimizer_states is missing"),
    ("lr_schedulers", ..., "lr_schedulers is missing"),
    ("pytorch-lightning_version", ..., "pytorch-lightning_version is missing"),
    ("pytorch-lightning_version", 3, "pytorch-lightning_version is 3"),
    ("pytorch-lightning_version", "the newest", "pytorch-lightning_version is 'the newest'"),
    ("toy", 3, "toy is no mapping"),
    ("toy", [], "toy is no mapping"),
    *((f"toy/{key}", ..., f"toy.{key} is missing") for key in ("seeds", "sizes", "config")),
    ("toy/seeds", 3, "toy.seeds is no list"),
    ("toy/seeds", [], "toy.seeds is empty"),
    ("toy/seeds", ["a"], "toy.seeds[0]"),
    ("toy/seeds", [0, -1], "toy.seeds[1] is -1"),
    ("toy/seeds", [0, 1, 2], "seeds"),
    ("toy/seeds", [0], "seeds"),
    ("toy/sizes", [1], "toy.sizes is no mapping"),
    ("toy/sizes/dim", torch.zeros(3), "toy.sizes"),
    ("toy/config", [1], "toy.config is no mapping"),
    ("toy/config/model", ..., "toy.config.model is missing"),
    ("toy/config/model", 3, "toy.config.model is no mapping"),
    ("toy/config/model/class_path", ..., "class_path is missing"),
    ("toy/config/model/class_path", 3, "class_path is 3"),
    ("toy/config/model/class_path", "os.system", "os.system"),
    ("toy/config/model/class_path", "lightning_toys.generative_policy.MeanFlowPolicy", "MeanFlowPolicy"),
    ("toy/config/model/init_args", ..., "init_args is missing"),
    ("toy/config/model/init_args", 3, "init_args is no mapping"),
    ("toy/config/model/init_args/moed", "flow", "'moed' in "),
    ("toy/config/model/init_args/lr", torch.zeros(2), "toy.config holds more than plain values"),
    ("toy/config/model/init_args/seeds", [5, 6], "seeds"),
    ("toy/config/model/init_args/network", {"hidden": 9}, "where (2, "),
    ("toy/config/data/class_path", "os.system", "os.system"),
    ("toy/config/data/class_path", "antigravity.Fly", "antigravity.Fly"),
    ("toy/config/data/init_args/target", {"class_path": "subprocess.Popen", "init_args": {}}, "subprocess.Popen"),
    ("state_dict", [1], "state_dict is no mapping"),
    ("state_dict", {}, "net"),
    ("state_dict/net.first.weight", ..., "net.first.weight"),
    ("state_dict/net.first.weight", torch.zeros(2, 3, 9), "net.first.weight"),
    ("state_dict/net.first.weight", torch.zeros(()), "net.first.weight"),
    ("state_dict/net.first.weight", 3, "net.first.weight is no tensor"),
    ("state_dict/net.first.weight", NAN, "net.first.weight is not finite"),
    ("state_dict/net.extra", torch.zeros(2), "net.extra"),
    ("state_dict/stray", torch.zeros(2), "stray"),
    ("state_dict/best_score", torch.zeros(3), "best_score"),
    ("state_dict/best_score", ..., "best_score"),
    ("state_dict/ema_net.first.weight", torch.zeros(2), "--model.ema_decay"),
    ("global_step", "2", "global_step is '2'"),
    ("global_step", -1, "global_step is -1"),
    ("global_step", 2.5, "global_step is 2.5"),
    ("global_step", True, "global_step is True"),
    ("global_step", None, "global_step is None"),
    ("global_step", 7, "step 7"),
    ("epoch", "0", "epoch is '0'"),
    ("callbacks", [1], "callbacks is no mapping"),
    ("callbacks/RescueCheckpoint", 3, "RescueCheckpoint"),
    ("callbacks/RescueCheckpoint", {"best_mean": "low"}, "RescueCheckpoint"),
    ("loops", 3, "loops is no mapping"),
    (FIT, ..., "loops.fit_loop is missing"),
    (f"{FIT}/epoch_progress", ..., "epoch_progress is missing"),
    (f"{FIT}/epoch_progress/total", 3, "epoch_progress.total is no mapping"),
    (f"{FIT}/epoch_loop.batch_progress", ..., "batch_progress is missing"),
    (f"{FIT}/epoch_loop.batch_progress/total/ready", "1", "ready is '1'"),
    (STEPS, ..., "optim_step_progress is missing"),
    (f"{FIT}/epoch_loop.state_dict", "2.6.6", "epoch_loop.state_dict is no mapping"),
    (f"{FIT}/epoch_loop.val_loop.state_dict", [1], "val_loop.state_dict is no mapping"),
    (f"{FIT}/epoch_loop.val_loop.batch_progress/current/processed", "1", "processed is '1'"),
    (f"{FIT}/epoch_loop.scheduler_progress", 5, "scheduler_progress is no mapping"),
    (f"{FIT}/epoch_loop.manual_optimization.state_dict", ..., "manual_optimization.state_dict is missing"),
    (f"{FIT}/epoch_loop.automatic_optimization.optim_progress/optimizer/step", 1, "optimizer.step is no mapping"),
    (f"{STEPS}/total/completed", -4, "completed is -4"),
    (f"{STEPS}/total/completed", 9, "completed"),
    (f"{FIT}/state_dict", {}, "combined_loader is missing"),
    (f"{FIT}/state_dict/combined_loader", [], "combined_loader is empty"),
    (f"{FIT}/state_dict/combined_loader/0/next_step", "2", "next_step is '2'"),
    (f"{FIT}/state_dict/combined_loader/0/next_step", 10**9, "its data are at step"),
    ("optimizer_states", 3, "optimizer_states is no list"),
    ("optimizer_states", [], "optimizer_states is empty"),
    ("optimizer_states", [3], "optimizer_states[0] is no mapping"),
    (ADAM, {"state": {}}, "param_groups is missing"),
    (f"{ADAM}/state", {}, "no moments"),
    (f"{ADAM}/state", [1], "state is no mapping"),
    (f"{ADAM}/state/3", 5, "parameter 3"),
    (f"{ADAM}/state/3/exp_avg", ..., "no exp_avg"),
    (f"{ADAM}/state/3/exp_avg", torch.zeros(7), "exp_avg is a tensor (7,)"),
    (f"{ADAM}/state/0/exp_avg_sq", NAN, "exp_avg_sq is not finite"),
    (f"{ADAM}/state/3/step", "2", "step is '2'"),
    (f"{ADAM}/state/99", {"step": torch.zeros(())}, "number 99"),
    (f"{ADAM}/param_groups", [], "param_groups is empty"),
    (f"{ADAM}/param_groups/0/params", [0, 1], "params do not number 8"),
    (f"{ADAM}/param_groups/0/params", [[0]] * 8, "params"),
    (f"{ADAM}/param_groups/0/betas", ..., "no betas"),
    (f"{ADAM}/param_groups/0/betas", (0.9,), "betas is (0.9,)"),
    (f"{ADAM}/param_groups/0/eps", "small", "eps is 'small'"),
    (f"{ADAM}/param_groups/0/eps", float("nan"), "eps is nan"),
    ("lr_schedulers", 3, "lr_schedulers is no list"),
]


@pytest.mark.parametrize(("path", "value", "says"), EDITS, ids=lambda x: str(x)[:40].replace("\n", " "))
def test_one_thing_is_wrong(path: str, value: Any, says: str, bench: Bench) -> None:
    tree = bench.tree()
    put(path, value)(tree)
    bench.of(tree, says)


OTHERS = [e[:2] for e in EDITS if e[0] in ("state_dict", "global_step", "toy/config") and e[1] != 7]


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
@pytest.mark.parametrize(("path", "value"), OTHERS, ids=lambda x: str(x)[:40])
def test_other_verbs_refuse_it_too(verb: str, path: str, value: Any, bench: Bench) -> None:
    tree = bench.tree()
    put(path, value)(tree)
    bench.of(tree, verb=verb)


def test_two_optimisers_where_one_is_wanted(bench: Bench) -> None:
    tree = bench.tree()
    tree["optimizer_states"] *= 2
    bench.of(tree, "2 optimisers, where 1")


WHOLES = {"list": [1, 2], "tensor": torch.zeros(3), "empty": {}, "state_dict": {"net.w": torch.zeros(3)}, "none": None}


@pytest.mark.parametrize("name", WHOLES)
def test_a_file_of_torchs_that_is_no_checkpoint(name: str, bench: Bench) -> None:
    bench.of(WHOLES[name], "is not a checkpoint of lightning_toys")


def foreign(kind: str, path: Path, whole: Path, canary: Path) -> None:
    """Write a file that is no checkpoint."""
    trap = Trap(canary)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"toy": trap}))
    elif kind == "torch_zip":
        torch.save({"toy": trap}, path)
    elif kind == "torch_legacy":
        torch.save({"toy": trap}, path, _use_new_zipfile_serialization=False)
    elif kind == "module":
        torch.save({"toy": torch.nn.Linear(2, 2)}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("readme.txt", "nothing")
    elif kind == "zip_climbs":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("../../canary", "out")
    elif kind == "zip_pickle_swapped":
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as z:
            for item in old.namelist():
                z.writestr(item, pickle.dumps(trap) if item.endswith("data.pkl") else old.read(item))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(4096))
    elif kind == "png":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "text":
        path.write_text("lr: 0.1\n")
    elif kind == "directory":
        path.mkdir()
    elif kind == "run_without_checkpoints":
        (path / "checkpoints").mkdir(parents=True)
    elif kind == "link_loop":
        path.symlink_to(path)
    elif kind == "broken_link":
        path.symlink_to("nowhere")


KINDS = (
    "pickle", "torch_zip", "torch_legacy", "module", "zip", "zip_climbs", "zip_pickle_swapped", "empty", "zeros", "png",
    "text", "directory", "run_without_checkpoints", "link_loop", "broken_link", "missing",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_checkpoint(kind: str, bench: Bench) -> None:
    foreign(kind, bench.path, bench.whole, bench.refuse.canary)
    bench("wrong.ckpt")


def test_the_canary_sings_where_pickles_are_obeyed(bench: Bench) -> None:
    """Negative control."""
    foreign("torch_zip", bench.path, bench.whole, bench.refuse.canary)
    torch.load(bench.path, weights_only=False)
    assert bench.refuse.canary.exists()


def unreadable(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ToyError) as caught:
        read_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"--ckpt_path: {path} cannot be read as a checkpoint")


@CORPUS
@given(st.floats(0, 1, exclude_max=True))
def test_cut_anywhere(whole: Path, tmp_path: Path, share: float) -> None:
    content = whole.read_bytes()
    unreadable(tmp_path / "wrong.ckpt", content[: int(share * len(content))])


@CORPUS
@given(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=64))
def test_overwritten_anywhere(whole: Path, tmp_path: Path, share: float, patch: bytes) -> None:
    """A flipped byte may pass (a weight is then another): nothing but a refusal or a whole checkpoint comes of it."""
    content, k = whole.read_bytes(), int(share * whole.stat().st_size)
    (tmp_path / "wrong.ckpt").write_bytes(content[:k] + patch + content[k + len(patch) :])
    with suppress(ToyError):
        malformed(read_checkpoint(tmp_path / "wrong.ckpt"), True)


@CORPUS
@given(st.binary(max_size=300))
def test_bytes_at_random(tmp_path: Path, content: bytes) -> None:
    unreadable(tmp_path / "wrong.ckpt", content)


def test_what_is_odd_but_allowed(bench: Bench) -> None:
    """Negative control: as it is, and with keys that nobody asks for, a checkpoint is gone on with."""
    tree = copy.deepcopy(bench.tree())
    tree["note"] = "mine"
    torch.save(tree, bench.path)
    words = ["-c", str(bench.config), "--ckpt_path", str(bench.path)]
    for verb in (["fit", "--trainer.max_steps", "4"], ["test"]):
        assert main([*verb, *words]) == 0, bench.refuse.capture.readouterr().err


def test_a_damaged_last_does_not_stop_another(bench: Bench, whole: Path) -> None:
    """Going on from best.ckpt, say, where last.ckpt was cut: it is set aside, not read."""
    words = ["fit", "-c", str(bench.config), "--run.name", "a"]
    assert main(words) == 0
    folder = next(bench.refuse.root.rglob("checkpoints"))
    last = folder / "last.ckpt"
    (folder / "best.ckpt").write_bytes(last.read_bytes())
    last.write_bytes(b"cut")
    assert main([*words, "--ckpt_path", "best", "--trainer.max_steps", "4"]) == 0
    assert (folder / "last-1.ckpt").read_bytes() == b"cut"
    assert torch.load(last, weights_only=True)["global_step"] == 4


def test_a_newer_lightning_is_said(bench: Bench) -> None:
    tree = bench.tree()
    tree["pytorch-lightning_version"] = "99.0.0"
    torch.save(tree, bench.path)
    with pytest.warns(UserWarning, match=r"v99\.0\.0"):
        assert main(["test", "-c", str(bench.config), "--ckpt_path", str(bench.path)]) == 0


def test_a_configuration_that_names_it(bench: Bench, whole: Path) -> None:
    bench.path.write_bytes(b"")
    bench.refuse.fit(bench.refuse.file(at("ckpt_path", str(bench.path))), "--ckpt_path: ", "wrong.ckpt")
