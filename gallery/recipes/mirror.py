"""mirror_descent: which samplers reach an exactly known tilted distribution?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scipy import stats

from gallery.read import Content, by_seed, entries, figures_of, fixed, ratio, results, short, spread_to, table, values
from gallery.recipe import Folders, Recipe, Run
from lightning_toys.mirror_descent.energy import EVALUATION_LEVELS
from lightning_toys.mirror_descent.learned_table import EXACT_SUFFIX as EXACT
from lightning_toys.mirror_descent.learned_table import JOINT_PARAMETERS, sampler_table
from lightning_toys.stats import NOT_NEGATIVE, format_estimate, holm, mean_ci, paired_difference

CONFIG = "-c configs/mirror_descent/analytic.yaml"
SEEDS = "0 to 3"
SHOWN = {  # rows of facts.md that the page shows
    "importance": "mean, ess_fraction, Z / exact Z",
    "independence_mh": "mean, var",
    "ula": "mean, var",
    "mala": "mean, var",
    "gibbs": "mean, var, lag-1 autocorrelation",
    "pc_ula": "mean, var",
    "pc_mala": "mean, var, cond_ratio",
    "pc_joint_mala": "mean, var, slope, cond_ratio",
    "sde_poe": "mean, slope",
    "sde_tfg": "mean",
    "sde_h_transform": "mean, var",
    "ode_poe": "slope, cond_ratio",
    "smc_twisted": "mean, var, cond_ratio, Z / exact Z",
}
MOST_OFF = 3  # rows of the largest |z| that it shows beside those
GUIDED: dict[str, tuple[str, ...]] = {"Linear": ("sde_poe", "sde_dps", "sde_tfg", "sde_h_transform", "ode_poe")}
GUIDED["Constant"] = ("sde_poe", "sde_dps", "sde_tfg", "ode_poe")


def sampling(name: str, words: str, minutes: float, seeds: str = SEEDS, quick: str = "--model.chains 8192") -> Run:
    """Return a `test`, which trains nothing."""
    return Run(name, (f"test {CONFIG} {words}".strip(),), f"mirror_descent/gallery/{name}", seeds, minutes, quick, 0.4)


ANALYTIC = sampling("analytic", "", 1)
FINE = {
    schedule: sampling(
        f"levels_4000_{schedule.lower()}",
        f"--model.settings.predictor_K 4000 --model.schedule {schedule} --model.chains 8192 "
        f"--model.samplers '[{','.join(names)}]'",
        1,
        quick="--model.settings.predictor_K 1000",
    )
    for schedule, names in GUIDED.items()
}
PLAIN_TWIST = sampling("smc_dps", "--model.settings.smc_twist dps --model.samplers '[smc_twisted]'", 0.3)
MANY = sampling(
    "joint_slope",
    f"--model.samplers '[pc_joint_mala]' --model.seeds '{str(list(range(5000, 5100))).replace(' ', '')}'",
    3,
    "5000 to 5099",
    "--model.chains 8192 --model.seeds '[5000,5001,5002,5003,5004,5005,5006,5007]'",
)
UNREFRESHED = sampling(
    "no_refresh",
    "--model.samplers '[pc_joint_mala]' --model.settings.refresh_L 0 --model.settings.final_refresh false",
    0.3,
)
JOINT, EXACT_JOINT = "pc_joint_mala", "pc_joint_mala_exact"
STEPS, LONGER_STEPS = 10, 40  # of the joint sampler at each level: as configured, and more
LEARNED = Run(
    name="learned",
    commands=(
        "fit -c configs/mirror_descent/learned.yaml",
        f"test -c configs/mirror_descent/learned.yaml --model.samplers '[{JOINT}]' --model.chains 131072",
        f"test -c configs/mirror_descent/learned.yaml --model.samplers '[{JOINT}]' --model.chains 131072 "
        f"--model.settings.action_steps_per_level {LONGER_STEPS}",
        "test -c configs/mirror_descent/learned.yaml",  # last: the plain names of the run's files are then its
    ),
    folder="mirror_descent/gallery/learned",
    seeds=SEEDS,
    minutes=35,
    quick="--trainer.max_steps 500 --model.seeds '[0,1]' --model.chains 4096 --model.settings.predictor_K 30 "
    "--model.settings.smc_K 10 --model.settings.mcmc_steps 30 --model.settings.K 10",
    quick_minutes=1.5,
    keeps=True,
    files=("facts.md",),
)

SMOOTH = ("mala", "pc_mala", JOINT, "smc_twisted")  # that come near the target with the exact energy
WITHOUT_M = Run(
    name="without_m",
    commands=(
        "fit -c configs/mirror_descent/learned.yaml --model.gaussian_part false",
        f"test -c configs/mirror_descent/learned.yaml --model.samplers '[{','.join(SMOOTH)}]'",
    ),
    folder="mirror_descent/gallery/without_m",
    seeds=SEEDS,
    minutes=25,
    quick=LEARNED.quick,
    quick_minutes=1,
    keeps=True,
)


def tables(folder: Path, file: str = "facts.md") -> list[list[str]]:
    """Return the tables of facts.md, as lines."""
    return [part.split("\n") for part in (folder / file).read_text().strip().split("\n\n")]


def cells(line: str) -> list[str]:
    """Return a row's cells."""
    return line.strip("| ").split(" | ")


