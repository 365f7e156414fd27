"""AdamW's state out of local files, written by name or by order, which fits a model or is refused.

No pickled object is built.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.update_entropy.adamw import AdamWState, Hyper, Moments, check_kind, hyper_of, moments_of
from lightning_toys.update_entropy.checkpoints import ADAPTER, canonical, listed, refusal, said, shape
from lightning_toys.update_entropy.policy import need

OPTIMIZER = "--model.optimizer_state"

# what a group of AdamW never has, and what it has not switched off
FOREIGN = ("momentum", "momentum_decay", "nesterov", "alpha", "rho", "lambd", "lr_decay", "etas", "ns_steps")
ALWAYS = ("bias_correction", "correct_bias", "adam_w_mode")


def by_canonical(names: Iterable[str]) -> dict[str, str]:
    """Return names by their canonical form, leaving out those that share one."""
    names = list(names)
    counts = Counter(map(canonical, names))
    return {canonical(n): n for n in names if counts[canonical(n)] == 1}


def matched(names: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """Return the model's names for those of a file, which stay as they are where the model has none.

    Args:
        names: of the file.
        wanted: of the model.
    """
    theirs, ours = by_canonical(names), by_canonical(wanted)
    found = {name: ours[form] for form, name in theirs.items() if form in ours}
    return [found.get(name, name) for name in names]


def prefixes(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return what a file's (canonical) names have before some wanted one: a module keeps a model under its own name."""
    forms = by_canonical(wanted)
    splits = ((n[:i], n[i:]) for n in names for i in (0, *(m.end() for m in re.finditer(r"\.", n))))
    return list(dict.fromkeys(prefix for prefix, rest in splits if rest in forms))


@dataclass(frozen=True)
class Reading:
    """One way to read a file: an optimiser's state_dict, and the name of each number in it that has a state."""

    where: str
    optimizer: Mapping[str, Any]
    names: dict[int, str]


def load_optimizer_state(path: str | Path, model: nn.Module) -> AdamWState:
    """Return AdamW's state of the parameters that a model trains (those that require a gradient).

    Where a file has no names (the Trainers of transformers and Lightning write none), order tells parameters apart, and
    shapes are the only check of it: two parameters of one shape that changed places go unseen.

    Args:
        path: what :func:`save_optimizer_state` writes; ``optimizer.state_dict()``, named or of transformers' Trainer
            (``optimizer.pt`` or the directory around it); or a Lightning checkpoint.
        model: with the adapter that the state belongs to.

    Raises:
        ToyError: it is no such file, or it does not hold just what the model trains.
    """
    file = Path(path).expanduser()
    file = file / "optimizer.pt" if file.is_dir() else file
    if not file.is_file():
        raise refusal(OPTIMIZER, f"{file} is not there; give an optimiser's state_dict, optimizer.pt or a .ckpt")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it holds a pickled {found[1]}, which could run code" if found else said(error)
        raise refusal(OPTIMIZER, f"{path} cannot be read: {why}") from error
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not wanted:
        raise refusal(OPTIMIZER, f"{path} fits no model that trains nothing; give the adapter as {ADAPTER}")
    fitting: list[tuple[str, AdamWState]] = []
    least: dict[str, list[str]] = {}  # what is wrong with the best reading of each optimiser
    for reading in readings(content, path, model, wanted):
        state, wrong = compare(reading, wanted)
        if not wrong:
            fitting.append((reading.where, state))
        least[reading.where] = min(wrong, least.get(reading.where, wrong), key=len)
    if len(fitting) > 1:
        raise refusal(OPTIMIZER, f"{path} fits the model in several ways: {listed([where for where, _ in fitting])}")
    if not fitting:
        wrong = [f"{where}: {w}" if len(least) > 1 else w for where, items in least.items() for w in items]
        raise refusal(OPTIMIZER, f"{path} does not fit the model: {listed(wrong)}")
    return fitting[0][1]


def readings(content: Any, path: str | Path, model: nn.Module, wanted: Mapping[str, Tensor]) -> Iterator[Reading]:
    """Return the ways to read a file: one for each optimiser, more where its order may be this or that."""
    held = content if isinstance(content, dict) else {}
    orders, stored = [list(wanted)], None
    if lightning := isinstance(held.get("optimizer_states"), list):
        keys, forms = [canonical(str(k)) for k in held.get("state_dict") or {}], by_canonical(wanted)
        tails = [[k.removeprefix(p) for k in keys if k.startswith(p)] for p in prefixes(keys, wanted)]
        orders = [[forms[k] for k in tail if k in forms] for tail in tails] or [[]]
        found = held["optimizer_states"]
    else:
        found, stored = [held.get("optimizer", held)], held.get("names")
    for i, optimizer in enumerate(found or [None]):
        if not is_state_dict(optimizer):
            kinds = "optimizer.state_dict(), Trainer's optimizer.pt or a Lightning checkpoint"
            raise refusal(OPTIMIZER, f"{path} holds no state of an optimiser; give {kinds}")
        groups, states = optimizer["param_groups"], optimizer["state"]
        every = [g["params"] for g in groups]
        # an optimiser of all parameters has numbers for the frozen ones too, which get no state
        stepped = [[number for number in numbers if states.get(number)] for numbers in every]
        if given := stored or [g["param_names"] for g in groups if "param_names" in g]:
            given = given if isinstance(given, list) else []
            names = [str(n) for part in given for n in (part if isinstance(part, list) else [part])]
            if len(names) != sum(map(len, every)):
                raise refusal(OPTIMIZER, f"{path} holds {len(names)} names of {sum(map(len, every))} parameters")
            names = [canonical(n) for n in names] if lightning else names
            named = [[n.removeprefix(p) for n in names] for p in prefixes(names, wanted)] if lightning else [names]
            ways = [dict(zip(chain(*every), matched(way, wanted), strict=True)) for way in named or [names]]
        else:
            ways = [dict(zip(chain(*numbers), order)) for order in orders for numbers in (every, stepped)]  # noqa: B905
            if len(groups) == 2:  # as transformers' Trainer makes them, or as somebody liked them
                order = trainer_order(model)
                ways += [dict([*zip(x, order[0]), *zip(y, order[1])]) for x, y in (every, stepped)]  # noqa: B905
        ways = [{n: name for n, name in way.items() if states.get(n)} for way in ways]
        yield from (Reading(f"optimiser {i}", optimizer, way) for j, way in enumerate(ways) if way not in ways[:j])


