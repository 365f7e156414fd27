"""bilevel's control: does value-aware model learning use the state that its model predicts?"""

from __future__ import annotations

import numpy as np
from scipy import stats as scipy_stats

from gallery.read import entries, short, table
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.agents import (
    FAILED,
    LABELS,
    PARTS,
    SEARCHES,
    STEPS,
    chance_words,
    check_rates,
    iqm,
    permutation_p,
    rates_table,
    scores,
    words_of,
)
from lightning_toys.stats import holm

# what each pair differs in: the predicted state; its gradient; what the model is trained for
PART_PAIRS = (("vaml_still", "vaml_residual"), ("vaml_reward", "vaml"), ("vaml", "mle"))
PART_SCORED = f"[{','.join(map(str, range(10, 46)))}]"  # 36: a margin of 50 needs about 35
TUNED = ("mle", "vaml", *PARTS)
MARGIN = 50.0  # of equivalence, of 500
PART = {
    name: Run(
        name=f"control_parts_{name}",
        commands=(f"{words_of(name, '8', PART_SCORED)} --trainer.max_steps {STEPS[0]}",),
        folder=f"bilevel/control_parts/{name}",
        seeds="10 to 45",
        minutes=5,
        quick=None,
        may_diverge=True,
        keeps=True,
    )
    for name in TUNED
}
SEARCH_RUNS = [SEARCHES[name].name for name in TUNED]


def within_p(a: np.ndarray, b: np.ndarray, margin: float) -> float:
    """Return the p-value of two one-sided Welch tests: that the means differ by less than a margin."""
    gap = abs(float(a.mean() - b.mean()))
    if max(np.ptp(a), np.ptp(b)) == 0:  # all seeds at the ceiling: there is no spread to test against
        return 0.0 if gap < margin else 1.0
    tests = [
        scipy_stats.ttest_ind(a + margin, b, equal_var=False, alternative="greater"),
        scipy_stats.ttest_ind(a - margin, b, equal_var=False, alternative="less"),
    ]
    return max(float(t.pvalue) for t in tests)


def part_scores(at: Folders) -> dict[str, np.ndarray]:
    """Return each seed's return by agent, of the runs of 36 seeds; without those that went non-finite."""
    check_rates(at, TUNED)
    found = {name: scores(at, run) for name, run in PART.items()}
    return {name: x for name, x in found.items() if x is not None}


def part_table(at: Folders) -> str:
    """Return vaml beside vaml without a predicted state, and without that state's gradient."""
    found = part_scores(at)
    rows = []
    for name in PART:
        x = found.get(name)
        shown = [FAILED, "", ""] if x is None else [iqm(x), f"{x.mean():.0f}", " ".join(f"{v:.0f}" for v in x)]
        rows.append([LABELS[name], *shown])
    return table("agent | interquartile mean | mean | each seed", rows)


def part_questions(at: Folders) -> str:
    """Return the pairs of the parts: the difference of means, p of it, and p of equivalence: two families of three."""
    found = part_scores(at)
    pairs = [(a, b) for a, b in PART_PAIRS if a in found and b in found]
    differ = holm([permutation_p(tuple(found[a].tolist()), tuple(found[b].tolist())) for a, b in pairs]).tolist()
    alike = holm([within_p(found[a], found[b], MARGIN) for a, b in pairs]).tolist()
    rows = []
    for (a, b), p, q in zip(pairs, differ, alike, strict=True):
        x, y = found[a], found[b]
        gap = f"{x.mean() - y.mean():.0f}"
        if max(np.ptp(x), np.ptp(y)) > 0:  # else all seeds are at the ceiling
            ci = scipy_stats.ttest_ind(x, y, equal_var=False).confidence_interval()
            gap += f" ({ci.low:.0f} to {ci.high:.0f})"
        verdict = [("lower" if x.mean() < y.mean() else "higher")] if p < 0.05 else []
        verdict += ["within 50"] if q < 0.05 else []
        words = ", ".join(verdict) or "undecided"
        rows.append([LABELS[a], LABELS[b], gap, chance_words(x, y, p), short(f"{q:.2g}"), words])
    head = "agent | minus | difference of means (95 %) | P(above), p of a difference | p of within 50 | verdict"
    return table(head, rows, left=2)


RECIPE = Recipe(
    name="agents_parts",
    runs=tuple(PART.values()),
    tables=(
        *entries(SEARCH_RUNS, {"agents.parts.rates": lambda at: rates_table(at, TUNED)}),
        *entries(
            [*SEARCH_RUNS, *(run.name for run in PART.values())],
            {"agents.parts": part_table, "agents.parts.differences": part_questions},
        ),
    ),
)
