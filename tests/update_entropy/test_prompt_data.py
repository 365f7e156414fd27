"""Prompts of a file and rewards of a function: what is read, what it is worth, and a probe of both."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("gguf", "peft", "transformers"):
    pytest.importorskip(needed)
from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.checkpoints import load_backbone, load_tokenizer  # noqa: E402
from lightning_toys.update_entropy.optimizer_files import save_optimizer_state  # noqa: E402
from lightning_toys.update_entropy.prompt_data import PromptData  # noqa: E402
from lightning_toys.update_entropy.rewards import last_number  # noqa: E402
from tests.conftest import Runner  # noqa: E402
from tests.update_entropy.test_checkpoints import a_model, a_tokenizer, adapted  # noqa: E402
from tests.update_entropy.test_cli import QUIET  # noqa: E402
from tests.update_entropy.test_optimizer_files import steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}={{ m.content }}+{% endfor %}{% if add_generation_prompt %}a={% endif %}"
)


def letters(prompts: list[str], responses: list[str], rows: list[Any]) -> list[float]:
    """A reward of somebody's own: how many of the row's letters a response has."""
    assert all(row["prompt"] == p for p, row in zip(prompts, rows, strict=True))
    return [sum(c in row["wanted"] for c in x) for x, row in zip(responses, rows, strict=True)]


def counted(prompts: list[str], responses: list[str], rows: list[Any], letter: str) -> list[float]:
    return [x.count(letter) for x in responses]


def wrong(prompts: list[str], responses: list[str], rows: list[Any]) -> list[float]:
    return [1.0]


def missing(prompts: list[str], responses: list[str], rows: list[Any]) -> list[Any]:
    return [None] * len(responses)


def failing(prompts: list[str], responses: list[str], rows: list[Any]) -> list[float]:
    return [row["no such column"] for row in rows]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    if file.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return str(file)


GSM8K = [
    {"question": "Natalia sold 48 clips, then half as many. How many?", "answer": "48/2 = <<48/2=24>>24\n#### 72"},
    {"question": "A robe takes 2 bolts, and half that. How many?", "answer": "It takes 2/2=1\n#### 3"},
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_gsm8k_works_as_it_is(kind: str, tmp_path: Path) -> None:
    data = PromptData(write(tmp_path / f"p.{kind}", GSM8K))
    problems = data.problems(0, 0, "x", 7)
    counts = Counter(p.prompt for p in problems)
    assert set(counts) == {row["question"] for row in GSM8K}
    assert sorted(counts.values()) == [3, 4]  # all before any comes again
    assert problems == data.problems(0, 0, "x", 7) != data.problems(0, 1, "x", 7)
    by_question = {p.prompt: p for p in problems}
    first, second = (by_question[row["question"]] for row in GSM8K)
    said = ["So 48 + 24 = 72.", "3", "no idea"]
    assert data.rewards([first, second, second], said) == [1, 1, 0]
    assert data.rewards([second, first, first], said) == [0, 0, 0]
    assert data.task.reward(first, "72.0") == 1
    assert data.task.solution(first, np.random.default_rng(0)) == GSM8K[0]["answer"]


def test_other_columns_and_rewards(tmp_path: Path) -> None:
    rows = [{"task": "say ab", "gold": "ab", "wanted": "abc"}, {"task": "say c", "gold": "c+", "wanted": "x"}]
    file = write(tmp_path / "p.jsonl", rows)
    for reward, wanted in (("exact", [1, 0, 0]), ("regex", [1, 0, 1])):
        data = PromptData(file, prompt="task", answer="gold", reward=reward)
        one, two = sorted(data.problems(0, 0, "x", 2), key=lambda p: p.prompt)
        assert data.rewards([one, two, two], [" ab\n", "d", "xccx"]) == wanted
    own = [{"prompt": r["task"], "wanted": r["wanted"]} for r in rows]
    data = PromptData(write(tmp_path / "own.jsonl", own), reward=f"{__name__}.letters")
    one, two = sorted(data.problems(0, 0, "x", 2), key=lambda p: p.prompt)
    assert data.rewards([one, two], ["abba", "xyx"]) == [4, 2]
    with pytest.raises(ToyError, match=r"^--data.file: there is no answer to imitate .* --model.warm_steps 0"):
        data.task.solution(one, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"target": 3}, [-3, -1, 0, -4]),
        ({"limit": 3}, [0, 0, 0, -4]),
        ({"target": 2, "unit": "words"}, [-2, -1, 0, 0]),
        ({"limit": 1, "unit": "words"}, [0, 0, -1, -1]),
    ],
)
def test_the_length_reward(arguments: dict[str, Any], wanted: list[float], tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "say"}])
    data = PromptData(file, reward="length", reward_arguments=arguments)
    problems = data.problems(0, 0, "x", 4)
    assert data.rewards(problems, ["", "äb", "a b", "abc def"]) == wanted
    assert data.rewards([], []) == []


def test_a_reward_of_ones_own_with_arguments(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "say"}])
    data = PromptData(file, reward=f"{__name__}.counted", reward_arguments={"letter": "b"})
    assert data.rewards(data.problems(0, 0, "x", 2), ["abba", "xyx"]) == [2, 0]
    with pytest.raises(ToyError, match=r"^--data.reward_arguments: {'leter': 'b'} is not allowed for .*counted: "):
        PromptData(file, reward=f"{__name__}.counted", reward_arguments={"leter": "b"})
    with pytest.raises(ToyError, match=r"^--data.reward_arguments: {} is not allowed for .*: missing .* 'letter'"):
        PromptData(file, reward=f"{__name__}.counted")


def test_parquet_gives_the_rows_that_jsonl_gives(tmp_path: Path) -> None:
    """Turns that have keys which others lack, answers, and a column of lists for a reward of one's own."""
    first = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c", "name": "x"}]
    rows = [
        {"messages": [*first, {"role": "user", "content": "d"}], "answer": "1", "wanted": ["a", "b"], "level": 3},
        {"messages": [{"role": "user", "content": "ef"}], "answer": "2", "wanted": [], "level": None},
    ]
    found = []
    for kind in ("jsonl", "parquet"):
        data = PromptData(write(tmp_path / f"p.{kind}", rows))
        found.append(sorted(data.problems(0, 0, "x", 2), key=lambda p: p.answer))
    assert found[0] == found[1]
    assert found[1][0].messages == rows[0]["messages"]
    assert found[1][0].prompt == "ab\nc\nd"
    said = {"p.parquet row 2: messages is neither a text nor messages": [*rows[:1], {**rows[1], "messages": None}]}
    said["p.parquet row 1 has no 'prompt'; give --data.prompt, one of answer, level"] = [
        {k: row[k] for k in ("answer", "level")} for row in rows
    ]
    said["has no rows"] = []
    assert len(said) == 3
    for text, changed in said.items():
        with pytest.raises(ToyError) as caught:
            PromptData(write(tmp_path / "p.parquet", changed))
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18 - 3 = 15", 15),
        ("$1,234.50", Fraction(2469, 2)),
        ("#### -7", -7),
        ("none", None),
        ("3-4", 4),
        (".5", Fraction(1, 2)),
    ],
)
def test_the_last_number(text: str, number: Any) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(("longest", "cut"), [(5, False), (4, True), (2, True)])
def test_an_answer_that_is_cut_is_told_of_once(
    longest: int, cut: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four tokens and the one that ends it: the policy would be taught not to end there."""
    a_model("llama").save_pretrained(tmp_path / "m")
    a_tokenizer(tmp_path / "m")
    file = write(tmp_path / "p.jsonl", [{"prompt": "ab", "answer": "abcd"}])
    data = PromptData(file, tokens=str(tmp_path / "m"), longest=longest, batch_size=3)
    tokens, response = data.loader([0, 1]).draw(0, 2)
    ends = (tokens == data.tokenizer.eos_token_id) & response
    assert bool(ends.any()) is not cut
    assert int(response.sum(-1).max()) == min(5, longest)
    said = capsys.readouterr().err
    assert said.count("--data.longest: an answer of 4 tokens is cut to") == cut


def test_prompts_follow_the_chat_template(tmp_path: Path) -> None:
    a_model("llama").save_pretrained(tmp_path / "m")
    a_tokenizer(tmp_path / "m")
    plain = load_tokenizer(tmp_path / "m")
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    file = write(tmp_path / "p.jsonl", [{"prompt": "ab", "answer": "1"}, {"messages": chat, "answer": "2"}])

    def texts(**options: Any) -> list[str]:
        data = PromptData(file, tokens=str(tmp_path / "m"), **options)
        rows = sorted(data.problems(0, 0, "x", 2), key=lambda p: len(p.prompt))
        assert data.max_prompt_length == max(len(data.encode_prompt(p)) for p in rows)
        return [data.tokenizer.decode(data.encode_prompt(p)) for p in rows]

    assert texts()[0] == "ab"  # no template: as it is
    settings = tmp_path / "m" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    assert texts() == ["u=ab+a=", "u=ab+a=c+u=d+a="]
    assert texts(chat=False) == ["ab", "u=ab+a=c+u=d+a="]
    assert texts(system="z") == ["s=z+u=ab+a=", "s=z+u=ab+a=c+u=d+a="]
    assert plain.encode("ab") == [4, 5]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "nothing": ({"file": None}, "", "--data.file: null is not allowed; give a JSONL, CSV or Parquet file"),
    "absent": ({"file": "no.jsonl"}, "", "--data.file: no.jsonl is not there"),
    "folder": ({"file": "."}, "", "--data.file: . is no ordinary file"),
    "kind": ({"name": "p.txt"}, "x", "is not read; give .jsonl (an object a line), .csv (with a header) or .parquet"),
    "json": ({}, '{"prompt": "a"}\n{"prompt"', "p.jsonl line 2 is no JSON"),
    "list": ({}, "[1]", "p.jsonl line 1 is no object"),
    "deep": ({}, "[" * 100_000, "p.jsonl line 1 is no JSON"),
    "empty": ({}, "\n", "p.jsonl has no rows"),
    "column": ({}, '{"text": "a"}', "line 1 has no 'prompt'; give --data.prompt, one of text"),
    "named": ({"prompt": "q"}, '{"prompt": "a"}', "line 1 has no 'q'; give --data.prompt, one of prompt"),
    "blank": ({}, '{"prompt": " "}', "line 1: prompt is neither a text nor messages"),
    "number": ({}, '{"prompt": 3}', "line 1: prompt is neither a text nor messages"),
    "messages": ({}, '{"messages": [{"role": "user"}]}', "line 1: messages is neither a text nor messages"),
    "fields": ({"name": "p.csv"}, "prompt\na,b\n", "p.csv row 1 has more fields than the header"),
    "reward": ({"reward": "exakt"}, '{"prompt": "a"}', "--data.reward: exakt is not allowed; did you mean 'exact'?"),
    "module": ({"reward": "no.f"}, '{"prompt": "a"}', "--data.reward: no module 'no'"),
    "function": ({"reward": "math.nothing"}, '{"prompt": "a"}', "--data.reward: 'math' has no function 'nothing'"),
    "value": ({"reward": "math.pi"}, '{"prompt": "a"}', "--data.reward: math.pi is no function"),
    "answer": ({}, '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "compares with answers, and row 2 of"),
    "null answer": ({"reward": "exact", "answer": "gold"}, '{"prompt": "a", "gold": null}', "has none in 'gold'; give"),
    "no arguments": ({"reward": "length"}, '{"prompt": "a"}', "--data.reward_arguments: {} is not allowed for length"),
    "two lengths": ({"reward": "length", "reward_arguments": {"target": 1, "limit": 2}}, '{"prompt": "a"}',
        "--data.reward_arguments: {'target': 1, 'limit': 2} is not allowed for length; give {target: N} or {limit: N}"),
    "length": ({"reward": "length", "reward_arguments": {"limit": -1}}, '{"prompt": "a"}',
        "--data.reward_arguments.limit: -1 is not allowed; give an integer >= 0"),
    "half a length": ({"reward": "length", "reward_arguments": {"target": 2.5}}, '{"prompt": "a"}',
        "--data.reward_arguments.target: 2.5 is not allowed"),
    "unit": ({"reward": "length", "reward_arguments": {"target": 1, "unit": "lines"}}, '{"prompt": "a"}',
        "--data.reward_arguments.unit: lines is not allowed; give characters or words"),
    "argument": ({"reward": "length", "reward_arguments": {"goal": 1}}, '{"prompt": "a"}',
        "--data.reward_arguments: {'goal': 1} is not allowed for length: got an unexpected keyword argument 'goal'"),
    "none taken": ({"reward": "exact", "reward_arguments": {"target": 1}}, '{"prompt": "a", "answer": "b"}',
        "--data.reward_arguments: {'target': 1} is not allowed for exact"),
    "longest": ({"longest": 0}, '{"prompt": "a"}', "--data.longest: 0 is not allowed"),
    "tokens": ({"tokens": "nowhere"}, '{"prompt": "a"}', "--data.tokens: nowhere is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_file_of_prompts_is_refused(name: str, tmp_path: Path) -> None:
    flags, content, said = WRONG[name]
    flags = dict(flags)
    path = tmp_path / flags.pop("name", "p.jsonl")
    path.write_text(content)
    with pytest.raises(ToyError) as caught:
        PromptData(**{"file": str(path), **flags})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong", "returned 1 numbers for 2 responses"),
        ("missing", "returned None; give finite"),
        ("failing", "fails: KeyError"),
    ],
)
def test_rewards_that_are_none_are_refused(function: str, said: str, tmp_path: Path) -> None:
    data = PromptData(write(tmp_path / "p.jsonl", [{"prompt": "a"}]), reward=f"{__name__}.{function}")
    with pytest.raises(ToyError, match=rf"^--data.reward: {re.escape(__name__)}.{function} {said}"):
        data.rewards(data.problems(0, 0, "x", 2), ["a", "b"])


def test_own_prompts_and_reward_are_probed_by_the_command_line(runner: Runner, tmp_path: Path) -> None:
    """Somebody's backbone, adapter, AdamW, prompts and reward, and no run of ours."""
    a_model("llama").save_pretrained(tmp_path / "base")
    a_tokenizer(tmp_path / "base")
    model = adapted(load_backbone(tmp_path / "base", torch.float32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    steps(model, optimizer)
    model.save_pretrained(tmp_path / "adapter")
    save_optimizer_state(optimizer, model, tmp_path / "adamw.pt")
    file = write(tmp_path / "p.jsonl", [{"prompt": p, "wanted": "abcdef"} for p in ("ab", "cd=", "ef+g")])
    flags = (
        *("--model.backbone", str(tmp_path / "base"), "--model.adapter", str(tmp_path / "adapter")),
        *(
            "--model.optimizer_state",
            str(tmp_path / "adamw.pt"),
            "--model.plan.prompts",
            "2",
            "--model.plan.group",
            "3",
        ),
        *("--model.plan.eval_prompts", "4", "--model.plan.etas", "[0.001]", "--model.eval_prompts", "4"),
        *("--data", "PromptData", "--data.file", file, "--data.reward", f"{__name__}.letters", "--data.longest", "8"),
        *("--model.loss", "dapo", "--model.scale_rewards", "group"),
    )
    entropy = Runner(runner.root, runner.capture, "update_entropy", ())
    said = entropy.ok("test", "smollm2", *flags, *QUIET)
    assert "dH/d eta" in said
    assert "the loss that the step is of: dapo" in said
    (found,) = entropy.folder("smollm2").glob("probe/seed_0/sequences.csv")
    with found.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6
    for row in rows:
        assert row["prompt"] in ("ab", "cd=", "ef+g")
        assert float(row["reward"]) == sum(c in "abcdef" for c in row["response"])
    code, err = entropy.code("test", "smollm2", *flags, "--data.file", "nowhere.jsonl", "--run.name", "x")
    assert code == 2
    assert "--data.file: nowhere.jsonl is not there" in err
    (tmp_path / "trainer_state.json").write_text('{"global_step": 4}')
    (tmp_path / "adapter" / "trainer_state.json").write_text('{"global_step": 2}')
    code, err = entropy.code("test", "smollm2", *flags, "--run.name", "y")
    assert code == 2
    assert "adamw.pt is of step 4, and --model.adapter" in err
