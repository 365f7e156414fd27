"""Run folders that `compare`, a resume and `sweep` are given, and that hold something else than a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_toys.cli import main
from tests.commands.compare.runs_of_others import METRIC, WHOLE, a_run, edited
from tests.malformed import CORPUS, GOOD, Refusal, at

NAN, INF = float("nan"), float("inf")
CONTENTS: dict[str, Any] = {
    **{f"no_{k}": edited(k, ...) for k in ("experiment", "variant", "seeds", "metrics", "references")},
    "empty": b"",
    "cut": json.dumps(WHOLE)[:90].encode(),
    "binary": bytes(range(256)),
    "utf16": json.dumps(WHOLE).encode("utf-16"),
    "list": [1],
    "number": 3,
    "null": None,
    "deep": b"[" * 100_000,
    "long_number": b'{"seeds": ' + b"9" * 5000 + b"}",
    "experiment_number": edited("experiment", 3),
    "experiment_list": edited("experiment", ["toy"]),
    "variant_number": edited("variant", 3),
    "seeds_number": edited("seeds", 3),
    "seeds_words": edited("seeds", ["a", "b"]),
    "seeds_lists": edited("seeds", [[0], [1]]),
    "seeds_null": edited("seeds", None),
    "seeds_twice": edited("seeds", [0, 0]),
    "seeds_fewer": edited("seeds", [0]),
    "metrics_list": edited("metrics", [1]),
    "metrics_number": edited("metrics", 3),
    "metric_number": edited("metrics/l2", 3),
    "metric_list": edited("metrics/l2", [1.0, 2.0]),
    "metric_empty": edited("metrics/l2", {}),
    "metric_climbs": edited("metrics", {"../../up": METRIC}),
    "metric_absolute": edited("metrics", {"/tmp/up": METRIC}),
    "metric_nul": edited("metrics", {"a\0b": METRIC}),
    "values_words": edited("metrics/l2/values", ["a", "b"]),
    "values_word": edited("metrics/l2/values", "ab"),
    "values_lists": edited("metrics/l2/values", [[1], [2]]),
    "values_flags": edited("metrics/l2/values", [True, False]),
    "values_nan": edited("metrics/l2/values", [NAN, 1.0]),
    "values_infinite": edited("metrics/l2/values", [INF, 1.0]),
    "values_number": edited("metrics/l2/values", 3),
    "values_more": edited("metrics/l2/values", [1.0, 2.0, 3.0]),
    "references_list": edited("references", [1]),
    "references_number": edited("references", 3),
    "reference_number": edited("references/zero", 3),
    "reference_word": edited("references/zero/l2", "small"),
    "reference_nan": edited("references/zero/l2", NAN),
    "label_number": edited("label", 3),
    "label_list": edited("label", ["a"]),
    "headline_number": edited("headline", 3),
    "headline_numbers": edited("headline", [3]),
    "unused_number": edited("unused", 3),
    "error_metrics_number": edited("error_metrics", [3]),
    "labels_list": edited("metric_labels", [1]),
    "settings_number": edited("settings", 3),
    "settings_list": edited("settings", [1]),
    "module_number": edited("module", 3),
    "module_of_nowhere": edited("module", "lightning_toys.nowhere.Class"),
    "module_no_class": edited("module", "lightning_toys.cli.main"),
    "module_a_package": edited("module", "lightning_toys.cli.os"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_results_that_are_none(name: str, refuse: Refusal) -> None:
    a_run(refuse.folder / "runs" / "a")
    a_run(refuse.folder / "runs" / "b", CONTENTS[name])
    refuse(["compare", "runs"], "compare: ", "b/results.json")


def test_what_is_odd_but_allowed(refuse: Refusal) -> None:
    """Negative control: null is how NaN is written; extra keys, and a folder with spaces, are nobody's harm."""
    a_run(refuse.folder / "some runs" / "a")
    odd = edited("metrics/l2/values", [None, 1.0]) | {"more": 1, "module": "elsewhere.Class"}
    a_run(refuse.folder / "some runs" / "ü", odd)
    assert main(["compare", "some runs"]) == 0, refuse.capture.readouterr().err
    assert (refuse.folder / "some runs" / "comparison" / "l2.png").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "binary", "link_loop", "results_folder", "nul", "long"])
def test_a_run_that_is_none(kind: str, refuse: Refusal) -> None:
    path = refuse.folder / "run"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("hello")
    elif kind == "binary":
        path.write_bytes(bytes(range(256)))
    elif kind == "link_loop":
        path.symlink_to(path)
    elif kind == "results_folder":
        (path / "results.json").mkdir(parents=True)
    word = {"nul": "a\0b", "long": "x" * 5000}.get(kind, "run")
    refuse(["compare", word], "compare: ")


@pytest.mark.parametrize(
    "words", [["--baseline", "zzz"], ["--out", "file"], ["--out", "a\0b"], ["--nonsense"], ["--out"]]
)
def test_flags_of_compare(words: list[str], refuse: Refusal) -> None:
    a_run(refuse.folder / "a")
    refuse.file("", "file")
    refuse(["compare", "a", *words], "" if words == ["--out"] else words[0])


