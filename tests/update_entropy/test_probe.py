"""A whole probe and its files against a second implementation: one sequence at a time, one flat vector."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.results import Report
from lightning_toys.update_entropy.adamw import AdamWState, Hyperparameters, Moments, Tensors
from lightning_toys.update_entropy.derivatives import trainable_parameters
from lightning_toys.update_entropy.estimators import (
    EntropyKind,
    Estimate,
    ImportanceEstimate,
    Scores,
    clustered_standard_error,
    entropy,
    entropy_derivative,
    prefix_importance_sampling,
    sequence_importance_sampling,
)
from lightning_toys.update_entropy.evaluation_probe import DIRECTIONS
from lightning_toys.update_entropy.figures import strip_common_suffix
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.probe import probe
from lightning_toys.update_entropy.probe_result import EvaluationResult, ProbeResult
from lightning_toys.update_entropy.report import probe_report, write_probe_results
from lightning_toys.update_entropy.rollouts import generate, uniforms
from lightning_toys.update_entropy.screen import linear_line, summary_lines
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.task import CharacterTokenizer
from tests.update_entropy.test_estimators import gpt2

TEMPERATURE, T, LR, BETAS, EPS, DECAY = 0.6, 7, 0.02, (0.8, 0.99), 1e-6, 0.7
TOKENS = CharacterTokenizer(',"\n')  # what a table has to quote
BELOW_ROUNDING = 1e-17  # too small a step for double precision
PLANS: dict[str, dict[str, Any]] = {
    "token": {"kind": "token", "estimator": "prefix", "reference_eta": 0.007},
    "sequence": {"kind": "sequence", "estimator": "sequence", "directions_per_pass": 4},
}


def generated(model: nn.Module, prompts: list[list[int]], group: int, stream: str) -> Sequences:
    asked = [p for p in prompts for _ in range(group)]
    u = uniforms(0, 0, stream, range(len(asked)), 5)
    found = generate(model, asked, [i // group for i in range(len(asked))], u, [TOKENS.eos_token_id], TEMPERATURE)
    rewards = np.random.default_rng(len(asked)).random(len(asked)).round(2).tolist()
    return Sequences(found.prompts, found.responses, found.prompt_index, rewards)


class ReferenceProbe:
    """A policy of which one matrix is not trained, its batches, their Jacobians, and a state of AdamW."""

    def __init__(self) -> None:
        self.model = gpt2(TOKENS.vocab_size)
        self.model.transformer.wpe.weight.requires_grad_(False)
        self.theta = self.flat(trainable_parameters(self.model))
        self.U = generated(self.model, [[3], [4, 5], [5, 3, 3]], 4, "U")
        self.E = [generated(self.model, [[3 + k % 3, 3 + k % 2][: 1 + k % 2] for k in range(6)], 2, s) for s in "ab"]
        self.of_U, self.of_E = self.jacobian(self.U)[0], [self.jacobian(e) for e in self.E]
        self.live, self.base = self.scores(self.U), [self.scores(e) for e in self.E]
        g = torch.Generator().manual_seed(5)
        size = float(self.gradient().square().mean().sqrt())
        self.m = size * torch.randn(self.theta.shape, generator=g, dtype=torch.float64)
        self.s = size**2 * (0.2 + torch.rand(self.theta.shape, generator=g, dtype=torch.float64))
        self.bound = 0.4 * float(self.gradient().norm())

    def flat(self, tensors: Tensors) -> Tensor:
        return torch.cat([tensors[n].detach().flatten() for n in trainable_parameters(self.model)])

    def shaped(self, vector: Tensor) -> Tensors:
        like = trainable_parameters(self.model)
        pieces = vector.split([p.numel() for p in like.values()])
        return {n: v.view(p.shape) for (n, p), v in zip(like.items(), pieces, strict=True)}

    def token_scores(self, sequences: Sequences, i: int, vector: Tensor) -> tuple[Tensor, Tensor]:
        """l_k and H_k of a sequence on its own."""
        prompt, response = sequences.prompts[i], sequences.responses[i]
        ids = torch.tensor([prompt + response])
        out = functional_call(self.model.eval(), self.shaped(vector), (), {"input_ids": ids, "use_cache": False})
        logp = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1] / TEMPERATURE, -1)
        return logp[range(len(response)), response], -(logp.exp() * logp).sum(-1)

    def scores(self, sequences: Sequences, vector: Tensor | None = None) -> Scores:
        n, width = len(sequences), max(sequences.lengths)
        logp, h, mask = torch.zeros(3, n, width, dtype=torch.float64)
        with torch.no_grad():
            for i, k in enumerate(sequences.lengths):
                logp[i, :k], h[i, :k] = self.token_scores(sequences, i, self.theta if vector is None else vector)
                mask[i, :k] = 1
        return Scores(logp, h, mask, torch.tensor(sequences.prompt_index))

    def jacobian(self, sequences: Sequences) -> Tensor:
        """Gradients of l_k and of H_k (2, N, T, parameters)."""
        out = torch.zeros(2, len(sequences), max(sequences.lengths), len(self.theta), dtype=torch.float64)
        vector = self.theta.clone().requires_grad_()
        for i in range(len(sequences)):
            for which, values in enumerate(self.token_scores(sequences, i, vector)):
                for k, value in enumerate(values):
                    out[which, i, k] = torch.autograd.grad(value, vector, retain_graph=True)[0]
        return out

    def advantages(self) -> Tensor:
        rewards = torch.tensor(self.U.rewards, dtype=torch.float64).view(3, 4)
        return (rewards - rewards.mean(1, keepdim=True)).flatten()

    def weights(self, rows: list[int]) -> Tensor:
        """Dr. GRPO's weight of each token (N_U, T) where the batch has these rows alone."""
        out, numbers = torch.zeros(len(self.U), max(self.U.lengths), dtype=torch.float64), self.U.prompt_index
        for i in rows:
            group = [j for j in rows if numbers[j] == numbers[i]]
            advantage = self.U.rewards[i] - np.mean([self.U.rewards[j] for j in group])
            longest = max(self.U.lengths[j] for j in group)
            prompts = len({numbers[j] for j in rows})
            out[i, : self.U.lengths[i]] = advantage / (prompts * len(group) * longest)
        return out

    def gradient(self, rows: list[int] | None = None, keep: Tensor | None = None) -> Tensor:
        w = self.weights(list(range(len(self.U))) if rows is None else rows)
        return -torch.einsum("it,itp->p", w if keep is None else w * keep, self.of_U)

    def step(self, g: Tensor, m: Tensor | None = None, betas: tuple[float, float] = BETAS, **other: Any) -> Tensor:
        """What torch's AdamW does with a gradient, per unit learning rate; its debiased moments are those of BETAS."""
        p = nn.Parameter(self.theta.clone())
        p.grad = g.clone()
        nn.utils.clip_grad_norm_([p], self.bound)
        optimizer = torch.optim.AdamW([p], **{"lr": LR, "betas": betas, "eps": EPS, "weight_decay": DECAY, **other})
        a, b = ((1 - now**T) / (1 - was**T) for was, now in zip(BETAS, betas, strict=True))
        first = a * (self.m if m is None else m)
        optimizer.state[p] = {"step": torch.tensor(float(T)), "exp_avg": first, "exp_avg_sq": b * self.s}
        optimizer.step()
        return (p.detach() - self.theta) / LR

    def parts(self, g: Tensor) -> dict[str, Tensor]:
        """A step and its parts by leaving each of them out."""
        full = self.step(g)
        momentum, decay = full - self.step(g, 0 * self.m), full - self.step(g, weight_decay=0.0)
        rest = full - momentum - decay
        return {"full": full, "momentum": momentum, "decay": decay, "grad": rest, "baseline": momentum + decay,
                "baseline_plus_grad": full}  # fmt: skip

    def preconditioner(self) -> Tensor:
        """d: the direction of a part of the gradient is d times it."""
        g = self.gradient()
        c = self.bound / (float(g.norm()) + 1e-6)  # torch's guard
        D = ((BETAS[1] * self.s + (1 - BETAS[1]) * (c * g) ** 2) / (1 - BETAS[1] ** (T + 1))).sqrt() + EPS
        return -(1 - BETAS[0]) * c / (1 - BETAS[0] ** (T + 1)) / D

    def tokens(self) -> Tensor:
        """The direction of each token of U (N_U, T, parameters)."""
        return -self.weights(list(range(len(self.U)))).unsqueeze(-1) * self.of_U * self.preconditioner()


