"""The addition task, its tokens, and the tiny policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.policy import TinyPolicy, is_adapter
from lightning_toys.update_entropy.task import Addition, CharacterTokenizer, Problem


def test_the_specified_example() -> None:
    task = Addition()
    problem = task.problem(37, 45)
    assert problem == Problem("37+45=", "082")
    assert task.worked_solution(problem) == "7+5=12,3+4+1=08;082"
    tokens = CharacterTokenizer(task.symbols)
    assert tokens.vocab_size == 17
    assert tokens.decode([1, *tokens.encode("7+5=12;"), tokens.eos_token_id]) == "7+5=12;"


@pytest.mark.parametrize("digits", [1, 2, 3, 5])
def test_right_solutions_earn_the_reward(digits: int) -> None:
    task, g = Addition(digits, slips=0.0), np.random.default_rng(0)
    for problem in task.problems(g, 200):
        a, b = (int(x) for x in problem.prompt.rstrip("=").split("+"))
        assert int(problem.answer) == a + b
        solution = task.solution(problem, g)
        assert len(solution) + 1 == task.max_solution_length
        assert task.reward(problem, solution) == 1
        assert task.reward(problem, solution[:-1]) == 0
        assert task.reward(problem, solution + "0") == 0


def test_slips_are_as_many_as_asked_for_and_follow_through() -> None:
    task, g = Addition(2, slips=0.2), np.random.default_rng(1)
    problems = task.problems(g, 5000)
    solutions = [task.solution(p, g) for p in problems]
    wrong = [s for p, s in zip(problems, solutions, strict=True) if s != task.worked_solution(p)]
    assert len(wrong) / 5000 == pytest.approx(0.2, abs=0.02)
    assert {len(s) for s in solutions} == {task.max_solution_length - 1}
    problem = task.problem(37, 45)
    assert task.worked_solution(problem, 0, "sum", 1) == "7+5=13,3+4+1=08;083"
    assert task.worked_solution(problem, 1, "carry") == "7+5=12,3+4+0=07;072"  # the carry forgotten
    assert task.worked_solution(problem, 1, "sum", -1) == "7+5=12,3+4+1=07;072"
    for s in solutions:
        lines, _, result = s.partition(";")
        assert result[1:] == "".join(line[-1] for line in reversed(lines.split(",")))


@pytest.mark.parametrize("response", ["", "082", ";082", "7+5=12;82", "7+5=12,3+4+1=08;082;", "7+5=12,3+4+1=08,082"])
def test_what_is_no_answer_earns_nothing(response: str) -> None:
    assert Addition().reward(Problem("37+45=", "082"), response) == 0


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(ToyError, match=r"--data.digits: 0 is not allowed"):
        Addition(0)
    with pytest.raises(ToyError, match=r"--data.slips: 1.5"):
        Addition(2, 1.5)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_policy_is_a_function_of_its_seed(family: str) -> None:
    spec = TinyPolicy(family, hidden=16, layers=2, heads=2)  # type: ignore[arg-type]
    torch.manual_seed(1)
    one = spec.build(3, 17, 32).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two, other = spec.build(3, 17, 32).state_dict(), spec.build(4, 17, 32).state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    del state


def test_the_adapter_starts_at_nothing_and_is_what_is_trained() -> None:
    model = TinyPolicy(hidden=16, layers=2, heads=2, lora_rank=4).build(0, 17, 32).eval()
    ids = torch.randint(3, 17, (2, 9))
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():  # type: ignore[operator]
            plain = model(input_ids=ids).logits
    assert torch.equal(adapted, plain)
    names = [n for n, _ in model.named_parameters()]
    adapters = [n for n in names if is_adapter(n)]
    # seven linear maps a block, A and B each; not the head
    assert len(adapters) == 2 * 7 * 2
    assert not any("lm_head" in n for n in adapters)


def test_the_shipped_size() -> None:
    """About 200 thousand parameters and an adapter, as specified."""
    model = TinyPolicy().build(0, 17, 64)
    sizes = {
        kind: sum(p.numel() for n, p in model.named_parameters() if is_adapter(n) == kind) for kind in (False, True)
    }
    assert 150_000 < sizes[False] < 250_000
    assert 20_000 < sizes[True] < 50_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"hidden": 0}, "--model.policy.hidden: 0"),
        ({"heads": 3}, "--model.policy.heads: 3"),
        ({"lora_rank": -1}, "--model.policy.lora_rank: -1"),
        ({"lora_dropout": 1.0}, "--model.policy.lora_dropout: 1.0"),
    ],
)
def test_impossible_policies_are_refused(flags: dict[str, float], said: str) -> None:
    with pytest.raises(ToyError, match=said):
        TinyPolicy(**flags)  # type: ignore[arg-type]
