"""What DeepSpeed's checkpoints say of themselves, and what of it makes them another optimiser's, or wrong."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

for needed in ("peft", "transformers"):
    pytest.importorskip(needed)
import torch.distributed.checkpoint as dcp  # noqa: E402

from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.adamw import AdamWState, read_state  # noqa: E402
from lightning_toys.update_entropy.dcp_files import (  # noqa: E402
    METADATA,
    check_archive,
    check_tensors,
    nested,
    split_path,
)
from lightning_toys.update_entropy.deepspeed_files import group_names, number, universal_folder  # noqa: E402
from lightning_toys.update_entropy.deepspeed_record import ModelRecord  # noqa: E402
from lightning_toys.update_entropy.optimizer_files import load_optimizer_state, moment_shaper  # noqa: E402
from tests.update_entropy.test_optimizer_files import a_model, adapted, refused_state, same, steps, trained  # noqa: E402
from tests.update_entropy.test_sharded_states import (  # noqa: E402, F401
    MOMENTS,
    deepspeed,
    pytestmark,
    stepped,
    write_universal,
    write_zero,
    zero_content,
)

WORLD_SIZE = 2
ADAMW = {"type": "AdamW", "params": {}}


def zero_config(round_robin: bool, **more: Any) -> dict[str, Any]:
    return {"optimizer": ADAMW, "zero_optimization": {"stage": 2, "round_robin_gradients": round_robin}, **more}


def three_and_one() -> tuple[Any, torch.optim.AdamW, AdamWState]:
    """A model, its AdamW with a group of three parameters, which may lie in another order, and the true state."""
    model = adapted(a_model(), rank=3)
    p = trained(model)
    optimizer = torch.optim.AdamW([{"params": p[:3], "weight_decay": 0.1}, {"params": p[3:]}], lr=1e-3)
    steps(model, optimizer)
    return model, optimizer, read_state(optimizer, model.named_parameters())


def in_turn(params: list[Any]) -> list[Any]:
    """DeepSpeed's ``_round_robin_reorder``."""
    return [p for j in range(WORLD_SIZE) for p in params[j::WORLD_SIZE]]


