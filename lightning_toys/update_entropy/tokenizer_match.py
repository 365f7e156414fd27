"""Whether a tokenizer is a backbone's own: with another one, its texts are numbers that mean nothing to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_toys.update_entropy.cache import digest
from lightning_toys.update_entropy.checkpoints import locate_backbone
from lightning_toys.update_entropy.task import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
# letters, figures, spaces, signs: what two vocabularies of the same tokens may still split or normalise otherwise
SAMPLE = "The  answer is 1,234.5 (or -67 %)!\n\tnaïve Straße, don't; f(x) = x**2\n\n日本語 😀"


def has_tokenizer(path: str | Path) -> bool:
    """Whether a backbone comes with a tokenizer: a GGUF file does, a directory where it holds a tokenizer's files.

    Args:
        path: as :func:`~lightning_toys.update_entropy.checkpoints.load_backbone` takes it.
    """
    folder, gguf = locate_backbone(path)
    return gguf is not None or any(any(folder.glob(name)) for name in TOKENIZER_FILES)


def token_table(tokenizer: Tokenizer, as_text: bool) -> Any:
    """Return what every token stands for, as plain values.

    Args:
        tokenizer: the tokenizer.
        as_text: the tokens' texts in order, which every tokenizer has; else transformers' table of tokens.
    """
    if as_text:
        return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    pretrained: Any = tokenizer.tokenizer  # type: ignore[attr-defined]
    return sorted((int(i), str(token)) for token, i in pretrained.get_vocab().items())


def tokenizer_mismatch(own: Tokenizer, theirs: Tokenizer) -> str:
    """Say in what a tokenizer differs from a backbone's own; empty if in nothing.

    Compared are the number of tokens, the token that ends a text, the special tokens, a checksum of the table of
    tokens, and the tokens of a sample text (two tables may be one and their rules of splitting two). The chat template
    is not: it may be one's own.

    Args:
        own: the tokenizer in question.
        theirs: the backbone's.
    """
    if own.vocab_size != theirs.vocab_size:
        return f"it has {own.vocab_size} tokens, the backbone's own has {theirs.vocab_size}"
    if own.eos_token_id != theirs.eos_token_id:
        return f"its texts end with token {own.eos_token_id}, the backbone's own with {theirs.eos_token_id}"
    both: list[Any] = [getattr(t, "tokenizer", None) for t in (own, theirs)]
    as_text = any(t is None for t in both)
    if not as_text and (special := [sorted(t.all_special_ids) for t in both])[0] != special[1]:
        return f"its special tokens are {special[0]}, the backbone's own {special[1]}"
    sums = [digest(token_table(t, as_text)) for t in (own, theirs)]
    if sums[0] != sums[1]:
        return f"its tokens have the checksum {sums[0]}, the backbone's own {sums[1]}"
    if not as_text and own.encode(SAMPLE) != theirs.encode(SAMPLE):
        return "it has the backbone's tokens and splits texts into them in another way"
    return ""
