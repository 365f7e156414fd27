"""Entropy and its change, checked against every response that a small policy can give."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.adamw import dot
from lightning_toys.update_entropy.derivatives import (
    entropy_gradient,
    perturbed,
    score_jvp,
    score_second_jvp,
    sequence_gradients,
    trainable_parameters,
    weighted_gradient,
)
from lightning_toys.update_entropy.estimators import (
    EntropyKind,
    Scores,
    clustered_standard_error,
    entropy,
    entropy_derivative,
    entropy_second_derivative,
    first_order_weights,
    leave_one_out_mean,
    prefix_importance_sampling,
    ratio_terms,
    sequence_importance_sampling,
)
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.rollouts import generate, inverse_cdf, uniforms
from lightning_toys.update_entropy.sequences import Sequences, pad_batch, response_logits

KINDS: list[EntropyKind] = ["token", "sequence", "surprisal"]
END = 0


def gpt2(vocabulary: int, positions: int = 16, seed: int = 0, spread: float = 0.4, dropout: float = 0.0) -> nn.Module:
    """GPT-2 in double precision: others keep parts of themselves in single."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=16, n_layer=2, n_head=2, initializer_range=spread,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config).double()
    return model


def every_response(vocabulary: int, length: int) -> list[list[int]]:
    out: list[list[int]] = []

    def grow(prefix: list[int]) -> None:
        if len(prefix) == length or prefix[-1:] == [END]:
            out.append(prefix)
        else:
            for token in range(vocabulary):
                grow([*prefix, token])

    grow([])
    return out


def direction_of(model: nn.Module, size: float, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in trainable_parameters(model).items()}


@dataclass
class EnumeratedPolicy:
    """A policy, every response that it can give with its scores, and their derivatives along a direction."""

    model: nn.Module
    v: dict[str, Tensor]
    sequences: Sequences
    scores: Scores
    dlogp: Tensor
    dentropy: Tensor

    @property
    def p(self) -> Tensor:
        return self.scores.logp.sum(1).exp()

    def at(self, eta: float) -> Scores:
        return evaluate(
            self.model, self.sequences, parameters=perturbed(trainable_parameters(self.model), self.v, eta), chunk=4096
        )

    def truth(self, kind: EntropyKind, scores: Scores | None = None) -> float:
        scores = scores or self.scores
        p = scores.logp.sum(1).exp()
        numerator, denominator = ratio_terms(scores, kind)
        return float((p * numerator.sum(1)).sum() / (p * denominator).sum())

    def slope(self, kind: EntropyKind) -> float:
        """The derivative of the enumerated entropy, by the product rule."""
        numerator, denominator = ratio_terms(self.scores, kind)
        dnumerator = -self.dlogp if kind == "surprisal" else self.dentropy
        dp = self.p * self.dlogp.sum(1)
        dN = (dp * numerator.sum(1) + self.p * dnumerator.sum(1)).sum()
        return float((dN - self.truth(kind) * (dp * denominator).sum()) / (self.p * denominator).sum())

    def sample(self, n: int, seed: int) -> Tensor:
        return torch.multinomial(self.p, n, True, generator=torch.Generator().manual_seed(seed))


def rows(scores: Scores, index: Tensor) -> Scores:
    return Scores(scores.logp[index], scores.entropy[index], scores.mask[index], torch.arange(len(index)))


def enumerate_policy(vocabulary: int, length: int, size: float, seed: int = 0, spread: float = 0.4) -> EnumeratedPolicy:
    model = gpt2(vocabulary, seed=seed, spread=spread)
    said = every_response(vocabulary, length)
    sequences = Sequences([[1]] * len(said), said, list(range(len(said))))
    v = direction_of(model, size)
    scores = evaluate(model, sequences, chunk=4096)
    return EnumeratedPolicy(model, v, sequences, scores, *score_jvp(model, sequences, v, chunk=4096))


@pytest.fixture(scope="module")
def large() -> EnumeratedPolicy:
    return enumerate_policy(6, 6, 0.1, spread=0.3)