@dataclass
class Case:
    reference: ReferenceProbe
    plan: Plan
    result: ProbeResult

    def slope(self, v: Tensor, k: int = 0) -> Estimate:
        dlogp, dentropy = self.reference.of_E[k] @ v
        return entropy_derivative(self.reference.base[k], dlogp, dentropy, self.plan.kind)

    def change(self, v: Tensor, eta: float, k: int, other: bool = False) -> ImportanceEstimate:
        there = self.reference.scores(self.reference.E[k], self.reference.theta + eta * v)
        how = prefix_importance_sampling if (self.plan.estimator == "prefix") != other else sequence_importance_sampling
        return how(self.reference.base[k], there, self.plan.kind)


@pytest.fixture(scope="module")
def reference() -> ReferenceProbe:
    return ReferenceProbe()


@pytest.fixture(scope="module", params=list(PLANS))
def case(request: pytest.FixtureRequest, reference: ReferenceProbe) -> Case:
    plan = Plan(
        etas=[1e-3, BELOW_ROUNDING, 0.015], clip_cov_share=0.1, kl_cov_share=0.15, clip_cov_high=0.2, tf_batch_size=5,
        grad_chunk_size=5, **PLANS[request.param],
    )  # fmt: skip
    m, s = reference.shaped(reference.m), reference.shaped(reference.s)
    hyperparameters = {n: Hyperparameters(LR, BETAS, EPS, DECAY) for n in m}
    state = AdamWState(hyperparameters, {n: Moments(T, m[n], s[n]) for n in m})
    return Case(
        reference,
        plan,
        probe(reference.model, reference.U, reference.E, state, plan, reference.bound, TEMPERATURE, attempts=3),
    )


