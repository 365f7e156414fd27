"""The entropy change of an optimiser's next step, predicted before it is taken and measured after it.

What :class:`~lightning_toys.update_entropy.callback.UpdateEntropyCallback` (Lightning) and
:class:`~lightning_toys.update_entropy.hf.EntropyProbe` (transformers, TRL) share. It wants a model with its gradients,
an AdamW, and responses that the model has just generated; it knows no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_toys.errors import ToyError, note
from lightning_toys.stats import t_quantile
from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Tensors
from lightning_toys.update_entropy.derivatives import score_second_jvp
from lightning_toys.update_entropy.entropy_derivatives import (
    EntropyDerivatives,
    ForwardEntropyDerivatives,
    sequence_entropy_gradients,
)
from lightning_toys.update_entropy.estimators import (
    EntropyKind,
    Estimate,
    Scores,
    entropy,
    entropy_second_derivative,
    prefix_importance_sampling,
)
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.sequences import Sequences

MISMATCH_TOLERANCE = 0.01  # of a step's largest element: rounding in single precision stays a hundred times below


@dataclass(frozen=True)
class PredictionSettings:
    """How a step's entropy change is estimated.

    Args:
        kind: entropy per ``token``, per ``sequence``, or ``surprisal`` per token.
        temperature: that responses were generated at.
        chunk: sequences in one pass.
        second_order: whether the curvature along the step is added, by a second derivative of the responses.
        keep_gradients: whether the gradient of each response may be kept, as many times the memory of what is trained;
            else the four directions take a forward-mode pass each.
    """

    kind: EntropyKind = "token"
    temperature: float = 1.0
    chunk: int = 64
    second_order: bool = True
    keep_gradients: bool = True


@dataclass
class PredictedStep:
    """A policy's weights after a step, as they were predicted.

    Attributes:
        weights: theta + eta v, by the policy's names.
        size: largest element of |eta v|.
    """

    weights: Tensors
    size: float

    def relative_error(self, model: nn.Module) -> float:
        """Return the largest difference between the weights and the predicted ones, in units of ``size``."""
        named = dict(model.named_parameters())
        difference = max(float((named[n].detach().double() - w).abs().max()) for n, w in self.weights.items())
        return difference / self.size if self.size else 0.0


@dataclass
class StepPrediction:
    """A step that has been predicted and not yet measured.

    Attributes:
        metrics: ``predicted``, ``momentum``, ``decay``, ``batch``, ``second_order`` and ``entropy``, each but the last
            with its standard error ``..._se``; in nats; and ``clusters``. :func:`measure_step` adds ``missed``,
            ``measured`` and ``measured_se``.
        expected: the weights after the step.
        responses: that it is measured on; None for no measurement.
        before: scores of those before the step.
        clusters: of the prediction's responses or the measurement's, whichever has fewer.
    """

    metrics: dict[str, float]
    expected: PredictedStep
    responses: Sequences | None = None
    before: Scores | None = None
    clusters: int = 0


def predict_step(
    model: nn.Module, step: AdamWStep, responses: Sequences, fresh: Sequences | None, settings: PredictionSettings
) -> StepPrediction:
    """Return the entropy change that a step is going to make, with its parts and errors.

    Args:
        model: the policy, before the step.
        step: of the policy's parameters, by the policy's names.
        responses: that the policy generated, for the prediction.
        fresh: others, for the measurement, so that its error is independent; None for no measurement.
        settings: of the estimates.
    """
    kind, temperature, chunk = settings.kind, settings.temperature, settings.chunk
    derivatives: EntropyDerivatives
    if settings.keep_gradients:
        derivatives = sequence_entropy_gradients(model, responses, kind, temperature, min(32, chunk))
    else:
        derivatives = ForwardEntropyDerivatives(model, responses, kind, temperature, chunk)
    named = dict(model.named_parameters())
    change = {n: step.eta * v.double() for n, v in step.direction.items()}
    weights = {n: named[n].detach().double() + d for n, d in change.items()}
    expected = PredictedStep(weights, max(float(d.abs().max()) for d in change.values()))
    batch = {n: step.direction[n] - step.momentum[n] - step.decay[n] for n in step.direction}
    parts = {"predicted": step.direction, "momentum": step.momentum, "decay": step.decay, "batch": batch}
    _, values, errors = derivatives.directional_derivatives(parts.values())
    metrics: dict[str, float] = {}
    for k, name in enumerate(parts):
        metrics[name], metrics[f"{name}_se"] = step.eta * float(values[k]), step.eta * float(errors[k])
    if settings.second_order:
        slope = derivatives.directional_derivative(step.direction)
        bent = second_order_change(model, responses, derivatives.scores, slope, step, kind, temperature, chunk)
        metrics["second_order"], metrics["second_order_se"] = bent.value, bent.se
    metrics["entropy"] = entropy(derivatives.scores, kind).value
    before = None if fresh is None else evaluate(model, fresh, temperature, chunk=chunk)
    clusters = min(len(set(x.prompt_index)) for x in (responses, fresh) if x is not None)
    metrics["clusters"] = clusters
    return StepPrediction(metrics, expected, fresh, before, clusters)


def measure_step(model: nn.Module, prediction: StepPrediction, settings: PredictionSettings) -> dict[str, float]:
    """Return the prediction's metrics with what has come of it; the model's weights must be those right after the step.

    Args:
        model: the policy, after the step.
        prediction: of the step.
        settings: of the estimates.
    """
    metrics = prediction.metrics
    metrics["missed"] = prediction.expected.relative_error(model)
    if prediction.responses is not None and prediction.before is not None:
        after = evaluate(model, prediction.responses, settings.temperature, chunk=settings.chunk)
        change = prefix_importance_sampling(prediction.before, after, settings.kind).change
        metrics["measured"], metrics["measured_se"] = change.value, change.se
    return metrics


def warn_of_mismatch(who: str, step: int, missed: float) -> bool:
    """Say that the step taken is not the predicted one, if it is not; return whether that was said.

    Args:
        who: says it.
        step: number of the step.
        missed: greatest relative difference.
    """
    if missed <= MISMATCH_TOLERANCE:
        return False
    note(
        f"{who}: the step taken at {step} is not the one predicted "
        f"(by {missed:.2g} of its greatest element): something changes gradients or weights after "
        "callbacks saw them, such as a module's own clipping, a gradient scaler, or weights in half a precision"
    )
    return True


def policy_error(who: str, model: nn.Module, error: Exception) -> ToyError:
    """Return the error for a model that cannot be sampled from or scored."""
    text = " ".join(str(error).split())[:160]
    return ToyError(
        f"{who}: {type(model).__name__} is no causal language model of transformers' "
        "interface (input_ids, attention_mask, past_key_values, use_cache; .logits, .past_key_values): "
        f"{type(error).__name__}: {text}"
    )


def second_order_change(
    model: nn.Module,
    sequences: Sequences,
    scores: Scores,
    slope: Estimate,
    step: AdamWStep,
    kind: EntropyKind,
    temperature: float,
    chunk: int,
) -> Estimate:
    """Return eta dH/d eta + eta^2 / 2 d^2H/d eta^2 along a step, with the error of their sum.

    Args:
        model: the policy, before the step.
        sequences: that it generated.
        scores: of them.
        slope: dH/d eta of the step on them.
        step: eta and v.
        kind: which entropy.
        temperature: they were generated at.
        chunk: sequences in one pass.
    """
    first, second = score_second_jvp(model, sequences, step.direction, temperature, chunk)
    curvature = entropy_second_derivative(scores, first, second, kind)
    a, b = step.eta, step.eta**2 / 2
    contributions, influence = (
        a * getattr(slope, name) + b * getattr(curvature, name) for name in ("contributions", "influence")
    )
    return Estimate.from_influence(contributions.sum(), contributions, influence, scores.prompt_index)


def within_interval(metrics: Mapping[str, Sequence[float]], clusters: Sequence[int]) -> list[bool]:
    """Return of each policy whether the measured change lies within the predicted one's 95 % interval, by both errors.

    The interval is Student's t, with one degree of freedom less than there are clusters of prompts; a normal one would
    be too narrow where there are few.

    Args:
        metrics: by name, a value for each policy.
        clusters: of each policy, those of the prediction or of the measurement, whichever has fewer.

    >>> found = {"predicted": [0.0], "predicted_se": [3.0], "measured": [11.0], "measured_se": [4.0]}
    >>> within_interval(found, [5]), within_interval(found, [200])
    ([True], [False])
    """
    name = "second_order" if "second_order" in metrics else "predicted"
    columns = [metrics.get(key, ()) for key in (name, f"{name}_se", "measured", "measured_se")]
    return [
        n > 1 and abs(y - x) <= t_quantile(0.975, n - 1) * math.hypot(a, b)
        for x, a, y, b, n in zip(*columns, clusters, strict=False)
    ]


def restrict_to_policy(
    model: nn.Module,
    everything: list[tuple[str, nn.Parameter]],
    gradients: dict[str, Tensor],
    state: AdamWState,
    clip: float,
) -> AdamWStep:
    """Return the part of an optimiser's step that changes one policy, by the policy's own names.

    Args:
        model: the policy.
        everything: the whole module's parameters, with their names in it.
        gradients: by the whole module's names.
        state: by the whole module's names.
        clip: factor that all gradients are going to be clipped by.
    """
    whole = {id(p): n for n, p in everything}
    names = {n: whole[id(p)] for n, p in model.named_parameters() if whole.get(id(p)) in gradients}
    parameters: Tensors = {n: p.detach() for n, p in model.named_parameters() if n in names}
    own = AdamWState(
        {n: state.hyperparameters[w] for n, w in names.items()}, {n: state.moments[w] for n, w in names.items()}
    )
    step = AdamWStep.from_gradient(parameters, {n: clip * gradients[w] for n, w in names.items()}, own)
    return replace(step, clip_scale=clip)
