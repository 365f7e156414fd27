"""Files of language models, adapters and optimisers that are cut, lie about their size, or bring code along."""

from __future__ import annotations

import pickle
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_toys.update_entropy.checkpoints import load_adapter, load_backbone, load_tokenizer
from lightning_toys.update_entropy.model_files import GGUFHeader
from tests.malformed import CORPUS, Refusal, Trap
from tests.malformed_models import (
    CODE,
    HUGE,
    Act,
    W,
    a_model,
    copied,
    edit,
    f32,
    header,
    index,
    models,
    refused,
    tensors,
    write,
)

__all__ = ["models"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")

BACKBONES: dict[str, Act] = {
    "config_empty": write("config.json", ""),
    "config_cut": write("config.json", "{"),
    "config_list": write("config.json", "[1]"),
    "config_nul": write("config.json", b"\0" * 64),
    "config_deep": write("config.json", "[" * 100_000),
    "architecture_unknown": edit("config.json", model_type="nowhere"),
    "architecture_none": edit("config.json", model_type=..., architectures=...),
    "architecture_number": edit("config.json", model_type=3),
    "hidden_huge": edit("config.json", hidden_size=HUGE),
    "hidden_negative": edit("config.json", hidden_size=-16),
    "hidden_word": edit("config.json", hidden_size="wide"),
    "hidden_zero": edit("config.json", hidden_size=0),
    "vocabulary_huge": edit("config.json", vocab_size=HUGE),
    "layers_huge": edit("config.json", num_hidden_layers=HUGE),
    "layers_negative": edit("config.json", num_hidden_layers=-1),
    "inner_huge": edit("config.json", intermediate_size=HUGE),
    "heads_huge": edit("config.json", num_attention_heads=HUGE),
    "heads_zero": edit("config.json", num_attention_heads=0),
    "head_huge": edit("config.json", head_dim=HUGE),
    "another_width": edit("config.json", hidden_size=32),
    "dtype_unknown": edit("config.json", dtype="float3", torch_dtype="float3"),
    "weights_empty": write(W, b""),
    "weights_rubbish": write(W, b"rubbish" * 9),
    "weights_header_huge": write(W, header(HUGE, b"{}")),
    "weights_header_greatest": write(W, header(2**64 - 1, b"{}")),
    "weights_header_no_json": write(W, header(8, b"{{{{{{{{")),
    "weights_none": write(W, tensors()),
    "weights_overlap": write(W, tensors(a=f32([4], 0, 16), b=f32([4], 8, 24))),
    "weights_beyond": write(W, tensors(a=f32([HUGE], 0, 4 * HUGE))),
    "weights_backwards": write(W, tensors(a=f32([4], 16, 0))),
    "weights_shape_lies": write(W, tensors(a=f32([4, HUGE], 0, 64))),
    "index_climbs": index("../../../../etc/passwd"),
    "index_absolute": index("/etc/passwd"),
    "index_missing": index("nowhere.safetensors"),
    "index_pickle": index("pytorch_model.bin"),
    "index_list": write("model.safetensors.index.json", '{"weight_map": [1]}'),
    "index_broken": write("model.safetensors.index.json", "{"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_that_is_none(name: str, models: Path, tmp_path: Path) -> None:
    folder = copied(models / "model", tmp_path / "m")
    BACKBONES[name](folder)
    refused(lambda: load_backbone(folder), "--model.backbone: ", str(folder))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_weights_that_are_cut(share: float, models: Path, tmp_path: Path) -> None:
    folder = copied(models / "model", tmp_path / "m")
    content = (folder / W).read_bytes()
    (folder / W).write_bytes(content[: int(share * len(content))])
    refused(lambda: load_backbone(folder), "--model.backbone: ", str(folder))


AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "own.Own")


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_model_is_not_run(known: bool, models: Path, tmp_path: Path) -> None:
    """``auto_map`` points at Python: passed over where transformers has a class, refused where it has none."""
    folder, canary = copied(models / "model", tmp_path / "m"), tmp_path / "canary"
    (folder / "own.py").write_text(CODE.format(canary=str(canary)))
    edit("config.json", auto_map=AUTO, trust_remote_code=True, **({} if known else {"model_type": "own"}))(folder)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})(folder)
    if known:
        load_backbone(folder)
    else:
        refused(lambda: load_backbone(folder), "--model.backbone: ", str(folder))
    assert load_tokenizer(folder).vocab_size  # of the file that is no code
    assert not canary.exists()


