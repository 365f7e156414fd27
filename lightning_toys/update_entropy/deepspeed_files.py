"""Optimiser states that DeepSpeed writes: the shards of ZeRO 1 and 2, and universal checkpoints of any stage.

ZeRO 1 and 2 lay the parameters of a group end to end, pad that, and cut it into one partition a rank; what a rank's
file says of a parameter is where its fragment begins in the rank's partition, and how long it is
(``param_slice_mappings``). A universal checkpoint has a folder a parameter. What a checkpoint says of itself beside
that is :mod:`~.deepspeed_record`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_toys.update_entropy.checkpoints import flag_error, join_limited
from lightning_toys.update_entropy.deepspeed_record import (
    ModelRecord,
    check_layout,
    check_optimizer,
    check_universal_layout,
    load_inert,
    model_record,
    refuse,
)
from lightning_toys.update_entropy.state_formats import OPTIMIZER

SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MOMENTS = ("exp_avg", "exp_avg_sq")
AMSGRAD = (*MOMENTS, "max_exp_avg_sq")
Fit = Callable[[str, Tensor], Tensor]  # gives a parameter's flat moment its shape


def zero_shards(folder: Path) -> list[Path]:
    """Return the optimiser's files of a checkpoint of DeepSpeed's, in any order; empty if it is none."""
    return [f for f in folder.iterdir() if SHARD.fullmatch(f.name)]


def read_zero(folder: Path, fit: Fit) -> dict[str, Any]:
    """Return the state in the shards of ZeRO 1 or 2, by parameter name.

    Args:
        folder: with a file ``zero_pp_rank_R_mp_rank_00_optim_states.pt`` for each rank.
        fit: gives a moment the shape of its parameter.

    Raises:
        ToyError: a shard is missing or does not fit the others, or it is a checkpoint of another kind.
    """
    files: dict[int, Path] = {}
    for file in zero_shards(folder):
        rank, model_rank = map(int, SHARD.fullmatch(file.name).groups())  # type: ignore[union-attr]
        if model_rank:
            raise refuse(folder, "has a model cut up by tensor or pipeline parallelism")
        if rank in files:
            raise flag_error(OPTIMIZER, f"{folder} has two files of rank {rank}: {files[rank].name}, {file.name}")
        files[rank] = file
    parts, config = [], None
    for rank in range(len(files)):
        if rank not in files:
            raise flag_error(OPTIMIZER, f"{folder} has {len(files)} ranks' files, and none of rank {rank}")
        found, own = shard_content(files[rank], folder)
        parts.append(found)
        config = config if isinstance(config, dict) else own
    counts = parts[0].get("partition_count")
    wanted = max(counts) if isinstance(counts, list | tuple) and counts else counts
    if isinstance(wanted, int) and wanted != len(parts):
        raise flag_error(OPTIMIZER, f"{folder} has files of {len(parts)} ranks, where {wanted} wrote it")
    if len(sizes := {len(part["param_slice_mappings"]) for part in parts}) > 1:
        raise flag_error(OPTIMIZER, f"{folder}: its ranks have {min(sizes)} to {max(sizes)} groups")
    groups, record = parts[0]["base_optimizer_state"]["param_groups"], model_record(folder)
    room = sum(file.stat().st_size for file in files.values())
    config = config if isinstance(config, dict) else record.config
    check_optimizer(folder, config, groups)
    names = [names_by_address(parts, i) for i in range(len(groups))]
    check_layout(folder, config, record, names, len(parts))
    kept = [moment_keys(parts, i, folder) for i in range(len(groups))]
    out: dict[str, Any] = {"param_groups": [], "state": {}}
    for i, group in enumerate(groups):
        out["param_groups"].append({**settings(group), "params": names[i]})
        for name in names[i]:
            moments = {k: joined(parts, i, name, k, folder) for k in kept[i]}
            entry: dict[str, Any] = {k: fit(name, shaped(m, name, record, folder)) for k, m in moments.items()}
            room -= sum(m.nbytes for m in moments.values())
            if room < 0:  # fragments that lie upon each other
                raise flag_error(OPTIMIZER, f"{folder} says more values than its files hold")
            out["state"][name] = {"step": one_step(parts, i, folder), **entry}
    return out


def moment_keys(parts: list[dict[str, Any]], group: int, folder: Path) -> list[str]:
    """Return which moments a group has.

    Raises:
        ToyError: it has other state too, which AdamW does not keep.
    """
    held = {str(k) for part in parts for k in flat_state(part, group)}
    if other := held - {*AMSGRAD, "step"}:
        raise flag_error(OPTIMIZER, f"{folder} has {join_limited(sorted(other))}, which AdamW does not keep")
    return [k for k in AMSGRAD if k in MOMENTS or k in held]


def names_by_address(parts: list[dict[str, Any]], group: int) -> list[str]:
    """Return the names of a group's parameters in the order in which their fragments lie, rank after rank."""
    out: dict[str, None] = {}
    for part in parts:
        addresses = part["param_slice_mappings"][group]
        out |= dict.fromkeys(sorted(addresses, key=lambda name: vars(addresses[name]).get("start", 0)))
    return list(out)


