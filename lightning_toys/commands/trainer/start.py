"""What a process does before it trains: which imports it saves, what it silences, what memory it keeps."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from typing import Any

KEEP = "LIGHTNING_TOYS_TEXT_METRICS"  # set to 1 by whoever wants torchmetrics' BERTScore or CLIPScore in a run


@contextmanager
def without_text_metrics() -> Iterator[None]:
    """Let torchmetrics, which Lightning imports, not find transformers, and so leave out what needs it.

    torchmetrics imports transformers for its text metrics as soon as it is installed, which costs every command more
    than a CPU second. It asks for the version of the package; for the time of the import the answer is that there is
    none. transformers itself can be imported as ever, and update_entropy does.
    """
    if "torchmetrics" in sys.modules or os.environ.get(KEEP) == "1":
        yield
        return
    import lightning_utilities.core.imports as imports

    requirements: Any = imports
    known = requirements._version

    def version(name: str) -> str:
        if name == "transformers":
            raise PackageNotFoundError(name)
        found: str = known(name)
        return found

    requirements._version = version
    try:
        yield
    finally:
        requirements._version = known


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without garbage collections, and leave out what was imported from those to come.

    Modules stay as long as the process does. Python would look through their half a million objects several times
    while they are imported, and again at every full collection of a run. Where Lightning is there already nothing is
    done: a process that has begun holds more than modules.
    """
    if "lightning.pytorch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def silence_lightning() -> None:
    """Silence Lightning's advertisements; what a user has to know is said by us."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what was asked for is said
    # it would have the state of before the step saved, which ours are not meant to be
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    # lightning asks torch's pytree under an old name
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
    # LightningCLI calls jsonargparse by names that version 5 drops; hence our pin below 5
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # loaders without workers are the point here
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # a test of a run that a Timer watched has no use for one
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory.*exists and is not empty.*")


def prepare() -> None:
    """Import Lightning the quick way, silence it, keep freed memory, and take one thread unless told otherwise."""
    with without_text_metrics(), without_collections():
        import lightning.pytorch  # noqa: F401
    import torch

    silence_lightning()  # after the import, which sets the loggers' levels

    from lightning_toys.training.allocator import keep_freed_memory

    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        # small matrices gain little from more, and lose a hundredfold where two runs share the cores
        torch.set_num_threads(1)
