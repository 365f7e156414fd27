"""Names that somebody else chose arrive as themselves wherever compare writes them."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_toys.cli import main
from lightning_toys.commands.compare import report
from lightning_toys.commands.compare.names import distinct, encodable, file_stem, latex_text, markdown_text
from lightning_toys.commands.compare.plots import draw
from lightning_toys.commands.compare.runs import find_results, load_runs
from lightning_toys.plotting import literal, new_figure
from tests.commands.compare.runs_of_others import METRIC, WHOLE, a_run
from tests.conftest import REPO

NAMES = [
    "$x$", "$", r"\$", r"$\foo$", "[/b]", "[bold]x[/]", "exp[draft]", "exp[final]", "<script>", "<b>", "a|b", r"a\|b",
    "=1+1", "& % _ # { } ^ ~", r"back\slash", r"a\nb", "`tick`", "-lead", "@at", "+plus", "_x", "_x_", "a_b_c", "*b*",
    "~~s~~", "&amp;", ":smile:", "--", "[a](b)", "![a](b)", "ü ± 漢", "'q'", '"q"', "a,b", "x" * 300,
]  # fmt: skip
UNSEEN = {"new\nline": r"new\nline", "a\rb": r"a\rb", "x\x1b[31m": r"x\x1b[31m", "\u202eabc": r"\u202eabc"}
AS_A_METRIC = [
    "$x$", "exp[draft]", "exp[final]", "<script>", "a|b", "=1+1", "& % _ # { } ^ ~", "new\nline", "_x", "-lead",
    "x" * 300,
]  # fmt: skip


def named(name: str) -> dict[str, Any]:
    """Return results in which run, metric and baseline have a name."""
    metric = {name: METRIC} if name in AS_A_METRIC else {}
    return WHOLE | {"label": name, "metrics": {"l2": METRIC} | metric, "references": {name: {"l2": 0.9}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a comparison of all names, and what was printed."""
    folder = tmp_path_factory.mktemp("names")
    for i, name in enumerate([*NAMES, *UNSEEN]):
        a_run(folder / "runs" / f"{i:02d}", named(name))
    words = [sys.executable, "cli.py", "compare", str(folder / "runs"), "--out", str(folder / "out")]
    env = {"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin", "COLUMNS": "200", "PYTHONUTF8": "1"}
    done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "Warning" not in done.stderr, done.stderr
    return folder / "out", done.stdout


def test_in_the_terminal(made: tuple[Path, str]) -> None:
    cells = {cell.strip() for line in made[1].splitlines() for cell in re.split("[│┃]", line)}
    for name in NAMES[:-1]:
        assert name in cells, name
        assert f"reference: {name}" in cells, name
    for shown in UNSEEN.values():
        assert shown in cells
    assert "\x1b" not in made[1]
    assert sum(cell.count("x" * 20) for cell in cells) >= 5  # the long one is folded, not cut


def test_in_markdown(made: tuple[Path, str]) -> None:
    """A renderer shows the names, in as many cells as there are columns."""
    text = (made[0] / "comparison.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    shown = set()
    for token in tokens:
        if token.type == "inline":
            assert token.children is not None
            assert {c.type for c in token.children} <= {"text", "text_special", "strong_open", "strong_close"}, token
            shown.add("".join(c.content for c in token.children if c.content))
    for name in (*NAMES, *UNSEEN.values()):
        assert name in shown, name
    for name in AS_A_METRIC:
        assert UNSEEN.get(name, name) in shown
    for table in re.split(r"\n\n", text):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


def test_in_csv(made: tuple[Path, str]) -> None:
    """A reader of CSV gets the very names: nothing is put before ``=``, and a line end stays one."""
    with (made[0] / "comparison.csv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {r["run"] for r in rows if not r["run"].startswith("reference: ")} == {*NAMES, *UNSEEN}
    assert {r["metric"] for r in rows} == {"l2", *AS_A_METRIC}
    assert {r["run"] for r in rows if r["run"].startswith("reference: ")} == {
        f"reference: {n} ({n})" for n in (*NAMES, *UNSEEN)
    }


TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}", "±": r"$\pm$",
}  # fmt: skip


@pytest.mark.parametrize("character", [chr(k) for k in range(32, 127)] + ["±", "ü"])
def test_every_character_in_latex(character: str) -> None:
    assert latex_text(f"a{character}b") == f"a{TEX.get(character, character)}b"


