"""What surrounds a verb: threads without tracebacks, summaries, callbacks that are no settings, W&B's folder."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger

from lightning_toys.errors import OwnershipLostError, process_rank
from lightning_toys.training.files import write_atomic


@contextmanager
def without_writers_traces() -> Iterator[None]:
    """Let TensorBoard's thread end without a traceback where it cannot write: the next row raises its error here."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        told = isinstance(args.exc_value, OSError | OwnershipLostError)
        if not (told and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


summarises: ContextVar[bool] = ContextVar("summarises", default=True)


@contextmanager
def without_summary() -> Iterator[None]:
    """Let a verb end without its line of results: of a sweep's cell, where `test` follows `fit` and says the same."""
    token = summarises.set(False)
    try:
        yield
    finally:
        summarises.reset(token)


more_callbacks: ContextVar[tuple[Callback, ...]] = ContextVar("more_callbacks", default=())


@contextmanager
def with_callbacks(*callbacks: Callback) -> Iterator[None]:
    """Give the verbs run within it callbacks that are no settings. They come last: a checkpoint is written then."""
    token = more_callbacks.set(callbacks)
    try:
        yield
    finally:
        more_callbacks.reset(token)


def keep_in_run_folder(logger: WandbLogger, folder: Path) -> None:
    """Have W&B write into the run's folder, and a resumed run go on in its own W&B run.

    What the user gave (``save_dir``, ``id``) stays. Lightning's logger settles both when it is made, before the
    folder is known; W&B itself begins with the first thing that is logged.
    """
    settings = logger._wandb_init
    if logger._save_dir in (None, "."):
        logger._save_dir = settings["dir"] = str(folder)
    if settings.get("id") is None and process_rank() == 0:
        kept = folder / "wandb-id.txt"
        if not kept.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, uuid.uuid4().hex[:16] + "\n")
        settings["id"] = logger._id = kept.read_text().strip()
