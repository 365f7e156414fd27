"""EntropyProbe: the entropy change of the steps of transformers' Trainer, or of TRL's, predicted and measured.

::

    from lightning_toys.update_entropy.hf import EntropyProbe, PromptSampler

    sampler = PromptSampler(prompts, max_new_tokens=128, tokenizer=tokenizer)  # or a function of your own
    EntropyProbe(sampler, every_n_steps=10).attach(trainer)  # GRPOTrainer, or any Trainer with AdamW
    trainer.train()
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lightning_toys.errors import WHOLE, ToyError, bounded, note, require
from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.adamw import read_state, require_adamw
from lightning_toys.update_entropy.estimators import EntropyKind
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.rollouts import generate, stop_tokens, uniforms
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

WHO = "EntropyProbe"


class Sampler(Protocol):
    """Where responses to estimate the entropy on come from; a function with these arguments will do.

    Optional beside it: ``temperature``, a float that responses are sampled at (1 without it).
    """

    def __call__(self, model: nn.Module, step: int, stream: str, count: int) -> Sequences:
        """Return ``count`` responses that the model has generated as it is.

        Args:
            model: the policy.
            step: number of the optimiser step that comes next.
            stream: ``predict`` or ``measure``; the two have to be independent of each other.
            count: number of responses.
        """


class PromptSampler:
    """Samples a response to each of some prompts, drawn at random without repeating one before all have had a turn.

    Args:
        prompts: each a list of token ids, a text, or a chat (a list of role and content) for the tokenizer's template.
        max_new_tokens: of a response, its end-of-sequence token included.
        tokenizer: of transformers; wanted for texts and chats.
        ends: token ids that end a response; None: those of the tokenizer, the model's configuration and its generation
            configuration together.
        temperature: of the softmax: the training's.
        seed: of the responses; a response is a function of (seed, step, stream, row) and the weights.
        chunk: responses that are sampled at once.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int,
        tokenizer: Any = None,
        ends: Sequence[int] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        chunk: int = 64,
    ) -> None:
        bounded("max_new_tokens", max_new_tokens, 1)
        bounded("temperature", temperature, 0.0, above=True)
        bounded("seed", seed, 0, WHOLE)
        bounded("chunk", chunk, 1)
        require(len(prompts) > 0, "prompts: [] is not allowed; give at least one")
        self.prompts = [self.encode(p, tokenizer) for p in prompts]
        require(all(self.prompts), "prompts: an empty one is not allowed; a policy needs a token to start from")
        self.ends = ends
        self.end = None if tokenizer is None else tokenizer.eos_token_id
        self.max_new_tokens, self.temperature, self.seed, self.chunk = max_new_tokens, temperature, seed, chunk

    @staticmethod
    def encode(prompt: Any, tokenizer: Any) -> list[int]:
        """Return a prompt as token ids.

        Raises:
            ToyError: it is a text, and there is no tokenizer.
        """
        if not isinstance(prompt, str) and all(isinstance(i, int | np.integer) for i in prompt):
            return [int(i) for i in prompt]
        require(tokenizer is not None, "tokenizer: None is not allowed with prompts that are texts; give the model's")
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return [int(i) for i in tokenizer.encode(prompt, add_special_tokens=False)]

    def __call__(self, model: nn.Module, step: int, stream: str, count: int) -> Sequences:
        """See :class:`Sampler`."""
        n, generator = len(self.prompts), keyed_generator(self.seed, step, f"prompts/{stream}")
        order = np.concatenate([generator.permutation(n) for _ in range(-(-count // n))])[:count]
        u = uniforms(self.seed, step, f"tokens/{stream}", range(count), self.max_new_tokens)
        ends = stop_tokens(model, self.end) if self.ends is None else self.ends
        prompts = [self.prompts[int(i)] for i in order]
        found = generate(model, prompts, range(count), u, ends, self.temperature, self.chunk)
        return replace(found, prompt_index=prompt_clusters(found))


class EntropyProbe(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Predicts the entropy change of every n-th optimiser step before it is taken, and measures it afterwards.

    The core is that of :class:`~lightning_toys.update_entropy.callback.UpdateEntropyCallback`: first order with its
    standard error, split into momentum, weight decay and batch, and the second order. It looks at gradients right
    before the step (clipped, accumulated, averaged over processes), whatever loss they are of, and changes no bit of
    the training. Metrics are ``entropy_step/...`` in the Trainer's log, nats; ``missed`` is the relative difference
    between the step that was taken and the predicted one.

    Args:
        sampler: of responses, see :class:`Sampler`.
        every_n_steps: optimiser steps between two predictions.
        first_step: optimiser steps before the first prediction.
        prompts: responses that the prediction is made from.
        measure_prompts: responses that the measurement is made from; 0 for no measurement.
        kind: entropy per ``token``, per ``sequence``, or ``surprisal`` per token.
        temperature: that responses are sampled at; None: the sampler's own, or 1.
        chunk: sequences in one pass.
        second_order: whether the curvature is added, by a second derivative of the prediction's responses.
        keep_gradients: whether the gradient of each of the prediction's responses is kept, as many times the memory of
            what is trained; False takes a few passes more, and a few times the memory.

    Raises:
        ToyError: a number is not allowed; when training begins, the optimiser is no AdamW, the parameters are sharded,
            or the model cannot be sampled from.
    """

    def __init__(
        self,
        sampler: Sampler,
        every_n_steps: int = 1,
        first_step: int = 0,
        prompts: int = 64,
        measure_prompts: int = 256,
        kind: EntropyKind = "token",
        temperature: float | None = None,
        chunk: int = 64,
        second_order: bool = True,
        keep_gradients: bool = True,
    ) -> None:
        bounded("every_n_steps", every_n_steps, 1, WHOLE)
        bounded("first_step", first_step, 0, WHOLE)
        bounded("prompts", prompts, 2)
        bounded("measure_prompts", measure_prompts, 0)
        require(measure_prompts != 1, f"measure_prompts: {measure_prompts} is not allowed; give an integer >= 2, or 0")
        bounded("chunk", chunk, 1)
        if temperature is not None:
            bounded("temperature", temperature, 0.0, above=True)
        temperature = temperature or float(getattr(sampler, "temperature", 1.0))
        self.settings = PredictionSettings(kind, temperature, chunk, second_order, keep_gradients)
        self.sampler, self.every_n_steps, self.first_step = sampler, every_n_steps, first_step
        self.prompts, self.measure_prompts = prompts, measure_prompts
        self.trainer: Any = None
        self.pending: StepPrediction | None = None
        self.metrics: dict[str, float] | None = None  # of a step that has been measured and not yet logged
        self.inside: list[bool] = []
        self.seconds, self.num_predictions, self.warned = 0.0, 0, False

    def attach(self, trainer: Any) -> EntropyProbe:
        """Add the probe to a Trainer, so that its metrics reach TensorBoard and the like too; return the probe.

        Given as ``callbacks=[probe]`` alone it writes to ``trainer.state.log_history``: a callback is not told of its
        Trainer.

        Args:
            trainer: transformers' Trainer, or one derived from it.
        """
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check optimiser and model before anything is trained."""
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        sharded = [name for name in ("deepspeed", "fsdp") if getattr(args, name, None)]
        require(not sharded, f"{WHO}: {', '.join(sharded)} is not allowed; give a Trainer that leaves parameters whole")
        if optimizer is not None:
            require_adamw(unwrapped(optimizer))
        try:
            with torch.no_grad(), plain_forward(model):
                evaluate(model, self.sampler(model, 0, "check", 2), chunk=self.settings.chunk)
        except Exception as error:  # whatever a model of another interface, or a sampler of one's own, raises
            raise policy_error(WHO, model, error) from error

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Predict the step that comes next."""
        step, model = state.global_step + 1, kwargs["model"]
        if step <= self.first_step or step % self.every_n_steps:
            return
        begin = time.perf_counter()
        named = list(model.named_parameters())
        found = read_state(unwrapped(kwargs["optimizer"]), named)
        gradients = {n: p.grad for n, p in named if n in found.hyperparameters and p.grad is not None}
        if not gradients:
            raise ToyError(
                f"{WHO}: no parameter has a gradient before step {step}; give a Trainer that leaves them whole"
            )
        adamw = restrict_to_policy(model, named, gradients, found, 1.0)  # the Trainer has clipped
        with plain_forward(model):
            responses = self.sampler(model, step, "predict", self.prompts)
            fresh = self.sampler(model, step, "measure", self.measure_prompts) if self.measure_prompts else None
            self.pending = predict_step(model, adamw, responses, fresh, self.settings)
        self.num_predictions += 1
        self.seconds += time.perf_counter() - begin

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the step that has just been taken."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        begin, model = time.perf_counter(), kwargs["model"]
        with plain_forward(model):
            self.metrics = measure_step(model, pending, self.settings)
        self.warned = self.warned or warn_of_mismatch(WHO, state.global_step + 1, self.metrics["missed"])
        self.inside += within_interval({name: [value] for name, value in self.metrics.items()}, [pending.clusters])
        self.seconds += time.perf_counter() - begin

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the step's metrics under its number."""
        found, self.metrics = self.metrics, None
        if found is None:
            return
        logs = {f"entropy_step/{name}": value for name, value in found.items()}
        if self.trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
            return
        wanted = control.should_log
        Trainer.log(self.trainer, logs)  # not the class's own: TRL's adds, and then forgets, what it has collected
        control.should_log = wanted  # the Trainer's own line of this step is still to come

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how many measured changes were as predicted, and what the measurements have cost."""
        if not self.num_predictions or not state.is_world_process_zero:
            return
        note(f"{WHO}: {self.num_predictions} measurements of {self.seconds / self.num_predictions:.2f} s")
        if self.inside:
            order = "second" if self.settings.second_order else "first"
            note(
                f"{WHO}: {sum(self.inside)} of {len(self.inside)} measured changes are within the "
                f"{order}-order prediction's 95 % interval (both errors)"
            )


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's optimiser within accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Run a model as it is written meanwhile, without what trainers put around its ``forward``.

    That is accelerate's autocast, which would round away what is measured, and the hook by which transformers has
    embeddings require a gradient for checkpointing (TRL's default), which no forward-mode derivative passes.

    Args:
        model: a causal language model of transformers.
    """
    wrapped, plain = (model.__dict__.get(name) for name in ("forward", "_original_forward"))
    swap = wrapped is not None and plain is not None
    held = [
        (m, key, hook)
        for m in model.modules()
        for key, hook in m._forward_hooks.items()
        if getattr(hook, "__name__", "") == "make_inputs_require_grads"
    ]
    if swap:
        model.__dict__["forward"] = plain
    for m, key, _ in held:
        del m._forward_hooks[key]
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for m, key, hook in held:
            m._forward_hooks[key] = hook
        if swap:
            model.__dict__["forward"] = wrapped
