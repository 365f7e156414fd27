"""Language models out of files: what was saved is what is loaded, and what does not fit is refused in one line."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy import checkpoints
from lightning_toys.update_entropy.adamw import AdamWState, read_state
from lightning_toys.update_entropy.checkpoints import (
    check_temperature,
    load_adapter,
    load_backbone,
    load_optimizer_state,
    load_tokens,
    save_optimizer_state,
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


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for k in range(count):
        ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def same(found: AdamWState, live: AdamWState) -> None:
    """Assert that two states are one, bit by bit; and that no two parameters share moments, or order would not show."""
    assert found.hyper == live.hyper
    assert set(found.moments) == set(live.moments)
    for name, m in live.moments.items():
        f = found.moments[name]
        assert f.step == m.step > 0
        assert torch.equal(f.exp_avg, m.exp_avg)
        assert torch.equal(f.exp_avg_sq, m.exp_avg_sq)
        assert (f.max_exp_avg_sq is None) == (m.max_exp_avg_sq is None)
        if f.max_exp_avg_sq is not None and m.max_exp_avg_sq is not None:
            assert torch.equal(f.max_exp_avg_sq, m.max_exp_avg_sq)
    norms = [float(m.exp_avg.norm()) for m in live.moments.values()]
    assert len(set(norms)) == len(norms)
    assert all(n > 0 for n in norms)


def refused(act: Callable[[], object], flag: str, *parts: str) -> str:
    with pytest.raises(ToyError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"--model.{flag}: ")
    for part in parts:
        assert part in line
    return line


def refused_state(path: Path, model: nn.Module, *parts: str) -> str:
    return refused(lambda: load_optimizer_state(path, model), "optimizer_state", path.name, *parts)


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
    file: Path, model: Any, kind: str = "F32", leave: str = "", rope_divisor: float = 0, rope_law: str = ""
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
    if rope_law:
        w.add_rope_scaling_type(gguf.RopeScalingType(rope_law))
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
    refused(lambda: load_tokens(tmp_path), "backbone", "no tokenizer")
    a_tokenizer(tmp_path, eos_token=None)
    refused(lambda: load_tokens(tmp_path), "backbone", "eos_token")
    a_tokenizer(tmp_path)
    tokens = load_tokens(tmp_path)
    assert (tokens.end, tokens.size) == (2, VOCABULARY)
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
    tokens = load_tokens(tmp_path)
    assert (tokens.end, tokens.size) == (2, VOCABULARY)
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
    write_gguf(tmp_path / "a.gguf", model, rope_law="linear")
    refused(lambda: load_backbone(tmp_path), "backbone", "rotary")
    write_gguf(tmp_path / "a.gguf", model, rope_divisor=1, rope_law="none")
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
        refused(lambda: load_tokens(path), "backbone", path.name)

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


# --- optimiser states


@pytest.mark.parametrize("amsgrad", [False, True])
def test_our_own_file_round_trips(amsgrad: bool, tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"
    p = trained(model)
    optimizer = torch.optim.AdamW(
        [{"params": p[2:], "lr": 3e-3, "betas": (0.8, 0.95)}, {"params": p[:2]}], weight_decay=0.1, amsgrad=amsgrad
    )
    steps(model, optimizer)
    save_optimizer_state(optimizer, model, file)
    live = read_state(optimizer, model.named_parameters())
    same(load_optimizer_state(file, model), live)
    with pytest.raises(ToyError, match="is there already") as caught:
        save_optimizer_state(optimizer, model, file)
    assert "\n" not in str(caught.value)
    same(load_optimizer_state(file, model), live)
    content = torch.load(file, weights_only=True)  # names may come by group
    content["names"] = [content["names"][:2], content["names"][2:]]
    torch.save(content, file)
    same(load_optimizer_state(file, model), live)


def test_saving_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    for act in (
        lambda: save_optimizer_state(torch.optim.AdamW(net.parameters()), nn.Linear(2, 2), tmp_path / "a.pt"),
        lambda: save_optimizer_state(torch.optim.SGD(net.parameters(), 0.1), net, tmp_path / "a.pt"),
        lambda: save_optimizer_state(torch.optim.AdamW(net.parameters()), net, tmp_path / "no" / "a.pt"),
    ):
        with pytest.raises(ToyError) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "bare"])
def test_named_groups_of_torch_match_through_wrappers(wrapper: str, tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"

    def called(name: str) -> str:
        if wrapper == "bare":  # as an adapter's file has them
            return name.removeprefix("base_model.model.").replace(".default", "")
        return wrapper + name

    named = [(called(n), p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named[::-1], lr=1e-3)  # names, not order, decide
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), file)
    same(load_optimizer_state(file, model), read_state(optimizer, model.named_parameters()))


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCABULARY, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("lora", [False, True])
def test_the_file_of_transformers_trainer(lora: bool, tmp_path: Path) -> None:
    model = adapted(a_model()) if lora else a_model()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_steps=3, per_device_train_batch_size=2, weight_decay=0.1,
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts())
    trainer.train()
    live = read_state(trainer.optimizer.optimizer, model.named_parameters())
    assert {h.weight_decay for h in live.hyper.values()} == ({0.1} if lora else {0.0, 0.1})
    folder = tmp_path / "checkpoint-3"
    assert "param_names" not in torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"][0]
    same(load_optimizer_state(folder, model), live)
    same(load_optimizer_state(folder / "optimizer.pt", model), live)
    other = adapted(a_model(), rank=2) if lora else a_model(layers=2)
    refused_state(folder, other, "is wanted" if lora else "no state for model.layers.1")


def test_one_group_without_names_goes_by_order(tmp_path: Path) -> None:
    model, file = a_model(), tmp_path / "optimizer.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), file)
    live = read_state(optimizer, model.named_parameters())
    same(load_optimizer_state(file, model), live)
    torch.save({"optimizer": optimizer.state_dict()}, file)
    same(load_optimizer_state(file, model), live)
    content = optimizer.state_dict()
    second = content["state"].pop(1)
    torch.save(content, file)
    assert refused_state(file, model, "no state for model.layers.0.self_attn.q_proj.weight (16, 16)").count(";") == 0
    content["state"][0], content["state"][1] = second, content["state"][0]
    torch.save(content, file)
    refused_state(file, model, "shape (16, 16) for model.embed_tokens.weight where (32, 16) is wanted")


class Fitted(lightning.LightningModule):
    """A model under a name of its own, beside one that has the same parameters' names."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.policy = model
        self.kind = kind
        if kind == "critic":
            self.critic = nn.Linear(VOCABULARY, 1)

    def training_step(self, batch: dict[str, Tensor]) -> None:
        out = self.policy(**batch)
        loss = out.loss + (self.critic(out.logits).mean() if self.kind == "critic" else 0)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        if self.kind == "named":
            return torch.optim.AdamW([(n, p) for n, p in self.named_parameters() if p.requires_grad][::-1])
        if self.kind == "critic":
            return [torch.optim.AdamW(self.critic.parameters()), torch.optim.AdamW(self.policy.parameters(), lr=1e-4)]
        if self.kind == "groups":
            p = trained(self)
            return torch.optim.AdamW([{"params": p[:3], "lr": 1e-4}, {"params": p[3:]}])
        return torch.optim.AdamW(self.parameters())


