"""generative_policy: which policies can act in many ways at once, and in one step?"""

from __future__ import annotations

from gallery.read import (
    Content,
    Make,
    between,
    entries,
    estimates,
    fixed,
    results,
    seeds_in_words,
    spread,
    spread_to,
    table,
    values,
)
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.bandit import CONFIG
from gallery.running import TABLE
from lightning_toys.stats import NOT_NEGATIVE, format_estimate, mean_ci

QUICK = "--trainer.max_steps 300 --model.seeds '[0,1]' --model.evaluation.samples 3000"
STDS = {"0.0": "0", "0.001": ".001", "0.01": ".01", "0.1": ".1"}

TARGET_STD = Run(
    name="target_std",
    commands=(f"sweep {CONFIG}/meanflow.yaml --grid.model.target_std '[0.01,0.0,0.001,0.1]'",),
    folder="generative_policy/meanflow-sweep",
    seeds="0 to 3",
    minutes=85,
    quick=QUICK,
    quick_minutes=2,
    keeps=True,
)
FLOW = Run(
    name="policy_flow",
    commands=(f"fit {CONFIG}/flow.yaml", f"test {CONFIG}/flow.yaml"),
    folder="generative_policy/gallery/flow",
    seeds="0 to 3",
    minutes=20,
    quick=QUICK,
    quick_minutes=1,
    keeps=True,
)


EDM = Run(
    name="edm",
    commands=(f"fit {CONFIG}/meanflow.yaml --model.form edm --model.target_std 0.006",),
    folder="generative_policy/gallery/edm",
    seeds="0 to 3",
    minutes=21,
    quick=QUICK,
    keeps=True,
)
PENDULUM = Run(
    name="pendulum",
    commands=("-m docs.examples.pendulum",),
    folder="generative_policy/gallery/pendulum",
    seeds="0 to 3",
    minutes=10,
    quick=None,
    needs="gymnasium",
    keeps=True,
    files=(TABLE,),
)


def cell(at: Folders, std: str) -> Content:
    """Return a test of the sweep over target_std."""
    return results(at["target_std"] / f"target_std={std}", "test")


def shipped(at: Folders) -> Content:
    """Return the test of the shipped recipe: the sweep's cell with the configuration's own target_std."""
    return cell(at, "0.01")


def reference(r: Content, name: str, metric: str, digits: int) -> str:
    """Write a reference row's metric, or a dash."""
    value = r["references"].get(name, {}).get(metric)
    return "-" if value is None else f"{value:.{digits}f}"


def target_std_table(at: Folders) -> str:
    """Return one step by target_std, and what needs no network."""
    metrics = ("tv", "off3", "off5", "entropy_knn", "entropy_exact", "entropy_surrogate")
    rows = []
    for std, label in STDS.items():
        r = cell(at, std)
        row = estimates(r, *metrics)
        row[4], row[5] = (row[4], "-") if label == "0" else ("-", row[5])
        rows.append([label, str(len(r["seeds"])), *row])
    r = cell(at, "0.01")
    for name in ("target", "exact_flow_8", "exact_flow_64"):
        cells = [reference(r, name, m, d) for m, d in zip(metrics[:5], (4, 4, 5, 3, 3), strict=True)]
        rows.append([f"reference: {name}", "", *cells, "-"])
    head = "target_std | seeds | TV | off 3 sd | off 5 sd | entropy, k-NN | exact | surrogate"
    return table(head, rows).replace("|  |", "| |")


def steps_table(r: Content, readouts: dict[str, str], head: str) -> str:
    """Return the measures by readout of one checkpoint."""
    rows = []
    for label, readout in readouts.items():
        rows.append([label, *estimates(r, *(f"{m}{readout}" for m in ("tv", "off3", "off5", "entropy_knn")))])
    return table(f"{head} | TV | off 3 sd | off 5 sd | entropy, k-NN", rows)


def meanflow(metric: str, digits: int) -> Make:
    """Return what writes the mean of a metric of the shipped recipe."""
    return lambda at: fixed(mean_ci(values(shipped(at), metric)).mean, digits)


def target(metric: str, digits: int) -> Make:
    """Return what writes a metric of a sample of the target itself."""
    return lambda at: fixed(shipped(at)["references"]["target"][metric], digits)


STEPS = {"1": "", **{str(n): f"@{n}" for n in (2, 4, 8, 16, 32, 64)}}
FLOW_STEPS = {"1 (Euler)": "@euler-1", **{str(n): f"@euler-{n}" for n in (2, 4, 8, 64)}, "dopri5": "@dopri5"}

RECIPE = Recipe(
    name="policy",
    runs=(TARGET_STD, FLOW, EDM, PENDULUM),
    figures=(
        *entries(
            ["target_std"],
            {"meanflow_samples": "target_std=0.01/figures/samples.png"},
        ),
    ),
    tables=(
        *entries(
            ["target_std"],
            {
                "policy.target_std": target_std_table,
                "policy.steps": lambda at: steps_table(shipped(at), STEPS, "steps"),
            },
        ),
        *entries(
            ["policy_flow"],
            {
                "policy.flow_steps": lambda at: steps_table(
                    results(at["policy_flow"], "test"), FLOW_STEPS, "flow, network evaluations"
                )
            },
        ),
        *entries([PENDULUM.name], {"policy.pendulum": lambda at: (at[PENDULUM.name] / TABLE).read_text().strip()}),
    ),
    numbers=(
        *entries(
            ["target_std"],
            {
                "policy.off3": lambda at: spread_to(values(shipped(at), "off3"), 3),
                "policy.off3.two": meanflow("off3@2", 3),
                "policy.off3.64": meanflow("off3@64", 3),
                "policy.entropy.two": meanflow("entropy_knn@2", 2),
                "policy.off3.seeds": lambda at: between(values(shipped(at), "off3"), 3),
                "policy.tv.seeds": lambda at: seeds_in_words(values(shipped(at), "tv"), 3),
                "policy.target.tv": target("tv", 3),
                "policy.target.off3.long": target("off3", 4),
                "policy.target.entropy": target("entropy_knn", 2),
                "policy.exact_flow": lambda at: fixed(shipped(at)["references"]["exact_flow_64"]["entropy_knn"], 2),
                "policy.entropy.none": lambda at: " and ".join(
                    fixed(mean_ci(values(cell(at, s), "entropy_knn")).mean, 1) for s in ("0.0", "0.001")
                ),
                "policy.surrogate": lambda at: between(
                    [
                        mean_ci(values(cell(at, s), "entropy_knn")).mean
                        - mean_ci(values(cell(at, s), "entropy_surrogate")).mean
                        for s in ("0.001", "0.01", "0.1")
                    ],
                    1,
                ),
            },
        ),
        *entries(
            ["policy_flow"],
            {
                "policy.flow.entropy": lambda at: format_estimate(
                    mean_ci(values(results(at["policy_flow"], "test"), "entropy_exact@dopri5"))
                ),
                "policy.flow.kl": lambda at: spread(
                    values(results(at["policy_flow"], "test"), "kl_forward@dopri5"), NOT_NEGATIVE
                ),
                "policy.flow.off3": lambda at: fixed(
                    mean_ci(values(results(at["policy_flow"], "test"), "off3@euler-1")).mean, 2
                ),
            },
        ),
        *entries(
            ["edm"],
            {
                "policy.edm.off3": lambda at: spread(values(results(at["edm"]), "off3"), NOT_NEGATIVE),
                "policy.edm.entropy": lambda at: spread(values(results(at["edm"]), "entropy_knn")),
            },
        ),
    ),
)