def is_state_dict(value: Any) -> bool:
    """Whether this is what an optimiser's ``state_dict()`` returns."""
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
    """Return the two groups that transformers' Trainer makes: what decays, and biases and norms, which do not."""
    decays = set(need("transformers").Trainer.get_decay_parameter_names(None, model))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return [[n for n in names if n in decays], [n for n in names if n not in decays]]


def compare(reading: Reading, wanted: Mapping[str, Tensor]) -> tuple[AdamWState, list[str]]:
    """Return the state that a reading gives, and what in it does not fit the model."""
    groups, states = reading.optimizer["param_groups"], reading.optimizer["state"]
    hyper: dict[str, Hyper] = {}
    moments: dict[str, Moments] = {}
    wrong = [f"group {i} is not AdamW's: {why}" for i, group in enumerate(groups) if (why := foreign(group))]
    if wrong:
        return AdamWState({}, {}), wrong
    seen: set[str] = set()
    for group in groups:
        steps: dict[int, str] = {}
        for number in group["params"]:
            entry, name = states.get(number), reading.names.get(number, "")
            if not entry:
                continue
            if name not in wanted or name in seen:
                wrong.append(f"nothing takes the state of {name or f'number {number}'} {shape(entry.get('exp_avg'))}")
                continue
            seen.add(name)
            if why := mismatch(entry, name, wanted[name], bool(group.get("amsgrad"))):
                wrong.append(why)
                continue
            device = wanted[name].device
            hyper[name] = hyper_of(group)
            moments[name] = moments_of({k: v if k == "step" else v.to(device) for k, v in entry.items()})
            steps.setdefault(moments[name].step, name)
        if len(steps) > 1:
            wrong.append("step " + ", ".join(f"{step} for {name}" for step, name in sorted(steps.items())))
    absent = [f"no state for {name} {shape(p)}" for name, p in wanted.items() if name not in seen]
    loose = set(states) - {number for group in groups for number in group["params"]}
    wrong += [f"the state of number {number} is in no group" for number in loose]
    order = [name for name in wanted if name in moments]
    return AdamWState({n: hyper[n] for n in order}, {n: moments[n] for n in order}), absent + wrong


def foreign(group: Mapping[str, Any]) -> str:
    """Return what tells that a group is not AdamW's, empty if nothing does."""
    if found := [k for k in FOREIGN if k in group]:
        return f"it has {', '.join(found)}"
    if absent := [k for k in ("lr", "betas", "eps", "weight_decay") if k not in group]:
        return f"it has no {', '.join(absent)}"
    if "amsgrad" not in group and "maximize" in group:  # RAdam and Adamax have all of the above
        return "it has no amsgrad"
    if off := [k for k in ALWAYS if not group.get(k, True)]:
        return f"{off[0]} is off"
    try:
        h = hyper_of(group)
    except (TypeError, ValueError):
        return "its settings are no numbers"
    if not (all(0 <= x < math.inf for x in (h.lr, h.eps, h.weight_decay)) and all(0 <= b < 1 for b in h.betas)):
        return f"lr {h.lr}, betas {h.betas}, eps {h.eps}, weight_decay {h.weight_decay}"
    if group.get("decoupled_weight_decay") is False and h.weight_decay:
        return "its weight decay is part of the gradient, as Adam's is"
    return ""


def mismatch(entry: Mapping[str, Any], name: str, parameter: Tensor, amsgrad: bool) -> str:
    """Return why the state of a parameter cannot be AdamW's, empty if it can."""
    keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * (amsgrad or "max_exp_avg_sq" in entry)
    if absent := [k for k in ("step", *keys) if k not in entry]:
        return f"no {', '.join(absent)} for {name}"
    if extra := [str(k) for k in entry if k not in ("step", *keys)]:
        return f"{', '.join(extra)} for {name}, which AdamW does not keep"
    for key in keys:
        value = entry[key]
        if shape(value) != shape(parameter):
            return f"shape {shape(value)} for {name} where {shape(parameter)} is wanted"
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


def save_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, path: str | Path) -> None:
    """Write an AdamW's state with the names of its parameters, as :func:`load_optimizer_state` reads it.

    Args:
        optimizer: an AdamW.
        model: whose parameters it steps.
        path: of a file that is not there yet.

    Raises:
        ToyError: the file is there already or cannot be made, the optimiser is no AdamW or holds a parameter that is
            not the model's.
    """
    check_kind(optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if strangers := [str(tuple(p.shape)) for p in held if id(p) not in names]:
        raise refusal("optimizer state", f"the model does not name what the optimiser holds: {listed(strangers)}")
    try:
        with Path(path).expanduser().open("xb") as file:
            torch.save({"optimizer": optimizer.state_dict(), "names": [names[id(p)] for p in held]}, file)
    except FileExistsError:
        raise refusal("optimizer state", f"{path} is there already; give a path that is free") from None
    except OSError as error:
        raise refusal("optimizer state", f"{path} cannot be written: {said(error)}") from error
