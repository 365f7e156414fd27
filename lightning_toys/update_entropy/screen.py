"""The lines on the screen that a probe ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_toys.update_entropy.controls import REVERSED, STEP, ControlResult
from lightning_toys.update_entropy.estimators import EntropyKind
from lightning_toys.update_entropy.probe_result import EvaluationResult, ProbeResult

NAMED = (("whole", "full"), ("momentum", "momentum"), ("decay", "decay"), ("batch", "grad"))  # on the screen


def entropy_unit(kind: EntropyKind) -> str:
    """Return the unit of an entropy.

    >>> entropy_unit("sequence")
    'nats a sequence'
    """
    return {"token": "nats a token", "sequence": "nats a sequence", "surprisal": "nats a token (surprisal)"}[kind]


def with_error(value: float, se: float) -> str:
    """Return a value with its standard error as text.

    >>> with_error(0.12345, 0.0678)
    '0.1235 ± 0.068'
    """
    return f"{value:.4g} ± {se:.2g}"


def linear_line(e: EvaluationResult) -> str:
    """Return how far the step is linear, as text: eta* with its 95 % interval, or the interval alone."""
    low, high = e.linear_until_interval or (0.0, math.inf)
    between = f"at least {low:.2g}" if math.isinf(high) else f"{low:.2g} to {high:.2g}"
    if e.linear_until is not None:
        return f"linear within a tenth up to eta {e.linear_until:.2g} (95 % interval {between})"
    if low == 0 and math.isinf(high):
        return "how far the step is linear, E does not tell: neither slope nor curvature differs from 0"
    which = "slope" if low == 0 else "curvature"
    return f"linear within a tenth up to an eta whose 95 % interval is {between}: E does not tell the {which} from 0"


def control_lines(controls: ControlResult) -> list[str]:
    """Return the lines on the screen that compare the step with its controls."""
    out = []
    for eta, step in controls.changes[STEP].items():
        random = np.array(controls.random(eta))
        reverse = controls.changes[REVERSED][eta]
        out.append(
            f"  eta {eta:g}, {controls.responses} responses sampled anew: dH {with_error(step.value, step.se)}, "
            f"reversed {with_error(reverse.value, reverse.se)}, {len(random)} random directions "
            f"{random.min():.4g} to {random.max():.4g}"
        )
    return out


def summary_lines(seeds: Sequence[int], results: Sequence[ProbeResult], folder: Path, kind: EntropyKind) -> list[str]:
    """Return the lines on the screen, a few for each replica.

    Args:
        seeds: of the replicas.
        results: of each replica's probe.
        folder: that the files are in.
        kind: which entropy, for its unit.
    """
    out = []
    for seed, result in zip(seeds, results, strict=True):
        e = result.evaluations[0]
        parts = ", ".join(f"{n} {with_error(*e.derivatives[k])}" for n, k in NAMED[1:])
        update_se = f" ± {e.update_se['full']:.2g} (U)" if e.update_se else ""
        h = f"H {with_error(e.entropy.value, e.entropy.se)} {entropy_unit(kind)}"
        out.append(f"seed {seed}: {h}; dH/d eta {with_error(*e.derivatives['full'])}{update_se} ({parts})")
        for eta, w in e.changes["full"].items():
            warning = "; within rounding, no number to trust" if eta in e.within_rounding else ""
            linear = eta * e.derivatives["full"][0]
            out.append(
                f"  eta {eta:g}: dH {with_error(w.change.value, w.change.se)}, linear {linear:.4g}, "
                f"effective sample size {w.ess:.0f} of {len(e.sequences)}{warning}"
            )
        if result.controls is not None:
            out += control_lines(result.controls)
        if e.reward is not None:
            j = ", ".join(f"{n} {with_error(*e.reward.slopes[k])}" for n, k in NAMED)
            out.append(f"  reward {with_error(e.reward.mean.value, e.reward.mean.se)}; dJ/d eta of the same step: {j}")
        closure = f"closure residual {result.residual:.1g}"
        out.append(f"  {linear_line(e)}; {closure}" if e.linear_until_interval else f"  {closure}")
    out += dict.fromkeys(f"the loss that the step is of: {x.update.objective.describe()}" for x in results)
    out.append("(± one standard error of the draws of E; with (U): of those of the update batch)")
    out.append(f"arrays and tables are in {folder}")
    return out
