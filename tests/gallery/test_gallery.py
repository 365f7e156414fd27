"""The gallery's check: what stands in README and docs is what docs/gallery.json says, and a wrong digit fails."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from gallery import build, check, manifest, placeholders, running
from gallery.read import adjusted
from gallery.recipe import Run
from gallery.recipes import RECIPES
from lightning_toys.cli import main
from lightning_toys.stats import Estimate, PairedDifference

REPO = Path(__file__).resolve().parents[2]
RUNS = [run for recipe in RECIPES for run in recipe.runs]


@pytest.fixture
def docs() -> check.Docs:
    return copy.deepcopy(check.read_docs(REPO))


def problems(docs: check.Docs) -> list[str]:
    return check.problems(docs, RECIPES)


def changed(docs: check.Docs, page: str, old: str, new: str) -> check.Docs:
    assert old in docs.pages[page]
    return dataclasses.replace(docs, pages={**docs.pages, page: docs.pages[page].replace(old, new, 1)})


def test_the_docs_are_what_the_manifest_says(docs: check.Docs) -> None:
    assert problems(docs) == []


def test_check_prints_how_much_is_not_rebuilt(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--check"]) == 0
    assert re.search(r"\d+ of \d+ figures, \d+ of \d+ tables, \d+ of \d+ numbers", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("page", "number", "told"),
    [
        ("README.md", r"(<!-- g:flow.demo.difference -->\.\d*)(\d)", "flow.demo.difference"),
        ("docs/flow_vs_regression.md", r"(\| flow \| 8 \| 0\.\d*)(\d)", "flow.demo is"),
    ],
)
def test_a_wrong_digit_fails(docs: check.Docs, page: str, number: str, told: str) -> None:
    found = re.search(number, docs.pages[page])
    assert found
    wrong = f"{found[1]}{(int(found[2]) + 1) % 10}"
    said = problems(changed(docs, page, found[0], wrong))
    assert len(said) == 1
    assert told in said[0]


def test_every_digit_between_marks_is_held(docs: check.Docs) -> None:
    for pattern in (placeholders.SPAN, placeholders.BLOCK):
        assert any(pattern.search(text) for text in docs.pages.values())
    for page, text in docs.pages.items():
        for pattern in (placeholders.SPAN, placeholders.BLOCK):
            for m in pattern.finditer(text):
                digits = [k for k in range(m.start(2), m.end(2)) if text[k].isdigit()]
                if not digits:
                    assert "not built" in m[2]
                    continue
                k = digits[len(digits) // 2]
                wrong = text[:k] + str((int(text[k]) + 1) % 10) + text[k + 1 :]
                one = dataclasses.replace(docs, pages={page: wrong})
                assert check.wrong_texts(one), m[0]


def test_a_picture_that_is_missing_new_or_another_fails(docs: check.Docs) -> None:
    pictures = dict(docs.pictures)
    del pictures["mirror_frontier"]
    assert any("mirror_frontier.png is not there" in p for p in problems(dataclasses.replace(docs, pictures=pictures)))
    shown = changed(docs, "README.md", "](docs/images/sheet.png)", "](docs/images/nothing.png)")
    assert "README.md: docs/images/nothing.png is not there" in problems(shown)
    for name, digest, why in (("stray", "0", "is not among the figures"), ("demo_l2", "0", "is not the picture")):
        found = problems(dataclasses.replace(docs, pictures={**docs.pictures, name: digest}))
        assert len(found) == 1
        assert f"{name}.png {why}" in found[0]


@pytest.mark.parametrize("kind", ["figures", "tables", "numbers"])
def test_a_stale_entry_fails(docs: check.Docs, kind: str) -> None:
    docs.manifest[kind]["stale"] = {"runs": ["demo"], "rebuilt": True, "text": "", "value": "", "sha256": ""}
    found = problems(docs)
    assert f"docs/gallery.json: {kind}: stale is used by no page" in found
    assert f"docs/gallery.json: {kind}: stale is made by no recipe" in found


def test_a_mark_without_an_entry_and_a_recipe_without_a_mark_fail(docs: check.Docs) -> None:
    del docs.manifest["numbers"]["flow.linear"]
    assert len(problems(docs)) == 2  # the page's mark, and the recipe


def test_another_command_than_the_recipe_s_fails(docs: check.Docs) -> None:
    docs.manifest["runs"]["demo"]["commands"] = ["sweep -c elsewhere.yaml"]
    assert problems(docs) == ["docs/gallery.json: the run demo has other commands than its recipe"]


@pytest.mark.parametrize(
    "sentence",
    ["It is .5 better.", "A return of 45 ± 26.", "Off by 3e-4.", "| a | 1.5 |", "*0.25* of them", "it is ±.3", "1.8x"],
)
def test_an_unmarked_number_fails(docs: check.Docs, sentence: str) -> None:
    found = problems(dataclasses.replace(docs, pages={**docs.pages, "README.md": docs.pages["README.md"] + sentence}))
    assert len(found) == 1
    assert "neither marked nor in gallery/allowed.yaml" in found[0]


@pytest.mark.parametrize(
    "words", ["`--model.lr 0.5`", "arXiv 2403.20233", "torch 2.6.1", "[x](a/0.5)", "eight of 40 seeds"]
)
def test_what_is_no_measured_number_passes(docs: check.Docs, words: str) -> None:
    assert placeholders.unmarked(f"Text {words} text\n\n    y = .5 x\n\n```\n0.5\n```\n") == []


def test_the_allow_list_needs_reasons_and_no_more_than_is_there(docs: check.Docs) -> None:
    docs.allowed["README.md"].append({"text": "never written 0.5", "why": "test"})
    docs.allowed["README.md"].append({"text": "Python >= 3.11", "why": " "})
    docs.allowed["docs/none.md"] = []
    assert len(problems(docs)) == 3


@pytest.mark.parametrize(
    "text",
    [
        "<!-- g:a -->.5",
        ".5<!-- /g -->",
        "<!-- gallery: a -->\n| 1 |\n",
        "x\n<!-- g:a -->.5<!-- /g --> y",
        "- <!-- g:a -->.5<!-- /g -->",
    ],
)
def test_broken_marks_are_seen(text: str) -> None:
    assert placeholders.broken(text)


def rendered(text: str) -> str:
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    return re.sub(r"\s+", " ", re.sub(r"<!--.*?-->", "", html, flags=re.S)).strip()


def test_marks_change_nothing_of_what_is_shown(docs: check.Docs) -> None:
    assert docs.pages
    for page, text in docs.pages.items():
        bare = re.sub(r"^<!-- (?:end )?gallery: \S+ -->\n", "", text, flags=re.M)
        bare = re.sub(r"<!-- (?:g:\S+|/g) -->", "", bare)
        assert rendered(text) == rendered(bare), page
    assert rendered("a\n<!-- g:k -->*b*<!-- /g -->") != rendered("a\n*b*")  # why no mark begins a line


def test_fill_puts_the_manifest_between_the_marks() -> None:
    text = "x <!-- g:k -->1<!-- /g -->\n\n<!-- gallery: t -->\n| a |\n<!-- end gallery: t -->\n"
    filled = placeholders.fill(text, {"t": "| b |"}, {"k": "2"})
    assert filled == "x <!-- g:k -->2<!-- /g -->\n\n<!-- gallery: t -->\n| b |\n<!-- end gallery: t -->\n"
    assert placeholders.fill(filled, {}, {}) == filled


# recipes


def test_names_are_unique() -> None:
    for names in (
        [run.name for run in RUNS],
        [(run.folder, run.cells) for run in RUNS],
        *([e.name for r in RECIPES for e in getattr(r, kind)] for kind in ("figures", "tables", "numbers")),
    ):
        assert len(names) == len(set(names))
    known = {run.name for run in RUNS}
    assert all(set(e.runs) <= known for r in RECIPES for k in ("figures", "tables", "numbers") for e in getattr(r, k))


def config_of(command: str) -> str:
    """Return the configuration that a command names first: ``-c FILE``, or the first of ``--grid.config``."""
    words = shlex.split(command)
    if words[1] == "-c":
        return words[2]
    assert words[1] == "--grid.config"
    return str(yaml.safe_load(words[2])[0])


def flags(command: str) -> list[str]:
    """Return the words after the configuration; of a grid its first values, and nothing that is the sweep's own."""
    words = shlex.split(command)[3:]
    while any(word.startswith("--sweep.") for word in words):
        at = next(i for i, word in enumerate(words) if word.startswith("--sweep."))
        del words[at : at + 2]
    for i, word in enumerate(words):
        if word.startswith("--grid."):
            words[i] = f"--{word.removeprefix('--grid.')}"
            first = yaml.safe_load(words[i + 1])[0]
            words[i + 1] = first if isinstance(first, str) else str(first)
    return words


