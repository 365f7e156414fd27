"""A step beside others of its size, measured on the moved policies' own responses; rewards permuted within prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.adamw import Tensors, norm
from lightning_toys.update_entropy.controls import measure_controls, moved_by, paired_change, random_signs
from lightning_toys.update_entropy.data import ArithmeticData
from lightning_toys.update_entropy.derivatives import perturbed, trainable_parameters
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.policy import TinyPolicy
from lightning_toys.update_entropy.rollouts import generate, uniforms
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.training import permuted_within_prompts, sample_rollouts
from tests.update_entropy.test_objective import TEMPERATURE, a_policy

PLAN = Plan(etas=[0.1, 0.2], controls=3)


def a_direction(theta: Tensors) -> Tensors:
    g = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=g).to(p) for n, p in theta.items()}


def test_the_changes_are_exact_where_one_token_is_sampled() -> None:
    """The first token's entropy depends on no draw: H is the mean over prompts, at any weights."""
    model = a_policy()
    theta = trainable_parameters(model)
    v, before = a_direction(theta), {n: p.clone() for n, p in theta.items()}
    prompts = [[3], [4, 5], [6, 3, 4], [5]]

    def sample(length: int = 1) -> Sequences:
        return generate(model, prompts, range(4), uniforms(0, 0, "x", range(4), length), [2], TEMPERATURE)

    def exact(eta: float, d: Tensors) -> float:
        one = Sequences(prompts, [[7]] * 4, [0, 1, 2, 3])
        moved = evaluate(model, one, TEMPERATURE, perturbed(theta, d, eta)).entropy.mean()
        return float(moved - evaluate(model, one, TEMPERATURE).entropy.mean())

    found = measure_controls(model, v, sample, PLAN, 5, TEMPERATURE)
    assert list(found.changes) == ["step", "reversed", "random_0", "random_1", "random_2"]
    assert found.responses == 4
    for eta in PLAN.etas:
        assert found.changes["step"][eta].value == pytest.approx(exact(eta, v), rel=1e-10)
        assert found.changes["reversed"][eta].value == pytest.approx(exact(-eta, v), rel=1e-10)
        for k in range(3):
            d = random_signs(v, 5, k)
            assert found.changes[f"random_{k}"][eta].value == pytest.approx(exact(eta, d), rel=1e-10)
    assert found.random(0.1) == [found.changes[f"random_{k}"][0.1].value for k in range(3)]
    assert len({round(x.value, 9) for by in found.changes.values() for x in by.values()}) == 10
    assert all(torch.equal(p, before[n]) for n, p in trainable_parameters(model).items())
    # longer responses are sampled from the moved policy
    longer = measure_controls(model, v, lambda: sample(4), replace(PLAN, etas=[1.0], controls=1), 5, TEMPERATURE)
    start, base = sample(4), evaluate(model, sample(4), TEMPERATURE)
    with moved_by(model, v, 1.0):
        there = sample(4)
        after = evaluate(model, there, TEMPERATURE)
    assert there.responses != start.responses
    h = float(after.entropy.sum() / after.mask.sum() - base.entropy.sum() / base.mask.sum())
    assert longer.changes["step"][1.0].value == pytest.approx(h, rel=1e-12)


def test_weights_come_back_whatever_happens() -> None:
    model = a_policy()
    theta = trainable_parameters(model)
    before, v = {n: p.clone() for n, p in theta.items()}, a_direction(theta)
    with moved_by(model, v, 0.3):
        for n, p in perturbed(before, v, 0.3).items():
            torch.testing.assert_close(theta[n], p, rtol=1e-14, atol=1e-14)
    with pytest.raises(ZeroDivisionError), moved_by(model, v, 0.3):
        raise ZeroDivisionError
    assert all(torch.equal(p, before[n]) for n, p in trainable_parameters(model).items())


def test_random_directions_are_as_long_in_every_element() -> None:
    v = {"a": torch.linspace(-1, 2, 1000), "b": torch.ones(3, 500)}
    found = [random_signs(v, 0, k) for k in (0, 1)]
    for d in found:
        assert all(torch.equal(d[n].abs(), v[n].abs()) for n in v)
        assert norm(d) == norm(v)
        flipped = torch.cat([(d[n] != v[n]).flatten() for n in v]).double().mean()
        assert 0.45 < float(flipped) < 0.55  # 2500 coins: 4.9 standard deviations
    assert not torch.equal(found[0]["b"], found[1]["b"])
    assert torch.equal(found[0]["b"], random_signs(v, 0, 0)["b"])
    assert not torch.equal(found[0]["b"], random_signs(v, 1, 0)["b"])


def test_the_error_of_a_paired_change() -> None:
    """The same responses before and after: no change, no error; else the error of the prompts' differences."""
    model = a_policy()
    prompts = [[3 + i % 4] for i in range(40)]
    u = uniforms(0, 0, "x", range(40), 1)
    one = generate(model, prompts, range(40), u, [2], TEMPERATURE)
    base = evaluate(model, one, TEMPERATURE)
    same = paired_change(base, base, "token")
    assert (same.value, same.se) == (0.0, 0.0)
    theta = trainable_parameters(model)
    moved = evaluate(model, one, TEMPERATURE, perturbed(theta, a_direction(theta), 0.2))
    d = (moved.entropy - base.entropy).sum(1).numpy()
    assert paired_change(base, moved, "token").se == pytest.approx(d.std(ddof=1) / 40**0.5, rel=1e-9)


def test_controls_are_counted() -> None:
    with pytest.raises(ToyError, match=r"--model\.plan\.controls: -1 is not allowed"):
        Plan(controls=-1)


def test_rewards_are_permuted_within_prompts() -> None:
    rewards = np.random.default_rng(0).random(24).tolist()
    index = [3] * 8 + [0] * 8 + [5] * 8
    found = permuted_within_prompts(rewards, index, 1, 2, "train")
    assert found != rewards
    for k in (0, 8, 16):
        assert sorted(found[k : k + 8]) == sorted(rewards[k : k + 8])
        alone = permuted_within_prompts(rewards[k : k + 8], index[k : k + 8], 1, 2, "train")
        assert alone == found[k : k + 8]  # whoever has the prompt's responses
    changed: list[Callable[[], list[float]]] = [
        lambda: permuted_within_prompts(rewards, index, 2, 2, "train"),
        lambda: permuted_within_prompts(rewards, index, 1, 3, "train"),
        lambda: permuted_within_prompts(rewards, index, 1, 2, "update"),
    ]
    assert all(f() != found for f in changed)
    # reward and response have nothing in common any more: over many steps each place is as likely
    places = [permuted_within_prompts([0.0, 1.0, 2.0, 3.0], [7] * 4, 0, s, "x").index(3.0) for s in range(2000)]
    assert np.bincount(places, minlength=4).min() > 400


def test_permuted_rollouts_are_the_same_responses() -> None:
    data = ArithmeticData(digits=1)
    positions = data.max_prompt_length + data.max_response_length + 4
    model = TinyPolicy(hidden=16, layers=1, heads=2, lora_rank=2).build(0, data.tokenizer.vocab_size, positions)
    data.rewards = lambda problems, responses: [float(i) for i in range(len(responses))]  # type: ignore[method-assign]
    plain, permuted = (
        sample_rollouts(model, data, 0, 4, "train", range(3), 4, 1.0, 3, None, permute) for permute in (False, True)
    )
    assert plain.responses == permuted.responses
    assert plain.rewards == list(range(12))
    assert permuted.rewards != plain.rewards
    assert [sorted(permuted.rewards[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
