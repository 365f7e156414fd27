"""The part of a probe that one evaluation batch gives: first and second order, finite steps, counterfactuals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.progress import WorkProgress
from lightning_toys.update_entropy.adamw import AdamWState
from lightning_toys.update_entropy.attribution import clip_cov, kl_cov, token_influences
from lightning_toys.update_entropy.cache import ScoreCache, digest, fingerprint
from lightning_toys.update_entropy.derivatives import (
    perturbed,
    score_jvp,
    score_second_jvp,
    trainable_parameters,
    weighted_gradient,
)
from lightning_toys.update_entropy.entropy_derivatives import (
    EntropyDerivatives,
    ForwardEntropyDerivatives,
    Sharding,
    sequence_entropy_gradients,
)
from lightning_toys.update_entropy.estimators import (
    Estimate,
    ImportanceEstimate,
    Scores,
    entropy,
    entropy_second_derivative,
    prefix_importance_sampling,
    ratio_estimate,
    sequence_importance_sampling,
)
from lightning_toys.update_entropy.forward import InferencePolicy, prepared_for_inference
from lightning_toys.update_entropy.grpo import rows_by_prompt
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.probe_result import EvaluationResult
from lightning_toys.update_entropy.reward_change import (
    RewardResult,
    known_rewards,
    reward_change,
    reward_derivative,
    reward_weights,
)
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.update import Update

DIRECTIONS = ("full", "baseline", "grad", "baseline_plus_grad")  # along which finite changes are measured


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


Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items, the last of what is left; none is held after it has been yielded.

    >>> list(batched(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
        del some


@dataclass(frozen=True)
class Point:
    """Where the entropy is measured: ``eta`` along ``direction`` from the policy."""

    direction: Mapping[str, Tensor]
    eta: float


@dataclass(frozen=True)
class Measured:
    """A change that was measured.

    Attributes:
        change: by the plan's estimator.
        other: by the other one.
        within_rounding: whether the change of l_k is within rounding.
        scores: of E there.
    """

    change: ImportanceEstimate
    other: ImportanceEstimate
    within_rounding: bool
    scores: Scores


class EvaluationProbe:
    """The part of a probe that one evaluation batch gives.

    Args:
        model: the policy.
        evaluation: E.
        update: U and the step.
        directions: the step and its parts, by name.
        parts_close: whether the parts' sum is the step, but for rounding.
        plan: what to do.
        temperature: all sequences were generated at.
        sharding: of E over processes.
        timer: that the seconds are added to.
        cache: keeps finished passes on disk.
        progress: that finished passes are counted by.

    Attributes:
        base: scores of E at the policy itself.
        gradients: of the entropy, by sequence of E, or what stands for them.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluation: Sequences,
        update: Update,
        directions: dict[str, Mapping[str, Tensor]],
        parts_close: bool,
        plan: Plan,
        temperature: float,
        sharding: Sharding,
        timer: Timer,
        cache: ScoreCache,
        progress: WorkProgress,
    ) -> None:
        self.model, self.evaluation, self.update, self.directions = model, evaluation, update, directions
        self.plan, self.temperature, self.sharding, self.timer = plan, temperature, sharding, timer
        self.progress = progress
        self.parts_close, self.cache, self.theta = parts_close, cache, trainable_parameters(model)
        self.cache_key = digest(evaluation.prompts, evaluation.responses, temperature, fingerprint(self.theta))
        with timer.time("baseline"):
            self.base = sharding.evaluate(model, evaluation, temperature, None, plan.tf_batch_size)
        self.gradients: EntropyDerivatives
        arguments = (model, evaluation, plan.kind, temperature, plan.grad_chunk_size, self.base, sharding)
        with timer.time("first order"):
            if plan.keep_gradients is False:
                self.gradients = ForwardEntropyDerivatives(*arguments)
            else:
                self.gradients = sequence_entropy_gradients(*arguments)

    def measure_changes(self, policy: InferencePolicy, points: Sequence[Point]) -> list[Measured]:
        """Return the changes at theta + eta v of several directions and step sizes, in one vectorised pass."""
        plan = self.plan

        def scores(wanted: list[int]) -> list[Scores]:
            weights = [perturbed(self.theta, points[i].direction, points[i].eta) for i in wanted]
            return self.sharding.evaluate_many(policy, self.evaluation, self.temperature, weights, plan.tf_batch_size)

        keys = [partial(self.key, point) for point in points]
        with self.timer.time("finite steps"):
            found = self.cache.get_or_compute(keys, self.base, scores)
        self.progress.advance(pieces=len(points))
        return [self.measured(moved) for moved in found]

    def key(self, point: Point) -> list[Any]:
        """Return what tells a pass from others: sequences and weights, direction, step size."""
        return [self.cache_key, fingerprint(point.direction), point.eta]

    def measured(self, moved: Scores) -> Measured:
        """Return the change from the policy to where E has the scores ``moved``."""
        plan = self.plan
        both = [f(self.base, moved, plan.kind) for f in (prefix_importance_sampling, sequence_importance_sampling)]
        if plan.estimator == "sequence":
            both.reverse()
        n = self.base.mask.sum()
        difference = ((moved.logp - self.base.logp).square().sum() / n).sqrt()
        size = (self.base.logp.square().sum() / n).sqrt() + 1
        # a log-probability is a difference of numbers of this size, each with a rounding of its own
        rounding = 8 * torch.finfo(next(iter(self.theta.values())).dtype).eps
        return Measured(both[0], both[1], bool(difference < 10 * rounding * size), moved)

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
            rows, values, errors = self.gradients.directional_derivatives(
                chain((self.directions[n] for n in names), self.update.sequence_directions())
            )
        k = len(names)
        derivatives = {n: (float(values[i]), float(errors[i])) for i, n in enumerate(names)}
        h = entropy(self.base, plan.kind)
        with self.timer.time("first order"):
            slope = self.gradients.directional_derivative(self.directions["full"])
        influences = (values[k:], errors[k:])
        out = EvaluationResult(self.evaluation, self.base, h, derivatives, rows[:, k:], influences, slope)
        if known_rewards(self.evaluation.rewards):
            out.reward = self.reward(names)
        measured_along = [n for n in DIRECTIONS if not (n == "baseline_plus_grad" and self.parts_close)]
        changes = [(name, eta) for eta in plan.etas for name in measured_along]
        with prepared_for_inference(self.model) as policy:
            for some in batched(changes, plan.directions_per_pass):
                found = self.measure_changes(policy, [Point(self.directions[n], eta) for n, eta in some])
                for (name, eta), m in zip(some, found, strict=True):
                    self.enter(out, name, eta, m)
        if self.parts_close:
            out.changes["baseline_plus_grad"] = dict(out.changes["full"])
        etas = sorted({*plan.etas, reference_eta})
        # one direction is made at a time, and not around the passes, since a direction may take derivatives
        each = self.update.sequence_directions() if plan.per_sequence else iter(())
        for points in batched((Point(v, eta) for v in each for eta in etas), plan.directions_per_pass):
            with prepared_for_inference(self.model) as policy:
                found = self.measure_changes(policy, points)
            for point, m in zip(points, found, strict=True):
                out.sequence_changes.setdefault(point.eta, []).append(m.change)
            del points  # before the next one is made: each direction is as large as what is trained
        if plan.second_order:
            out.curvature = self.curvature()
        if plan.counterfactuals:
            self.add_counterfactuals(out, cov, batch_scores)
        return out

    def enter(self, out: EvaluationResult, name: str, eta: float, m: Measured) -> None:
        """Enter a change along the step or one of its parts."""
        out.changes.setdefault(name, {})[eta] = m.change
        if name != "full":
            return
        out.other_estimator[eta] = m.other
        if m.within_rounding:
            out.within_rounding.append(eta)
        if out.reward is not None:
            out.reward.changes[eta] = reward_change(self.base, m.scores, self.evaluation.rewards)

    def gathered(self, rows: list[int], part: Tensor) -> Tensor:
        """Return a tensor (N_E, T) of all processes' rows of it."""
        out = torch.zeros_like(self.base.mask)
        out[rows, : part.shape[1]] = part
        return self.sharding.all_reduce(out)

    def reward(self, names: Sequence[str]) -> RewardResult:
        """Return what E's rewards say of the step; ``names`` are those of the directions that slopes are wanted of."""
        rows, rewards = self.sharding.local_rows(len(self.evaluation)), self.evaluation.rewards
        part, chunk = self.evaluation.take(rows), self.plan.tf_batch_size
        r = torch.tensor(rewards, dtype=torch.float64).to(self.base.mask)
        slopes = {}
        with self.timer.time("reward"):
            for name in names:
                dlogp, _ = score_jvp(self.model, part, self.directions[name], self.temperature, chunk)
                slope = reward_derivative(self.base, self.gathered(rows, dlogp), rewards)
                slopes[name] = (slope.value, slope.se)
            weights = reward_weights(self.base, rewards)[rows]
            h = weighted_gradient(self.model, part, weights, None, self.temperature, chunk)
            h = {n: self.sharding.all_reduce(g) for n, g in h.items()}
            tokens = token_influences(self.model, self.update, h, self.temperature, chunk, overwrite=True)
        return RewardResult(ratio_estimate(r, torch.ones_like(r), self.base.prompt_index), slopes, tokens)

    def curvature(self) -> Estimate:
        """Return the second derivative of the entropy along the step."""
        with self.timer.time("second order"):
            rows = self.sharding.local_rows(len(self.evaluation))
            part, v = self.evaluation.take(rows), self.directions["full"]
            first, second = score_second_jvp(self.model, part, v, self.temperature, self.plan.tf_batch_size)
            whole = [self.gathered(rows, x) for x in (*first, *second)]
        return entropy_second_derivative(self.base, (whole[0], whole[1]), (whole[2], whole[3]), self.plan.kind)

    def add_counterfactuals(self, out: EvaluationResult, cov: Tensor, batch_scores: Scores) -> None:
        """Fill in dH/d eta of other steps; arguments as :meth:`run`."""
        update, state = self.update, self.update.state
        kept = {
            "clip_cov": self.clip_cov_mask(cov, batch_scores.mask),
            "kl_cov": 1 - kl_cov(cov, batch_scores.mask, self.plan.kl_cov_share),
        }
        states: dict[str, Callable[[], AdamWState]] = {
            "no_momentum": state.without_momentum,
            "no_decay": lambda: state.with_hyperparameters(weight_decay=0.0),
            "betas_0.9_0.95": lambda: state.with_hyperparameters(betas=(0.9, 0.95)),
            "betas_0_0.999": lambda: state.with_hyperparameters(betas=(0.0, 0.999)),
        }

        def directions() -> Iterator[Mapping[str, Tensor]]:
            """One at a time: each is as large as what is trained."""
            yield from (update.step_with_state(make(), self.theta).direction for make in states.values())
            yield from (update.step_with_tokens(keep, self.theta, chunk).direction for keep in kept.values())
            yield from (update.step_without([i], self.theta).direction for i in range(len(update.sequences)))

        chunk, k = self.plan.tf_batch_size, len(states) + len(kept)
        with self.timer.time("counterfactuals"):
            _, values, errors = self.gradients.directional_derivatives(directions())
            out.update_se = self.update_se()
        out.counterfactuals = {n: (float(values[i]), float(errors[i])) for i, n in enumerate((*states, *kept))}
        out.leave_one_out = values[k:], errors[k:]

    def update_se(self) -> dict[str, float]:
        """Return jackknife standard errors of dH/d eta over the prompts of U, the step recomputed without each."""
        groups = list(rows_by_prompt(self.update.sequences).values())
        n = len(groups)
        if n < 2:
            return {}

        def directions() -> Iterator[Mapping[str, Tensor]]:
            for rows in groups:
                s = self.update.step_without(rows, self.theta)
                yield from (s.direction, s.momentum, s.decay)
                yield {k: s.direction[k] - s.momentum[k] - s.decay[k] for k in s.direction}
                del s  # before the next one is made

        _, values, _ = self.gradients.directional_derivatives(directions())
        variances = (n - 1) * values.view(n, 4).var(0, correction=0)
        return dict(zip(("full", "momentum", "decay", "grad"), variances.sqrt().tolist(), strict=True))

    def clip_cov_mask(self, cov: Tensor, mask: Tensor) -> Tensor:
        """Return 1 for the tokens (N_U, T) whose gradient Clip-Cov keeps, 0 for the others."""
        plan = self.plan
        u = torch.from_numpy(keyed_generator(0, 0, "clip_cov").random(tuple(cov.shape)))
        return clip_cov(cov, mask, plan.clip_cov_low, plan.clip_cov_high, plan.clip_cov_share, u)
