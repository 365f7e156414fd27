"""A backbone, an adapter and an optimiser to spoil, and what spoils them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_toys.errors import ToyError

for needed in ("gguf", "peft", "transformers"):
    pytest.importorskip(needed)
from lightning_toys.update_entropy.optimizer_files import save_optimizer_state  # noqa: E402
from tests.update_entropy.test_checkpoints import a_model, a_tokenizer, adapted, write_gguf  # noqa: E402
from tests.update_entropy.test_optimizer_files import steps  # noqa: E402

HUGE, W = 2**40, "model.safetensors"
CODE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass Own: pass\n"
Act = Callable[[Path], None]


def refused(act: Callable[[], object], *parts: str, canary: Path | None = None) -> None:
    """Hold what loads a file to one line that names it, and not the memory that ran out."""
    with pytest.raises(ToyError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("--model."), line
    assert "emory" not in line, line
    for part in parts:
        assert part in line, (part, line)
    assert canary is None or not canary.exists()


def write_models(root: Path) -> tuple[nn.Module, torch.optim.AdamW]:
    """Write a backbone in both forms, with its tokens, an adapter and its optimiser's state; return the last two."""
    a_model("llama").save_pretrained(root / "model")
    a_tokenizer(root / "model")
    write_gguf(root / "m.gguf", a_model("llama"))
    model = adapted(a_model("llama"))
    model.save_pretrained(root / "adapter")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    steps(model, optimizer)
    save_optimizer_state(optimizer, model, root / "ours.pt")
    return model, optimizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :func:`write_models` writes, and the optimiser's state in two more forms."""
    root = tmp_path_factory.mktemp("models")
    model, optimizer = write_models(root)
    torch.save(optimizer.state_dict(), root / "plain.pt")
    keys = [n for n, p in model.named_parameters() if p.requires_grad]
    torch.save(
        {"state_dict": dict.fromkeys(keys, torch.zeros(1)), "optimizer_states": [optimizer.state_dict()]},
        root / "l.ckpt",
    )
    return root


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(name: str, **changes: Any) -> Act:
    """Return what changes keys of a JSON file; ``...`` takes one out."""

    def act(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return act


def write(name: str, content: bytes | str) -> Act:
    return lambda folder: void((folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()))


def void(_: object) -> None:
    return


def header(length: int, content: bytes) -> bytes:
    return struct.pack("<Q", length) + content


def tensors(**spec: Any) -> bytes:
    text = json.dumps(spec).encode()
    return header(len(text), text) + bytes(64)


def f32(shape: list[int], a: int, b: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [a, b]}


def index(target: str) -> Act:
    return write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": target}}))
