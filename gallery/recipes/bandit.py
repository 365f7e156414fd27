"""generative_policy's bandit and MultiGoal: what is owed to a class of policies, to its update, and to the critic?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from gallery.read import Content, by_seed, entries, results, short, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.verdicts import p_words
from lightning_toys.stats import PairedDifference, format_estimate, holm, mean_ci, paired_difference

CONFIG = "-c configs/generative_policy"
POLICIES = {
    "gaussian": "Gaussian, SAC",
    "gaussian_mirror": "Gaussian, mirror descent",
    "meanflow": "SMFP, one step",
    "flow": "flow, 8 Euler steps",
}
CRITICS = ("learned", "known")
GRID = f"--grid.model.policy '[{','.join(POLICIES)}]'"
BOTH = f"{GRID} --grid.model.critic '[{','.join(CRITICS)}]'"

CONTROLS = Run(
    name="bandit_controls",
    commands=(f"sweep {CONFIG}/bandit.yaml {BOTH} --run.variant bandit-controls",),
    folder="generative_policy/bandit-controls",
    seeds="0 to 7",
    minutes=25,
    quick=None,
    keeps=True,
)
# one thing changed of a policy with the learned critic
CHANGES = {
    "temperature": ("gaussian", "--model.policy gaussian --model.target_entropy -2", "Gaussian, SAC's automatic alpha"),
    "flow_noise": ("flow", "--model.policy flow --model.flow_std 0.03", "flow with SMFP's noise"),
    "no_noise": ("meanflow", "--model.target_std 0", "SMFP without noise"),
}
CHANGED = Run(
    name="bandit_changes",
    commands=tuple(
        f"fit {CONFIG}/bandit.yaml {words} --run.variant bandit-changes --run.name {name}"
        for name, (_, words, _) in CHANGES.items()
    ),
    folder="generative_policy/bandit-changes",
    seeds="0 to 7",
    minutes=10,
    quick=None,
    keeps=True,
)
EQUAL = Run(
    name="bandit_equal",
    commands=(f"sweep {CONFIG}/bandit.yaml --data.heights '[1,1,1]' {BOTH} --run.variant bandit-equal",),
    folder="generative_policy/bandit-equal",
    seeds="0 to 7",
    minutes=25,
    quick=None,
    keeps=True,
)
MULTIGOAL = Run(
    name="multigoal",
    commands=(f"sweep {CONFIG}/multigoal.yaml {BOTH} --run.variant multigoal-sweep",),
    folder="generative_policy/multigoal-sweep",
    seeds="0 to 7",
    minutes=90,
    quick=None,
    keeps=True,
)
# the questions, each a difference of two cells (policy, critic), paired by seed
QUESTIONS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    **{
        f"{POLICIES[p]} minus {POLICIES['gaussian_mirror']}, critic {c}": ((p, c), ("gaussian_mirror", c))
        for c in CRITICS
        for p in ("meanflow", "flow")
    },
    **{
        f"{POLICIES['gaussian_mirror']} minus {POLICIES['gaussian']}, critic {c}": (
            ("gaussian_mirror", c),
            ("gaussian", c),
        )
        for c in CRITICS
    },
    **{f"{label}: critic learned minus known": ((p, "learned"), (p, "known")) for p, label in POLICIES.items()},
}
Cells = Mapping[tuple[str, str], Content]


def cells(at: Folders, run: Run) -> Cells:
    """Return the results of a sweep by policy and critic."""
    return {(p, c): results(at[run.name] / f"policy={p},critic={c}") for p, c in product(POLICIES, CRITICS)}


def change(at: Folders, name: str) -> Content:
    """Return the results of a change."""
    return results(at[CHANGED.name] / name)


def minus(a: Content, b: Content, metric: str) -> PairedDifference:
    """Return a - b of a metric, paired by seed.

    Raises:
        ValueError: fewer than two seeds are shared.
    """
    found = paired_difference(by_seed(a, metric), by_seed(b, metric))
    if found is None:
        raise ValueError(f"{metric}: fewer than two seeds are shared")
    return found


def level_rows(found: Cells, metrics: Sequence[str]) -> list[list[str]]:
    """Return a row of each policy and critic: means with half of their 95 % intervals."""
    rows = []
    for (policy, critic), content in found.items():
        rows.append([POLICIES[policy], critic, *(said(content, m) for m in metrics)])
    return rows


def said(content: Content, metric: str) -> str:
    """Write a metric's mean and half of its 95 % interval, of which there is none where all seeds agree."""
    found = values(content, metric) if metric in content["metrics"] else []
    if len(set(found)) > 1:
        return short(format_estimate(mean_ci(found)))
    return short(f"{found[0]:.3g}") if found else "-"


