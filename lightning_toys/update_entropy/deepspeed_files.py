"""Optimiser states that DeepSpeed writes: the shards of ZeRO 1 and 2, and universal checkpoints of any stage.

ZeRO 1 and 2 lay the parameters of a group end to end, pad that, and cut it into one partition a rank; what a rank's
file says of a parameter is where its fragment begins in the rank's partition, and how long it is
(``param_slice_mappings``). A universal checkpoint has a folder a parameter. Both are pickles with classes of
DeepSpeed's in them: records take their place, which hold values and do nothing (:class:`~.dcp_files.Record`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_toys.training.files import special_kind
from lightning_toys.update_entropy.checkpoints import error_text, flag_error, join_limited
from lightning_toys.update_entropy.dcp_files import Record
from lightning_toys.update_entropy.state_formats import OPTIMIZER

SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MOMENTS = ("exp_avg", "exp_avg_sq")
RECIPE = (
    "convert it, python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder "
    "{folder}_universal, and give that folder"
)
Fit = Callable[[str, Tensor], Tensor]  # gives a parameter's flat moment its shape


def refuse(path: Path, why: str) -> Exception:
    """Return the error that a checkpoint of DeepSpeed's is not read as it is, with what to do."""
    return flag_error(OPTIMIZER, f"{path} {why}; {RECIPE.format(folder=path)}")


def load_inert(file: Path) -> Any:
    """Return what a file of ``torch.save`` holds, with a record for each object of DeepSpeed's; nothing of it is run.

    Raises:
        ToyError: it is no such file, or holds objects of others.
    """
    if special_kind(file) or not file.is_file():
        raise flag_error(OPTIMIZER, f"{file} is no ordinary file")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        if foreign := [n for n in names if not n.startswith("deepspeed.")]:
            raise flag_error(OPTIMIZER, f"{file} holds a pickled {foreign[0]}, which could run code")
        stand_ins: list[Any] = [(type(n.rpartition(".")[2], (Record,), {}), n) for n in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, EOFError, AttributeError, IndexError) as error:
        raise flag_error(OPTIMIZER, f"{file} cannot be read: {error_text(error)}") from error
    except Exception as error:
        if "UnpicklingError" not in type(error).__name__:
            raise
        raise flag_error(OPTIMIZER, f"{file} cannot be read: {error_text(error)}") from error


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
    parts = []
    for rank in range(len(files)):
        if rank not in files:
            raise flag_error(OPTIMIZER, f"{folder} has {len(files)} ranks' files, and none of rank {rank}")
        parts.append(shard_content(files[rank], folder))
    counts = parts[0].get("partition_count")
    wanted = max(counts) if isinstance(counts, list | tuple) and counts else counts
    if isinstance(wanted, int) and wanted != len(parts):
        raise flag_error(OPTIMIZER, f"{folder} has files of {len(parts)} ranks, where {wanted} wrote it")
    groups = parts[0]["base_optimizer_state"]["param_groups"]
    out: dict[str, Any] = {"param_groups": [], "state": {}}
    for i, group in enumerate(groups):
        names = dict.fromkeys(name for part in parts for name in part["param_slice_mappings"][i])
        out["param_groups"].append({**settings(group), "params": list(names)})
        for name in names:
            entry: dict[str, Any] = {k: fit(name, joined(parts, i, name, k, folder)) for k in MOMENTS}
            out["state"][name] = {"step": one_step(parts, i, folder), **entry}
    return out


def shard_content(file: Path, folder: Path) -> dict[str, Any]:
    """Return what a rank's file says of the optimiser, of the form that ZeRO 1 and 2 write.

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
    if coupled_decay(content.get("ds_config")) and any(g.get("weight_decay") for g in groups):
        raise flag_error(OPTIMIZER, f"{folder} is of Adam with adam_w_mode false: its weight decay is not AdamW's")
    return found


def coupled_decay(config: Any) -> bool:
    """Whether a configuration of DeepSpeed's makes weight decay a part of the gradient."""
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    if not isinstance(optimizer, dict) or str(optimizer.get("type")).lower() != "adam":
        return False
    params = optimizer.get("params")
    return isinstance(params, dict) and params.get("adam_w_mode") is False


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
    found = []
    for part in parts:
        kept = part["base_optimizer_state"]["param_groups"][group].get("step")
        found.append(flat_state(part, group).get("step", kept))
    steps = {float(s) for s in found if isinstance(s, int | float | Tensor)}
    if len(steps) != 1 or None in found:
        raise flag_error(OPTIMIZER, f"{folder}: its ranks are of steps {sorted(steps)}; give shards of one checkpoint")
    return steps.pop()


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings without parameters and without the step that some optimisers keep there."""
    return {k: v for k, v in group.items() if k not in ("params", "step")}


def universal_folder(folder: Path) -> Path | None:
    """Return the universal checkpoint in a folder, or that which ``latest_universal`` there names; None without one."""
    named = pointed(folder, "latest_universal")
    return next((f for f in (folder, named) if f is not None and (f / "zero" / "optimizer_state.pt").exists()), None)


def pointed(folder: Path, name: str) -> Path | None:
    """Return the folder that a file such as ``latest`` names, if it names one in its own folder."""
    file = folder / name
    try:
        text = file.read_text()[:256].strip() if file.is_file() and file.stat().st_size < 4096 else ""
    except (OSError, UnicodeDecodeError):
        return None
    return folder / text if text and Path(text).name == text and (folder / text).is_dir() else None


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
    inner = top.get("optimizer_state_dict")  # of ZeRO 3, whose parameters have no step.pt
    flat = inner.get("state") if isinstance(inner, dict) else None
    steps = [s["step"] for s in (flat or {}).values() if isinstance(s, dict) and "step" in s]
    steps += [g["step"] for g in groups if "step" in g]
    state: dict[str, Any] = {}
    for place in sorted(p for p in (folder / "zero").iterdir() if p.is_dir()):
        name = place.name
        state[name] = {k: fit(name, universal_tensor(place / f"{k}.pt")) for k in MOMENTS}
        step = load_inert(place / "step.pt") if (place / "step.pt").exists() else steps[0] if steps else None
        if step is None:
            raise flag_error(OPTIMIZER, f"{folder} has no step of {name}; convert it by a newer DeepSpeed")
        state[name]["step"] = step
    members = group_names(folder, [settings(g) for g in groups], list(state))
    named = [{**settings(g), "params": n} for g, n in zip(groups, members, strict=True)]
    return {"param_groups": named, "state": state}


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


def group_names(folder: Path, groups: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """Return the names of each group's parameters.

    Where groups differ in their settings, the shapes in the model's file say which parameter is in which.

    Raises:
        ToyError: nothing says so.
    """
    if all(g == groups[0] for g in groups):
        return [names, *([] for _ in groups[1:])]
    for file in sorted(folder.glob("*_model_states.pt"))[:1]:
        content = load_inert(file)
        shapes = content.get("param_shapes") if isinstance(content, dict) else None
        if isinstance(shapes, list) and len(shapes) == len(groups) and all(isinstance(s, dict) for s in shapes):
            if set(names) == {n for s in shapes for n in s}:
                return [[n for n in s if n in set(names)] for s in shapes]
            other = join_limited(sorted(set(names) ^ {n for s in shapes for n in s}))
            raise flag_error(OPTIMIZER, f"{folder}: {file.name} and the folder zero differ in {other}")
    raise flag_error(
        OPTIMIZER,
        f"{folder} has {len(groups)} groups with unlike settings, and no *_model_states.pt says which parameter is in "
        "which; give the folder as ds_to_universal wrote it, of ZeRO 1 or 2",
    )