COMMANDS = [(run, c) for run in RUNS for c in run.commands if not c.startswith("-m ")]  # those of cli.py
CONFIGS = sorted({config_of(c) for _, c in COMMANDS})


@pytest.mark.parametrize("config", CONFIGS)
def test_every_flag_of_the_recipes_is_known(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    # all flags that go with a configuration in one parse: the last of a kind counts, and each has to be there
    mine = [(run, c) for run, c in COMMANDS if config_of(c) == config]
    words = [w for run, c in mine for w in (*flags(c), *shlex.split(run.quick or ""))]
    verb = "test" if all(c.startswith("test") for _, c in mine) else "fit"
    code = main([verb, "-c", config, *words, "--print_config"])
    assert code == 0, capsys.readouterr().err


def test_a_renamed_flag_is_noticed() -> None:
    assert main(["fit", "-c", CONFIGS[0], "--model.renamed", "1", "--print_config"]) == 2


def test_what_no_recipe_makes_is_dropped(docs: check.Docs) -> None:
    found = docs.manifest
    kept = copy.deepcopy(found)
    found["numbers"]["gone"] = {"runs": ["forgotten"], "rebuilt": True, "value": "1"}
    found["runs"]["forgotten"] = {"commands": []}
    manifest.drop_unused(found, RECIPES)
    assert found == kept


# runs


def fake(tmp_path: Path) -> Run:
    return Run("demo", ("fit -c x.yaml",), "flow_vs_regression/gallery/x", "0", 1)


def trained(root: Path, calls: list[list[str]], code: int) -> Callable[[list[str], Path], int]:
    """Stand in for a command line that trains: it leaves a checkpoint and ends with a code."""

    def start(words: list[str], log: Path) -> int:
        calls.append(words)
        log.touch()
        folder = root / "flow_vs_regression/gallery/x/checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "last.ckpt").touch()
        return code

    return start


def test_a_finished_run_is_run_again_only_if_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(running, "git_state", lambda: {"commit": "0", "dirty": False})
    monkeypatch.setattr(running, "start", trained(tmp_path, calls, 0))
    run = fake(tmp_path)
    running.perform(run, tmp_path, full=True)
    assert running.finished(run, tmp_path, full=True)
    assert not running.finished(dataclasses.replace(run, commands=("fit -c y.yaml",)), tmp_path, full=True)
    monkeypatch.setattr(running, "code_version", lambda _: "another")
    assert not running.finished(run, tmp_path, full=True)
    running.perform(run, tmp_path, full=True)
    assert "--ckpt_path" not in calls[1]  # of another code: begun anew


def test_a_run_whose_code_changed_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = iter("a")  # of its stamp; then of what is looked for
    monkeypatch.setattr(running, "code_version", lambda _: next(versions, "b"))
    monkeypatch.setattr(running, "git_state", lambda: {"commit": "0", "dirty": False})
    monkeypatch.setattr(running, "start", trained(tmp_path, [], 0))
    assert build.perform_all([fake(tmp_path)], tmp_path, True, 1) == [
        "demo: its code changed while it ran; build again"
    ]
    assert "error: demo: its code changed" in capsys.readouterr().out


def test_a_cut_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(running, "start", trained(tmp_path, calls, 130))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ended with 130"):
            running.perform(fake(tmp_path), tmp_path, full=True)
    assert "--ckpt_path" not in calls[0]
    assert calls[1][-2:] == ["--ckpt_path", "last"]


def test_a_cut_fit_with_a_name_of_its_own_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two named fits is cut off twice: before its first checkpoint, and after it."""
    run = Run("x", tuple(f"fit -c x.yaml --run.name {n}" for n in "ab"), "bilevel/x", "0", 1)
    calls: list[list[str]] = []

    def start(words: list[str], log: Path) -> int:
        calls.append(words)
        log.touch()
        place = tmp_path / "bilevel/x" / words[words.index("--run.name") + 1]
        assert "--ckpt_path" in words or not place.is_dir()  # else the command line refuses the folder
        (place / "checkpoints").mkdir(parents=True, exist_ok=True)
        if len(calls) != 2:
            (place / "checkpoints/last.ckpt").touch()
        return 0 if len(calls) in (1, 4) else 130

    monkeypatch.setattr(running, "git_state", lambda: {"commit": "0", "dirty": False})
    monkeypatch.setattr(running, "start", start)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ended with 130"):
            running.perform(run, tmp_path, full=True)
    running.perform(run, tmp_path, full=True)
    assert running.finished(run, tmp_path, full=True)
    assert ["--ckpt_path" in words for words in calls] == [False, False, False, True]


def test_a_run_that_may_diverge_goes_on_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "git_state", lambda: {"commit": "0", "dirty": False})
    said = iter(
        (
            "error: 1 of 5 cells went non-finite: lr=1 (--sweep.retry true runs them again); kept",
            "error: the losses are not finite at step 7 in the replicas of seeds 3; kept",
            "error: x.yaml: no such file",
        )
    )

    def start(words: list[str], log: Path) -> int:
        log.write_text(f"$ python\n{next(said)}\n")
        (tmp_path / "bilevel/x").mkdir(parents=True, exist_ok=True)
        return 1

    monkeypatch.setattr(running, "start", start)
    run = Run("x", ("sweep -c x.yaml", "sweep -c y.yaml"), "bilevel/x", "0", 1, may_diverge=True)
    running.perform(run, tmp_path, full=True)
    assert running.finished(run, tmp_path, full=True)
    with pytest.raises(RuntimeError, match="no such file"):
        running.perform(dataclasses.replace(run, name="y"), tmp_path, full=True)


def test_what_a_sweep_left_is_not_taken_away_by_a_test_of_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("x", ("sweep -c x.yaml", "test -c x.yaml --run.name a=1"), "flow_vs_regression/x-sweep", "0", 1)
    folder = tmp_path / run.folder

    def start(words: list[str], log: Path) -> int:
        assert (words[0] == "sweep") != (folder / "a=1").is_dir()
        (folder / "a=1").mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(running, "git_state", lambda: {"commit": "0", "dirty": False})
    monkeypatch.setattr(running, "start", start)
    running.perform(run, tmp_path, full=True)
    assert running.finished(run, tmp_path, full=True)


def test_unknown_names_are_refused_in_a_line() -> None:
    with pytest.raises(SystemExit, match="'flwo' is not allowed"):
        build.main(["--only", "flwo"])


def test_p_values_are_adjusted_by_holm() -> None:
    """The least by how many there are, the next by one less, never below the one before."""
    differences = [PairedDifference(Estimate(0.0, -1.0, 1.0, 8), p) for p in (0.03, 0.01, 0.02)]
    assert adjusted(differences) == pytest.approx([0.04, 0.03, 0.04])
