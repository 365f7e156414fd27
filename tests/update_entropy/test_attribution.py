"""Influences on a step's entropy change: one pass for all against one pass for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Tensors, dot, norm, read_state
from lightning_toys.update_entropy.attribution import (
    clip_cov,
    covariances,
    first_order_influences,
    kl_cov,
    token_influences,
)
from lightning_toys.update_entropy.cache import fingerprint
from lightning_toys.update_entropy.derivatives import (
    entropy_gradient,
    perturbed,
    score_jvp,
    trainable_parameters,
    weighted_gradient,
)
from lightning_toys.update_entropy.entropy_derivatives import sequence_entropy_gradients
from lightning_toys.update_entropy.estimators import EntropyKind, entropy_derivative
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.grpo import (
    ClipRange,
    advantages,
    leave_one_out,
    nonzero_advantage_prompts,
    token_normalization,
)
from lightning_toys.update_entropy.objective import Objective
from lightning_toys.update_entropy.policy import TinyPolicy, is_adapter
from lightning_toys.update_entropy.rollouts import generate, uniforms
from lightning_toys.update_entropy.sequences import Sequences, pad_batch, policy_scores
from lightning_toys.update_entropy.task import Addition, CharacterTokenizer
from lightning_toys.update_entropy.update import Update, make_update

TASK = Addition()
TOKENS = CharacterTokenizer(TASK.symbols)
MAX_NORM = 0.5


def rollouts(model: nn.Module, prompts: int, group: int, step: int) -> Sequences:
    g = np.random.default_rng(step)
    problems = [p for p in TASK.problems(g, prompts) for _ in range(group)]
    u = uniforms(0, step, "test", range(len(problems)), 12)
    numbers = [i // group for i in range(len(problems))]
    found = generate(model, [TOKENS.encode(p.prompt) for p in problems], numbers, u, [TOKENS.eos_token_id])
    rewards = [float(len(r) % 3 == 0) + 0.1 * r.count(7) for r in found.responses]
    return Sequences(found.prompts, found.responses, found.prompt_index, rewards)


def policy(adapter: bool, dtype: torch.dtype) -> nn.Module:
    """A policy of some entropy, its adapter not at its initial value."""
    model = TinyPolicy("gpt2", hidden=16, layers=2, heads=2, lora_rank=4 if adapter else 0, lora_dropout=0.3 * adapter)
    net = model.build(0, TOKENS.vocab_size, 32).to(dtype)
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        p.data += 0.15 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
        p.requires_grad_(is_adapter(name) == adapter)
    return net


def stepped(model: nn.Module) -> AdamWState:
    """AdamW's state after three steps of policy gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for k in range(3):
        batch = rollouts(model, 3, 4, k)
        gradient = weighted_gradient(model, batch, -Objective().token_weights(batch, max(batch.lengths)))
        for name, p in model.named_parameters():
            if name in gradient:
                p.grad = gradient[name]
        optimizer.step()
    return read_state(optimizer, model.named_parameters())


CASES = [(True, torch.float64), (False, torch.float64), (True, torch.float32)]


