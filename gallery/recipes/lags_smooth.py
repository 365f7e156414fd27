"""bilevel's regression: does averaging the hypergradient over the last ones pay, tuned alike?"""

from __future__ import annotations

from itertools import product

from gallery.read import Content, by_seed, difference, entries, figures_of, short, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.lags import (
    EVERY,
    FAILED,
    OUTER,
    SCORE,
    SCORED,
    SETTINGS,
    TUNING,
    best_of,
    configs,
    finished,
    grid,
    mean_score,
    written,
)
from lightning_toys.stats import format_estimate, geometric_ci, holm, mean_ci, paired_ratio

SMOOTHED, SMOOTHING = ("funcbo", "aid"), ("1", "10", "100")
STREAMS = ("regression", "regression_noisy")
# of each stream, algorithm and smoothing its outer rate
CHOSEN_SMOOTH: dict[tuple[str, str, str], str] = {
    ("regression", "funcbo", "1"): "0.1",
    ("regression", "funcbo", "10"): "0.1",
    ("regression", "funcbo", "100"): "0.03",
    ("regression", "aid", "1"): "0.1",
    ("regression", "aid", "10"): "0.1",
    ("regression", "aid", "100"): "0.03",
    ("regression_noisy", "funcbo", "1"): "0.1",
    ("regression_noisy", "funcbo", "10"): "0.1",
    ("regression_noisy", "funcbo", "100"): "0.03",
    ("regression_noisy", "aid", "1"): "0.1",
    ("regression_noisy", "aid", "10"): "0.1",
    ("regression_noisy", "aid", "100"): "0.03",
}
RATES_SMOOTH = Run(
    name="lags_rates_smooth",
    commands=(
        f"sweep {configs(STREAMS)} {grid(algorithm=SMOOTHED, smoothing=SMOOTHING, outer_lr=OUTER)} "
        f"--model.seeds '{TUNING}' {EVERY} --run.variant lags_rates_smooth",
    ),
    folder="bilevel/lags_rates_smooth",
    seeds="100 to 103",
    minutes=5,
    quick=None,
    keeps=True,
    may_diverge=True,
)
SMOOTH = Run(
    name="lags_smooth",
    commands=tuple(
        f"fit -c configs/bilevel/{stream}.yaml --model.algorithm {name} --model.smoothing {n} "
        f"--model.outer_lr {CHOSEN_SMOOTH[stream, name, n]} --model.seeds '{SCORED}' {EVERY} "
        f"--run.variant lags_smooth --run.name {stream},{name},{n}"
        for stream, name, n in product(STREAMS, SMOOTHED, SMOOTHING)
    ),
    folder="bilevel/lags_smooth",
    seeds="10 to 17",
    minutes=4,
    quick=None,
    keeps=True,
    may_diverge=True,
)


def smooth_search(at: Folders, stream: str, name: str, n: str, rate: str) -> Content | None:
    """Return a cell of the search for the rates of smoothed runs; None as :func:`search_cell`."""
    words = f"config={stream},algorithm={name},smoothing={n},outer_lr={rate}"
    return finished(at[RATES_SMOOTH.name] / words)


def smooth_rates(at: Folders) -> dict[tuple[str, str, str], str]:
    """Return the rates that the search chooses."""
    return {
        key: best_of({("", rate): mean_score(smooth_search(at, *key, rate)) for rate in OUTER})[1]
        for key in product(STREAMS, SMOOTHED, SMOOTHING)
    }


def smooth_cell(at: Folders, stream: str, name: str, n: str) -> Content | None:
    """Return a run of the study of smoothing; None where its training went non-finite."""
    return finished(at[SMOOTH.name] / f"{stream},{name},{n}")


def smooth_table(at: Folders) -> str:
    """Return the loss and the regret of every smoothed run, and what it is beside the same algorithm unsmoothed.

    Raises:
        ValueError: the rates of the recipe are not those of the search.
    """
    chosen = smooth_rates(at)
    for key, rate in chosen.items():
        if rate != CHOSEN_SMOOTH[key]:
            raise ValueError(f"{key}: the search chose {rate}, the recipe has {CHOSEN_SMOOTH[key]}")
    losses, regrets = {}, {}
    for stream, name, n in chosen:
        one, other = smooth_cell(at, stream, name, n), smooth_cell(at, stream, name, "1")
        if n == "1" or one is None or other is None:
            continue
        losses[stream, name, n] = difference(one, other, SCORE)
        ratio = paired_ratio(by_seed(one, "local_regret_all"), by_seed(other, "local_regret_all"))
        assert ratio is not None
        regrets[stream, name, n] = ratio
    p = holm([d.p_value for d in (*losses.values(), *regrets.values())]).tolist()
    p_loss, p_regret = dict(zip(losses, p, strict=False)), dict(zip(regrets, p[len(losses) :], strict=True))
    rows = []
    for key in chosen:
        content = smooth_cell(at, *key)
        row = [SETTINGS[key[0]], key[1], key[2], written(("", chosen[key]), [("", r) for r in OUTER])]
        if content is None:
            rows.append([*row, FAILED, *[""] * 5])
            continue
        regret = geometric_ci(values(content, "local_regret_all"))
        assert regret is not None
        row += [short(format_estimate(mean_ci(values(content, SCORE)))), figures_of(regret.mean, 3)]
        if key in losses:
            d, r = losses[key], regrets[key].estimate
            row += [short(format_estimate(d.estimate)), short(f"{p_loss[key]:.2g}")]
            row.append(f"{figures_of(r.mean, 3)} ({figures_of(r.lo, 3)} to {figures_of(r.hi, 3)})")
            row.append(short(f"{p_regret[key]:.2g}"))
        rows.append(row + [""] * (10 - len(row)))
    head = "stream | algorithm | mean of the last | outer_lr | whole stream | local regret | loss minus unsmoothed | p"
    return table(f"{head} | regret / unsmoothed | p", rows, left=2)


RECIPE = Recipe(
    name="lags_smooth",
    runs=(RATES_SMOOTH, SMOOTH),
    tables=entries([RATES_SMOOTH.name, SMOOTH.name], {"lags.smooth": smooth_table}),
)