def fact(folder: Path, sampler: str, quantity: str, column: int) -> str:
    """Return a cell of facts.md: 2 closed form, 4 measured, 5 error, 6 z."""
    rows = (cells(line) for line in tables(folder)[0][2:])
    return next(row[column] for row in rows if row[:2] == [sampler, quantity])


def abs_z(line: str) -> float:
    """Return |z| of a row of facts.md; 0 where there is none."""
    z = cells(line)[6]
    return 0.0 if z == "-" else abs(float(z))


def rows_of_facts(at: Folders) -> str:
    """Return how many rows of facts.md have a closed form."""
    return str(sum(cells(r)[6] != "-" for r in tables(at["analytic"])[0][2:]))


def least_adjusted_p(at: Folders) -> str:
    """Return the smallest p-value of an implementation after Holm's adjustment."""
    found = [c["p_holm"] for c in results(at["analytic"], "test")["arrays"]["checks"]]
    return figures_of(min(p for p in found if p is not None and not math.isnan(p)), 2)


def refreshes(at: Folders) -> str:
    """Return the table of pc_ula's exact action KL by refreshes."""
    found = [part for part in tables(at["analytic"]) if part[0].startswith("| action steps a level")]
    return "\n".join(found[0])


def interval(folder: Path, sampler: str, quantity: str, digits: int) -> str:
    """Write a measured quantity of facts.md with half of its 95 % interval."""
    measured, error = (float(fact(folder, sampler, quantity, column)) for column in (4, 5))
    return f"{fixed(measured, digits)} ± {fixed(1.96 * error, digits)}"


def facts_table(at: Folders) -> str:
    """Return the rows of facts.md that the page shows."""
    head, rule, *rows = tables(at["analytic"])[0]
    far = sorted({abs_z(r) for r in rows}, reverse=True)[:MOST_OFF]
    shown = [r for r in rows if cells(r)[1] in SHOWN.get(cells(r)[0], "").split(", ") or abs_z(r) in far]
    said = f"Of {rows_of_facts(at)} rows with a closed form the smallest p, adjusted (Holm), is {least_adjusted_p(at)}."
    return "\n".join([head, rule, *shown, "", said])


def distribution(folder: Path, sampler: str) -> list[str]:
    """Return a sampler's exact distribution from facts.md: mean, variance, slope, ratio, joint KL."""
    return next(cells(line)[1:6] for line in tables(folder)[1][2:] if cells(line)[0] == sampler)


def fine_table(at: Folders) -> str:
    """Return the exact distributions with 4000 levels."""
    rows = []
    for schedule, names in GUIDED.items():
        for name in names:
            process, _, rule = name.partition("_")
            rows.append([f"{rule}, {process.upper()}, {schedule}", *distribution(at[FINE[schedule].name], name)])
    head = "rule, process, schedule | mean | variance | slope of s' | Var(s' given a), ratio | joint KL"
    return table(head, rows)


def fine(at: Folders, schedule: str, sampler: str, column: int) -> float:
    """Return a number of an exact distribution with 4000 levels."""
    return float(distribution(at[FINE[schedule].name], sampler)[column])


def largest_z(at: Folders, place: int) -> str:
    """Return the |z| of facts.md at a place from the largest, 0."""
    found = sorted((abs_z(line) for line in tables(at["analytic"])[0][2:]), reverse=True)
    return f"{found[place]:.1f}"


def score_bound(at: Folders, run: str = "learned") -> str:
    """Return the score's largest relative error of any level and seed, rounded up to a thousandth."""
    worst = max(values(results(at[run], "test"), "score_error"))
    return short(f"{(int(worst * 1000) + 1) / 1000:.3f}")