def levels(run: Run, metrics: Mapping[str, str], reference: str, at: Folders) -> str:
    """Return the table of a sweep's metrics, and its reference rows."""
    found = cells(at, run)
    rows = level_rows(found, list(metrics))
    references = next(iter(found.values()))["references"]
    for name, row in references.items():
        if name.startswith(reference):
            known = [short(f"{row[m]:.3g}") if row.get(m) is not None else "-" for m in metrics]
            rows.append([f"reference: {name.replace('_', ' ')}", "-", *known])
    return table(f"policy | critic | {' | '.join(metrics.values())}", rows, left=2)


def difference_table(what: str, found: Mapping[str, PairedDifference]) -> str:
    """Return a row of each question; all of them are one family."""
    p_values = holm([d.p_value for d in found.values()])
    rows = [
        [name, short(format_estimate(d.estimate)), p_words(float(p))]
        for (name, d), p in zip(found.items(), p_values, strict=True)
    ]
    return table(f"difference of {what}, paired by seed | mean ± half of the 95 % interval | p (Holm)", rows)


def bandit_questions(at: Folders) -> str:
    """Return the bandit's differences of regret: class, update, critic, and one thing changed at a time."""
    by = cells(at, CONTROLS)
    found = {name: minus(by[a], by[b], "regret") for name, (a, b) in QUESTIONS.items()}
    for name, (policy, _, label) in CHANGES.items():
        found[f"{label} minus {POLICIES[policy]}"] = minus(change(at, name), by[policy, "learned"], "regret")
    return difference_table("regret", found)


def questions(run: Run, metric: str, what: str, at: Folders) -> str:
    """Return a sweep's differences of a metric."""
    by = cells(at, run)
    found = {name: minus(by[a], by[b], metric) for name, (a, b) in QUESTIONS.items()}
    return difference_table(what, found)


BANDIT = {
    "regret": "regret",
    "off": "off every hill",
    "effective_hills": "hills",
    "critic_evaluations": "critic evaluations",
}
GOALS = {
    "soft_gap": "soft return below the optimum",
    "goal_tv": "goals: total variation",
    "reached": "reached",
    "entropy_gap": "entropy below the optimum",
    "critic_error": "critic's error",
}


def controls_table(at: Folders) -> str:
    """Return the bandit's policies with both critics."""
    return levels(CONTROLS, BANDIT, "uniform", at)


def equal_table(at: Folders) -> str:
    """Return the policies where all hills are equally high."""
    return levels(EQUAL, BANDIT, "uniform", at)


def equal_questions(at: Folders) -> str:
    """Return the differences of the effective number of hills, where all are equally high."""
    return questions(EQUAL, "effective_hills", "the effective number of hills", at)


def multigoal_table(at: Folders) -> str:
    """Return MultiGoal's policies with both critics, the optimum and uniform actions."""
    return levels(MULTIGOAL, GOALS, "", at)


def multigoal_questions(at: Folders) -> str:
    """Return MultiGoal's differences of the gap to the optimum's soft return."""
    return questions(MULTIGOAL, "soft_gap", "soft_gap", at)


def episodes(at: Folders) -> str:
    """Draw episodes of one seed of each policy with the learned critic."""
    from lightning_toys.generative_policy.multigoal_figures import draw_side_by_side

    by = cells(at, MULTIGOAL)
    walks = {label: np.array(by[p, "learned"]["arrays"]["trajectories"]) for p, label in POLICIES.items()}
    path = at[MULTIGOAL.name] / "episodes.png"
    draw_side_by_side(walks).savefig(path, dpi=110)
    return str(path)


RECIPE = Recipe(
    name="bandit",
    runs=(CONTROLS, CHANGED, EQUAL, MULTIGOAL),
    tables=(
        *entries([CONTROLS.name], {"policy.controls": controls_table}),
        *entries([CONTROLS.name, CHANGED.name], {"policy.controls.differences": bandit_questions}),
        *entries([EQUAL.name], {"policy.equal": equal_table, "policy.equal.differences": equal_questions}),
        *entries(
            [MULTIGOAL.name], {"policy.multigoal": multigoal_table, "policy.multigoal.differences": multigoal_questions}
        ),
    ),
)
