"""Optimiser states keyed by names, states of another step or of a whole model, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("peft", "transformers"):
    pytest.importorskip(needed)
from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.adamw import read_state  # noqa: E402
from lightning_toys.update_entropy.optimizer_files import check_same_step, load_optimizer_state  # noqa: E402
from lightning_toys.update_entropy.state_formats import recorded_step  # noqa: E402
from tests.update_entropy.test_optimizer_files import a_model, adapted, refused_state, same, steps, trained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")


def two_groups(model: Any) -> torch.optim.AdamW:
    p = trained(model)
    optimizer = torch.optim.AdamW([{"params": p[3:], "lr": 3e-3, "betas": (0.8, 0.95)}, {"params": p[:3]}], lr=1e-3)
    steps(model, optimizer)
    return optimizer


def by_names(model: Any, optimizer: torch.optim.Optimizer, prefix: str = "") -> dict[str, Any]:
    """The state as torch.distributed.checkpoint.state_dict.get_optimizer_state_dict has it."""
    names = {id(p): prefix + n for n, p in model.named_parameters()}
    order = [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
    found = optimizer.state_dict()
    groups = [{**g, "params": [order[i] for i in g["params"]]} for g in found["param_groups"]]
    return {"state": {order[i]: s for i, s in found["state"].items()}, "param_groups": groups}


def flattened(content: dict[str, Any]) -> dict[str, Any]:
    """The same as torchtitan has it: one key a value, settings for each parameter."""
    out = {f"state.{n}.{k}": v for n, s in content["state"].items() for k, v in s.items()}
    for group in content["param_groups"]:
        for name in group["params"]:
            out |= {f"param_groups.{name}.{k}": v for k, v in group.items() if k != "params"}
    return out


@pytest.mark.parametrize("prefix", ["", "_fsdp_wrapped_module.", "_orig_mod.module."])
@pytest.mark.parametrize("form", ["named", "optimizer", "optim", "flat"])
def test_states_keyed_by_names(form: str, prefix: str, tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"
    optimizer = two_groups(model)
    content = by_names(model, optimizer, prefix)
    shuffled = dict(sorted(content["state"].items(), key=lambda x: x[0][::-1]))  # names, not order, decide
    content["state"] = shuffled
    torch.save({"named": content, "flat": flattened(content)}.get(form, {form: content}), file)
    live = read_state(optimizer, model.named_parameters())
    same(load_optimizer_state(file, model), live)
    assert len({h.lr for h in live.hyperparameters.values()}) == 2


def test_the_form_of_torchs_own_function_is_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model, file = a_model(), tmp_path / "state.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer)
    live = read_state(optimizer, model.named_parameters())
    for flat in (False, True):
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
        found = get_optimizer_state_dict(model, optimizer, options=options)
        assert all(str(k).startswith("state.") or k.startswith("param_groups.") for k in found) == flat
        torch.save(found, file)
        same(load_optimizer_state(file, model), live)


def test_names_that_fit_nothing_are_refused_by_name(tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"
    content = by_names(model, two_groups(model))
    last = content["param_groups"][1]["params"][-1]
    content["state"][f"{last}.other"] = content["state"].pop(last)
    torch.save(content, file)
    refused_state(file, model, f"no state for {last}", f"number {last}.other is in no group")
    torch.save({"state.": torch.ones(1), "param_groups.x": 1}, file)
    refused_state(file, model, "holds no state of an optimiser")


def test_a_state_of_everything_says_how_to_probe_it(tmp_path: Path) -> None:
    full, file = a_model(), tmp_path / "state.pt"
    optimizer = torch.optim.AdamW(full.parameters())
    steps(full, optimizer)
    for content in (optimizer.state_dict(), by_names(full, optimizer), {"optimizer": optimizer.state_dict()}):
        torch.save(content, file)
        refused_state(file, adapted(a_model()), "give --model.policy.lora_rank 0 and no adapter")
        load_optimizer_state(file, full)
    adapter = adapted(a_model())
    torch.save(two_groups(adapter).state_dict(), file)
    for other in (adapted(a_model(), rank=2), a_model()):
        assert "lora_rank" not in refused_state(file, other)


def test_an_adapter_and_a_state_of_two_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(a_model())
    optimizer = two_groups(model)  # three steps
    state = read_state(optimizer, model.named_parameters())
    for step in (3, 5):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    first, second, bare = (tmp_path / name for name in ("checkpoint-3", "checkpoint-5", "elsewhere"))
    bare.mkdir()
    said = f"^--model.optimizer_state: {second}/optimizer.pt is of step 5, and --model.adapter {first} of step 3"
    with pytest.raises(ToyError, match=said):
        check_same_step(second / "optimizer.pt", state, first, "--model.adapter")
    with pytest.raises(ToyError, match=r"is of step 3, and --model.backbone"):
        check_same_step(first, state, second, "--model.backbone")
    for optimizer_file, weights in ((first, first), (second, second), (bare, bare), (first, bare), (bare, first)):
        check_same_step(optimizer_file / "optimizer.pt", state, weights, "--model.adapter")
    assert capsys.readouterr().err == ""
    check_same_step(bare / "optimizer.pt", state, second, "--model.adapter")  # the file has no step beside it
    assert "has taken 3 steps, and --model.adapter" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"global_step": "3"}', '{"global_step": true}', "[" * 9999])
def test_a_file_of_that_name_that_is_another(content: str, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(content)
    assert recorded_step(tmp_path) is None
    assert recorded_step(None) is recorded_step(tmp_path / "nowhere" / "x") is None