def learned_table(at: Folders) -> str:
    """Return every sampler with the learned energy and with the exact distribution."""
    content = results(at["learned"], "test")
    names = [n.partition("@")[2] for n in content["metrics"] if n.startswith("joint_kl@") and not n.endswith(EXACT)]
    return "\n".join(samplers_of(content, names))


def samplers_of(content: Content, names: Sequence[str]) -> list[str]:
    """Return the rows of samplers as ``test`` writes them."""
    metrics = {name: values(content, name) for name in content["metrics"]}
    return sampler_table(metrics, names, content["seeds"], int(content["settings"]["model.chains"]))


def without_m_errors(at: Folders) -> str:
    """Return the score's relative error by level, with M and without: geometric means over seeds, and their ratio."""
    one, other = (results(at[name], "test") for name in ("without_m", "learned"))
    rows = []
    for abar in EVALUATION_LEVELS:
        name = f"score_error@{abar:g}"
        means = [fixed(float(stats.gmean(values(content, name))), 4) for content in (other, one)]
        rows.append([short(f"{abar:g}"), *means, ratio(one, other, name)])
    return table("abar | with M | without M | without / with, paired by seed", rows)


def without_m_samplers(at: Folders) -> str:
    """Return the samplers with the energy that has no M, and with the exact distribution."""
    return "\n".join(samplers_of(results(at["without_m"], "test"), SMOOTH))


def joint_content(at: Folders, steps: int) -> Content:
    """Return the test of the joint sampler alone, with many chains and so many steps a level."""
    chosen = {"model__samplers": f"['{JOINT}']", "model__settings__action_steps_per_level": str(steps)}
    return results(at["learned"], "test", **chosen)


def joint(at: Folders, metric: str) -> list[float]:
    """Return a metric of the joint sampler, with as many steps a level as configured."""
    return list(by_seed(joint_content(at, STEPS), f"{metric}@{JOINT}").values())


def joint_table(at: Folders) -> str:
    """Return the joint sampler's distributions by steps a level, and whether they pass for exact draws."""
    rows = []
    for steps in (STEPS, LONGER_STEPS):
        content = joint_content(at, steps)
        learned, exact = (by_seed(content, f"joint_kl@{name}") for name in (JOINT, EXACT_JOINT))
        paired = paired_difference(learned, exact)
        assert paired is not None
        row = [str(steps)]
        for found in (learned, exact):
            total = 2 * int(content["settings"]["model.chains"]) * sum(found.values())  # chi-squared for exact draws
            p = stats.chi2.sf(total, JOINT_PARAMETERS * len(found))
            row += [
                format_estimate(mean_ci(list(found.values())), limits=NOT_NEGATIVE),
                f"{total:.0f}",
                short(f"{p:.1g}"),
            ]
        row.append(format_estimate(paired.estimate))
        rows.append([*row, *(spread_to(values(content, f"cond_ratio@{n}"), 4) for n in (JOINT, EXACT_JOINT))])
    said = [f"{kind}: {what}" for kind in ("learned", "exact") for what in ("joint KL", "sum of 2 n KL", "p")]
    said += ["difference of the KLs", *(f"{kind}: Var(s' given a), ratio" for kind in ("learned", "exact"))]
    return table(f"steps a level | {' | '.join(said)}", rows)


def learned_differences(at: Folders, run: str) -> dict[str, tuple[float, float, float]]:
    """Return each sampler's joint KL, learned less exact on the same noise, half of its interval, and p (Holm)."""
    content = results(at[run], "test")
    names = [n.partition("@")[2] for n in content["metrics"] if n.startswith("joint_kl@")]
    found = {}
    for name in (n for n in names if n + EXACT in names):
        pair = paired_difference(by_seed(content, f"joint_kl@{name}"), by_seed(content, f"joint_kl@{name}{EXACT}"))
        assert pair is not None
        found[name] = pair
    p_values = holm([pair.p_value for pair in found.values()]).tolist()
    return {
        name: (pair.estimate.mean, pair.estimate.half_width, p)
        for (name, pair), p in zip(found.items(), p_values, strict=True)
    }


def learned_shown(at: Folders, run: str = "learned") -> str:
    """Say of how many samplers the learned energy's effect on the joint KL is shown, and of which."""
    found = learned_differences(at, run)
    shown = [f"`{name}`" for name, (_, _, p) in found.items() if p < 0.05]
    return f"{len(shown)} of {len(found)}" + (f" ({', '.join(shown)})" if shown else "")


