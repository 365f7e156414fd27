"""Files of an optimiser's state, in each of three forms, that hold something else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys.update_entropy.optimizer_files import load_optimizer_state
from tests.malformed import Trap
from tests.malformed_models import a_model, adapted, models, refused

__all__ = ["models"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")


def optimiser(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], None]:
    def act(file: Path, content: dict[str, Any]) -> None:
        inner = content["optimizer_states"][0] if "optimizer_states" in content else content.get("optimizer", content)
        change(inner)
        torch.save(content, file)

    return act


NAN = torch.full((4, 16), torch.nan)
STATES: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "empty": lambda f, c: f.write_bytes(b""),
    "rubbish": lambda f, c: f.write_bytes(b"rubbish" * 99),
    "pickle": lambda f, c: f.write_bytes(pickle.dumps({"state": Trap(f.parent / "canary")})),
    "torch_pickle": lambda f, c: torch.save({"state": Trap(f.parent / "canary")}, f),
    "list": lambda f, c: torch.save([1], f),
    "number": lambda f, c: torch.save(3, f),
    "nothing": lambda f, c: torch.save({}, f),
    "cut": lambda f, c: (torch.save(c, f), f.write_bytes(f.read_bytes()[:-200])),
    "no_state": optimiser(lambda o: o.pop("state")),
    "no_groups": optimiser(lambda o: o.pop("param_groups")),
    "groups_empty": optimiser(lambda o: o.update(param_groups=[])),
    "groups_number": optimiser(lambda o: o.update(param_groups=3)),
    "state_list": optimiser(lambda o: o.update(state=[1])),
    "one_missing": optimiser(lambda o: o["state"].pop(1)),
    "one_more": optimiser(lambda o: o["state"].update({99: o["state"][0]})),
    "entry_number": optimiser(lambda o: o["state"].update({0: 3})),
    "no_step": optimiser(lambda o: o["state"][0].pop("step")),
    "step_nan": optimiser(lambda o: o["state"][0].update(step=torch.tensor(torch.nan))),
    "step_word": optimiser(lambda o: o["state"][0].update(step="many")),
    "step_infinite": optimiser(lambda o: o["state"][0].update(step=torch.tensor(torch.inf))),
    "step_list": optimiser(lambda o: o["state"][0].update(step=[1])),
    "shape": optimiser(lambda o: o["state"][0].update(exp_avg=torch.zeros(3))),
    "no_tensor": optimiser(lambda o: o["state"][0].update(exp_avg=[0.0])),
    "moments_nan": optimiser(lambda o: o["state"][0].update(exp_avg=NAN)),
    "negative": optimiser(lambda o: o["state"][0].update(exp_avg_sq=torch.full((4, 16), -1.0))),
    "complex": optimiser(lambda o: o["state"][0].update(exp_avg_sq=torch.zeros(4, 16, dtype=torch.complex64))),
    "no_lr": optimiser(lambda o: o["param_groups"][0].pop("lr")),
    "lr_word": optimiser(lambda o: o["param_groups"][0].update(lr="fast")),
    "lr_nan": optimiser(lambda o: o["param_groups"][0].update(lr=float("nan"))),
    "betas_one": optimiser(lambda o: o["param_groups"][0].update(betas=(0.9,))),
    "betas_large": optimiser(lambda o: o["param_groups"][0].update(betas=(2.0, 3.0))),
    "momentum": optimiser(lambda o: o["param_groups"][0].update(momentum=0.9)),
    "params_lists": optimiser(lambda o: o["param_groups"][0].update(params=[[0]])),
    "params_repeated": optimiser(lambda o: o["param_groups"][0].update(params=[0] * 4)),
}


@pytest.mark.parametrize("file", ["ours.pt", "plain.pt", "l.ckpt"])
@pytest.mark.parametrize("name", STATES)
def test_an_optimisers_file_that_is_none(name: str, file: str, models: Path, tmp_path: Path) -> None:
    path = tmp_path / file
    STATES[name](path, torch.load(models / file, weights_only=True))
    model = adapted(a_model("llama"))
    refused(lambda: load_optimizer_state(path, model), "--model.optimizer_state: ", file, canary=tmp_path / "canary")