def near(wanted: Any, tolerance: float = 1e-7) -> Any:
    return pytest.approx(wanted, rel=tolerance, abs=1e-12)


def same_change(found: ImportanceEstimate, wanted: ImportanceEstimate) -> None:
    for name in ("value", "se"):
        assert getattr(found.change, name) == near(getattr(wanted.change, name)), name
    assert found.change.contributions.tolist() == near(wanted.change.contributions.tolist())
    assert (found.entropy, found.ess) == near((wanted.entropy, wanted.ess))


def test_the_step_and_the_batch(case: Case) -> None:
    w, f = case.reference, case.result
    parts = w.parts(w.gradient())
    assert w.flat(f.update.step.direction).tolist() == near(parts["full"].tolist(), 1e-9)
    assert f.norms == near({n: float(v.norm()) for n, v in parts.items()})
    assert len({round(x, 6) for x in f.norms.values()}) == 5  # no part is like another; the last is the whole again
    assert f.residual < 1e-12
    assert f.update.step.clip_scale == near(0.4, 1e-5)
    assert (f.attempts, f.reference_eta) == (3, case.plan.reference_eta or LR)
    assert f.batch_scores.logp.tolist() == [near(x) for x in w.live.logp.tolist()]
    assert f.update.weights.tolist() == [near(x) for x in w.weights(list(range(12))).tolist()]


