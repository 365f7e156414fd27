"""What a probe does: sizes of its batches, step sizes, and which of its parts are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_toys.errors import LARGEST, REPEATS, bounded, check_settings, require
from lightning_toys.update_entropy.estimators import EntropyKind


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
        controls: random directions of the step's size that it is compared with, beside the step reversed, at every eta
            on responses sampled anew from the policy there, ``eval_prompts`` times ``eval_group``; 0 for no comparison.
        filter_zero_advantage: replace prompts whose responses all earn the same reward.
        max_resample_attempts: times that U is sampled before the probe gives up.
        tolerance: greatest advantage that counts as zero.
        clip_cov_low: least covariance of a token that Clip-Cov may drop.
        clip_cov_high: greatest.
        clip_cov_share: fraction of the tokens that it drops.
        kl_cov_share: fraction of the tokens that KL-Cov penalises, left out here.
        tf_batch_size: sequences of a forward pass.
        grad_chunk_size: sequences of a batched reverse pass.
        directions_per_pass: weights theta + eta v at which E is evaluated in one vectorised pass; each more takes the
            memory of what is trained three times, that of a pass, and with LoRA that of the matrices it is merged into.
        keep_gradients: keep the gradient of every sequence of U and E (fast: N_U + N_E times the memory of what is
            trained), or take each again when it is wanted (a pass over E each); null: keep them where they fit.

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
    controls: int = 0
    filter_zero_advantage: bool = True
    max_resample_attempts: int = 20
    tolerance: float = 1e-8
    clip_cov_low: float = 0.0
    clip_cov_high: float = 5.0
    clip_cov_share: float = 0.02
    kl_cov_share: float = 0.02
    tf_batch_size: int = 64
    grad_chunk_size: int = 32
    directions_per_pass: int = 1
    keep_gradients: bool | None = None

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.plan.")
        minimum = {"prompts": 1, "group": 2, "eval_prompts": 2, "eval_group": 1, "eval_batches": 1,
                 "max_resample_attempts": 1, "tf_batch_size": 1, "grad_chunk_size": 1,
                 "directions_per_pass": 1}  # fmt: skip
        for name, low in minimum.items():
            value = getattr(self, name)
            bounded(f"--model.plan.{name}", value, low)
        bounded("--model.plan.controls", self.controls, 0, REPEATS)
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
