"""What a case of the fuzzer is, and how its changes are applied to a folder.

A case is plain JSON, so that it can be kept. It begins with a shipped configuration, written out with all of its
settings and made small, and with the folder of a run of it that has ended. Its changes are lists of words, each applied
by the function of that name in ``CHANGES``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

RUN = "a"  # the name of the run that has ended
CONFIG = "case.yaml"
MORE = ("--trainer.max_steps", "4")  # of a resume: the run ended at step 2


@dataclass
class Case:
    """One command line, in a folder that was changed before.

    Attributes:
        config: ``experiment/variant``.
        verb: of the command line; ``resume`` is a fit that goes on, ``fresh`` a test or validation of a new run.
        changes: to configuration, flags, checkpoint, run folder and model files; see ``CHANGES``.
    """

    config: str
    verb: str
    changes: list[list[Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


@dataclass
class Ground:
    """Where a case is played.

    Attributes:
        folder: the working folder.
        case: what is played.
    """

    folder: Path
    case: Case
    flags: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The folder of the run that has ended."""
        return self.folder / "logs" / self.case.config / RUN

    @property
    def words(self) -> list[str]:
        """The command line."""
        verb, config = self.case.verb, ["-c", CONFIG, "--run.root", "logs"]
        experiment, _, variant = self.case.config.partition("/")
        where = ["--run.variant", variant]
        named = [*where, "--run.name", RUN]
        if verb == "compare":
            return ["compare", f"logs/{experiment}", *self.flags]
        if verb == "sweep":
            return ["sweep", *config, "--grid.model.seeds", "[[0],[1]]", *self.flags]
        if verb == "resume":
            return ["fit", *config, *named, "--ckpt_path", "last", *MORE, *self.flags]
        if verb == "fit":
            return ["fit", *config, *where, *self.flags]
        stands_alone = not (self.run / "checkpoints").exists()
        ckpt = [] if stands_alone else ["--ckpt_path", f"logs/{self.case.config}/{RUN}/checkpoints/last.ckpt"]
        return [verb, *config, *where, *ckpt, *self.flags]


def node_of(tree: Any, path: str, separator: str) -> tuple[Any, Any]:
    """Return the mapping or list that holds what a path names, and its key there; makes mappings on the way."""
    *heads, last = path.split(separator)
    node = tree
    for head in heads:
        if isinstance(node, list):
            node = node[int(head) % len(node)]
            continue
        key: Any = int(head) if head.isdigit() and int(head) in node else head
        node = node.setdefault(key, {}) if isinstance(node.get(key), dict | list | None) else node[key]
        if node is None:
            raise KeyError(path)
    if isinstance(node, list):
        return node, int(last) % len(node)
    return node, int(last) if last.isdigit() and int(last) in node else last


def put(tree: Any, path: str, value: Any, separator: str = ".") -> None:
    """Put a value at a path; ``"<delete>"`` takes it away, and what is no mapping on the way is left as it is."""
    try:
        node, key = node_of(tree, path, separator)
        if value == "<delete>":
            del node[key]
        else:
            node[key] = value
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        return


def number(value: Any) -> Any:
    """Return a value from JSON, in which numbers that JSON lacks are words: ``"<nan>"``, ``"<inf>"``, ``"<-inf>"``."""
    return float(value[1:-1]) if isinstance(value, str) and value in ("<nan>", "<inf>", "<-inf>") else value


# configuration and command line


def change_config(ground: Ground, path: str, value: Any) -> None:
    """Put a value into the configuration."""
    file = ground.folder / CONFIG
    try:
        tree = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):  # another change came first
        return
    put(tree, path, number(value))
    file.write_text(yaml.safe_dump(tree, sort_keys=False))


def change_text(ground: Ground, what: str, share: float, word: str) -> None:
    """Change the configuration's text at a share of its length: cut, insert, double a line, drop one."""
    file = ground.folder / CONFIG
    text = file.read_text(errors="surrogateescape")
    at, lines = int(share * len(text)), text.splitlines(keepends=True)
    line = int(share * (len(lines) - 1))
    text = {
        "cut": text[:at],
        "insert": text[:at] + word + text[at:],
        "double": "".join([*lines[: line + 1], *lines[line:]]),
        "drop": "".join([*lines[:line], *lines[line + 1 :]]),
    }[what]
    file.write_bytes(text.encode("utf-8", "surrogateescape"))


def change_flag(ground: Ground, name: str, value: str | None) -> None:
    """Add a flag."""
    ground.flags += [name] if value is None else [name, value]


# checkpoints

BIG = 3_000_000_000


def stride0(shape: tuple[int, ...], value: float = 0.0) -> torch.Tensor:
    """Return a tensor of any size that holds one number."""
    return torch.full((1,), value).expand(shape if shape else (1,))