# the loader reads eight short lines; worker processes would cost more than they bring
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "named", "critic", "groups"])
def test_a_lightning_checkpoint(kind: str, tmp_path: Path) -> None:
    model = a_model() if kind == "critic" else adapted(a_model())
    module = Fitted(model, kind).train()
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Texts(), batch_size=2))
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    live = read_state(trainer.optimizers[-1], module.named_parameters())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    live = AdamWState(*({n: part[f"policy.{n}"] for n in names} for part in (live.hyper, live.moments)))
    same(load_optimizer_state(file, model), live)
    refused_state(file, adapted(a_model(hidden=32)), "is wanted" if kind != "critic" else "optimiser 0")
    if kind == "critic":
        content = torch.load(file, weights_only=True)
        content["optimizer_states"].append(content["optimizer_states"][1])
        torch.save(content, file)
        refused_state(file, model, "optimiser 1; optimiser 2")


# --- optimiser states that are refused

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.default.weight" for x in "AB")


@pytest.fixture(scope="module")
def stepped() -> tuple[Any, dict[str, Any]]:
    model = adapted(a_model())
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    steps(model, optimizer)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names[:2] == [A, B]
    return model, {"optimizer": optimizer.state_dict(), "names": names}


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change_it(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change_it


def state(number: int, key: str, value: Any) -> Callable[[Any], None]:
    return put("optimizer", "state", number, key, value=value)


def group(key: str, value: Any) -> Callable[[Any], None]:
    return put("optimizer", "param_groups", 0, key, value=value)


def no_group(key: str) -> Callable[[Any], None]:
    return lambda content: content["optimizer"]["param_groups"][0].pop(key)


NAN = torch.full((4, 16), torch.nan)
WRONG: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "no state": (lambda c: c["optimizer"]["state"].pop(0), (f"no state for {A} (4, 16)",)),
    "no name": (put("names", 0, value="other"), (f"no state for {A}", "nothing takes the state of other (4, 16)")),
    "too few names": (lambda c: c["names"].pop(), ("3 names of 4 parameters",)),
    "a name twice": (put("names", 1, value=A), (f"no state for {B}", f"nothing takes the state of {A} (16, 4)")),
    "alike": (put("names", slice(0, 2), value=[f"module.{A}", f"_orig_mod.{A}"]), (f"no state for {A}",)),
    "loose": (put("optimizer", "state", 9, value={"step": 1}), ("number 9 is in no group",)),
    "shape": (state(0, "exp_avg", torch.zeros(4, 8)), (f"shape (4, 8) for {A} where (4, 16) is wanted",)),
    "shape of squares": (state(0, "exp_avg_sq", torch.zeros(8)), (f"shape (8,) for {A} where (4, 16)",)),
    "shape of maxima": (state(0, "max_exp_avg_sq", torch.zeros(3)), (f"shape (3,) for {A} where (4, 16)",)),
    "steps": (state(1, "step", torch.tensor(5.0)), (f"step 3 for {A}, 5 for {B}",)),
    "half a step": (state(0, "step", torch.tensor(2.5)), (f"step 2.5 for {A}",)),
    "nan steps": (state(0, "step", torch.tensor(torch.nan)), (f"step nan for {A}",)),
    "steps below 0": (lambda c: [s.update(step=-1) for s in c["optimizer"]["state"].values()], (f"step -1 for {A};",)),
    "a vector of steps": (state(0, "step", torch.ones(2)), (f"step of {A}",)),
    "nan": (state(0, "exp_avg", NAN), (f"exp_avg of {A} is not finite",)),
    "nan squares": (state(0, "exp_avg_sq", NAN), (f"exp_avg_sq of {A} is not finite",)),
    "squares below 0": (state(0, "exp_avg_sq", -torch.ones(4, 16)), (f"exp_avg_sq of {A} is below 0",)),
    "no squares": (lambda c: c["optimizer"]["state"][0].pop("exp_avg_sq"), (f"no exp_avg_sq for {A}",)),
    "no maximum": (group("amsgrad", True), (f"no max_exp_avg_sq for {A}",)),
    "more moments": (state(0, "exp_avg_slow", NAN), ("exp_avg_slow", "AdamW does not keep")),
    "momentum": (group("momentum", 0.9), ("group 0", "momentum")),
    "no betas": (no_group("betas"), ("it has no betas",)),
    "no eps": (no_group("eps"), ("it has no eps",)),
    "no amsgrad": (no_group("amsgrad"), ("it has no amsgrad",)),
    "betas": (group("betas", (0.9, 1.5)), ("betas (0.9, 1.5)",)),
    "lr": (group("lr", "fast"), ("no numbers",)),
    "Adam": (group("decoupled_weight_decay", False), ("as Adam's is",)),
    "no correction": (group("bias_correction", False), ("bias_correction is off",)),
    "format": (lambda c: c.pop("optimizer"), ("holds no state of an optimiser",)),
    "alike, and one the same": (
        put("names", 1, value=f"module.{A}"),
        (f"model: no state for {B} (16, 4); nothing takes the state of module.{A} (16, 4)",),
    ),
    "no list of names": (put("names", value=4), ("0 names of 4 parameters",)),
    "names that are none": (put("names", value=[["a"], 3]), ("2 names of 4 parameters",)),
    "no groups": (put("optimizer", "param_groups", value=[]), ("holds no state of an optimiser",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_states_that_do_not_fit(case: str, stepped: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    (model, content), file = stepped, tmp_path / "state.pt"
    torch.save(content, file)
    assert load_optimizer_state(file, model).moments.keys() == set(content["names"])
    content = copy.deepcopy(content)
    act, parts = WRONG[case]
    act(content)
    torch.save(content, file)
    refused_state(file, model, *parts)


def test_the_list_is_cut_short(tmp_path: Path) -> None:
    model, file = adapted(a_model(layers=3)), tmp_path / "state.pt"
    torch.save(torch.optim.AdamW(trained(model)).state_dict(), file)
    line = refused_state(file, model, "and 4 more")
    assert line.count("no state for") == 8


@pytest.mark.parametrize("kind", ["SGD", "Adam", "RAdam", "NAdam", "Adamax", "RMSprop"])
def test_other_optimisers_are_refused(kind: str, tmp_path: Path) -> None:
    model, file = adapted(a_model()), tmp_path / "state.pt"
    optimizer = getattr(torch.optim, kind)(trained(model), lr=1e-3, weight_decay=0.1)
    steps(model, optimizer)
    torch.save(optimizer.state_dict(), file)
    refused_state(file, model, "group 0 is not AdamW's")


def test_files_that_are_none(tmp_path: Path, stepped: tuple[Any, dict[str, Any]]) -> None:
    model, content = stepped
    file = tmp_path / "state.pt"
    refused_state(file, model, "is not there")
    refused_state(tmp_path, model, "optimizer.pt is not there")
    torch.save({**content, "when": datetime.timedelta(1)}, file)
    refused_state(file, model, "pickled datetime.timedelta")
    file.write_bytes(b"rubbish")
    refused_state(file, model, "cannot be read")
    torch.save(torch.zeros(3), file)
    refused_state(file, model, "holds no state of an optimiser")
    torch.save({"state_dict": model.state_dict(), "optimizer_states": []}, file)
    refused_state(file, model, "holds no state of an optimiser")
    torch.save(content, file)
    refused_state(file, a_model().requires_grad_(False), "trains nothing")


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
