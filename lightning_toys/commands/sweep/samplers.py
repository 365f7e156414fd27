"""A search's sampler and pruner: Optuna's by a short name, or any class of theirs or yours by its path."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_toys.errors import ToyError, did_you_mean

PACKAGES = {"cmaes": "cmaes", "gp": "scipy"}  # what a sampler needs beside Optuna


def grid_space(space: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """Return a grid's values: the choices, and integers from low to high.

    Raises:
        ToyError: there is no end to an axis's values.
    """
    found = {}
    for flag, axis in space.items():
        if "choices" not in axis and not axis["int"]:
            raise ToyError(f"--search.sampler: grid is not allowed with the range of --search.{flag}; give choices")
        found[flag] = axis.get("choices") or list(range(axis["low"], axis["high"] + 1))
    return found


def grid_sampler(space: dict[str, dict[str, Any]], seed: int) -> Any:
    """Return Optuna's grid without its end: trials are as many as there are points, and no loop of Optuna's runs."""
    from optuna.samplers import GridSampler

    class Grid(GridSampler):
        def after_trial(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Grid(grid_space(space), seed=seed)


# by (seed of a trial, settings); a design that is fixed in advance takes the search's seed
SAMPLERS: dict[str, Callable[[int, dict[str, Any]], Any]] = {
    "tpe": lambda key, s: optuna_class("optuna.samplers.TPESampler")(seed=key),
    "cmaes": lambda key, s: optuna_class("optuna.samplers.CmaEsSampler")(seed=key, warn_independent_sampling=False),
    "random": lambda key, s: optuna_class("optuna.samplers.RandomSampler")(seed=key),
    "grid": lambda key, s: grid_sampler(s["space"], s["seed"]),
    "gp": lambda key, s: optuna_class("optuna.samplers.GPSampler")(seed=key, warn_independent_sampling=False),
}

# by the step of the first validation
PRUNERS: dict[str, Callable[[int], Any]] = {
    "none": lambda first: optuna_class("optuna.pruners.NopPruner")(),
    "median": lambda first: optuna_class("optuna.pruners.MedianPruner")(),
    "hyperband": lambda first: optuna_class("optuna.pruners.HyperbandPruner")(min_resource=max(1, first)),
}


def optuna_class(path: str) -> Any:
    """Return a class by its path.

    Raises:
        ImportError: there is no such module.
        AttributeError: it has no such class.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_samplers(settings: dict[str, Any]) -> None:
    """Refuse a sampler or pruner that there is not, or whose package is not installed.

    Raises:
        ToyError: one is not.
    """
    for flag, known, base in (("sampler", SAMPLERS, "samplers.BaseSampler"), ("pruner", PRUNERS, "pruners.BasePruner")):
        name = settings[flag]
        if name in known:
            package = PACKAGES.get(name, "optuna")
            if importlib.util.find_spec(package) is None:
                raise ToyError(f"--search.{flag}: {name} needs {package}: pip install {package}")
            continue
        refused = f"--search.{flag}: {name!r} is not allowed"
        if "." not in name:
            raise ToyError(
                f"{refused}; give one of {', '.join(known)}, or a class by its path{did_you_mean(name, list(known))}"
            )
        try:
            found = optuna_class(name)
            fits = isinstance(found, type) and issubclass(found, optuna_class(f"optuna.{base}"))
            if fits:
                found()
        except Exception as error:
            why = " ".join(str(error).split())[:160]
            raise ToyError(f"{refused} ({why}); give the path of a class that needs no arguments") from None
        if not fits:
            raise ToyError(f"{refused}; it is no optuna.{base}")


def sampler_of(settings: dict[str, Any], index: int, begun: int, last: Any) -> Any:
    """Return what samples a trial.

    A named sampler is made anew for each, seeded by (search, trial): a search that was cut off goes on as it would
    have. One by its path is made once for a driver; its ``seed``, if it takes one, is of (search, trials so far).

    Args:
        settings: the search's.
        index: the trial's number.
        begun: trials in the study.
        last: the sampler of the trial before; None if it is the driver's first.
    """
    name = settings["sampler"]
    if name in SAMPLERS:
        return SAMPLERS[name](key_of(settings["seed"], index), settings)
    if last is not None:
        return last
    kind = optuna_class(name)
    try:
        return kind(seed=key_of(settings["seed"], begun))
    except TypeError:
        return kind()


def key_of(seed: int, index: int) -> int:
    """Return a seed of its own for each trial."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def pruner_of(settings: dict[str, Any], first: int) -> Any:
    """Return what judges a trial after a validation.

    Args:
        settings: the search's.
        first: the optimiser step of a trial's first validation.
    """
    name = settings["pruner"]
    return PRUNERS[name](first) if name in PRUNERS else optuna_class(name)()