def write_round_robin(folder: Path, model: Any, optimizer: Any, save: Any, config: Any, mended: bool) -> None:
    """Shards whose flat buffers are in turn: their addresses are too since DeepSpeed mended it, and were not before."""
    groups = [{**g, "params": in_turn(g["params"])} for g in optimizer.param_groups]
    assert any(
        p is not q
        for a, b in zip(groups, optimizer.param_groups, strict=True)
        for p, q in zip(a["params"], b["params"], strict=True)
    )
    turned: Any = SimpleNamespace(param_groups=groups, state=optimizer.state)
    for rank in range(WORLD_SIZE):
        content = zero_content(model, turned, WORLD_SIZE, rank, save)
        if not mended:
            plain = zero_content(model, optimizer, WORLD_SIZE, rank, save)
            content["param_slice_mappings"] = plain["param_slice_mappings"]
        whole = {"optimizer_state_dict": content, "ds_config": config}
        save(whole, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def write_model(folder: Path, model: Any, groups: list[list[Any]], config: Any, save: Any) -> None:
    names = {id(p): n for n, p in model.named_parameters()}
    shapes = [OrderedDict((names[id(p)], p.shape) for p in params) for params in groups]
    module = {n: torch.zeros(1) for n in names.values()}
    content = {"module": module, "param_shapes": shapes, "ds_config": config}
    save(content, folder / "mp_rank_00_model_states.pt")


def test_round_robin_gradients_are_refused_where_addresses_do_not_follow_the_buffer(
    tmp_path: Path,
    deepspeed: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, optimizer, live = three_and_one()
    plain = [g["params"] for g in optimizer.param_groups]
    turned = [in_turn(params) for params in plain]

    def shards(config: Any, mended: bool, listed: list[list[Any]] | None) -> Path:
        folder = tmp_path / "c"
        shutil.rmtree(folder, ignore_errors=True)
        write_round_robin(folder, model, optimizer, deepspeed, config, mended)
        if listed is not None:
            write_model(folder, model, listed, config, deepspeed)
        return folder

    for config, listed in ((zero_config(True), None), (zero_config(True), turned), ("ds.json", turned)):
        refused_state(shards(config, False, listed), model, "was trained with round_robin_gradients")
    same(load_optimizer_state(shards(zero_config(True), True, turned), model), live)
    assert "trained with round_robin" not in capsys.readouterr().err
    same(load_optimizer_state(shards("ds.json", True, None), model), live)
    assert "does not say whether it was trained with round_robin_gradients" in capsys.readouterr().err
    alone = tmp_path / "alone"
    write_zero(alone, model, optimizer, 1, deepspeed)  # one rank: the orders are the same
    file = next(alone.iterdir())
    content = zero_content(model, optimizer, 1, 0, deepspeed)
    deepspeed({"optimizer_state_dict": content, "ds_config": zero_config(True)}, file)
    same(load_optimizer_state(alone, model), live)


def test_round_robin_gradients_in_a_universal_checkpoint(
    tmp_path: Path,
    deepspeed: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, optimizer, live = three_and_one()
    plain = [g["params"] for g in optimizer.param_groups]

    def universal(config: Any, stage: int, listed: list[list[Any]]) -> Path:
        folder = tmp_path / "u"
        shutil.rmtree(folder, ignore_errors=True)
        write_universal(folder, model, optimizer, deepspeed, stage)
        write_model(folder, model, listed, config, deepspeed)
        return folder

    refused_state(universal(zero_config(True), 2, plain), model, "was trained with round_robin_gradients")
    same(load_optimizer_state(universal(zero_config(True), 3, plain), model), live)  # means nothing in ZeRO 3
    same(load_optimizer_state(universal(zero_config(False), 2, plain), model), live)
    same(load_optimizer_state(universal("ds.json", 2, plain), model), live)
    assert "trained with round_robin" not in capsys.readouterr().err
    same(load_optimizer_state(universal("ds.json", 2, [in_turn(p) for p in plain]), model), live)
    assert "does not say whether it was trained with round_robin_gradients" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["shards", "universal"])
def test_the_configuration_says_which_optimiser_it_is(
    form: str,
    tmp_path: Path,
    deepspeed: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, optimizer, live = stepped(rank=3)
    plain = [g["params"] for g in optimizer.param_groups]

    def written(optimizer_config: Any) -> Path:
        folder = tmp_path / "c"
        shutil.rmtree(folder, ignore_errors=True)
        config = {**zero_config(False), "optimizer": optimizer_config}
        if form == "universal":
            write_universal(folder, model, optimizer, deepspeed)
            write_model(folder, model, plain, config, deepspeed)
            return folder
        for rank in range(WORLD_SIZE):
            whole = {
                "optimizer_state_dict": zero_content(model, optimizer, WORLD_SIZE, rank, deepspeed),
                "ds_config": config,
            }  # fmt: skip
            deepspeed(whole, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        return folder

    coupled = {"type": "Adam", "params": {"adam_w_mode": False}}
    refused_state(written(coupled), model, "is of Adam with adam_w_mode false")
    refused_state(written({"type": "Lamb"}), model, "DeepSpeed's optimizer 'Lamb'; give a state of AdamW")
    for told in (ADAMW, None, {"type": "Adam", "params": {"adam_w_mode": True}}):
        same(load_optimizer_state(written(told), model), live)
    assert "adam_w_mode" not in capsys.readouterr().err
    same(load_optimizer_state(written({"type": "Adam", "params": {"lr": 1e-3}}), model), live)
    assert "does not say whether its weight decay is AdamW's (adam_w_mode)" in capsys.readouterr().err


def test_a_moment_of_another_shape_is_not_put_into_its_parameters(tmp_path: Path, deepspeed: Any) -> None:  # noqa: F811
    own = torch.arange(6.0).reshape(2, 3)
    fit = moment_shaper({"a.weight": own})
    assert torch.equal(fit("a.weight", own.flatten()), own)
    assert fit("a.weight", own.T).shape == (3, 2)
    model, optimizer, _ = stepped(rank=3)
    one = optimizer.param_groups[0]["params"][0]
    name = next(n for n, p in model.named_parameters() if p is one)
    assert one.shape[0] != one.shape[1]
    for stage in (2, 3):
        folder = tmp_path / f"u{stage}"
        write_universal(folder, model, optimizer, deepspeed, stage)
        if stage == 2:
            deepspeed({"param": optimizer.state[one]["exp_avg"].T}, folder / "zero" / name / "exp_avg.pt")
            refused_state(folder, model, f"for {name} where", "is wanted")
            continue
        names = {id(p): n for n, p in model.named_parameters()}
        shapes = [
            {names[id(p)]: p.T.shape if p is one else p.shape for p in g["params"]} for g in optimizer.param_groups
        ]
        deepspeed({"param_shapes": shapes, "ds_config": zero_config(False)}, folder / "mp_rank_00_model_states.pt")
        refused_state(folder, model, f"for {name} where", "is wanted")
    folder = tmp_path / "shards"
    write_zero(folder, model, optimizer, WORLD_SIZE, deepspeed)
    deepspeed({"param_shapes": shapes, "ds_config": zero_config(False)}, folder / "mp_rank_00_model_states.pt")
    refused_state(folder, model, f"for {name} where", "is wanted")
    shapes[0][name] = torch.Size((1, 1))
    deepspeed({"param_shapes": shapes, "ds_config": zero_config(False)}, folder / "mp_rank_00_model_states.pt")
    refused_state(folder, model, f"values of {name}, of shape (1, 1) by the model's file")


def test_state_that_adamw_does_not_keep_is_refused(tmp_path: Path, deepspeed: Any) -> None:  # noqa: F811
    model, optimizer, _ = stepped(rank=3)
    folder = tmp_path / "shards"

    def changed(change: Any, ranks: range = range(WORLD_SIZE)) -> None:
        for rank in ranks:
            content = zero_content(model, optimizer, WORLD_SIZE, rank, deepspeed)
            change(content)
            file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            deepspeed({"optimizer_state_dict": content, "ds_config": zero_config(False)}, file)

    changed(lambda c: c["base_optimizer_state"]["state"][1].update(worker_error=torch.zeros(3)))
    refused_state(folder, model, "has worker_error, which AdamW does not keep")
    changed(lambda c: c["base_optimizer_state"]["param_groups"][0].update(max_coeff=10.0, min_coeff=0.01))
    refused_state(folder, model, "is not AdamW's: it has max_coeff, min_coeff")
    changed(lambda c: None)

    def fewer(content: dict[str, Any]) -> None:
        content["param_slice_mappings"].pop()
        content["base_optimizer_state"]["param_groups"].pop()

    changed(fewer, range(1, 2))
    refused_state(folder, model, "its ranks have 1 to 2 groups")
    changed(lambda c: c["base_optimizer_state"]["state"][0].update(step="three"))
    refused_state(folder, model, "holds a step that is no number, but of type str")
    changed(lambda c: c["param_slice_mappings"].__setitem__(0, dict.fromkeys(c["param_slice_mappings"][0], 3)))
    refused_state(folder, model, "is malformed: TypeError")
    changed(lambda c: c.update(partition_count=["two", 2]))
    refused_state(folder, model, "is malformed: TypeError")
    place = tmp_path / "u"
    write_universal(place, model, optimizer, deepspeed)
    name = next(p.name for p in (place / "zero").iterdir() if p.is_dir())
    deepspeed({"param": torch.zeros(2)}, place / "zero" / name / "momentum_buffer.pt")
    refused_state(place, model, "holds momentum_buffer.pt, which AdamW does not keep")


def test_a_universal_checkpoint_of_another_step_than_the_last_is_not_chosen(
    tmp_path: Path,
    deepspeed: Any,  # noqa: F811
) -> None:
    model, optimizer, live = stepped(rank=3)
    write_universal(tmp_path / "global_step1_universal", model, optimizer, deepspeed)
    write_zero(tmp_path / "global_step10", model, optimizer, WORLD_SIZE, deepspeed)
    (tmp_path / "latest_universal").write_text("global_step1_universal")
    for last in ("global_step10", "global_step2"):
        (tmp_path / "latest").write_text(last)
        refused_state(tmp_path, model, "global_step1_universal", f"another {last}; give one of both folders")
    (tmp_path / "latest").write_text("global_step1")
    assert universal_folder(tmp_path) == tmp_path / "global_step1_universal"
    same(load_optimizer_state(tmp_path / "global_step10", model), live)


def test_sub_groups_of_zero_3_are_counted_to_their_groups(tmp_path: Path, deepspeed: Any) -> None:  # noqa: F811
    model, optimizer, live = stepped(rank=3)
    folder = tmp_path / "u"
    write_universal(folder, model, optimizer, deepspeed, stage=3)
    top = {"param_groups": [], "optimizer_state_dict": {"state": {}}, "zero_stage": 3}
    names, shapes, count = {id(p): n for n, p in model.named_parameters()}, [], 0
    for group in optimizer.param_groups:
        parts = [part for part in (group["params"][:1], group["params"][1:]) if part]
        shapes += [OrderedDict((names[id(p)], p.shape) for p in part) for part in parts]
        numbers = list(range(count, count + len(parts)))
        count += len(parts)
        top["param_groups"].append({**group, "params": numbers})
        top["optimizer_state_dict"]["state"] |= {i: {"step": 3} for i in numbers}
    assert len(shapes) > len(optimizer.param_groups)
    deepspeed(top, folder / "zero" / "optimizer_state.pt")
    record = {"param_shapes": shapes, "ds_config": zero_config(False)}
    deepspeed(record, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (folder / "mp_rank_00_model_states.pt").unlink()
    same(load_optimizer_state(folder, model), live)
    groups, three = [{"lr": 1.0}, {"lr": 2.0}], [{"a": (1,)}, {"b": (1,)}, {"c": (1,)}]
    assert group_names(folder, groups, [2, 1], ["a", "b", "c"], ModelRecord(shapes=three)) == [["a", "b"], ["c"]]


def test_steps_of_a_universal_checkpoint(tmp_path: Path, deepspeed: Any) -> None:  # noqa: F811
    model, optimizer, live = stepped(rank=3)
    folder = tmp_path / "u"
    write_universal(folder, model, optimizer, deepspeed)
    name = next(iter(live.moments))
    frozen = folder / "zero" / "frozen.weight"
    deepspeed({"param": torch.zeros(3)}, frozen / "fp32.pt")  # DeepSpeed writes weights that are not trained too
    deepspeed(torch.tensor(3.0), folder / "zero" / name / "step.pt")
    same(load_optimizer_state(folder, model), live)
    deepspeed(4, folder / "zero" / name / "step.pt")
    refused_state(folder, model, "has steps 3 of ", f"4 of {name}; convert shards of one checkpoint")
    deepspeed([3], folder / "zero" / name / "step.pt")
    refused_state(folder, model, "holds a step that is no number, but of type list")
    with pytest.raises(ToyError, match="of type bool"):
        number(True, folder)


def test_numbered_states_with_an_empty_group_keep_their_numbers() -> None:
    values = {
        ("state", "0", "step"): 3,
        ("param_groups", "0", "params"): [0],
        ("param_groups", "1", "params"): [],
    }
    assert nested(values)["state"] == {0: {"step": 3}}
    assert nested({("state", "0", "step"): 3, ("param_groups", "0", "lr"): 1.0})["state"] == {"0": {"step": 3}}


def test_the_first_part_of_a_flat_key_is_the_optimisers() -> None:
    for name in ("a.state.b", "state.a", "model.param_groups.w"):
        assert split_path((f"optimizer.state.{name}.step",)) == (("optimizer",), (f"state.{name}.step",))
        assert split_path((f"state.{name}.step",)) == ((), (f"state.{name}.step",))


def test_what_says_more_values_than_its_files_hold_is_refused(tmp_path: Path, deepspeed: Any) -> None:  # noqa: F811
    model, optimizer, _ = stepped(rank=3)
    with pytest.raises(ValueError, match=r"shape \(1000000,\) in it has fewer"):
        check_tensors({"a": [torch.zeros(1).expand(10**6)]})
    with pytest.raises(ValueError, match="has fewer"):
        check_tensors([torch.zeros(3, device="meta")])
    check_tensors({"a": torch.zeros(4)[1:3]})
    folder = tmp_path / "shards"
    write_zero(folder, model, optimizer, 1, deepspeed)
    (file,) = folder.iterdir()
    content = zero_content(model, optimizer, 1, 0, deepspeed)
    key = content["param_slice_mappings"][0]
    first = next(iter(key))
    key.update({f"other{i}": key[first] for i in range(3000)})  # of the same values
    deepspeed({"optimizer_state_dict": content, "ds_config": zero_config(False)}, file)
    refused_state(folder, model, "says more values than its files hold")
    content = zero_content(model, optimizer, 1, 0, deepspeed)
    content["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(1).expand(10**9)
    deepspeed({"optimizer_state_dict": content, "ds_config": zero_config(False)}, file)
    refused_state(folder, model, "a tensor of shape (1000000000,) in it has fewer values than that")
    stored = tmp_path / "stored.pt"
    torch.save({"a": [0] * 10_000}, stored)
    check_archive(stored, stored.stat().st_size)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    refused_state(folder, model, "it is compressed, which torch's files are not")
    whole = tmp_path / "dcp"
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=whole, no_dist=True)
    metadata = pickle.loads((whole / METADATA).read_bytes())
    names = [k for k in metadata.state_dict_metadata if k.endswith("exp_avg")]
    kind = metadata.state_dict_metadata[names[0]]
    for i in range(3000):
        metadata.state_dict_metadata[f"optimizer.state.{i + 100}.exp_avg"] = kind
    (whole / METADATA).write_bytes(pickle.dumps(metadata))
    refused_state(whole, model, "says more values than its files hold")
