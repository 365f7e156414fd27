"""Headers and configurations of model files, checked before a library trusts them and allocates memory."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_toys.update_entropy.policy import import_optional

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by GGUF's type of value
STRING, ARRAY = 8, 9
MAX_WEIGHTS_PER_NUMBER = 32  # that a stored number may hold: 1 bit each in an int32
Shapes = Mapping[str, Sequence[int]]  # by tensor name


class GGUFHeader:
    """The header of a GGUF file, parsed without reading past the file's end, as the gguf package's reader does.

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Args:
        file: to be read.

    Attributes:
        shapes: of the tensors, by name.

    Raises:
        ValueError: it is no GGUF file, or its header is inconsistent with its size.
    """

    def __init__(self, file: Path) -> None:
        self.offset, self.byte_order = 0, "<"
        self.shapes: dict[str, list[int]] = {}
        if file.stat().st_size < 24:
            raise ValueError("it is shorter than a header")
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
            self.read_header()

    def read_header(self) -> None:
        """Parse the header into ``self.shapes``."""
        if self.read_bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.read_int("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self.byte_order, version = ">", version >> 24
        if version not in (2, 3):
            raise ValueError(f"version {version} is not read")
        tensors, values = self.read_int("Q"), self.read_int("Q")
        for _ in range(values):
            self.read_string()
            self.skip_value(self.read_int("I"))
        found = [self.read_tensor_info() for _ in range(tensors)]
        sizes = import_optional("gguf").GGML_QUANT_SIZES
        for name, dims, kind, offset in found:
            if kind not in sizes:
                raise ValueError(f"tensor {name} is of an unknown type {kind}")
            block, width = sizes[kind]
            if self.offset + offset + math.prod(dims) // block * width > len(self.data):
                raise ValueError(f"tensor {name} {tuple(dims)} at {offset} ends beyond the file")
            self.shapes[name] = dims

    def read_tensor_info(self) -> tuple[str, list[int], int, int]:
        """Return the next tensor's name, dimensions, type and offset."""
        name = self.read_string()
        dimensions = [self.read_int("Q") for _ in range(self.read_dimensions())]
        return name, dimensions, self.read_int("I"), self.read_int("Q")

    def read_bytes(self, count: int) -> bytes:
        """Return the next ``count`` bytes, or none if they are more than 64 KiB, which are skipped."""
        size = len(self.data)
        if self.offset + count > size:
            raise ValueError(f"its header goes {count} bytes on from {self.offset}, and the file ends at {size}")
        self.offset += count
        return self.data[self.offset - count : self.offset] if count <= 1 << 16 else b""

    def read_int(self, kind: str) -> int:
        """Return the next integer, of a format character of ``struct``."""
        return int(struct.unpack(self.byte_order + kind, self.read_bytes(struct.calcsize(kind)))[0])

    def read_dimensions(self) -> int:
        """Return the next tensor's number of dimensions."""
        count = self.read_int("I")
        if count > 8:
            raise ValueError(f"a tensor has {count} dimensions")
        return count

    def read_string(self) -> str:
        """Return the next string, or an empty one if it is longer than 64 KiB."""
        return self.read_bytes(self.read_int("Q")).decode(errors="replace")

    def skip_value(self, kind: int, depth: int = 0) -> None:
        """Skip a metadata value of a GGUF type; ``depth`` is that of nested arrays."""
        if kind == STRING:
            self.read_string()
        elif kind == ARRAY and depth < 4:
            inner, count = self.read_int("I"), self.read_int("Q")
            if inner in SCALAR_BYTES:
                self.read_bytes(SCALAR_BYTES[inner] * count)
            elif count > len(self.data):
                raise ValueError(f"an array has {count} items, more than the file has bytes")
            else:
                for _ in range(count):
                    self.skip_value(inner, depth + 1)
        elif kind in SCALAR_BYTES:
            self.read_bytes(SCALAR_BYTES[kind])
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
        weight_map = json.loads(index.read_text()).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else {weight_map}
        if unknown := sorted(str(n) for n in names - {f.name for f in files}):
            raise ValueError(f"{index.name} names {unknown[0]}, which is no safetensors file beside it")
    shapes: dict[str, Sequence[int]] = {}
    for file in files:
        with import_optional("safetensors").safe_open(str(file), "pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return shapes


def check_rank(config: Any, shapes: Shapes) -> None:
    """Check that an adapter's configuration asks for no greater rank than its tensors have.

    Args:
        config: content of adapter_config.json.
        shapes: of the adapter's tensors on disk.

    Raises:
        ValueError: it does, or it is no mapping.
    """
    if not isinstance(config, dict):
        raise ValueError("its configuration is no mapping")
    largest = max((max(s, default=0) for s in shapes.values()), default=0)
    pattern = config.get("rank_pattern") or {}
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())):
        if isinstance(rank, int) and rank > largest:
            raise ValueError(f"its rank is {rank}, and no tensor of it is larger than {largest}")


def check_sizes(config: Any, shapes: Shapes) -> None:
    """Check that a configuration asks for no more than its files hold: the rest would be allocated and initialised.

    Args:
        config: of transformers.
        shapes: of the tensors on disk.

    Raises:
        ValueError: it does.
    """
    text, stored = config.get_text_config(), sum(math.prod(s) for s in shapes.values())
    layers, width, vocabulary = (
        getattr(text, k, None) or 1 for k in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    inner = getattr(text, "intermediate_size", None) or 1
    heads = (getattr(text, "num_attention_heads", None) or 1) * (getattr(text, "head_dim", None) or 1)
    for name, count, limit in (
        ("num_hidden_layers", layers, len(shapes)),
        ("vocab_size times hidden_size", vocabulary * width, MAX_WEIGHTS_PER_NUMBER * stored),
        ("intermediate_size times hidden_size", inner * width, MAX_WEIGHTS_PER_NUMBER * stored),
        ("num_attention_heads times head_dim times hidden_size", heads * width, MAX_WEIGHTS_PER_NUMBER * stored),
    ):
        if not isinstance(count, int) or not 0 < count <= limit:
            raise ValueError(
                f"{name} is {str(count)[:40]}, and its files hold {len(shapes)} tensors of {stored} numbers"
            )