def test_what_latex_would_take_for_something_else() -> None:
    assert latex_text("[/b] x") == "{[}/b] x"  # an option of \\
    assert latex_text("*b*") == "{*}b*"
    assert latex_text("a---b") == "a-{}-{}-b"  # dashes
    assert latex_text(",,a") == ",{},a"  # a quotation mark
    assert latex_text("\\{}") == r"\textbackslash{}\{\}"  # what stands for a backslash is not escaped again
    assert latex_text("a\nb") == r"a\textbackslash{}nb"


def test_in_latex(made: tuple[Path, str]) -> None:
    """Every row has the cells of its table, and no special character stands alone."""
    text = (made[0] / "comparison.tex").read_text(encoding="utf-8")
    cells = 0
    for table in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.findall("[lr]", table.partition("}")[0]))
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        for row in rows:
            assert len(re.split(r"(?<!\\)&", row)) == columns, row
            cells += columns
            rest = re.sub(r"\\textbackslash\{\}|\\[a-z]+\{\}|\$\\pm\$|\\[{}$&%#_]|\{\}|\{[\[*]\}", "", row[:-2])
            assert not set(rest) & set("\\{}$%#_^~"), row
    assert cells > 500


def test_in_pictures(made: tuple[Path, str], tmp_path: Path) -> None:
    """Row labels, legend and axis say the names, none as mathematics; nothing is left out of the legend."""
    shown = []
    for i, name in enumerate(NAMES[:-1]):
        (run,) = load_runs(find_results([a_run(tmp_path / str(i), named(name))]))
        figure = draw([run], name if name in AS_A_METRIC else "l2")
        ax = figure.axes[0]
        texts = [ax.get_yticklabels()[0], ax.xaxis.label if name in AS_A_METRIC else None]
        if name not in AS_A_METRIC:
            texts.append(figure.legends[0].get_texts()[0])
        for text in filter(None, texts):
            assert text.get_parse_math()
            assert not is_math_text(text.get_text()), name
            assert name in text.get_text().replace(r"\$", "$"), name  # so is \$ shown
            shown.append(name)
    assert len(shown) > 1.5 * len(NAMES)
    assert {"=1+1.png", "exp[draft].png", "exp[final].png", "$x$.png"} <= {p.name for p in made[0].iterdir()}
    assert len(list(made[0].glob("*.png"))) == 1 + len(AS_A_METRIC)


def test_an_axis_label_of_the_experiment_may_hold_mathematics(tmp_path: Path) -> None:
    """What an experiment calls its metric is shown as mathematics where that can be drawn, as it is where not."""
    for i, (label, shown) in enumerate({"$\\lambda$ (nats)": "$\\lambda$ (nats)", "$\\foo{$": "\\$\\foo{\\$"}.items()):
        (run,) = load_runs(find_results([a_run(tmp_path / str(i), WHOLE | {"metric_labels": {"l2": label}})]))
        figure = draw([run], "l2")
        assert figure.axes[0].get_xlabel() == shown
        report.png(figure)


def test_runs_that_only_brackets_tell_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("exp[draft]", "exp[final]", "exp*", "exp?"):
        a_run(tmp_path / name, {k: v for k, v in WHOLE.items() if k != "label"})
    assert main(["compare", *(str(tmp_path / n) for n in ("exp[draft]", "exp[final]"))]) == 0
    out = capsys.readouterr().out
    assert "exp[draft]" in out
    assert "exp[final]" in out
    assert main(["compare", str(tmp_path), "--baseline", "exp[final]", "--out", str(tmp_path / "o[ut]")]) == 0
    assert r"run minus exp\[final\]" in (tmp_path / "o[ut]" / "comparison.md").read_text(encoding="utf-8")


def test_groups_of_one_file_name_keep_their_pictures(tmp_path: Path) -> None:
    for i, target in enumerate(("a b", "a_b", "A_B")):
        settings = {"data.target": target, "model.lr": 0.1}
        a_run(tmp_path / "runs" / str(i), WHOLE | {"settings": settings})
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["l2-A_B_3.png", "l2-a_b.png", "l2-a_b_2.png"]


