"""mirror_descent on mixtures and under non-quadratic rewards: which sampler at which budget, and how far off?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gallery.read import Content, Make, entries, estimate, figures_of, results, short, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.running import TABLE
from gallery.verdicts import paired_ratio
from lightning_toys.plotting import COLOURS, GREY, MARKERS, new_figure
from lightning_toys.stats import geometric_ci, holm, mean_ci

CONFIG = "-c configs/mirror_descent"
SEEDS = "0 to 3"
QUICK = "--model.chains 4096 --model.seeds '[0,1]'"
COLUMNS = {
    "w1": "W1",
    "mode_tv": "modes: total variation",
    "conditional_ks": "s' given a: KS",
    "reward": "reward",
}
# a tilt that leaves importance weights an effective sample size of .01
STRONG = (
    "mixture.yaml --model.lambda_scale 9 "
    "--model.reward '{class_path: QuadraticReward, init_args: {weights: [1.0, 1.0], optimum: [0.0, 0.0]}}' "
    "--model.samplers '[importance,mala,pc_mala,sde_dps,sde_tfg,sde_h_transform,sde_soft_value,smc_twisted,"
    "smc_tempered,fk_difference,fkc,svdd_8,best_of_8]'"
)
PROBLEMS = {
    "mixture": "mixture.yaml",
    "quartic": "quartic.yaml",
    "step": "quartic.yaml --model.reward Step",
    "strong": STRONG,
}
BUDGETS = "'[0.3,1,3]'"  # with a tenth of the levels guided processes run away
PARTICLES = (64, 256, 1024, 4096)
BY_PARTICLES = ("smc_twisted", "smc_tempered", "fk_difference", "fkc")
QUARTIC = (  # all of quartic.yaml but fkc, which runs away there with less than its 40 levels
    "importance,independence_mh,ula,mala,pc_mala,sde_none,sde_poe,sde_dps,sde_tfg,sde_h_transform,sde_soft_value,"
    "ode_dps,ddim1_dps,smc_twisted,smc_tempered,fk_difference,svdd_8,best_of_8"
)
SMALL = "--model.chains 4096 --model.budget_chains 16384"  # of a run whose frontier alone is shown


def run_of(name: str, words: str, minutes: float) -> Run:
    """Return a `test`, which trains nothing."""
    folder = f"mirror_descent/gallery/{name}"
    return Run(name, (f"test {CONFIG}/{words}",), folder, SEEDS, minutes, QUICK, 1, keeps=True)


MAIN = {name: run_of(f"world_{name}", words, 4) for name, words in PROBLEMS.items()}
FRONTIER = {
    name: run_of(f"frontier_{name}", f"{PROBLEMS[name]} --model.budgets {BUDGETS} {SMALL}{words}", 8)
    for name, words in (("mixture", ""), ("quartic", f" --model.samplers '[{QUARTIC}]'"))
}
MANY = {
    n: run_of(
        f"particles_{n}",
        f"mixture.yaml --model.settings.smc_particles {n} --model.samplers '[{','.join(BY_PARTICLES)}]'",
        1,
    )
    for n in PARTICLES
}
GRID = Run(
    name="guidance_grid",
    commands=("-m lightning_toys.mirror_descent.guidance_grid",),
    folder="mirror_descent/gallery/guidance_grid",
    seeds="none",
    minutes=0.2,
    quick="",
    quick_minutes=0.2,
)
WRONG = Run(
    name="wrong_versions",
    commands=("-m lightning_toys.mirror_descent.wrong_versions",),
    folder="mirror_descent/gallery/wrong_versions",
    seeds=SEEDS,
    minutes=3,
    quick=None,
)


def content_of(at: Folders, run: Run) -> Content:
    """Return a run's results."""
    return results(at[run.name], "test")


def samplers(content: Content) -> list[str]:
    """Return the samplers of a run, in its order."""
    return [name.partition("@")[2] for name in content["metrics"] if name.startswith("evaluations@")]


def problem_table(problem: str) -> Make:
    """Return what writes a problem's samplers: distances, evaluations to a sample, and both verdicts."""

    def make(at: Folders) -> str:
        content, rows = content_of(at, MAIN[problem]), []
        present = [m for m in COLUMNS if f"{m}@{samplers(content)[0]}" in content["metrics"]]
        for name in samplers(content):
            said = [short(estimate(content, f"{m}@{name}")) for m in present]
            verdicts = content["arrays"]["verdicts"][name]
            count = f"{values(content, f'evaluations@{name}')[0]:.0f}"
            rows.append([name, *said, count, verdicts["implementation"], verdicts["goal"]])
        for name in ("exact_draws", "untilted"):
            known = content["references"][name]
            said = [figures_of(known[m], 3) if m in known else "-" for m in present]
            rows.append([f"*{name.replace('_', ' ')}*", *said, "-", "-", "-"])
        heads = " | ".join(COLUMNS[m] for m in present)
        out = table(f"sampler | {heads} | evaluations | implementation | goal", rows)
        if problem == "strong":
            out += f"\n\nEffective sample size of importance weights, of a draw: {ess_fraction(content)}."
        return out

    return make


