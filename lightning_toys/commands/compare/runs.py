"""The runs of a comparison: found, read, grouped by target and labelled."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_toys.commands.experiments import public_name
from lightning_toys.commands.settings import flatten, short_name
from lightning_toys.commands.strict_yaml import strict_load
from lightning_toys.errors import ToyError, printable
from lightning_toys.training.files import read_text
from lightning_toys.training.results import is_main
from lightning_toys.training.results_format import read_results

MAX_KEYS = 4  # settings that a run's name spells out
UNUSED = object()  # in the place of a setting that does nothing
MOST_CONFIG_BYTES = 2**22


@dataclass(frozen=True)
class Run:
    """One results.json.

    Attributes:
        folder: where it lies.
        label: what tells it from the others of its group.
        content: what it says.
        group: what tells its target from others'; empty where all runs have one. Errors on different targets are
            answers to different questions: they get a table each, and no differences.
        settings: its flat model and data settings.
    """

    folder: Path
    label: str
    content: dict[str, Any]
    group: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tells it from all others."""
        return f"{self.group}, {self.label}" if self.group else self.label

    def seeds_of(self, metric: str) -> list[int]:
        """Return the seeds that a metric was measured of, those whose value is not finite too."""
        return list(self.content["seeds"]) if metric in self.content["metrics"] else []

    def left_out(self, metric: str) -> str:
        """Return how many of a metric's values are finite, such as `` (2 of 4)``; nothing where all are."""
        found, seeds = len(self.values(metric)), len(self.seeds_of(metric))
        return f" ({found} of {seeds})" if found < seeds else ""

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric's finite values by seed; empty where the run lacks it."""
        found = self.content["metrics"].get(metric)
        if found is None:
            return {}
        return {s: float(v) for s, v in zip(self.content["seeds"], found["values"], strict=True) if v is not None}

    @property
    def main_metrics(self) -> list[str]:
        """The configured readout's metrics, those of single outputs and modes left out."""
        return [m for m in self.content["metrics"] if is_main(m)]

    @property
    def headline(self) -> list[str]:
        """The metrics whose every readout is worth a table."""
        return list(self.content.get("headline", ["l2"]))

    @property
    def error_metrics(self) -> list[str]:
        """The metrics that are positive and differ by factors; none in results that do not say so."""
        return list(self.content.get("error_metrics", []))

    def label_of(self, metric: str) -> str:
        """Return a metric's name for an axis."""
        return str(self.content.get("metric_labels", {}).get(metric, metric))

    def readouts(self, metric: str) -> list[str]:
        """Return the readouts that a metric is known of, names like ``zeros/euler-9``."""
        return [m.removeprefix(f"{metric}@") for m in self.content["metrics"] if m.startswith(f"{metric}@")]


def natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts version_10 after version_2."""
    words = re.split(r"(\d+)", str(path))
    return [(int(w), "") if w.isdigit() and len(w) < 18 else (0, w) for w in words]


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Return the results.json of each run folder named, or of all below a folder named, each once.

    Raises:
        ToyError: a path does not exist, or holds no results.
    """
    out: dict[str, Path] = {}
    for path in paths:
        if not os.path.exists(path):  # Path's raises where a name is too long
            raise ToyError(f"compare: no file or folder {str(path)!r}")
        own = path / "results.json"
        found = [own] if os.path.isfile(own) else [path]
        if os.path.isdir(path) and found == [path]:
            found = sorted(path.rglob(own.name), key=natural)
        if not found:
            raise ToyError(f"compare: no results.json in {path}; run `test` first")
        for file in found:
            out.setdefault(os.path.realpath(file), file)
    return list(out.values())


def settings(folder: Path) -> dict[str, Any]:
    """Return a run's flat model and data settings, of its config.yaml."""
    loaded = whole_config(folder)
    return flatten({k: loaded.get(k) for k in ("model", "data")}) if loaded else {}


def whole_config(folder: Path) -> dict[str, Any]:
    """Return what a run's config.yaml says; nothing where there is none.

    Raises:
        ToyError: it cannot be read, or is no configuration.
    """
    config = folder / "config.yaml"
    if not os.path.lexists(config):
        return {}
    try:
        loaded = strict_load(read_text(config, MOST_CONFIG_BYTES))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ToyError(f"compare: {config} cannot be read ({reason(error)})") from None
    if not isinstance(loaded, dict):
        raise ToyError(f"compare: {config} is not a configuration")
    return loaded


def reason(error: Exception) -> str:
    """Return what an error says, on one line; of a file system's without the name of the file."""
    said = getattr(error, "strerror", None) or error
    return printable(" ".join(str(said).split()))[:160]