def test_names_of_files() -> None:
    assert file_stem("l2") == "l2"
    assert file_stem("../up") == "_up"
    assert file_stem("...") == "unnamed"
    assert len(file_stem("ü" * 300).encode()) == 120
    assert distinct(["a", "A", "a", "b"]) == ["a", "A_2", "a_3", "b"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_terminal_that_lacks_characters(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is whole, and of one width; the files are UTF-8 whatever the terminal is."""
    a_run(tmp_path / "runs" / "ü", WHOLE | {"label": "ü 漢", "metrics": {"l2": METRIC}, "headline": []})
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding=encoding))
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    out = held.getvalue().decode(encoding)
    assert encodable("ü 漢", encoding) in out
    assert encodable("1.5 ± 6.4", encoding) in out
    if encoding != "utf-8":  # where a character is two columns wide
        assert len({len(line) for line in out.splitlines()[1:] if line.strip()}) == 1
    assert "ü 漢" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_a_locale_that_is_ascii(tmp_path: Path) -> None:
    """Files are found, read and written where Python takes everything for ASCII."""
    name = "ü"
    a_run(tmp_path / "runs" / "ü", WHOLE | {"metrics": {name: METRIC, "l2": METRIC}})
    words = [sys.executable, "cli.py", "compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    env = {
        "PYTHONPATH": str(REPO),
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "| ü |" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_a_folder_whose_name_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are no UTF-8 are written out."""
    folder = Path(str(tmp_path / "runs") + "/a\udcff")
    a_run(folder, {k: v for k, v in WHOLE.items() if k != "label"})
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert r"a\udcff" in capsys.readouterr().out
    assert "a\\\\udcff" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text(encoding="utf-8"))))
    assert rows[0]["folder"].endswith(r"a\udcff")


def test_settings_that_do_nothing_in_a_run_are_no_part_of_its_name(tmp_path: Path) -> None:
    for mode, nfe, unused in (
        ("flow", 1, []),
        ("flow", 4, []),
        ("regression", 1, ["model.evaluation.nfe"]),
        ("mip", 4, ["model.evaluation."]),
    ):
        settings = {"model.mode": mode, "model.evaluation.nfe": str(nfe)}
        a_run(tmp_path / f"{mode}-{nfe}", WHOLE | {"label": mode, "settings": settings, "unused": unused})
    labels = [r.label for r in load_runs(find_results([tmp_path]))]
    assert sorted(labels) == ["flow nfe=1", "flow nfe=4", "mip", "regression"]


def test_labels_that_are_the_same_are_told_apart(tmp_path: Path) -> None:
    """By as much of the folders' names as it takes; a run that is named twice is one."""
    for place in ("x/seed/a", "y/seed/a"):
        a_run(tmp_path / place)
    found = find_results([tmp_path, tmp_path / "x", tmp_path / "x" / ".." / "x" / "seed" / "a"])
    assert [r.label for r in load_runs(found)] == ["a (x/seed/a)", "a (y/seed/a)"]


def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
    """What an experiment's own figures do with labels."""
    figure, axes = new_figure()
    for label in runs:
        axes[0, 0].plot([1, 2], label=f"{label}, 2 seeds")
    axes[0, 0].legend()
    figure.suptitle(" ".join(runs))
    LAST.append(figure)
    return {"own/../$figure$": figure}


LAST: list[Figure] = []


def test_in_an_experiments_own_figures(tmp_path: Path) -> None:
    for i, name in enumerate(NAMES):
        own = {"comparison_figures": "tests.commands.compare.test_names.compare_figures"}
        a_run(tmp_path / "runs" / f"{i:02d}", WHOLE | {"label": name, "metrics": {"l2": METRIC}} | own)
    assert main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    figure = LAST.pop()
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == len(NAMES)
    assert all(isinstance(t, Text) and not is_math_text(t.get_text()) for t in figure.findobj(Text))
    shown = [t.get_text().replace(r"\$", "$").removesuffix(", 2 seeds").removeprefix(" ") for t in legend.get_texts()]
    assert shown[:-1] == NAMES[:-1]
    assert (tmp_path / "out" / "own_.._$figure$.png").is_file()


def test_underscores_and_numbers_stay_readable() -> None:
    """Negative control: only what Markdown would take for its own is escaped."""
    assert markdown_text("num_train=20, lr=1e-3 (version_0)") == "num_train=20, lr=1e-3 (version_0)"
    assert markdown_text("[-0.1, 2e-05]") == "[-0.1, 2e-05]"
    assert literal("num_train=20") == "num_train=20"