def test_slopes_of_the_step_its_parts_and_each_sequence_and_token(case: Case) -> None:
    w, f = case.reference, case.result
    parts, tokens = w.parts(w.gradient()), w.tokens()
    for k, e in enumerate(f.evaluations):
        assert e.entropy.value == near(entropy(w.base[k], case.plan.kind).value)
        for name, (value, se) in e.derivatives.items():
            wanted = case.slope(parts[name], k)
            assert (value, se) == near((wanted.value, wanted.se)), name
        each = [case.slope(v, k) for v in tokens.sum(1)]
        assert e.sequence_influences[0].tolist() == near([x.value for x in each])
        assert e.sequence_influences[1].tolist() == near([x.se for x in each])
        assert e.influence_matrix.tolist() == [
            near(x) for x in torch.stack([x.contributions for x in each], 1).tolist()
        ]
    for i, n in enumerate(w.U.lengths):
        wanted_tokens = [case.slope(tokens[i, t]).value for t in range(n)]
        assert f.token_influences[i, :n].tolist() == near(wanted_tokens)
    assert f.evaluations[0].derivatives["full"][0] != near(f.evaluations[1].derivatives["full"][0], 0.01)


def test_finite_steps(case: Case) -> None:
    w, f = case.reference, case.result
    parts, each = w.parts(w.gradient()), w.tokens().sum(1)
    etas = case.plan.etas
    for k, e in enumerate(f.evaluations):
        assert set(e.changes) == set(DIRECTIONS)
        for direction, by_eta in e.changes.items():
            assert list(by_eta) == etas
            for eta, found in by_eta.items():
                same_change(found, case.change(parts[direction], eta, k))
        for eta, found in e.other_estimator.items():
            same_change(found, case.change(parts["full"], eta, k, other=True))
        assert e.within_rounding == [BELOW_ROUNDING]
        assert list(e.sequence_changes) == sorted({*etas, f.reference_eta})
        for eta in (etas[0], f.reference_eta):
            for found, v in zip(e.sequence_changes[eta], each, strict=True):
                same_change(found, case.change(v, eta, k))
        a, b = e.changes["full"][0.015].change.value, e.other_estimator[0.015].change.value
        assert a != near(b, 1e-3)


def test_the_curvature_is_the_change_s_second_difference(case: Case) -> None:
    w, e, d = case.reference, case.result.evaluations[0], 2e-5
    v = w.parts(w.gradient())["full"]
    there = [
        prefix_importance_sampling(w.base[0], w.scores(w.E[0], w.theta + s * v), case.plan.kind).change for s in (d, -d)
    ]
    assert e.curvature is not None
    assert e.curvature.value == near(sum(x.value for x in there) / d**2, 1e-3)
    assert e.curvature.se == near(
        clustered_standard_error((there[0].influence + there[1].influence) / d**2, w.base[0].prompt_index)[0], 1e-3
    )


def test_the_length_of_the_linear_step(case: Case) -> None:
    """eta* is the step whose quadratic term is a tenth of the linear one; where E does not tell, an interval alone."""
    e = case.result.evaluations[0]
    assert e.curvature is not None
    value, se = e.derivatives["full"]
    assert (e.slope.value, e.slope.se) == near((value, se))
    assert se > abs(value) / 3  # with twelve sequences the slope is noise
    assert e.linear_until is None
    assert e.linear_until_interval is not None
    assert e.linear_until_interval[0] == 0
    assert "E does not tell" in linear_line(e)
    # the same with errors a thousand times smaller
    slope, curvature = (replace(x, influence=x.influence / 1000) for x in (e.slope, e.curvature))
    sharp = replace(e, slope=slope, curvature=curvature)
    assert sharp.linear_until is not None
    assert abs(curvature.value) * sharp.linear_until**2 / 2 == near(abs(value) * sharp.linear_until / 10)
    assert sharp.linear_until_interval is not None
    low, high = sharp.linear_until_interval
    assert 0.9 * sharp.linear_until < low < sharp.linear_until < high < 1.1 * sharp.linear_until
    said = f"up to eta {sharp.linear_until:.2g} (95 % interval {low:.2g} to {high:.2g})"
    assert said in linear_line(sharp)
    assert "how far" in linear_line(
        replace(e, curvature=replace(e.curvature, value=0.0), slope=replace(e.slope, value=0.0))
    )
    assert "the curvature from 0" in linear_line(replace(sharp, curvature=replace(e.curvature, value=0.0)))
    assert replace(e, curvature=None).linear_until_interval is None


