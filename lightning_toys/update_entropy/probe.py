"""The probe: by how much the next AdamW step changes a policy's entropy, and what of it is whose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError, require
from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Tensors, norm, total
from lightning_toys.update_entropy.attribution import (
    EntropyRows,
    Ranks,
    Update,
    clip_cov,
    covariances,
    entropy_rows,
    kl_cov,
    make_update,
    token_slopes,
)
from lightning_toys.update_entropy.cache import Memo, digest, fingerprint
from lightning_toys.update_entropy.derivatives import curvatures, moved, trainable, weighted_gradient
from lightning_toys.update_entropy.estimators import (
    Estimate,
    Kind,
    Scores,
    Weighted,
    entropy,
    prefix_weighted,
    second_order,
    sequence_weighted,
)
from lightning_toys.update_entropy.forward import Passes, evaluate, ready
from lightning_toys.update_entropy.grpo import advantages, groups, informative
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.summary import EvaluationFindings, Findings

FLAVOURS = ("full", "baseline", "grad", "baseline_plus_grad")
CLOSED = 1e-6  # a sum of parts this close to the step, relative, is the step: one pass serves both


@dataclass
class Plan:
    """What a probe does.

    Args:
        prompts: of the update batch U.
        group: responses to each.
        eval_prompts: of an evaluation batch E.
        eval_group: responses to each.
        eval_batches: number of evaluation batches.
        etas: step sizes at which the change is measured.
        reference_eta: step size of the matrix of E against U; null for the training's own.
        kind: entropy per ``token``, per ``sequence``, or ``surprisal`` per token.
        estimator: weights of a finite step: of each position's ``prefix``, or of the whole ``sequence`` (SNIS).
        per_sequence: measure every update sequence's direction at every eta too.
        counterfactuals: leave-one-out, no momentum, other betas, Clip-Cov, KL-Cov; the errors that U's draw makes.
        second_order: the curvature along the step.
        filter_zero_advantage: draw prompts again whose responses all earn the same.
        max_resample_attempts: times that U is drawn before the probe gives up.
        tolerance: greatest advantage that counts as zero.
        clip_cov_low: least covariance of a token that Clip-Cov may drop.
        clip_cov_high: greatest.
        clip_cov_share: share of the tokens that it drops.
        kl_cov_share: share of the tokens that KL-Cov holds back.
        tf_batch_size: sequences of a forward pass.
        grad_chunk_size: sequences of a batched reverse pass.
    """

    prompts: int = 4
    group: int = 4
    eval_prompts: int = 128
    eval_group: int = 2
    eval_batches: int = 1
    etas: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    reference_eta: float | None = None
    kind: Kind = "token"
    estimator: Literal["prefix", "sequence"] = "prefix"
    per_sequence: bool = True
    counterfactuals: bool = True
    second_order: bool = True
    filter_zero_advantage: bool = True
    max_resample_attempts: int = 20
    tolerance: float = 1e-8
    clip_cov_low: float = 0.0
    clip_cov_high: float = 5.0
    clip_cov_share: float = 0.02
    kl_cov_share: float = 0.02
    tf_batch_size: int = 64
    grad_chunk_size: int = 32

    def __post_init__(self) -> None:
        least = {"prompts": 1, "group": 2, "eval_prompts": 2, "eval_group": 1, "eval_batches": 1,
                 "max_resample_attempts": 1, "tf_batch_size": 1, "grad_chunk_size": 1}  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            require(value >= low, f"--model.plan.{name}: {value} is not allowed; give an integer >= {low}")
        require(len(self.etas) > 0, "--model.plan.etas: [] is not allowed; give at least one step size")
        require(
            all(0 < e < float("inf") for e in self.etas) and len(set(self.etas)) == len(self.etas),
            f"--model.plan.etas: {self.etas} is not allowed; give different numbers > 0",
        )
        require(
            self.reference_eta is None or self.reference_eta > 0,
            f"--model.plan.reference_eta: {self.reference_eta} is not allowed; give a number > 0 or null",
        )
        for name in ("clip_cov_share", "kl_cov_share"):
            value = getattr(self, name)
            require(0 < value < 1, f"--model.plan.{name}: {value} is not allowed; give a share between 0 and 1")
        require(
            self.clip_cov_low < self.clip_cov_high,
            f"--model.plan.clip_cov_low: {self.clip_cov_low} is not allowed; "
            f"give less than --model.plan.clip_cov_high ({self.clip_cov_high})",
        )


def draw_update(draw: Callable[[int], Sequences], plan: Plan) -> tuple[Sequences, int]:
    """Draw U until every prompt's responses differ in reward; return it and the number of draws.

    Args:
        draw: gives the batch of an attempt.
        plan: says how many prompts are wanted and how often to try.

    Raises:
        ToyError: too few prompts have responses that differ.
    """
    kept: list[Sequences] = []
    for attempt in range(plan.max_resample_attempts):
        batch = draw(attempt)
        if not plan.filter_zero_advantage:
            return batch, 1
        found = groups(batch)
        kept += [batch.take(found[number]) for number in informative(batch, plan.tolerance)]
        if len(kept) >= plan.prompts:
            return joined(kept[: plan.prompts]), attempt + 1
    raise ToyError(
        f"--model.plan.max_resample_attempts: after {plan.max_resample_attempts} draws of {plan.prompts} prompts only "
        f"{len(kept)} had responses of different reward, so that the step has no gradient to speak of; "
        "give more attempts, a larger --model.plan.group, or --model.plan.filter_zero_advantage false"
    )


def joined(parts: list[Sequences]) -> Sequences:
    """Return groups as one batch, numbered anew."""
    return Sequences(
        [p for x in parts for p in x.prompts],
        [r for x in parts for r in x.responses],
        [k for k, x in enumerate(parts) for _ in range(len(x))],
        [r for x in parts for r in x.rewards],
    )


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds within to ``name``."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def probe(
    model: nn.Module,
    sequences: Sequences,
    evaluations: list[Sequences],
    state: AdamWState,
    plan: Plan,
    max_norm: float | None = None,
    temperature: float = 1.0,
    ranks: Ranks | None = None,
    attempts: int = 1,
    memo: Memo | None = None,
) -> Findings:
    """Probe the step that AdamW would take with a batch.

    Args:
        model: the policy; only its parameters that need gradients are stepped.
        sequences: U, drawn from the policy, with rewards.
        evaluations: evaluation batches, drawn from the policy.
        state: AdamW's settings and moments.
        plan: what to do.
        max_norm: bound on the gradient's norm.
        temperature: all sequences were drawn at.
        ranks: processes among which evaluation sequences are divided.
        attempts: draws that U took.
        memo: keeps passes on disk.
    """
    ranks, clock, memo = ranks or Ranks(), Clock(), memo or Memo()
    with clock.time("update"):
        update = make_update(model, sequences, state, max_norm, temperature, plan.grad_chunk_size)
        at_batch = evaluate(model, sequences, temperature, chunk=plan.tf_batch_size)
    step = update.step
    baseline = total([step.momentum, step.decay])
    singles = update.directions()
    batch = total(singles)
    directions = {"full": step.direction, "baseline": baseline, "grad": batch, "momentum": step.momentum,
                  "decay": step.decay, "baseline_plus_grad": total([baseline, batch])}  # fmt: skip
    cov = covariances(at_batch.logp, advantages(sequences).to(at_batch.logp), at_batch.mask)
    eta = plan.reference_eta or step.eta
    found, tokens = [], torch.zeros_like(update.weights)
    for number, evaluation in enumerate(evaluations):
        look = Look(model, evaluation, update, directions, singles, plan, temperature, ranks, clock, memo)
        found.append(look.findings(eta, cov, at_batch))
        if number == 0:
            with clock.time("tokens"):
                tokens = token_slopes(model, update, look.kept.gradient, temperature, plan.tf_batch_size)
    sizes = {name: norm(v) for name, v in directions.items()}
    return Findings(update, at_batch, update.residual(), sizes, tokens, cov, found, eta, attempts, clock.seconds)


class Look:
    """One evaluation batch's part of a probe; arguments as :func:`probe`."""

    def __init__(
        self,
        model: nn.Module,
        evaluation: Sequences,
        update: Update,
        directions: dict[str, Tensors],
        singles: list[Tensors],
        plan: Plan,
        temperature: float,
        ranks: Ranks,
        clock: Clock,
        memo: Memo,
    ) -> None:
        self.model, self.evaluation, self.update, self.directions = model, evaluation, update, directions
        self.plan, self.temperature, self.ranks, self.clock = plan, temperature, ranks, clock
        self.singles, self.memo, self.theta = singles, memo, trainable(model)
        off = total([directions["baseline_plus_grad"], {n: -t for n, t in directions["full"].items()}])
        self.closed = norm(off) <= CLOSED * norm(directions["full"])
        self.question = digest(evaluation.prompts, evaluation.responses, temperature, fingerprint(self.theta))
        with clock.time("baseline"):
            self.base = ranks.scores(model, evaluation, temperature, None, plan.tf_batch_size)
        with clock.time("first order"):
            self.kept: EntropyRows = entropy_rows(
                model, evaluation, plan.kind, temperature, plan.grad_chunk_size, self.base, ranks
            )

    def measured(self, passes: Passes, direction: Mapping[str, Tensor], eta: float) -> tuple[Weighted, Weighted, bool]:
        """Return the change at a finite step by the plan's estimator and by the other, and whether it is lost."""
        plan = self.plan
        with self.clock.time("finite steps"):
            there = self.memo.scores(
                lambda: [self.question, fingerprint(direction), eta],
                self.base,
                lambda: self.ranks.scores(
                    passes, self.evaluation, self.temperature, moved(self.theta, direction, eta), plan.tf_batch_size
                ),
            )
        both = [f(self.base, there, plan.kind) for f in (prefix_weighted, sequence_weighted)]
        if plan.estimator == "sequence":
            both.reverse()
        n = self.base.mask.sum()
        moves = ((there.logp - self.base.logp).square().sum() / n).sqrt()
        size = (self.base.logp.square().sum() / n).sqrt() + 1
        # a log-probability is a difference of numbers of this size, each with a rounding of its own
        rounding = 8 * torch.finfo(next(iter(self.theta.values())).dtype).eps
        return both[0], both[1], bool(moves < 10 * rounding * size)

    def findings(self, reference_eta: float, cov: Tensor, at_batch: Scores) -> EvaluationFindings:
        """Return everything that the plan asks of this batch."""
        plan, singles = self.plan, self.singles
        names = ("full", "momentum", "decay", "grad")
        with self.clock.time("first order"):
            rows, values, errors = self.kept.along([*(self.directions[n] for n in names), *singles])
        k = len(names)
        slopes = {n: (float(values[i]), float(errors[i])) for i, n in enumerate(names)}
        out = EvaluationFindings(
            self.evaluation, self.base, entropy(self.base, plan.kind), slopes, rows[:, k:], (values[k:], errors[k:])
        )
        with ready(self.model) as passes:
            for eta in plan.etas:
                for flavour in FLAVOURS:
                    if flavour == "baseline_plus_grad" and self.closed:
                        out.changes.setdefault(flavour, {})[eta] = out.changes["full"][eta]
                        continue
                    change, other, lost = self.measured(passes, self.directions[flavour], eta)
                    out.changes.setdefault(flavour, {})[eta] = change
                    if flavour == "full":
                        out.weighting[eta] = other
                        if lost:
                            out.lost.append(eta)
            for eta in sorted({*plan.etas, reference_eta}) if plan.per_sequence else []:
                out.singles[eta] = [self.measured(passes, v, eta)[0] for v in singles]
        if plan.second_order:
            out.curvature = self.curvature()
        if plan.counterfactuals:
            self.compare(out, cov, at_batch)
        return out

    def curvature(self) -> Estimate:
        """Return the second derivative of the entropy along the step."""
        with self.clock.time("second order"):
            mine = self.ranks.share(len(self.evaluation))
            part, v = self.evaluation.take(mine), self.directions["full"]
            pairs = curvatures(self.model, part, v, self.temperature, self.plan.tf_batch_size)
            whole = []
            for x in (*pairs[0], *pairs[1]):
                out = torch.zeros_like(self.base.mask)
                out[mine, : x.shape[1]] = x
                whole.append(self.ranks.add_up(out))
        return second_order(self.base, (whole[0], whole[1]), (whole[2], whole[3]), self.plan.kind)

    def compare(self, out: EvaluationFindings, cov: Tensor, at_batch: Scores) -> None:
        """Fill in the steps that might have been."""
        update, state = self.update, self.update.state
        others: dict[str, AdamWStep] = {
            "no_momentum": update.with_state(state.without_momentum(), self.theta),
            "no_decay": update.with_state(state.with_hyper(weight_decay=0.0), self.theta),
            "betas_0.9_0.95": update.with_state(state.with_hyper(betas=(0.9, 0.95)), self.theta),
            "betas_0_0.999": update.with_state(state.with_hyper(betas=(0.0, 0.999)), self.theta),
            "clip_cov": self.with_tokens(self.kept_by_clip_cov(cov, at_batch.mask)),
            "kl_cov": self.with_tokens(1 - kl_cov(cov, at_batch.mask, self.plan.kl_cov_share)),
        }
        with self.clock.time("counterfactuals"):
            steps = [update.without([i], self.theta).direction for i in range(len(update.sequences))]
            _, values, errors = self.kept.along([*(s.direction for s in others.values()), *steps])
        k = len(others)
        out.update_errors = self.update_errors()
        out.counterfactuals = {n: (float(values[i]), float(errors[i])) for i, n in enumerate(others)}
        out.leave_one_out = values[k:], errors[k:]

    def update_errors(self) -> dict[str, float]:
        """Return the jackknife's standard errors of the slopes over the prompts of U, a step made anew without each."""
        found = [self.update.without(rows, self.theta) for rows in groups(self.update.sequences).values()]
        n = len(found)
        if n < 2:
            return {}
        batch = [{k: s.direction[k] - s.momentum[k] - s.decay[k] for k in s.direction} for s in found]
        parts = {"full": [s.direction for s in found], "momentum": [s.momentum for s in found],
                 "decay": [s.decay for s in found], "grad": batch}  # fmt: skip
        _, values, _ = self.kept.along([d for ds in parts.values() for d in ds])
        spread = (n - 1) * values.view(len(parts), n).var(1, correction=0)
        return dict(zip(parts, spread.sqrt().tolist(), strict=True))

    def kept_by_clip_cov(self, cov: Tensor, mask: Tensor) -> Tensor:
        """Return the tokens (N_U, T) whose gradient Clip-Cov keeps."""
        plan = self.plan
        u = torch.from_numpy(keyed_generator(0, 0, "clip_cov").random(tuple(cov.shape)))
        return clip_cov(cov, mask, plan.clip_cov_low, plan.clip_cov_high, plan.clip_cov_share, u)

    def with_tokens(self, keep: Tensor) -> AdamWStep:
        """Return the step in which only some tokens have a gradient."""
        update = self.update
        with self.clock.time("counterfactuals"):
            weights = -update.weights * keep.to(update.weights)
            gradient = weighted_gradient(
                self.model, update.sequences, weights, None, self.temperature, self.plan.tf_batch_size
            )
        return AdamWStep.of(self.theta, gradient, update.state, update.max_norm)
