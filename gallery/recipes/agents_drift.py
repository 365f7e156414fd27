"""bilevel's control where the reward drifts: does averaging the model's gradient over the last ones pay?"""

from __future__ import annotations

import json
import math
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np

from gallery.read import entries, figures_of, results, short, table
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.agents import (
    AGENTS,
    CONFIG,
    CURVES,
    FAILED,
    LABELS,
    QUIET,
    RATES,
    SCORED,
    TUNING,
    check_chosen,
    ended,
    iqm,
)
from lightning_toys.bilevel.control.environments import Disturbance
from lightning_toys.bilevel.control.episodes import rollout
from lightning_toys.bilevel.control.gymnasium_environments import make_environments
from lightning_toys.bilevel.paired_table import difference
from lightning_toys.stats import geometric_ci, holm

DRIFTING, SMOOTHING = ("vaml", "omd"), ("1", "10", "100", "1000")
PRESENT = {"1000": " --model.solver.smoothing_present 0.3"}  # as OFBO has it
DRIFT = "--model.disturbance.drift 8 --model.regret_every 100 --model.inner_lr 1e-3 --model.model_hidden_dim 8"
DRIFT += " --data.capacity 2000"  # a fifth of a swing: all of the past would have its centre near 0
# of each agent and smoothing the rate of its model
CHOSEN_DRIFT: dict[tuple[str, str], str] = {
    ("vaml", "1"): "1e-3",
    ("vaml", "10"): "3e-4",
    ("vaml", "100"): "3e-4",
    ("vaml", "1000"): "3e-4",
    ("omd", "1"): "3e-4",
    ("omd", "10"): "1e-3",
    ("omd", "100"): "3e-4",
    ("omd", "1000"): "3e-4",
}
WITHIN = 1.0  # degrees that the controller which knows the centre leans into the band
DRIFT_EVERY = f"--trainer.val_check_interval 2000 --checkpoint.every_n_steps 30000 --model.eval_episodes 20 {QUIET}"


def drift_search(name: str, minutes: float) -> Run:
    """Return the search for the rates of an agent's model where the reward drifts."""
    plain = [n for n in SMOOTHING if n not in PRESENT]
    at, rates = f"sweep {CONFIG} {AGENTS[name]} {DRIFT}", f"--grid.model.lr '[{','.join(RATES)}]'"
    every = f"--model.seeds '{TUNING}' {DRIFT_EVERY} --run.variant drift_rates_{name}"
    return Run(
        name=f"drift_rates_{name}",
        commands=(
            f"{at} --grid.model.solver.smoothing '[{','.join(plain)}]' {rates} {every}",
            *(f"{at}{words} --grid.model.solver.smoothing '[{n}]' {rates} {every}" for n, words in PRESENT.items()),
        ),
        folder=f"bilevel/drift_rates_{name}",
        seeds="100 to 107",
        minutes=minutes,
        quick=None,
        keeps=True,
        curves=CURVES,
        may_diverge=True,
    )


def drift_study(name: str, minutes: float) -> Run:
    """Return the run of an agent where the reward drifts, with and without smoothing."""
    return Run(
        name=f"drift_{name}",
        commands=tuple(
            f"fit {CONFIG} {AGENTS[name]} {DRIFT} --model.solver.smoothing {n}{PRESENT.get(n, '')} "
            f"--model.lr {CHOSEN_DRIFT[name, n]} --model.seeds '{SCORED}' {DRIFT_EVERY} "
            f"--run.variant drift_{name} --run.name smoothing-{n}"
            for n in SMOOTHING
        ),
        folder=f"bilevel/drift_{name}",
        seeds="10 to 25",
        minutes=minutes,
        quick=None,
        keeps=True,
        curves=CURVES,
        may_diverge=True,
    )


DRIFT_SEARCHES = {"vaml": drift_search("vaml", 18), "omd": drift_search("omd", 24)}
DRIFTS = {"vaml": drift_study("vaml", 9), "omd": drift_study("omd", 12)}


def drift_scores(folder: Path) -> dict[int, float]:
    """Return each seed's mean return of the validations from step 12 000 on: two whole swings of the reward."""
    from lightning_toys.training.metrics_reader import read_run, replica_columns

    seeds = [int(s) for s in results(folder)["seeds"]]
    steps, found = replica_columns(read_run(folder), "eval/return", seeds)
    return dict(zip(seeds, found[:, steps >= 12_000].mean(1).tolist(), strict=True))


def drift_found(at: Folders) -> dict[tuple[str, str], dict[str, float]]:
    """Return of each agent and smoothing what the search found, by rate."""
    out = {}
    for name, run in DRIFT_SEARCHES.items():
        for n in SMOOTHING:
            cells = {r: at[run.name] / f"smoothing={n},lr={r}" for r in RATES}
            means = {r: float(np.mean(list(drift_scores(c).values()))) if ended(c) else 0.0 for r, c in cells.items()}
            out[name, n] = means
    return out


def check_drift_rates(at: Folders) -> None:
    """Raise a ValueError where the rates of the recipe are not those of the search."""
    for key, by_rate in drift_found(at).items():
        check_chosen(key, by_rate, CHOSEN_DRIFT[key])


Measured = tuple[dict[int, float], dict[int, float]]  # return and local regret by seed