def shaped(moment: Tensor, name: str, record: ModelRecord, folder: Path) -> Tensor:
    """Return a flat moment in the shape that the model's file gives its parameter; as it is where that has none.

    Raises:
        ToyError: it has another size.
    """
    shape = record.shape_of.get(name)
    if shape is None or moment.dim() != 1:
        return moment
    if moment.numel() != math.prod(shape):
        size = moment.numel()
        raise flag_error(OPTIMIZER, f"{folder} has {size} values of {name}, of shape {shape} by the model's file")
    return moment.reshape(shape)


def shard_content(file: Path, folder: Path) -> tuple[dict[str, Any], Any]:
    """Return what a rank's file says of the optimiser, of the form that ZeRO 1 and 2 write, and DeepSpeed's config.

    Raises:
        ToyError: it is of another form.
    """
    content = load_inert(file)
    found = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise flag_error(OPTIMIZER, f"{file} holds no optimizer_state_dict of DeepSpeed's")
    if "fp32_flat_groups" in found:
        raise refuse(folder, "is one of ZeRO 3")
    base, maps = found.get("base_optimizer_state"), found.get("param_slice_mappings")
    if isinstance(base, list):
        raise flag_error(
            OPTIMIZER, f"{folder} is elastic, without AdamW's settings; save with elastic_checkpoint false"
        )
    if not isinstance(maps, list):
        why = "as before DeepSpeed 0.8; load and save it with a newer one"
        raise flag_error(OPTIMIZER, f"{file} has no param_slice_mappings, {why}")
    groups = base.get("param_groups") if isinstance(base, dict) else None
    states = base.get("state") if isinstance(base, dict) else None
    if (
        not isinstance(groups, list)
        or not isinstance(states, dict)
        or len(groups) != len(maps)
        or not all(isinstance(m, dict) for m in maps)
        or not all(isinstance(g, dict) and len(g.get("params", ())) == 1 for g in groups)
    ):
        raise flag_error(OPTIMIZER, f"{file} has groups that do not fit its param_slice_mappings")
    return found, content.get("ds_config")


def flat_state(part: Mapping[str, Any], group: int) -> dict[str, Any]:
    """Return the state of a group's flat partition in one rank's file."""
    base = part["base_optimizer_state"]
    found = base["state"].get(base["param_groups"][group]["params"][0])
    return found if isinstance(found, dict) else {}


def joined(parts: list[dict[str, Any]], group: int, name: str, key: str, folder: Path) -> Tensor:
    """Return a parameter's moment, flat: its fragments of all ranks, in their order.

    A fragment that goes on in the next rank ends where the rank's partition does, and its continuation is the first
    of that rank's: files that changed places, and offsets that forget the padding, are seen by that.

    Raises:
        ToyError: fragments lie outside of their partitions, or do not follow each other.
    """
    maps = [part["param_slice_mappings"][group] for part in parts]
    ranks = [rank for rank, addresses in enumerate(maps) if name in addresses]
    pieces: list[Tensor] = []
    for rank in ranks:
        address, flat = vars(maps[rank][name]), flat_state(parts[rank], group).get(key)
        start, count = address.get("start"), address.get("numel")
        where = f"{folder}: rank {rank}'s fragment of {name}"
        if not isinstance(flat, Tensor) or flat.dim() != 1:
            raise flag_error(OPTIMIZER, f"{where} has no {key}")
        if not (isinstance(start, int) and isinstance(count, int) and start >= 0 and 0 < count <= len(flat) - start):
            raise flag_error(OPTIMIZER, f"{where} is {count} from {start} on, of {len(flat)}")
        continued = rank == ranks[0] or (start == 0 and rank - 1 in ranks)
        if not continued or (rank != ranks[-1] and start + count != len(flat)):
            raise flag_error(OPTIMIZER, f"{where} does not follow that of the rank before; have files changed places?")
        pieces.append(flat[start : start + count])
    return torch.cat(pieces)


