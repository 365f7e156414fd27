"""Inference with trained policies: next-token logits, and responses. Neither needs a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.errors import bounded, require
from lightning_toys.training.module import ToyModule
from lightning_toys.update_entropy.rollouts import generate, stop_tokens, uniforms
from lightning_toys.update_entropy.sequences import Sequences, next_token_logits
from lightning_toys.update_entropy.training import Rollouts


class PolicyInference(ToyModule):
    """Policies, a language model for each seed, that can be called and sampled from.

    Attributes:
        rollouts: how responses are sampled in training; here, for the temperature.
    """

    rollouts: Rollouts

    @property
    def policies(self) -> list[nn.Module]:
        """The replicas' policies.

        Raises:
            ToyError: they are not built yet.
        """
        require(
            hasattr(self, "net"),
            f"{type(self).__name__}: there are no policies yet; fit, or load_from_checkpoint, or set "
            "module.sizes = module.measure(datamodule) and call module.configure_model()",
        )
        assert isinstance(self.net, nn.ModuleList)
        return list(self.net)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return every replica's logits of the next token after each token (R, B, T, V): teacher forcing.

        The policies are evaluated as `validate` and `test` do it, without dropout and autocast; gradients flow where
        they are enabled. It needs no Trainer::

            module = UpdateEntropy.load_from_checkpoint(path, weights_only=True)
            probabilities = module(torch.tensor([[7, 3, 13]])).softmax(-1)

        Args:
            input_ids: token ids (B, T), given to every replica, or (R, B, T).
            attention_mask: of the same shape: 1 where there is a token, 0 at padding, which may be on either side (the
                logits there have no meaning); None: no padding.

        Raises:
            ToyError: there are no policies yet, or the arguments do not fit them.
        """
        policies = self.policies
        shape, dtype = tuple(input_ids.shape), input_ids.dtype
        require(
            dtype in (torch.int64, torch.int32)
            and input_ids.numel() > 0
            and (len(shape) == 2 or (len(shape) == 3 and shape[0] == len(policies))),
            f"input_ids: {shape} of {dtype} is not allowed; give integers (B, T) or ({len(policies)}, B, T)",
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        require(
            mask.shape == input_ids.shape,
            f"attention_mask: {tuple(mask.shape)} is not allowed; give the shape of input_ids, {shape}",
        )
        self.check_tokens("input_ids", int(input_ids.min()), int(input_ids.max()), shape[-1])
        whole = (len(policies), *shape[-2:])
        ids, mask = (x.to(self.device).expand(whole) for x in (input_ids, mask))
        return torch.stack([next_token_logits(m, x, a) for m, x, a in zip(policies, ids, mask, strict=True)])

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int,
        temperature: float | None = None,
        step: int = 0,
        stream: str = "generate",
        eos_token_id: int | None = None,
    ) -> list[Sequences]:
        """Return every replica's responses to prompts, sampled token by token; needs no Trainer either.

        A response is a function of the weights, its prompt and its key (the replica's seed, step, stream, row): it does
        not depend on the others.

        Args:
            prompts: B lists of token ids, given to every replica, or R lists of B such lists.
            max_new_tokens: of a response, its end-of-sequence token included.
            temperature: of the softmax; None: that of the training's rollouts.
            step: number of the sample.
            stream: name of the use.
            eos_token_id: token that ends a response; None: those of the policy's configurations, see
                :func:`~lightning_toys.update_entropy.rollouts.stop_tokens`.

        Returns:
            R of them, whose ``.responses`` are B lists of token ids.

        Raises:
            ToyError: there are no policies yet, or the arguments do not fit them.
        """
        policies: list[Any] = self.policies
        temperature = self.rollouts.temperature if temperature is None else temperature
        bounded("temperature", temperature, 0.0, above=True)
        bounded("max_new_tokens", max_new_tokens, 1)
        by_replica = [prompts] * len(policies) if is_prompts(prompts) else list(prompts)
        require(
            len(by_replica) == len(policies) and all(map(is_prompts, by_replica)),
            f"prompts: these are not allowed; give lists of token ids, none empty, or {len(policies)} of such lists",
        )
        ids = [i for each in by_replica for prompt in each for i in prompt]
        longest = max(len(prompt) for each in by_replica for prompt in each)
        self.check_tokens("prompts", min(ids), max(ids), longest + max_new_tokens - 1)  # the last token is not read
        out = []
        for model, seed, each in zip(policies, self.seeds, by_replica, strict=True):
            ends = (self.rollouts.stop_tokens or stop_tokens(model)) if eos_token_id is None else [eos_token_id]
            u = uniforms(seed, step, stream, range(len(each)), max_new_tokens)
            out.append(generate(model, each, range(len(each)), u, ends, temperature))
        return out

    def check_tokens(self, name: str, least: int, greatest: int, length: int) -> None:
        """Check token ids and the length of a text against the policies.

        Args:
            name: of the argument.
            least: of the token ids.
            greatest: of the token ids.
            length: of the text, tokens.

        Raises:
            ToyError: a token is not in the vocabulary, or the text has more tokens than the policies have positions.
        """
        model: Any = self.policies[0]
        config = model.config.get_text_config()
        size, positions = config.vocab_size, config.max_position_embeddings
        wrong = least if least < 0 else greatest
        require(0 <= wrong < size, f"{name}: token {wrong} is not allowed; give tokens from 0 to {size - 1}")
        require(
            length <= positions, f"{name}: {length} tokens are not allowed; the policies have {positions} positions"
        )


def is_prompts(value: Any) -> bool:
    """Whether a value is a list of lists of token ids, none of them empty.

    >>> is_prompts([[1, 2], [3]]), is_prompts([[1, 2], []])
    (True, False)
    """
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(p, list | tuple) and len(p) > 0 and all(type(i) is int for i in p) for p in value)