@pytest.fixture(scope="module", params=CASES, ids=["lora-64", "full-64", "lora-32"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Update, Sequences, float]:
    adapter, dtype = request.param
    model = policy(adapter, dtype)
    state = stepped(model)
    model.train()  # dropout is configured on, and must change nothing
    update = make_update(model, rollouts(model, 4, 4, 50), state, MAX_NORM, chunk=5)
    return model, update, rollouts(model, 12, 2, 60), 1e-9 if dtype == torch.float64 else 1e-5


Case = tuple[nn.Module, Update, Sequences, float]


def test_the_step_is_the_optimisers_own(case: Case) -> None:
    """The loss as it is trained with, autograd, torch's clipping, torch's AdamW."""
    model, update, _, tolerance = case
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.AdamW(list(named.values()), lr=1e-3)
    for name, p in named.items():
        m = update.state.moments[name]
        optimizer.state[p] = {
            "step": torch.tensor(float(m.step)),
            "exp_avg": m.exp_avg.clone(),
            "exp_avg_sq": m.exp_avg_sq.clone(),
        }
    model.eval()
    packed = pad_batch(update.sequences)
    logp, _ = policy_scores(model, packed)
    batch = update.sequences
    value, outside = Objective().value(logp, logp.detach(), packed.mask, advantages(batch), token_normalization(batch))
    optimizer.zero_grad()
    value.backward()
    assert float(outside) == 0
    nn.utils.clip_grad_norm_(list(named.values()), MAX_NORM)
    optimizer.step()
    taken = {n: (p.detach() - before[n]).double() / 1e-3 for n, p in named.items()}
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(before[n])
    v = {n: x.double() for n, x in update.step.direction.items()}
    assert dot(v, taken) / (norm(v) * norm(taken)) > 1 - max(1e-9, tolerance**1.5)
    assert norm(v) == pytest.approx(norm(taken), rel=max(1e-8, 10 * tolerance))
    model.train()


def test_merging_the_adapter_changes_nothing(case: Case) -> None:
    """Passes without derivatives merge it into the base matrices; those with derivatives run it beside them."""
    model, update, evaluation, tolerance = case
    for parameters in (None, perturbed(trainable_parameters(model), update.step.direction, 0.01)):
        merged = evaluate(model, evaluation, parameters=parameters)
        model.eval()
        with torch.no_grad():
            packed = pad_batch(evaluation)
            logp, h = policy_scores(model, packed, parameters=parameters)
        model.train()
        assert torch.allclose(merged.logp, logp, atol=10 * tolerance)
        assert torch.allclose(merged.entropy, h, atol=10 * tolerance)
    assert not torch.equal(evaluate(model, evaluation).logp, merged.logp)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_on_a_tied_head_runs_beside_it() -> None:
    """Merged into the head it would have changed the embedding, whose matrix the head has."""
    peft = pytest.importorskip("peft")
    base = TinyPolicy(hidden=16, layers=1, heads=2, lora_rank=0).build(0, TOKENS.vocab_size, 24)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    assert model.get_output_embeddings().base_layer.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    sequences = rollouts(model, 2, 2, 1)
    here = evaluate(model, sequences)
    model.eval()
    with torch.no_grad():
        logp, h = policy_scores(model, pad_batch(sequences))
    assert torch.allclose(here.logp, logp, atol=1e-4)
    assert torch.allclose(here.entropy, h, atol=1e-4)
    head = next(n for n, _ in model.named_parameters() if "lm_head.lora_B" in n)
    assert not torch.equal(
        evaluate(model, sequences, parameters={head: torch.zeros(TOKENS.vocab_size, 2)}).logp, here.logp
    )


def test_the_parts_sum_to_the_step(case: Case) -> None:
    _, update, _, tolerance = case
    assert update.residual() < max(1e-6 if tolerance > 1e-6 else 1e-12, 0)


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("kind", ["token", "sequence", "surprisal"])
def test_one_backward_pass_gives_the_influence_of_every_sequence_and_token(
    case: Case, kind: EntropyKind, chunk: int
) -> None:
    model, update, evaluation, tolerance = case
    found = first_order_influences(model, update, evaluation, kind, chunk=chunk)
    scores = evaluate(model, evaluation)
    alone = [
        entropy_derivative(scores, *score_jvp(model, evaluation, v), kind).value for v in update.sequence_directions()
    ]
    size = max(abs(a) for a in alone)
    assert found.sequences.tolist() == pytest.approx(alone, rel=tolerance, abs=tolerance * size)
    assert len({round(a / size, 6) for a in alone}) > 8  # of every size
    for part, influence in ((update.step.momentum, found.momentum), (update.step.decay, found.decay)):
        assert entropy_derivative(scores, *score_jvp(model, evaluation, part), kind).value == pytest.approx(
            influence, rel=10 * tolerance, abs=tolerance * size
        )
    whole = found.momentum + found.decay + float(found.sequences.sum())
    assert whole == pytest.approx(found.total, rel=1e3 * tolerance, abs=10 * tolerance * size)
    _, h = entropy_gradient(model, evaluation, kind)
    tokens = token_influences(model, update, h).sum(1)
    assert tokens.tolist() == pytest.approx(found.sequences.tolist(), rel=tolerance, abs=tolerance * size)


def test_a_tokens_influence_is_that_of_its_own_gradient(case: Case) -> None:
    model, update, evaluation, tolerance = case
    _, h = entropy_gradient(model, evaluation)
    tokens = token_influences(model, update, h)
    size = float(tokens.abs().max())
    for i, k in ((0, 0), (3, 2), (9, 1)):
        only = torch.zeros_like(update.weights)
        only[i, k] = update.weights[i, k]
        v = update.step.precondition(weighted_gradient(model, update.sequences, -only))
        assert float(tokens[i, k]) == pytest.approx(dot(h, v), rel=10 * tolerance, abs=tolerance * size)


def test_sequence_gradients_give_every_directional_derivative_with_its_error(case: Case) -> None:
    model, update, evaluation, tolerance = case
    gradients = sequence_entropy_gradients(model, evaluation, chunk=5)
    directions: list[Tensors] = [update.step.direction, *list(update.sequence_directions())[:3]]
    rows, values, errors = gradients.directional_derivatives(directions)
    for j, v in enumerate(directions):
        one = entropy_derivative(gradients.scores, *score_jvp(model, evaluation, v))
        size = float(one.contributions.abs().max())
        assert float(values[j]) == pytest.approx(one.value, rel=tolerance, abs=10 * tolerance * size)
        assert float(errors[j]) == pytest.approx(one.se, rel=100 * tolerance)
        assert rows[:, j].tolist() == pytest.approx(
            one.contributions.tolist(), rel=tolerance, abs=10 * tolerance * size
        )


def test_without_a_sequence_everything_is_recomputed(case: Case) -> None:
    model, update, _, tolerance = case
    for row in (0, 6):
        rest, _ = leave_one_out(update.sequences, row)
        anew = make_update(model, rest, update.state, MAX_NORM)
        ours = update.step_without([row], trainable_parameters(model))
        difference = {n: ours.direction[n] - v for n, v in anew.step.direction.items()}
        assert norm(difference) < 100 * tolerance * norm(anew.step.direction)
        assert ours.clip_scale == pytest.approx(anew.step.clip_scale, rel=tolerance)
        # and that is not what is left when its part at fixed D and c is taken away
        fixed = {n: update.step.direction[n] - v for n, v in update.sequence_direction(row).items()}
        apart = {n: fixed[n] - ours.direction[n] for n in fixed}
        assert norm(apart) > 0.01 * norm(ours.direction)


def test_other_states_from_the_same_gradient(case: Case) -> None:
    model, update, _, tolerance = case
    theta = trainable_parameters(model)
    same = update.step_with_state(update.state, theta)
    assert norm({n: same.direction[n] - v for n, v in update.step.direction.items()}) == 0
    still = update.step_with_state(update.state.without_momentum(), theta)
    rest = {n: update.step.direction[n] - update.step.momentum[n] - v for n, v in still.direction.items()}
    assert norm(rest) < 10 * tolerance * norm(still.direction)
    other = update.step_with_state(update.state.with_hyperparameters(betas=(0.5, 0.9)), theta)
    assert norm({n: other.direction[n] - v for n, v in update.step.direction.items()}) > 0.01 * norm(other.direction)
    assert isinstance(other, AdamWStep)


# Dr. GRPO


def a_batch() -> Sequences:
    return Sequences(
        [[3]] * 5, [[5, 2], [5, 5, 5, 2], [2], [4, 4, 2], [4, 2]], [0, 0, 0, 7, 7], [1.0, 0.0, 0.5, 1.0, 1.0]
    )


def test_advantages_and_normalization_by_hand() -> None:
    batch = a_batch()
    assert advantages(batch).tolist() == pytest.approx([0.5, -0.5, 0, 0, 0])
    # 1 / (B G Lmax): B = 2; G = 3, Lmax = 4; G = 2, Lmax = 3
    assert token_normalization(batch).tolist() == pytest.approx([1 / 24] * 3 + [1 / 12] * 2)
    assert Objective().token_weights(batch, 4)[:2].tolist() == [
        pytest.approx([0.5 / 24, 0.5 / 24, 0, 0]), pytest.approx([-0.5 / 24] * 4),
    ]  # fmt: skip
    assert nonzero_advantage_prompts(batch) == [0]


def test_the_loss_by_hand_and_its_clipping() -> None:
    batch = a_batch()
    mask = torch.zeros(5, 4, dtype=torch.float64)
    for i, n in enumerate(batch.lengths):
        mask[i, :n] = 1
    old = torch.zeros(5, 4, dtype=torch.float64)
    new = old.clone()
    new[0, 0], new[1, 1], new[1, 2] = np.log(1.5), np.log(1.5), np.log(0.5)
    new.requires_grad_(True)
    dr_grpo = Objective(clip_range=ClipRange(0.2, 0.3))
    value, outside = dr_grpo.value(new, old, mask, dr_grpo.advantages(batch), dr_grpo.loss.normalization(batch))
    # A > 0: 1.5 counts as 1.3; A < 0: 1.5 counts whole, .5 counts as .8
    by_hand = -(0.5 * (1.3 + 1) - 0.5 * (1 + 1.5 + 0.8 + 1)) / 24
    assert float(value.detach()) == pytest.approx(by_hand, rel=1e-12)
    assert int(outside) == 3
    value.backward()
    assert new.grad is not None
    assert float(new.grad[0, 0]) == 0  # clipped away
    assert float(new.grad[1, 2]) == 0
    assert float(new.grad[1, 1]) == pytest.approx(0.5 * 1.5 / 24)
    assert float(new.grad[0, 1]) == pytest.approx(-0.5 / 24)


def test_covariance_clip_cov_and_kl_cov_by_hand() -> None:
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]], dtype=torch.float64)
    logp = torch.tensor([[-1.0, -2, -3], [-4, -5, 0]], dtype=torch.float64)
    A = torch.tensor([1.0, -1.0], dtype=torch.float64)
    cov = covariances(logp, A, mask)
    lp, a = np.array([-1.0, -2, -3, -4, -5]), np.array([1.0, 1, 1, -1, -1])
    by_hand = (lp - lp.mean()) * (a - a.mean())
    assert cov[mask.bool()].tolist() == pytest.approx(by_hand.tolist())
    assert float(cov.sum()) / 5 == pytest.approx(np.cov(lp, a, bias=True)[0, 1])
    assert kl_cov(cov, mask, 0.4).tolist() == [[1, 0, 0], [0, 1, 0]]  # by_hand: 1.6, .8, 0, 1.2, 2.4
    u = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.0]])
    # within (.5, 2): the tokens of 1.6, .8 and 1.2; two of them go, those of the least uniforms
    assert clip_cov(cov, mask, 0.5, 2.0, 0.4, u).tolist() == [[1, 0, 1], [0, 1, 1]]
    assert float(clip_cov(cov, mask, 5.0, 9.0, 0.4, u).min()) == 1


