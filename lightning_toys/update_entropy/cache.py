"""A probe's finished forward passes on disk, so that a probe of a large model that is interrupted can resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.training.files import make_folder, whole_file
from lightning_toys.update_entropy.estimators import Scores


def digest(*parts: Any) -> str:
    """Return a hash of plain values, 24 hexadecimal digits.

    >>> digest([1, 2], "a") == digest((1, 2), "a") != digest([2, 1], "a")
    True
    """
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names and bytes of tensors, 24 hexadecimal digits."""
    out = hashlib.blake2b(digest_size=12)
    for name in sorted(tensors):
        out.update(name.encode())
        out.update(to_numpy(tensors[name].detach().reshape(-1).view(torch.uint8)).data)  # NumPy has no bf16
    return out.hexdigest()


class ScoreCache:
    """Scores of forward passes over evaluation sequences, each in a file that is written atomically.

    Args:
        folder: of the files; None keeps nothing.
        writes: whether this process is the one that writes.

    Attributes:
        hits: passes found that an earlier, interrupted run had left.
    """

    def __init__(self, folder: Path | None = None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        kept = folder is not None and folder.exists()
        self.existing_files = {p.name for p in folder.glob("*.npz")} if folder is not None and kept else set[str]()
        self.hits = 0  # files of this run, which sequences that are alike share, do not count

    def get_or_compute(
        self,
        keys: Sequence[Callable[[], Sequence[Any]]],
        like: Scores,
        compute: Callable[[list[int]], Sequence[Scores]],
    ) -> list[Scores]:
        """Return the scores of several passes, those that are on disk from there.

        Args:
            keys: for each pass what returns plain values that tell it from others; not called where nothing is kept.
            like: scores of the same sequences, for mask, prompts, dtype and device.
            compute: returns those that are not on disk, by their places in ``keys``.
        """
        if self.folder is None:
            return list(compute(list(range(len(keys)))))
        paths = [self.folder / f"{digest(*key())}.npz" for key in keys]
        wanted = [i for i, path in enumerate(paths) if not path.exists()]
        made = dict(zip(wanted, compute(wanted), strict=True)) if wanted else {}
        out = []
        for i, path in enumerate(paths):
            if i in made:
                self.keep(path, made[i])
                out.append(made[i])
                continue
            with np.load(path, allow_pickle=False) as kept:
                logp, h = (torch.from_numpy(kept[k]).to(like.logp) for k in ("logp", "entropy"))
            self.hits += path.name in self.existing_files
            out.append(Scores(logp, h, like.mask, like.prompt_index))
        return out

    def keep(self, path: Path, scores: Scores) -> None:
        """Write the scores of a pass, where this process is the one that writes."""
        if self.writes:
            make_folder(path.parent)
            with whole_file(path) as f:
                np.savez(f, logp=to_numpy(scores.logp), entropy=to_numpy(scores.entropy))

    def clear(self) -> None:
        """Remove the files: the probe is complete, and its results are written."""
        if self.folder is not None and self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array on the CPU, detached."""
    out: np.ndarray = x.detach().cpu().numpy()
    return out