CONFIGS = {
    "cut": "model: [1",
    "binary": b"\xff\xfe\0",
    "list": "[1]",
    "tag": "!!python/object/apply:os.system [touch canary]",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_beside_results_without_settings(name: str, refuse: Refusal) -> None:
    content = edited("settings", ...)
    a_run(refuse.folder / "runs" / "a", content)
    folder = a_run(refuse.folder / "runs" / "b", content)
    refuse.file(CONFIGS[name], str(folder / "config.yaml"))
    refuse(["compare", "runs"], "compare: ", "b/config.yaml")


TABLES = {
    "binary": bytes(range(256)) * 4,
    "nul": b"step,eval/l2\n1,\0\n",
    "step_word": b"step,eval/l2\nmany,1.0\n",
    "value_word": b"step,eval/l2\n1,low\n",
    "no_step": b"l2\n1.0\n2.0\n",
    "utf16": "step,l2\n1,2\n".encode("utf-16"),
    "long_field": b"step,l2\n1," + b"9" * 200_000 + b"\n",
    "too_many": b"step,l2\n1,2,3,4\n",
    "step_nan": b"step,l2\nnan,2\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_a_resume_would_go_on_in(name: str, refuse: Refusal) -> None:
    config = refuse.file(GOOD, "good.yaml")
    assert main(["fit", "-c", str(config), "--run.name", "a"]) == 0
    table = next(refuse.root.rglob("metrics.csv"))
    table.write_bytes(TABLES[name])
    flags = ("--run.name", "a", "--ckpt_path", "last", "--trainer.max_steps", "4")
    refuse.fit(config, "metrics.csv", flags=flags)


BANDIT = "lightning_toys.generative_policy.BanditPolicy"


@pytest.mark.parametrize("name", ["binary", "utf16", "step_word", "value_word", "no_step"])
def test_a_table_that_compare_would_draw(name: str, refuse: Refusal) -> None:
    """The bandit's comparison draws curves out of metrics.csv."""
    metric = {"regret": METRIC}
    a_run(refuse.folder / "runs" / "a", WHOLE | {"module": BANDIT, "metrics": metric, "headline": ["regret"]})
    table = TABLES[name].replace(b"eval/l2", b"replicas/eval/regret/seed_0,replicas/eval/regret/seed_1")
    table = table.replace(b",1.0\n", b",1.0,1.0\n").replace(b",low\n", b",low,low\n")
    refuse.file(table, "runs/a/metrics.csv")
    refuse(["compare", "runs"], "metrics.csv")


def test_a_table_whose_last_line_is_cut_is_whole_enough(refuse: Refusal) -> None:
    """Negative control: that is what a killed run leaves."""
    config = refuse.file(GOOD, "good.yaml")
    assert main(["fit", "-c", str(config), "--run.name", "a"]) == 0
    table = next(refuse.root.rglob("metrics.csv"))
    table.write_bytes(table.read_bytes() + b"99,0.")
    words = ["--run.name", "a", "--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert main(["fit", "-c", str(config), *words]) == 0


GRIDS = [
    ("--grid.model.mode", "flow"), ("--grid.model.mode", "[]"), ("--grid.model.mode", "[flow"),
    ("--grid.model.mode", "{a: 1}"), ("--grid.model.mode", "3"), ("--grid.model.mode", ""),
    ("--grid.model.mode", "[flow,flow]"), ("--grid.model.mode", "[flwo]"), ("--grid.model.moed", "[flow]"),
    ("--grid.model.mode", "!!python/object/apply:os.system ['touch canary']"),
    ("--grid.model.mode", "['!!python/object/apply:os.system [touch canary]']"),
    ("--grid.model", "[os.system, subprocess.Popen]"), ("--grid.nonsense", "[1]"),
    ("--grid.run.name", "[a]"), ("--grid.ckpt_path", "[last]"), ("--grid.run.variant", "[a]"),
    ("--grid.model.lr", "[.nan]"), ("--grid.model.lr", "[-1]"), ("--grid.model.seeds", "[0]"),
    ("--grid.trainer.max_steps", "[many]"), ("--grid.model.network.hidden", "[0]"),
    ("--gird.model.mode", "[flow]"), ("--grid", "[flow]"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), GRIDS, ids=lambda x: x[:40])
def test_a_grid_that_is_none(flag: str, value: str, refuse: Refusal) -> None:
    refuse(["sweep", "-c", str(refuse.file(GOOD)), flag, value])


def test_a_sweep_of_a_file_that_is_none(refuse: Refusal) -> None:
    for content in (b"\xff\xfe", b"model: {a: 1, a: 2}", b"[" * 9999):
        refuse(["sweep", "-c", str(refuse.file(content)), "--grid.model.mode", "[flow]"], "-c: ", "wrong.yaml")
    refuse(["sweep", "-c", str(refuse.file(at("trainer.max_stepz", 1))), "--grid.model.mode", "[flow]"], "wrong.yaml")


@CORPUS
@given(st.binary(max_size=300))
def test_results_at_random(refuse: Refusal, content: bytes) -> None:
    refuse.file(content, "run/results.json")
    refuse(["compare", "run"], "compare: ", "run/results.json")


@CORPUS
@given(st.integers(0, len(json.dumps(WHOLE)) - 2))
def test_results_that_are_cut(refuse: Refusal, length: int) -> None:
    refuse.file(json.dumps(WHOLE)[:length], "run/results.json")
    refuse(["compare", "run"], "compare: ", "run/results.json")