def load_runs(files: Sequence[Path]) -> list[Run]:
    """Read the runs and label each by the settings in which they differ.

    Raises:
        ToyError: a file is no results.json of this project, or the runs are of different experiments.
    """
    contents = []
    for file in files:
        try:
            contents.append(read_results(file))
        except (ValueError, OSError) as error:
            raise ToyError(f"compare: {file} is not a results.json of lightning_toys ({reason(error)})") from None
        check_module(file, contents[-1])
    experiments = sorted({c["experiment"] for c in contents})
    if len(experiments) > 1:
        shown = ", ".join(x[:60] for x in experiments[:6])
        raise ToyError(f"compare: the runs are of different experiments: {shown}")
    flat = [in_use(c.get("settings") or settings(f.parent), c) for f, c in zip(files, contents, strict=True)]
    asked = questions(flat, contents)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, s in enumerate(flat):
        groups.setdefault(tuple(repr(s.get(k)) for k in asked), []).append(i)
    out: list[Run] = []
    for name, members in zip(group_names(asked, [flat[m[0]] for m in groups.values()]), groups.values(), strict=True):
        labels = labels_of([files[i] for i in members], [contents[i] for i in members], [flat[i] for i in members])
        out += [Run(files[i].parent, x, contents[i], name, flat[i]) for i, x in zip(members, labels, strict=True)]
    return out


def in_use(settings: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings, :data:`UNUSED` for those that do nothing in it: a name would say what is not so."""
    unused: list[str] = content.get("unused", [])  # one that ends in a dot stands for all below it
    below = tuple(name for name in unused if name.endswith("."))
    return {k: UNUSED if k in unused or (below and k.startswith(below)) else v for k, v in settings.items()}


def questions(flat: Sequence[dict[str, Any]], contents: Sequence[dict[str, Any]]) -> list[str]:
    """Return the settings by which runs differ in what they were asked, as any of their modules says.

    Results that do not say (those of 0.1.0) are asked something else by another target.
    """
    named = {name for content in contents for name in content.get("question_settings", ["data.target"])}
    below = tuple(f"{name}." for name in named)
    return [k for k in differing(flat) if k in named or k.startswith(below)]


def check_module(file: Path, content: dict[str, Any]) -> None:
    """Refuse results that name a module of ours that there is not.

    Raises:
        ToyError: names the file.
    """
    module = content.get("module", "")
    if module.startswith("lightning_toys.") and not public_name(module):
        why = f"module {module[:60]!r} is no experiment of lightning_toys"
        raise ToyError(f"compare: {file} is not a results.json of lightning_toys ({why})")


def differing(flat: Sequence[dict[str, Any]]) -> list[str]:
    """Return the settings that are not the same in all runs in which they do something."""
    keys = dict.fromkeys(k for s in flat for k in s)
    return [k for k in keys if len({repr(s.get(k)) for s in flat if s.get(k) is not UNUSED}) > 1]


def words(settings: dict[str, Any], keys: Sequence[str]) -> str:
    """Return some settings as a name."""
    found = {k: short_name(settings[k]) for k in keys if settings.get(k, UNUSED) is not UNUSED}
    plain = (".mode", ".kind", ".target")
    return " ".join(str(v) if k.endswith(plain) else f"{k.split('.')[-1]}={v}" for k, v in found.items())


def group_names(keys: Sequence[str], flat: Sequence[dict[str, Any]]) -> list[str]:
    """Return as few words as tell the groups apart; nothing where there is one group."""
    for n in range(len(keys) + 1):
        names = [words(s, keys[:n]) for s in flat]
        if len(set(names)) == len(flat):
            return names
    return [str(i) for i in range(len(flat))]


def labels_of(files: Sequence[Path], contents: Sequence[dict[str, Any]], flat: Sequence[dict[str, Any]]) -> list[str]:
    """Label runs by the settings in which they differ."""
    keys = [k for k in differing(flat) if not k.startswith("model.evaluation.test_") and k != "model.seeds"]
    own = [str(content.get("label", "")) for content in contents]
    if "model" in keys and all(own) and len(set(own)) == len(own):
        return own  # of different classes, what each calls itself
    # of runs that differ in much, such as in their model, the settings would be no name
    spelt = len(keys) <= MAX_KEYS
    labels = [
        (spelt and words(s, keys)) or content.get("label") or file.parent.name
        for file, content, s in zip(files, contents, flat, strict=True)
    ]
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} ({place})" for label, place in zip(labels, places([f.parent for f in files]), strict=True)]


def places(folders: Sequence[Path]) -> list[str]:
    """Return as much of the end of each path as tells them apart."""
    absolute = [Path(os.path.abspath(f)) for f in folders]
    for n in range(1, max(len(f.parts) for f in absolute)):
        names = ["/".join(f.parts[-n:]) for f in absolute]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in absolute]
