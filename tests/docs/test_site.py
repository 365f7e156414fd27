"""The documentation site: links lead somewhere, code runs, navigation and API are complete, and it builds."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from sphinx.ext.apidoc import main as apidoc

from lightning_toys.cli import main
from lightning_toys.stats import mean_ci, paired_difference, paired_ratio
from tests.browser import Browser
from tests.conftest import REPO

DOCS = REPO / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")])
NAMES = [str(p.relative_to(DOCS)) for p in PAGES]
OWN = ("__main__", "commands.template")  # modules without a page: no part of what is imported


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


# links and anchors


def tokens(text: str) -> Iterator[Token]:
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or []


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures that lead to no other host."""
    found = [str(t.attrs.get("href", t.attrs.get("src", ""))) for t in tokens(text)]
    return [target for target in found if target and not re.match(r"\w+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub, and MyST likewise, give to headings."""
    every = list(tokens(text))
    heads = [after for before, after in itertools.pairwise(every) if before.type == "heading_open"]
    titles = ["".join(c.content for c in head.children or []) for head in heads]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def included(path: Path) -> str:
    """A page's text, and that of the file outside of docs which it includes."""
    text = path.read_text()
    other = re.search(r"^```\{include\} (\S+)", text, re.MULTILINE)
    return text + (path.parent / other[1]).read_text() if other else text


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module, or is in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for word in parts[end:]:
            if not hasattr(found, word):
                return False
            found = getattr(found, word)
        # where it is passed on only, the API has no anchor of it
        return end == len(parts) or getattr(found, "__module__", None) == ".".join(parts[:end])
    return False


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    out = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        if not path and anchor.startswith("lightning_toys"):
            fine = is_defined(anchor)
        else:
            file = (page.parent / path) if path else page
            fine = file.exists() and (not anchor or anchor in anchors(included(file)))
        out += [] if fine else [target]
    return out


def test_broken_links_would_be_seen() -> None:
    page = DOCS / "statistics.md"
    for wrong in (
        "nowhere.md",
        "index.md#no-such",
        "#lightning_toys.stats.none",
        "#lightning_toys.nets.require",
        "e.png",
    ):
        assert broken(page, f"[a]({wrong})") == broken(page, f"![a]({wrong})") == [wrong]
    fine = ("index.md#the-experiments", "#lightning_toys.stats.holm", "#lightning_toys.stats", "images/sheet.png")
    assert broken(page, " ".join(f"[a]({target})" for target in fine)) == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = DOCS / name
    assert broken(page, page.read_text()) == []


def test_there_are_links_to_look_at() -> None:
    assert sum(len(links(p.read_text())) for p in PAGES) > 100


# navigation


def test_navigation_lists_every_page() -> None:
    listed = [f"{page}.md" for block in blocks("index.md", r"\{toctree\}") for page in re.findall(r"<(\S+)>", block)]
    assert len(listed) == len(set(listed))
    assert {*listed, "index.md"} == set(NAMES)
    assert set(listed) <= set(links((DOCS / "index.md").read_text()))  # and so does the text


# code


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # a second Trainer's folder, as the page says
def test_python_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks, one after the other, are one script."""
    monkeypatch.chdir(tmp_path)
    quiet = ('accelerator="cpu"', 'accelerator="cpu", enable_progress_bar=False, enable_model_summary=False')
    parts = [block.replace(*quiet) for block in blocks("python.md", "python")]
    assert len(parts) == 5
    told, names = io.StringIO(), {}
    with contextlib.redirect_stdout(told):
        for i, part in enumerate(parts):
            exec(compile(part, f"python.md, block {i + 1}", "exec"), names)
    mean, linear, tested, shape = told.getvalue().splitlines()[:4]
    assert re.fullmatch(r"0\.\d+ ± 0\.\d+", mean)
    assert 0 < float(linear) < 0.1
    assert len(re.findall(r"0\.\d+", tested)) == 5  # a mean, and one value a seed
    assert shape == "torch.Size([4, 5, 1])"
    assert names["loaded"].global_step == 300
    folders = sorted((tmp_path / "lightning_logs").iterdir())
    assert [(f / "results.json").exists() for f in folders] == [False, False, True]
    assert main(["compare", "lightning_logs"]) == 0


def test_statistics_page(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = blocks("statistics.md", "python")
    names: dict[str, dict[int, float]] = {}
    exec(compile(script, "statistics.md", "exec"), names)
    flow, regression = names["flow"], names["regression"]
    mean, difference, ratio, adjusted = capsys.readouterr().out.splitlines()
    assert mean.startswith(f"{mean_ci(list(flow.values())).mean:.4f}"[:5])
    found = paired_difference(flow, regression)
    assert found is not None
    assert difference.endswith(str(found.p_value))
    factor = paired_ratio(flow, regression)
    assert factor is not None
    assert ratio.startswith(f"{factor.estimate.mean:.2f} times the error")
    assert adjusted.startswith("[")


def test_first_commands_and_their_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The start's commands from the first of ours on; with fewer passes, which change nothing of what is made."""
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("index.md", "sh")
    assert len(commands.splitlines()) == 10
    ours = [shlex.split(line)[1:] for line in commands.splitlines() if line.startswith("lightning-toys ")]
    assert [words[0] for words in ours] == ["list", "fit", "fit", "compare"]
    small = ["--figures.dpi", "20", "--trainer.max_epochs", "3"]
    for words in ours:
        assert main([*words, *(small if words[0] == "fit" else [])]) == 0, capsys.readouterr().err
    picture = re.search(r"`(lightning_logs/\S+\.png)`", (DOCS / "index.md").read_text())
    assert picture is not None
    assert (tmp_path / picture[1]).stat().st_size > 0
    assert (tmp_path / "lightning_logs/flow_vs_regression/demo/comparison/comparison.md").exists()


def test_the_refusal_that_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, said = blocks("reliability.md", "")[0].splitlines()
    assert main([*shlex.split(command)[2:], "--run.root", str(tmp_path / "logs")]) == 2
    assert capsys.readouterr().err.splitlines() == [said]
    assert not (tmp_path / "logs").exists()


def test_the_tests_that_are_named_are_there() -> None:
    text = (DOCS / "reliability.md").read_text()
    files = re.findall(r"`(tests/[\w/]+(?:\.py)?)`", text)
    assert len(files) > 10
    assert [f for f in files if not (REPO / f).exists()] == []
    every = "\n".join(p.read_text() for p in (REPO / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 5
    assert [n for n in named if f"def {n}(" not in every] == []
    beside = re.findall(r"`(test_\w+\.py)`", text)
    assert beside
    assert [n for n in beside if not list((REPO / "tests").rglob(n))] == []


# the build


def modules() -> set[str]:
    """Every public module of the package."""
    found = set()
    for path in (REPO / "lightning_toys").rglob("*.py"):
        parts = path.relative_to(REPO).with_suffix("").parts
        found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return {n for n in found if not any(f"{n}.".startswith(f"lightning_toys.{own}.") for own in OWN)}


def build(out: Path, *flags: str) -> Path:
    site = out / "site"
    words = ["-q", "-W", "--keep-going", *flags, "-b", "html", "-d", str(out / "doctrees"), str(DOCS), str(site)]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def pages_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site without the API, which takes some minutes."""
    return build(tmp_path_factory.mktemp("pages"), "-t", "pages")


class Loaded(HTMLParser):
    """What a page has a browser load, and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self.links.append(given.get("href") or "")
        elif source := given.get("src") or given.get("srcset") or (tag == "link" and given.get("href")):
            self.loaded.append(str(source))


def foreign(site: Path) -> list[str]:
    """What the site would load from other hosts."""
    found = [f"{p.name}: {what}" for p in site.rglob("*.html") for what in Loaded(p).loaded]
    found += [
        f"{p.name}: {u}"
        for p in site.rglob("*.css")
        for u in re.findall(r"(?:url\(|@import\s*)([^)\s;]+)", p.read_text())
    ]
    return [what for what in found if re.search(r": [\"']?(?:https?:)?//", what)]


def test_pages_build_and_load_nothing_from_elsewhere(pages_alone: Path, tmp_path: Path) -> None:
    built = {p.relative_to(pages_alone).with_suffix(".md").as_posix() for p in pages_alone.rglob("*.html")}
    assert set(NAMES) <= built
    assert any(Loaded(pages_alone / "index.html").loaded)
    assert foreign(pages_alone) == []
    (tmp_path / "a.html").write_text('<script src="https://elsewhere.example/x.js"></script>')
    (tmp_path / "a.css").write_text("@font-face { src: url(//elsewhere.example/font) }")
    assert len(foreign(tmp_path)) == 2


def test_what_lies_outside_of_docs_is_linked(pages_alone: Path) -> None:
    ours = Loaded(pages_alone / "your-own.html").links
    assert "https://github.com/lightning-toys/lightning_toys/tree/main/docs/examples/own" in ours
    assert "benchmarks.html" in Loaded(pages_alone / "scale.html").links
    notebook = next(link for link in Loaded(pages_alone / "python.html").links if link.endswith("bilevel.ipynb"))
    assert (pages_alone / notebook).read_bytes() == (DOCS / "notebooks" / "bilevel.ipynb").read_bytes()


def test_every_module_has_a_page_in_the_api(tmp_path: Path) -> None:
    """The pages that the whole build writes first, by the settings of conf.py."""
    conf = runpy.run_path(str(DOCS / "conf.py"), {"tags": SimpleNamespace(has=lambda tag: False)})
    (given,) = conf["apidoc_modules"]
    words = ["-q", "--separate", "-o", str(tmp_path), given["path"], *given["exclude_patterns"]]
    assert apidoc(words) == 0
    written = {p.stem for p in tmp_path.glob("lightning_toys*.rst")}
    assert len(written) > 100
    assert written == modules()


WIDTH = 390  # of a telephone
TOO_WIDE = """
const seen = [];
for (const e of document.querySelectorAll('article *')) {
  if (e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('table, pre, .table-wrapper, .highlight')) {
    seen.push(e.tagName + ': ' + e.textContent.slice(0, 60));
  }
}
return document.documentElement.scrollWidth > innerWidth || seen.length ? seen.concat('page') : [];
"""


def test_nothing_is_wider_than_a_telephone(pages_alone: Path, browser: Browser) -> None:
    """Tables and code scroll within their own box."""
    browser.look_as(WIDTH)
    for name in NAMES:
        browser.open((pages_alone / name).with_suffix(".html").as_uri())
        assert browser.run("return innerWidth") == WIDTH
        assert browser.run(TOO_WIDE) == [], name
    browser.run("document.querySelector('article').innerHTML += '<p style=\"width: 500px\">x</p>'")
    assert browser.run(TOO_WIDE) != []


@pytest.mark.slow
def test_the_whole_site(tmp_path: Path) -> None:
    site = build(tmp_path)
    assert foreign(site) == []
    for name in modules():
        assert f'id="module-{name}"' in (site / "api" / "modules" / f"{name}.html").read_text(), name
    holm = "api/modules/lightning_toys.stats.html#lightning_toys.stats.holm"
    assert 'id="lightning_toys.stats.holm"' in (site / holm.partition("#")[0]).read_text()
    assert holm in Loaded(site / "statistics.html").links
    # a class by the name under which a module imports it, and a formula with stars and bars as it stands
    errors = Loaded(site / "api/modules/lightning_toys.flows.html").links
    assert "lightning_toys.errors.html#lightning_toys.errors.ToyError" in errors
    assert "|(I - P) f| / |f|" in (site / "api/modules/lightning_toys.flow_vs_regression.metrics.html").read_text()
