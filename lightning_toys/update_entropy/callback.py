"""UpdateEntropyCallback: the entropy change of each AdamW step, predicted before the step and measured after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_toys.errors import WHOLE, ToyError, bounded, check_settings, note, require
from lightning_toys.training.module import ToyModule
from lightning_toys.update_entropy.adamw import norm, read_state
from lightning_toys.update_entropy.attribution import covariances
from lightning_toys.update_entropy.estimators import EntropyKind
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.rollouts import generate, uniforms
from lightning_toys.update_entropy.sequences import Sequences, prompt_clusters
from lightning_toys.update_entropy.step_prediction import (
    PredictionSettings,
    StepPrediction,
    measure_step,
    policy_error,
    predict_step,
    restrict_to_policy,
    warn_of_mismatch,
    within_interval,
)


@runtime_checkable
class EntropySource(Protocol):
    """What a LightningModule has to offer for :class:`UpdateEntropyCallback` to measure its policies.

    Optional beside it: ``entropy_temperature``, a float that responses are sampled at (1 without it);
    ``entropy_batches()``, see :meth:`~lightning_toys.update_entropy.module.UpdateEntropy.entropy_batches`; and
    ``entropy_clusters(responses)``, the cluster of each response for standard errors (without it, responses to equal
    prompts are one cluster, see :func:`~lightning_toys.update_entropy.sequences.prompt_clusters`).

    Attributes:
        entropy_ends: tokens that end a response.
        entropy_length: tokens of a response at most.
    """

    entropy_ends: Sequence[int]
    entropy_length: int

    def entropy_policies(self) -> list[tuple[int, nn.Module]]:
        """Return a seed and a causal language model of transformers' interface for each policy."""

    def entropy_prompts(self, seed: int, step: int, stream: str, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` prompts, a function of the arguments alone."""


@dataclass
class PendingStep:
    """A step that has been predicted and not yet measured.

    Attributes:
        step: number of the optimiser step, from 1.
        metrics: by name, a value for each policy.
        predictions: of each policy.
    """

    step: int
    metrics: dict[str, list[float]]
    predictions: list[StepPrediction]


class UpdateEntropyCallback(Callback):
    """Predicts the entropy change of every n-th AdamW step before it is taken, and measures it afterwards.

    The prediction is first-order, eta <grad H, v>, with its standard error, split into momentum, weight decay and
    batch; ``second_order`` adds eta^2 / 2 times the curvature along the step, and has the error of both: a long step is
    bent. The measurement is by importance sampling on responses of its own, so that the errors are independent of it.
    All are logged as ``entropy_step/...``, in nats. Works with any LightningModule that steps a causal language model
    by AdamW and offers :class:`EntropySource`; clipping by the Trainer's ``gradient_clip_val`` is accounted for.
    What changes gradients later than callbacks see them is not; ``entropy_step/missed`` is the relative difference
    between the step that was taken and the predicted one, and a line on the screen says so where it matters.

    Args:
        every_n_steps: optimiser steps between two predictions.
        first_step: optimiser steps before the first prediction.
        prompts: responses that the prediction is made from, one a prompt.
        measure_prompts: responses that the measurement is made from; 0 for no measurement.
        kind: entropy per ``token``, per ``sequence``, or ``surprisal`` per token.
        temperature: that responses are sampled at; null for 1, or for the module's own.
        chunk: sequences in one pass.
        second_order: whether the curvature is added, by a second derivative of the prediction's responses.

    Raises:
        ToyError: a number is not allowed; in `fit`, the module offers no :class:`EntropySource`, a policy of its
            cannot be sampled from, its optimiser is no AdamW, or the Trainer clips by value.
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        first_step: int = 0,
        prompts: int = 64,
        measure_prompts: int = 256,
        kind: EntropyKind = "token",
        temperature: float | None = None,
        chunk: int = 64,
        second_order: bool = True,
    ) -> None:
        check_settings(UpdateEntropyCallback, locals(), "")
        bounded("every_n_steps", every_n_steps, 1, WHOLE)
        bounded("prompts", prompts, 2)
        bounded("first_step", first_step, 0, WHOLE)
        bounded("chunk", chunk, 1)
        if temperature is not None:
            bounded("temperature", temperature, 0.0, above=True)
        bounded("measure_prompts", measure_prompts, 0)
        require(
            measure_prompts != 1,
            f"measure_prompts: {measure_prompts} is not allowed; give an integer >= 2, or 0",
        )
        self.every_n_steps, self.first_step = every_n_steps, first_step
        self.prompts, self.measure_prompts = prompts, measure_prompts
        self.kind, self.temperature, self.chunk, self.second_order = kind, temperature, chunk, second_order
        self.inside: list[bool] = []  # of each measurement, whether it lies within the prediction's 95 % interval
        self.pending: PendingStep | None = None
        self.seconds = 0.0  # that the callback has taken
        self.num_predictions = 0
        self.begin = 0.0
        self.warned = False

    def source(self, pl_module: LightningModule) -> EntropySource:
        """Return the module as an :class:`EntropySource`.

        Raises:
            ToyError: it is none.
        """
        if not isinstance(pl_module, EntropySource):
            raise ToyError(
                f"UpdateEntropyCallback: {type(pl_module).__name__} offers no entropy_policies(), entropy_prompts(), "
                "entropy_ends and entropy_length"
            )
        return pl_module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module, and that its policies can be sampled from, before anything is trained."""
        source = self.source(pl_module)
        for seed, model in source.entropy_policies():
            try:
                with torch.autocast(pl_module.device.type, enabled=False):
                    prompts = source.entropy_prompts(seed, 0, "check", 2)
                    u = uniforms(seed, 0, "check", range(2), 2)
                    responses = generate(model, prompts, range(2), u, source.entropy_ends)
                    evaluate(model, responses, chunk=self.chunk)
            except Exception as error:  # whatever a model of another interface raises
                raise policy_error("UpdateEntropyCallback", model, error) from error

    def response_temperature(self, pl_module: LightningModule) -> float:
        """Return the temperature that responses are sampled at."""
        return self.temperature or float(getattr(pl_module, "entropy_temperature", 1.0))

    def settings(self, pl_module: LightningModule) -> PredictionSettings:
        """Return how changes are estimated."""
        return PredictionSettings(self.kind, self.response_temperature(pl_module), self.chunk, self.second_order)

    def sample_responses(
        self, source: EntropySource, model: nn.Module, seed: int, step: int, stream: str, count: int
    ) -> Sequences:
        """Return responses of a policy as it is, one to each of ``count`` prompts, keyed by (seed, step, stream).

        Prompts may repeat: ``prompt_index`` is the number of the cluster that a response counts to.
        """
        prompts = source.entropy_prompts(seed, step, stream, count)
        u = uniforms(seed, step, f"tokens/{stream}", range(count), source.entropy_length)
        temperature = self.response_temperature(source)  # type: ignore[arg-type]
        found = generate(model, prompts, range(count), u, source.entropy_ends, temperature)
        return replace(found, prompt_index=getattr(source, "entropy_clusters", prompt_clusters)(found))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the previous step, and predict this one."""
        self.measure(trainer, pl_module)
        step = trainer.global_step + 1
        policies = self.source(pl_module).entropy_policies()
        if step <= self.first_step or step % self.every_n_steps or not self.steps_policies(policies, optimizer):
            return
        begin = time.perf_counter()
        with torch.autocast(pl_module.device.type, enabled=False):
            self.predict(trainer, pl_module, optimizer, step)
        self.num_predictions += 1
        self.seconds += time.perf_counter() - begin

    @staticmethod
    def steps_policies(policies: list[tuple[int, nn.Module]], optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimiser is about to change a parameter of the policies."""
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        return any(id(p) in held and p.grad is not None for _, m in policies for p in m.parameters())

    def predict(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Predict the entropy change of the step that the optimiser is about to take; kept in ``self.pending``."""
        source = self.source(pl_module)
        everything = list(pl_module.named_parameters())
        state = read_state(optimizer, everything)
        gradients = {n: p.grad for n, p in everything if n in state.hyperparameters and p.grad is not None}
        clip = clip_scale(trainer, gradients)
        settings, metrics = self.settings(pl_module), dict[str, list[float]]()
        predictions: list[StepPrediction] = []
        for seed, model in source.entropy_policies():
            adamw = restrict_to_policy(model, everything, gradients, state, clip)
            responses = self.sample_responses(source, model, seed, step, "predict", self.prompts)
            fresh = None
            if self.measure_prompts:
                fresh = self.sample_responses(source, model, seed, step, "measure", self.measure_prompts)
            predictions.append(predict_step(model, adamw, responses, fresh, settings))
        batches = getattr(pl_module, "entropy_batches", None)
        for logp, mask, advantage in batches() if batches is not None else []:
            metrics.setdefault("covariance", []).append(float(covariances(logp, advantage, mask).sum() / mask.sum()))
        self.pending = PendingStep(step, metrics, predictions)

    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the step that was predicted last, and log both; the weights must be those right after it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        begin = time.perf_counter()
        policies = self.source(pl_module).entropy_policies()
        settings, metrics = self.settings(pl_module), dict[str, list[float]]()
        for (_, model), prediction in zip(policies, pending.predictions, strict=False):
            for name, value in measure_step(model, prediction, settings).items():
                metrics.setdefault(name, []).append(value)
        pending.metrics = metrics | pending.metrics
        self.warned = self.warned or warn_of_mismatch("UpdateEntropyCallback", pending.step, max(metrics["missed"]))
        self.inside += within_interval(pending.metrics, [p.clusters for p in pending.predictions])
        self.log_metrics(trainer, pl_module, pending)
        self.seconds += time.perf_counter() - begin

    def log_metrics(self, trainer: Trainer, pl_module: LightningModule, pending: PendingStep) -> None:
        """Write a step's metrics to every logger."""
        named = {f"entropy_step/{k}": torch.tensor(v, dtype=torch.float64) for k, v in pending.metrics.items()}
        if isinstance(pl_module, ToyModule):
            pl_module.write_scalars(named, pending.step)
            return
        if trainer.is_global_zero:
            row = {k: float(v.mean()) for k, v in named.items()}
            for logger in trainer.loggers:
                logger.log_metrics(row, step=pending.step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how long the predictions and measurements have taken."""
        self.measure(trainer, pl_module)
        whole = time.perf_counter() - self.begin
        if self.num_predictions and trainer.is_global_zero:
            note(
                f"UpdateEntropyCallback: {self.num_predictions} measurements of "
                f"{self.seconds / self.num_predictions:.2f} s, {self.seconds / whole:.0%} of the training's "
                f"{whole:.0f} s"
            )
            if self.inside:
                order = "second" if self.second_order else "first"
                note(
                    f"UpdateEntropyCallback: {sum(self.inside)} of {len(self.inside)} measured changes are within the "
                    f"{order}-order prediction's 95 % interval (both errors)"
                )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure the batch's last step before anything else changes."""
        self.measure(trainer, pl_module)


def clip_scale(trainer: Trainer, gradients: dict[str, Tensor]) -> float:
    """Return the factor by which the Trainer is going to clip the gradients: its hook comes after ours.

    Raises:
        ToyError: it clips by value.
    """
    bound = getattr(trainer, "gradient_clip_val", None)
    if bound is None or bound == 0:
        return 1.0
    algorithm = getattr(trainer, "gradient_clip_algorithm", None)
    if algorithm is not None and str(getattr(algorithm, "value", algorithm)) != "norm":
        raise ToyError("UpdateEntropyCallback: gradient_clip_algorithm 'value' is not allowed; give 'norm'")
    return min(1.0, float(bound) / (norm(gradients) + 1e-6))
