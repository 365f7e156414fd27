"""Where a run lives: lightning_logs/<experiment>/<variant>/<name>, and how one is found again."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_toys.errors import ToyError, did_you_mean, note, process_rank
from lightning_toys.training.files import make_folder, numbered_names
from lightning_toys.training.ownership import OWNER, PARTIAL, check_owned

RUN_VARIABLE = "LIGHTNING_TOYS_RUN"  # tells a strategy's child processes which folder their parent chose

SWEEP_MARK = "sweep.json"  # in a sweep's cell: what it was started with, and whether it is done


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; nothing is created until something is written.

    Attributes:
        root: usually ``lightning_logs``.
        experiment: package name of the experiment.
        variant: what is run, by default the configuration file's name.
        name: the run's own name, ``version_0``, ``version_1``, ... or the one given.
    """

    root: Path
    experiment: str
    variant: str
    name: str

    @property
    def path(self) -> Path:
        """The folder."""
        return self.root / self.experiment / self.variant / self.name

    @property
    def checkpoints(self) -> Path:
        """Where last.ckpt and best.ckpt are."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Where the PNG files are."""
        return self.path / "figures"

    @property
    def used(self) -> bool:
        """Whether a run has been here."""
        return holds_run(self.path)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds anything of a run; what says who owns it, or was cut off in it, is none."""
    return folder.is_dir() and any(not is_beside(p.name) for p in folder.iterdir())


def is_beside(name: str) -> bool:
    """Whether a name in a run's folder is of something that is not the run's own and stays when it is begun again."""
    kept = name in (SWEEP_MARK, OWNER, "wandb", "wandb-id.txt") or name.startswith(PARTIAL)
    return kept or re.fullmatch(r"cut-\d+", name) is not None


def was_cut_off(folder: Path) -> bool:
    """Whether a folder holds what a `fit` left that ended before its first checkpoint."""
    return holds_run(folder) and not (any(folder.glob("checkpoints/*.ckpt")) or (folder / "results.json").exists())


def clear_cut_off(folder: Path) -> Path:
    """Move what a run that was cut off left in its folder to the folder's next ``cut-1``, ``cut-2``, ..., returned."""
    aside = next(p for p in numbered_names(folder / "cut") if not p.exists())
    make_folder(aside)
    for path in sorted(folder.iterdir()):
        if not is_beside(path.name):
            check_owned(path)
            path.rename(aside / path.name)
    return aside


def versions(folder: Path) -> list[int]:
    """Return the numbers of the version_k folders, ascending."""
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"version_(\d+)", p.name) for p in folder.iterdir() if p.is_dir())
    return sorted(int(m[1]) for m in found if m)


def new_run(root: Path, experiment: str, variant: str, name: str | None) -> RunFolder:
    """Choose the folder of a new run; one whose `fit` ended before its first checkpoint is begun again.

    Raises:
        ToyError: the name is taken.
    """
    if inherited := os.environ.get(RUN_VARIABLE):
        name = inherited
    elif name is None:
        taken = versions(root / experiment / variant)
        name = f"version_{taken[-1] + 1 if taken else 0}"
    elif process_rank() == 0 and (run := RunFolder(root, experiment, variant, name)).used and not was_cut_off(run.path):
        resume = ", or go on with it by --ckpt_path auto" if list(run.checkpoints.glob("*.ckpt")) else ""
        raise ToyError(f"--run.name: {name!r} is taken: {run.path} holds a run; give another name{resume}")
    return RunFolder(root, experiment, variant, name)


def find_run(root: Path, experiment: str, variant: str, name: str | None) -> RunFolder:
    """Return the named run, or the newest of the variant (by when it was last written to).

    Raises:
        ToyError: there is none.
    """
    folder = root / experiment / variant
    runs = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    if name is None:
        runs = [p for p in runs if list((p / "checkpoints").glob("*.ckpt"))]
        if not runs:
            raise ToyError(f"--ckpt_path: no run with a checkpoint in {folder}; run `fit` first, or give a path")
        newest = max(runs, key=lambda p: max(f.stat().st_mtime for f in (p / "checkpoints").glob("*.ckpt")))
        return RunFolder(root, experiment, variant, newest.name)
    if name not in {p.name for p in runs}:
        hint = did_you_mean(name, [p.name for p in runs])
        raise ToyError(f"--run.name: no run {name!r} in {folder}{hint}")
    return RunFolder(root, experiment, variant, name)


def find_or_begin(root: Path, experiment: str, variant: str, name: str | None) -> tuple[Path | None, RunFolder]:
    """Return what ``--ckpt_path auto`` means: the run to go on with and its checkpoint, or a new run and None.

    Without a name it is the variant's newest run. Where last.ckpt cannot be read, the checkpoint that got furthest of
    the others is taken.

    Raises:
        ToyError: there are checkpoints, and none can be read.
    """
    if os.environ.get(RUN_VARIABLE):  # a strategy's child process: its parent chose a new run
        return None, new_run(root, experiment, variant, name)
    folder = root / experiment / variant
    if name is None and folder.is_dir():
        begun = [p for p in folder.iterdir() if holds_run(p)]
        name = max(begun, key=last_written).name if begun else None
    if name is None:
        return None, new_run(root, experiment, variant, None)
    run = RunFolder(root, experiment, variant, name)
    there = list(run.checkpoints.glob("*.ckpt"))
    if not there:
        return None, new_run(root, experiment, variant, name)
    last = run.checkpoints / "last.ckpt"
    if checkpoint_step(last) is not None:
        return last, run
    steps = {p: step for p in there if (step := checkpoint_step(p)) is not None}
    if not steps:
        raise ToyError(f"--ckpt_path: none of {sorted(p.name for p in there)} in {run.checkpoints} can be read")
    furthest = max(steps, key=lambda p: steps[p])
    what = "cannot be read" if last.exists() else "is not there"
    note(f"{last} {what}; going on from {furthest.name}, which is of step {steps[furthest]}")
    return furthest, run


