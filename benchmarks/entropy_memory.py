"""The entropy probe's memory: the estimate for models of several sizes, and the peak of a process beside it.

    python benchmarks/entropy_memory.py [--quick] [--write] [--update 16] [--evaluation 64] [--only NAME ...]

- estimate: gradients of U and E by what is trained, all kept (`--model.plan.keep_gradients true`) or none kept
  (`false`), as `test` estimates it before it samples anything. Activations and the model itself come on top.
- small models: a probe (slopes with errors, every sequence's and every token's influence, one step size) of a random
  decoder of all parameters in single precision, in a process of its own: the peak beyond what it had before (model,
  AdamW's state, imports), with gradients kept and with none kept.
- published shapes: the whole process's peak, with model, AdamW's state, imports and activations, of a probe that keeps
  no gradient, one sequence a pass, without counterfactuals, with curvature and each sequence's measured change. Random
  weights. What is held does not depend on the number of sequences, so that a few are enough (`--few`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from measuring import arguments, report
from torch import nn

from lightning_toys.update_entropy.adamw import AdamWState, Hyperparameters, Moments
from lightning_toys.update_entropy.derivatives import trainable_parameters
from lightning_toys.update_entropy.memory import memory_table, probe_bytes
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.policy import TinyPolicy, add_adapter
from lightning_toys.update_entropy.probe import probe
from lightning_toys.update_entropy.sequences import Sequences

MODELS = {  # trained parameters of published shapes
    "GPT-2, 124M, all parameters": 124_439_808,
    "Qwen2.5-0.5B, all parameters": 494_032_768,
    "Qwen2.5-1.5B, LoRA 16 at every linear layer": 18_464_768,
}
WIDTHS, QUICK = (256, 512), (128,)
LAYERS, VOCABULARY, LENGTH = 8, 256, 16
SHAPES: dict[str, dict[str, Any]] = {  # transformers' configurations of the published models
    "GPT-2, 124M": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 64},
    "Qwen2.5-0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 64,
    },
    "Qwen2.5-1.5B, LoRA 16": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 64,
    },
}  # fmt: skip
SHAPE_LENGTH = 28  # tokens of a response, after a prompt of four


def peak_bytes(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmHWM, the peak so far, or VmRSS, now."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def shaped(name: str) -> nn.Module:
    """Return a random model of a published shape; its weights are one block of numbers again and again: quick."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    settings = SHAPES[name] | {"attn_implementation": "eager"}
    with torch.device("meta"):
        model: Any = (
            GPT2LMHeadModel(GPT2Config(**settings))
            if "n_embd" in settings
            else Qwen2ForCausalLM(Qwen2Config(**settings))
        )
    rope = model.model.rotary_emb.__class__(model.config) if hasattr(model, "model") else None
    model = model.to_empty(device="cpu")
    if rope is not None:  # its frequencies are no parameter
        model.model.rotary_emb = rope
    model.tie_weights()
    block = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            flat = p.view(-1)
            for start in range(0, len(flat), len(block)):
                flat[start : start + len(block)] = block[: len(flat) - start]
            if p.dim() == 1:
                flat.add_(1)
        for n, b in model.named_buffers():
            if n.endswith("attn.bias"):
                b.copy_(torch.ones_like(b).tril())
    return add_adapter(model, 16, 16.0, 0.0) if "LoRA" in name else model


