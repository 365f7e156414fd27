"""AdamW's state from local files, by parameter name or by order, which fits a model or is refused.

No pickled object is loaded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.errors import note
from lightning_toys.update_entropy.adamw import (
    AdamWState,
    Hyperparameters,
    Moments,
    hyperparameters_from_group,
    moments_from_state,
    require_adamw,
)
from lightning_toys.update_entropy.checkpoints import (
    ADAPTER,
    canonical_name,
    describe_shape,
    error_text,
    flag_error,
    join_limited,
)
from lightning_toys.update_entropy.deepspeed_files import Fit
from lightning_toys.update_entropy.policy import import_optional, is_adapter
from lightning_toys.update_entropy.state_files import read_state_file
from lightning_toys.update_entropy.state_formats import OPTIMIZER, by_number, recorded_step

# keys that no group of AdamW has, and switches that it has on
NON_ADAMW_KEYS = (
    "momentum", "momentum_decay", "nesterov", "alpha", "rho", "lambd", "lr_decay", "etas", "ns_steps",
    "max_coeff", "min_coeff", "grad_averaging", "freeze_step",  # of LAMB and 1-bit Adam
)  # fmt: skip
REQUIRED_SWITCHES = ("bias_correction", "correct_bias", "adam_w_mode")


def unique_by_canonical_name(names: Iterable[str]) -> dict[str, str]:
    """Return names by their canonical form, without those that share one."""
    names = list(names)
    counts = Counter(map(canonical_name, names))
    return {canonical_name(n): n for n in names if counts[canonical_name(n)] == 1}


def match_names(names: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """Return the model's names of a file's parameters, or the file's where the model has none.

    Args:
        names: of the file.
        wanted: of the model.
    """
    theirs, ours = unique_by_canonical_name(names), unique_by_canonical_name(wanted)
    found = {name: ours[form] for form, name in theirs.items() if form in ours}
    return [found.get(name, name) for name in names]


def prefixes(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the prefixes of a file's canonical names before wanted ones, such as ``model.`` of a Lightning module."""
    forms = unique_by_canonical_name(wanted)
    splits = ((n[:i], n[i:]) for n in names for i in (0, *(m.end() for m in re.finditer(r"\.", n))))
    return list(dict.fromkeys(prefix for prefix, rest in splits if rest in forms))


@dataclass(frozen=True)
class StateCandidate:
    """One way to read a file.

    Attributes:
        where: the optimiser in the file, for messages.
        optimizer: its state_dict.
        names: parameter name by number, of those that have a state.
    """

    where: str
    optimizer: Mapping[str, Any]
    names: dict[int, str]


