"""The tables of a learned score: its error by level, and every sampler with it and with the exact distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scipy import stats

from lightning_toys.mirror_descent.energy import EVALUATION_LEVELS
from lightning_toys.stats import NOT_NEGATIVE, format_estimate, mean_ci, paired_difference

EXACT_SUFFIX = "_exact"  # of the labels of samplers with the closed form
JOINT_PARAMETERS = 5  # of a Gaussian of (a, s')

Metrics = Mapping[str, Sequence[float]]  # one value a replica


def score_table(metrics: Metrics) -> list[str]:
    """Return the score's relative error at each level, by seed, as lines of Markdown.

    Args:
        metrics: ``score_error@ABAR`` of every level.
    """
    lines = ["| abar | relative error of the score, by seed |", "|---:|---|"]
    for abar in EVALUATION_LEVELS:
        errors = ", ".join(f"{e:.4f}" for e in metrics[f"score_error@{abar:g}"])
        lines.append(f"| {abar:g} | {errors} |")
    return lines


def sampler_table(metrics: Metrics, names: Sequence[str], seeds: Sequence[int], chains: int) -> list[str]:
    """Return every sampler's distances with the learned energy and with the exact distribution, as lines of Markdown.

    Args:
        metrics: ``joint_kl``, ``action_kl`` and ``cond_ratio`` of each sampler, and ``joint_kl`` of each ``_exact``.
        names: the samplers, without the suffix.
        seeds: of the replicas; the two are paired by them.
        chains: of each sampler and seed. Of independent exact draws 2 chains KL is chi-squared with 5 degrees of
            freedom (Wilks), which is the last column's p.
    """
    lines = ["| sampler | joint KL, learned | joint KL, exact distribution | difference | action KL, learned |"
             " Var(s' given a), ratio, learned | p of exact draws, learned |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name in names:
        learned, exact = (dict(zip(seeds, metrics[f"joint_kl@{n}"], strict=True)) for n in (name, name + EXACT_SUFFIX))
        paired = paired_difference(learned, exact)
        cells = [format_estimate(mean_ci(list(v.values())), limits=NOT_NEGATIVE) for v in (learned, exact)]
        cells.append(format_estimate(paired.estimate) if paired else f"{learned[seeds[0]] - exact[seeds[0]]:.2g}")
        both = ("action_kl", "cond_ratio")
        cells += [format_estimate(mean_ci(list(metrics[f"{k}@{name}"])), limits=NOT_NEGATIVE) for k in both]
        cells.append(f"{stats.chi2.sf(2 * chains * sum(learned.values()), JOINT_PARAMETERS * len(learned)):.2g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
