"""What a checkpoint of DeepSpeed's says of itself: its configuration, its parameters' shapes, and their order.

Its files are pickles with classes of DeepSpeed's in them: records take their place, which hold values and do nothing
(:class:`~.dcp_files.Record`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_toys.errors import ToyError, note
from lightning_toys.training.files import special_kind
from lightning_toys.update_entropy.checkpoints import error_text, flag_error, join_limited
from lightning_toys.update_entropy.dcp_files import Record, check_archive, check_tensors
from lightning_toys.update_entropy.state_formats import OPTIMIZER

RECIPE = (
    "convert it, python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder "
    "{folder}_universal, and give that folder"
)
ROUND_ROBIN = (
    "was trained with round_robin_gradients, of which DeepSpeed writes moments in another order than it says; "
    "train on without it, and save again"
)


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
        check_archive(file, file.stat().st_size)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        if foreign := [n for n in names if not n.startswith("deepspeed.")]:
            raise flag_error(OPTIMIZER, f"{file} holds a pickled {foreign[0]}, which could run code")
        stand_ins: list[Any] = [(type(n.rpartition(".")[2], (Record,), {}), n) for n in names]
        with torch.serialization.safe_globals(stand_ins):
            return check_tensors(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, EOFError, AttributeError, IndexError) as error:
        raise flag_error(OPTIMIZER, f"{file} cannot be read: {error_text(error)}") from error
    except Exception as error:
        if "UnpicklingError" not in type(error).__name__:
            raise
        raise flag_error(OPTIMIZER, f"{file} cannot be read: {error_text(error)}") from error


@dataclass(frozen=True)
class ModelRecord:
    """What the model's file beside an optimiser's says.

    Attributes:
        config: of DeepSpeed; a text where the training was given the path of a file; None where nothing says.
        shapes: of each group's parameters (in ZeRO 3, of each sub-group's), in the order of the flat buffer; None
            where nothing says.
        names: of the model's state, in the model's order.
        why: nothing is known, as a part of a sentence.
    """

    config: Any = None
    shapes: list[dict[str, tuple[int, ...]]] | None = None
    names: tuple[str, ...] = ()
    why: str = ""

    @property
    def shape_of(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by name, empty where nothing says."""
        return {n: s for part in self.shapes or () for n, s in part.items()}


def model_record(folder: Path) -> ModelRecord:
    """Return what the model's file in a folder says; nothing where there is none, or none that is read."""
    for file in sorted(folder.glob("*_model_states.pt"))[:1]:
        try:
            content = load_inert(file)
        except ToyError as error:  # what others put beside the weights is no reason to refuse an optimiser's state
            return ModelRecord(why=f" ({error})")
        if not isinstance(content, dict):
            return ModelRecord(why=f" ({file.name} holds no dictionary)")
        shapes, module = content.get("param_shapes"), content.get("module")
        listed: list[Any] = shapes if isinstance(shapes, list) else [None]
        known = all(isinstance(part, dict) and all(isinstance(s, tuple) for s in part.values()) for part in listed)
        return ModelRecord(
            content.get("ds_config"),
            [{str(n): tuple(s) for n, s in part.items()} for part in listed] if known else None,
            tuple(map(str, module)) if isinstance(module, dict) else (),
        )
    return ModelRecord()


