"""What model files say of themselves, looked through before a library believes it and allocates."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_toys.update_entropy.policy import need

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's types of value
STRING, ARRAY = 8, 9
PACKED = 32  # weights that a stored number may stand for: 1 bit each in an int32
Shapes = Mapping[str, Sequence[int]]


class GGUFHeader:
    """Goes through a GGUF file's header, never past the file's end: the reader of the gguf package does.

    Raises:
        ValueError: the header says more than there is.
    """

    def __init__(self, file: Path) -> None:
        self.at, self.order = 0, "<"
        self.shapes: dict[str, list[int]] = {}
        if file.stat().st_size < 24:
            raise ValueError("it is shorter than a header")
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
            self.read()

    def read(self) -> None:
        """Go through the header."""
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order, version = ">", version >> 24
        if version not in (2, 3):
            raise ValueError(f"version {version} is not read")
        tensors, values = self.number("Q"), self.number("Q")
        for _ in range(values):
            self.text()
            self.value(self.number("I"))
        found = [(self.text(), [self.number("Q") for _ in range(self.dimensions())], self.number("I"), self.number("Q"))
                 for _ in range(tensors)]  # fmt: skip
        sizes = need("gguf").GGML_QUANT_SIZES
        for name, dims, kind, offset in found:
            if kind not in sizes:
                raise ValueError(f"tensor {name} is of an unknown type {kind}")
            block, width = sizes[kind]
            if self.at + offset + math.prod(dims) // block * width > len(self.data):
                raise ValueError(f"tensor {name} {tuple(dims)} at {offset} ends beyond the file")
            self.shapes[name] = dims

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if self.at + count > len(self.data):
            raise ValueError(f"its header goes {count} bytes on from {self.at}, and the file ends at {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at] if count <= 1 << 16 else b""

    def number(self, kind: str) -> int:
        """Return the next integer."""
        return int(struct.unpack(self.order + kind, self.take(struct.calcsize(kind)))[0])

    def dimensions(self) -> int:
        """Return the next tensor's number of dimensions."""
        count = self.number("I")
        if count > 8:
            raise ValueError(f"a tensor has {count} dimensions")
        return count

    def text(self) -> str:
        """Return the next string, if it is short."""
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> None:
        """Go past a value."""
        if kind == STRING:
            self.text()
        elif kind == ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if inner in SCALARS:
                self.take(SCALARS[inner] * count)
            elif count > len(self.data):
                raise ValueError(f"an array has {count} items, more than the file has bytes")
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        elif kind in SCALARS:
            self.take(SCALARS[kind])
        else:
            raise ValueError(f"a value is of an unknown type {kind}")


def safetensors_shapes(folder: Path) -> Shapes:
    """Return the shapes of all tensors in a folder's safetensors files.

    Raises:
        ValueError: an index names a file that is not in the folder.
        SafetensorError: a file is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.index.json"):
        listed = json.loads(index.read_text()).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else {listed}
        if strange := sorted(str(n) for n in names - {f.name for f in files}):
            raise ValueError(f"{index.name} names {strange[0]}, which is no safetensors file beside it")
    shapes: dict[str, Sequence[int]] = {}
    for file in files:
        with need("safetensors").safe_open(str(file), "pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return shapes


def check_rank(config: Any, shapes: Shapes) -> None:
    """Refuse an adapter's configuration of a greater rank than any of its tensors has.

    Raises:
        ValueError: it is of one, or no mapping.
    """
    if not isinstance(config, dict):
        raise ValueError("its configuration is no mapping")
    most = max((max(s, default=0) for s in shapes.values()), default=0)
    pattern = config.get("rank_pattern") or {}
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())):
        if isinstance(rank, int) and rank > most:
            raise ValueError(f"its rank is {rank}, and no tensor of it is larger than {most}")


def check_sizes(config: Any, shapes: Shapes) -> None:
    """Refuse a configuration that asks for far more than its files hold: what they lack would be drawn at random.

    Args:
        config: of transformers.
        shapes: of the tensors on disk.

    Raises:
        ValueError: it does.
    """
    text, stored = config.get_text_config(), sum(math.prod(s) for s in shapes.values())
    layers, width, words = (getattr(text, k, None) or 1 for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    inner = getattr(text, "intermediate_size", None) or 1
    heads = (getattr(text, "num_attention_heads", None) or 1) * (getattr(text, "head_dim", None) or 1)
    for name, count, most in (
        ("num_hidden_layers", layers, len(shapes)),
        ("vocab_size times hidden_size", words * width, PACKED * stored),
        ("intermediate_size times hidden_size", inner * width, PACKED * stored),
        ("num_attention_heads times head_dim times hidden_size", heads * width, PACKED * stored),
    ):
        if not isinstance(count, int) or not 0 < count <= most:
            raise ValueError(
                f"{name} is {str(count)[:40]}, and its files hold {len(shapes)} tensors of {stored} numbers"
            )
