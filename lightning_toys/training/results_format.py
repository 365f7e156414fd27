"""results.json read back, by somebody who does not believe that a run of ours has written it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_toys.training.files import read_text
from lightning_toys.training.results import is_main

KEYS = ("experiment", "variant", "seeds", "metrics", "references")
MOST_BYTES = 2**28
MOST_METRICS = 500  # of the configured readout: each is a picture
MOST_LEVELS = 32


def read_results(file: Path) -> dict[str, Any]:
    """Return what a results.json holds.

    Raises:
        ValueError: it is none; says why.
        OSError: it cannot be read.
    """
    text = read_text(file, MOST_BYTES)
    try:
        content = json.loads(
            text,
            object_pairs_hook=keys_once,
            parse_constant=Unheld,
            parse_float=parse_number,
            parse_int=parse_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if why := next(unfit_values(content), "") or misshapen(content):
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


class Unheld(float):
    """What a double does not hold as it is written: NaN and Infinity, which JSON lacks, and numbers beyond 1.8e308."""

    word: str

    def __new__(cls, word: str) -> Unheld:
        """Keep the word for the error."""
        self = super().__new__(cls, word)
        self.word = word
        return self

    def told(self) -> str:
        """Return what it is."""
        if self.word.lstrip("-").isdigit():
            return f"an integer of {len(self.word.lstrip('-'))} digits"
        return self.word[:20]


def parse_number(word: str) -> float | int:
    """Return a number as JSON writes it, one that no double reaches as :class:`Unheld`."""
    if math.isinf(float(word)):
        return Unheld(word)
    return int(word) if word.lstrip("-").isdigit() else float(word)


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping; refuse a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"the key {quoted(next(k for k in keys if keys.count(k) > 1))} is given twice")
    return found


def unfit_values(content: Any) -> Iterator[str]:
    """Yield what is wrong with single values, wherever they are: numbers out of range, no text, too deep."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)] if isinstance(content, dict | list) else []
    while waiting:
        path, node = waiting.pop()
        if len(path) > MOST_LEVELS:
            yield f"{place(path[:3])}/... is nested deeper than {MOST_LEVELS} levels"
            return
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(key, str) and not is_text(key):
                yield f"{place((*path, key))} holds half of a surrogate pair, which is no text"
            if isinstance(value, Unheld):
                yield f"{place((*path, str(key)))} is {value.told()}; give a number that a double holds, or null"
            elif isinstance(value, str) and not is_text(value):
                yield f"{place((*path, str(key)))} holds half of a surrogate pair, which is no text"
            elif isinstance(value, dict | list):
                waiting.append(((*path, str(key)), value))


def is_text(word: str) -> bool:
    """Whether a string can be written down."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def place(path: tuple[str, ...]) -> str:
    """Return where a value is."""
    return "/".join(quoted(key)[1:-1] for key in path)


def quoted(word: str) -> str:
    """Return a name for an error: on one line, and not all of a long one."""
    return repr(word if len(word) <= 60 else f"{word[:40]}...{word[-10:]}")


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
    figures = content.get("comparison_figures", "")
    named = figures.rpartition(".")[2] == "compare_figures" and all(map(str.isidentifier, figures.split(".")))
    if figures and not named:
        return f"comparison_figures is {figures[:40]!r}, no function called compare_figures"
    seeds, metrics, references = content["seeds"], content["metrics"], content["references"]
    if not isinstance(seeds, list) or any(type(s) is not int for s in seeds) or len(set(seeds)) < len(seeds):
        return "seeds are no list of different integers"
    if not seeds:
        return "seeds are none: it is a run without replicas"
    if not isinstance(metrics, dict) or not isinstance(references, dict):
        return "metrics or references are no mapping"
    if sum(map(is_main, metrics)) > MOST_METRICS:
        return f"metrics are {len(metrics)}; at most {MOST_METRICS} of the configured readout are compared"
    for name, found in metrics.items():
        values = found.get("values") if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != len(seeds) or not all(map(is_number, values)):
            return f"metric {quoted(name)} has not one value for each seed"
        if is_main(name) and set(name) & set("/\\\0"):  # a picture is called by it
            return f"metric {quoted(name)} has no name for a file"
    for name, row in references.items():
        if not isinstance(row, dict) or not all(map(is_number, row.values())):
            return f"reference {quoted(name)} is no mapping to numbers"
    for key, of in (
        ("headline", "metrics"),
        ("error_metrics", "metrics"),
        ("unused", "settings"),
        ("question_settings", "settings"),
    ):
        named = content.get(key, [])
        if not isinstance(named, list) or not all(isinstance(m, str) for m in named):
            return f"{key} is no list of {of}"
    labels = content.get("metric_labels", {})
    return "" if isinstance(labels, dict) else "metric_labels is no mapping"


def is_number(value: Any) -> bool:
    """Whether a value is a number or missing."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
