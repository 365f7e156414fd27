"""Optimiser states in folders: torch.distributed.checkpoint's own, DeepSpeed's shards, and universal checkpoints.

DeepSpeed's files are written here as DeepSpeed 0.19 writes them (runtime/zero/stage_1_and_2.py,
checkpoint/ds_to_universal.py), its classes included, which are gone again when the files are read.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import make_dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

for needed in ("peft", "transformers"):
    pytest.importorskip(needed)
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.metadata import (  # noqa: E402
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # noqa: E402

from lightning_toys.update_entropy.adamw import AdamWState, read_state  # noqa: E402
from lightning_toys.update_entropy.dcp_files import METADATA  # noqa: E402
from lightning_toys.update_entropy.optimizer_files import load_optimizer_state  # noqa: E402
from tests.update_entropy.test_optimizer_files import a_model, adapted, refused_state, same, steps, trained  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning",
    "ignore:torch.distributed is disabled, unavailable or uninitialized.*:UserWarning",
)


def stepped(rank: int = 4) -> tuple[Any, torch.optim.AdamW, AdamWState]:
    """A model with an adapter, its AdamW with two different groups after three steps, and the true state."""
    model = adapted(a_model(), rank=rank)
    p = trained(model)
    optimizer = torch.optim.AdamW(
        [{"params": p[2:], "lr": 3e-3, "weight_decay": 0.1}, {"params": p[:2], "weight_decay": 0.0}], lr=1e-3
    )
    steps(model, optimizer)
    return model, optimizer, read_state(optimizer, model.named_parameters())


# --- torch.distributed.checkpoint


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("form", ["named", "flat", "numbered", "in an app", "sub-folder"])
def test_a_checkpoint_of_torch_distributed(form: str, tmp_path: Path) -> None:
    model, optimizer, live = stepped()
    weights, state = get_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    )
    if form == "numbered":
        groups = [{"params": trained(model), "lr": 2e-3}]  # in the model's order, or nothing says which is which
        optimizer = torch.optim.AdamW(groups)
        steps(model, optimizer)
        live, state = read_state(optimizer, model.named_parameters()), optimizer.state_dict()
    content = {"model": weights, "optimizer": state, "steps": 3}
    folder = tmp_path / "optimizer_0" if form == "sub-folder" else tmp_path
    dcp.save({"app": content} if form == "in an app" else content, checkpoint_id=folder, no_dist=True)
    assert (folder / METADATA).is_file()
    same(load_optimizer_state(tmp_path, model), live)
    refused_state(tmp_path, adapted(a_model(), rank=2), "is wanted")


class Sharded(Tensor):
    """A tensor that is saved in pieces of its last axis, as the shards of several ranks are."""

    whole: Tensor
    pieces: dict[torch.Size, Tensor]

    @classmethod
    def of(cls, whole: Tensor, missing: int) -> Sharded:
        self: Sharded = whole.as_subclass(cls)
        self.whole, self.pieces = whole, {}
        axis = whole.dim() - 1
        for k, piece in enumerate(whole.chunk(3, axis)):
            start = [0] * whole.dim()
            start[axis] = sum(p.shape[axis] for p in whole.chunk(3, axis)[:k])
            if k != missing:
                self.pieces[torch.Size(start)] = piece.contiguous()
        return self

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        out = []
        for k, (offset, piece) in enumerate(self.pieces.items()):
            chunk = ChunkStorageMetadata(offset, piece.shape)
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(piece), self.whole.shape)
            out.append(WriteItem(MetadataIndex(fqn, offset, k), WriteItemType.SHARD, tensor_data=data))
        return out

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def in_shards(state: dict[str, Any], missing: int = -1) -> dict[str, Any]:
    cut = {n: {k: Sharded.of(v, missing) if v.dim() else v for k, v in s.items()} for n, s in state["state"].items()}
    return {"state": cut, "param_groups": state["param_groups"]}


def test_shards_of_torch_distributed_are_put_together(tmp_path: Path) -> None:
    model, optimizer, live = stepped()
    _, state = get_state_dict(model, optimizer)
    dcp.save({"optimizer": in_shards(state)}, checkpoint_id=tmp_path / "whole", no_dist=True)
    same(load_optimizer_state(tmp_path / "whole", model), live)
    dcp.save({"optimizer": in_shards(state, missing=1)}, checkpoint_id=tmp_path / "gap", no_dist=True)
    refused_state(tmp_path / "gap", model, "exp_avg: its parts do not cover it; is a rank's file missing?")
    os.remove(tmp_path / "whole" / "__0_0.distcp")
    refused_state(tmp_path / "whole", model, "its file __0_0.distcp is not there")


class Hostile:
    """What a pickle with code in it holds; it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_nothing_of_a_checkpoint_of_torch_distributed_is_run(tmp_path: Path) -> None:
    model, optimizer, _ = stepped()
    _, state = get_state_dict(model, optimizer)
    trap, folder = tmp_path / "trap", tmp_path / "c"
    dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
    metadata = (folder / METADATA).read_bytes()
    content = pickle.loads(metadata)
    content.storage_meta = Hostile(trap)
    (folder / METADATA).write_bytes(pickle.dumps(content))
    load_optimizer_state(folder, model)  # what the trap stood for is not needed
    content.storage_data = Hostile(trap)
    (folder / METADATA).write_bytes(pickle.dumps(content))
    refused_state(folder, model, ".metadata is none of torch.distributed.checkpoint's")
    for raw in (
        b"",
        b"no pickle",
        metadata[:200],
        pickle.dumps([1]),
        b"\x80\x04]r\xff\xff\xff\xff.",
        b"\x80\x04\x82\x01.",
    ):
        (folder / METADATA).write_bytes(raw)
        refused_state(folder, model, ".metadata is none of torch.distributed.checkpoint's")
    assert not trap.exists()
    shutil.rmtree(folder)
    state["param_groups"][0]["extra"] = Hostile(trap)
    dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
    refused_state(folder, model, "param_groups.0.extra cannot be read: it holds a pickled", "mkdir")
    assert not trap.exists()
    shutil.rmtree(folder)
    dcp.save({"model": {"state": torch.ones(3)}}, checkpoint_id=folder, no_dist=True)
    refused_state(folder, model, "holds no state of an optimiser; save one with")
    both = {"optimizer": optimizer.state_dict(), "critic": optimizer.state_dict()}
    dcp.save(both, checkpoint_id=tmp_path / "both", no_dist=True)
    refused_state(tmp_path / "both", model, "several optimisers' states: optimizer; critic")