def measure(model: nn.Module, n_u: int, n_e: int, plan: Plan, vocabulary: int, length: int) -> tuple[int | float, ...]:
    """Return trained parameters; in bytes the estimate, the peak beyond what there was before, the peak; seconds."""
    theta = trainable_parameters(model)
    moments = {n: Moments(30, torch.full_like(p, 1e-4), torch.full_like(p, 1e-6)) for n, p in theta.items()}
    state = AdamWState(dict.fromkeys(theta, Hyperparameters()), moments)
    rng = np.random.default_rng(0)

    def some(n: int, group: int) -> Sequences:
        said, asked = (rng.integers(3, vocabulary, (n, k)).tolist() for k in (length, 4))
        return Sequences(asked, said, [i // group for i in range(n)], rng.random(n).tolist())

    before, begin = peak_bytes("VmRSS"), time.perf_counter()
    probe(model, some(n_u, max(1, n_u // 2)), [some(n_e, 1)], state, plan, 1.0)
    estimate = probe_bytes(model, plan, 1, n_u, n_e, plan.keep_gradients is not False)
    count = sum(p.numel() for p in theta.values())
    peak = peak_bytes("VmHWM")
    return count, estimate, peak - before, peak, time.perf_counter() - begin


def child(spec: str, n_u: int, n_e: int) -> tuple[int | float, ...]:
    """Return :func:`measure` of a small model (``256,True``: width, gradients kept) or of a published shape's name."""
    if spec in SHAPES:
        plan = Plan(etas=[1e-3], counterfactuals=False, tf_batch_size=1, grad_chunk_size=1, keep_gradients=False)
        return measure(shaped(spec), n_u, n_e, plan, SHAPES[spec]["vocab_size"], SHAPE_LENGTH)
    width, keep = spec.split(",")
    model = TinyPolicy(hidden=int(width), layers=LAYERS, heads=4, lora_rank=0).build(0, VOCABULARY, 64)
    plan = Plan(etas=[1e-3], per_sequence=False, counterfactuals=False, second_order=False, tf_batch_size=16,
                grad_chunk_size=4, keep_gradients=keep == "True")  # fmt: skip
    return measure(model, n_u, n_e, plan, VOCABULARY, LENGTH)


def measured(spec: str, n_u: int, n_e: int) -> list[str]:
    """Return what a child of its own prints, as texts."""
    words = [sys.executable, __file__, "--child", spec, "--update", str(n_u), "--evaluation", str(n_e)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-5:]


def shape_rows(names: list[str], n_u: int, n_e: int) -> Iterator[str]:
    """Yield the table of published shapes."""
    yield f"| measured, U of {n_u}, E of {n_e} | trained | estimate, GiB | the process's peak, GiB | seconds |"
    yield "|---|---:|---:|---:|---:|"
    for name in names:
        count, estimate, _, peak, seconds = measured(name, n_u, n_e)
        gib = [f"{int(x) / 2**30:.1f}" for x in (estimate, peak)]
        yield f"| {name} | {int(count):,} | {gib[0]} | {gib[1]} | {float(seconds):.0f} |"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--update", type=int, default=16, help="sequences of U, of the small models")
    parser.add_argument("--evaluation", type=int, default=64, help="sequences of E, of the small models")
    parser.add_argument("--few", type=int, nargs=2, default=(4, 4), metavar="N", help="of U and E, of published shapes")
    parser.add_argument("--only", nargs="*", default=list(SHAPES), help="published shapes to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        print(*child(options.child, options.update, options.evaluation))
        return
    n_u, n_e = (4, 8) if options.quick else (options.update, options.evaluation)
    plan = Plan(prompts=max(1, n_u // 4), group=4, eval_prompts=n_e, eval_group=1, counterfactuals=False)
    lines = [*memory_table(MODELS, plan), ""]
    lines += ["| measured: parameters | gradients | estimate, MiB | peak, MiB | seconds |", "|---:|---|---:|---:|---:|"]
    for width in QUICK if options.quick else WIDTHS:
        for keep in (True, False):
            count, estimate, beyond, _, seconds = measured(f"{width},{keep}", n_u, n_e)
            mib = [f"{int(x) / 2**20:.0f}" for x in (estimate, beyond)]
            way = "kept" if keep else "none kept"
            lines.append(f"| {int(count):,} | {way} | {mib[0]} | {mib[1]} | {float(seconds):.1f} |")
    if not options.quick and options.only:
        lines += ["", *shape_rows(options.only, *options.few)]
    about = (
        f"Small models: U of {n_u} sequences, E of {n_e}, {LENGTH} tokens each; published shapes: {SHAPE_LENGTH} "
        "tokens after 4, one sequence a pass. Single precision, one thread."
    )
    if threshold := os.environ.get("MALLOC_MMAP_THRESHOLD_"):  # glibc gives freed matrices back
        about += f" MALLOC_MMAP_THRESHOLD_={threshold}."
    report("entropy_memory.py", "update_entropy memory", about, lines, options.write)


if __name__ == "__main__":
    main()