def test_counterfactual_steps(case: Case) -> None:
    w, f, plan = case.reference, case.result, case.plan
    live = w.live.mask.bool()
    logp = w.live.logp
    spread = w.advantages().unsqueeze(1).expand_as(logp)
    cov = torch.where(live, (logp - logp[live].mean()) * (spread - spread[live].mean()), 0.0)
    assert f.covariances.tolist() == [near(x) for x in cov.tolist()]
    u = torch.from_numpy(keyed_generator(0, 0, "clip_cov").random(tuple(cov.shape)))
    may = (cov > plan.clip_cov_low) & (cov < plan.clip_cov_high) & live
    count = round(plan.clip_cov_share * int(live.sum()))
    assert 1 < count < int(may.sum())
    clipped = may & (u <= u[may].sort().values[count - 1])
    greatest = live & (cov >= cov[live].sort().values[-round(plan.kl_cov_share * int(live.sum()))])
    g = w.gradient()
    others = {
        "no_momentum": w.step(g, 0 * w.m),
        "no_decay": w.step(g, weight_decay=0.0),
        "betas_0.9_0.95": w.step(g, betas=(0.9, 0.95)),
        "betas_0_0.999": w.step(g, betas=(0.0, 0.999)),
        "clip_cov": w.step(w.gradient(keep=~clipped)),
        "kl_cov": w.step(w.gradient(keep=~greatest)),
    }
    for k, e in enumerate(f.evaluations):
        wanted = {n: case.slope(v, k) for n, v in others.items()}
        assert e.counterfactuals == {n: near((x.value, x.se)) for n, x in wanted.items()}
        assert e.leave_one_out is not None
        left = [case.slope(w.step(w.gradient([j for j in range(12) if j != i])), k) for i in range(12)]
        assert e.leave_one_out[0].tolist() == near([x.value for x in left])
        assert e.leave_one_out[1].tolist() == near([x.se for x in left])


def test_standard_errors_of_sampling_the_batch(case: Case) -> None:
    """The jackknife: (n - 1) / n times the sum of squares, over prompts."""
    w = case.reference
    steps = [w.parts(w.gradient([i for i in range(12) if w.U.prompt_index[i] != b])) for b in range(3)]
    assert case.result.evaluations
    for k, e in enumerate(case.result.evaluations):
        assert set(e.update_se) == {"full", "momentum", "decay", "grad"}
        for name, found in e.update_se.items():
            x = np.array([case.slope(s[name], k).value for s in steps])
            assert found == pytest.approx(np.sqrt(2 / 3 * ((x - x.mean()) ** 2).sum()), rel=1e-6, abs=1e-10), name


def test_the_error_of_few_prompts_by_hand() -> None:
    influence, prompt_index = torch.tensor([1.0, 2.0, -3.5, 0.5], dtype=torch.float64), torch.tensor([4, 4, 9, 1])
    assert clustered_standard_error(influence, prompt_index) == (near(np.sqrt(3 / 2 * (3**2 + 3.5**2 + 0.5**2))), 3)


