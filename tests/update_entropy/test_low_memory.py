"""A probe that keeps no sequence's gradient gives the numbers of one that keeps them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from lightning_toys.update_entropy import entropy_derivatives, update
from lightning_toys.update_entropy.derivatives import score_second_jvp, trainable_parameters, weighted_gradient
from lightning_toys.update_entropy.entropy_derivatives import (
    ForwardEntropyDerivatives,
    Sharding,
    sequence_entropy_gradients,
)
from lightning_toys.update_entropy.objective import Objective
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.probe import probe
from lightning_toys.update_entropy.probe_result import ProbeResult
from lightning_toys.update_entropy.rollouts import generate, uniforms
from lightning_toys.update_entropy.sequences import Sequences, pad_batch, policy_scores
from tests.update_entropy.test_objective import TEMPERATURE, a_batch, a_policy, a_state, objective

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PLAN = Plan(etas=[1e-3, 1e-2], clip_cov_share=0.2, kl_cov_share=0.2, tf_batch_size=3, grad_chunk_size=3)


def evaluation_batch(model: Any) -> Sequences:
    prompts = [[3 + i % 4] for i in range(10)]
    return generate(model, prompts, [i % 4 for i in range(10)], uniforms(0, 0, "E", range(10), 5), [2], TEMPERATURE)


def flat(result: ProbeResult) -> dict[str, torch.Tensor]:
    """Every number of a probe."""
    (e,) = result.evaluations
    assert e.curvature is not None
    assert e.leave_one_out is not None
    out = {
        "norms": list(result.norms.values()), "tokens": result.token_influences, "cov": result.covariances,
        "matrix": e.influence_matrix, "influences": e.sequence_influences[0], "errors": e.sequence_influences[1],
        "slopes": [x for pair in e.derivatives.values() for x in pair], "slope": e.slope.influence,
        "curvature": [e.curvature.value, e.curvature.se], "without": e.leave_one_out[0],
        "u": list(e.update_se.values()),
        "others": [x for pair in e.counterfactuals.values() for x in pair], "without_se": e.leave_one_out[1],
        "changes": [w.change.value for by_eta in e.changes.values() for w in by_eta.values()],
        "each": [[w.change.value for w in ws] for ws in e.sequence_changes.values()],
    }  # fmt: skip
    return {n: torch.as_tensor(x, dtype=torch.float64) for n, x in out.items()}


@pytest.mark.parametrize("case", [pytest.param("plain", marks=pytest.mark.slow), "penalties"])
def test_the_numbers_are_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_policy()
    batch, evaluation = a_batch(model), evaluation_batch(model)
    o = objective("dapo") if case == "penalties" else Objective()
    batch = batch if case == "penalties" else replace(batch, old_logp=[])
    state = a_state(trainable_parameters(model))

    def run(keep: bool) -> ProbeResult:
        plan = replace(PLAN, keep_gradients=keep)
        return probe(model, batch, [evaluation], state, plan, 0.5, TEMPERATURE, objective=o)

    kept = flat(run(True))

    def none(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("gradients of all sequences at once")

    for module in (entropy_derivatives, update):
        monkeypatch.setattr(module, "sequence_gradients", none)
    anew = flat(run(False))
    assert set(anew) == set(kept)
    for name, values in kept.items():
        assert values.numel() > 0
        assert bool(torch.isfinite(values).all()), name
        size = float(values.abs().max())
        torch.testing.assert_close(anew[name], values, rtol=1e-7, atol=1e-9 * size, msg=lambda m, n=name: f"{n}: {m}")
    if case == "plain":
        with pytest.raises(AssertionError, match="at once"):
            run(True)


def test_a_gradient_leaves_the_model_alone() -> None:
    """Nothing is put into its gradients, no hook of its parameters hears of it, and parts add up to the whole."""
    model = a_policy()
    batch = a_batch(model)
    heard: list[str] = []
    marked = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for n, p in marked.items():
        p.register_hook(lambda g, n=n: heard.append(n))  # type: ignore[misc]
        p.grad = torch.full_like(p, 3.0)
    weights = torch.rand(len(batch), max(batch.lengths), generator=torch.Generator().manual_seed(2)).double()
    whole = weighted_gradient(model, batch, weights, weights.sqrt(), TEMPERATURE, 64)
    parts = weighted_gradient(model, batch, weights, weights.sqrt(), TEMPERATURE, 2)
    logp, h = policy_scores(model, pad_batch(batch), TEMPERATURE)
    value = (weights * logp + weights.sqrt() * h).sum()
    assert all(bool((p.grad == 3.0).all()) for p in marked.values() if p.grad is not None)
    assert heard == []
    by_hand = dict(zip(marked, torch.autograd.grad(value, list(marked.values())), strict=True))
    assert len(heard) == len(marked) > 0  # the hooks do hear of a gradient of the parameters themselves
    for n, g in by_hand.items():
        torch.testing.assert_close(whole[n], g, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(parts[n], g, rtol=1e-9, atol=1e-13)
        assert not whole[n].requires_grad


@pytest.mark.parametrize("kind", ["token", "sequence", "surprisal"])
def test_any_direction_with_its_error(kind: Any) -> None:
    model = a_policy()
    evaluation = evaluation_batch(model)
    kept = sequence_entropy_gradients(model, evaluation, kind, TEMPERATURE, 4)
    anew = ForwardEntropyDerivatives(model, evaluation, kind, TEMPERATURE, 4)
    theta = trainable_parameters(model)
    g = torch.Generator().manual_seed(1)
    directions = [{n: torch.randn(p.shape, generator=g).to(p) for n, p in theta.items()} for _ in range(3)]
    directions[1].pop(next(iter(theta)))  # what a direction lacks does not move
    for a, b in zip(
        kept.directional_derivatives(directions), anew.directional_derivatives(iter(directions)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    a, b = kept.entropy_gradient, anew.entropy_gradient
    for name in theta:
        torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-12)
    one, two = (x.directional_derivative(directions[0]) for x in (kept, anew))
    torch.testing.assert_close(one.influence, two.influence, rtol=1e-8, atol=1e-12)
    assert one.se == pytest.approx(two.se, rel=1e-8)
    assert one.se > 0


@pytest.mark.parametrize("world_size", [2, 12])
def test_processes_share_out_the_sequences(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes' parts, summed, are one process's numbers; of twelve, two have none of the ten sequences."""
    model = a_policy()
    evaluation = evaluation_batch(model)
    whole = ForwardEntropyDerivatives(model, evaluation, "token", TEMPERATURE, 4)
    monkeypatch.setattr(Sharding, "all_reduce", lambda self, part: part)
    theta = trainable_parameters(model)
    v = {n: torch.ones_like(p) for n, p in theta.items()}
    ranks = range(world_size)
    parts = [
        ForwardEntropyDerivatives(model, evaluation, "token", TEMPERATURE, 4, whole.scores, Sharding(rank, world_size))
        for rank in ranks
    ]
    assert [len(p.part) for p in parts] == [len(range(rank, 10, world_size)) for rank in ranks]
    kept = sequence_entropy_gradients(model, evaluation, "token", TEMPERATURE, 4, whole.scores, Sharding(1, 2))
    one = whole.products([v])
    for k in (0, 1):
        total = sum(p.products([v])[k] for p in parts)
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(total, one[k], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(kept.products([v])[0][1::2], one[0][1::2], rtol=1e-8, atol=1e-12)
    # the pieces of a probe that are shared out in the same way
    part = evaluation.take(Sharding(world_size - 1, world_size).local_rows(10))
    first, second = score_second_jvp(model, part, v, TEMPERATURE, 4)
    assert [len(x) for x in (*first, *second)] == [len(part)] * 4
