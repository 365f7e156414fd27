"""results.json read back, by somebody who does not believe that a run of ours has written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_toys.training.results import is_main

KEYS = ("experiment", "variant", "seeds", "metrics", "references")


def read_results(file: Path) -> dict[str, Any]:
    """Return what a results.json holds.

    Raises:
        ValueError: it is none; says why.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(), parse_constant=no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if why := misshapen(content):
        raise ValueError(why)
    found: dict[str, Any] = content
    return found


def results_step(folder: Path) -> int | None:
    """Return the step that a run's results.json is of; None where there is none, or no whole one."""
    try:
        step = read_results(folder / "results.json").get("step")
    except (ValueError, OSError):
        return None
    return step if isinstance(step, int) else None


def no_number(word: str) -> float:
    """Refuse NaN and Infinity, which JSON lacks and which are written as null."""
    raise ValueError(f"{word} is no number of JSON's")


def misshapen(content: Any) -> str:
    """Return what is wrong with the contents of a results.json, empty if nothing is."""
    if not isinstance(content, dict):
        return "it is no mapping"
    if absent := [k for k in KEYS if k not in content]:
        return f"{', '.join(absent)} is missing"
    for key, kind in (
        ("experiment", str),
        ("variant", str),
        ("label", str),
        ("module", str),
        ("comparison_figures", str),
        ("settings", dict),
    ):
        if key in content and not (isinstance(content[key], kind) or (key == "settings" and content[key] is None)):
            return f"{key} is {str(content[key])[:40]!r}"
    if content.get("comparison_figures", "").rpartition(".")[2] not in ("", "compare_figures"):
        return f"comparison_figures is {content['comparison_figures'][:40]!r}, no function called compare_figures"
    seeds, metrics, references = content["seeds"], content["metrics"], content["references"]
    if not isinstance(seeds, list) or any(type(s) is not int for s in seeds) or len(set(seeds)) < len(seeds):
        return "seeds are no list of different integers"
    if not isinstance(metrics, dict) or not isinstance(references, dict):
        return "metrics or references are no mapping"
    for name, found in metrics.items():
        values = found.get("values") if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != len(seeds) or not all(map(is_number, values)):
            return f"metric {name!r} has not one value for each seed"
        if is_main(name) and set(name) & set("/\\\0"):  # a picture is called by it
            return f"metric {name!r} has no name for a file"
    for name, row in references.items():
        if not isinstance(row, dict) or not all(map(is_number, row.values())):
            return f"reference {name!r} is no mapping to numbers"
    headline, labels = content.get("headline", []), content.get("metric_labels", {})
    if not isinstance(headline, list) or not all(isinstance(m, str) for m in headline):
        return "headline is no list of metrics"
    return "" if isinstance(labels, dict) else "metric_labels is no mapping"


def is_number(value: Any) -> bool:
    """Whether a value is a number or missing."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