def load_optimizer_state(path: str | Path, model: nn.Module) -> AdamWState:
    """Return AdamW's state of the parameters that a model trains (those that require a gradient).

    Where a file has no names (the Trainers of transformers and Lightning write none), parameters are matched by order,
    and shapes are the only check of it: two parameters of one shape that changed places go unnoticed.

    Args:
        path: what :func:`save_optimizer_state` writes; ``optimizer.state_dict()``, named or of transformers' Trainer
            (``optimizer.pt`` or the directory around it); keyed by names (FSDP2, torchtitan); a Lightning checkpoint;
            or a folder of ``torch.distributed.checkpoint`` or DeepSpeed, see :mod:`~.state_files`.
        model: with the adapter that the state belongs to.

    Raises:
        ToyError: it is no such file, or it does not hold exactly what the model trains.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not wanted:
        raise flag_error(OPTIMIZER, f"{path} fits no model that trains nothing; give the adapter as {ADAPTER}")
    content = read_state_file(path, moment_shaper(wanted))
    fitting: list[tuple[str, AdamWState]] = []
    mismatches: dict[str, list[str]] = {}  # of the best candidate of each optimiser
    for candidate in state_candidates(content, path, model, wanted):
        state, wrong = match_state(candidate, wanted)
        if not wrong:
            fitting.append((candidate.where, state))
        mismatches[candidate.where] = min(wrong, mismatches.get(candidate.where, wrong), key=len)
    if len(fitting) > 1:
        raise flag_error(
            OPTIMIZER, f"{path} fits the model in several ways: {join_limited([where for where, _ in fitting])}"
        )
    if not fitting:
        wrong = [f"{where}: {w}" if len(mismatches) > 1 else w for where, items in mismatches.items() for w in items]
        hint = whole_model_hint(content, model, wanted)
        raise flag_error(OPTIMIZER, f"{path} does not fit the model: {hint}{join_limited(wrong)}")
    return fitting[0][1]


def moment_shaper(wanted: Mapping[str, Tensor]) -> Fit:
    """Return what gives a flat moment the shape of the parameter that a name is of, where the sizes are alike.

    A moment that has a shape keeps it: one of the same size in another order would be scrambled.

    Args:
        wanted: the model's parameters that require a gradient, by name.
    """
    forms = unique_by_canonical_name(wanted)

    def fit(name: str, moment: Tensor) -> Tensor:
        own = wanted.get(forms.get(canonical_name(name), ""))
        flat = own is not None and moment.dim() == 1 and own.numel() == moment.numel()
        return moment.reshape(own.shape) if own is not None and flat else moment

    return fit


def whole_model_hint(content: Any, model: nn.Module, wanted: Mapping[str, Tensor]) -> str:
    """Say that a state is of all parameters where an adapter is trained; empty if it does not look so.

    Args:
        content: of the file.
        model: that it does not fit.
        wanted: the model's parameters that require a gradient, by name.
    """
    if not all(map(is_adapter, wanted)):
        return ""
    held = content if isinstance(content, dict) else {}
    optimizer, _ = by_number(held.get("optimizer", held))
    states = optimizer["state"].values() if is_state_dict(optimizer) else []
    sizes = sum(x["exp_avg"].numel() for x in states if isinstance(x.get("exp_avg"), Tensor))
    if sizes != sum(p.numel() for n, p in model.named_parameters() if not is_adapter(n)):
        return ""
    return "it is a state of all parameters, not of an adapter's; give --model.policy.lora_rank 0 and no adapter; "


def check_same_step(path: str | Path, state: AdamWState, weights: str | Path, flag: str) -> None:
    """Check that an optimiser's state and weights are of one step of a training, as far as files say.

    Args:
        path: of the state.
        state: that was read from it.
        weights: folder of the adapter, or of the backbone.
        flag: that gave the folder.

    Raises:
        ToyError: the trainer_state.json files beside them name two steps.
    """
    ours, theirs = recorded_step(path), recorded_step(weights)
    if ours is not None and theirs is not None and ours != theirs:
        raise flag_error(
            OPTIMIZER,
            f"{path} is of step {ours}, and {flag} {weights} of step {theirs}, by their trainer_state.json; "
            "give both of one checkpoint",
        )
    taken = max(m.step for m in state.moments.values())
    if ours is None and theirs is not None and theirs != taken:
        note(
            f"{OPTIMIZER}: {path} has taken {taken} steps, and {flag} {weights} is of step {theirs}: "
            "they may not be of one checkpoint"
        )


def state_candidates(
    content: Any, path: str | Path, model: nn.Module, wanted: Mapping[str, Tensor]
) -> Iterator[StateCandidate]:
    """Yield the ways to read a file: one for each optimiser, several where its parameters' order is ambiguous.

    Args:
        content: of the file.
        path: of the file, for messages.
        model: that the state is for.
        wanted: the model's parameters that require a gradient, by name.

    Raises:
        ToyError: it holds no optimiser's state, or names of another number of parameters.
    """
    held = content if isinstance(content, dict) else {}
    orders, stored = [list(wanted)], None
    if lightning := isinstance(held.get("optimizer_states"), list):
        keys, forms = [canonical_name(str(k)) for k in held.get("state_dict") or {}], unique_by_canonical_name(wanted)
        tails = [[k.removeprefix(p) for k in keys if k.startswith(p)] for p in prefixes(keys, wanted)]
        orders = [[forms[k] for k in tail if k in forms] for tail in tails] or [[]]
        found = held["optimizer_states"]
    else:
        found, stored = [held.get("optimizer", held.get("optim", held))], held.get("names")
    for i, given_optimizer in enumerate(found or [None]):
        optimizer, keys_are_names = by_number(given_optimizer)
        if not is_state_dict(optimizer):
            kinds = "optimizer.state_dict(), Trainer's optimizer.pt or a Lightning checkpoint"
            raise flag_error(OPTIMIZER, f"{path} holds no state of an optimiser; give {kinds}")
        groups, states = optimizer["param_groups"], optimizer["state"]
        every = [g["params"] for g in groups]
        # an optimiser of all parameters has numbers for the frozen ones too, which get no state
        stepped = [[number for number in numbers if states.get(number)] for numbers in every]
        if given := stored or keys_are_names or [g["param_names"] for g in groups if "param_names" in g]:
            given = given if isinstance(given, list) else []
            names = [str(n) for part in given for n in (part if isinstance(part, list) else [part])]
            if len(names) != sum(map(len, every)):
                raise flag_error(OPTIMIZER, f"{path} holds {len(names)} names of {sum(map(len, every))} parameters")
            names = [canonical_name(n) for n in names] if lightning else names
            named = [[n.removeprefix(p) for n in names] for p in prefixes(names, wanted)] if lightning else [names]
            ways = [dict(zip(chain(*every), match_names(way, wanted), strict=True)) for way in named or [names]]
        else:
            ways = [dict(zip(chain(*numbers), order)) for order in orders for numbers in (every, stepped)]  # noqa: B905
            if len(groups) == 2:  # perhaps those that transformers' Trainer makes
                order = trainer_order(model)
                ways += [dict([*zip(x, order[0]), *zip(y, order[1])]) for x, y in (every, stepped)]  # noqa: B905
        ways = [{n: name for n, name in way.items() if states.get(n)} for way in ways]
        yield from (
            StateCandidate(f"optimiser {i}", optimizer, way) for j, way in enumerate(ways) if way not in ways[:j]
        )


def is_state_dict(value: Any) -> bool:
    """Whether a value has the form of an optimiser's ``state_dict()``."""
    groups = value.get("param_groups") if isinstance(value, dict) else None
    return (
        isinstance(groups, list)
        and bool(groups)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and all(isinstance(number, int) for g in groups for number in g["params"])
        and isinstance(value.get("state"), dict)
        and all(isinstance(entry, dict) for entry in value["state"].values())
    )


