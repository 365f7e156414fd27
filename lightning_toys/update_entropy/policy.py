"""Language-model policies: tiny ones built from a configuration, and low-rank adapters (LoRA)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lightning_toys.errors import LARGEST, ToyError, bounded, check_settings, require
from lightning_toys.nets import DEEPEST
from lightning_toys.training.noise import keyed_generator


@dataclass
class TinyPolicy:
    """A small decoder with a LoRA adapter.

    Args:
        family: architecture, of transformers.
        hidden: width.
        layers: number of blocks.
        heads: attention heads.
        lora_rank: rank of the adapter that the policy gradient trains (Hu et al. 2021); 0 trains all parameters.
        lora_alpha: the adapter's scale times its rank.
        lora_dropout: dropout before the adapter while training; a probe runs without.

    Raises:
        ToyError: a value is not allowed.
    """

    family: Literal["qwen2", "gpt2"] = "qwen2"
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.policy.")
        for name in ("hidden", "layers", "heads"):
            value = getattr(self, name)
            bounded(f"--model.policy.{name}", value, 1, DEEPEST if name == "layers" else None)
        bounded("--model.policy.lora_rank", self.lora_rank, 0)
        bounded("--model.policy.lora_alpha", self.lora_alpha, -LARGEST)
        require(
            self.hidden % (2 * self.heads) == 0,
            f"--model.policy.heads: {self.heads} is not allowed; twice of it must divide --model.policy.hidden",
        )
        require(
            0 <= self.lora_dropout < 1,
            f"--model.policy.lora_dropout: {self.lora_dropout} is not allowed; give a number from 0 to below 1",
        )

    def build(self, seed: int, vocabulary: int, positions: int) -> nn.Module:
        """Return the policy of a replica, initialised from its seed, in torch's default dtype.

        Args:
            seed: of the replica.
            vocabulary: number of tokens.
            positions: tokens of prompt and response together, at most.

        Raises:
            ToyError: transformers or peft is not installed.
        """
        model = self.build_decoder(vocabulary, positions)
        initialise(model, seed)
        return self.with_adapter(model, seed).to(torch.get_default_dtype())

    def with_adapter(self, model: nn.Module, seed: int) -> nn.Module:
        """Return the model with an adapter initialised from the seed, or as it is if ``lora_rank`` is 0."""
        if not self.lora_rank:
            return model
        model = add_adapter(model, self.lora_rank, self.lora_alpha, self.lora_dropout)
        initialise(model, seed, adapter_only=True)
        return model

    def build_decoder(self, vocabulary: int, positions: int) -> nn.Module:
        """Return the decoder without an adapter, in transformers' initialisation; eager attention, for forward mode."""
        transformers = import_optional("transformers")
        common = {"attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if self.family == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=vocabulary, n_positions=positions, n_embd=self.hidden, n_layer=self.layers,
                n_head=self.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
            )  # fmt: skip
            decoder: nn.Module = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.Qwen2Config(
                vocab_size=vocabulary, max_position_embeddings=positions, hidden_size=self.hidden,
                intermediate_size=4 * self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
                num_key_value_heads=self.heads, tie_word_embeddings=True, **common,
            )  # fmt: skip
            decoder = transformers.Qwen2ForCausalLM(config)
        return decoder


def import_optional(package: str) -> Any:
    """Return an optional package, imported.

    Raises:
        ToyError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ToyError(f"update_entropy needs {package}; give pip install 'lightning-toys[language]'") from None


def add_adapter(model: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
    """Return the model with a LoRA adapter at every linear layer but the head (Hu et al. 2021).

    Args:
        model: a causal language model of transformers.
        rank: of the adapter.
        alpha: the adapter's scale times its rank.
        dropout: before the adapter, while training.
    """
    peft = import_optional("peft")
    conv = any(type(m).__name__ == "Conv1D" for m in model.modules())  # GPT-2 keeps its matrices transposed
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        # peft asks transformers' models by a name that version 6 drops
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA adapter.

    >>> is_adapter("layers.0.q_proj.lora_A.default.weight")
    True
    """
    return ".lora_" in name


@torch.no_grad()
def initialise(model: nn.Module, seed: int, std: float = 0.02, adapter_only: bool = False) -> None:
    """Initialise every matrix from the seed and the parameter's own name, in place.

    Matrices are N(0, std^2), those that end a residual branch divided by sqrt(2 layers) as in GPT-2; an adapter starts
    at A uniform in +-1 / sqrt(in), B = 0. Scales and biases stay at their layers' initial values.
    """
    blocks = getattr(getattr(model, "config", None), "num_hidden_layers", 1)
    for name, p in model.named_parameters():
        if p.dim() < 2 or (adapter_only and not is_adapter(name)):
            continue
        generator = keyed_generator(seed, 0, f"init/{name}")
        if ".lora_B" in name:
            p.zero_()
            continue
        if ".lora_A" in name:
            drawn = generator.uniform(-1, 1, tuple(p.shape)) / math.sqrt(p.shape[1])
        else:
            ends_branch = any(part in name for part in ("o_proj", "down_proj", "c_proj"))
            drawn = generator.standard_normal(tuple(p.shape)) * std / (math.sqrt(2 * blocks) if ends_branch else 1.0)
        p.copy_(torch.from_numpy(np.asarray(drawn)))