def test_a_backbone_in_half_precision_keeps_small_moves_of_its_adapter() -> None:
    """Merged in bf16 they would be rounded away; and no pass mixes dtypes."""
    model = policy(True, torch.float32)
    state = stepped(model)
    sequences = rollouts(model, 2, 4, 1)
    before = first_order_influences(model, make_update(model, sequences, state), sequences)
    for name, p in model.named_parameters():
        if not is_adapter(name):
            p.data = p.data.bfloat16()
    theta = trainable_parameters(model)
    here = evaluate(model, sequences)
    there = evaluate(
        model, sequences, parameters=perturbed(theta, {n: torch.ones_like(t) for n, t in theta.items()}, 1e-4)
    )
    assert not torch.equal(here.logp, there.logp)
    after = first_order_influences(model, make_update(model, sequences, state), sequences)
    assert float(torch.cosine_similarity(before.sequences, after.sequences, dim=0)) > 0.98
    assert len(fingerprint(dict(model.named_parameters()))) == 24


def test_a_direction_and_its_opposite_have_different_fingerprints() -> None:
    v = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}
    keys = {fingerprint(x) for x in (v, {n: -t for n, t in v.items()}, {"a": v["a"]}, {**v, "b": v["b"] + 1e-7})}
    assert len(keys) == 4
    assert fingerprint({"b": v["b"], "a": v["a"]}) == fingerprint(v)
