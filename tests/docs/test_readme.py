"""README: short, its code and commands work, its links lead somewhere; docs/papers.md quotes what is on the pages."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_toys.cli import main
from tests.conftest import REPO
from tests.docs.test_site import broken

README = (REPO / "README.md").read_text()
DOCS = REPO / "docs"


def blocks(text: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = REPO / name
    assert broken(page, page.read_text()) == []


def test_it_is_short_and_has_what_a_reader_looks_for() -> None:
    assert len(README.splitlines()) <= 120
    assert len(re.findall(r"!\[", README)) == 1
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    assert len(rows) == 5


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = blocks(README, "python")
    assert len(script.splitlines()) <= 9
    assert "max_steps=2000" in script
    monkeypatch.chdir(tmp_path)
    told = io.StringIO()
    quiet = "max_steps=3, enable_progress_bar=False, enable_model_summary=False"
    with contextlib.redirect_stdout(told):
        exec(compile(script.replace("max_steps=2000", quiet), "README.md", "exec"), {})
    values, line = told.getvalue().splitlines()[-2:]
    assert len(re.findall(r"0\.\d+", values)) == 4
    assert 0.003 < float(line) < 0.004


def test_an_experiment_of_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its three commands; the third, which runs tests of its own, is tested with `new`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (block,) = [b for b in blocks(README) if "lightning-toys new" in b]
    block = block.replace("spring", "spring_of_readme")  # a module of the first name is another test's
    new, fit, test = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert main(new[1:]) == 0, capsys.readouterr().err
    assert main([*fit[1:], "--trainer.max_epochs", "1", "--figures.enabled", "false"]) == 0, capsys.readouterr().err
    assert test[0] == "pytest"
    assert (tmp_path / test[1]).exists()


def test_it_cites_as_the_citation_file_does() -> None:
    (entry,) = blocks(README, "bibtex")
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    given = {k: v.replace("\\", "") for k, v in re.findall(r"(\w+) += \{+([^}]*)\}", entry)}
    assert given["version"] == cited["version"]
    assert given["url"] == cited["repository-code"]
    assert given["author"] == cited["authors"][0]["name"]
    assert re.sub(r"[{}\\]", "", entry).count(cited["title"]) == 1


# papers


def plain(text: str) -> str:
    """A page's words, without marks."""
    return " ".join(re.sub(r"<!--.*?-->|[*`\\]", "", text, flags=re.DOTALL).split())


def verdicts(text: str) -> list[tuple[str, str]]:
    """The verdict of each row, and the page that it is of."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [(cells[1], page[1]) for cells in rows if (page := re.search(r"\]\((\w+\.md)", cells[2]))]


def misquoted(text: str) -> list[str]:
    """What is quoted as a page's words, and is not in it; and what is called open, on a page that has nothing open."""
    out = []
    for verdict, name in verdicts(text):
        page = plain((DOCS / name).read_text())
        out += [f"{name}: {words}" for words in re.findall(r'"([^"]+)"', verdict) if plain(words) not in page]
        if "not decided yet" in verdict and not re.search("not built yet|not in this page yet", page):
            out.append(f"{name}: nothing is open")
    return out


def test_verdicts_are_the_pages_words() -> None:
    text = (DOCS / "papers.md").read_text()
    assert len(verdicts(text)) > 20
    assert misquoted(text) == []
    assert misquoted('| a | "was never said" | [b](bilevel.md) |') == ["bilevel.md: was never said"]
    assert misquoted("| a | not decided yet | [b](glossary.md) |") == ["glossary.md: nothing is open"]


def test_the_command_line_page_names_every_refused_flag_of_the_trainer() -> None:
    """The flags that rules.py refuses, each in the page's table; and the precisions that experiments are bound to."""
    from lightning_toys.bilevel import BilevelControl, WindowRegression
    from lightning_toys.commands.trainer.rules import RULES
    from lightning_toys.update_entropy import UpdateEntropy

    page = (DOCS / "command-line.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `")]
    missing = [flag for flag, *_ in RULES if not any(f"`{flag}" in line for line in table)]
    assert RULES
    assert missing == []
    (row,) = [line for line in page.splitlines() if line.startswith("- `--trainer.precision`")]
    listed = re.findall(r"`([\w-]+)`", row)
    assert UpdateEntropy.precisions == tuple(listed[:3])
    assert BilevelControl.precisions == WindowRegression.precisions == tuple(listed[:2])
