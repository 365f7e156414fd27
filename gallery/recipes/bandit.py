"""generative_policy's bandit and MultiGoal: what is owed to a class of policies, to its update, and to the critic?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from gallery.read import Content, Make, adjusted, between, difference, entries, estimate, results, short, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.verdicts import p_words
from lightning_toys.stats import PairedDifference, format_estimate

CONFIG = "-c configs/generative_policy"
POLICIES = {
    "gaussian": "Gaussian, SAC",
    "gaussian_mirror": "Gaussian, mirror descent",
    "meanflow": "SMFP, one step",
    "flow": "flow, 8 Euler steps",
}
CRITICS = ("learned", "known")


def study(name: str, words: str, minutes: float) -> dict[str, Run]:
    """Return a sweep with both critics by policy: eight seeds, each kept by itself, cells of one folder."""
    folder = name.replace("_", "-")
    return {
        policy: Run(
            name=f"{name}_{policy}",
            commands=(
                f"sweep {CONFIG}/{words} --grid.model.policy '[{policy}]' --grid.model.critic '[{','.join(CRITICS)}]' "
                f"--run.variant {folder}",
            ),
            folder=f"generative_policy/{folder}",
            seeds="0 to 7",
            minutes=minutes,
            quick=None,
            keeps=True,
            cells=f"policy={policy},critic=*",
        )
        for policy in POLICIES
    }


CONTROLS = study("bandit_controls", "bandit.yaml", 12)
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
    minutes=15,
    quick=None,
    keeps=True,
)
# asked after the table was seen: how much of SAC's regret is the weight of its entropy
ALPHA = Run(
    name="bandit_alpha",
    commands=(
        f"fit {CONFIG}/bandit.yaml --model.policy gaussian --model.entropy 0.005 --run.variant bandit-alpha "
        "--run.name small",
    ),
    folder="generative_policy/bandit-alpha",
    seeds="0 to 7",
    minutes=6,
    quick=None,
    keeps=True,
)
EQUAL = study("bandit_equal", "bandit.yaml --data.heights '[1,1,1]'", 12)
MULTIGOAL = study("multigoal_sweep", "multigoal.yaml", 30)
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


def cells(at: Folders, runs: Mapping[str, Run]) -> Cells:
    """Return the results of a study by policy and critic."""
    return {(p, c): results(at[run.name] / f"policy={p},critic={c}") for (p, run), c in product(runs.items(), CRITICS)}


def change(at: Folders, name: str) -> Content:
    """Return the results of a change."""
    return results(at[CHANGED.name] / name)


def said(content: Content, metric: str) -> str:
    """Write a metric's mean and half of its 95 % interval, of which there is none where all seeds agree."""
    found = values(content, metric) if metric in content["metrics"] else []
    if len(set(found)) > 1:
        return short(estimate(content, metric))
    return short(f"{found[0]:.3g}") if found else "-"


def share_and_seeds(content: Content, metric: str) -> str:
    """Write the mean of a share, and of how many seeds it is above one half: an interval would leave [0, 1]."""
    found = values(content, metric)
    return f"{short(f'{np.mean(found):.2f}')} ({sum(x > 0.5 for x in found)} of {len(found)})"


def levels(runs: Mapping[str, Run], metrics: Mapping[str, str], reference: str, at: Folders) -> str:
    """Return the table of a sweep's metrics, and its reference rows."""
    found = cells(at, runs)
    write = {m: share_and_seeds if m.startswith("share_mode") else said for m in metrics}
    rows = [[POLICIES[p], critic, *(write[m](content, m) for m in metrics)] for (p, critic), content in found.items()]
    references = next(iter(found.values()))["references"]
    for name, row in references.items():
        if name.startswith(reference):
            known = [short(f"{row[m]:.3g}") if row.get(m) is not None else "-" for m in metrics]
            rows.append([f"reference: {name.replace('_', ' ')}", "-", *known])
    return table(f"policy | critic | {' | '.join(metrics.values())}", rows, left=2)


def difference_table(what: str, found: Mapping[str, PairedDifference]) -> str:
    """Return a row of each question; all of them are one family."""
    rows = [
        [name, short(format_estimate(d.estimate)), p_words(p)]
        for (name, d), p in zip(found.items(), adjusted(found.values()), strict=True)
    ]
    return table(f"{what}, paired by seed | mean ± half of the 95 % interval | p (Holm)", rows)


def answers(at: Folders, runs: Mapping[str, Run], metric: str) -> dict[str, PairedDifference]:
    """Return the differences of a metric that a study's questions ask for."""
    by = cells(at, runs)
    return {name: difference(by[a], by[b], metric) for name, (a, b) in QUESTIONS.items()}


def bandit_questions(at: Folders) -> str:
    """Return the bandit's differences of regret: class, update, critic, and one thing changed at a time."""
    by, found = cells(at, CONTROLS), answers(at, CONTROLS, "regret")
    for name, (policy, _, label) in CHANGES.items():
        found[f"{label} minus {POLICIES[policy]}"] = difference(change(at, name), by[policy, "learned"], "regret")
    return difference_table("difference of regret", found)