def best_table(at: Folders) -> str:
    """Return for each budget the sampler of least W1 whose draws all stayed, and those that do not differ from it.

    A budget is the greatest number of evaluations to a sample; a sampler stands there with its best setting within it.
    Difference: the paired t-test of log W1 over seeds, adjusted by Holm over the samplers of a budget.
    """
    rows = []
    for problem in FRONTIER:
        content = content_of(at, FRONTIER[problem])
        exact = figures_of(content["references"]["exact_draws_of_budgets"]["w1"], 2)
        for budget in (10, 30, 100, 300, 1000):
            rows.append([problem, str(budget), *best_at(content["arrays"]["frontier"], budget), exact])
    head = "problem | evaluations, at most | least W1 | its W1 | no significant difference (their W1) | exact draws"
    return table(head, rows, left=3)


def best_at(curves: Content, budget: float) -> list[str]:
    """Return the best sampler of a budget, its geometric mean of W1, and those not significantly worse, with theirs."""
    within: dict[str, dict[int, float]] = {}
    for name, curve in curves.items():
        columns = np.array(curve["w1"], dtype=np.float64).reshape(-1, len(curve["evaluations"]))
        for cost, column in zip(curve["evaluations"], columns.T, strict=True):
            if cost > budget or not np.isfinite(column).all():
                continue
            old = within.get(name)
            if old is None or np.log(column).mean() < np.log(list(old.values())).mean():
                within[name] = dict(enumerate(column.tolist()))
    if not within:
        return ["-", "-", "-"]
    means = {name: float(np.exp(np.log(list(found.values())).mean())) for name, found in within.items()}
    best = min(means, key=means.__getitem__)
    others = [name for name in within if name != best]
    p_values = [paired_ratio(within[name], within[best]).p_value for name in others]
    alike = [name for name, p in zip(others, holm(p_values) if others else [], strict=True) if p >= 0.05]
    said = [f"{name} ({figures_of(means[name], 2)})" for name in alike]
    return [best, figures_of(means[best], 2), ", ".join(said) or "none"]


def particles_table(at: Folders) -> str:
    """Return W1 and the error of Z against the number of particles."""
    rows = []
    for name in BY_PARTICLES:
        for n, run in MANY.items():
            content = content_of(at, run)
            said = [short(estimate(content, f"{m}@{name}")) for m in ("w1", "mode_tv")]
            rows.append([name, str(n), *said, content["arrays"]["verdicts"][name]["goal"]])
    return table("sampler | particles | W1 | modes: total variation | goal", rows)


def wrong_table(at: Folders) -> str:
    """Return the table of wrong versions as the module printed it."""
    text = (at[WRONG.name] / TABLE).read_text().strip()
    said, _, rows = text.partition("\n\n")
    return f"{rows}\n\n{said}"


def grid_table(at: Folders) -> str:
    """Return the table of guidance rules as the module printed it."""
    said, _, rows = (at[GRID.name] / TABLE).read_text().strip().partition("\n\n")
    return f"{said}\n\n{rows}"


def ess_fraction(content: Content) -> str:
    """Return the effective sample size of a run's importance weights, of a draw."""
    return figures_of(mean_ci(values(content, "ess_fraction@importance")).mean, 2)


FAMILIES = (
    ("particles with weights", ("importance", "smc_", "fk", "svdd", "best_of")),
    ("chains", ("mala", "pc_", "ula", "independence")),
    ("guidance", ("sde_", "ode_", "ddim")),
)


def family_of(name: str) -> int:
    """Return which family a sampler is of."""
    return next(k for k, (_, starts) in enumerate(FAMILIES) if name.startswith(starts))


def with_legend(figure: Figure, ax: Axes, path: Path) -> str:
    """Write a figure with the families and the level of exact draws below it; return where."""
    for k, (label, _) in enumerate(FAMILIES):
        ax.plot([], [], MARKERS[k], color=COLOURS[k], label=label)
    ax.plot([], [], color=GREY, ls="--", label="exact draws")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)
    return str(path)