def check_optimizer(folder: Path, config: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an optimiser that a configuration says is no AdamW; say where it may be none.

    DeepSpeed up to 0.19.1 takes ``adam_w_mode`` out of the configuration that it saves.

    Args:
        folder: of the checkpoint.
        config: of DeepSpeed, as far as it is known.
        groups: the optimiser's.

    Raises:
        ToyError: it is another optimiser, or weight decay is a part of its gradient.
    """
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    kind = optimizer.get("type") if isinstance(optimizer, dict) else None
    name = str(kind).lower()
    if kind is not None and name not in ("adam", "adamw"):
        raise flag_error(OPTIMIZER, f"{folder} is of DeepSpeed's optimizer {str(kind)[:40]!r}; give a state of AdamW")
    if name == "adamw" or not any(g.get("weight_decay") for g in groups):
        return
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    mode = params.get("adam_w_mode") if isinstance(params, dict) else None
    if mode is False:
        raise flag_error(OPTIMIZER, f"{folder} is of Adam with adam_w_mode false: its weight decay is not AdamW's")
    if mode is None and (name == "adam" or not isinstance(config, dict)):
        note(f"{OPTIMIZER}: {folder} does not say whether its weight decay is AdamW's (adam_w_mode); taken as AdamW's")


def has_round_robin(config: Any) -> bool | None:
    """Whether a configuration of DeepSpeed's has ``round_robin_gradients``; None where it is not known."""
    if not isinstance(config, dict):
        return None
    zero = config.get("zero_optimization")
    return bool(zero.get("round_robin_gradients")) if isinstance(zero, dict) else False


def check_layout(folder: Path, config: Any, record: ModelRecord, places: Sequence[Sequence[str]], ranks: int) -> None:
    """Refuse shards of ZeRO 1 and 2 whose moments do not lie where their addresses say.

    With ``round_robin_gradients`` the flat buffer has the order of ``param_shapes``, every ``ranks``-th parameter after
    another; addresses were made in the model's order, until DeepSpeed mended that (``param_offsets`` of its
    utils/mixed_precision_linkage.py). Where both orders are known and alike, nothing is wrong.

    Args:
        folder: of the checkpoint.
        config: of DeepSpeed, as far as it is known.
        record: of the model's file.
        places: names of each group's parameters, by address.
        ranks: that wrote it.

    Raises:
        ToyError: the orders differ, or they must be expected to.
    """
    if ranks == 1:
        return
    if record.shapes is not None and len(record.shapes) == len(places):
        for listed, placed in zip(record.shapes, places, strict=True):
            held = set(placed)
            if absent := held - set(listed):
                other = join_limited(sorted(absent))
                raise flag_error(OPTIMIZER, f"{folder}: param_shapes of the model's file do not have {other}")
            if [n for n in listed if n in held] != list(placed):
                raise flag_error(OPTIMIZER, f"{folder} {ROUND_ROBIN}")
        return
    say_layout(folder, has_round_robin(config))


def check_universal_layout(folder: Path, record: ModelRecord, top: Mapping[str, Any]) -> None:
    """Refuse a universal checkpoint that was made of shards as :func:`check_layout` refuses them.

    It has no addresses any more. Where the configuration does not say, an order of the parameters that is the model's
    own does.

    Args:
        folder: of the checkpoint.
        record: of the model's file.
        top: what zero/optimizer_state.pt holds, of ZeRO 1 or 2.

    Raises:
        ToyError: it was trained with ``round_robin_gradients`` by several ranks.
    """
    counts = top.get("partition_count")
    ranks = max(counts, default=1) if isinstance(counts, list | tuple) else counts
    if ranks == 1:
        return
    found = has_round_robin(record.config)
    place = {n: i for i, n in enumerate(record.names)}
    if found is None and record.shapes and all(n in place for part in record.shapes for n in part):
        orders = [[place[n] for n in part] for part in record.shapes]
        found = False if all(order == sorted(order) for order in orders) else None
    say_layout(folder, found)


def say_layout(folder: Path, round_robin: bool | None) -> None:
    """Refuse ``round_robin_gradients``, and say where it is not known whether a training had it.

    Raises:
        ToyError: it had.
    """
    if round_robin:
        raise flag_error(OPTIMIZER, f"{folder} {ROUND_ROBIN}")
    if round_robin is None:
        note(
            f"{OPTIMIZER}: {folder} does not say whether it was trained with round_robin_gradients, whose moments are "
            "read wrongly; taken as trained without"
        )