RECIPE = Recipe(
    name="mirror",
    runs=(ANALYTIC, *FINE.values(), PLAIN_TWIST, MANY, UNREFRESHED, LEARNED, WITHOUT_M),
    figures=(
        *entries(
            ["analytic"],
            {"mirror_frontier": "figures/frontier.png", "mirror_kl_vs_refresh": "figures/kl_vs_refresh.png"},
        ),
        *entries(["learned"], {"mirror_learned": "figures/learned_and_exact.png"}),
    ),
    tables=(
        *entries(
            ["analytic"],
            {
                "mirror.facts": facts_table,
                "mirror.refreshes": refreshes,
                "mirror.distributions": lambda at: "\n".join(tables(at["analytic"])[1]),
            },
        ),
        *entries([run.name for run in FINE.values()], {"mirror.distributions_4000": fine_table}),
        *entries(
            ["learned"],
            {
                "mirror.score_error": lambda at: "\n".join(tables(at["learned"])[0]),
                "mirror.learned": learned_table,
                "mirror.learned_joint": joint_table,
            },
        ),
        *entries(["learned", "without_m"], {"mirror.without_m.score": without_m_errors}),
        *entries(["without_m"], {"mirror.without_m.samplers": without_m_samplers}),
    ),
    numbers=(
        *entries(
            ["analytic"],
            {
                "mirror.poe.kl": lambda at: figures_of(float(distribution(at["analytic"], "sde_poe")[4]), 2),
                "mirror.poe.slope": lambda at: fixed(float(distribution(at["analytic"], "sde_poe")[2]), 2),
                "mirror.importance.ess": lambda at: fixed(
                    float(fact(at["analytic"], "importance", "ess_fraction", 2)), 2
                ),
                "mirror.z.largest": lambda at: largest_z(at, 0),
                "mirror.z.next": lambda at: largest_z(at, 1),
                "mirror.smc.z": lambda at: fixed(float(fact(at["analytic"], "smc_twisted", "Z / exact Z", 5)), 4),
                "mirror.ula.var": lambda at: fixed(float(fact(at["analytic"], "ula", "var", 2)), 3),
                "mirror.target.var": lambda at: fixed(float(distribution(at["analytic"], "target")[1]), 3),
            },
        ),
        *entries(
            [FINE["Linear"].name],
            {
                "mirror.ode_poe.slope_4000": lambda at: fixed(fine(at, "Linear", "ode_poe", 2), 2),
                "mirror.dps.kl": lambda at: fixed(fine(at, "Linear", "sde_dps", 4), 3),
            },
        ),
        *entries(
            [FINE["Constant"].name],
            {
                "mirror.tfg_constant.kl": lambda at: fixed(fine(at, "Constant", "sde_tfg", 4), 3),
                "mirror.dps_constant.kl": lambda at: fixed(fine(at, "Constant", "sde_dps", 4), 1),
            },
        ),
        *entries(
            ["smc_dps"],
            {
                "mirror.smc_dps.slope": lambda at: interval(at["smc_dps"], "smc_twisted", "slope", 3),
                "mirror.smc_dps.var": lambda at: fixed(float(fact(at["smc_dps"], "smc_twisted", "var", 4)), 3),
                "mirror.smc_dps.z": lambda at: fixed(float(fact(at["smc_dps"], "smc_twisted", "Z / exact Z", 5)), 4),
            },
        ),
        *entries(
            ["joint_slope"],
            {"mirror.joint.slope": lambda at: spread_to(values(results(at["joint_slope"]), "slope@pc_joint_mala"), 5)},
        ),
        *entries(
            ["no_refresh"],
            {"mirror.no_refresh": lambda at: fixed(float(fact(at["no_refresh"], "pc_joint_mala", "cond_ratio", 4)), 2)},
        ),
        *entries(
            ["without_m"],
            {
                "mirror.without_m.shown": partial(learned_shown, run="without_m"),
                "mirror.without_m.bound": partial(score_bound, run="without_m"),
            },
        ),
        *entries(
            ["learned"],
            {
                "mirror.score_error.bound": score_bound,
                "mirror.learned.shown": learned_shown,
                "mirror.learned_joint.ratio": lambda at: ", ".join(f"{x:.4f}" for x in joint(at, "cond_ratio")),
                "mirror.learned_joint.kl": lambda at: ", ".join(f"{x:.1e}" for x in joint(at, "action_kl")),
            },
        ),
    ),
)