def reward_figure(at: Folders) -> str:
    """Draw W1 against the reward that is reached, each sampler a point with its name, a panel for each problem."""
    from lightning_toys.mirror_descent.figures import label_points

    figure, axes = new_figure(2, 2, size=(12.0, 10.0))
    for ax, (problem, run) in zip(axes.flat, MAIN.items(), strict=True):
        content = content_of(at, run)
        points: list[tuple[float, float, str, str]] = []
        for name in samplers(content):
            error, reward = geometric_ci(values(content, f"w1@{name}")), mean_ci(values(content, f"reward@{name}"))
            if error is None:
                continue
            k = family_of(name)
            x = [[reward.half_width], [reward.half_width]]
            y = [[error.mean - error.lo], [error.hi - error.mean]]
            ax.errorbar([reward.mean], [error.mean], y, x, color=COLOURS[k], marker=MARKERS[k], ms=5, lw=1)
            points.append((reward.mean, error.mean, name, COLOURS[k]))
        exact = content["references"]["exact_draws"]
        ax.axhline(exact["w1"], color=GREY, lw=1, ls="--")
        ax.axvline(exact["reward"], color=GREY, lw=1, ls="--")
        ax.set(yscale="log", xlabel="mean reward of the samples", title=problem)
        low, high = min(p[0] for p in points), max(p[0] for p in points)
        wide = high - low or 1.0
        ax.set_xlim(low - 0.05 * wide, high + 0.45 * wide)  # room for names
        ax.xaxis.set_major_locator(MaxNLocator(6))
        if points:
            label_points(ax, points)
    for ax in axes[:, 0]:
        ax.set_ylabel("W1 to the target, target's SD")
    return with_legend(figure, axes[0, 0], Path(at[MAIN["mixture"].name]) / "reward_frontier.png")


def budgets_figure(at: Folders) -> str:
    """Draw W1 against evaluations, a line a sampler, a panel for each problem."""
    from lightning_toys.mirror_descent.figures import label_points

    figure, axes = new_figure(1, len(FRONTIER), size=(12.0, 5.6))
    for ax, (problem, run) in zip(axes.flat, FRONTIER.items(), strict=True):
        content = content_of(at, run)
        points: list[tuple[float, float, str, str]] = []
        for name, curve in content["arrays"]["frontier"].items():
            k = family_of(name)
            columns = np.array(curve["w1"], dtype=np.float64).reshape(-1, len(curve["evaluations"]))
            kept = [(x, c) for x, c in zip(curve["evaluations"], columns.T, strict=True) if np.isfinite(c).all()]
            found = [(x, geometric_ci(c.tolist())) for x, c in kept]
            shown = [(x, e) for x, e in found if e is not None]
            if not shown:
                continue
            x, mean = [x for x, _ in shown], [e.mean for _, e in shown]
            bars = [[e.mean - e.lo for _, e in shown], [e.hi - e.mean for _, e in shown]]
            ax.errorbar(x, mean, bars, color=COLOURS[k], marker=MARKERS[k], ms=4, lw=0.8, capsize=2)
            points.append((x[-1], mean[-1], name, COLOURS[k]))
        ax.axhline(content["references"]["exact_draws_of_budgets"]["w1"], color=GREY, lw=1, ls="--")
        ax.set(xscale="log", yscale="log", xlabel="evaluations to a sample", title=problem)
        low, high = ax.get_xlim()
        ax.set_xlim(low, high * 12)  # room for names
        if points:
            label_points(ax, points)
    axes[0, 0].set_ylabel("W1 to the target, target's SD")
    return with_legend(figure, axes[0, 0], Path(at[FRONTIER["mixture"].name]) / "budgets.png")


RECIPE = Recipe(
    name="worlds",
    runs=(GRID, WRONG, *MANY.values(), *MAIN.values(), *FRONTIER.values()),
    figures=(
        *entries([run.name for run in MAIN.values()], {"mirror_reward": reward_figure}),
        *entries([run.name for run in FRONTIER.values()], {"mirror_budgets": budgets_figure}),
    ),
    tables=(
        *(
            e
            for problem, run in MAIN.items()
            for e in entries([run.name], {f"mirror.{problem}": problem_table(problem)})
        ),
        *entries([run.name for run in FRONTIER.values()], {"mirror.budgets": best_table}),
        *entries([run.name for run in MANY.values()], {"mirror.particles": particles_table}),
        *entries([WRONG.name], {"mirror.wrong": wrong_table}),
        *entries([GRID.name], {"mirror.grid": grid_table}),
    ),
)
