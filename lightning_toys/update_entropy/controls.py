"""Controls of a step: the step reversed, and steps of its size in random directions, each on responses of its own.

That a long step raises the entropy says something of the step only where other steps as long do not. A random direction
has the step's elements with signs drawn anew, so that it is as long in every parameter. Each change is measured on
responses that the moved policy itself generates, with the random numbers of those before: no importance weights, which
grow with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_toys.training.noise import keyed_generator
from lightning_toys.update_entropy.adamw import Tensors
from lightning_toys.update_entropy.estimators import EntropyKind, Estimate, Scores, ratio_difference, ratio_terms
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.sequences import Sequences

STEP, REVERSED, RANDOM = "step", "reversed", "random"


@dataclass(frozen=True)
class ControlResult:
    """Changes of the entropy along the step and its controls, each on responses of the moved policy.

    Attributes:
        responses: sampled at each of the policies.
        changes: by direction (``step``, ``reversed``, ``random_0``, ...) and step size, H(theta + eta v) - H(theta).
    """

    responses: int
    changes: dict[str, dict[float, Estimate]]

    def random(self, eta: float) -> list[float]:
        """Return the changes along the random directions at a step size."""
        return [x[eta].value for name, x in self.changes.items() if name.startswith(RANDOM)]


@contextmanager
def moved_by(model: nn.Module, direction: Mapping[str, Tensor], eta: float) -> Iterator[None]:
    """Put a model's weights at theta + eta v, and back, bit by bit, afterwards."""
    named = dict(model.named_parameters())
    held = {n: named[n].detach().clone() for n in direction}
    try:
        with torch.no_grad():
            for n, v in direction.items():
                named[n].add_(v.to(named[n]), alpha=eta)
        yield
    finally:
        with torch.no_grad():
            for n, p in held.items():
                named[n].copy_(p)


def random_signs(direction: Mapping[str, Tensor], seed: int, number: int) -> Tensors:
    """Return a direction whose elements have signs of a draw (seed, number), and the given one's sizes.

    >>> v = {"w": torch.tensor([1.0, -2.0, 3.0])}
    >>> random_signs(v, 0, 0)["w"].abs()
    tensor([1., 2., 3.])
    """
    generator = keyed_generator(seed, number, "controls")
    return {
        n: v.abs() * (2.0 * torch.from_numpy(generator.integers(0, 2, tuple(v.shape))) - 1).to(v)
        for n, v in direction.items()
    }


def paired_change(before: Scores, after: Scores, kind: EntropyKind) -> Estimate:
    """Return H after less H before, each of responses of its own policy; those to one prompt are one draw of both."""
    new, old = ratio_terms(after, kind), ratio_terms(before, kind)
    return ratio_difference(new[0].sum(1), new[1], old[0].sum(1), old[1], before.prompt_index)


def measure_controls(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    sample: Callable[[], Sequences],
    plan: Plan,
    seed: int,
    temperature: float = 1.0,
) -> ControlResult:
    """Return the change of entropy along a step, along the step reversed and along random directions of its size.

    Args:
        model: the policy; it is left as it was.
        direction: v of the step, per unit of eta.
        sample: samples responses of the policy as it is, to the same prompts with the same random numbers every time.
        plan: how many random directions, which step sizes.
        seed: of the replica.
        temperature: that responses are sampled at.
    """

    def scores() -> Scores:
        return evaluate(model, sample(), temperature, chunk=plan.tf_batch_size)

    before = scores()
    changes: dict[str, dict[float, Estimate]] = {}
    for k in range(-2, plan.controls):
        name = {-2: STEP, -1: REVERSED}.get(k, f"{RANDOM}_{k}")
        v = direction if k < 0 else random_signs(direction, seed, k)
        for eta in plan.etas:
            with moved_by(model, v, -eta if k == -1 else eta):
                changes.setdefault(name, {})[eta] = paired_change(before, scores(), plan.kind)
    return ControlResult(len(before.logp), changes)
