"""Whether the environments that a checkpoint stores are those of the run that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_toys.bilevel.control.environments import Disturbance
from lightning_toys.bilevel.control.gymnasium_environments import make_environments
from lightning_toys.training.checkpoint_format import Like, mismatches


def environments_mismatch(
    env: str, seeds: Sequence[int], disturbance: Disturbance, toy: dict[str, Any], step: int
) -> str:
    """Return what is wrong with a checkpoint's environments, and returns not yet logged; nothing where they fit.

    Args:
        env: the run's environment.
        seeds: one a replica.
        disturbance: of the environment.
        toy: the checkpoint's own part, with ``environments`` and ``returns``.
        step: that the weights are of.
    """
    fresh = make_environments(env, seeds, "train", 1, disturbance)
    form: dict[str, Any] = {k: Like(v.dtype, tuple(v.shape)) for k, v in fresh.state_dict().items()}
    fresh.close()
    if "history" in form:  # the actions of an episode
        form["history"] = Like(form["history"].dtype, (len(seeds), 1, None))
    if why := next(mismatches(toy, {"environments": form, "returns": []}), ""):
        return why
    environments: dict[str, Tensor] = toy["environments"]
    lengths, at = environments["lengths"], int(environments["where"][1])
    if at != step:
        return f"environments are at step {at}, the weights are of step {step}"
    if bool((lengths < 0).any()) or ("history" in form and environments["history"].shape[2] < int(lengths.max())):
        return "environments.lengths are not of these episodes"
    totals = toy["returns"]
    if len(totals) != len(seeds) or not all(
        isinstance(x, list) and all(isinstance(v, float) for v in x) for x in totals
    ):
        return "returns are no list of numbers for each replica"
    return ""
