"""What a checkpoint of ours holds: told before anything is built of one that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from lightning_toys.training.sound_values import unsound

OLDEST = Version("2.6.6")  # of the Lightnings that releases of ours ran on
NETWORKS = ("net.", "ema_net.", "best_net.")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
COUNTS = {"ready": 0, "completed": 0}
STARTED = {**COUNTS, "started": 0}
PROCESSED = {**STARTED, "processed": 0}
STEPS = {"total": COUNTS, "current": COUNTS}
JUDGED = {"total": PROCESSED, "current": PROCESSED}
BATCHES = {**JUDGED, "is_last_batch": False}
LOOP: dict[str, Any] = {  # Lightning's fit loop, all of which it takes up
    "epoch_progress": JUDGED,
    "epoch_loop.state_dict": {},
    "epoch_loop.batch_progress": BATCHES,
    "epoch_loop.scheduler_progress": STEPS,
    "epoch_loop.automatic_optimization.state_dict": {},
    "epoch_loop.automatic_optimization.optim_progress": {
        "optimizer": {"step": STEPS, "zero_grad": {"total": STARTED, "current": STARTED}}
    },
    "epoch_loop.manual_optimization.state_dict": {},
    "epoch_loop.manual_optimization.optim_step_progress": STEPS,
    "epoch_loop.val_loop.state_dict": {},
    "epoch_loop.val_loop.batch_progress": BATCHES,
    "state_dict": {"combined_loader": [{"next_step": 0}]},
}
JUDGING: dict[str, Any] = {"state_dict": {}, "batch_progress": JUDGED}
FORM: dict[str, Any] = {
    "state_dict": {},
    "loops": dict.fromkeys(("validate_loop", "test_loop", "predict_loop"), JUDGING),  # each is taken up by its verb
    "global_step": 0,
    "callbacks": {},
    "pytorch-lightning_version": "",
    "toy": {"seeds": [0], "sizes": {}, "config": {"model": {"class_path": "", "init_args": {}}}},
}
RESUMED: dict[str, Any] = {
    "epoch": 0,
    "loops": {**FORM["loops"], "fit_loop": LOOP},
    "optimizer_states": [{"state": {}, "param_groups": [{}]}],
    "lr_schedulers": [],
}


def malformed(checkpoint: Mapping[str, Any], resumes: bool) -> str:
    """Return what a checkpoint lacks, or holds of another kind; empty if it is whole.

    Args:
        checkpoint: read as tensors and plain values.
        resumes: whether training is to go on from it, which takes more than its weights.
    """
    if found := unsound(checkpoint) or next(mismatches(checkpoint, {**FORM, **(RESUMED if resumes else {})}), ""):
        return found
    if why := of_another_lightning(checkpoint["pytorch-lightning_version"]):
        return why
    toy, weights = checkpoint["toy"], checkpoint["state_dict"]
    if (seeds := toy["config"]["model"]["init_args"].get("seeds", toy["seeds"])) != toy["seeds"]:
        return f"toy.seeds are {toy['seeds']}, its settings' {describe(seeds)}"
    if stray := [str(k) for k in ("config", "sizes") if not is_plain(toy[k])]:
        return f"toy.{stray[0]} holds more than plain values"
    if wrong := [str(k) for k, v in weights.items() if not isinstance(k, str) or not isinstance(v, Tensor)]:
        return f"state_dict.{wrong[0]} is no tensor"
    if wrong := [k for k, v in weights.items() if k.startswith(NETWORKS) and not bool(v.isfinite().all())]:
        return f"state_dict.{wrong[0]} is not finite"
    for name, state in checkpoint["callbacks"].items():  # every verb hands them on
        if not isinstance(state, dict) or not isinstance(state.get("best_mean", 0.0), int | float):
            return f"callbacks.{name} is {describe(state)}"
    return out_of_step(checkpoint) if resumes else ""


def of_another_lightning(version: str) -> str:
    """Return why a checkpoint cannot be of a Lightning that ran us, empty if it can.

    Lightning would rewrite an older checkpoint, by rules for what its own modules held then.
    """
    try:
        older = Version(version) < OLDEST
    except InvalidVersion:
        return f"pytorch-lightning_version is {version[:40]!r}"
    return f"pytorch-lightning_version is {version[:40]}, and we began with {OLDEST}" if older else ""


def out_of_step(checkpoint: Mapping[str, Any]) -> str:
    """Return which of a checkpoint's parts are not of its step; empty if none."""
    loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    taken = loop["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    position = loop["state_dict"]["combined_loader"][0]["next_step"]
    for what, at in (("its optimisers have completed", taken), ("its data are at", position)):
        if at != step:
            return f"{what} step {at}, its weights are of step {step}"
    return ""


class Like(NamedTuple):
    """The form of a tensor.

    Attributes:
        dtype: its kind.
        shape: its lengths; None where any will do.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]

    def fits(self, found: Any) -> bool:
        """Whether this is such a tensor."""
        return (
            isinstance(found, Tensor)
            and found.dtype == self.dtype
            and found.dim() == len(self.shape)
            and all(wanted in (None, n) for wanted, n in zip(self.shape, found.shape, strict=True))
        )


def mismatches(found: Any, form: Any, where: str = "") -> Iterator[str]:
    """Yield where a tree lacks what a form has, or has another kind of value there; counts are not below 0."""
    name = where or "it"
    if isinstance(form, dict):
        if not isinstance(found, dict):
            yield f"{name} is no mapping"
            return
        for key, inner in form.items():
            here = f"{where}.{key}" if where else key
            if key not in found:
                yield f"{here} is missing"
            else:
                yield from mismatches(found[key], inner, here)
    elif isinstance(form, list):
        if not isinstance(found, list) or (form and not found):
            yield f"{name} is no list" if not isinstance(found, list) else f"{name} is empty"
        elif form:
            for i, item in enumerate(found):
                yield from mismatches(item, form[0], f"{name}[{i}]")
    elif isinstance(form, Like):
        if not form.fits(found):
            sizes = ", ".join("any" if n is None else str(n) for n in form.shape)
            yield f"{name} is {describe(found)}, no tensor ({sizes}) of {form.dtype}"
    elif type(found) is not type(form):
        yield f"{name} is {describe(found)}, no {type(form).__name__}"
    elif isinstance(form, int) and found < 0:
        yield f"{name} is {found}"


def describe(value: Any) -> str:
    """Return a value in few words."""
    return f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)[:40]


def is_plain(value: Any) -> bool:
    """Whether YAML can write a value."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def malformed_optimizers(checkpoint: Mapping[str, Any]) -> str:
    """Return what a checkpoint lacks of optimisers' states, empty if it lacks nothing."""
    wanted = {"optimizer_states": RESUMED["optimizer_states"]}
    return next(mismatches(checkpoint, wanted), "")


def optimizer_mismatch(
    states: Sequence[Any], optimizers: Sequence[torch.optim.Optimizer], step: int, learned: bool
) -> str:
    """Return where stored optimisers differ from those that are to go on with them, empty if nowhere.

    Torch would take up a state of other shapes without a word, and Lightning a list that is too short.

    Args:
        states: of the checkpoint.
        optimizers: of this run, of which nothing is changed.
        step: of the checkpoint.
        learned: whether an optimiser has taken a step by then.
    """
    if len(states) != len(optimizers):
        return f"optimizer_states has {len(states)} optimisers, where {len(optimizers)} are wanted"
    for i, (state, optimizer) in enumerate(zip(states, optimizers, strict=True)):
        if why := state_mismatch(state, optimizer):
            return f"optimizer_states[{i}]: {why}"
    if learned and not any(state["state"] for state in states):
        return f"optimizer_states holds no moments, at step {step}"
    return ""


def state_mismatch(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str:
    """Return where one stored optimiser differs from a live one, empty if nowhere."""
    groups, entries = state["param_groups"], state["state"]
    if len(groups) != len(optimizer.param_groups):
        return f"{len(groups)} groups, where {len(optimizer.param_groups)} are wanted"
    known: set[Any] = set()
    for given, live in zip(groups, optimizer.param_groups, strict=True):
        numbers = given.get("params")
        if not isinstance(numbers, list) or [type(n) for n in numbers] != [int] * len(live["params"]):
            return f"a group's params do not number {len(live['params'])}"
        for key, value in live.items():
            if key not in given:
                return f"a group has no {key}"
            if type(value) in (float, tuple) and not all_numbers(given[key], type(value)):
                return f"a group's {key} is {describe(given[key])}"
        for n, p in zip(numbers, live["params"], strict=True):
            if n in entries and (why := entry_mismatch(entries[n], p, optimizer)):
                return f"parameter {n}: {why}"
        known |= set(numbers)
    loose = [n for n in entries if n not in known]
    return f"a state of number {loose[0]!r}, which is in no group" if loose else ""


def all_numbers(value: Any, kind: type) -> bool:
    """Whether a value is a finite number, or (for a tuple) a pair of them."""
    items = list(value) if kind is tuple and isinstance(value, list | tuple) else [value]
    pair = kind is not tuple or (isinstance(value, list | tuple) and len(items) == 2)
    return pair and all(isinstance(x, int | float) and math.isfinite(x) for x in items)


def entry_mismatch(entry: Any, parameter: Tensor, optimizer: torch.optim.Optimizer) -> str:
    """Return why the state of a parameter cannot be its state, empty if it can."""
    if not isinstance(entry, dict):
        return "its state is no mapping"
    adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    if absent := [k for k in MOMENTS if k not in entry] if adam else []:
        return f"no {', '.join(absent)}"
    for key, value in entry.items():
        if key == "step":
            if not (isinstance(value, Tensor) and value.numel() == 1 and bool(torch.isfinite(value).all())):
                return f"step is {describe(value)}"
        elif not isinstance(value, Tensor) or value.shape != parameter.shape:
            return f"{key} is {describe(value)}, where {tuple(parameter.shape)} is wanted"
        elif not bool(torch.isfinite(value).all()):
            return f"{key} is not finite"
    return ""
