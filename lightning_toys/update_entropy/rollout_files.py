"""Files of responses that somebody's policy has given: token ids or texts, rewards or advantages, log-probabilities.

JSONL has an object a line, Parquet a row a response with lists of ids. npz has arrays with a row a response, ids padded
with -1 (the form of a probe's own sequences.npz, whose advantages are read where they came with its batch, and else
made anew of the rewards: the loss and its scale may be others now). Columns, by any of their names:

    prompt_ids (or prompt: a text or messages), response_ids or completion_ids (or response, completion: a text),
    reward, advantage or advantages, old_logp or old_per_token_logps, group or prompt_number
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_toys.errors import MOST, ToyError, one_line, require
from lightning_toys.training import parquet_files
from lightning_toys.update_entropy.data import Messages, encode_chat
from lightning_toys.update_entropy.prompt_data import LARGEST_FILE, is_messages, read_rows
from lightning_toys.update_entropy.sequences import Sequences
from lightning_toys.update_entropy.task import Tokenizer

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt_ids", "prompt"),
    "response": ("response_ids", "completion_ids", "response", "completion"),
    "reward": ("reward",),
    "advantage": ("advantage", "advantages"),
    "old_logp": ("old_logp", "old_per_token_logps"),
    "group": ("group", "prompt_number"),
}
PADDED = ("prompt_ids", "response_ids", "completion_ids")  # arrays that end in -1


@dataclass(frozen=True)
class RolloutRow:
    """A response of a file.

    Attributes:
        prompt: token ids, a text, or messages.
        response: token ids or a text.
        reward: NaN where there is none.
        advantage: None where there is none.
        old_logp: of each token; None where there is none.
        group: what responses of one prompt have in common; None where the prompt itself tells.
    """

    prompt: list[int] | str | Messages
    response: list[int] | str
    reward: float = math.nan
    advantage: float | None = None
    old_logp: list[float] | None = None
    group: str | None = None


def read_rollouts(source: str, flag: str) -> list[RolloutRow]:
    """Return the responses of a JSONL, Parquet or npz file.

    Args:
        source: path.
        flag: that gave it, for errors.

    Raises:
        ToyError: names the file, the line or row, and what is wrong with it.
    """
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    require(
        kind in (".jsonl", ".npz", parquet_files.SUFFIX),
        f"{flag}: {source} is not read; give .jsonl (an object a line), {parquet_files.SUFFIX} or .npz (arrays with a "
        "row a response)",
    )
    raw = npz_rows(path, flag) if kind == ".npz" else read_rows(path, flag)
    if kind == parquet_files.SUFFIX:
        raw = ((i, row) for i, (_, row) in enumerate(raw, 1))
    rows, columns = [], set[str]()
    for number, row in raw:
        where = f"{flag}: {source} {'line' if kind == '.jsonl' else 'row'} {number}"
        present = {k for k, names in COLUMNS.items() if any(row.get(n) is not None for n in names)}
        for name in ("prompt", "response"):
            require(name in present, f"{where} has no {' or '.join(COLUMNS[name])}")
        columns = columns or present
        if odd := sorted(columns ^ present):
            has = "has" if odd[0] in present else "has no"
            raise ToyError(f"{where} {has} {odd[0]}, unlike the first")
        rows.append(as_row(row, where))
    require(len(rows) >= 2, f"{flag}: {source} has {len(rows)} responses; give two or more")
    return rows


def as_row(row: dict[str, Any], where: str) -> RolloutRow:
    """Return a response of plain values, checked; ``where`` is the file and the row, for errors."""
    found: dict[str, Any] = {
        k: next((row[n] for n in names if row.get(n) is not None), None) for k, names in COLUMNS.items()
    }
    prompt, response = found["prompt"], found["response"]
    messages = is_messages(prompt)
    for name, value in (("prompt", prompt), ("response", response)):
        text = isinstance(value, str) and bool(value.strip() if name == "prompt" else value)
        ids = isinstance(value, list) and len(value) > 0 and all(type(i) is int and 0 <= i < MOST for i in value)
        require(
            text or ids or (messages and name == "prompt"),
            f"{where}: its {name} is neither a text nor token ids; give a list of integers >= 0, not empty",
        )
    numbers = {name: found[name] for name in ("reward", "advantage")}
    for name, value in numbers.items():
        fine = value is None or (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
        require(fine, f"{where}: its {name} is {str(value)[:40]}; give a finite number")
    old = found["old_logp"]
    if old is not None:
        require(
            isinstance(response, list), f"{where}: old_logp of a text is not allowed; give the response's token ids"
        )
        count = f"{len(old)} numbers" if isinstance(old, list) else type(old).__name__
        require(
            isinstance(old, list) and len(old) == len(response),
            f"{where}: its old_logp has {count}, its response {len(response)} tokens; give one for each",
        )
        fine = all(isinstance(x, int | float) and math.isfinite(x) and x <= 1e-3 for x in old)  # 0, but for rounding
        require(fine, f"{where}: its old_logp is not allowed; give finite numbers, at most 0")
    return RolloutRow(
        prompt, response, math.nan if numbers["reward"] is None else float(numbers["reward"]),
        None if numbers["advantage"] is None else float(numbers["advantage"]),
        None if old is None else [float(x) for x in old], None if found["group"] is None else str(found["group"]),
    )  # fmt: skip


def npz_rows(path: Path, flag: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield row number and columns of each response of an npz file, as plain values; nothing in it is unpickled.

    Raises:
        ToyError: it is no such file, or its arrays do not fit each other.
    """
    require(path.is_file(), f"{flag}: {path} is not there; give a .jsonl, .parquet or .npz file")
    require(path.stat().st_size <= LARGEST_FILE, f"{flag}: {path} is larger than 1 GiB; give a part of it")
    wanted = [n for names in COLUMNS.values() for n in names]
    ids = {"prompt": PADDED[:1], "response": PADDED[1:]}
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            for name, names in ids.items():
                require(any(n in file.files for n in names), f"{flag}: {path} has no {' or '.join(names)} ({name})")
            # of a probe's own file the texts lie beside the ids
            texts = ("prompt", "response", "completion")
            arrays = {n: file[n] for n in wanted if n in file.files and n not in texts}
            # its advantages are a loss's work on the rewards, unless they came with its batch
            own = {"advantage_given", "influence"} & set(file.files)
            if own and not ("advantage_given" in own and file["advantage_given"].all()):
                arrays.pop("advantage", None)
            unknown = [n for n, a in arrays.items() if a.dtype.kind == "f" and bool(np.isnan(a).all())]
            arrays = {n: a for n, a in arrays.items() if n not in unknown}  # rewards that a probe did not know
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise ToyError(f"{flag}: {path} is no npz file of numbers: {one_line(error)[:120]}") from None
    count = len(next(iter(arrays.values()))) if arrays else 0
    for name, array in arrays.items():
        two = name in PADDED or name in COLUMNS["old_logp"]
        fits = (
            array.ndim == 1 + two and array.dtype.kind in ("iu" if name in PADDED else "fiuU") and len(array) == count
        )
        shape = f"shape {array.shape} of {array.dtype}"
        require(fits, f"{flag}: {path}: {name} has {shape}; give ({count}{', L' if two else ','}) of numbers")
    for i in range(count):
        row: dict[str, Any] = {n: a[i].tolist() for n, a in arrays.items()}
        for name in PADDED:
            if name in row:
                row[name] = [x for x in row[name] if x != -1]
        response = next(row[n] for n in PADDED[1:] if n in row)
        for name in COLUMNS["old_logp"]:
            if name in row:
                row[name] = row[name][: len(response)]
        yield i, row


def to_sequences(rows: Sequence[RolloutRow], tokenizer: Tokenizer) -> Sequences:
    """Return responses as token ids; a text response gets the token that ends a text.

    Args:
        rows: of a file.
        tokenizer: of the model.
    """
    prompts, responses = [], []
    for row in rows:
        p, r = row.prompt, row.response
        if isinstance(p, str):
            prompts.append(tokenizer.encode(p))
        else:
            prompts.append(encode_chat(tokenizer, p) if is_messages(p) else [int(i) for i in p])  # type: ignore[arg-type]
        responses.append([*tokenizer.encode(r), tokenizer.eos_token_id] if isinstance(r, str) else r)
    names: dict[str, int] = {}
    groups = [
        names.setdefault(str(p) if row.group is None else row.group, len(names))
        for row, p in zip(rows, prompts, strict=True)
    ]
    return Sequences(
        prompts, responses, groups, [row.reward for row in rows],
        [row.advantage for row in rows if row.advantage is not None],
        [row.old_logp for row in rows if row.old_logp is not None],
    )  # fmt: skip
