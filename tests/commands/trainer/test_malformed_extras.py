"""What experiments put into a checkpoint beside their networks: refused where it is not what they will go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys.cli import main
from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.training import rows_of_rank
from tests.conftest import REPO
from tests.malformed import Refusal, put
from tests.shipped import tiny

STEPS = {"control": 9, "regression": 12, "arithmetic": 3}
MORE = {  # the third step of arithmetic is the second on its responses
    "arithmetic": ("--model.rollouts.inner_steps", "3"),
    "control": ("--trainer.log_every_n_steps", "100"),
    "regression": ("--model.algorithm", "aid"),
}
FOLDER = {"control": "bilevel", "regression": "bilevel", "arithmetic": "update_entropy"}
R = "toy/responses/0"
EDITS: list[tuple[str, str, Any, str]] = [
    ("control", "toy/environments", ..., "toy.environments is missing"),
    ("control", "toy/environments", [1], "toy.environments is no mapping"),
    ("control", "toy/environments/physics", ..., "environments.physics is missing"),
    ("control", "toy/environments/physics", torch.zeros(4, 3, 1, dtype=torch.float64), "environments.physics is a"),
    ("control", "toy/environments/lengths", torch.zeros(2, 1), "environments.lengths is a tensor (2, 1)"),
    ("control", "toy/environments/lengths", torch.full((2, 1), -1), "environments.lengths are not of these"),
    ("control", "toy/environments/where", torch.tensor([0, 7]), "environments are at step 7"),
    ("control", "toy/returns", ..., "toy.returns is missing"),
    ("control", "toy/returns", {}, "toy.returns is no list"),
    ("control", "toy/returns", [[1.0]], "returns are no list of numbers for each replica"),
    ("control", "toy/returns", [[1.0], ["a"]], "returns are no list of numbers for each replica"),
    ("regression", "toy/records", ..., "toy.records is missing"),
    ("regression", "toy/records", 3, "toy.records is no mapping"),
    ("regression", "toy/records/loss", ..., "records.loss is missing"),
    ("regression", "toy/records/loss", torch.zeros(12, 2), "no tensor (12, 2) of torch.float64"),
    ("regression", "toy/records/loss", torch.zeros(11, 2, dtype=torch.float64), "records.loss is a tensor (11, 2)"),
    ("regression", "toy/records/lambda", torch.zeros(2, 2, 3, dtype=torch.float64), "records.lambda is a tensor"),
    ("regression", "toy/records/residual", ..., "records.residual is missing"),
    ("arithmetic", "toy/responses", ..., "toy.responses are missing"),
    ("arithmetic", "toy/responses", [], "responses is empty"),
    ("arithmetic", "toy/responses/1", ..., "responses are of 1 replicas"),
    ("arithmetic", f"{R}/old", ..., "responses[0].old is no tensor"),
    ("arithmetic", f"{R}/old", torch.zeros(3, 1), "responses[0].old is no tensor"),
    ("arithmetic", f"{R}/rewards", [1.0], "responses[0].rewards has 1 entries"),
    ("arithmetic", f"{R}/rewards", ["a"], "responses[0].rewards[0] is 'a'"),
    ("arithmetic", f"{R}/prompts/0", [], "responses[0].prompts[0] is empty"),
    ("arithmetic", f"{R}/prompts/0", [99999], "has the token 99999"),
    ("arithmetic", f"{R}/responses/0", [-1], "responses[0].responses are no lists of tokens"),
    ("arithmetic", f"{R}/responses/0", "ab", "responses[0].responses are no lists of tokens"),
    ("arithmetic", f"{R}/responses", [], "responses[0].responses are none"),
]


def line(kind: str, *flags: str) -> list[str]:
    config = REPO / "configs" / FOLDER[kind] / f"{kind}.yaml"
    return ["fit", "-c", str(config), *tiny(config), *MORE[kind], "--figures.enabled", "false", *flags]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each experiment that can be gone on with."""
    root = tmp_path_factory.mktemp("stopped")
    out = {}
    for kind, steps in STEPS.items():
        where = ("--run.root", str(root), "--run.name", "a", "--trainer.max_steps", str(steps))
        assert main(line(kind, *where)) == 0
        out[kind] = root / FOLDER[kind] / kind / "a/checkpoints/last.ckpt"
    return out


@pytest.mark.parametrize(("kind", "path", "value", "says"), EDITS, ids=lambda x: str(x)[:40])
def test_extras(kind: str, path: str, value: Any, says: str, stopped: dict[str, Path], refuse: Refusal) -> None:
    content: dict[str, Any] = torch.load(stopped[kind], weights_only=True)
    put(path, value)(content)
    wrong = refuse.folder / "wrong.ckpt"
    torch.save(content, wrong)
    refuse(line(kind, "--ckpt_path", str(wrong), "--trainer.max_steps", "20"), "wrong.ckpt", says)


@pytest.mark.parametrize("kind", STEPS)
def test_the_unchanged_one_is_gone_on_with(kind: str, stopped: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--run.root", str(tmp_path), "--trainer.max_steps", str(STEPS[kind] + 2))
    assert main(line(kind, *flags, "--ckpt_path", str(stopped[kind]))) == 0


def test_other_inner_steps_may_be_gone_on_with(tmp_path: Path) -> None:
    """One step on each set of responses, and then three: there are none in use yet."""
    flags = ("--run.root", str(tmp_path), "--run.name", "a", "--trainer.max_steps")
    assert main(line("arithmetic", *flags, "3", "--model.rollouts.inner_steps", "1")) == 0
    assert main(line("arithmetic", *flags, "5", "--ckpt_path", "last")) == 0


def test_what_only_training_reads_is_no_matter_of_a_test(stopped: dict[str, Path], tmp_path: Path) -> None:
    content: dict[str, Any] = torch.load(stopped["control"], weights_only=True)
    del content["toy"]["environments"]
    torch.save(content, tmp_path / "part.ckpt")
    words = line("control", "--run.root", str(tmp_path / "logs"), "--ckpt_path", str(tmp_path / "part.ckpt"))
    assert main(["test", *words[1:]]) == 0


def test_another_algorithm_may_be_gone_on_with(tmp_path: Path) -> None:
    flags = ("--run.root", str(tmp_path), "--run.name", "a", "--trainer.max_steps")
    for steps, algorithm, resume in (("8", "funcbo", ()), ("12", "aid", ("last",)), ("16", "uniform", ("last",))):
        words = (*flags, steps, "--model.algorithm", algorithm, *(("--ckpt_path", *resume) if resume else ()))
        assert main(line("regression", *words)) == 0


def test_ranks_take_whole_groups_up() -> None:
    prompts = [i // 8 for i in range(24)]  # three prompts, eight responses each
    for world_size in (1, 2, 3):
        shares = [rows_of_rank(prompts, r, world_size) for r in range(world_size)]
        assert [i for share in shares for i in share] == list(range(24))
        assert all(len(share) % 8 == 0 for share in shares)
    with pytest.raises(ToyError, match="responses to 3 prompts are in use; go on with at most 3 processes"):
        rows_of_rank(prompts, 0, 4)
