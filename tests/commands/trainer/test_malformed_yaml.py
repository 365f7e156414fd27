"""Configuration files that are no YAML, or YAML of a kind that no configuration is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.malformed import CORPUS, GOOD, Refusal

WHOLE = yaml.safe_dump(GOOD, sort_keys=False)
LAUGHS = "a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 12)
)
DEEP = 20_000

TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "comment": "# nothing\n",
    "null": "null\n",
    "word": "flow\n",
    "number": "3\n",
    "list": "[1, 2]\n",
    "list_of_mappings": "- model: {}\n- data: {}\n",
    "open_bracket": "model: [1",
    "open_brace": "model: {class_path: FlowVsRegression",
    "open_quote": "model: 'Flow",
    "tab": "model:\n\tclass_path: FlowVsRegression\n",
    "bad_indent": "model:\n  a: 1\n b: 2\n",
    "two_documents": f"{WHOLE}---\n{WHOLE}",
    "directive": "%YAML 9.9\n---\nmodel: {}\n",
    "percent": "%\n",
    "at_sign": "model: @here\n",
    "nul": f"{WHOLE}\0",
    "control": f"{WHOLE}# \x07\n",
    "utf16": WHOLE.encode("utf-16"),
    "utf16_bare": WHOLE.encode("utf-16-le"),
    "utf32": WHOLE.encode("utf-32"),
    "latin": "model: é\n".encode("latin-1"),
    "cut_utf8": "model: é".encode()[:-1],
    "binary": bytes(range(256)) * 8,
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "gzip": b"\x1f\x8b\x08\0" + bytes(64),
    "unknown_alias": "model: *nowhere\n",
    "self_alias": "model: &a [*a]\n",
    "self_mapping": "model: &a {init_args: *a}\n",
    "laughs": LAUGHS + WHOLE,
    "laughs_in_place": LAUGHS + "model: {class_path: FlowVsRegression, init_args: {seeds: *a11}}\n",
    "merged_laughs": "a: &a {x: 1}\n" + LAUGHS + "model: {<<: *a, init_args: *a9}\n",
    "deep_list": "model: " + "[" * DEEP + "]" * DEEP,
    "deep_mapping": "model: " + "{a: " * DEEP + "1" + "}" * DEEP,
    "long_integer": "trainer: {max_steps: " + "9" * 5000 + "}\n",
    "int_that_is_none": "trainer: {max_steps: !!int many}\n",
    "float_that_is_none": "model: {init_args: {lr: !!float fast}}\n",
    "binary_that_is_none": "run: {name: !!binary é}\n",
    "merge_of_a_number": "model: {<<: 3}\n",
    "list_as_key": "? [a, b]\n: 1\n",
    "mapping_as_key": "? {a: 1}\n: 1\n",
    "twice_at_top": f"{WHOLE}trainer: {{max_steps: 3}}\n",
    "twice_in_model": "model: {class_path: FlowVsRegression, class_path: GaussianPolicy}\n",
    "twice_in_init_args": "model: {class_path: FlowVsRegression, init_args: {lr: 0.1, lr: 0.2}}\n",
    "unknown_tag": "model: !experiment {}\n",
}
TAGS = {
    "apply": '!!python/object/apply:os.system ["{command}"]',
    "apply_mapping": '!!python/object/apply:subprocess.Popen {{args: ["{command}"], kwds: {{shell: true}}}}',
    "new": '!!python/object/new:os.system ["{command}"]',
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
    "object": "!!python/object:os.system {{}}",
    "tuple": "!!python/tuple [1, 2]",
    "eval": "!!python/object/apply:eval [\"__import__('os').system('{command}')\"]",
    "extend": '!!python/object/new:type {{args: ["z", !!python/tuple [], {{"extend": !!python/name:exec }}]}}',
}
PLACES = {
    "top": "{tag}\n",
    "model": "model: {tag}\n",
    "seeds": "model: {{class_path: FlowVsRegression, init_args: {{seeds: {tag}}}}}\n",
    "key": "? {tag}\n: 1\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_no_configuration(name: str, refuse: Refusal) -> None:
    refuse.fit(refuse.file(TEXTS[name]), "-c: ", "wrong.yaml")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TAGS)
def test_a_tag_builds_nothing(name: str, place: str, refuse: Refusal) -> None:
    tag = TAGS[name].format(command=f"touch {refuse.canary}")
    refuse.fit(refuse.file(PLACES[place].format(tag=tag)), "-c: ", "wrong.yaml")


def test_the_canary_sings_where_tags_are_obeyed(refuse: Refusal) -> None:
    """Negative control: an unsafe loader runs what the safe one refuses."""
    text = PLACES["model"].format(tag=TAGS["apply"].format(command=f"touch {refuse.canary}"))
    yaml.load(text, Loader=yaml.UnsafeLoader)
    assert refuse.canary.exists()


FILES = ("missing", "directory", "broken_link", "link_loop", "fifo", "long_name", "empty_name")


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_none(kind: str, refuse: Refusal) -> None:
    path = refuse.folder / "wrong.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "broken_link":
        path.symlink_to(refuse.folder / "nowhere")
    elif kind == "link_loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "long_name":
        path = refuse.folder / ("x" * 5000)
    refuse.fit("" if kind == "empty_name" else path, "-c: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(refuse: Refusal) -> None:
    path = refuse.file(WHOLE)
    path.chmod(0)
    refuse.fit(path, "-c: ", "wrong.yaml")


@CORPUS
@given(st.binary(min_size=1, max_size=200))
def test_bytes_at_random(refuse: Refusal, content: bytes) -> None:
    refuse.fit(refuse.file(content))


@CORPUS
@given(st.integers(0, len(WHOLE) - 1), st.sampled_from(["\0", "[", "{", "\t", "!", "*", '"', "}"]))
def test_one_character_too_many(refuse: Refusal, where: int, what: str) -> None:
    """Some of these are YAML still: what counts is that none is a traceback, and none leaves anything behind."""
    refuse.fit(refuse.file(f"{WHOLE[:where]}{what}{WHOLE[where:]}"), flags=("--trainer.accelerator", "nowhere"))


@CORPUS
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ).filter(lambda x: x != {})
)
def test_any_yaml_is_refused_in_a_line(refuse: Refusal, content: object) -> None:
    refuse.fit(refuse.file(yaml.safe_dump(content)))


GOOD_TEXTS = {
    "crlf": WHOLE.replace("\n", "\r\n").encode(),
    "bom": b"\xef\xbb\xbf" + WHOLE.encode(),
    "document_marks": f"---\n{WHOLE}...\n".encode(),
    "small_anchors": f"{WHOLE}".replace("seeds:", "seeds: &s").encode(),
}


@pytest.mark.parametrize("name", GOOD_TEXTS)
@pytest.mark.parametrize("file", ["plain.yaml", "with spaces.yaml", "ünïcode-文.yaml", "no_suffix"])
def test_what_is_odd_but_allowed(name: str, file: str, refuse: Refusal) -> None:
    """Negative control: the same helper's good configuration runs, under line ends and names of all kinds."""
    from lightning_toys.cli import main

    path = refuse.file(GOOD_TEXTS[name], file)
    words = ["fit", "-c", str(path), "--run.root", str(refuse.root), "--print_config"]
    assert main(words) == 0, refuse.capture.readouterr().err
    assert Path(path).stem