@pytest.fixture(scope="module")
def small() -> EnumeratedPolicy:
    return enumerate_policy(4, 4, 0.1, seed=3)


# the enumerated distribution itself


def test_all_responses_together_have_probability_one(large: EnumeratedPolicy) -> None:
    assert len(large.sequences) == 19_531
    assert float(large.p.sum()) == pytest.approx(1, abs=1e-12)
    # Rao and Blackwell: the mean of -l_k is that of H_k
    assert large.truth("token") == pytest.approx(large.truth("surprisal"), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_slope_of_the_enumerated_entropy_is_its_finite_difference(small: EnumeratedPolicy, kind: EntropyKind) -> None:
    e = 1e-4
    both = [small.truth(kind, small.at(s * e)) for s in (1, -1)]
    assert small.slope(kind) == pytest.approx((both[0] - both[1]) / (2 * e), rel=1e-6)


# the first-order form in expectation: no sampling, no error


def expected_slope(w: EnumeratedPolicy, entropy_weights: Tensor, logp_weights: Tensor, kind: EntropyKind) -> float:
    _, denominator = ratio_terms(w.scores, kind)
    p = w.p.unsqueeze(1)
    return float((p * (entropy_weights * w.dentropy + logp_weights * w.dlogp)).sum() / (w.p * denominator).sum())


def exact_coefficients(
    w: EnumeratedPolicy, kind: EntropyKind, entropy_: float | None = None, own: bool = False
) -> tuple[Tensor, Tensor]:
    """A_k with the true entropy; ``own``: the sum starts at k itself, one too early."""
    mask = w.scores.mask
    numerator, _ = ratio_terms(w.scores, kind)
    h = w.truth(kind) if entropy_ is None else entropy_
    after = numerator.flip(1).cumsum(1).flip(1) - numerator * (kind != "surprisal" and not own)
    count = (mask.flip(1).cumsum(1).flip(1) - mask) * (kind != "sequence")
    return mask * (kind != "surprisal"), (after - h * count) * mask


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_exact_in_expectation(small: EnumeratedPolicy, kind: EntropyKind) -> None:
    entropy_weights, logp_weights = exact_coefficients(small, kind)
    assert expected_slope(small, entropy_weights, logp_weights, kind) == pytest.approx(small.slope(kind), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_baseline_of_a_position_adds_nothing_in_expectation(small: EnumeratedPolicy, kind: EntropyKind) -> None:
    entropy_weights, logp_weights = exact_coefficients(small, kind)
    beta = torch.tensor([3.0, -1.0, 0.5, 7.0], dtype=torch.float64)
    assert expected_slope(small, entropy_weights, logp_weights - beta * small.scores.mask, kind) == pytest.approx(
        small.slope(kind), abs=1e-12
    )


def test_wrong_first_order_forms_are_far_off(small: EnumeratedPolicy) -> None:
    truth = small.slope("token")
    entropy_weights, logp_weights = exact_coefficients(small, "token")
    wrong = {
        "no centring": exact_coefficients(small, "token", 0.0),
        "sign": (entropy_weights, -logp_weights),
        "entropies alone": (entropy_weights, 0 * logp_weights),
        "score alone": (0 * entropy_weights, logp_weights),
        "centred one position early": (
            entropy_weights,
            logp_weights - small.truth("token") * small.scores.mask * logp_weights.sign(),
        ),
    }
    for name, (h, a) in wrong.items():
        assert abs(expected_slope(small, h, a, "token") / truth - 1) > 0.02, name
    # one too early changes nothing in the mean: H_k is known before token k; it is noise, seen below
    entropy_weights, logp_weights = exact_coefficients(small, "token", own=True)
    assert expected_slope(small, entropy_weights, logp_weights, "token") == pytest.approx(truth, abs=1e-12)
    # for the surprisal, which token k enters, it is wrong
    numerator, _ = ratio_terms(small.scores, "surprisal")
    h, a = exact_coefficients(small, "surprisal")
    assert abs(expected_slope(small, h, a - numerator, "surprisal") / small.slope("surprisal") - 1) > 0.02


# estimates from samples


def replicates(
    w: EnumeratedPolicy, n: int, repeats: int, eta: float, kind: EntropyKind = "token"
) -> dict[str, np.ndarray]:
    """(repeats, 2): value and half of the 95 % interval of each estimator."""
    there = w.at(eta)
    out: dict[str, list[tuple[float, float]]] = {}
    for k in range(repeats):
        i = w.sample(n, k)
        s, t = rows(w.scores, i), rows(there, i)
        found = {
            "first": entropy_derivative(s, w.dlogp[i], w.dentropy[i], kind),
            "centred": entropy_derivative(s, w.dlogp[i], w.dentropy[i], kind, baseline=False),
            "snis": sequence_importance_sampling(s, t, kind).change,
            "prefix": prefix_importance_sampling(s, t, kind).change,
        }
        for name, e in found.items():
            out.setdefault(name, []).append((e.value, e.half_width))
    return {name: np.array(x) for name, x in out.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_estimators_are_unbiased_and_know_their_error(large: EnumeratedPolicy, kind: EntropyKind) -> None:
    eta, repeats = 0.05, 400
    n = {"token": 32, "sequence": 64, "surprisal": 128}[kind]  # the more skewed the terms, the more t's interval needs
    truth = large.truth(kind, large.at(eta)) - large.truth(kind)
    for name, x in replicates(large, n, repeats, eta, kind).items():
        wanted = large.slope(kind) if name in ("first", "centred") else truth
        se = x[:, 0].std(ddof=1) / repeats**0.5
        assert abs(x[:, 0].mean() - wanted) < 3 * se, name
        covered = np.mean(np.abs(x[:, 0] - wanted) < x[:, 1])
        assert 0.90 <= covered <= 0.99, (name, covered)
        assert abs(x[:, 0].mean()) > 5 * se  # a version that says 0 would fail


def test_prefixes_have_less_variance_than_whole_sequences(large: EnumeratedPolicy) -> None:
    """The spread of slopes at N = 32, in units in which the score form of whole sequences has .225."""
    eta, repeats = 1e-4, 400
    x = replicates(large, 32, repeats, eta)
    whole = []
    for k in range(repeats):
        s = rows(large.scores, i := large.sample(32, k))
        h = entropy(s).value
        score = (s.entropy.sum(1) - h * s.lengths) * large.dlogp[i].sum(1)
        whole.append(float((score + large.dentropy[i].sum(1)).sum() / s.lengths.sum()))
    unit = float(np.std(whole, ddof=1)) / 0.225
    spread = {name: v[:, 0].std(ddof=1) / unit for name, v in x.items()}
    spread["snis"] /= eta
    spread["prefix"] /= eta
    assert spread["snis"] == pytest.approx(0.225, rel=0.05)  # the same form
    assert spread["centred"] == pytest.approx(spread["prefix"], rel=0.02)  # likewise
    assert spread["centred"] < 0.165
    assert spread["first"] < 0.19  # here the mean over others costs more than it saves


def test_slope_of_importance_sampling_is_the_linear_form(large: EnumeratedPolicy) -> None:
    """As eta -> 0: prefix weights give the centred form on the same draws, whole weights the score form."""
    i, eta = large.sample(32, 7), 1e-5
    s, up, down = rows(large.scores, i), rows(large.at(eta), i), rows(large.at(-eta), i)
    centred = entropy_derivative(s, large.dlogp[i], large.dentropy[i], baseline=False).value
    prefix = (prefix_importance_sampling(s, up).change.value - prefix_importance_sampling(s, down).change.value) / (
        2 * eta
    )
    assert prefix == pytest.approx(centred, rel=1e-6)
    h = entropy(s).value
    score = ((s.entropy.sum(1) - h * s.lengths) * large.dlogp[i].sum(1) + large.dentropy[i].sum(1)).sum()
    snis = (sequence_importance_sampling(s, up).change.value - sequence_importance_sampling(s, down).change.value) / (
        2 * eta
    )
    assert snis == pytest.approx(float(score / s.lengths.sum()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_curvature_is_that_of_prefix_weights(small: EnumeratedPolicy, kind: EntropyKind) -> None:
    i = small.sample(64, 1)
    chosen = small.sequences.take(i.tolist())
    first, second = score_second_jvp(small.model, chosen, small.v)
    assert torch.allclose(first[0], small.dlogp[i], atol=1e-12)
    assert torch.allclose(first[1], small.dentropy[i], atol=1e-12)
    s, e = rows(small.scores, i), 1e-3
    up, down = (prefix_importance_sampling(s, rows(small.at(x), i), kind).change.value for x in (e, -e))
    found = entropy_second_derivative(s, first, second, kind)
    assert found.value == pytest.approx((up + down) / e**2, rel=1e-4)
    assert float(found.contributions.sum()) == pytest.approx(found.value)


def test_curvature_knows_its_error(small: EnumeratedPolicy) -> None:
    """Standard errors against the spread over samples, N = 256."""
    first, second = score_second_jvp(small.model, small.sequences, small.v, chunk=4096)
    found = []
    for k in range(300):
        i = small.sample(256, k)
        pick = [(a[i], b[i]) for a, b in (first, second)]
        e = entropy_second_derivative(rows(small.scores, i), pick[0], pick[1])
        found.append((e.value, e.se))
    x = np.array(found)
    assert x[:, 1].mean() == pytest.approx(x[:, 0].std(ddof=1), rel=0.1)


@pytest.mark.parametrize("estimator", ["first", "snis", "prefix", "second"])
@pytest.mark.parametrize("kind", KINDS)
def test_delta_method_is_the_derivative_in_a_sequences_weight(
    small: EnumeratedPolicy, estimator: str, kind: EntropyKind
) -> None:
    """A sequence counted 1 + h times moves the estimate by h times its influence, by finite difference of copies."""
    index = small.sample(6, 2)
    first, second = score_second_jvp(small.model, small.sequences, small.v, chunk=4096)
    there = small.at(0.2)

    def value(copies: list[int]) -> tuple[float, Tensor]:
        i = torch.cat([index[k : k + 1].repeat(c) for k, c in enumerate(copies)])
        s, t = rows(small.scores, i), rows(there, i)
        e = {
            "first": lambda: entropy_derivative(s, small.dlogp[i], small.dentropy[i], kind, baseline=False),
            "snis": lambda: sequence_importance_sampling(s, t, kind).change,
            "prefix": lambda: prefix_importance_sampling(s, t, kind).change,
            "second": lambda: entropy_second_derivative(
                s, (first[0][i], first[1][i]), (second[0][i], second[1][i]), kind
            ),
        }[estimator]()
        return e.value, e.influence

    m = 1000
    base, influence = value([m] * 6)
    for k in range(6):
        more, _ = value([m + (j == k) for j in range(6)])
        # the influence of one copy of 6 m
        assert more - base == pytest.approx(float(influence[k * m]), rel=2e-2, abs=1e-9)
    assert float(influence.sum()) == pytest.approx(0, abs=1e-9)


def test_sequences_of_a_prompt_count_as_one_draw(small: EnumeratedPolicy) -> None:
    i = small.sample(40, 5)
    s = rows(small.scores, i)
    twice = rows(small.scores, torch.cat([i, i]))
    together = replace(twice, prompt_index=torch.cat([torch.arange(40)] * 2))
    alone = entropy(s)
    assert entropy(together).se == pytest.approx(alone.se)
    assert entropy(twice).se < 0.75 * alone.se  # what forgetting the groups would claim
    se, prompts = clustered_standard_error(torch.ones(4), torch.zeros(4))
    assert np.isnan(se)
    assert prompts == 1


def test_nothing_moves_along_a_zero_direction(small: EnumeratedPolicy) -> None:
    i = small.sample(20, 3)
    s = rows(small.scores, i)
    still = evaluate(
        small.model,
        small.sequences.take(i.tolist()),
        parameters=perturbed(trainable_parameters(small.model), small.v, 0.0),
    )
    still = replace(still, prompt_index=s.prompt_index)
    for weighted in (sequence_importance_sampling(s, still), prefix_importance_sampling(s, still)):
        assert weighted.change.value == 0
        assert weighted.entropy > 0.1
        assert weighted.ess == pytest.approx(20)
        assert weighted.clipped_fraction == 0
    zero = {n: torch.zeros_like(x) for n, x in small.v.items()}
    dl, dh = score_jvp(small.model, small.sequences.take(i.tolist()), zero)
    assert entropy_derivative(s, dl, dh).value == 0


def test_weights_are_clipped_and_counted(small: EnumeratedPolicy) -> None:
    i = small.sample(20, 4)
    s = rows(small.scores, i)
    far = replace(s, logp=s.logp + 30 * s.mask * (torch.arange(20) < 5).unsqueeze(1))
    found = sequence_importance_sampling(s, far)
    assert found.clipped_fraction == pytest.approx(0.25)
    assert found.ess < 6


def test_others_mean() -> None:
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.float64)
    values = torch.tensor([[1.0, 5, 9], [2, 7, 4], [6, 9, 9]], dtype=torch.float64)
    assert leave_one_out_mean(values, mask).tolist() == [[4, 7, 0], [3.5, 5, 0], [1.5, 0, 0]]


# reverse and forward mode, chunks and padding


@pytest.mark.parametrize("kind", KINDS)
def test_one_reverse_pass_gives_every_directions_slope(small: EnumeratedPolicy, kind: EntropyKind) -> None:
    chosen = small.sequences.take(small.sample(24, 8).tolist())
    scores, gradient = entropy_gradient(small.model, chosen, kind, chunk=7)
    for seed in range(3):
        v = direction_of(small.model, 0.3, seed)
        slope = entropy_derivative(scores, *score_jvp(small.model, chosen, v, chunk=5), kind)
        assert dot(v, gradient) == pytest.approx(slope.value, rel=1e-10)


def test_rows_of_the_gradient_are_the_rows_of_the_slope(small: EnumeratedPolicy) -> None:
    chosen = small.sequences.take(small.sample(8, 9).tolist())
    scores = evaluate(small.model, chosen)
    entropy_weights, logp_weights = first_order_weights(scores)
    b = scores.lengths.sum()
    found = sequence_gradients(small.model, chosen, logp_weights / b, entropy_weights / b, chunk=3)
    parts = [{n: g[i] for n, g in found.items()} for i in range(8)]
    slope = entropy_derivative(scores, *score_jvp(small.model, chosen, small.v))
    assert [dot(small.v, g) for g in parts] == pytest.approx(slope.contributions.tolist(), rel=1e-9)
    whole = weighted_gradient(small.model, chosen, logp_weights / b, entropy_weights / b)
    assert sum(dot(small.v, g) for g in parts) == pytest.approx(dot(small.v, whole), rel=1e-9)


def mixed() -> Sequences:
    """Prompts and responses of many lengths."""
    g = np.random.default_rng(0)
    prompts = [g.integers(1, 6, n).tolist() for n in (1, 4, 2, 7, 3, 3, 5)]
    responses = [[*g.integers(1, 6, n).tolist(), END] for n in (3, 0, 5, 2, 7, 1, 4)]
    return Sequences(prompts, responses, [0, 0, 1, 1, 2, 2, 3])


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, attn_implementation="eager", initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, attention_dropout=0.5,
    )  # fmt: skip
    model: nn.Module = Qwen2ForCausalLM(config)
    return model


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_chunk_padding_side_and_dropout_change_nothing(family: str) -> None:
    model, tolerance = (gpt2(6, dropout=0.5), 1e-12) if family == "gpt2" else (qwen2(), 2e-5)
    model.train()  # dropout is configured on
    sequences = mixed()
    base = evaluate(model, sequences)
    for other in (
        evaluate(model, sequences),
        evaluate(model, sequences, chunk=2),
        evaluate(model, sequences, chunk=1),
        evaluate(model, sequences, side="right"),
        evaluate(model, sequences, side="right", chunk=3),
    ):
        assert torch.allclose(other.logp, base.logp, atol=tolerance)
        assert torch.allclose(other.entropy, base.entropy, atol=tolerance)
    assert model.training
    assert all(m.training for m in model.modules())
    one = score_jvp(model, sequences, direction_of(model, 0.1), chunk=3)
    two = score_jvp(model, sequences, direction_of(model, 0.1))
    assert torch.allclose(one[0], two[0], atol=10 * tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_by_hand(temperature: float) -> None:
    model = gpt2(6)
    sequences = Sequences([[2, 3]], [[4, 1, END]], [0])
    found = evaluate(model, sequences, temperature)
    logits = model(torch.tensor([[2, 3, 4, 1, END]])).logits[0].detach()
    for k, token in enumerate([4, 1, END]):
        distribution = torch.distributions.Categorical(logits=logits[1 + k] / temperature)
        assert float(found.logp[0, k]) == pytest.approx(float(distribution.log_prob(torch.tensor(token))), abs=1e-12)
        assert float(found.entropy[0, k]) == pytest.approx(float(distribution.entropy()), abs=1e-12)


def test_only_the_logits_that_are_read_are_computed() -> None:
    """Only columns that predict a response token go through the head."""
    model = gpt2(6)
    packed = pad_batch(Sequences([[1] * 9], [[2, 3]], [0]))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape))  # type: ignore[union-attr]
    response_logits(model, packed)
    handle.remove()
    assert seen[0][1] == 2


# sampling


def test_sampled_tokens_follow_the_policy(small: EnumeratedPolicy) -> None:
    n = 4000
    u = uniforms(0, 0, "test", range(n), 4)
    got = generate(small.model, [[1]] * n, [0] * n, u, [END])
    index = {tuple(r): k for k, r in enumerate(small.sequences.responses)}
    counts = np.bincount([index[tuple(r)] for r in got.responses], minlength=len(index))
    p = small.p.numpy()
    common = p * n > 8
    chi2 = ((counts[common] - n * p[common]) ** 2 / (n * p[common])).sum()
    assert chi2 < common.sum() + 4 * (2 * common.sum()) ** 0.5


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_sequence_does_not_depend_on_its_neighbours(family: str) -> None:
    model = (gpt2(6, 32) if family == "gpt2" else qwen2()).eval()
    prompts = [[1, 2], [3], [4, 5, 1], [2], [5, 5, 5, 5]]
    u = uniforms(3, 7, "test", range(5), 12)
    whole = generate(model, prompts, range(5), u, [END])
    alone = [generate(model, [p], [0], u[i : i + 1], [END]).responses[0] for i, p in enumerate(prompts)]
    pairs = generate(model, prompts, range(5), u, [END], chunk=2)
    assert whole.responses == alone == pairs.responses
    assert len({len(r) for r in alone}) > 1
    # what was sampled is what teacher forcing gives: the token at which the distribution function passes u
    for i, response in enumerate(alone):
        for k, token in enumerate(response):
            logits = model(torch.tensor([prompts[i] + response[:k]])).logits[:, -1]
            assert int(inverse_cdf(logits, torch.tensor([u[i, k]]), 1.0)) == token


def test_uniforms_are_those_of_their_own_row() -> None:
    a = uniforms(1, 2, "s", [0, 1, 2], 5)
    assert np.array_equal(uniforms(1, 2, "s", [2], 5)[0], a[2])
    for other in (uniforms(2, 2, "s", [2], 5), uniforms(1, 3, "s", [2], 5), uniforms(1, 2, "t", [2], 5)):
        assert not np.array_equal(other[0], a[2])


def test_inverse_cdf_at_its_ends() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25]] * 5))
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7501, 1 - 1e-16], dtype=torch.float64)
    assert inverse_cdf(logits, u, 1.0).tolist() == [0, 0, 1, 2, 2]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ToyError, match="empty prompt"):
        Sequences([[]], [[1]], [0])
