"""The experiment's class that a configuration names, and the folder that its runs go to."""

from __future__ import annotations

import importlib

from lightning_toys.errors import ToyError
from lightning_toys.training.module import ToyModule


def experiment_class(class_path: str) -> type[ToyModule]:
    """Return an experiment's class.

    Raises:
        ToyError: the class is none of ours.
    """
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if not isinstance(kind, type) or not issubclass(kind, ToyModule) or kind.build is ToyModule.build:
        raise ToyError(f"--model: {class_path} is not an experiment: give a class with ToyModule for its base")
    return kind