def test_other_betas_keep_the_debiased_moments() -> None:
    m, s, most = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    was, now = (0.8, 0.99), (0.5, 0.9)
    hyperparameters = {"old": Hyperparameters(betas=was, amsgrad=True), "fresh": Hyperparameters(betas=was)}
    state = AdamWState(hyperparameters, {"old": Moments(4, m, s, most), "fresh": Moments.zeros_like(m)})
    other = state.with_hyperparameters(betas=now)
    assert {h.betas for h in other.hyperparameters.values()} == {now}
    assert other.hyperparameters["old"].amsgrad
    found = other.moments["old"]
    assert found.max_exp_avg_sq is not None
    assert (found.exp_avg / (1 - now[0] ** 4)).tolist() == near((m / (1 - was[0] ** 4)).tolist())
    assert (found.exp_avg_sq / (1 - now[1] ** 4)).tolist() == near((s / (1 - was[1] ** 4)).tolist())
    assert (found.max_exp_avg_sq / (1 - now[1] ** 4)).tolist() == near((most / (1 - was[1] ** 4)).tolist())
    assert float(other.moments["fresh"].exp_avg.abs().max()) == 0


# files


@pytest.fixture
def written(case: Case, tmp_path: Path) -> Path:
    write_probe_results(tmp_path / "probe", [8, 9], [case.result] * 2, TOKENS, case.plan, 17)
    return tmp_path / "probe" / "seed_9"


def test_arrays_are_the_result(case: Case, written: Path) -> None:
    for k, e in enumerate(case.result.evaluations):
        name = f"eval_{k:02d}"
        assert np.array_equal(np.load(written / f"{name}_first_order_matrix.npy"), e.influence_matrix)
        stacked = {
            eta: np.stack([x.change.contributions.numpy() for x in found], 1)
            for eta, found in e.sequence_changes.items()
        }
        delta = np.load(written / f"{name}_delta_matrix.npy")
        assert np.array_equal(delta, stacked[case.plan.reference_eta or LR])
        assert not any(np.array_equal(delta, x) for eta, x in stacked.items() if eta != (case.plan.reference_eta or LR))
        for eta, x in stacked.items():
            assert np.array_equal(np.load(written / f"{name}_grad_eta" / f"eta_{eta:g}.npy"), x)
        for direction in DIRECTIONS:
            assert e.changes[direction]
            for eta, found in e.changes[direction].items():
                rows = np.load(written / f"{name}_per_sequence" / direction / f"eta_{eta:g}.npy")
                assert np.array_equal(rows, found.change.contributions)


def fits_by_hand(e: EvaluationResult) -> list[tuple[float, float, float]]:
    """Slope, R squared and curvature of each update sequence's changes, by numpy's weighted polynomials of eta."""
    etas = np.array([eta for eta in sorted(e.sequence_changes) if eta != BELOW_ROUNDING])
    assert len(etas) == 3
    out = []
    for i in range(12):
        z = np.array([e.sequence_changes[eta][i].change.value for eta in etas]) / etas
        (slope,) = np.polyfit(etas, z, 0)
        out.append((slope, 1 - ((z - slope) ** 2).sum() / (z**2).sum(), 2 * np.polyfit(etas, z, 1)[0]))
    return out


def parameters_by_hand(case: Case) -> dict[str, Any]:
    """The step and its effect of one parameter at a time: the derivative along the step, all others standing still."""
    w = case.reference
    parts = w.parts(w.gradient())
    named, ends = (
        trainable_parameters(w.model),
        {"": "full", "_momentum": "momentum", "_decay": "decay", "_batch": "grad"},
    )
    out: dict[str, Any] = {"parameter": list(named), "size": [p.numel() for p in named.values()]}
    masks, done = [], 0
    for p in named.values():
        masks.append(torch.zeros_like(w.theta))
        masks[-1][done : done + p.numel()] = 1
        done += p.numel()
    for end, name in ends.items():
        out[f"norm{end}"] = [float((parts[name] * m).norm()) for m in masks]
        out[f"influence{end}"] = [case.slope(parts[name] * m).value for m in masks]
    return out | {"residual": [0.0 for _ in masks]}