def trainer_order(model: nn.Module) -> list[list[str]]:
    """Return the names in the two groups of transformers' Trainer: with weight decay, and without (biases, norms)."""
    decays = set(import_optional("transformers").Trainer.get_decay_parameter_names(None, model))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return [[n for n in names if n in decays], [n for n in names if n not in decays]]


def match_state(candidate: StateCandidate, wanted: Mapping[str, Tensor]) -> tuple[AdamWState, list[str]]:
    """Return a candidate's state of the wanted parameters, and what in it does not fit the model, a line each."""
    groups, states = candidate.optimizer["param_groups"], candidate.optimizer["state"]
    hyperparameters: dict[str, Hyperparameters] = {}
    moments: dict[str, Moments] = {}
    wrong = [f"group {i} is not AdamW's: {why}" for i, group in enumerate(groups) if (why := group_mismatch(group))]
    if wrong:
        return AdamWState({}, {}), wrong
    seen: set[str] = set()
    for group in groups:
        steps: dict[int, str] = {}
        for number in group["params"]:
            entry, name = states.get(number), candidate.names.get(number, "")
            if not entry:
                continue
            if name not in wanted or name in seen:
                wrong.append(
                    f"nothing takes the state of {name or f'number {number}'} {describe_shape(entry.get('exp_avg'))}"
                )
                continue
            seen.add(name)
            if why := moments_mismatch(entry, name, wanted[name], bool(group.get("amsgrad"))):
                wrong.append(why)
                continue
            device = wanted[name].device
            hyperparameters[name] = hyperparameters_from_group(group)
            moments[name] = moments_from_state({k: v if k == "step" else v.to(device) for k, v in entry.items()})
            steps.setdefault(moments[name].step, name)
        if len(steps) > 1:
            wrong.append("step " + ", ".join(f"{step} for {name}" for step, name in sorted(steps.items())))
    absent = [f"no state for {name} {describe_shape(p)}" for name, p in wanted.items() if name not in seen]
    loose = set(states) - {number for group in groups for number in group["params"]}
    wrong += [f"the state of number {number} is in no group" for number in loose]
    order = [name for name in wanted if name in moments]
    return AdamWState({n: hyperparameters[n] for n in order}, {n: moments[n] for n in order}), absent + wrong