def last_written(folder: Path) -> float:
    """Return when a run's folder was last written to, by its files."""
    return max(
        (p.stat().st_mtime for p in (*folder.glob("*"), *folder.glob("checkpoints/*")) if p.is_file()), default=0
    )


def resolve_checkpoint(
    word: str, root: Path, experiment: str, variant: str, name: str | None, given: Collection[str] = ()
) -> tuple[Path, RunFolder]:
    """Return the checkpoint that ``--ckpt_path`` means, and the folder of the run it belongs to.

    ``last`` and ``best`` are looked for in the named or the newest run; anything else is a path. A checkpoint that
    lies in no run folder of this layout belongs to a folder named after it.

    Args:
        word: ``last``, ``best`` or a path.
        root: of the run folder, as the settings have it.
        experiment: likewise.
        variant: likewise.
        name: likewise, or None.
        given: which of ``root``, ``variant`` and ``name`` the user gave: they beat the folder that a path lies in, so
            that a run can be gone on with, or judged, in a folder of its own.

    Raises:
        ToyError: there is no such file.
    """
    if word in ("last", "best"):
        run = find_run(root, experiment, variant, name)
        path = run.checkpoints / f"{word}.ckpt"
        if not path.is_file():
            there = sorted(p.name for p in run.checkpoints.glob("*.ckpt")) if run.checkpoints.is_dir() else []
            kept = "best.ckpt is kept where the module's best_metric is measured: a shipped one with --data.holdout > 0"
            why = f" ({kept})" if word == "best" else ""
            raise ToyError(f"--ckpt_path: no {word}.ckpt in {run.checkpoints}, which holds {there}{why}")
        return path, run
    path = Path(word)
    if (path / "checkpoints" / "last.ckpt").is_file():  # a run's folder
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise ToyError(f"--ckpt_path: no file {word!r}; give last, best or a path{did_you_mean(word, near)}")
    parents = path.resolve().parents
    if path.resolve().parent.name == "checkpoints" and len(parents) >= 5:
        home = RunFolder(parents[4], parents[3].name, parents[2].name, parents[1].name)
        asked = RunFolder(
            root if "root" in given else home.root,
            home.experiment,
            variant if "variant" in given else home.variant,
            name if "name" in given and name is not None else home.name,
        )
        return path, home if asked.path.resolve() == home.path else asked
    return path, RunFolder(root, experiment, variant, name or path.stem)


def load_checkpoint(path: Path) -> dict[str, object] | str:
    """Load a checkpoint without running code from it; return in words why it cannot be, where it cannot."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut zip, a pickle with code, an image: all the same to the user
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        return f"cannot be read as a checkpoint ({reason})"
    if not isinstance(checkpoint, dict) or "toy" not in checkpoint:
        return "is not a checkpoint of lightning_toys"
    return checkpoint


def read_checkpoint(path: Path) -> dict[str, object]:
    """Load a checkpoint without running code from it.

    Raises:
        ToyError: the file is no checkpoint of this project, or is damaged; names those beside it that are not.
    """
    found = load_checkpoint(path)
    if isinstance(found, str):
        beside = path.parent.glob("*.ckpt") if path.suffix == ".ckpt" else ()
        steps = {p.name: step for p in beside if p != path and (step := checkpoint_step(p)) is not None}
        names = ", ".join(f"{n} (step {steps[n]})" for n in sorted(steps, key=lambda n: -steps[n])[:4])
        raise ToyError(f"--ckpt_path: {path} {found}{f'; beside it can be read: {names}' if names else ''}")
    return found


def checkpoint_step(path: Path) -> int | None:
    """Return the step that a checkpoint is of; None where it cannot be read."""
    found = load_checkpoint(path)
    step = None if isinstance(found, str) else found.get("global_step")
    return step if type(step) is int else None


NAME_BYTES = 200  # file systems allow 255, and names of files beside the folder are made of its own


def check_name(flag: str, name: str) -> None:
    """Refuse a word that is no folder's name.

    Raises:
        ToyError: names the flag.
    """
    size = len(os.fsencode(name)) if name.isprintable() else 0  # a lone surrogate is not, nor is a line's end
    if not size or "/" in name or name in (".", "..") or size > NAME_BYTES:
        shown = repr(name) if len(name) <= 80 else f"{name[:80]!r}..."
        raise ToyError(
            f"{flag}: {shown} is not allowed; give a folder's name, without /, of at most {NAME_BYTES} bytes"
        )


def check_root(word: str) -> None:
    """Refuse a folder that runs cannot be written to."""
    if not word.strip() or "\0" in word:
        raise ToyError(f"--run.root: {word!r} is not allowed; give a folder")
    try:
        there = next(p for p in (Path(word), *Path(word).absolute().parents) if p.exists())
    except OSError as error:  # a name that is too long, a loop of links
        raise ToyError(f"--run.root: {word} is not allowed ({error.strerror}); give a folder") from None
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ToyError(f"--run.root: {word} is not allowed; {there} is no folder that can be written to")