MANY = 10**6
TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "meta": lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"),
    "sparse": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.reshape(x.shape[0] if x.dim() else 1, -1).to_sparse_csr(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
    "bool": lambda x: x.bool(),
    "int64": lambda x: x.to(torch.int64),
    "uint8": lambda x: x.to(torch.uint8),
    "bits": lambda x: x.float().view(torch.int32).view(torch.uint32),
    "infinite": lambda x: torch.full_like(x, torch.inf) if x.is_floating_point() else x,
    "nan": lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x,
    "3e38": lambda x: torch.full_like(x, 3e38) if x.is_floating_point() else x,
    "1e30": lambda x: torch.full_like(x, 1e30) if x.is_floating_point() else x,
    "-1e30": lambda x: torch.full_like(x, -1e30) if x.is_floating_point() else x,
    "1e-40": lambda x: torch.full_like(x, 1e-40) if x.is_floating_point() else x,
    "negative": lambda x: -x.abs() - 1 if x.is_floating_point() else x,
    "stride0": lambda x: stride0(tuple(x.shape)),
    "big": lambda x: stride0((BIG,)),
    "bigger": lambda x: stride0((2**62,)),
    "empty": lambda x: torch.empty(0),
    "scalar": lambda x: torch.tensor(1.0),
    "transposed": lambda x: x.transpose(0, -1) if x.dim() else x,
    "not_contiguous": lambda x: torch.stack([x, x], -1)[..., 0],
    "conj": lambda x: torch.conj(x.to(torch.complex64)),
    "parameter": lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
    "nested": lambda x: torch.nested.nested_tensor([x.float().flatten()[:1], x.float().flatten()]),
    "jagged": lambda x: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    "requires_grad": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "list": lambda x: x.tolist(),
}


def change_checkpoint(ground: Ground, path: str, what: Any) -> None:
    """Put a value, or what ``TENSORS`` makes of the tensor there (``"tensor:meta"``), into last.ckpt.

    A path is keys and numbers with slashes between; ``state_dict/*`` is all of its tensors.
    """
    file = ground.run / "checkpoints" / "last.ckpt"
    try:
        tree = torch.load(file, weights_only=True) if file.is_file() else None
    except Exception:  # another change came first
        tree = None
    if not isinstance(tree, dict):
        return
    head, _, last = path.rpartition("/")
    inside = tree.get(head)
    keys = inside if isinstance(inside, dict) else {}  # a change before may have made something else of it
    every = [f"{head}/{key}" for key in keys] if last == "*" else [path]
    for place in every:
        try:
            node, key = node_of(tree, place, "/")
            old = node[key]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError):
            old = None
        value = number(what)
        if isinstance(what, str) and what.startswith("tensor:"):
            made = TENSORS[what.removeprefix("tensor:")]
            try:
                fits = isinstance(old, torch.Tensor) and old.numel() <= MANY  # a change before may have made it huge
                value = made(old if fits else torch.zeros(2, 3))
            except (RuntimeError, NotImplementedError):  # not of this kind of tensor
                value = made(torch.ones(2, 3))
        put(tree, place, value, "/")
    torch.save(tree, file)


# files


def spoil_file(path: Path, what: str, word: str = "") -> None:
    """Do something to a file: what would be there after an accident, or somebody's joke."""
    content = path.read_bytes() if path.is_file() else b""
    if any(p.exists() and not p.is_dir() for p in path.parents):
        return  # its folder was spoiled before
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = len(content) // 2
    texts = {
        "empty": b"", "cut": content[:half], "twice": content * 2, "tail": content + b"rubbish\n\xff",
        "flip": content[:half] + bytes(255 - b for b in content[half : half + 8]) + content[half + 8 :],
        "zeros": bytes(len(content)), "word": word.encode("utf-8", "surrogateescape"),
    }  # fmt: skip
    if what in texts:
        path.write_bytes(texts[what])
    elif what == "directory":
        path.mkdir()
    elif what == "full_directory":
        path.mkdir()
        (path / "inside").write_text("kept")
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "link":
        path.with_name(f"{path.name}.elsewhere").write_bytes(content)
        path.symlink_to(f"{path.name}.elsewhere")
    elif what == "null":
        path.symlink_to("/dev/null")
    elif what == "socket":
        import socket

        here = os.getcwd()
        os.chdir(path.parent)  # its names are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)


SPOILS = (
    *("delete", "empty", "cut", "twice", "tail", "flip", "zeros", "word", "directory", "full_directory", "fifo"),
    *("dangling", "loop", "link", "null", "socket"),
)


def change_file(ground: Ground, pattern: str, what: str, word: str = "") -> None:
    """Spoil the first file below the run folder that a pattern matches, or what is not there yet."""
    found = sorted(ground.run.glob(pattern)) if "*" in pattern else [ground.run / pattern]
    if found:
        spoil_file(found[0], what, word)


def change_json(ground: Ground, name: str, path: str, value: Any) -> None:
    """Put a value into a JSON file of the run folder."""
    file = ground.run / name
    edit_json(file, path, value)


def edit_json(file: Path, path: str, value: Any) -> None:
    """Put a value into a JSON file."""
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError):
        return
    put(tree, path, number(value))
    file.write_text(json.dumps(tree))


def change_models(ground: Ground, name: str, what: str, word: str = "") -> None:
    """Spoil a model's file."""
    spoil_file(ground.folder / name, what, word)


def change_model_json(ground: Ground, name: str, path: str, value: Any) -> None:
    """Put a value into a JSON file of a model."""
    edit_json(ground.folder / name, path, value)


CHANGES: dict[str, Callable[..., None]] = {
    "config": change_config,
    "text": change_text,
    "flag": change_flag,
    "checkpoint": change_checkpoint,
    "file": change_file,
    "json": change_json,
    "model": change_models,
    "model_json": change_model_json,
}