BANDIT = {
    "regret": "regret",
    "share_mode0": "on the best hill (in seeds)",
    "off": "off every hill",
    "effective_hills": "hills",
    "critic_evaluations": "critic evaluations",
}
GOALS = {
    "soft_gap": "soft return below the optimum",
    "return": "return",
    "goal_tv": "goals: total variation",
    "reached": "reached",
    "entropy_gap": "entropy below the optimum",
    "critic_error": "critic's error",
}


def controls_table(at: Folders) -> str:
    """Return the bandit's policies with both critics."""
    return levels(CONTROLS, BANDIT, "uniform", at)


def equal_table(at: Folders) -> str:
    """Return the policies where all hills are equally high; none of them is the best."""
    by_hill = {f"share_mode{k}": f"hill {k + 1} (in seeds)" for k in range(3)}
    metrics = {"regret": "regret", **by_hill, "off": "off every hill", "effective_hills": "hills"}
    return levels(EQUAL, metrics, "uniform", at)


def equal_hills(at: Folders) -> str:
    """Write the least and the greatest number of hills acted on at a state, each cell's mean over seeds."""
    return between([float(np.mean(values(r, "effective_hills"))) for r in cells(at, EQUAL).values()], 2)


def equal_regret(policy: str) -> Make:
    """Return what writes a policy's regret on equal hills with the known critic."""
    return lambda at: said(cells(at, EQUAL)[policy, "known"], "regret")


def equal_questions(at: Folders) -> str:
    """Return the differences of the effective number of hills, where all are equally high."""
    return difference_table("difference of the effective number of hills", answers(at, EQUAL, "effective_hills"))


def without_noise(text: str) -> str:
    """Name the one-step policy as MultiGoal has it: its configuration gives it no noise."""
    return text.replace(POLICIES["meanflow"], "SMFP without noise, one step")


def multigoal_table(at: Folders) -> str:
    """Return MultiGoal's policies with both critics, the optimum and uniform actions."""
    return without_noise(levels(MULTIGOAL, GOALS, "", at))


def multigoal_questions(at: Folders) -> str:
    """Return MultiGoal's differences of the gap to the optimum's soft return."""
    return without_noise(difference_table("difference of soft_gap", answers(at, MULTIGOAL, "soft_gap")))


def multigoal_later(at: Folders) -> str:
    """Return what was asked after the table was seen: policies by mirror descent beside SAC's Gaussian."""
    by = cells(at, MULTIGOAL)
    rows = []
    for critic, policy in product(CRITICS, ("meanflow", "flow")):
        d = difference(by[policy, critic], by["gaussian", critic], "soft_gap")
        name = f"{POLICIES[policy]} minus {POLICIES['gaussian']}, critic {critic}"
        rows.append([name, short(format_estimate(d.estimate)), p_words(d.p_value)])
    head = "asked afterwards: difference of soft_gap | mean ± half of the 95 % interval | p, not adjusted"
    return without_noise(table(head, rows))


def on_a_lower_hill(critic: str) -> Make:
    """Return what writes in how many seeds SAC's Gaussian has a regret as great as the second hill's top or more."""

    def write(at: Folders) -> str:
        content = cells(at, CONTROLS)["gaussian", critic]
        tops = sorted(row["regret"] for name, row in content["references"].items() if "top_of_hill" in name)
        found = values(content, "regret")
        return f"{sum(x >= tops[1] for x in found)} of {len(found)}"  # the second hill's top; the first has no regret

    return write


def changed_by(name: str) -> Make:
    """Return what writes the difference of regret that a change makes, without its p."""
    return lambda at: short(
        format_estimate(
            difference(change(at, name), cells(at, CONTROLS)[CHANGES[name][0], "learned"], "regret").estimate
        )
    )


def small_alpha(at: Folders) -> Content:
    """Return SAC's Gaussian with a tenth of the entropy's weight."""
    return results(at[ALPHA.name] / "small")


def on_the_best_hill(content: Content) -> str:
    """Write in how many seeds a policy acts on the best hill at most states."""
    found = values(content, "share_mode0")
    return f"{sum(x > 0.5 for x in found)} of {len(found)}"


def regret_on_the_best(content: Content) -> str:
    """Write the least and the greatest regret of the seeds that act on the best hill."""
    pairs = zip(values(content, "regret"), values(content, "share_mode0"), strict=True)
    return between([regret for regret, share in pairs if share > 0.5], 3)


def small_alpha_minus(policy: str) -> Make:
    """Return what writes the regret of SAC with the small weight less that of a policy with the learned critic."""
    return lambda at: short(
        format_estimate(difference(small_alpha(at), cells(at, CONTROLS)[policy, "learned"], "regret").estimate)
    )


def seeds_between(policy: str, critic: str) -> Make:
    """Return what writes a policy's least and greatest regret."""
    return lambda at: between(values(cells(at, CONTROLS)[policy, critic], "regret"), 3)


DPI = 110


