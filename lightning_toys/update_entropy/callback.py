"""UpdateEntropyCallback: what each AdamW step will do to a policy's entropy, and what it did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_toys.errors import ToyError, note, require
from lightning_toys.training.module import ToyModule
from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Tensors, norm, read_state
from lightning_toys.update_entropy.attribution import covariances, entropy_rows
from lightning_toys.update_entropy.estimators import Estimate, Kind, Scores, entropy, prefix_weighted
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.rollouts import draw, uniforms
from lightning_toys.update_entropy.sequences import Sequences

MISSED = 0.01  # of a step's greatest element: rounding in single precision stays a hundred times below


@runtime_checkable
class EntropySource(Protocol):
    """What a LightningModule has to offer for its policies to be watched."""

    entropy_ends: Sequence[int]  # tokens that end a response
    entropy_length: int  # tokens of a response at most

    def entropy_policies(self) -> list[tuple[int, nn.Module]]:
        """Return a seed and a causal language model of transformers' interface for each policy."""

    def entropy_prompts(self, seed: int, step: int, stream: str, count: int) -> list[list[int]]:
        """Return the token ids of ``count`` prompts, a function of the arguments alone."""


@dataclass
class Watched:
    """A step that has been predicted and not yet measured."""

    step: int
    sequences: list[Sequences]
    before: list[Scores]
    row: dict[str, list[float]]
    expected: list[Expected]


@dataclass
class Expected:
    """Where a step was predicted to lead.

    Attributes:
        weights: theta + eta v, by the policy's names.
        size: greatest element of eta v.
    """

    weights: Tensors
    size: float

    def missed_by(self, model: nn.Module) -> float:
        """Return the greatest element by which the step taken differs, in units of the step's own greatest element."""
        named = dict(model.named_parameters())
        off = max(float((named[n].detach().double() - w).abs().max()) for n, w in self.weights.items())
        return off / self.size if self.size else 0.0