def test_parameters_add_up_to_the_step(case: Case) -> None:
    found = case.result.parameters.values()
    assert len(found) > 5
    for name in ("full", "momentum", "decay", "grad"):
        assert sum(p.influences[name] for p in found) == near(case.result.evaluations[0].derivatives[name][0])
        assert np.sqrt(sum(p.norms[name] ** 2 for p in found)) == near(case.result.norms[name])


def test_tables_are_the_result(case: Case, written: Path) -> None:
    w, f, e = case.reference, case.result, case.result.evaluations[0]
    assert e.leave_one_out is not None
    single = [x.change for x in e.sequence_changes[f.reference_eta]]
    A = w.advantages()
    i, t = np.nonzero(w.live.mask.numpy())
    assert e.reward is not None
    straight = fits_by_hand(e)
    wanted: dict[str, dict[str, Any]] = {
        "sequences": {
            "row": range(12), "prompt_number": w.U.prompt_index, "prompt": [TOKENS.decode(p) for p in w.U.prompts],
            "response": [TOKENS.decode(r) for r in w.U.responses], "length": w.U.lengths, "reward": w.U.rewards,
            "advantage": A, "logp": w.live.logp.sum(1), "entropy": w.live.entropy.sum(1),
            "influence": e.sequence_influences[0], "influence_se": e.sequence_influences[1],
            "reward_influence": e.reward.tokens.sum(1),
            "change": [x.value for x in single],
            "change_se": [x.se for x in single], "slope_without": e.leave_one_out[0],
            "fit_slope": [x[0] for x in straight], "fit_r2": [x[1] for x in straight],
            "fit_curvature": [x[2] for x in straight],
            "slope_without_se": e.leave_one_out[1],
        },
        "tokens": {
            "row": i, "position": t, "token": [x for r in w.U.responses for x in r], "reward": np.array(w.U.rewards)[i],
            "text": [TOKENS.decode([x]) for r in w.U.responses for x in r], "logp": w.live.logp[i, t],
            "entropy": w.live.entropy[i, t], "advantage": A[i], "influence": f.token_influences[i, t],
            "reward_influence": e.reward.tokens[i, t],
            "covariance": f.covariances[i, t],
        },
        "parameters": parameters_by_hand(case),
    }  # fmt: skip
    for name, columns in wanted.items():
        with np.load(written / f"{name}.npz") as file:
            arrays = dict(file)
        with (written / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        ids = {"prompt_ids", "response_ids", "advantage_given"}  # a batch again, in the npz alone
        assert set(arrays) - ids == set(columns) == set(rows[0])
        for column, x in columns.items():
            texts = [r[column] for r in rows]
            if arrays[column].dtype.kind == "U":
                assert arrays[column].tolist() == texts == x, column
            else:
                assert [float(v) for v in texts] == arrays[column].tolist(), column
                loose = 1e-5 if column in ("fit_curvature", "residual") else 1e-7
                assert arrays[column].tolist() == pytest.approx(list(map(float, x)), rel=loose, abs=1e-11), column


def test_batches_can_be_rebuilt_from_their_files(case: Case, written: Path) -> None:
    """Token ids are in the files: U and every E are what they were, and the policy says the same of them again."""
    f, w = case.result, case.reference
    with np.load(written / "sequences.npz") as file:
        arrays = dict(file)
    assert Sequences.from_arrays(arrays) == w.U
    for k, e in enumerate(f.evaluations):
        with np.load(written / f"eval_{k:02d}_sequences.npz") as file:
            found, logp = Sequences.from_arrays(file), file["logp"]
        assert found == e.sequences == w.E[k]
        assert evaluate(w.model, found, TEMPERATURE).logp.numpy() == near(logp)


def test_the_summary_is_the_result(case: Case, written: Path) -> None:
    f, e = case.result, case.result.evaluations[0]
    said = json.loads((written / "summary.json").read_text())
    assert (said["seed"], said["step"], said["plan"]["kind"]) == (9, 17, case.plan.kind)
    assert (said["reference_eta"], said["learning_rate"], said["adamw_step"]) == (f.reference_eta, LR, T)
    first = said["evaluations"][0]
    assert first["within_rounding"] == [BELOW_ROUNDING]
    assert set(first["linear_fits"]) == set(DIRECTIONS)
    for direction, fit in first["linear_fits"].items():
        z = [e.changes[direction][eta].change.value / eta for eta in (1e-3, 0.015)]
        assert (fit["slope"], fit["quadratic_r2"]) == (near(np.mean(z)), None)  # two points have no curve
    assert said["microbatches"] == {"update": 3, "evaluation": 3}  # 12 of each, five at a time
    report = probe_report([9], Report([9], {}), [f]).metrics
    names = {"full": "slope", "momentum": "slope_momentum", "decay": "slope_decay", "grad": "slope_batch"}
    for name, key in names.items():
        numbers = (*e.derivatives[name], e.update_se[name])
        assert tuple(first["slopes"][name].values()) == near(numbers)
        assert (*report[key], *report[f"{key}_se"], *report[f"{key}_update_se"]) == numbers
    assert e.changes
    for direction, by_eta in e.changes.items():
        for eta, x in by_eta.items():
            assert first["changes"][direction][f"{eta:g}"]["value"] == near(x.change.value)
            suffix = "" if direction == "full" else f"_{direction}"
            assert report[f"change{suffix}@eta_{eta:g}"] == [x.change.value]
            assert report[f"change{suffix}_se@eta_{eta:g}"] == [x.change.se]
    for name, (value, se) in e.counterfactuals.items():
        assert tuple(first["counterfactual_slopes"][name].values()) == near((value, se))
        assert (report[f"slope@{name}"], report[f"slope_se@{name}"]) == ([value], [se])
    assert e.curvature is not None
    assert report["curvature"] == [e.curvature.value]
    assert (np.isnan(report["linear_until"][0]), first["linear_until"]) == (True, None)  # noise
    assert e.linear_until_interval is not None
    assert first["linear_until_interval"][0] == e.linear_until_interval[0]


@pytest.mark.parametrize(
    ("kind", "unit"),
    [("token", "a token;"), ("sequence", "a sequence;"), ("surprisal", "a token (surprisal);")],
)
def test_the_lines_to_read(case: Case, tmp_path: Path, kind: EntropyKind, unit: str) -> None:
    f, e = case.result, case.result.evaluations[0]
    lines = summary_lines([9], [f], tmp_path, kind)
    value, se = e.derivatives["full"]
    assert f"{e.entropy.value:.4g} ± {e.entropy.se:.2g} nats {unit}" in lines[0]
    assert f"dH/d eta {value:.4g} ± {se:.2g} ± {e.update_se['full']:.2g} (U)" in lines[0]
    assert [("within rounding" in line) for line in lines[1:4]] == [False, True, False]
    assert f"linear {0.015 * value:.4g}" in lines[3]


def test_the_common_suffix_of_prompts_is_stripped() -> None:
    """Words that all of them end in are left out; of a long one the end is kept."""
    asked = ["user: how many eggs? assistant", "user: how many hens? assistant", "user: how many? assistant"]
    assert strip_common_suffix(asked) == ["user: how many eggs?", "user: how many hens?", "user: how many?"]
    assert strip_common_suffix(asked, 10) == ["…any eggs?", "…any hens?", "…how many?"]
    assert strip_common_suffix(["3+4=", "5+6="]) == ["3+4=", "5+6="]
    assert strip_common_suffix(["a b", "a b"]) == ["a b"] * 2
    assert strip_common_suffix(["a b", "c a b"]) == ["", "c"]