# --- DeepSpeed

ALIGNMENT = 2  # nccl_start_alignment_factor


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Path], None]:
    """Saves what has DeepSpeed's classes in it, which exist for that time alone."""
    places = {
        "deepspeed.utils.tensor_fragment": make_dataclass("fragment_address", ["numel", "start"]),
        "deepspeed.runtime.fp16.loss_scaler": type("LossScaler", (), {}),
        "deepspeed.runtime.zero.config": IntEnum(
            "ZeroStageEnum", {"optimizer_states": 1, "gradients": 2, "weights": 3}
        ),
    }
    modules = {}
    for name, made in places.items():
        made.__module__ = name
        modules[name] = types.ModuleType(name)
        setattr(modules[name], made.__name__, made)
    parents = ("deepspeed", "deepspeed.utils", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.zero")
    modules |= {name: types.ModuleType(name) for name in parents}

    def save(content: Any, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            torch.save(content, file)
        assert "deepspeed" not in sys.modules

    save.address, save.scaler, save.stage = places.values()  # type: ignore[attr-defined]
    return save


def flat(tensors: list[Tensor], world_size: int) -> Tensor:
    """Parameters end to end, padded, as ``flatten_dense_tensors_aligned`` has them."""
    whole = torch.cat([t.detach().flatten() for t in tensors])
    return torch.cat([whole, torch.zeros(-len(whole) % (ALIGNMENT * world_size))])


def zero_content(model: Any, optimizer: torch.optim.AdamW, world_size: int, rank: int, save: Any) -> dict[str, Any]:
    """What ``DeepSpeedZeroOptimizer.state_dict`` returns on a rank, of the moments of an optimiser of torch's."""
    names = {id(p): n for n, p in model.named_parameters()}
    state, groups, fp32, paddings, maps = {}, [], [], [], []
    for i, group in enumerate(optimizer.param_groups):
        params = group["params"]
        numel = sum(p.numel() for p in params)
        size = len(flat(params, world_size)) // world_size
        begin, end = rank * size, (rank + 1) * size
        parts = {k: flat([optimizer.state[p][k] for p in params], world_size)[begin:end].clone() for k in MOMENTS}
        state[i] = {"step": int(optimizer.state[params[0]]["step"]), **parts}
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": [i], "step": 0})
        paddings.append(min(size, max(0, end - numel)))
        fp32.append(flat(params, world_size)[begin:end][: size - paddings[-1]].clone())
        addresses, offset = OrderedDict(), 0
        for p in params:
            low, high = max(offset, begin), min(offset + p.numel(), end)
            if low < high:
                addresses[names[id(p)]] = save.address(start=low - begin, numel=high - low)
            offset += p.numel()
        maps.append(addresses)
    return {
        "loss_scaler": save.scaler(), "dynamic_loss_scale": False, "overflow": False, "clip_grad": 1.0,
        "base_optimizer_state": {"state": state, "param_groups": groups},
        "single_partition_of_fp32_groups": fp32, "zero_stage": save.stage(2), "group_paddings": paddings,
        "partition_count": [world_size] * len(groups), "ds_version": "0.19.6", "param_slice_mappings": maps,
    }  # fmt: skip


MOMENTS = ("exp_avg", "exp_avg_sq")


def write_zero(
    folder: Path, model: Any, optimizer: torch.optim.AdamW, world_size: int, save: Any
) -> list[dict[str, Any]]:
    contents = [zero_content(model, optimizer, world_size, rank, save) for rank in range(world_size)]
    for rank, content in enumerate(contents):
        whole = {
            "optimizer_state_dict": content,
            "ds_config": {"zero_optimization": {"stage": 2}},
            "ds_version": "0.19.6",
        }
        save(whole, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return contents


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_of_zero(world_size: int, tmp_path: Path, deepspeed: Any) -> None:
    model, optimizer, live = stepped(rank=3)
    contents = write_zero(tmp_path / "global_step3", model, optimizer, world_size, deepspeed)
    if world_size == 7:  # there is padding, some parameters are cut, and some ranks have several
        assert any(c["group_paddings"][0] > 0 for c in contents)
        assert any(len(m) > 1 for c in contents for m in c["param_slice_mappings"])
    if world_size > 1:
        held = [n for c in contents for m in c["param_slice_mappings"] for n in m]
        assert len(held) > len(set(held))
    (tmp_path / "latest").write_text("global_step3\n")
    same(load_optimizer_state(tmp_path / "global_step3", model), live)
    same(load_optimizer_state(tmp_path, model), live)  # as transformers' Trainer leaves it
    refused_state(tmp_path, adapted(a_model(), rank=2), "is wanted")


def test_shards_of_zero_that_do_not_fit(tmp_path: Path, deepspeed: Any) -> None:
    model, optimizer, _ = stepped(rank=3)
    folder = tmp_path / "c"

    def shard(rank: int) -> Path:
        return folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    def changed(change: Callable[[dict[str, Any]], Any], rank: int = 0) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        contents = write_zero(folder, model, optimizer, 3, deepspeed)
        change(contents[rank])
        deepspeed({"optimizer_state_dict": contents[rank], "ds_config": {}}, shard(rank))

    changed(lambda c: None)
    shard(1).rename(tmp_path / "x")
    refused_state(folder, model, "has 2 ranks' files, and none of rank 1")
    shard(2).rename(shard(1))
    refused_state(folder, model, "has files of 2 ranks, where 3 wrote it")
    (tmp_path / "x").rename(shard(2))
    refused_state(folder, model, "does not follow that of the rank before; have files changed places?")
    first = next(iter(zero_content(model, optimizer, 3, 0, deepspeed)["param_slice_mappings"][0]))
    changed(lambda c: vars(c["param_slice_mappings"][0][first]).update(start=-1))
    refused_state(folder, model, f"rank 0's fragment of {first} is ", " from -1 on")
    changed(lambda c: vars(c["param_slice_mappings"][0][first]).update(numel=10**6))
    refused_state(folder, model, f"rank 0's fragment of {first} is 1000000 from 0 on")
    changed(lambda c: c["base_optimizer_state"]["state"][0].update(step=9), rank=1)
    refused_state(folder, model, "its ranks are of steps [3.0, 9.0]; give shards of one checkpoint")
    changed(lambda c: c["base_optimizer_state"]["state"][0].pop("exp_avg"))
    refused_state(folder, model, "has no exp_avg")
    changed(lambda c: c.pop("param_slice_mappings"))
    refused_state(folder, model, "has no param_slice_mappings")
    changed(lambda c: c.update(base_optimizer_state=[{}, {}]))
    refused_state(folder, model, "is elastic", "elastic_checkpoint false")
    changed(lambda c: c.update(fp32_flat_groups=[]))
    recipe = (
        f"python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder {folder}_universal"
    )
    refused_state(folder, model, "is one of ZeRO 3", recipe)
    changed(lambda c: None)
    shard(1).rename(folder / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt")
    refused_state(folder, model, "tensor or pipeline parallelism", recipe)
    changed(lambda c: c.update(extra=Hostile(tmp_path / "trap")))
    refused_state(folder, model, "it holds a pickled".removeprefix("it "), "mkdir, which could run code")
    assert not (tmp_path / "trap").exists()
    changed(lambda c: None)
    deepspeed(
        {
            "optimizer_state_dict": zero_content(model, optimizer, 3, 0, deepspeed),
            "ds_config": {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        },
        shard(0),
    )
    refused_state(folder, model, "Adam with adam_w_mode false")
    shard(0).write_bytes(b"PK no zip")
    refused_state(folder, model, "cannot be read")


def write_universal(folder: Path, model: Any, optimizer: torch.optim.AdamW, save: Any, stage: int = 2) -> None:
    """What ``ds_to_universal`` writes: of ZeRO 1 and 2 with shapes and steps, of ZeRO 3 flat and without steps."""
    names = {id(p): n for n, p in model.named_parameters()}
    content = zero_content(model, optimizer, 2, 0, save)
    base = content["base_optimizer_state"]
    kept = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")
    top = {k: v for k, v in content.items() if k not in kept} | {"param_groups": base["param_groups"]}
    if stage == 3:
        for group in base["param_groups"]:
            del group["step"]
        top["optimizer_state_dict"] = base
    save(top, folder / "zero" / "optimizer_state.pt")
    shapes = []
    for group in optimizer.param_groups:
        shapes.append(OrderedDict((names[id(p)], p.shape) for p in group["params"]))
        for p in group["params"]:
            place = folder / "zero" / names[id(p)]
            for key, value in {"fp32": p.detach(), **{k: optimizer.state[p][k] for k in MOMENTS}}.items():
                save({"param": value, "cat_dim": 0} if stage < 3 else value.flatten(), place / f"{key}.pt")
            if stage < 3:
                save(3, place / "step.pt")
    save({"module": {}, "param_shapes": shapes, "ds_version": "0.19.6"}, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint(stage: int, tmp_path: Path, deepspeed: Any) -> None:
    model, optimizer, live = stepped()
    assert len({h.weight_decay for h in live.hyperparameters.values()}) == 2
    folder = tmp_path / "global_step3_universal"
    write_universal(folder, model, optimizer, deepspeed, stage)
    same(load_optimizer_state(folder, model), live)
    (tmp_path / "latest_universal").write_text("global_step3_universal")
    same(load_optimizer_state(tmp_path, model), live)
    refused_state(tmp_path, adapted(a_model(), rank=2), "is wanted")
    (folder / "mp_rank_00_model_states.pt").rename(tmp_path / "moved")
    refused_state(folder, model, "has 2 groups with different settings, and no *_model_states.pt says which")
    (tmp_path / "moved").rename(folder / "mp_rank_00_model_states.pt")
    one = next(iter(live.moments))
    deepspeed([1], folder / "zero" / one / "exp_avg.pt")
    refused_state(folder, model, f"{one}/exp_avg.pt holds no tensor")
    os.remove(folder / "zero" / one / "exp_avg.pt")
    refused_state(folder, model, "exp_avg.pt is no ordinary file")
    shutil.rmtree(folder / "zero" / one)
    refused_state(folder, model, f"differ in {one}")


def test_a_folder_of_nothing_says_what_is_read(tmp_path: Path) -> None:
    model, optimizer, live = stepped()
    refused_state(tmp_path, model, "holds no optimiser's state; give a folder with optimizer.pt, optimizer.bin")
    (tmp_path / "latest").write_text("../elsewhere")
    refused_state(tmp_path, model, "holds no optimiser's state")
    _, state = get_state_dict(model, optimizer)
    torch.save(state, tmp_path / "optimizer.bin")  # transformers' Trainer with FSDP and FULL_STATE_DICT
    same(load_optimizer_state(tmp_path, model), live)
    assert math.isfinite(live.lr)
