"""The probe: by how much the next AdamW step changes a policy's entropy, and the influence of each of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_toys.errors import LARGEST, ToyError, bounded, require
from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Tensors, norm, sum_tensors
from lightning_toys.update_entropy.attribution import (
    SequenceEntropyGradients,
    Sharding,
    Update,
    clip_cov,
    covariances,
    kl_cov,
    make_update,
    sequence_entropy_gradients,
    token_influences,
)
from lightning_toys.update_entropy.cache import ScoreCache, digest, fingerprint
from lightning_toys.update_entropy.derivatives import (
    perturbed,
    score_second_jvp,
    trainable_parameters,
    weighted_gradient,
)
from lightning_toys.update_entropy.estimators import (
    EntropyKind,
    Estimate,
    ImportanceEstimate,
    Scores,
    entropy,
    entropy_second_derivative,
    prefix_importance_sampling,
    sequence_importance_sampling,
)
from lightning_toys.update_entropy.forward import InferencePolicy, evaluate, prepared_for_inference
from lightning_toys.update_entropy.grpo import nonzero_advantage_prompts, rows_by_prompt
from lightning_toys.update_entropy.losses import Objective
from lightning_toys.update_entropy.probe_result import EvaluationResult, ProbeResult
from lightning_toys.update_entropy.sequences import Sequences

DIRECTIONS = ("full", "baseline", "grad", "baseline_plus_grad")  # along which finite changes are measured
CLOSURE_TOLERANCE = 1e-6  # a sum of parts this close to the step, relative, is the step: one pass serves both


@dataclass
class Plan:
    """What a probe does.

    Args:
        prompts: of the update batch U.
        group: responses to each.
        eval_prompts: of an evaluation batch E.
        eval_group: responses to each.
        eval_batches: number of evaluation batches.
        etas: step sizes (learning rates) at which the change is measured.
        reference_eta: step size of the matrix of E against U; null for the training's own.
        kind: entropy per ``token``, per ``sequence``, or ``surprisal`` per token.
        estimator: weights of a finite step: of each position's ``prefix``, or of the whole ``sequence`` (SNIS).
        per_sequence: measure every update sequence's direction at every eta too.
        counterfactuals: leave-one-out, no momentum, other betas, Clip-Cov, KL-Cov; standard errors of sampling U.
        second_order: the curvature along the step.
        filter_zero_advantage: replace prompts whose responses all earn the same reward.
        max_resample_attempts: times that U is sampled before the probe gives up.
        tolerance: greatest advantage that counts as zero.
        clip_cov_low: least covariance of a token that Clip-Cov may drop.
        clip_cov_high: greatest.
        clip_cov_share: fraction of the tokens that it drops.
        kl_cov_share: fraction of the tokens that KL-Cov penalises, left out here.
        tf_batch_size: sequences of a forward pass.
        grad_chunk_size: sequences of a batched reverse pass.

    Raises:
        ToyError: a value is not allowed.
    """

    prompts: int = 4
    group: int = 4
    eval_prompts: int = 128
    eval_group: int = 2
    eval_batches: int = 1
    etas: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    reference_eta: float | None = None
    kind: EntropyKind = "token"
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
        minimum = {"prompts": 1, "group": 2, "eval_prompts": 2, "eval_group": 1, "eval_batches": 1,
                 "max_resample_attempts": 1, "tf_batch_size": 1, "grad_chunk_size": 1}  # fmt: skip
        for name, low in minimum.items():
            value = getattr(self, name)
            bounded(f"--model.plan.{name}", value, low)
        require(len(self.etas) > 0, "--model.plan.etas: [] is not allowed; give at least one step size")
        for eta in self.etas:
            bounded("--model.plan.etas", eta, 0.0, above=True)
        require(
            len(set(self.etas)) == len(self.etas),
            f"--model.plan.etas: {self.etas} is not allowed; give different numbers > 0",
        )
        if self.reference_eta is not None:
            bounded("--model.plan.reference_eta", self.reference_eta, 0.0, above=True)
        for name in ("tolerance", "clip_cov_low", "clip_cov_high"):
            bounded(f"--model.plan.{name}", getattr(self, name), 0.0 if name == "tolerance" else -LARGEST)
        for name in ("clip_cov_share", "kl_cov_share"):
            value = getattr(self, name)
            require(0 < value < 1, f"--model.plan.{name}: {value} is not allowed; give a share between 0 and 1")
        require(
            self.clip_cov_low < self.clip_cov_high,
            f"--model.plan.clip_cov_low: {self.clip_cov_low} is not allowed; "
            f"give less than --model.plan.clip_cov_high ({self.clip_cov_high})",
        )


def sample_update_batch(sample: Callable[[int], Sequences], plan: Plan) -> tuple[Sequences, int]:
    """Return a batch U in which every prompt's responses differ in reward, and the times that one was sampled.

    Args:
        sample: returns the batch of an attempt, counted from 0.
        plan: how many prompts are wanted and how often to try.

    Raises:
        ToyError: too few prompts have responses that differ.
    """
    kept: list[Sequences] = []
    for attempt in range(plan.max_resample_attempts):
        batch = sample(attempt)
        if not plan.filter_zero_advantage:
            return batch, 1
        groups = rows_by_prompt(batch)
        kept += [batch.take(groups[number]) for number in nonzero_advantage_prompts(batch, plan.tolerance)]
        if len(kept) >= plan.prompts:
            return concatenate_groups(kept[: plan.prompts]), attempt + 1
    raise ToyError(
        f"--model.plan.max_resample_attempts: after {plan.max_resample_attempts} draws of {plan.prompts} prompts only "
        f"{len(kept)} had responses of different reward, so that the step has no gradient to speak of; "
        "give more attempts, a larger --model.plan.group, or --model.plan.filter_zero_advantage false"
    )


def concatenate_groups(groups: list[Sequences]) -> Sequences:
    """Return groups, each of one prompt, as one batch; prompts are numbered from 0."""
    return Sequences(
        [p for x in groups for p in x.prompts],
        [r for x in groups for r in x.responses],
        [k for k, x in enumerate(groups) for _ in range(len(x))],
        [r for x in groups for r in x.rewards],
    )


class Timer:
    """Wall time by name.

    Attributes:
        seconds: by name.
    """

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
    sharding: Sharding | None = None,
    attempts: int = 1,
    cache: ScoreCache | None = None,
    objective: Objective | None = None,
) -> ProbeResult:
    """Return the effect on the entropy of the step that AdamW would take with a batch.

    Args:
        model: the policy; only its parameters that require a gradient are stepped. It is left as it was.
        sequences: U, generated by the policy, with rewards.
        evaluations: evaluation batches E, generated by the policy.
        state: AdamW's settings and moments.
        plan: what to do.
        max_norm: bound on the gradient's norm.
        temperature: all sequences were generated at.
        sharding: of evaluation sequences over processes.
        attempts: times that U was sampled, for the record.
        cache: keeps finished passes on disk.
        objective: the loss that the step is of; None for Dr. GRPO's.
    """
    sharding, timer, cache = sharding or Sharding(), Timer(), cache or ScoreCache()
    with timer.time("update"):
        update = make_update(model, sequences, state, max_norm, temperature, plan.grad_chunk_size, objective)
        batch_scores = evaluate(model, sequences, temperature, chunk=plan.tf_batch_size)
    step = update.step
    baseline = sum_tensors([step.momentum, step.decay])
    sequence_directions = update.sequence_directions()
    batch = sum_tensors(sequence_directions)
    directions = {"full": step.direction, "baseline": baseline, "grad": batch, "momentum": step.momentum,
                  "decay": step.decay, "baseline_plus_grad": sum_tensors([baseline, batch])}  # fmt: skip
    A = update.objective.advantages(sequences).to(batch_scores.logp)
    cov = covariances(batch_scores.logp, A, batch_scores.mask)
    eta = plan.reference_eta or step.eta
    results, tokens = [], torch.zeros_like(update.weights)
    for number, evaluation in enumerate(evaluations):
        one = EvaluationProbe(
            model, evaluation, update, directions, sequence_directions, plan, temperature, sharding, timer, cache
        )
        results.append(one.run(eta, cov, batch_scores))
        if number == 0:
            with timer.time("tokens"):
                h = one.gradients.entropy_gradient
                tokens = token_influences(model, update, h, temperature, plan.tf_batch_size)
        del one  # its gradients, before those of the next batch are taken
    norms = {name: norm(v) for name, v in directions.items()}
    return ProbeResult(
        update, batch_scores, update.residual(), norms, tokens, cov, results, eta, attempts, timer.seconds
    )


class EvaluationProbe:
    """The part of a probe that one evaluation batch gives.

    Args:
        model: the policy.
        evaluation: E.
        update: U and the step.
        directions: the step and its parts, by name.
        sequence_directions: v_i of each update sequence.
        plan: what to do.
        temperature: all sequences were generated at.
        sharding: of E over processes.
        timer: that the seconds are added to.
        cache: keeps finished passes on disk.

    Attributes:
        base: scores of E at the policy itself.
        gradients: of the entropy, by sequence of E.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluation: Sequences,
        update: Update,
        directions: dict[str, Tensors],
        sequence_directions: list[Tensors],
        plan: Plan,
        temperature: float,
        sharding: Sharding,
        timer: Timer,
        cache: ScoreCache,
    ) -> None:
        self.model, self.evaluation, self.update, self.directions = model, evaluation, update, directions
        self.plan, self.temperature, self.sharding, self.timer = plan, temperature, sharding, timer
        self.sequence_directions, self.cache, self.theta = sequence_directions, cache, trainable_parameters(model)
        difference = sum_tensors([directions["baseline_plus_grad"], {n: -t for n, t in directions["full"].items()}])
        self.parts_close = norm(difference) <= CLOSURE_TOLERANCE * norm(directions["full"])
        self.cache_key = digest(evaluation.prompts, evaluation.responses, temperature, fingerprint(self.theta))
        with timer.time("baseline"):
            self.base = sharding.evaluate(model, evaluation, temperature, None, plan.tf_batch_size)
        with timer.time("first order"):
            self.gradients: SequenceEntropyGradients = sequence_entropy_gradients(
                model, evaluation, plan.kind, temperature, plan.grad_chunk_size, self.base, sharding
            )

    def measure_change(
        self, policy: InferencePolicy, direction: Mapping[str, Tensor], eta: float
    ) -> tuple[ImportanceEstimate, ImportanceEstimate, bool]:
        """Return the change at theta + eta v by the plan's estimator, by the other, and if it is within rounding."""
        plan = self.plan
        with self.timer.time("finite steps"):
            moved = self.cache.get_or_compute(
                lambda: [self.cache_key, fingerprint(direction), eta],
                self.base,
                lambda: self.sharding.evaluate(
                    policy, self.evaluation, self.temperature, perturbed(self.theta, direction, eta), plan.tf_batch_size
                ),
            )
        both = [f(self.base, moved, plan.kind) for f in (prefix_importance_sampling, sequence_importance_sampling)]
        if plan.estimator == "sequence":
            both.reverse()
        n = self.base.mask.sum()
        difference = ((moved.logp - self.base.logp).square().sum() / n).sqrt()
        size = (self.base.logp.square().sum() / n).sqrt() + 1
        # a log-probability is a difference of numbers of this size, each with a rounding of its own
        rounding = 8 * torch.finfo(next(iter(self.theta.values())).dtype).eps
        return both[0], both[1], bool(difference < 10 * rounding * size)

    def run(self, reference_eta: float, cov: Tensor, batch_scores: Scores) -> EvaluationResult:
        """Return everything that the plan asks of this batch.

        Args:
            reference_eta: step size of the matrix of E against U.
            cov: covariances of U's tokens (N_U, T).
            batch_scores: of U at the policy itself.
        """
        plan = self.plan
        names = ("full", "momentum", "decay", "grad")
        with self.timer.time("first order"):
            directions = [*(self.directions[n] for n in names), *self.sequence_directions]
            rows, values, errors = self.gradients.directional_derivatives(directions)
        k = len(names)
        derivatives = {n: (float(values[i]), float(errors[i])) for i, n in enumerate(names)}
        h = entropy(self.base, plan.kind)
        with self.timer.time("first order"):
            slope = self.gradients.directional_derivative(self.directions["full"])
        influences = (values[k:], errors[k:])
        out = EvaluationResult(self.evaluation, self.base, h, derivatives, rows[:, k:], influences, slope)
        with prepared_for_inference(self.model) as policy:
            for eta in plan.etas:
                for name in DIRECTIONS:
                    if name == "baseline_plus_grad" and self.parts_close:
                        out.changes.setdefault(name, {})[eta] = out.changes["full"][eta]
                        continue
                    change, other, within_rounding = self.measure_change(policy, self.directions[name], eta)
                    out.changes.setdefault(name, {})[eta] = change
                    if name == "full":
                        out.other_estimator[eta] = other
                        if within_rounding:
                            out.within_rounding.append(eta)
            for eta in sorted({*plan.etas, reference_eta}) if plan.per_sequence else []:
                changes = [self.measure_change(policy, v, eta)[0] for v in self.sequence_directions]
                out.sequence_changes[eta] = changes
        if plan.second_order:
            out.curvature = self.curvature()
        if plan.counterfactuals:
            self.add_counterfactuals(out, cov, batch_scores)
        return out

    def curvature(self) -> Estimate:
        """Return the second derivative of the entropy along the step."""
        with self.timer.time("second order"):
            rows = self.sharding.local_rows(len(self.evaluation))
            part, v = self.evaluation.take(rows), self.directions["full"]
            first, second = score_second_jvp(self.model, part, v, self.temperature, self.plan.tf_batch_size)
            whole = []
            for x in (*first, *second):
                out = torch.zeros_like(self.base.mask)
                out[rows, : x.shape[1]] = x
                whole.append(self.sharding.all_reduce(out))
        return entropy_second_derivative(self.base, (whole[0], whole[1]), (whole[2], whole[3]), self.plan.kind)

    def add_counterfactuals(self, out: EvaluationResult, cov: Tensor, batch_scores: Scores) -> None:
        """Fill in dH/d eta of other steps; arguments as :meth:`run`."""
        update, state = self.update, self.update.state
        others: dict[str, AdamWStep] = {
            "no_momentum": update.step_with_state(state.without_momentum(), self.theta),
            "no_decay": update.step_with_state(state.with_hyperparameters(weight_decay=0.0), self.theta),
            "betas_0.9_0.95": update.step_with_state(state.with_hyperparameters(betas=(0.9, 0.95)), self.theta),
            "betas_0_0.999": update.step_with_state(state.with_hyperparameters(betas=(0.0, 0.999)), self.theta),
            "clip_cov": self.step_with_tokens(self.clip_cov_mask(cov, batch_scores.mask)),
            "kl_cov": self.step_with_tokens(1 - kl_cov(cov, batch_scores.mask, self.plan.kl_cov_share)),
        }
        with self.timer.time("counterfactuals"):
            left_out = [update.step_without([i], self.theta).direction for i in range(len(update.sequences))]
            directions = [*(s.direction for s in others.values()), *left_out]
            _, values, errors = self.gradients.directional_derivatives(directions)
        k = len(others)
        out.update_se = self.update_se()
        out.counterfactuals = {n: (float(values[i]), float(errors[i])) for i, n in enumerate(others)}
        out.leave_one_out = values[k:], errors[k:]

    def update_se(self) -> dict[str, float]:
        """Return jackknife standard errors of dH/d eta over the prompts of U, the step recomputed without each."""
        steps = [self.update.step_without(rows, self.theta) for rows in rows_by_prompt(self.update.sequences).values()]
        n = len(steps)
        if n < 2:
            return {}
        batch = [{k: s.direction[k] - s.momentum[k] - s.decay[k] for k in s.direction} for s in steps]
        parts = {"full": [s.direction for s in steps], "momentum": [s.momentum for s in steps],
                 "decay": [s.decay for s in steps], "grad": batch}  # fmt: skip
        _, values, _ = self.gradients.directional_derivatives([d for ds in parts.values() for d in ds])
        variances = (n - 1) * values.view(len(parts), n).var(1, correction=0)
        return dict(zip(parts, variances.sqrt().tolist(), strict=True))

    def clip_cov_mask(self, cov: Tensor, mask: Tensor) -> Tensor:
        """Return 1 for the tokens (N_U, T) whose gradient Clip-Cov keeps, 0 for the others."""
        plan = self.plan
        u = torch.from_numpy(keyed_generator(0, 0, "clip_cov").random(tuple(cov.shape)))
        return clip_cov(cov, mask, plan.clip_cov_low, plan.clip_cov_high, plan.clip_cov_share, u)

    def step_with_tokens(self, keep: Tensor) -> AdamWStep:
        """Return the step in which only some tokens, 1 in ``keep`` (N_U, T), have a gradient."""
        update = self.update
        with self.timer.time("counterfactuals"):
            weights = -update.weights * keep.to(update.weights)
            gradient = weighted_gradient(
                self.model, update.sequences, weights, None, self.temperature, self.plan.tf_batch_size
            )
        return AdamWStep.from_gradient(self.theta, gradient, update.state, update.max_norm)