def episodes(at: Folders) -> str:
    """Draw episodes of one seed of each policy with the learned critic, two in a row: legible on a narrow page."""
    from lightning_toys.generative_policy.multigoal_figures import draw_trajectories
    from lightning_toys.plotting import new_figure

    by = cells(at, MULTIGOAL)
    figure, axes = new_figure(2, 2, size=(5.4, 5.6), sharex=True, sharey=True)
    for ax, (policy, label) in zip(axes.flat, POLICIES.items(), strict=True):
        draw_trajectories(ax, np.array(by[policy, "learned"]["arrays"]["trajectories"]), without_noise(label))
    for ax in axes[0]:
        ax.set_xlabel("")
    for ax in axes[:, 0]:
        ax.set_ylabel("state 2")
    path = at[MULTIGOAL["gaussian"].name] / "episodes.png"
    figure.savefig(path, dpi=DPI)
    return str(path)


def regrets(at: Folders) -> str:
    """Draw the regret of each seed by policy and critic, and what the tops of the lower hills have."""
    from lightning_toys.plotting import COLOURS, GREY, new_figure

    by = cells(at, CONTROLS)
    figure, axes = new_figure(size=(5.4, 3.6))
    ax, places = axes[0, 0], np.arange(len(POLICIES))
    for k, (critic, marker) in enumerate(zip(CRITICS, "os", strict=True)):
        for place, policy in zip(places, POLICIES, strict=True):
            found = values(by[policy, critic], "regret")
            at_x = place + 0.3 * (k - 0.5) + np.linspace(-0.06, 0.06, len(found))
            label = f"critic {critic}" if place == 0 else None
            ax.plot(at_x, sorted(found), marker, color=COLOURS[k], markersize=4, label=label)
    tops = [row["regret"] for name, row in by["gaussian", "learned"]["references"].items() if "top_of_hill" in name]
    for k, top in enumerate(sorted(tops)[1:]):
        ax.axhline(top, color=GREY, linestyle="--", linewidth=1, label="top of a lower hill" if k == 0 else None)
    ax.set_yscale("log")
    ax.set_xticks(places, [label.replace(", ", ",\n") for label in POLICIES.values()], fontsize=9)
    ax.set_ylabel("regret of an action, by seed")
    ax.legend(frameon=False, fontsize=8)
    path = at[CONTROLS["gaussian"].name] / "regrets.png"
    figure.savefig(path, dpi=DPI)
    return str(path)


CONTROL_RUNS, EQUAL_RUNS, MULTIGOAL_RUNS = ([run.name for run in x.values()] for x in (CONTROLS, EQUAL, MULTIGOAL))
RECIPE = Recipe(
    name="bandit",
    runs=(*CONTROLS.values(), CHANGED, ALPHA, *EQUAL.values(), *MULTIGOAL.values()),
    figures=entries(CONTROL_RUNS, {"bandit_regrets": regrets})
    + entries(MULTIGOAL_RUNS, {"multigoal_episodes": episodes}),
    numbers=entries([*CONTROL_RUNS, CHANGED.name], {f"bandit.change.{name}": changed_by(name) for name in CHANGES})
    + entries(
        [ALPHA.name],
        {
            "bandit.alpha.regret": lambda at: said(small_alpha(at), "regret"),
            "bandit.alpha.best": lambda at: on_the_best_hill(small_alpha(at)),
        },
    )
    + entries(
        [CHANGED.name],
        {
            "bandit.auto.best": lambda at: on_the_best_hill(change(at, "temperature")),
            "bandit.auto.regret": lambda at: regret_on_the_best(change(at, "temperature")),
        },
    )
    + entries(
        EQUAL_RUNS,
        {f"bandit.equal.regret.{p}": equal_regret(p) for p in ("meanflow", "gaussian_mirror")},
    )
    + entries(
        [*CONTROL_RUNS, ALPHA.name],
        {f"bandit.alpha.minus.{p}": small_alpha_minus(p) for p in ("gaussian", "gaussian_mirror", "meanflow", "flow")},
    )
    + entries(EQUAL_RUNS, {"bandit.equal.hills": equal_hills})
    + entries(
        CONTROL_RUNS,
        {
            "bandit.lower.learned": on_a_lower_hill("learned"),
            "bandit.lower.known": on_a_lower_hill("known"),
            "bandit.smfp.seeds": seeds_between("meanflow", "learned"),
            "bandit.mirror.seeds": seeds_between("gaussian_mirror", "learned"),
        },
    ),
    tables=(
        *entries(CONTROL_RUNS, {"policy.controls": controls_table}),
        *entries([*CONTROL_RUNS, CHANGED.name], {"policy.controls.differences": bandit_questions}),
        *entries(EQUAL_RUNS, {"policy.equal": equal_table, "policy.equal.differences": equal_questions}),
        *entries(
            MULTIGOAL_RUNS,
            {
                "policy.multigoal": multigoal_table,
                "policy.multigoal.differences": multigoal_questions,
                "policy.multigoal.later": multigoal_later,
            },
        ),
    ),
)