def one_step(parts: list[dict[str, Any]], group: int, folder: Path) -> Any:
    """Return the step of a group, which all ranks have in common.

    Raises:
        ToyError: they have several, or none.
    """
    steps: set[float] = set()
    for part in parts:
        kept = part["base_optimizer_state"]["param_groups"][group].get("step")
        steps.add(number(flat_state(part, group).get("step", kept), folder))
    if len(steps) > 1:
        raise flag_error(OPTIMIZER, f"{folder}: its ranks are of steps {sorted(steps)}; give shards of one checkpoint")
    return steps.pop()


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings without parameters and without the step that some optimisers keep there."""
    return {k: v for k, v in group.items() if k not in ("params", "step")}


def universal_folder(folder: Path) -> Path | None:
    """Return the universal checkpoint in a folder, or that which ``latest_universal`` there names; None without one.

    Raises:
        ToyError: ``latest`` there names a checkpoint that the universal one was not made of.
    """
    if (folder / "zero" / "optimizer_state.pt").exists():
        return folder
    named, last = pointed(folder, "latest_universal"), text_of(folder / "latest")
    if named is None or not (named / "zero" / "optimizer_state.pt").exists():
        return None
    if last and not re.fullmatch(re.escape(last) + r"(\D.*)?", named.name):
        raise flag_error(
            OPTIMIZER,
            f"{folder} has a universal checkpoint {named.name} and, by the file latest, another {last}; "
            f"give one of both folders, {named} or {folder / last}",
        )
    return named


def pointed(folder: Path, name: str) -> Path | None:
    """Return the folder that a file such as ``latest`` names, if it names one in its own folder."""
    text = text_of(folder / name)
    return folder / text if text and Path(text).name == text and (folder / text).is_dir() else None


def text_of(file: Path) -> str:
    """Return what a small file says, empty where there is none that can be read."""
    try:
        return file.read_text()[:256].strip() if file.is_file() and file.stat().st_size < 4096 else ""
    except (OSError, UnicodeDecodeError):
        return ""


def read_universal(folder: Path, fit: Fit) -> dict[str, Any]:
    """Return the state in a universal checkpoint, by parameter name.

    Args:
        folder: of ``ds_to_universal``, with ``zero/NAME/exp_avg.pt`` for each parameter.
        fit: gives a moment the shape of its parameter.

    Raises:
        ToyError: a file is missing or of another form, or it is not said which parameter is in which group.
    """
    top = load_inert(folder / "zero" / "optimizer_state.pt")
    groups = top.get("param_groups") if isinstance(top, dict) else None
    if not isinstance(groups, list) or not groups or not all(isinstance(g, dict) for g in groups):
        raise flag_error(OPTIMIZER, f"{folder} has no param_groups in zero/optimizer_state.pt")
    record, inner = model_record(folder), top.get("optimizer_state_dict")
    check_optimizer(folder, record.config, groups)
    if inner is None:  # of ZeRO 1 or 2: in ZeRO 3 parameters have no step.pt
        check_universal_layout(folder, record, top)
    taken: dict[str, float] = {}
    state: dict[str, Any] = {}
    for place in sorted(p for p in (folder / "zero").iterdir() if p.is_dir()):
        name, held = place.name, {f.name for f in place.iterdir()}
        if not held - {"fp32.pt", "step.pt"}:  # a weight that is not trained
            continue
        if other := held - {f"{k}.pt" for k in (*AMSGRAD, "fp32", "step")}:
            raise flag_error(OPTIMIZER, f"{place} holds {join_limited(sorted(other))}, which AdamW does not keep")
        keys = [k for k in AMSGRAD if k in MOMENTS or f"{k}.pt" in held]
        moments = {k: universal_tensor(place / f"{k}.pt") for k in keys}
        state[name] = {k: fit(name, shaped(m, name, record, folder)) for k, m in moments.items()}
        step = (
            number(load_inert(place / "step.pt"), place / "step.pt")
            if "step.pt" in held
            else shared_step(inner, groups, folder)
        )
        if step is None:
            raise flag_error(OPTIMIZER, f"{folder} has no step of {name}; convert it by a newer DeepSpeed")
        state[name]["step"] = taken[name] = step
    if len(set(taken.values())) > 1:
        first = {step: name for name, step in reversed(taken.items())}
        each = join_limited([f"{step:g} of {name}" for step, name in sorted(first.items())])
        raise flag_error(OPTIMIZER, f"{folder} has steps {each}; convert shards of one checkpoint")
    counts = [len(g["params"]) if isinstance(g.get("params"), list) else 1 for g in groups]
    members = group_names(folder, [settings(g) for g in groups], counts, list(state), record)
    named = [{**settings(g), "params": n} for g, n in zip(groups, members, strict=True)]
    return {"param_groups": named, "state": state}


def shared_step(inner: Any, groups: list[dict[str, Any]], folder: Path) -> float | None:
    """Return the step of a universal checkpoint whose parameters have none of their own; None where there is none.

    Args:
        inner: the optimiser's own state, which ZeRO 3 leaves there.
        groups: of the optimiser, some of which keep a step.
        folder: of the checkpoint.

    Raises:
        ToyError: there are several, or one is no number.
    """
    flat = inner.get("state") if isinstance(inner, dict) else None
    states = flat.values() if isinstance(flat, dict) else ()
    found = [s["step"] for s in states if isinstance(s, dict) and "step" in s] or [
        g["step"] for g in groups if "step" in g
    ]
    steps = {number(s, folder / "zero" / "optimizer_state.pt") for s in found}
    if len(steps) > 1:
        raise flag_error(OPTIMIZER, f"{folder} is of steps {sorted(steps)}; convert shards of one checkpoint")
    return steps.pop() if steps else None


def number(value: Any, file: Path) -> float:
    """Return a step as a number.

    Raises:
        ToyError: it is none.
    """
    if type(value) in (int, float):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    raise flag_error(OPTIMIZER, f"{file} holds a step that is no number, but of type {type(value).__name__}")


def universal_tensor(file: Path) -> Tensor:
    """Return the tensor in a parameter's file, which is under ``param`` there, or all of it (ZeRO 3).

    Raises:
        ToyError: there is none.
    """
    found = load_inert(file)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor):
        raise flag_error(OPTIMIZER, f"{file} holds no tensor")
    return tensor


def group_names(
    folder: Path, groups: list[dict[str, Any]], counts: list[int], names: list[str], record: ModelRecord
) -> list[list[str]]:
    """Return the names of each group's parameters.

    Where groups differ in their settings, the shapes in the model's file say which parameter is in which.

    Args:
        folder: of the checkpoint.
        groups: the settings of each.
        counts: flat tensors of each group: 1, or in ZeRO 3 the number of its sub-groups, each of which has its shapes.
        names: of the parameters.
        record: of the model's file.

    Raises:
        ToyError: nothing says so.
    """
    if all(g == groups[0] for g in groups):
        return [names, *([] for _ in groups[1:])]
    if record.shapes is not None and len(record.shapes) == sum(counts):
        listed = {n for part in record.shapes for n in part}
        if set(names) != listed:
            other = join_limited(sorted(set(names) ^ listed))
            raise flag_error(OPTIMIZER, f"{folder}: the model's file and the folder zero differ in {other}")
        parts = iter(record.shapes)
        return [[n for _ in range(count) for n in next(parts)] for count in counts]
    raise flag_error(
        OPTIMIZER,
        f"{folder} has {len(groups)} groups with different settings, and no *_model_states.pt says which parameter is "
        f"in which{record.why}; give the folder as ds_to_universal wrote it",
    )
