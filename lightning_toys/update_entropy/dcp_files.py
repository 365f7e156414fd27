"""Optimiser states in folders of ``torch.distributed.checkpoint`` (DCP), which FSDP and torchtitan write.

DCP's own reader unpickles ``.metadata`` and every value that is no tensor. Here neither can run code: of ``.metadata``
an unpickler makes records that hold values and do nothing, whatever classes it names, and what lies in the ``.distcp``
files is read by ``torch.load(weights_only=True)``. Shards are put together, and must cover a tensor exactly.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_toys.errors import ToyError, one_line
from lightning_toys.training.files import special_kind
from lightning_toys.update_entropy.checkpoints import error_text, flag_error, join_limited
from lightning_toys.update_entropy.state_formats import OPTIMIZER

METADATA = ".metadata"
LARGEST_METADATA = 1 << 28  # bytes
FLAT = re.compile(r"(?:(?P<root>.+?)\.)??(?P<rest>(?:state|param_groups)\..+)")
PARTS = ("state", "param_groups")


class Record:
    """Stands for an object of any class in a pickle: what it was made of, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """Keep a state: a dictionary's values as attributes, anything else as ``state``."""
        self.__dict__.update({str(k): v for k, v in state.items()} if isinstance(state, dict) else {"state": state})


class RecordUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing: a class or function of any name is a :class:`Record` (of torch, a dtype)."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class, function or value by its name."""
        value = getattr(torch, name, None) if module == "torch" else None
        return value if isinstance(value, torch.dtype) else type(name, (Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Refuse what lies outside of the pickle."""
        raise pickle.UnpicklingError("it refers to objects outside of itself")


@dataclass(frozen=True)
class Chunk:
    """Where a value, or a part of a tensor, lies.

    Attributes:
        file: name in the folder.
        start: first byte.
        length: bytes.
    """

    file: str
    start: int
    length: int


@dataclass
class Entry:
    """A value of a checkpoint.

    Attributes:
        path: keys that lead to it.
        size: shape of a tensor; None of anything else.
        dtype: of a tensor.
        chunks: where it lies, by the offset of a tensor's part; ``None`` for what is no tensor.
        parts: size of a tensor's part by its offset.
    """

    path: tuple[Any, ...]
    size: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    chunks: dict[tuple[int, ...] | None, Chunk] = field(default_factory=dict)
    parts: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)


def read_dcp(folder: Path) -> dict[str, Any]:
    """Return the optimiser's state in a folder of DCP as it was given to ``save``: nested, or one key a value.

    Nothing but the optimiser's part is read.

    Args:
        folder: with ``.metadata`` in it.

    Raises:
        ToyError: it is no such folder, holds no or several optimisers' states, or something that could run code.
    """
    try:
        entries = list(read_entries(folder / METADATA))
    except ToyError:
        raise
    except Exception as error:  # whatever a pickle that is none, or none of DCP's, leads to
        why = f"{type(error).__name__}: {one_line(error)[:120]}"
        raise flag_error(OPTIMIZER, f"{folder}: {METADATA} is none of torch.distributed.checkpoint's ({why})") from None
    roots: dict[tuple[Any, ...], dict[tuple[Any, ...], Entry]] = {}
    for entry in entries:
        if split := split_path(entry.path):
            roots.setdefault(split[0], {})[split[1]] = entry
    # a model may have parameters of such names
    roots = {r: found for r, found in roots.items() if {part_of(p) for p in found} == set(PARTS)}
    if not roots:
        kinds = "save one with what get_optimizer_state_dict or optimizer.state_dict() returns under 'optimizer'"
        raise flag_error(OPTIMIZER, f"{folder} holds no state of an optimiser; {kinds}")
    if len(roots) > 1:
        names = join_limited([".".join(map(str, r)) or "the top" for r in roots])
        raise flag_error(OPTIMIZER, f"{folder} holds several optimisers' states: {names}; give a folder with one")
    (found,) = roots.values()
    room = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    tensors = sum(prod(e.size) * e.dtype.itemsize for e in found.values() if e.size is not None and e.dtype is not None)
    for entry in found.values():
        for chunk in entry.chunks.values():
            chunk_file(folder, chunk, f"{folder}: {'.'.join(map(str, entry.path))}")
    if max(tensors, sum(c.length for e in found.values() for c in e.chunks.values())) > room:
        raise flag_error(OPTIMIZER, f"{folder} says more values than its files hold")
    return nested({path: read_entry(folder, entry, room) for path, entry in found.items()})


def read_entries(file: Path) -> Iterator[Entry]:
    """Yield what a ``.metadata`` lists.

    Raises:
        ToyError: it is too large, or says what no such file says.
    """
    if special_kind(file) or file.stat().st_size > LARGEST_METADATA:
        raise flag_error(OPTIMIZER, f"{file} is no ordinary file of at most {LARGEST_METADATA} bytes")
    raw = file.read_bytes()
    check_opcodes(raw)
    top = RecordUnpickler(io.BytesIO(raw)).load()
    paths = top.planner_data if isinstance(top.planner_data, dict) else {}
    entries: dict[str, Entry] = {}
    for key, kind in top.state_dict_metadata.items():
        entry = entries[key] = Entry(tuple(paths.get(key, (key,))))
        if size := getattr(kind, "size", None):
            (entry.size,) = map(tuple, size.args or ((),))
            entry.parts = {tuple(*c.offsets.args): tuple(*c.sizes.args) for c in kind.chunks}
            (entry.dtype,) = (x for x in vars_of(kind.properties) if isinstance(x, torch.dtype))
    for index, info in top.storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise flag_error(OPTIMIZER, f"{file.parent}: its files are compressed, which is not read; save without")
        offset = getattr(index, "offset", None)
        key = None if offset is None else tuple(*offset.args)
        entries[index.fqn].chunks[key] = Chunk(info.relative_path, int(info.offset), int(info.length))
    yield from entries.values()


def vars_of(record: Record) -> list[Any]:
    """Return all values of a record, those of a state that is a tuple too."""
    return [*getattr(record, "state", ()), *vars(record).values()]


def check_opcodes(raw: bytes) -> None:
    """Refuse a pickle that would take memory without end, or fetch what was registered elsewhere.

    Raises:
        ValueError: it is no pickle, or such a one.
    """
    for count, (op, arg, _) in enumerate(pickletools.genops(raw)):
        # the C unpickler makes room for as many objects as the number says
        if ("PUT" in op.name and int(arg or 0) > count) or op.name.startswith(("EXT", "PERSID", "BINPERSID")):
            raise ValueError(f"{op.name} {arg} in it")


def check_archive(file: Any, size: int) -> None:
    """Refuse a file of torch's that unpacks to more than its size: torch itself compresses nothing.

    Args:
        file: a path, or something to read from.
        size: in bytes.

    Raises:
        ValueError: it is such a file, or none of torch's archives.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is no archive of torch's ({error})") from error
    if sum(m.file_size for m in members) > size or any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise ValueError("it is compressed, which torch's files are not")


def check_tensors(value: Any) -> Any:
    """Return a value; refuse tensors in it that say more elements than lie in the file, such as those of stride 0.

    Raises:
        ValueError: there is one, or one that is not plain memory.
    """
    todo, seen = [value], set[int]()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            plain = item.layout is torch.strided and item.device.type == "cpu" and not item.is_quantized
            if not plain or item.nbytes > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(item.shape)} in it has fewer values than that")
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif isinstance(item, Record):
            todo += vars(item).values()
    return value


def split_path(path: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Return the keys that lead to an optimiser's state, and those within it; None where a path leads to none.

    >>> split_path(("optimizer", "param_groups", 0, "lr"))
    (('optimizer',), ('param_groups', 0, 'lr'))
    >>> split_path(("optimizer.state.a.b.step",))
    (('optimizer',), ('state.a.b.step',))
    >>> split_path(("model", "a.b")) is None
    True
    """
    for i, key in enumerate(path):
        if key in PARTS:
            return path[:i], path[i:]
        if isinstance(key, str) and i == len(path) - 1 and (found := FLAT.fullmatch(key)):
            return (*path[:i], *([found["root"]] if found["root"] else [])), (found["rest"],)
    return None


def part_of(path: tuple[Any, ...]) -> str:
    """Return which part of an optimiser's state a path within it leads to."""
    return str(path[0]).partition(".")[0]


def nested(values: Mapping[tuple[Any, ...], Any]) -> dict[str, Any]:
    """Return values by path as an optimiser's state: a list of groups, and states by name or number.

    Numbers are numbers again: a path has them as texts.
    """
    out: dict[str, Any] = {}
    groups: dict[int, dict[str, Any]] = {}
    for path, value in values.items():
        if len(path) == 3 and path[0] == "param_groups":
            groups.setdefault(int(path[1]), {})[str(path[2])] = value
            continue
        place = out
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    if groups:
        out["param_groups"] = [groups[i] for i in sorted(groups)]
    listed = out.get("param_groups")
    numbered = isinstance(listed, list) and all(
        isinstance(n, int) for g in listed if isinstance(g, dict) for n in g.get("params", ["none"])
    )
    if numbered and isinstance(out.get("state"), dict):
        out["state"] = {int(k) if str(k).isdecimal() else k: v for k, v in out["state"].items()}
    return out


def read_entry(folder: Path, entry: Entry, room: int) -> Any:
    """Return a value of a checkpoint; a tensor is put together of its parts.

    Args:
        folder: of the checkpoint.
        entry: the value.
        room: bytes of all files, which no tensor can exceed.

    Raises:
        ToyError: it cannot be read, or the parts do not make up the tensor.
    """
    name = ".".join(map(str, entry.path))
    where = f"{folder}: {name}"
    if entry.size is None or entry.dtype is None:
        if set(entry.chunks) != {None}:
            raise flag_error(OPTIMIZER, f"{where} is in none of its files")
        return load_chunk(folder, entry.chunks[None], where)
    if prod(entry.size) * entry.dtype.itemsize > room or any(n < 0 for n in entry.size):
        raise flag_error(OPTIMIZER, f"{where} has shape {entry.size}, more than its files hold")
    out = torch.zeros(entry.size, dtype=entry.dtype)
    covered = torch.zeros(entry.size, dtype=torch.bool)
    for offset, size in entry.parts.items():
        at = tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))
        # torch's own index of a tensor in one piece has no offset
        chunk = entry.chunks.get(offset, entry.chunks.get(None) if len(entry.parts) == 1 else None)
        if chunk is None:
            raise flag_error(OPTIMIZER, f"{where}: its part at {offset} is in none of its files")
        part = load_chunk(folder, chunk, where)
        if not isinstance(part, Tensor) or part.shape != out[at].shape or bool(covered[at].any()):
            raise flag_error(OPTIMIZER, f"{where}: its part at {offset} does not fit")
        out[at], covered[at] = part, True
    if not bool(covered.all()):
        raise flag_error(OPTIMIZER, f"{where}: its parts do not cover it; is a rank's file missing?")
    return out


def chunk_file(folder: Path, chunk: Chunk, where: str) -> Path:
    """Return the file of a chunk.

    Raises:
        ToyError: it is not there.
    """
    file = folder / str(chunk.file)
    if Path(str(chunk.file)).name != str(chunk.file) or not file.is_file():
        raise flag_error(OPTIMIZER, f"{where}: its file {chunk.file} is not there")
    return file


def load_chunk(folder: Path, chunk: Chunk, where: str) -> Any:
    """Return what lies at some place of a checkpoint's files; nothing is unpickled but tensors and plain values.

    Raises:
        ToyError: it cannot be read so.
    """
    file = chunk_file(folder, chunk, where)
    try:
        with file.open("rb") as opened:
            opened.seek(chunk.start)
            raw = opened.read(max(0, chunk.length))
        check_archive(io.BytesIO(raw), len(raw))
        return check_tensors(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it holds a pickled {found[1]}, which could run code" if found else error_text(error)
        raise flag_error(OPTIMIZER, f"{where} cannot be read: {why}") from error
