"""What a probe has worked out so far, on disk: a probe of a large model that is cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.update_entropy.estimators import Scores


def digest(*parts: Any) -> str:
    """Return a key of plain values: the same question has the same key."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a key of tensors' very bytes."""
    out = hashlib.blake2b(digest_size=12)
    for name, t in sorted(tensors.items()):
        out.update(name.encode())
        out.update(array(t.detach().reshape(-1).view(torch.uint8)).tobytes())  # NumPy has no bf16
    return out.hexdigest()


class Memo:
    """Scores of passes over evaluation sequences, a file each, written whole.

    Args:
        folder: where they are kept; None keeps nothing.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path | None = None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.earlier = {p.name for p in folder.glob("*.npz")} if folder is not None and folder.exists() else set[str]()
        self.found = 0  # of an earlier run; responses that are alike share their passes in any case

    def scores(self, key: Callable[[], Sequence[Any]], like: Scores, work: Callable[[], Scores]) -> Scores:
        """Return what ``work`` gives, from disk if an earlier run of the same question left it there.

        Args:
            key: gives the question, plain values; not asked where nothing is kept.
            like: scores of the same sequences: mask, prompts and device.
            work: the pass itself.
        """
        if self.folder is None:
            return work()
        path = self.folder / f"{digest(*key())}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as kept:
                logp, h = (torch.from_numpy(kept[k]).to(like.logp) for k in ("logp", "entropy"))
            self.found += path.name in self.earlier
            return Scores(logp, h, like.mask, like.prompt)
        out = work()
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            with partial.open("wb") as f:
                np.savez(f, logp=array(out.logp), entropy=array(out.entropy))
            partial.replace(path)
        return out

    def forget(self) -> None:
        """Remove what was kept: the probe is done, and its findings are written."""
        if self.folder is not None and self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)


def array(x: Tensor) -> np.ndarray:
    """Return a tensor as an array."""
    out: np.ndarray = x.detach().cpu().numpy()
    return out
