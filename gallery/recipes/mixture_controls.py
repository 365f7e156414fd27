"""mirror_descent's controls: stronger tilts, more dimensions, and guidance at other schedules and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from gallery.read import Content, entries, estimate, figures_of, short, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.mixtures import content_of, samplers
from lightning_toys.stats import mean_ci

CONFIG = "-c configs/mirror_descent/mixture.yaml"
QUICK = "--model.chains 4096 --model.seeds '[0,1]'"
AWAY = "'{class_path: QuadraticReward, init_args: {weights: [1.0, 1.0], optimum: [0.0, 0.0]}}'"  # from every mode
STRENGTHS = ("1", "3", "9", "27")
SAMPLERS = ("importance", "smc_twisted", "smc_tempered", "fk_difference", "sde_dps", "sde_tfg", "sde_soft_value")
DIMENSIONS = (1, 2, 4, 8)  # of the action, and as many of the next state
RULES = {"dps": "DiffusionPosteriorSampling", "tfg": "TrainingFreeGuidance"}
SCHEDULES, SCALES = ("Linear", "Constant"), ("0.7", "1.0", "1.3")


def run_of(name: str, words: str, minutes: float) -> Run:
    """Return a `test`, which trains nothing but soft values."""
    folder = f"mirror_descent/gallery/{name}"
    return Run(name, (f"test {CONFIG} {words}",), folder, "0 to 3", minutes, QUICK, 0.6, keeps=True)


def listed(names: Sequence[str]) -> str:
    """Write the words that choose samplers."""
    return f"--model.samplers '[{','.join(names)}]'"


def mixture(d: int) -> str:
    """Write the words of a mixture of two components in d + d coordinates, tilted towards the lighter one.

    The modes are as far from each other in any number of coordinates, in their standard deviations.
    """
    far = f"{1.5 / d**0.5:.4f}"
    means = ",".join(f"[{','.join([sign + far] * (2 * d))}]" for sign in ("-", ""))
    reward = f"{{class_path: QuadraticReward, init_args: {{weights: {[1.0] * d}, optimum: [{','.join([far] * d)}]}}}}"
    return (
        f"--data.weights '[0.8,0.2]' --data.means '[{means}]' --data.covariances null --data.std 0.5 "
        f"--data.action_dim {d} --model.reward '{reward}'"
    )


def guided(schedule: str) -> str:
    """Write the words of every rule at every scale, at a schedule."""
    each = [
        f"{{class_path: Predictor, init_args: {{rule: {rule}, scale: {scale}}}}}"
        for rule, scale in product(RULES.values(), SCALES)
    ]
    return f"--model.schedule {schedule} --model.samplers '[{', '.join(each)}]'"


STRENGTH = {
    s: run_of(f"strength_{s}", f"--model.lambda_scale {s} --model.reward {AWAY} {listed(SAMPLERS)}", 1)
    for s in STRENGTHS
}
DIMENSION = {d: run_of(f"dimension_{d}", f"{mixture(d)} {listed(SAMPLERS)}", 2) for d in DIMENSIONS}
GUIDED = {s: run_of(f"guided_{s.lower()}", guided(s), 1) for s in SCHEDULES}
MORE = run_of(
    "strong_4096",
    f"--model.lambda_scale 9 --model.reward {AWAY} --model.settings.smc_particles 4096 {listed(['fk_difference'])}",
    0.5,
)


def said(content: Content, name: str, metric: str = "w1") -> str:
    """Write a sampler's mean over seeds ± half of its interval."""
    return short(estimate(content, f"{metric}@{name}"))


def by_sampler(at: Folders, runs: Mapping[str, Run], head: str) -> str:
    """Return W1 of each sampler by run, beside importance weights' effective sample size and exact draws."""
    rows = []
    for label, run in runs.items():
        content = content_of(at, run)
        ess = figures_of(mean_ci(values(content, "ess_fraction@importance")).mean, 2)
        exact = figures_of(content["references"]["exact_draws"]["w1"], 2)
        rows.append([label, ess, *(said(content, name) for name in SAMPLERS), exact])
    return table(f"{head} | ESS | {' | '.join(SAMPLERS)} | exact draws", rows)


def modes_by_dimension(at: Folders) -> str:
    """Return W1 of the untilted distribution, and the error of the modes' weights, by the number of coordinates."""
    names, rows = ("sde_dps", "sde_tfg", "sde_soft_value", "smc_twisted"), []
    for d, run in DIMENSION.items():
        content = content_of(at, run)
        known = content["references"]["untilted"]
        untilted = [figures_of(known[m], 3) for m in ("w1", "mode_tv")]
        rows.append([f"{d} + {d}", *untilted, *(said(content, name, "mode_tv") for name in names)])
    return table(f"coordinates, a + s' | untilted: W1 | modes: total variation, untilted | {' | '.join(names)}", rows)


def guided_table(at: Folders) -> str:
    """Return W1, the modes' weights and the reward of each rule, schedule and scale on the mixture."""
    rows = []
    for schedule, run in GUIDED.items():
        content = content_of(at, run)
        for (rule, scale), name in zip(product(RULES, SCALES), samplers(content), strict=True):
            assert rule in name
            rows.append([rule, schedule, scale, *(said(content, name, m) for m in ("w1", "mode_tv", "reward"))])
    for label in ("exact_draws", "untilted"):
        known = content_of(at, GUIDED["Linear"])["references"][label]
        rows.append(
            [f"*{label.replace('_', ' ')}*", "", "", *(figures_of(known[m], 2) for m in ("w1", "mode_tv", "reward"))]
        )
    return table("rule | schedule | scale | W1 | modes: total variation | reward", rows, left=2)


def least_left(at: Folders) -> str:
    """Return the least share of the modes' error that guidance leaves on the mixture, of all schedules and scales."""
    shares = []
    for run in GUIDED.values():
        content = content_of(at, run)
        untilted = content["references"]["untilted"]["mode_tv"]
        shares += [mean_ci(values(content, n)).mean / untilted for n in content["metrics"] if n.startswith("mode_tv@")]
    return f"{100 * min(shares):.0f} %"


RECIPE = Recipe(
    name="world_controls",
    runs=(*STRENGTH.values(), *DIMENSION.values(), *GUIDED.values(), MORE),
    tables=(
        *entries(
            [run.name for run in STRENGTH.values()],
            {"mirror.strengths": lambda at: by_sampler(at, STRENGTH, "lambda")},
        ),
        *entries(
            [run.name for run in DIMENSION.values()],
            {
                "mirror.dimensions": lambda at: by_sampler(
                    at, {f"{d} + {d}": run for d, run in DIMENSION.items()}, "coordinates, a + s'"
                ),
                "mirror.dimensions.modes": modes_by_dimension,
            },
        ),
        *entries([run.name for run in GUIDED.values()], {"mirror.guided": guided_table}),
    ),
    numbers=(
        *entries([run.name for run in GUIDED.values()], {"mirror.guided.left": least_left}),
        *entries([MORE.name], {"mirror.strong_4096": lambda at: said(content_of(at, MORE), "fk_difference")}),
    ),
)