def group_mismatch(group: Mapping[str, Any]) -> str:
    """Return why a parameter group is not AdamW's, empty if it may be."""
    if found := [k for k in NON_ADAMW_KEYS if k in group]:
        return f"it has {', '.join(found)}"
    if absent := [k for k in ("lr", "betas", "eps", "weight_decay") if k not in group]:
        return f"it has no {', '.join(absent)}"
    if "amsgrad" not in group and "maximize" in group:  # RAdam and Adamax have all of the above
        return "it has no amsgrad"
    if off := [k for k in REQUIRED_SWITCHES if not group.get(k, True)]:
        return f"{off[0]} is off"
    try:
        h = hyperparameters_from_group(group)
    except (TypeError, ValueError):
        return "its settings are no numbers"
    rates = (h.lr, h.eps, h.weight_decay, h.initial_lr or 0.0)
    if not (all(0 <= x < math.inf for x in rates) and all(0 <= b < 1 for b in h.betas)):
        return f"lr {h.lr}, betas {h.betas}, eps {h.eps}, weight_decay {h.weight_decay}"
    if group.get("decoupled_weight_decay") is False and h.weight_decay:
        return "its weight decay is part of the gradient, as Adam's is"
    return ""


def moments_mismatch(entry: Mapping[str, Any], name: str, parameter: Tensor, amsgrad: bool) -> str:
    """Return why the state of a parameter cannot be AdamW's, empty if it may be.

    Args:
        entry: the state.
        name: of the parameter.
        parameter: whose shape it has to have.
        amsgrad: of its group.
    """
    keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * (amsgrad or "max_exp_avg_sq" in entry)
    if absent := [k for k in ("step", *keys) if k not in entry]:
        return f"no {', '.join(absent)} for {name}"
    if extra := [str(k) for k in entry if k not in ("step", *keys)]:
        return f"{', '.join(extra)} for {name}, which AdamW does not keep"
    for key in keys:
        value = entry[key]
        if describe_shape(value) != describe_shape(parameter):
            return f"shape {describe_shape(value)} for {name} where {describe_shape(parameter)} is wanted"
        if not value.is_floating_point():
            return f"{key} of {name} is of {value.dtype}"
        if not bool(value.isfinite().all()):
            return f"{key} of {name} is not finite"
        if key != "exp_avg" and bool((value < 0).any()):
            return f"{key} of {name} is below 0"
    try:
        step = float(entry["step"])
    except (TypeError, ValueError, RuntimeError):
        return f"step of {name} is no number"
    return "" if step >= 0 and step.is_integer() else f"step {step:g} for {name}"


def with_positive_rates(state: AdamWState, path: str | Path, reference_eta: float | None = None) -> AdamWState:
    """Return a state whose learning rates are not all 0, as they are in the last checkpoint of a decaying schedule.

    Along a step of length 0 nothing changes, and all that is measured would be 0. The rates that the schedule started
    from are taken instead, or one rate for all that the user gives; a line says so.

    Args:
        state: of a file.
        path: of the file, for messages.
        reference_eta: step size that the user asks for.

    Raises:
        ToyError: all rates are 0, the file has no initial ones, and the user gives none.
    """
    if state.lr > 0:
        return state
    initial = {name: h.initial_lr or 0.0 for name, h in state.hyperparameters.items()}
    if (largest := max(initial.values())) > 0:
        note(
            f"{OPTIMIZER}: {path} has learning rate 0, the end of its schedule; "
            f"the rates that it began with, up to {largest:g}, are taken"
        )
    elif reference_eta is not None:
        initial = dict.fromkeys(initial, reference_eta)
        note(f"{OPTIMIZER}: {path} has learning rate 0 in every group; taken as {reference_eta:g} in all of them")
    else:
        raise flag_error(
            OPTIMIZER, f"{path} has learning rate 0 and no initial_lr; give the step size as --model.plan.reference_eta"
        )
    hyperparameters = {n: replace(h, lr=initial[n]) for n, h in state.hyperparameters.items()}
    return AdamWState(hyperparameters, state.moments)


def save_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, path: str | Path) -> None:
    """Write an AdamW's state with the names of its parameters, as :func:`load_optimizer_state` reads it.

    Args:
        optimizer: an AdamW.
        model: whose parameters it steps.
        path: of a file that does not exist yet.

    Raises:
        ToyError: the file exists or cannot be written, the optimiser is no AdamW or holds a parameter that is not the
            model's.
    """
    require_adamw(optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if unknown := [str(tuple(p.shape)) for p in held if id(p) not in names]:
        raise flag_error(
            "optimizer state", f"the model does not name what the optimiser holds: {join_limited(unknown)}"
        )
    try:
        with Path(path).expanduser().open("xb") as file:
            torch.save({"optimizer": optimizer.state_dict(), "names": [names[id(p)] for p in held]}, file)
    except FileExistsError:
        raise flag_error("optimizer state", f"{path} is there already; give a path that is free") from None
    except OSError as error:
        raise flag_error("optimizer state", f"{path} cannot be written: {error_text(error)}") from error
