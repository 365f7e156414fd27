"""What a search may choose from: the ``--search.*`` flags."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from typing import Any

import numpy as np

from lightning_toys.commands.strict_yaml import read_word, write_word
from lightning_toys.commands.sweep.cell import Cell
from lightning_toys.commands.sweep.samplers import check_samplers, grid_space
from lightning_toys.errors import ToyError, did_you_mean

SETTINGS = ("metric", "direction", "trials", "seed", "sampler", "pruner")
DIRECTIONS = ("minimize", "maximize")
KEYS = ("low", "high", "log", "int")
SPACE = "{low: 1e-4, high: 1e-2, log: true}, {low: 1, high: 8, int: true} or {choices: [a, b]}"


def load(text: str) -> Any:
    """Read YAML in which 1e-4 is a number."""
    found = read_word(text)
    if isinstance(found, dict):
        for key in ("low", "high"):
            if isinstance(found.get(key), str):
                with contextlib.suppress(ValueError):
                    found[key] = float(found[key])
    return found


def parse_axis(flag: str, text: str) -> dict[str, Any]:
    """Read what a flag may be.

    Raises:
        ToyError: it is no space.
    """

    def refuse(why: str = "") -> ToyError:
        return ToyError(f"--search.{flag}: {text!r} is not allowed{why}; give {SPACE}")

    found = load(text)
    if not isinstance(found, dict):
        raise refuse()
    if "choices" in found:
        choices = found["choices"]
        if len(found) > 1 or not isinstance(choices, list) or len(choices) < 2:
            raise refuse(", choices are a list of two or more and stand alone")
        words = [write_word(c) for c in choices]
        if len(set(words)) < len(words):
            raise refuse(", two choices are the same")
        return {"choices": words}
    if stray := [k for k in found if k not in KEYS]:
        raise refuse(f", no key {stray[0]!r}")
    low: Any = found.get("low")
    high: Any = found.get("high")
    for key in ("log", "int"):
        if type(found.get(key, False)) is not bool:
            raise refuse(f", {key} is true or false")
    for bound in (low, high):
        if type(bound) not in (int, float) or not np.isfinite(bound):
            raise refuse(", low and high are numbers")
        if found.get("int") and bound != int(bound):
            raise refuse(", low and high are integers where int is true")
    if not low < high:
        raise refuse(", low is to be less than high")
    if found.get("log") and low <= 0:
        raise refuse(", low is to be more than 0 where log is true")
    kind = int if found.get("int") else float
    return {"low": kind(low), "high": kind(high), "log": found.get("log", False), "int": found.get("int", False)}


def parse_search(found: dict[str, str]) -> dict[str, Any]:
    """Read the ``--search.*`` flags.

    Raises:
        ToyError: a flag is unknown, missing or of no use; or optuna is not installed.
    """
    settings: dict[str, Any] = {
        "direction": "minimize",
        "trials": 20,
        "seed": 0,
        "space": {},
        "sampler": "tpe",
        "pruner": "none",
    }
    for name, text in found.items():
        value = load(text)
        if name.startswith(("model.", "data.", "trainer.")):
            if name == "model.seeds":
                raise ToyError("--search.model.seeds: is no setting to search; seeds are what a mean is over")
            settings["space"][name] = parse_axis(name, text)
            continue
        if name not in SETTINGS:
            raise ToyError(
                f"--search.{name}: no such flag; give {', '.join(SETTINGS)}, or a flag of --model, --data or --trainer"
                f"{did_you_mean(name, SETTINGS)}"
            )
        if name == "direction" and text not in DIRECTIONS:
            raise ToyError(f"--search.direction: {text!r} is not allowed; give one of {', '.join(DIRECTIONS)}")
        if name in ("trials", "seed") and (type(value) is not int or value < (name == "trials")):
            raise ToyError(f"--search.{name}: {text!r} is not allowed; give an integer >= {int(name == 'trials')}")
        settings[name] = value if name in ("trials", "seed") else text
    if not settings["space"]:
        raise ToyError(f"--search: give at least one flag to choose, such as --search.model.lr with {SPACE}")
    if "metric" not in settings:
        raise ToyError("--search.metric: is missing; give a metric of results.json, such as l2")
    if importlib.util.find_spec("optuna") is None:
        raise ToyError("--search: optuna is not installed; pip install 'lightning-toys[search]'")
    check_samplers(settings)
    if settings["sampler"] == "grid":
        size = math.prod(len(v) for v in grid_space(settings["space"]).values())
        settings["trials"] = min(settings["trials"], size) if "trials" in found else size
    return settings


def corners(space: dict[str, dict[str, Any]]) -> list[Cell]:
    """Return cells that have each choice and each bound once: what is checked before any work."""
    ends = {k: a.get("choices") or [a["low"], a["high"]] for k, a in space.items()}
    first = {k: values[0] for k, values in ends.items()}
    points = [first, *({**first, k: v} for k, values in ends.items() for v in values[1:])]
    return [Cell("of the search with " + " ".join(w := words(p)), tuple(w)) for p in points]


def words(params: dict[str, Any]) -> list[str]:
    """Write parameters as flags."""
    return [w for k, v in params.items() for w in (f"--{k}", write_word(v))]


def distribution(axis: dict[str, Any]) -> Any:
    """Return an axis as Optuna names it."""
    import optuna.distributions as known

    if "choices" in axis:
        return known.CategoricalDistribution(axis["choices"])
    kind = known.IntDistribution if axis["int"] else known.FloatDistribution
    return kind(axis["low"], axis["high"], log=axis["log"])
