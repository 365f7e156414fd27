"""The figures that an experiment adds to a comparison of its runs.

results.json names the function (``comparison_figures``: "package.module.function"), so that a comparison imports that
function alone, and where there is none, no experiment at all.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_toys.commands.compare.names import distinct
from lightning_toys.commands.compare.plots import png
from lightning_toys.commands.compare.runs import Run
from lightning_toys.commands.experiments import public_name
from lightning_toys.errors import ToyError, printable
from lightning_toys.plotting import literal, shortened

# results of 0.1.0 name their module's class alone
OLDER = {
    "lightning_toys.generative_policy.GaussianPolicy": "lightning_toys.generative_policy.figures",
    "lightning_toys.generative_policy.MeanFlowPolicy": "lightning_toys.generative_policy.figures",
    "lightning_toys.generative_policy.FlowPolicy": "lightning_toys.generative_policy.figures",
    "lightning_toys.generative_policy.BanditPolicy": "lightning_toys.generative_policy.bandit_figures",
    "lightning_toys.bilevel.WindowRegression": "lightning_toys.bilevel.regression.figures",
    "lightning_toys.bilevel.BilevelControl": "lightning_toys.bilevel.control.figures",
}


def figures_function(content: dict[str, Any]) -> str:
    """Return the full name of the function that draws runs side by side; empty where there is none."""
    named = content.get("comparison_figures")
    if named is None and (place := OLDER.get(public_name(content.get("module", "")))):
        return f"{place}.compare_figures"
    return named or ""


def own_figures(runs: Sequence[Run]) -> tuple[dict[str, bytes], list[str]]:
    """Return the pictures by name that the runs' experiments draw of them, and what there is to say.

    Each function draws the runs that name it. One that is not to be found here is said to be.

    Raises:
        ToyError: a function fails, or returns something else than figures; names it.
    """
    pictures: dict[str, bytes] = {}
    remarks = []
    whose: dict[str, list[Run]] = {}
    for r in runs:
        if name := figures_function(r.content):
            whose.setdefault(name, []).append(r)
    for name, members in whose.items():
        try:
            draw = found_function(name)
        except (ImportError, AttributeError) as error:
            remarks.append(f"no figures by {name}: {printable(' '.join(str(error).split()))[:160]}")
            continue
        try:
            with np.errstate(all="ignore"):
                drawn = dict(draw(labelled(members)))
            pictures |= {str(k): png(figure) for k, figure in drawn.items()}
        except ToyError:
            raise
        except (Exception, SystemExit) as error:  # somebody's own code: whatever it is, it is told in one line
            raise ToyError(failure(name, error)) from None
    return pictures, remarks


def found_function(name: str) -> Any:
    """Import a function by its full name.

    Raises:
        ImportError: there is no such module here.
        AttributeError: the module has no such function.
        ToyError: the module is there, and fails.
    """
    module, _, function = name.rpartition(".")
    if not module:
        raise ImportError("its module is not named")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):
        raise
    except (Exception, SystemExit) as error:
        raise ToyError(failure(name, error)) from None


def labelled(runs: Sequence[Run]) -> dict[str, Path]:
    """Return the run folders by their labels, as matplotlib shows them."""
    out: dict[str, Path] = {}
    for name, r in zip(distinct(shortened(r.name, 80) for r in runs), runs, strict=True):
        label = literal(name)
        while label in out:
            label += " "
        out[label] = r.folder
    return out


def failure(name: str, error: BaseException) -> str:
    """Return what went wrong in somebody's function, and where."""
    at = ""
    if frames := traceback.extract_tb(error.__traceback__)[1:]:  # the first is ours
        own = getattr(sys.modules.get(name.rpartition(".")[0]), "__file__", None)
        place = next((f for f in reversed(frames) if f.filename == own), frames[-1])
        at = f" at {Path(place.filename).name}, line {place.lineno}"
    said = printable(" ".join(str(error).split()))[:160]
    return f"compare: {name} failed{at} ({type(error).__name__}{': ' if said else ''}{said}); nothing was written"
