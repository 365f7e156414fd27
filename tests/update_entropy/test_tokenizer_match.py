"""The tokenizer is the backbone's own: by default, and refused where it is another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for needed in ("gguf", "peft", "transformers"):
    pytest.importorskip(needed)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from lightning_toys.errors import ToyError  # noqa: E402
from lightning_toys.update_entropy.checkpoints import load_tokenizer  # noqa: E402
from lightning_toys.update_entropy.data import ArithmeticData  # noqa: E402
from lightning_toys.update_entropy.module import UpdateEntropy  # noqa: E402
from lightning_toys.update_entropy.task import CharacterTokenizer  # noqa: E402
from lightning_toys.update_entropy.tokenizer_match import tokenizer_mismatch  # noqa: E402
from lightning_toys.update_entropy.word_problems import WordProblemData  # noqa: E402
from tests.update_entropy.test_checkpoints import a_model, a_tokenizer, write_gguf  # noqa: E402

WORDS = ["<pad>", "<bos>", "<end>", "<unk>", *(chr(i) for i in range(32, 127))]


def another_tokenizer(folder: Path, words: list[str] = WORDS, isolated: bool = True, **special: str) -> None:
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(words)}, unk_token="<unk>"))
    split: Any = pre_tokenizers.Split("", "isolated") if isolated else pre_tokenizers.WhitespaceSplit()
    inner.pre_tokenizer, inner.decoder = split, decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end>", "unk_token": "<unk>"} | special
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


SWAPPED = WORDS.copy()
SWAPPED[40], SWAPPED[50] = SWAPPED[50], SWAPPED[40]
OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "same": (another_tokenizer, ""),
    "size": (lambda f: another_tokenizer(f, [*WORDS, "é"]), "it has 100 tokens, the backbone's own has 99"),
    "end": (lambda f: another_tokenizer(f, eos_token="<pad>"), "its texts end with token 0, the backbone's own with 2"),
    "special": (lambda f: another_tokenizer(f, sep_token="~"), "its special tokens are [0, 1, 2, 3, 98], the backbone"),
    "table": (lambda f: another_tokenizer(f, SWAPPED), "its tokens have the checksum "),
    "splitting": (lambda f: another_tokenizer(f, isolated=False), "splits texts into them in another way"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_difference_is_seen_and_named(name: str, tmp_path: Path) -> None:
    write, said = OTHERS[name]
    another_tokenizer(tmp_path / "own")
    write(tmp_path / "other")
    found = tokenizer_mismatch(
        load_tokenizer(tmp_folder(tmp_path / "other")), load_tokenizer(tmp_folder(tmp_path / "own"))
    )
    assert (said in found) if said else found == ""


def tmp_folder(folder: Path) -> Path:
    """A folder that is a backbone's by its files."""
    a_model("llama").save_pretrained(folder)
    return folder


def test_characters_are_compared_by_their_texts() -> None:
    assert tokenizer_mismatch(CharacterTokenizer("0123"), CharacterTokenizer("0123")) == ""
    assert "checksum" in tokenizer_mismatch(CharacterTokenizer("0132"), CharacterTokenizer("0123"))


def test_tokens_are_the_backbones_own_by_default(tmp_path: Path) -> None:
    for name, words in (("first", WORDS), ("second", SWAPPED)):
        another_tokenizer(tmp_folder(tmp_path / name), words)
    data = WordProblemData()
    with pytest.raises(ToyError, match=r"^--data.tokens: null is not allowed without --model.backbone"):
        _ = data.tokenizer
    for name in ("first", "second"):  # one data module may be given to two models
        UpdateEntropy(backbone=str(tmp_path / name)).measure(data)
        assert data.tokenizer.encode(WORDS[40]) == load_tokenizer(tmp_path / name).encode(WORDS[40])
        assert data.max_prompt_length > 0
    assert data.tokenizer.encode(WORDS[40]) == [50]


def test_another_models_tokens_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    for name, words in (("own", WORDS), ("other", SWAPPED)):
        another_tokenizer(tmp_folder(tmp_path / name), words)
    module = UpdateEntropy(backbone=str(tmp_path / "own"))
    module.measure(WordProblemData(str(tmp_path / "own")))
    with pytest.raises(ToyError, match=r"^--data.tokens: the tokenizer is not that of --model.backbone .*checksum"):
        module.measure(WordProblemData(str(tmp_path / "other")))
    with pytest.raises(ToyError, match=r"^--data.tokens: .* it has 17 tokens, the backbone's own has 99"):
        module.measure(ArithmeticData())


def test_a_backbone_without_a_tokenizer_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_model("llama").save_pretrained(tmp_path)
    UpdateEntropy(backbone=str(tmp_path)).measure(ArithmeticData())
    assert "has no tokenizer of its own: that the data's 17 tokens are the model's is taken on trust" in (
        capsys.readouterr().err
    )
    with pytest.raises(ToyError, match=r"^--model.backbone: .* no tokenizer"):
        UpdateEntropy(backbone=str(tmp_path)).measure(WordProblemData())


def test_a_gguf_file_has_its_own(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", a_model("llama"))
    a_tokenizer(tmp_folder(tmp_path / "other"))
    module, data = UpdateEntropy(backbone=str(tmp_path / "m.gguf")), WordProblemData()
    module.measure(data)
    assert data.tokenizer.vocab_size == 32
    with pytest.raises(ToyError, match=r"^--data.tokens: the tokenizer is not that of"):
        module.measure(WordProblemData(str(tmp_path / "other")))
