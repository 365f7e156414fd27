"""Responses end at every token that ends one: the tokenizer's, the configuration's, the generation configuration's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("peft", "transformers"):
    pytest.importorskip(needed)
from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.checkpoints import load_backbone  # noqa: E402
from lightning_toys.update_entropy.data import ArithmeticData  # noqa: E402
from lightning_toys.update_entropy.module import UpdateEntropy  # noqa: E402
from lightning_toys.update_entropy.rollouts import stop_tokens  # noqa: E402
from lightning_toys.update_entropy.training import Rollouts, sample_rollouts  # noqa: E402
from tests.update_entropy.test_checkpoints import a_model, adapted  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")


def a_chat_model(folder: Path) -> Any:
    """A backbone whose configuration names one end and whose generation configuration two others."""
    model = a_model("llama")
    model.config.eos_token_id, model.generation_config.eos_token_id = 9, [9, 11, 5]
    model.save_pretrained(folder)
    return load_backbone(folder, torch.float32)


def test_the_ends_are_those_of_all_three(tmp_path: Path) -> None:
    model = a_chat_model(tmp_path)
    assert stop_tokens(model) == [5, 9, 11]
    assert stop_tokens(model, 2) == [2, 5, 9, 11]
    assert stop_tokens(adapted(model), 2) == [2, 5, 9, 11]  # behind an adapter too
    assert stop_tokens(torch.nn.Linear(1, 1), 3) == [3]


@pytest.mark.parametrize(("given", "ends"), [(None, {2, 5, 9, 11}), ([7], {7})])
def test_sampling_goes_by_them(given: list[int] | None, ends: set[int], tmp_path: Path) -> None:
    """Each response has an end at its end and nowhere else; those without one are as long as they may be."""
    data, model = ArithmeticData(digits=1), a_chat_model(tmp_path)
    found = sample_rollouts(model, data, 0, 0, "x", range(40), 1, 1.0, 40, Rollouts(stop_tokens=given).stop_tokens)
    longest, last = max(found.lengths), set()
    for response in found.responses:
        assert not ends & set(response[:-1])
        assert response[-1] in ends or len(response) == longest
        last |= ends & {response[-1]}
    assert last == ends  # each of them did end one


def test_the_modules_ends(tmp_path: Path) -> None:
    a_chat_model(tmp_path)
    for given, ends in ((None, [5, 9, 11]), ([3], [3])):
        module = UpdateEntropy(backbone=str(tmp_path), rollouts=Rollouts(stop_tokens=given))
        module.sizes = module.measure(ArithmeticData())
        module.configure_model()
        (found,) = module.generate([[4]] * 30, 12)
        assert {r[-1] for r in found.responses if len(r) < 12} <= set(ends)
        assert not any(set(ends) & set(r[:-1]) for r in found.responses)
        assert module.rollouts.ends(module.policies[0], ArithmeticData().tokenizer) == (given or [2, 5, 9, 11])


@pytest.mark.parametrize("wrong", [2**63, 10**6, -1, [9, 2**70]])
def test_a_configurations_end_that_is_no_token_is_refused(wrong: Any, tmp_path: Path) -> None:
    """At once; ends of one's own take its place."""
    a_chat_model(tmp_path)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(content | {"eos_token_id": wrong}))
    for given in (None, [3]):
        module = UpdateEntropy(backbone=str(tmp_path), rollouts=Rollouts(stop_tokens=given))
        module.sizes = module.measure(ArithmeticData())
        if given is None:
            with pytest.raises(ToyError, match=r"ends texts with token .*; give --model.rollouts.stop_tokens$"):
                module.configure_model()
            continue
        module.configure_model()
        assert module.rollouts.ends(module.policies[0], ArithmeticData().tokenizer) == [3]


def test_ends_that_are_none_are_refused() -> None:
    for given, said in (([], r"\[\]"), (7, "7"), ([-1], "-1")):
        with pytest.raises(ToyError, match=f"^--model.rollouts.stop_tokens: {said} is not allowed"):
            Rollouts(stop_tokens=given)  # type: ignore[arg-type]
