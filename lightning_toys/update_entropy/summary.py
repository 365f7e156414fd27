"""What a probe found."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_toys.update_entropy.attribution import Update
from lightning_toys.update_entropy.estimators import Estimate, Scores, Weighted
from lightning_toys.update_entropy.sequences import Sequences


@dataclass
class EvaluationFindings:
    """What one evaluation batch says.

    Attributes:
        sequences: E.
        scores: at the policy itself.
        entropy: H.
        slopes: dH / d eta of ``full``, ``momentum``, ``decay``, ``grad``: value and standard error.
        influence: contribution of each evaluation sequence to each update sequence's dH / d eta (N_E, N_U).
        influences: dH / d eta of each update sequence (N_U,), and standard errors.
        curvature: second derivative along the step.
        changes: flavour to step size to the measured change.
        singles: step size to the change that each update sequence's direction makes.
        weighting: the other estimator's change along the whole step, by step size.
        lost: step sizes at which the change of l_k is within rounding.
        counterfactuals: name to dH / d eta of the other step, and its standard error.
        leave_one_out: dH / d eta without each update sequence (N_U,), and standard errors.
        update_errors: standard errors of the slopes that come from the draw of U, beside those that come from E's.
    """

    sequences: Sequences
    scores: Scores
    entropy: Estimate
    slopes: dict[str, tuple[float, float]]
    influence: Tensor
    influences: tuple[Tensor, Tensor]
    curvature: Estimate | None = None
    changes: dict[str, dict[float, Weighted]] = field(default_factory=dict)
    singles: dict[float, list[Weighted]] = field(default_factory=dict)
    weighting: dict[float, Weighted] = field(default_factory=dict)
    lost: list[float] = field(default_factory=list)
    counterfactuals: dict[str, tuple[float, float]] = field(default_factory=dict)
    leave_one_out: tuple[Tensor, Tensor] | None = None
    update_errors: dict[str, float] = field(default_factory=dict)

    @property
    def linear_until(self) -> float | None:
        """The step size at which the second-order term is a tenth of the first-order term."""
        if self.curvature is None or self.curvature.value == 0:
            return None
        return 0.2 * abs(self.slopes["full"][0] / self.curvature.value)


@dataclass
class Findings:
    """What a probe found.

    Attributes:
        update: the batch and the step.
        batch_scores: of U at the policy itself.
        residual: |v - momentum - decay - sum_i v_i| / |v|.
        norms: of the directions.
        token_slopes: share of each update token in dH / d eta (N_U, T), by the first evaluation batch.
        covariances: (l - mean l)(A - mean A) of each update token (N_U, T).
        evaluations: one for each evaluation batch.
        reference_eta: step size of the matrix of E against U.
        attempts: draws of U.
        seconds: what took how long.
    """

    update: Update
    batch_scores: Scores
    residual: float
    norms: dict[str, float]
    token_slopes: Tensor
    covariances: Tensor
    evaluations: list[EvaluationFindings]
    reference_eta: float
    attempts: int
    seconds: dict[str, float]