def measured(at: Folders) -> dict[tuple[str, str], Measured]:
    """Return what was measured, by agent and smoothing; without what went non-finite."""
    out: dict[tuple[str, str], Measured] = {}
    for (name, run), n in product(DRIFTS.items(), SMOOTHING):
        folder = at[run.name] / f"smoothing-{n}"
        if ended(folder):
            content = results(folder, "fit")
            regrets = dict(zip(content["seeds"], content["metrics"]["local_regret"]["values"], strict=True))
            out[name, n] = drift_scores(folder), regrets
    return out


@cache
def hand_written(centre: float, knows: bool) -> float:
    """Return the mean return of a controller by hand where the rewarded band has its centre so many degrees off.

    It holds the pole upright in the middle of the track, or, if it ``knows`` the centre and upright is not rewarded,
    leans it until it is :data:`WITHIN` the band, for as long as the track lasts.
    """
    outside = abs(centre) - Disturbance().drift_width
    lean = math.copysign(math.radians(outside + WITHIN), centre) if knows and outside > 0 else 0.0

    def policy(observation: np.ndarray) -> np.ndarray:
        x, speed, angle, turning = np.moveaxis(observation, -1, 0)
        position = 0.0 if lean else 0.02 * x + 0.06 * speed
        pushes_right: np.ndarray = angle - lean + 0.25 * turning + position > 0
        return pushes_right.astype(np.int64)

    # a linear drift that has come to its end stays there: -drift at step 0
    fixed_there = Disturbance(drift=abs(centre), drift_shape="linear", drift_period=1)
    environments = make_environments("CartPole-v1", json.loads(SCORED), "reference", 4, fixed_there)
    returns, _ = rollout(environments, policy, drift_step=int(centre > 0))
    environments.close()
    return float(returns.mean())


def reference_rows() -> list[list[str]]:
    """Return the controllers by hand, at the five centres that validations meet."""
    drift = Disturbance(drift=8.0)
    centres = [drift.centre(step) for step in range(12_000, 22_000, 2000)]
    names = {False: "*upright, ignores the centre*", True: "*by hand, knows the centre*"}
    found = {k: np.mean([hand_written(c, k) for c in centres]) for k in names}
    return [[name, "", "", f"{found[k]:.0f}", *[""] * 5] for k, name in names.items()]


def regret_of(value: float) -> str:
    """Write a local regret, of any size, to two significant figures: ``.041``, ``43``, ``210``, ``2.8e8``."""
    if value >= 1e4:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return figures_of(value, 2) if value < 100 else f"{float(f'{value:.1e}'):.0f}"


def drift_table(at: Folders) -> str:
    """Return return and local regret with and without smoothing where the reward drifts.

    Raises:
        ValueError: the rates of the recipe are not those of the search.
    """
    check_drift_rates(at)
    each = measured(at)
    smoothed = [(a, n) for a, n in each if n != "1" and (a, "1") in each]
    gaps = [difference(each[a, n][0], each[a, "1"][0], unpaired=True) for a, n in smoothed]
    ratios = [difference(each[a, n][1], each[a, "1"][1], ratio=True, unpaired=True) for a, n in smoothed]
    kept = [d for d in (*gaps, *ratios) if d is not None]
    assert len(kept) == 2 * len(smoothed)
    p = [short(f"{q:.2g}") for q in holm([d.p_value for d in kept])]
    rows = []
    for name, n in product(DRIFTING, SMOOTHING):
        row = [LABELS[name], n, short(f"{float(CHOSEN_DRIFT[name, n]):g}")]
        if (name, n) not in each:
            rows.append([*row, FAILED, *[""] * 5])
            continue
        regret = geometric_ci(list(each[name, n][1].values()))
        assert regret is not None
        row += [iqm(np.array(list(each[name, n][0].values()))), regret_of(regret.mean)]
        if (name, n) in smoothed:
            k = smoothed.index((name, n))
            gap, ratio = kept[k].estimate, kept[len(smoothed) + k].estimate
            row += [f"{gap.mean:.0f} ± {gap.half_width:.0f}", p[k]]
            row.append(f"{figures_of(ratio.mean, 2)} ({figures_of(ratio.lo, 2)} to {figures_of(ratio.hi, 2)})")
            row.append(p[len(smoothed) + k])
        rows.append(row + [""] * (9 - len(row)))
    head = "agent | mean of the last | lr | return, interquartile mean | local regret | return minus unsmoothed | p"
    return table(f"{head} | regret / unsmoothed | p", rows + reference_rows(), left=1)


def allowed(at: Folders, name: str) -> str:
    """Return what the intervals of all smoothed returns allow, as shares of the mean unsmoothed return."""
    each = measured(at)
    unsmoothed = each[name, "1"][0]
    gaps = [difference(each[a, n][0], unsmoothed, unpaired=True) for a, n in each if a == name and n != "1"]
    intervals = [(d.estimate.lo, d.estimate.hi) for d in gaps if d is not None]
    mean = float(np.mean(list(unsmoothed.values())))
    gain, loss = max(hi for _, hi in intervals), -min(lo for lo, _ in intervals)
    return f"a gain of {100 * max(gain, 0.0) / mean:.0f} % or a loss of {100 * max(loss, 0.0) / mean:.0f} %"


RECIPE = Recipe(
    name="agents_drift",
    runs=(*DRIFT_SEARCHES.values(), *DRIFTS.values()),
    tables=entries([run.name for run in (*DRIFT_SEARCHES.values(), *DRIFTS.values())], {"agents.drift": drift_table}),
    numbers=entries(
        [run.name for run in DRIFTS.values()],
        {f"agents.drift.allowed.{name}": partial(allowed, name=name) for name in DRIFTS},
    ),
)
