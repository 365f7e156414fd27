"""bilevel's control, tuned alike: what must a model of the world get right?"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from gallery.read import csv_rows, entries, figures_of, results, short, table
from gallery.recipe import Folders, Recipe, Run
from lightning_toys.bilevel.score_table import bootstrap, interquartile_mean, probability_of_improvement
from lightning_toys.plotting import ACROSS, COLOURS, blocks
from lightning_toys.stats import holm
from lightning_toys.training.noise import keyed_generator

CONFIG = "-c configs/bilevel/control.yaml"
RESIDUAL = "--model.agent vaml --model.world_model docs.examples.own_classes.own_world_model.Residual"
AGENTS = {
    "model_free": "--model.agent model_free",
    "mle": "--model.agent mle",
    "vep": "--model.agent vep",
    "omd": "--model.agent omd",
    "omd_published": "--model.agent omd --model.form published",
    "vaml": "--model.agent vaml",
}
LABELS = {
    "model_free": "model-free (no model: real targets)",
    "mle": "mle (maximum likelihood)",
    "vep": "vep (value equivalence)",
    "omd": "omd (optimal model design)",
    "omd_published": "omd, published form",
    "vaml": "vaml (value-aware; funcbo)",
    "vaml_residual": "vaml, s'_T := s + a network",
    "vaml_still": "vaml, s'_T := s",
    "vaml_reward": "vaml, no gradient through V(s'_T)",
}
# whether the predicted state is used: without it, by the same class of model; and without its gradient
PARTS = {
    "vaml_residual": f"{RESIDUAL} --model.world_model.scale 1",
    "vaml_still": f"{RESIDUAL} --model.world_model.scale 0",
    "vaml_reward": "--model.agent vaml --model.solver.state_gradient false",
}
TUNING = "[100,101,102,103,104,105,106,107]"
SCORED = f"[{','.join(map(str, range(10, 26)))}]"
RATES = ("3e-4", "1e-3", "3e-3")
CROSS = tuple((r, "1e-3") for r in RATES) + tuple(("1e-3", r) for r in RATES if r != "1e-3")  # (lr, inner_lr)
# of each agent the rates of its model and of its values; what the search says, see check_rates
CHOSEN: dict[str, tuple[str, str]] = {
    "model_free": ("1e-3", "3e-3"),
    "mle": ("1e-3", "3e-3"),
    "vep": ("1e-3", "3e-3"),
    "omd": ("3e-4", "1e-3"),
    "omd_published": ("3e-3", "1e-3"),
    "vaml": ("1e-3", "3e-3"),
    "vaml_residual": ("1e-3", "3e-3"),
    "vaml_still": ("3e-4", "1e-3"),
    "vaml_reward": ("3e-3", "1e-3"),
}
STEPS = (30_000, 50_000, 200_000)
WIDTHS = ("3", "32")
QUIET = "--figures.enabled false"
CURVES = ("eval/return", "replicas/eval/return/*")  # that recipes read


def search(name: str, minutes: float) -> Run:
    """Return the search for an agent's rates: a cross around 1e-3, not the square."""
    at = f"{CONFIG} {(AGENTS | PARTS)[name]} --model.model_hidden_dim 8 --model.seeds '{TUNING}'"
    every = f"--trainer.val_check_interval 2000 --checkpoint.every_n_steps 30000 --model.eval_episodes 20 {QUIET}"
    variant = f"--run.variant control_rates_{name}"
    grids = [f"--grid.model.lr '[1e-3]' --grid.model.inner_lr '[{','.join(RATES)}]'"]
    if name != "model_free":
        grids.append("--grid.model.lr '[3e-4,3e-3]' --grid.model.inner_lr '[1e-3]'")
    return Run(
        name=f"control_rates_{name}",
        commands=tuple(f"sweep {at} {g} {every} {variant}" for g in grids),
        folder=f"bilevel/control_rates_{name}",
        seeds="100 to 107",
        minutes=minutes,
        quick=None,
        keeps=True,
        curves=CURVES,
        may_diverge=True,
    )


SEARCH_MINUTES = {"model_free": 3.5, "mle": 7, "vep": 9, "omd": 11, "omd_published": 13, "vaml": 9}
SEARCH_MINUTES |= dict.fromkeys(PARTS, 9)
SEARCHES = {name: search(name, m) for name, m in SEARCH_MINUTES.items()}


