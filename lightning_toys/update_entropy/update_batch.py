"""A batch to update with, in which every prompt's responses differ in reward."""

from __future__ import annotations

from collections.abc import Callable

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.grpo import nonzero_advantage_prompts, rows_by_prompt
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.sequences import Sequences


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