def test_pickled_weights_are_not_read(models: Path, tmp_path: Path) -> None:
    folder, canary = copied(models / "model", tmp_path / "m"), tmp_path / "canary"
    torch.save({"x": Trap(canary)}, folder / "pytorch_model.bin")
    load_backbone(folder)  # safetensors are there too, and are what is taken
    (folder / W).unlink()
    refused(lambda: load_backbone(folder), "pickled", canary=canary)


TOKENIZERS: dict[str, Act] = {
    "missing": lambda f: [p.unlink() for p in f.glob("tok*")].clear(),
    "empty": write("tokenizer.json", ""),
    "cut": write("tokenizer.json", "{"),
    "list": write("tokenizer.json", "[]"),
    "no_model": edit("tokenizer.json", model=...),
    # the Rust of tokenizers 0.23 panics, which is no Exception in Python
    "prefix_longer_than_a_merge": edit(
        "tokenizer.json",
        model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
        | {"continuing_subword_prefix": "######"},
    ),
    "class_unknown": edit("tokenizer_config.json", tokenizer_class="os.system"),
    "config_list": write("tokenizer_config.json", "[1]"),
    "config_cut": write("tokenizer_config.json", "{"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_none(name: str, models: Path, tmp_path: Path) -> None:
    folder = copied(models / "model", tmp_path / "m")
    TOKENIZERS[name](folder)
    if name == "class_unknown":  # tokenizer.json says all that is wanted
        assert load_tokenizer(folder).vocab_size
        return
    refused(lambda: load_tokenizer(folder), "--model.backbone: ", str(folder), "tokenizer")


# --- GGUF


def gguf_head(version: int = 3, count: int = 0, values: int = 0, rest: bytes = b"", magic: bytes = b"GGUF") -> bytes:
    return (magic + struct.pack("<IQQ", version, count, values) + rest).ljust(64, b"\0")


def word(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(dims: list[int], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    body = word(b"t") + struct.pack("<I", len(dims) if count is None else count)
    return body + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, offset)


GGUFS = {
    "empty": b"",
    "magic_alone": b"GGUF",
    "other_magic": gguf_head(magic=b"GGML"),
    "version": gguf_head(version=9),
    "tensors_absurd": gguf_head(count=2**63),
    "values_absurd": gguf_head(values=2**63),
    "key_absurd": gguf_head(values=1, rest=struct.pack("<Q", 2**62)),
    "string_absurd": gguf_head(values=1, rest=word(b"k") + struct.pack("<IQ", 8, 2**62)),
    "array_absurd": gguf_head(values=1, rest=word(b"k") + struct.pack("<IIQ", 9, 4, 2**62)),
    "array_of_strings_absurd": gguf_head(values=1, rest=word(b"k") + struct.pack("<IIQ", 9, 8, 2**62)),
    "array_of_arrays": gguf_head(values=1, rest=word(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000),
    "type_unknown": gguf_head(values=1, rest=word(b"k") + struct.pack("<IQ", 77, 0)),
    "dimensions_absurd": gguf_head(count=1, rest=tensor([1], count=2**31)),
    "dimension_absurd": gguf_head(count=1, rest=tensor([2**62, 2**62])),
    "product_wraps": gguf_head(count=1, rest=tensor([2**32, 2**32])),
    "offset_absurd": gguf_head(count=1, rest=tensor([4], offset=2**62)),
    "quantisation_unknown": gguf_head(count=1, rest=tensor([4], kind=999)),
    "alignment_none": gguf_head(values=1, rest=word(b"general.alignment") + struct.pack("<II", 4, 0)),
    "alignment_odd": gguf_head(values=1, rest=word(b"general.alignment") + struct.pack("<II", 4, 3)),
    "alignment_absurd": gguf_head(values=1, rest=word(b"general.alignment") + struct.pack("<II", 4, 2**31)),
    "alignment_text": gguf_head(values=1, rest=word(b"general.alignment") + struct.pack("<I", 8) + word(b"32")),
    "nothing_in_it": gguf_head(),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_file_that_is_none(name: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(GGUFS[name])
    for act in (load_backbone, load_tokenizer):
        refused(lambda act=act: act(file), "--model.backbone: ", "m.gguf")  # type: ignore[misc]


@CORPUS
@given(st.floats(0, 1, exclude_max=True))
def test_a_gguf_file_that_is_cut(models: Path, tmp_path: Path, share: float) -> None:
    content = (models / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[: int(share * len(content))])
    refused(lambda: load_backbone(tmp_path / "m.gguf"), "--model.backbone: ", "m.gguf")


@CORPUS
@given(st.integers(24, 1500), st.binary(min_size=1, max_size=8))
def test_a_gguf_header_that_is_overwritten(models: Path, tmp_path: Path, where: int, patch: bytes) -> None:
    """Some bytes may be any; none makes the walk through the header fail in another way, or hang."""
    content = (models / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:where] + patch + content[where + len(patch) :])
    with suppress(ValueError):
        GGUFHeader(tmp_path / "m.gguf")


# --- adapters


C, A = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: dict[str, Act] = {
    "no_config": lambda f: (f / C).unlink(),
    "no_weights": lambda f: (f / A).unlink(),
    "config_empty": write(C, ""),
    "config_cut": write(C, "{"),
    "config_list": write(C, "[1]"),
    "config_binary": write(C, b"\xff\xfe\0"),
    "method_unknown": edit(C, peft_type="MAGIC"),
    "method_none": edit(C, peft_type=None),
    "targets_match_nothing": edit(C, target_modules=["nowhere"]),
    "targets_number": edit(C, target_modules=3),
    "targets_none": edit(C, target_modules=[]),
    "targets_no_expression": edit(C, target_modules="(("),
    "more_targets": edit(C, target_modules=["q_proj", "v_proj", "o_proj"]),
    "rank_huge": edit(C, r=HUGE),
    "rank_large": edit(C, r=10**7),
    "rank_negative": edit(C, r=-4),
    "rank_word": edit(C, r="four"),
    "another_rank": edit(C, r=8),
    "rank_pattern_huge": edit(C, rank_pattern={"q_proj": HUGE}),
    "own_code": edit(C, megatron_config={"a": 1}, megatron_core="planted.core"),
    "weights_empty": write(A, b""),
    "weights_none": write(A, tensors()),
    "weights_rubbish": write(A, b"rubbish" * 9),
    "weights_header_huge": write(A, header(HUGE, b"{}")),
    "weights_elsewhere": write(A, tensors(**{"base_model.model.nowhere.lora_A.weight": f32([4], 0, 16)})),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_none(name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, canary = copied(models / "adapter", tmp_path / "a"), tmp_path / "canary"
    (tmp_path / "planted").mkdir()
    for module in ("__init__", "core"):
        (tmp_path / "planted" / f"{module}.py").write_text(CODE.format(canary=str(canary)))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    ADAPTERS[name](folder)
    refused(lambda: load_adapter(a_model("llama"), folder), "--model.adapter: ", str(folder), canary=canary)


# --- by the command line: the same lines, and nothing left behind


def test_the_command_line_says_the_same(refuse: Refusal, models: Path) -> None:
    backbone, adapter = copied(models / "model", refuse.folder / "m"), copied(models / "adapter", refuse.folder / "a")
    config = {"model": {"class_path": "UpdateEntropy", "init_args": {"backbone": str(backbone), "warm_steps": 0}}}
    config |= {"data": {"class_path": "WordProblemData"}, "trainer": {"max_steps": 1}}
    file = refuse.file(config)
    edit(C, r=HUGE)(adapter)
    refuse.fit(file, "--model.adapter: ", flags=("--model.adapter", str(adapter)))
    edit("config.json", vocab_size=HUGE)(backbone)
    refuse.fit(file, "--model.backbone: ", "vocab_size")
    (refuse.folder / "state.pt").write_bytes(pickle.dumps(Trap(refuse.canary)))
    state = ("--model.optimizer_state", str(refuse.folder / "state.pt"))
    refuse.fit(file, "--model.backbone: ", flags=state, verb="test")