def words_of(name: str, width: str, seeds: str = SCORED) -> str:
    """Return the words of an agent with its rates."""
    lr, inner = CHOSEN[name]
    every = f"--model.seeds '{seeds}' --model.eval_episodes 100 --trainer.val_check_interval 10000"
    every += f" --checkpoint.every_n_steps 10000 {QUIET}"
    agent = (AGENTS | PARTS)[name]
    return f"fit {CONFIG} {agent} --model.lr {lr} --model.inner_lr {inner} --model.model_hidden_dim {width} {every}"


def study(name: str, minutes: float, width: str = "8", steps: Sequence[int] = (30_000,)) -> Run:
    """Return the run of an agent: one training, which stops at each number of steps, is scored there and goes on."""
    return Run(
        name=f"control_{name}_{width}",
        commands=tuple(f"{words_of(name, width)} --trainer.max_steps {n}" for n in steps),
        folder=f"bilevel/control_{width}/{name}",
        seeds="10 to 25",
        minutes=minutes,
        quick=None,
        may_diverge=True,
        keeps=True,
    )


LONG_MINUTES = {"model_free": 8, "mle": 11, "vep": 13, "omd": 18, "omd_published": 20, "vaml": 14}
LONG = {name: study(name, m, steps=STEPS) for name, m in LONG_MINUTES.items()}
WIDE = {(n, w): study(n, LONG_MINUTES[n] / 6, w) for w in WIDTHS for n in AGENTS if n != "model_free"}


# the search


def validated(folder: Path, since: int) -> list[float]:
    """Return the returns of a run's validations from a step on, all seeds' means."""
    rows = [r for r in csv_rows(folder / "metrics.csv") if r.get("eval/return") and int(r["step"]) >= since]
    if not rows:
        raise ValueError(f"{folder}: no validation from step {since} on")
    return [float(r["eval/return"]) for r in rows]


def score(at: Folders, name: str, pair: tuple[str, str]) -> float:
    """Return what the search compares: the mean return of the validations from step 20 000 on; 0 if it did not end."""
    lr, inner = pair
    folder = at[SEARCHES[name].name] / f"lr={lr},inner_lr={inner}"
    return float(np.mean(validated(folder, 20_000))) if ended(folder) else 0.0


def ended(folder: Path) -> bool:
    """Whether a cell's training came to its end, and did not go non-finite.

    Raises:
        FileNotFoundError: there is no such cell.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there")
    return (folder / "results.json").is_file()


def tried(name: str) -> list[tuple[str, str]]:
    """Return the pairs that an agent's search tried."""
    return [p for p in CROSS if name != "model_free" or p[0] == "1e-3"]


def check_rates(at: Folders, names: Collection[str] = AGENTS) -> dict[str, dict[tuple[str, str], float]]:
    """Return every score of the search by agent and pair of rates.

    Args:
        at: the searches' folders.
        names: of the agents.

    Raises:
        ValueError: an agent's rates are not those of the greatest score.
    """
    found = {name: {pair: score(at, name, pair) for pair in tried(name)} for name in names}
    for name, scores in found.items():
        check_chosen(name, scores, CHOSEN[name])
    return found


def check_chosen(what: object, scores: Mapping[Any, float], chosen: object) -> None:
    """Raise a ValueError where no cell of a search ended, or another than ``chosen`` has the greatest score."""
    if not any(scores.values()):
        raise ValueError(f"{what}: no cell of the search ended")
    best = max(scores, key=lambda k: scores[k])
    if best != chosen:
        raise ValueError(f"{what}: the search chose {best}, the recipe has {chosen}")


def rates_table(at: Folders, names: Collection[str] = AGENTS) -> str:
    """Return the search's scores; a star where a chosen rate is the least or the greatest of those tried."""
    rows = []
    for name, scores in check_rates(at, names).items():
        cells = {p: f"{scores[p]:.0f}" if p in scores else "" for p in CROSS}
        edge = any(rate in (RATES[0], RATES[-1]) for rate in CHOSEN[name])
        cells[CHOSEN[name]] = f"**{cells[CHOSEN[name]]}**" + ("*" if edge else "")
        rows.append([LABELS[name], *cells.values()])
    heads = [short(f"{float(lr):g}, {float(inner):g}") for lr, inner in CROSS]
    return table(f"agent | {' | '.join(heads)}", rows)


# the study


