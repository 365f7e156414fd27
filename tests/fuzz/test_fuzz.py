"""The fuzzer's short form, its corpus, and that it sees what it is there for."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import lightning_toys.cli
from tests.fuzz.mutations import Case
from tests.fuzz.play import judge, lost, play, snapshot, step_of
from tests.fuzz.pool import Worker
from tests.fuzz.strategies import drawn
from tests.fuzz.templates import BACKBONE, CONFIGS

HERE = Path(__file__).resolve().parent
CORPUS = sorted((HERE / "corpus").glob("*.json"))
GATE = ("flow_vs_regression/flow", "bilevel/regression", "generative_policy/bandit")
SEED, CASES, LIMIT = 21, 5, 60.0


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("fuzz")
    with Worker(folder / "templates", folder / "box") as made:
        yield made


def test_cases_at_random(worker: Worker) -> None:
    for config in GATE:
        worker.make(config)
    cases = drawn(worker.root, SEED, 0, CASES, GATE)
    assert len({json.dumps(c.to_json()) for c in cases}) == CASES
    outcomes = [(case, worker.play(case, LIMIT)) for case in cases]
    wrong = [f"{o.kind}: {o.why}\n{json.dumps(c.to_json())}\n{o.said[-800:]}" for c, o in outcomes if not o.passed]
    assert not wrong, "\n\n".join(wrong)
    kinds = Counter(o.kind for _, o in outcomes)
    assert kinds["refused"] > 3, kinds  # else nothing was changed
    assert kinds["ran"] > 0, kinds  # else everything stops at the same door


@pytest.mark.slow
def test_a_campaign_has_something_to_begin_with(worker: Worker) -> None:
    for config in CONFIGS:
        worker.make(config)


@pytest.mark.parametrize("file", CORPUS, ids=lambda p: p.stem)
def test_the_corpus(file: Path, worker: Worker) -> None:
    content = json.loads(file.read_text())
    case = Case(content["config"], content["verb"], content["changes"])
    worker.make(case.config)
    outcome = worker.play(case, LIMIT)
    assert outcome.kind == content["expects"], (outcome.kind, outcome.why, outcome.said)
    assert content.get("says", "") in outcome.said


def test_there_is_a_corpus_of_model_files_too() -> None:
    assert len(CORPUS) >= 10
    assert BACKBONE in {json.loads(f.read_text())["config"] for f in CORPUS}


# what it sees: each of these is what must not be


@pytest.fixture
def ground(tmp_path: Path) -> Path:
    """A template without anything in it but a configuration and a file."""
    folder = tmp_path / "templates" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "case.yaml").write_text("model: {}\n")
    (folder / "kept.txt").write_text("kept")
    return tmp_path


def fails() -> int:
    raise ValueError("not told in one line")


def sleeps() -> int:
    time.sleep(60)
    return 0


def overwrites() -> int:
    Path("kept.txt").write_text("other")
    return 0


def leaves() -> int:
    Path("new.txt").write_text("new")
    os.write(2, b"error: no\n")
    return 2


def talks() -> int:
    os.write(2, b"error: no\nand more\n")
    return 2


def says_nothing() -> int:
    return 1


def dies() -> int:
    os.kill(os.getpid(), 9)
    return 0


def writes_outside() -> int:
    (Path.cwd().parents[1] / "outside.txt").write_text("here")
    return 0


def moves() -> int:
    Path("kept.txt").rename("kept-1.txt")
    Path("kept.txt").write_text("other")
    return 0


SEEN = {
    fails: "traceback", sleeps: "hang", overwrites: "lost file", leaves: "left behind", talks: "lines", dies: "crash",
    says_nothing: "lines", writes_outside: "outside", moves: "ran",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("does", SEEN, ids=lambda f: f.__name__)
def test_what_must_not_be_is_seen(does: object, ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(words: Sequence[str]) -> int:
        return does()  # type: ignore[operator,no-any-return]

    monkeypatch.setattr(lightning_toys.cli, "main", main)
    limit = 1.0 if does is sleeps else 30.0
    outcome = play(Case("a/b", "fit"), ground / "templates", ground / "box", limit)
    assert outcome.kind == SEEN[does], outcome  # type: ignore[index]


def test_rows_and_checkpoints_that_are_kept(tmp_path: Path) -> None:
    import torch

    root = tmp_path / "work"
    root.mkdir()
    table, ckpt = root / "metrics.csv", root / "last.ckpt"
    table.write_text("step,a\n1,2\n")
    (tmp_path / "metrics-before.csv").write_text("step,a\n1,2\n")
    torch.save({"global_step": 2}, ckpt)
    before, steps = snapshot(root), {"last.ckpt": step_of(ckpt)}
    assert lost(root, before, steps) == ""
    table.write_text("step,b,a\n1,,2\n2,3,\n")
    torch.save({"global_step": 4}, ckpt)
    assert lost(root, before, steps) == ""
    torch.save({"global_step": 1}, ckpt)
    assert lost(root, before, steps) == "last.ckpt"
    torch.save({"global_step": 2}, ckpt)
    table.write_text("step,b,a\n1,,3\n")
    assert lost(root, before, steps) == "metrics.csv"


def test_a_folder_that_is_set_aside_is_kept_only_whole(tmp_path: Path) -> None:
    (tmp_path / "a" / "in").mkdir(parents=True)
    (tmp_path / "a" / "in" / "x").write_text("1")
    (tmp_path / "b").mkdir()
    before = snapshot(tmp_path)
    (tmp_path / "a").rename(tmp_path / "a-1")
    assert lost(tmp_path, before, {}) == ""
    (tmp_path / "a-1" / "in" / "x").write_text("2")
    assert lost(tmp_path, before, {}) == "a (folder)"
    (tmp_path / "a-1" / "in" / "x").write_text("1")
    (tmp_path / "b").rmdir()
    assert lost(tmp_path, before, {}) == "b (folder)"


def test_a_case_that_never_began_is_a_crash(tmp_path: Path) -> None:
    assert judge(Case("a/b", "fit"), tmp_path, 0, 0.0).kind == "crash"
