"""What a run on a mixture prints: the exact distribution, and a table of each sampler's distances and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_toys.mirror_descent.closed_form_checks import Row, verdict_lines
from lightning_toys.mirror_descent.truth import Truth
from lightning_toys.stats import NO_LIMITS, NOT_NEGATIVE, format_estimate, mean_ci
from lightning_toys.training.results import Report

SHOWN = ("w1", "mode_tv", "moment_kl", "conditional_ks", "reward", "evaluations")  # columns of the table
FIRST = ("weight", "mean", "Q")  # quantities of the exact distribution that are printed


def summary_lines(truth: Truth, report: Report, rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return the lines of facts.md that are printed.

    Args:
        truth: the exact distribution.
        report: has the metrics and arrays of :meth:`MixtureSampling.evaluate`.
        rows: the checks with their verdicts.
        names: of the samplers.
    """
    exact: dict[str, float] = report.arrays["exact"]
    distribution = ", ".join(f"{k} {v:.4g}" for k, v in exact.items() if k.startswith(FIRST))
    lines = [f"Exact distribution ({truth.source}): {distribution}; log Z {truth.log_z:.6g}", ""]
    lines += [f"| sampler | {' | '.join(SHOWN)} |", "|---|" + "---:|" * len(SHOWN)]
    for name in names:
        found = {k: mean_ci(report.metrics[f"{k}@{name}"]) for k in SHOWN[:-1]}
        cells = [format_estimate(e, limits=NO_LIMITS if k == "reward" else NOT_NEGATIVE) for k, e in found.items()]
        lines.append(f"| {name} | {' | '.join(cells)} | {report.metrics[f'evaluations@{name}'][0]:.0f} |")
    for name in ("exact_draws", "untilted"):
        row = report.references[name]
        lines.append(f"| *{name}* | {' | '.join(f'{row[k]:.3g}' if k in row else '-' for k in SHOWN)} |")
    shown = [k for k in exact if k.startswith(FIRST)][:3]
    lines += ["", *verdict_lines(rows, shown)]
    if unknown := [n for n, v in report.arrays["verdicts"].items() if v["implementation"] == "not tested"]:
        lines += [
            "",
            f"Implementation is not tested, the sampler's own distribution is not known: {', '.join(unknown)}.",
        ]
    return lines
