"""results.json: what a run scored, replica by replica, and what it ran on. Written whole or not at all."""

from __future__ import annotations

import json
import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_toys.errors import NonFiniteError, did_you_mean, require
from lightning_toys.stats import A_SHARE, NO_LIMITS, NOT_NEGATIVE, geometric_ci, mean_ci, share_ci
from lightning_toys.training.files import set_aside, write_atomic

PACKAGES = ("lightning-toys", "torch", "lightning", "torchdiffeq", "numpy", "scipy", "scikit-learn", "matplotlib")


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        seeds: the replicas' seeds.
        metrics: name to one value a replica. ``l2`` is the configured readout's, ``l2@zeros/euler-9`` another's;
            ``l2_dim0`` is an output's, ``std_mode0`` a mode's.
        references: reference row to its metrics; a value is the mean over replicas where their data differ.
        arrays: per-interval or per-component profiles, means over replicas, nested lists.
        shares: of metrics that are shares, how many samples each value is of; 1 of what a replica did or did not,
            ``inf`` of a number in [0, 1] that is no share of samples.
    """

    seeds: Sequence[int]
    metrics: dict[str, list[float]]
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def means(self, prefix: str) -> dict[str, float]:
        """Return the mean over replicas of each of the configured readout's metrics, named ``prefix/metric``."""
        return {f"{prefix}/{k}": sum(v) / len(v) for k, v in self.metrics.items() if is_main(k)}


def checked_report(report: Any, who: str, headline: Sequence[str] = ()) -> Report:
    """Return a report whose metrics are lists of one number a replica; tensors and arrays of them become lists.

    Args:
        report: what a module's ``report`` returned.
        who: the module's class, for the error.
        headline: metrics that have to be among them.

    Raises:
        ToyError: names the metric and what is wanted.
    """
    require(isinstance(report, Report), f"{who}.report: a {type(report).__name__} is not allowed; give a Report")
    found: Report = report
    count = len(found.seeds)
    for name, values in found.metrics.items():
        plain: Any = values.tolist() if hasattr(values, "tolist") else values
        fits = isinstance(plain, list | tuple) and len(plain) == count
        fits = fits and all(isinstance(v, int | float) for v in plain)
        given = f"{type(values).__name__} {values!r}"[:60]
        require(fits, f"{who}.report: metric {name!r} is {given}; give a list of {count} numbers, one a seed")
        found.metrics[name] = [float(v) for v in plain]
    for name in headline:
        hint = did_you_mean(name, found.metrics)
        require(name in found.metrics, f"{who}.headline: {name!r} is not among the metrics of report{hint}")
        part = "a metric of a single readout, output or mode"
        require(is_main(name), f"{who}.headline: {name!r} is {part}, which a run does not end with; give another name")
    return found


def check_finite(report: Report, headline: Sequence[str], verb: str) -> None:
    """Refuse to call that a result which is none: weights may be finite and what is computed of them not.

    Raises:
        NonFiniteError: names the metric and the replicas' seeds.
    """
    for name in headline:
        values = zip(report.seeds, report.metrics.get(name, []), strict=False)
        if wrong := [seed for seed, value in values if not math.isfinite(value)]:
            raise NonFiniteError(f"the results of {verb} are not finite: {name} in the replicas of seeds {wrong}")


def part_of(metric: str) -> str:
    """Return ``dim`` or ``mode`` where a metric, of whatever readout, is of a single output or mode; else nothing.

    >>> part_of("l2_dim0"), part_of("std_mode12@zeros/euler-9"), part_of("found_modes"), part_of("l2@own_mode3")
    ('dim', 'mode', '', '')
    """
    found = re.search(r"_(dim|mode)[0-9]+\Z", metric.partition("@")[0])
    return found[1] if found else ""


def is_main(metric: str) -> bool:
    """Whether a metric is the configured readout's, and not that of a single output or mode."""
    return "@" not in metric and not part_of(metric)


def to_json(value: Any) -> Any:
    """Turn NaN and infinity, which JSON lacks, into None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


@cache
def installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the installed version of each package; looked up once in a process."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(device: str) -> dict[str, Any]:
    """Return versions, device, threads and the command."""
    import torch  # whoever reads results, as `compare` does, need not have it

    return {
        "python": platform.python_version(),
        "versions": dict(installed_versions(tuple(PACKAGES))),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def git_state() -> dict[str, Any] | None:
    """Return commit and dirtiness of the checkout that this package lies in; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def limits_of(metric: str, error_metrics: Sequence[str], share: bool) -> tuple[float, float]:
    """Return the least and the greatest value of a metric, of any readout: shares lie in [0, 1], errors are positive.

    >>> limits_of("l2@zeros/euler-9", ["l2"], False), limits_of("off3", [], True), limits_of("reward", [], False)
    ((0.0, inf), (0.0, 1.0), (-inf, inf))
    """
    if share:
        return A_SHARE
    return NOT_NEGATIVE if metric.partition("@")[0] in error_metrics else NO_LIMITS


def limits_in(content: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """Return :func:`limits_of` of a metric of a results.json, as far as it says."""
    return limits_of(metric, content.get("error_metrics", []), "share_ci95" in content["metrics"][metric])


def summarise(values: Sequence[float], count: float = 0) -> dict[str, Any]:
    """Return {"values", "mean", "ci95"} of one metric; of positive values "geometric_mean", "geometric_ci95".

    Of shares of ``count`` samples "share_ci95" too, which lies in [0, 1].
    """
    estimate = mean_ci(values)
    out = {"values": list(values), "mean": estimate.mean, "ci95": [estimate.lo, estimate.hi]}
    geometric = geometric_ci(values)
    if geometric is not None:
        out |= {"geometric_mean": geometric.mean, "geometric_ci95": [geometric.lo, geometric.hi]}
    if count:
        share = share_ci(values, count)
        out["share_ci95"] = [share.lo, share.hi]
    return out


def write_results(
    path: Path, report: Report, experiment: str, variant: str, device: str, extra: Mapping[str, Any]
) -> None:
    """Write ``path`` (results.json) atomically; an older one is kept beside it."""
    content = {
        "experiment": experiment,
        "variant": variant,
        "seeds": list(report.seeds),
        "metrics": {name: summarise(v, report.shares.get(name, 0)) for name, v in report.metrics.items()},
        "references": report.references,
        "arrays": report.arrays,
        **extra,
        "environment": environment(device),
        "git": git_state(),
    }
    text = json.dumps(to_json(content), indent=1) + "\n"  # what cannot be written must not displace what could
    set_aside(path)
    write_atomic(path, text)