def steps_of(folder: Path) -> list[Path]:
    """Return the results of a run's fits, the oldest first."""
    before = sorted(folder.glob("results-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    return [p for p in (*before, folder / "results.json") if p.is_file()]


def returns(content: Mapping[str, Any]) -> np.ndarray:
    """Return each seed's return."""
    return np.array(content["metrics"]["return"]["values"], dtype=np.float64)


def scores(at: Folders, run: Run, k: int = 0) -> np.ndarray | None:
    """Return each seed's return at the k-th number of steps of a run; None if it had gone non-finite by then.

    Raises:
        ValueError: the run has more results than numbers of steps, or they are of others.
    """
    found = steps_of(at[run.name])
    if len(found) > len(run.commands):
        raise ValueError(f"{run.name}: {len(found)} results of {len(run.commands)} fits")
    if k >= len(found):
        return None
    content = json.loads(found[k].read_text())
    wanted = int(run.commands[k].rpartition(" ")[2])
    if content["step"] != wanted:
        raise ValueError(f"{run.name}: {found[k].name} is of step {content['step']}, not of {wanted}")
    return returns(content)


Cell = tuple[str, str, int]  # agent, width of its model, steps


def all_scores(at: Folders) -> dict[Cell, np.ndarray]:
    """Return each seed's return by agent, width and steps; of model_free, which has no model, width 8 alone.

    A run of which a seed went non-finite stops with all of its seeds: it has no score from there on.
    """
    cells: dict[Cell, np.ndarray | None] = {}
    for name, run in LONG.items():
        for k, n in enumerate(STEPS):
            cells[name, "8", n] = scores(at, run, k)
    for (name, width), run in WIDE.items():
        cells[name, width, STEPS[0]] = scores(at, run)
    return {cell: x for cell, x in cells.items() if x is not None}


def base_cell(cell: Cell, base: str) -> Cell:
    """Return the cell of another agent that a cell is compared with."""
    _, width, steps = cell
    return (base, "8" if base == "model_free" else width, steps)


@lru_cache(maxsize=4096)
def permutation_p(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the two-sided p-value of a permutation test of Welch's t, 9999 random relabellings.

    >>> permutation_p((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)) > 0.9
    True
    """

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        gap = x.mean(axis) - y.mean(axis)
        spread = x.var(axis, ddof=1) / x.shape[axis] + y.var(axis, ddof=1) / y.shape[axis]
        found: np.ndarray = gap / np.sqrt(np.maximum(spread, 1e-12))
        return found

    rng = keyed_generator(0, len(a), "agents/permutation")
    found = scipy_stats.permutation_test((a, b), statistic, vectorized=True, n_resamples=9999, axis=-1, rng=rng)
    return float(found.pvalue)


FAILED = "went non-finite"
BASES = ("model_free", "mle")
OWN_FORM = {"omd_published": ("omd",)}  # it is another form than theirs


def bases_of(name: str) -> tuple[str, ...]:
    """Return the agents that an agent is compared with."""
    return OWN_FORM.get(name, BASES)


def comparisons(found: Mapping[Cell, np.ndarray]) -> list[tuple[Cell, Cell]]:
    """Return every pair that the tables by steps and by width compare, each once."""
    out = []
    for cell in found:
        bases = bases_of(cell[0])
        out += [(cell, base_cell(cell, b)) for k, b in enumerate(bases) if cell[0] != b and cell[0] not in bases[:k]]
    return [(a, b) for a, b in out if b in found]


def p_values(found: Mapping[Cell, np.ndarray]) -> dict[tuple[Cell, Cell], float]:
    """Return of every pair p of a difference, adjusted by Holm as one family."""
    pairs = comparisons(found)
    p = holm([permutation_p(tuple(found[a].tolist()), tuple(found[b].tolist())) for a, b in pairs]).tolist()
    return dict(zip(pairs, p, strict=True))


def chance_words(x: np.ndarray, y: np.ndarray, p: float) -> str:
    """Write the probability that one run of x is above one of y, its interval, and p: in bold type below 5 %."""
    chance = bootstrap(probability_of_improvement, x, y)
    text = short(f"{chance.value:.2f} [{chance.low:.2f}, {chance.high:.2f}], p = {p:.2g}")
    return f"**{text}**" if p < 0.05 else text


def compared(found: Mapping[Cell, np.ndarray], p: Mapping[tuple[Cell, Cell], float], cell: Cell, base: str) -> str:
    """Write how often a cell is above a base; nothing where the two are not compared."""
    other = base_cell(cell, base)
    return chance_words(found[cell], found[other], p[cell, other]) if (cell, other) in p else ""


def iqm(x: np.ndarray) -> str:
    """Write an interquartile mean with its interval."""
    e = bootstrap(interquartile_mean, x)
    return f"{e.value:.0f} [{e.low:.0f}, {e.high:.0f}]"


def row_of(found: Mapping[Cell, np.ndarray], p: Mapping[tuple[Cell, Cell], float], cell: Cell) -> list[str]:
    """Return what the tables say of a cell: levels, seeds at the top, and comparisons."""
    x = found.get(cell)
    if x is None:
        return [FAILED, *[""] * 5]
    solved = f"{int((x >= 475).sum())} of {len(x)}"
    return [iqm(x), f"{x.mean():.0f}", solved, *(compared(found, p, cell, b) for b in (*BASES, "omd"))]


HEAD = "agent | interquartile mean | mean | seeds at 475 or more | P(above model-free) | P(above mle) | P(above omd)"


def study_table(at: Folders) -> str:
    """Return every agent at width 8 by steps."""
    check_rates(at)
    found = all_scores(at)
    p = p_values(found)
    rows = [
        [f"{n:,}".replace(",", " "), LABELS[name], *row_of(found, p, (name, "8", n))] for n in STEPS for name in AGENTS
    ]
    return table(f"steps | {HEAD}", rows, left=2)


def width_table(at: Folders) -> str:
    """Return every agent by the width of its model, after 30 000 steps."""
    check_rates(at)
    found = all_scores(at)
    p = p_values(found)
    with_models = [name for name in AGENTS if name != "model_free"]
    rows = [[w, LABELS[name], *row_of(found, p, (name, w, STEPS[0]))] for w in ("3", "8", "32") for name in with_models]
    return table(f"model width | {HEAD}", rows, left=2)


def errors_table(at: Folders) -> str:
    """Return the median over seeds of each agent's errors at the end, and the range of the model's."""
    rows = []
    for name, run in LONG.items():
        if len(steps_of(at[run.name])) < len(STEPS):
            rows.append([LABELS[name], FAILED, "", ""])
            continue
        content = results(at[run.name], "fit")
        cells = []
        for metric in ("td_error", "model_error", "reward_error"):
            found = [v for v in content["metrics"].get(metric, {"values": []})["values"] if v is not None]
            if not found:
                cells.append("")
                continue
            low, high = min(found), max(found)
            cells.append(f"{figures_of(float(np.median(found)), 2)} ({figures_of(low, 2)} to {figures_of(high, 2)})")
        rows.append([LABELS[name], *cells])
    return table("agent | d - y | next state | reward", rows)


def drawing(at: Folders) -> str:
    """Draw every seed's return and the interquartile mean with its interval: by steps, then by the model's width."""
    check_rates(at)
    found = all_scores(at)
    panels = [("8", n) for n in STEPS] + [(w, STEPS[0]) for w in WIDTHS]
    figure, blocks_of = blocks(len(panels), sharey=True)
    for (ax,), (width, n) in zip(blocks_of, panels, strict=True):
        for k, name in enumerate(AGENTS):
            cell = (name, "8" if name == "model_free" else width, n)
            if cell not in found:  # went non-finite
                continue
            x = found[cell]
            ax.plot(k + np.linspace(-0.28, 0.28, len(x)), x, ".", color=COLOURS[k], alpha=0.6, markersize=5)
            e = bootstrap(interquartile_mean, x)
            ax.errorbar([k], [e.value], [[e.value - e.low], [e.high - e.value]], color="black", marker="_", ms=14)
        ax.set_xticks(range(len(AGENTS)), [name.replace("_", "\n") for name in AGENTS], rotation=90)
        ax.set_title(f"{n:,} steps,\nmodel width {width}".replace(",", " ", 1), fontsize=9)
    for (ax,) in blocks_of[::ACROSS]:
        ax.set_ylabel("return: seeds;\ninterquartile mean, 95 % interval")
    path = at[LONG["mle"].name] / "agents.png"
    figure.savefig(path, dpi=110)
    return str(path)


SEARCH_RUNS = [SEARCHES[name].name for name in AGENTS]
STUDY_RUNS = [*SEARCH_RUNS, *(run.name for run in (*LONG.values(), *WIDE.values()))]
RECIPE = Recipe(
    name="agents",
    runs=(
        *SEARCHES.values(),
        *LONG.values(),
        *WIDE.values(),
    ),
    figures=entries(STUDY_RUNS, {"bilevel_agents": drawing}),
    tables=(
        *entries(SEARCH_RUNS, {"agents.rates": rates_table}),
        *entries(STUDY_RUNS, {"agents.steps": study_table, "agents.widths": width_table}),
        *entries([run.name for run in LONG.values()], {"agents.errors": errors_table}),
    ),
)
