"""The reward's change beside the entropy's: derivatives by differences, estimates by every sequence there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from lightning_toys.update_entropy.adamw import dot
from lightning_toys.update_entropy.attribution import token_influences
from lightning_toys.update_entropy.derivatives import (
    perturbed,
    score_jvp,
    trainable_parameters,
    weighted_gradient,
)
from lightning_toys.update_entropy.estimators import clustered_standard_error
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.objective import Objective
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.probe import probe
from lightning_toys.update_entropy.reward_change import reward_change, reward_derivative, reward_weights
from tests.update_entropy.test_low_memory import evaluation_batch
from tests.update_entropy.test_objective import TEMPERATURE, a_batch, a_policy, a_state, an_update

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def rewarded(model: Any) -> Any:
    found = evaluation_batch(model)
    return replace(found, rewards=[float(r.count(4)) + 0.3 * len(r) for r in found.responses])


def test_the_derivative_is_that_of_the_measured_change() -> None:
    model = a_policy()
    evaluation, theta = rewarded(model), trainable_parameters(model)
    g = torch.Generator().manual_seed(2)
    v = {n: torch.randn(p.shape, generator=g).to(p) for n, p in theta.items()}
    scores = evaluate(model, evaluation, TEMPERATURE)
    slope = reward_derivative(scores, score_jvp(model, evaluation, v, TEMPERATURE)[0], evaluation.rewards)
    ends = [
        reward_change(scores, evaluate(model, evaluation, TEMPERATURE, perturbed(theta, v, e)), evaluation.rewards)
        for e in (1e-5, -1e-5)
    ]
    assert slope.value == pytest.approx((ends[0].change.value - ends[1].change.value) / 2e-5, rel=1e-6)
    difference = (ends[0].change.influence - ends[1].change.influence) / 2e-5
    assert slope.se == pytest.approx(clustered_standard_error(difference, scores.prompt_index)[0], rel=1e-5)
    assert float(slope.contributions.sum()) == pytest.approx(slope.value)
    h = weighted_gradient(model, evaluation, reward_weights(scores, evaluation.rewards), None, TEMPERATURE)
    assert dot(h, v) == pytest.approx(slope.value, rel=1e-9)
    assert abs(slope.value) > 1e-3


def test_the_expected_change_is_the_truth() -> None:
    """One token, three of them, all outcomes counted by their probabilities: J is a sum, its change is known."""
    from lightning_toys.update_entropy.estimators import Scores

    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.2, 0.4], dtype=torch.float64)
    r = [1.0, 0.0, 3.0]
    counts = (5, 3, 2)  # of ten responses, as many as their probabilities say
    rows = [i for i, n in enumerate(counts) for _ in range(n)]
    one = torch.ones(10, 1, dtype=torch.float64)
    base, moved = (Scores(x[rows].log().unsqueeze(1), 0 * one, one, torch.arange(10)) for x in (p, q))
    found = reward_change(base, moved, [r[i] for i in rows])
    assert found.entropy == pytest.approx(float(sum(a * b for a, b in zip(q.tolist(), r, strict=True))))
    assert found.change.value == pytest.approx(found.entropy - 1.1)


def test_a_probe_has_both() -> None:
    model = a_policy()
    batch, evaluation = replace(a_batch(model), old_logp=[]), rewarded(model)
    plan = Plan(etas=[1e-3], counterfactuals=False, second_order=False, tf_batch_size=4, grad_chunk_size=4)
    result = probe(model, batch, [evaluation], a_state(trainable_parameters(model)), plan, 0.5, TEMPERATURE)
    (e,) = result.evaluations
    assert e.reward is not None
    update = an_update(model, batch, Objective())
    scores = evaluate(model, evaluation, TEMPERATURE)
    for name, v in (("full", update.step.direction), ("momentum", update.step.momentum), ("decay", update.step.decay)):
        one = reward_derivative(scores, score_jvp(model, evaluation, v, TEMPERATURE)[0], evaluation.rewards)
        assert e.reward.slopes[name] == pytest.approx((one.value, one.se), rel=1e-8)
    h = weighted_gradient(model, evaluation, reward_weights(scores, evaluation.rewards), None, TEMPERATURE)
    tokens = token_influences(model, update, h, TEMPERATURE)
    torch.testing.assert_close(e.reward.tokens, tokens, rtol=1e-8, atol=1e-12)
    alone = [dot(h, v) for v in update.sequence_directions()]
    assert e.reward.tokens.sum(1).tolist() == pytest.approx(alone, rel=1e-8)
    moved = evaluate(
        model, evaluation, TEMPERATURE, perturbed(trainable_parameters(model), update.step.direction, 1e-3)
    )
    assert e.reward.changes[1e-3].change.value == pytest.approx(
        reward_change(scores, moved, evaluation.rewards).change.value, rel=1e-8
    )
    without = probe(
        model, batch, [replace(evaluation, rewards=[])], a_state(trainable_parameters(model)), plan, 0.5, TEMPERATURE
    )
    assert without.evaluations[0].reward is None
