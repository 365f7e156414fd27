"""compare --html: the printed numbers on one small page that runs and loads nothing, whatever is in a run."""

from __future__ import annotations

import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from lightning_toys.cli import main
from lightning_toys.commands.compare import page_pictures
from lightning_toys.commands.compare.page import link_to, order
from lightning_toys.commands.compare.page_facts import MOST_COLUMNS
from lightning_toys.commands.compare.page_pictures import FULL_DPI, LEAST_DPI, embed, embed_all
from lightning_toys.commands.compare.plots import png
from lightning_toys.commands.compare.report import compare_folder
from lightning_toys.plotting import new_figure
from tests.browser import Browser
from tests.commands.compare.runs_of_others import METRIC, WHOLE, a_run
from tests.commands.compare.test_names import NAMES, UNSEEN
from tests.commands.compare.test_output import fail_writes
from tests.malformed import Refusal
from tests.test_house import imported

VOID = {"meta", "link", "img", "br"}
ENVIRONMENT = {"python": "3.11.7", "versions": {"torch": "2.13.0"}, "device": "cpu", "command": "cli.py test"}
GIT = {"commit": "abc123", "dirty": True}


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and the words of each table, row by row."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.grids: list[list[list[str]]] = []
        self.orders: list[list[list[str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(content.decode())
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.grids.append([])
            self.orders.append([])
        elif tag == "tr":
            self.grids[-1].append([])
            self.orders[-1].append([])
        elif tag in ("td", "th"):
            self.grids[-1][-1].append("")
            self.orders[-1][-1].append("missing" if "data-missing" in found else found.get("data-order"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.grids[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag]


def paged(folder: Path, *flags: str) -> Page:
    """Compare the runs in a folder, and read the page."""
    assert main(["compare", str(folder), "--html", str(folder / "page.html"), *flags]) == 0
    return Page((folder / "page.html").read_bytes())


def three_runs(folder: Path) -> None:
    """Runs whose numbers, words and gaps sort differently as text."""
    for name, scale in (("v10", 100.0), ("v9", 9.0), ("x", 0.5)):
        values: list[float | None] = [scale, scale * 1.01]
        metrics = {"l2": METRIC | {"values": values}}
        if name != "v9":
            metrics["own"] = METRIC | {"values": [v and -v for v in values]}
        content = WHOLE | {"label": name, "metrics": metrics, "error_metrics": ["l2"], "environment": ENVIRONMENT}
        a_run(folder / name, content | {"git": GIT, "settings": {"model.mode": name}})


def test_the_numbers_are_those_that_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three_runs(tmp_path)
    page = paged(tmp_path, "--baseline", "x")
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("│")]
    printed = [[cell.strip() for cell in x.split("│")[1:-1]] for x in lines]
    assert len(printed) == 10
    found = [row for grid in page.grids for row in grid[1:]]
    assert found[: len(printed)] == printed
    assert any("baseline: x." in text for text in page.texts)


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    """Each cell says what it is sorted by: a mean, an interval's lower end, nothing for words, and what is missing."""
    three_runs(tmp_path)
    page = paged(tmp_path)
    assert page.grids[0][0] == ["run", "seeds", "l2", "own"]
    by_run = {row[0]: keys for row, keys in zip(page.grids[0], page.orders[0], strict=True)}
    means = {name: float(keys[2] or "nan") for name, keys in by_run.items() if name in ("v9", "v10", "x")}
    assert means == pytest.approx({"v9": 9.045, "v10": 100.5, "x": 0.5025}, rel=1e-2)
    assert by_run["v9"][3] == "missing"
    assert by_run["reference: zero"] == [None, "missing", "0.9", "missing"]
    heads = [found for found in page.all("th") if "aria-sort" in found]
    assert heads
    assert {found["aria-sort"] for found in heads} == {"none"}
    assert len(page.all("button")) == len(heads)  # a button is reached and pressed by the keyboard


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8", "8"), ("0.123 ± 0.020", "0.123"), ("-3e-05 ± inf", "-3e-05"), ("[-1.5, 2]", "-1.5"), ("inf", "Infinity"),
        ("[-inf, inf]", "-Infinity"), ("1e+20", "1e+20"), ("-", None), ("", None), ("nan", None), ("8 seeds", None),
        ("v10", None), ("[a, 2]", None), ("1 ± x", None), ("1_000", None), ("1.2.3", None),
    ],
)  # fmt: skip
def test_what_a_word_is_sorted_by(text: str, number: str | None) -> None:
    assert order(text) == number


HOSTILE = [
    *NAMES[:-1], *UNSEEN, '"><img src=x onerror=attacked=1>', "'><script>attacked=1</script>", "</style><b>",
    "</script>", "</title><script>attacked=1</script>", "{{ 7 * 7 }}", "{% raw %}", "<!--", "&lt;b&gt;",
    "javascript:attacked=1", '" onmouseover="attacked=1', "https://example.com/x.png", "//example.com",
    "url(https://example.com)",
]  # fmt: skip


def hostile_runs(folder: Path) -> None:
    """Runs with a name in every place that a page shows."""
    for i, name in enumerate(HOSTILE):
        place = folder / f"{i:02d}{name.replace('/', '_')[:60]}"
        content: dict[str, Any] = WHOLE | {
            "label": name, "experiment": "<script>attacked=1</script>", "variant": name,
            "references": {name: {"l2": 0.9}}, "git": {"commit": name, "dirty": name}, "stage": name,
            "environment": {"command": name, "versions": {name: name}, name: name},
            "settings": {f"model.{name}": name, "data.target": name},
        }  # fmt: skip
        a_run(place, content)
        (place / "config.yaml").write_text(yaml.safe_dump({"trainer": {name: [name]}}), encoding="utf-8")


# what a reader of HTML finds in a page of ours, and nothing else
ELEMENTS = {
    *("html", "head", "meta", "title", "link", "style", "body", "header", "h1", "h2", "h3", "p", "nav", "a", "main"),
    *("section", "div", "table", "thead", "tbody", "tr", "th", "td", "span", "button", "figure", "img", "figcaption"),
    *("details", "summary", "script"),
}
ATTRIBUTES = {
    *(
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "rel",
        "href",
        "id",
        "class",
        "role",
        "aria-label",
        "tabindex",
    ),
    *("scope", "aria-sort", "type", "data-order", "data-missing", "src", "width", "height", "alt", "open"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of hostile runs."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile_runs(folder / "runs")
    true_pictures = "lightning_toys.commands.compare.report.pictures_of"
    with pytest.MonkeyPatch.context() as patch:  # a picture for each target takes a while, and test_names looks at them
        patch.setattr(true_pictures, lambda runs: {runs[0].group: new_figure(size=(1, 1))[0]})
        assert main(["compare", str(folder / "runs"), "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_nothing_in_a_run_becomes_markup(hostile: Path) -> None:
    page = Page(hostile.read_bytes())
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert {key for _, found in page.elements for key in found} <= ATTRIBUTES
    assert len(page.all("script")) == len(page.all("style")) == 1
    words = {cell for grid in page.grids for row in grid for cell in row}
    for name in HOSTILE:
        shown = UNSEEN.get(name, name)
        assert shown in words, name
        assert f"model.{shown}" in words, name
    assert "Comparison: <script>attacked=1</script>" in page.texts


def test_nothing_is_loaded_from_outside(hostile: Path) -> None:
    """Every link is a relative one or within the page; every picture is in it; the policy forbids the rest."""
    page = Page(hostile.read_bytes())
    links = [found["href"] or "" for found in page.all("a")]
    assert len(links) > 2 * len(HOSTILE)
    assert all(re.match(r"#[\w-]+$|\.\.?/[^:?#]*$", link) for link in links)
    assert all((found["src"] or "").startswith("data:image/png;base64,") for found in page.all("img"))
    assert [found["href"] for found in page.all("link")] == ["data:,"]
    text = hostile.read_text(encoding="utf-8")
    for part in re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, re.DOTALL):
        assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch|XMLHttp|WebSocket|sendBeacon", part)
    (policy,) = [f["content"] or "" for f in page.all("meta") if f.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_links_lead_to_the_folders(hostile: Path) -> None:
    page = Page(hostile.read_bytes())
    found = {unquote(f["href"] or "") for f in page.all("a") if (f["href"] or "").startswith(".")}
    places = {os.path.realpath(hostile.parent / link) for link in found}
    assert {os.path.realpath(p.parent) for p in hostile.parent.glob("runs/*/results.json")} <= places
    anchors = {f["id"] for _, f in page.elements if f.get("id")}
    assert {(f["href"] or "")[1:] for f in page.all("a") if (f["href"] or "").startswith("#")} <= anchors


@pytest.mark.parametrize(
    ("path", "link"),
    [
        ("/a/b/run", "./run"), ("/a/run", "../run"), ("/c", "../../c"), ("/a/b/x y#?%", "./x%20y%23%3F%25"),
        ("/a/b/..run", "..run"), ("/a/b/data:x", "./data%3Ax"), (os.fsdecode(b"/a/b/\xff"), "./%FF"), ("/a/b", "."),
    ],
)  # fmt: skip
def test_a_link(path: str, link: str) -> None:
    assert link_to(Path(path), Path("/a/b/page.html")) == link


def test_settings_and_environments(tmp_path: Path) -> None:
    """Differences are from the baseline of a run's own target; what all share is told once."""
    one = {"model.lr": 0.1, "model.size": 8, "model.idle": 3}
    for name, own, versions, config in (
        ("a", {}, "2.13.0", {"trainer": {"max_steps": 5, "precision": None}, "run": {"name": "a"}}),
        ("b", {"model.lr": 0.2, "model.more": True}, "2.13.0", {"trainer": {"max_steps": 7, "precision": None}}),
        ("c", {"model.lr": 0.3}, "2.14.0", {"trainer": {"max_steps": 5, "precision": None}, "run": {"name": "c"}}),
    ):
        content = WHOLE | {"label": name, "settings": one | own, "git": GIT if name == "a" else None, "step": 12}
        content["environment"] = ENVIRONMENT | {"versions": {"torch": versions}}
        run = a_run(tmp_path / name, content | ({"unused": ["model.idle"]} if name == "b" else {}))
        (run / "config.yaml").write_text(yaml.safe_dump({"model": {"lr": 99}, **config}))
    (tmp_path / "c" / "config-1.yaml").touch()
    page = paged(tmp_path, "--baseline", "lr=0.1")
    settings = next(g for g in page.grids if "model.more" in g[0])
    assert [row[1:] for row in settings[1:]] == [
        ["0.1", "3", "5", "-"], ["0.2", "does nothing here", "7", "True"], ["0.3", "3", "5", "-"]
    ]  # fmt: skip
    place = next(g for g in page.grids if g[0] == ["run", "commit", "torch"])
    assert [row[1:] for row in place[1:]] == [["abc123, with changes", "2.13.0"], ["-", "2.13.0"], ["-", "2.14.0"]]
    b, c = (g[1:] for g in page.grids if g[0] == ["setting", "this run", "the other"])
    wanted = [["model.lr", "0.2", "0.1"], ["model.idle", "does nothing here", "3"], ["model.more", "True", "-"]]
    assert b == [*wanted, ["trainer.max_steps", "7", "5"]]
    assert c == [["model.lr", "0.3", "0.1"]]
    rows = [row for g in page.grids for row in g]
    assert ["model.size", "8"] in rows
    assert rows.count(["python", "3.11.7"]) == 1
    assert rows.count(["step", "12"]) == 3
    assert sum(row[0] == "later settings" for row in rows) == 1
    assert not any("run.name" in row or "99" in row for row in rows)


@pytest.mark.parametrize("held", ["a word", ["a", "list"], {}, {"versions": "none", "x": {"y": {"z": [1]}}}, None, 3])
def test_environments_of_any_shape(held: Any, tmp_path: Path) -> None:
    a_run(tmp_path / "a", WHOLE | {"environment": held, "git": held, "step": held, "stage": "s" * 5000})
    page = paged(tmp_path)
    assert max(map(len, page.texts)) < 1000


def test_many_settings_are_cut(tmp_path: Path) -> None:
    for name in "ab":
        found = {f"model.s{i}": f"{name}{i}" for i in range(500)}
        a_run(tmp_path / name, WHOLE | {"label": name, "settings": found})
    page = paged(tmp_path)
    assert max(len(g[0]) for g in page.grids) == MOST_COLUMNS + 1
    assert any(f"the first {MOST_COLUMNS} of 500" in text for text in page.texts)
    assert sum(row == ["...", "", ""] for g in page.grids for row in g) == 1


def noisy(runs: dict[str, Path]) -> dict[str, Any]:
    """What compresses worst: noise in colours."""
    noise = np.random.default_rng(0).random((900, 900, 3))
    out = {}
    for i in range(3):
        figure, axes = new_figure(size=(9, 9))
        axes[0, 0].imshow(noise)
        out[f"noise{i}"] = figure
    return out


def test_fifty_runs_take_less_than_three_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 seeds, 40 readouts, 80 settings and pictures that do not compress: they are smaller, and said to be."""
    module = type(sys)("noisy_of_mine")
    module.compare_figures = noisy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "noisy_of_mine", module)
    rng = np.random.default_rng(1)
    for i in range(50):
        names = ["l2", *(f"l2@zeros/solver-{k}" for k in range(20)), *(f"l2@gaussian/solver-{k}" for k in range(20))]
        metrics = {m: {"values": rng.random(8).tolist(), "mean": 0.5, "ci95": [0, 1]} for m in names}
        content = WHOLE | {"seeds": list(range(8)), "metrics": metrics, "error_metrics": ["l2"], "git": GIT}
        content |= {"environment": ENVIRONMENT, "comparison_figures": "noisy_of_mine.compare_figures"}
        settings = {f"model.setting_{k}": k * (1 + (k < 10) * i) for k in range(80)}
        a_run(tmp_path / f"{i}", content | {"label": f"run {i}", "settings": settings})
    page = paged(tmp_path)
    size = (tmp_path / "page.html").stat().st_size
    assert 1_000_000 < size < 3_000_000
    assert len(page.all("img")) == 4
    assert sum("dots an inch here, to keep this page small, 150 in" in text for text in page.texts) >= 1
    assert (tmp_path / "comparison" / "noise0.png").stat().st_size > 500_000  # the file has all of it


def drawn(kind: str) -> bytes:
    figure, axes = new_figure(size=(6, 4))
    if kind == "noise":
        axes[0, 0].imshow(np.random.default_rng(0).random((600, 900, 3)), aspect="auto")
    return png(figure)


def test_pictures_within_a_budget() -> None:
    """The large one is made smaller, the small ones stay whole; what finds no room is left out, and named."""
    noise, plain = drawn("noise"), drawn("plain")
    whole = embed_all({"noise": noise, "plain": plain})
    assert {n: e and e.dpi for n, e in whole.items()} == {"noise": FULL_DPI, "plain": FULL_DPI}
    assert whole["noise"] is not None
    assert len(whole["noise"].content) < 0.6 * len(noise)
    most = len(whole["noise"].content) // 2
    fewer = embed_all({"noise": noise, "plain": plain}, most)
    assert sum(len(e.content) for e in fewer.values() if e) <= most
    assert fewer["plain"] == whole["plain"]
    assert fewer["noise"] is not None
    assert LEAST_DPI <= fewer["noise"].dpi < FULL_DPI
    assert (fewer["noise"].width, fewer["noise"].height) == (600, 400) == (whole["noise"].width, whole["noise"].height)
    least = embed_all({"noise": noise, "plain": plain}, len(embed(plain).content))
    assert least == {"noise": None, "plain": whole["plain"]}


def test_a_picture_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_pictures.embed_all, "__defaults__", (100,))
    a_run(tmp_path / "a")
    page = paged(tmp_path)
    assert page.all("img") == []
    assert [f["href"] for f in page.all("a") if "l2.png" in (f["href"] or "")] == ["./comparison/l2.png"]
    assert "Not shown here, to keep this page small:" in " ".join(page.texts)


REFUSED = {
    "empty": ("", "it is empty"), "other_suffix": ("page.htm", "its name does not end in .html"),
    "no_suffix": ("page", "its name does not end in .html"), "no_name": (".html", "its name does not end in .html"),
    "folder": ("a", "it is a folder"), "folder_html": ("d.html", "it is a folder"),
    "in_a_file": ("file/page.html", "Not a directory"), "nul": ("a\0.html", "embedded null byte"),
    "long": ("x" * 300 + ".html", "File name too long"),
    "deep_and_long": (f"new/{'x' * 300}.html", "File name too long"),
    "nowhere": ("/proc/nowhere/page.html", ""), "loop": ("loop/page.html", "Too many levels of symbolic links"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_page_that_cannot_be_written(kind: str, refuse: Refusal) -> None:
    a_run(refuse.folder / "a")
    (refuse.folder / "d.html").mkdir()
    refuse.file("", "file")
    (refuse.folder / "loop").symlink_to("loop")
    name, why = REFUSED[kind]
    said = refuse(["compare", "a", "--html", name], "--html: ", f"is not allowed ({why}", "); give a file that ends in")
    assert len(said) < 400


def test_other_refusals(refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(refuse.folder / "a")
    refuse(["compare", "nowhere", "--html", "page.html"], "compare: no file or folder 'nowhere'")
    refuse(["compare", "a", "--html"], "--html: a value is missing; give a file that ends in .html")
    refuse(["compare", "a", "--htm", "x.html"], "--htm: no such flag", "did you mean '--html'?")
    (refuse.folder / "closed").mkdir(mode=0o500)
    true_access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "closed" not in str(p) and true_access(p, mode))  # root may
    refuse(
        ["compare", "a", "--html", "closed/page.html"], "--html: 'closed/page.html' is", "closed' may not be written"
    )
    (run / "config.yaml").write_text("a: [")
    refuse(["compare", "a", "--html", "page.html"], "compare: a/config.yaml cannot be read")


@pytest.mark.parametrize("after", [0, 3, 4])
def test_nothing_is_left_where_writing_fails(after: int, refuse: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four files for the folder, one page elsewhere: a disk that turns read-only leaves none of them."""
    a_run(refuse.folder / "a")
    fail_writes(after, monkeypatch)
    flag = "--html: 'new/deep' is" if after == 4 else "--out: 'new/out' is"
    refuse(["compare", "a", "--out", "new/out", "--html", "new/deep/page.html"], flag, "(Read-only file system)")


def test_a_page_is_set_aside_and_never_written_over(tmp_path: Path) -> None:
    a_run(tmp_path / "a")
    (tmp_path / "page.html").write_text("mine")
    for _ in range(2):
        paged(tmp_path)
    assert (tmp_path / "page-1.html").read_text() == "mine"
    assert (tmp_path / "page-2.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "comparison", "page.html", "page-1.html", "page-2.html"}


def test_a_sweep_ends_with_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three_runs(tmp_path)
    compare_folder(tmp_path, [tmp_path / name for name in ("x", "v9")])
    page = Page((tmp_path / "comparison" / "comparison.html").read_bytes())
    assert page.grids[0][1][0] == "x"
    assert f"page: {tmp_path}/comparison/comparison.html" in capsys.readouterr().err


def test_a_page_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    a_run(tmp_path / "runs" / "a")
    assert imported(("compare", "runs", "--html", "page.html"), tmp_path) == []
    assert (tmp_path / "page.html").is_file()


COLUMN = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[%d].textContent)"


def test_sorting_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    """By a click and by the keyboard: numbers as numbers, what is missing last both ways, then the order of before."""
    three_runs(tmp_path / "runs")
    paged(tmp_path / "runs")
    browser.open((tmp_path / "runs" / "page.html").as_uri())
    printed = browser.run(f"return {COLUMN % 0}")
    sorts = "[...document.querySelector('table').tHead.rows[0].cells].map(h => h.getAttribute('aria-sort'))"
    click = "document.querySelectorAll('table thead button')[%d].click();"
    assert browser.run(f"{click % 2} return {COLUMN % 0}") == ["x", "reference: zero", "v9", "v10"]
    assert browser.run(f"return {sorts}") == ["none", "none", "ascending", "none"]
    assert browser.run(f"{click % 2} return {COLUMN % 0}") == ["v10", "v9", "reference: zero", "x"]
    assert browser.run(f"{click % 2} return {COLUMN % 0}") == printed
    assert browser.run(f"return {sorts}") == ["none"] * 4
    assert browser.run(f"{click % 3} return {COLUMN % 0}")[:2] == ["v10", "x"]  # -100.5, -0.5, then the missing ones
    assert browser.run(f"{click % 3} return {COLUMN % 0}")[:2] == ["x", "v10"]
    browser.run("document.querySelectorAll('table thead button')[0].focus();")
    browser.press("\ue007")  # Enter
    assert browser.run(f"return {COLUMN % 0}") == ["reference: zero", "v9", "v10", "x"]
    assert browser.run(f"return {sorts}") == ["ascending", "none", "none", "none"]


def test_a_hostile_page_in_a_browser(browser: Browser, hostile: Path) -> None:
    """Nothing ran, nothing but the page was asked for, it is no wider than a screen, and has two schemes."""
    browser.log("performance")
    backgrounds = set()
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            browser.look_as(width, scheme)
            browser.open(hostile.as_uri())
            backgrounds.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert len(backgrounds) == 2
    assert browser.run("return typeof attacked") == "undefined"
    assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    link = f"[...document.querySelectorAll('a.name')].find(a => a.textContent === {json.dumps(HOSTILE[-1])})"
    browser.run(f"{link}.click()")
    assert browser.wait("return document.querySelectorAll('details[id][open]').length === 1")
    assert browser.log("browser") == []
    asked = set()
    for entry in browser.log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"].partition(":")[0])
    assert "file" in asked
    assert asked & {"http", "https", "ws", "wss", "ftp"} == set()
