"""The result of a probe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_toys.update_entropy.controls import ControlResult
from lightning_toys.update_entropy.estimators import Estimate, ImportanceEstimate, Scores, ratio_interval
from lightning_toys.update_entropy.linear_fits import LinearFit, linear_fit
from lightning_toys.update_entropy.reward_change import RewardResult
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.update import Update


@dataclass
class EvaluationResult:
    """What is estimated on one evaluation batch E. Entropies are in nats, derivatives in nats per unit of eta.

    Attributes:
        sequences: E.
        scores: of E at the policy itself.
        entropy: H.
        derivatives: dH/d eta along ``full``, ``momentum``, ``decay``, ``grad``: value and standard error.
        influence_matrix: contribution of each evaluation sequence to each update sequence's dH/d eta (N_E, N_U).
        sequence_influences: dH/d eta of each update sequence (N_U,), and standard errors.
        slope: dH/d eta along the whole step, with each sequence's influence on it.
        curvature: second derivative along the step.
        changes: by direction (:data:`~lightning_toys.update_entropy.probe.DIRECTIONS`) and step size, the measured
            change.
        sequence_changes: by step size, the measured change along each update sequence's direction.
        other_estimator: by step size, the change along the whole step by the estimator that the plan did not ask for.
        within_rounding: step sizes at which the change of l_k is within rounding.
        counterfactuals: by name, dH/d eta of another step, and its standard error.
        leave_one_out: dH/d eta without each update sequence (N_U,), and standard errors.
        update_se: standard errors of ``derivatives`` that come from sampling U, beside those that come from E.
        reward: the expected reward's change under the same step; None where E has no rewards, or all the same.
    """

    sequences: Sequences
    scores: Scores
    entropy: Estimate
    derivatives: dict[str, tuple[float, float]]
    influence_matrix: Tensor
    sequence_influences: tuple[Tensor, Tensor]
    slope: Estimate
    curvature: Estimate | None = None
    changes: dict[str, dict[float, ImportanceEstimate]] = field(default_factory=dict)
    sequence_changes: dict[float, list[ImportanceEstimate]] = field(default_factory=dict)
    other_estimator: dict[float, ImportanceEstimate] = field(default_factory=dict)
    within_rounding: list[float] = field(default_factory=list)
    counterfactuals: dict[str, tuple[float, float]] = field(default_factory=dict)
    leave_one_out: tuple[Tensor, Tensor] | None = None
    update_se: dict[str, float] = field(default_factory=dict)
    reward: RewardResult | None = None

    def fits(self) -> list[LinearFit]:
        """Return of each update sequence how straight its changes are in eta; nothing where they were not measured.

        Step sizes at which the whole step's change is within rounding are left out.
        """
        etas = sorted(set(self.sequence_changes) - set(self.within_rounding))
        each = zip(*(self.sequence_changes[eta] for eta in etas), strict=True)
        return [linear_fit(etas, [w.change.value for w in changes]) for changes in each]

    @property
    def linear_until_interval(self) -> tuple[float, float] | None:
        """95 % interval of eta*, the step size at which the second-order term is a tenth of the first-order term."""
        if self.curvature is None:
            return None
        found = ratio_interval(self.slope, self.curvature, self.scores.prompt_index)
        return found and (0.2 * found[0], 0.2 * found[1])

    @property
    def linear_until(self) -> float | None:
        """eta*; None where slope or curvature does not differ significantly from 0."""
        interval = self.linear_until_interval
        if self.curvature is None or interval is None or interval[0] == 0 or math.isinf(interval[1]):
            return None
        return 0.2 * abs(self.slope.value / self.curvature.value)


@dataclass(frozen=True)
class ParameterParts:
    """A parameter's part of the step and of its effect.

    Attributes:
        size: numbers in the parameter.
        norms: Euclidean norm of its part of ``full``, ``momentum``, ``decay`` and ``grad``, by name.
        influences: its part of dH/d eta along each: they add up over parameters to the derivative along the direction.
        residual: norm of what full - momentum - decay - grad leaves of it.
    """

    size: int
    norms: dict[str, float]
    influences: dict[str, float]
    residual: float


STEP_PARTS = ("momentum", "decay", "grad")  # that the whole step is the sum of


def parameter_parts(
    gradient: Mapping[str, Tensor], directions: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, ParameterParts]:
    """Return each parameter's part of the step and of dH/d eta, by its name.

    Args:
        gradient: h, of the entropy, by parameter name.
        directions: ``full`` and its parts, by name, each by parameter name.
    """
    out = {}
    for name, h in gradient.items():
        parts = {d: directions[d][name].double() for d in ("full", *STEP_PARTS)}
        left = parts["full"] - sum(parts[d] for d in STEP_PARTS)
        out[name] = ParameterParts(
            h.numel(),
            {d: float(v.norm()) for d, v in parts.items()},
            {d: float((h.double() * v).sum()) for d, v in parts.items()},
            float(left.norm()),
        )
    return out


@dataclass
class ProbeResult:
    """The result of probing one policy's next step.

    Attributes:
        update: the batch U and the step.
        batch_scores: of U at the policy itself.
        residual: |v - momentum - decay - sum_i v_i| / |v|.
        norms: Euclidean norm of each direction, by name.
        token_influences: influence of each update token on the entropy (N_U, T), by the first evaluation batch.
        covariances: (l - mean l)(A - mean A) of each update token (N_U, T).
        evaluations: one for each evaluation batch.
        reference_eta: step size of the matrix of E against U.
        attempts: times that U was sampled.
        seconds: wall time, by part of the probe.
        parameters: each parameter's part of the step and of its effect, by the first evaluation batch.
        controls: the step beside others of its size, where the plan asks for it.
    """

    update: Update
    batch_scores: Scores
    residual: float
    norms: dict[str, float]
    token_influences: Tensor
    covariances: Tensor
    evaluations: list[EvaluationResult]
    reference_eta: float
    attempts: int
    seconds: dict[str, float]
    parameters: dict[str, ParameterParts] = field(default_factory=dict)
    controls: ControlResult | None = None