class UpdateEntropyCallback(Callback):
    """Predicts the entropy change of every n-th AdamW step before it is taken, and measures it afterwards.

    The prediction is first-order, eta <grad H, v>, with the error of the draws it is made from, split into momentum,
    weight decay and batch. The measurement is by importance sampling on draws of its own, so that the two errors are
    independent. Both are logged as ``entropy_step/...``. Works with any LightningModule that steps a causal language
    model by AdamW and offers :class:`EntropySource`; clipping by the Trainer's ``gradient_clip_val`` is accounted for.
    What changes gradients later than callbacks see them is not; ``entropy_step/missed`` tells by how much the step that
    was taken differs from the predicted one, and a line on the screen says so where it matters.

    Args:
        every_n_steps: optimiser steps between two looks.
        first_step: optimiser steps before the first look.
        prompts: responses that the prediction is made from, one a prompt.
        measure_prompts: responses that the measurement is made from; 0 for no measurement.
        kind: entropy per ``token``, per ``sequence``, or ``surprisal`` per token.
        temperature: that responses are drawn at; null for 1, or for the module's own.
        chunk: sequences in one pass.
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        first_step: int = 0,
        prompts: int = 64,
        measure_prompts: int = 256,
        kind: Kind = "token",
        temperature: float | None = None,
        chunk: int = 64,
    ) -> None:
        require(every_n_steps >= 1, f"every_n_steps: {every_n_steps} is not allowed; give an integer >= 1")
        require(prompts >= 2, f"prompts: {prompts} is not allowed; give an integer >= 2")
        require(
            measure_prompts == 0 or measure_prompts >= 2,
            f"measure_prompts: {measure_prompts} is not allowed; give an integer >= 2, or 0",
        )
        self.every_n_steps, self.first_step = every_n_steps, first_step
        self.prompts, self.measure_prompts = prompts, measure_prompts
        self.kind, self.temperature, self.chunk = kind, temperature, chunk
        self.watched: Watched | None = None
        self.seconds = 0.0  # that the callback has taken
        self.looks = 0
        self.begin = 0.0
        self.warned = False

    def source(self, pl_module: LightningModule) -> EntropySource:
        """Return the module, or say what it lacks."""
        if not isinstance(pl_module, EntropySource):
            raise ToyError(
                f"UpdateEntropyCallback: {type(pl_module).__name__} offers no entropy_policies(), entropy_prompts(), "
                "entropy_ends and entropy_length"
            )
        return pl_module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that cannot be watched before anything is trained."""
        self.source(pl_module)

    def heat(self, pl_module: LightningModule) -> float:
        """Return the temperature that responses are drawn at."""
        return self.temperature or float(getattr(pl_module, "entropy_temperature", 1.0))

    def draws(
        self, source: EntropySource, model: nn.Module, seed: int, step: int, stream: str, count: int
    ) -> Sequences:
        """Draw responses from a policy as it is."""
        asked = source.entropy_prompts(seed, step, stream, count)
        u = uniforms(seed, step, f"tokens/{stream}", range(count), source.entropy_length)
        heat = self.heat(source)  # type: ignore[arg-type]
        return draw(model, asked, range(count), u, source.entropy_ends, heat)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the step before, and predict this one."""
        self.measure(trainer, pl_module)
        step = trainer.global_step + 1
        policies = self.source(pl_module).entropy_policies()
        if step <= self.first_step or step % self.every_n_steps or not self.steps_any(policies, optimizer):
            return
        begin = time.perf_counter()
        with torch.autocast(pl_module.device.type, enabled=False):
            self.predict(trainer, pl_module, optimizer, step)
        self.looks += 1
        self.seconds += time.perf_counter() - begin

    @staticmethod
    def steps_any(policies: list[tuple[int, nn.Module]], optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimiser holds parameters of the policies that are being trained."""
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        return any(id(p) in held and p.grad is not None for _, m in policies for p in m.parameters())

    def predict(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """Predict the step that the optimiser is about to take."""
        source = self.source(pl_module)
        everything = list(pl_module.named_parameters())
        state = read_state(optimizer, everything)
        gradients = {n: p.grad for n, p in everything if n in state.hyper and p.grad is not None}
        clip = clip_scale(trainer, gradients)
        row: dict[str, list[float]] = {}
        kept: list[tuple[Sequences, Scores]] = []
        expected: list[Expected] = []
        for seed, model in source.entropy_policies():
            taken = step_within(model, everything, gradients, state, clip)
            drawn = self.draws(source, model, seed, step, "predict", self.prompts)
            rows = entropy_rows(model, drawn, self.kind, self.heat(pl_module), min(32, self.chunk))
            named = dict(model.named_parameters())
            ahead = {n: taken.eta * v.double() for n, v in taken.direction.items()}
            weights = {n: named[n].detach().double() + d for n, d in ahead.items()}
            expected.append(Expected(weights, max(float(d.abs().max()) for d in ahead.values())))
            batch = {n: taken.direction[n] - taken.momentum[n] - taken.decay[n] for n in taken.direction}
            parts = {"predicted": taken.direction, "momentum": taken.momentum, "decay": taken.decay, "batch": batch}
            _, values, errors = rows.along(list(parts.values()))
            for k, name in enumerate(parts):
                row.setdefault(name, []).append(taken.eta * float(values[k]))
                row.setdefault(f"{name}_se", []).append(taken.eta * float(errors[k]))
            row.setdefault("entropy", []).append(entropy(rows.scores, self.kind).value)
            if self.measure_prompts:
                fresh = self.draws(source, model, seed, step, "measure", self.measure_prompts)
                kept.append((fresh, evaluate(model, fresh, self.heat(pl_module), chunk=self.chunk)))
        batches = getattr(pl_module, "entropy_batches", None)
        for logp, mask, advantage in batches() if batches is not None else []:
            row.setdefault("covariance", []).append(float(covariances(logp, advantage, mask).sum() / mask.sum()))
        self.watched = Watched(step, [s for s, _ in kept], [b for _, b in kept], row, expected)

    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the step that was predicted last, and log both; the weights must be those right after it."""
        seen, self.watched = self.watched, None
        if seen is None:
            return
        begin = time.perf_counter()
        policies = self.source(pl_module).entropy_policies()
        missed = [e.missed_by(m) for (_, m), e in zip(policies, seen.expected, strict=False)]
        seen.row["missed"] = missed
        if max(missed) > MISSED and not self.warned:
            self.warned = True
            note(
                f"UpdateEntropyCallback: the step taken at {seen.step} is not the one predicted (by {max(missed):.2g} "
                "of its greatest element): something changes gradients or weights after callbacks saw them, such as "
                "a module's own clipping, a gradient scaler, or weights in half a precision"
            )
        for (_, model), drawn, before in zip(policies, seen.sequences, seen.before, strict=False):
            after = evaluate(model, drawn, self.heat(pl_module), chunk=self.chunk)
            change: Estimate = prefix_weighted(before, after, self.kind).change
            seen.row.setdefault("measured", []).append(change.value)
            seen.row.setdefault("measured_se", []).append(change.se)
        self.log_row(trainer, pl_module, seen)
        self.seconds += time.perf_counter() - begin

    def log_row(self, trainer: Trainer, pl_module: LightningModule, seen: Watched) -> None:
        """Write a step's numbers to every logger."""
        named = {f"entropy_step/{k}": torch.tensor(v, dtype=torch.float64) for k, v in seen.row.items()}
        if isinstance(pl_module, ToyModule):
            pl_module.write_scalars(named, seen.step)
            return
        if trainer.is_global_zero:
            row = {k: float(v.mean()) for k, v in named.items()}
            for logger in trainer.loggers:
                logger.log_metrics(row, step=seen.step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the looks have cost."""
        self.measure(trainer, pl_module)
        whole = time.perf_counter() - self.begin
        if self.looks and trainer.is_global_zero:
            note(
                f"UpdateEntropyCallback: {self.looks} looks of {self.seconds / self.looks:.2f} s, "
                f"{self.seconds / whole:.0%} of the training's {whole:.0f} s"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure the batch's last step before anything else changes."""
        self.measure(trainer, pl_module)


def clip_scale(trainer: Trainer, gradients: dict[str, Tensor]) -> float:
    """Return the factor by which the Trainer is going to clip: its hook comes after ours."""
    bound = getattr(trainer, "gradient_clip_val", None)
    if bound is None or bound == 0:
        return 1.0
    algorithm = getattr(trainer, "gradient_clip_algorithm", None)
    if algorithm is not None and str(getattr(algorithm, "value", algorithm)) != "norm":
        raise ToyError("UpdateEntropyCallback: gradient_clip_algorithm 'value' is not allowed; give 'norm'")
    return min(1.0, float(bound) / (norm(gradients) + 1e-6))


def step_within(
    model: nn.Module,
    everything: list[tuple[str, nn.Parameter]],
    gradients: dict[str, Tensor],
    state: AdamWState,
    clip: float,
) -> AdamWStep:
    """Return the optimiser's step restricted to one policy, by the policy's own names.

    Args:
        model: the policy.
        everything: the whole module's parameters.
        gradients: by the whole module's names.
        state: likewise.
        clip: factor that all gradients are going to be clipped by.
    """
    whole = {id(p): n for n, p in everything}
    names = {n: whole[id(p)] for n, p in model.named_parameters() if whole.get(id(p)) in gradients}
    parameters: Tensors = {n: p.detach() for n, p in model.named_parameters() if n in names}
    own = AdamWState({n: state.hyper[w] for n, w in names.items()}, {n: state.moments[w] for n, w in names.items()})
    step = AdamWStep.of(parameters, {n: clip * gradients[w] for n, w in names.items()}, own)
    return replace(step, clip_scale=clip)
