"""README's picture: a panel for each experiment, drawn from run folders."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from gallery.read import by_seed, figures_of, fixed, results, values
from gallery.recipe import Folders
from gallery.verdicts import paired_ratio
from lightning_toys.plotting import COLOURS, GREY, MARKERS
from lightning_toys.stats import mean_ci

RUNS = ("demo", "demo_averaged", "one_gaussian", "one_meanflow", "analytic", "arithmetic", "window", "lags_shipped")
INK = "#222222"
Painter = Callable[[SubFigure, Folders], None]


def plain(ax: Axes) -> None:
    """Give axes the look of all our figures."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)


def headed(part: SubFigure, name: str, question: str, finding: str) -> None:
    """Write above a panel the experiment's name, its question, and what was found."""
    part.suptitle("\n" * (3 + finding.count("\n")), fontsize=12)  # room for what follows, in points from the top
    lines: tuple[tuple[int, str, dict[str, Any]], ...] = (
        (4, name, {"fontsize": 8.5, "color": GREY}),
        (17, question, {"fontsize": 11, "fontweight": "bold", "color": INK}),
        (35, finding, {"fontsize": 9.5, "color": INK, "linespacing": 1.3}),
    )
    for down, text, style in lines:
        place = part.transSubfigure + ScaledTranslation(8 / 72, -down / 72, part.dpi_scale_trans)
        part.text(0, 1, text, ha="left", va="top", transform=place, **style)


def points(ax: Axes, y: float, found: list[float], colour: str, marker: str = "o") -> None:
    """Draw each seed, and geometric mean and 95 % interval, on a line."""
    e = mean_ci([math.log(v) for v in found])
    half = 0.0 if math.isnan(e.half_width) else e.half_width
    ax.plot(found, np.full(len(found), y), "o", color=colour, alpha=0.35, markersize=4)
    mean, low, high = (math.exp(v) for v in (e.mean, e.mean - half, e.mean + half))
    ax.errorbar(
        mean, y, xerr=[[mean - low], [high - mean]], fmt=marker, color=colour, capsize=3, markersize=6, linewidth=1.6
    )


def flow(part: SubFigure, at: Folders) -> None:
    """Draw the error of regression and flow, by both weights, beside the rows without a network."""
    ax = part.subplots()
    plain(ax)
    cells = {
        (weights, mode): results(at[run] / f"mode={mode}")
        for weights, run in (("averaged", "demo_averaged"), ("last step", "demo"))
        for mode in ("regression", "flow")
    }
    for i, ((_, mode), r) in enumerate(cells.items()):
        k = ("regression", "flow").index(mode)
        points(ax, i, values(r, "l2"), COLOURS[k], MARKERS[k])
    references = cells["last step", "flow"]["references"]
    place = blended_transform_factory(ax.transData, ax.transAxes)
    shown = {"linear": "straight lines", "nearest": "nearest point", "zero": "zero"}
    for name, label in shown.items():
        value = references[name]["l2"]
        ax.axvline(value, color=GREY, linestyle=":", linewidth=1.3)
        ax.text(value, 1.01, label, ha="center", va="bottom", fontsize=9, color=GREY, transform=place)
    ax.set_xscale("log")
    ax.set_yticks(range(len(cells)), [f"{mode}, {weights}" for weights, mode in cells], fontsize=9.5)
    ax.set_ylim(len(cells) - 0.4, -0.6)
    ax.set_xlabel("RMSE between points (seeds; geometric mean, 95 %)", fontsize=9.5)
    ratios = {
        weights: paired_ratio(by_seed(cells[weights, "flow"], "l2"), by_seed(cells[weights, "regression"], "l2"))
        for weights in ("averaged", "last step")
    }
    times = {weights: figures_of(math.exp(r.log), 2) for weights, r in ratios.items()}
    headed(
        part,
        "flow_vs_regression",
        "What do flows and regression do between 50 points?",
        f"Trained alike on one noiseless target, the flow's error is {times['averaged']}\n"
        f"times regression's with averaged weights, {times['last step']} times with the last.",
    )


def policy(part: SubFigure, at: Folders) -> None:
    """Draw samples of the Gaussian and of one MeanFlow step over the target."""
    from lightning_toys.generative_policy.figures import draw_contours, load_target, read_snapshots

    axes = part.subplots(1, 2, sharey=True)
    for ax, run, title in (
        (axes[0], "one_gaussian", "SAC Gaussian, seed 0"),
        (axes[1], "one_meanflow", "MeanFlow, one step, seed 0"),
    ):
        plain(ax)
        snapshots = read_snapshots(at[run])
        x = snapshots[max(snapshots)][:4000]
        ax.plot(x[:, 0], x[:, 1], ".", color=COLOURS[0], markersize=1.8, alpha=0.5, rasterized=True)
        draw_contours(ax, load_target(at[run]), half=1.0)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xlabel("action 1", fontsize=9.5)
        ax.set_xticks([-1, 0, 1])
        ax.set_yticks([-1, 0, 1])
    axes[0].set_ylabel("action 2", fontsize=9.5)
    axes[0].text(-0.95, 0.95, "red: target\nblue: actions", fontsize=9, color=GREY, va="top")
    tv = values(results(at["one_meanflow"]), "tv")[0]
    headed(
        part,
        "generative_policy",
        "Which policies keep several modes, in one step?",
        "By the reverse KL a Gaussian settles on one mode; a MeanFlow,\n"
        f"trained on samples, keeps three in one step (weights off by {fixed(tv, 3)}).",
    )


FAMILIES = (
    ("plain", ("importance", "independence", "ula", "mala", "gibbs")),
    ("annealed", ("pc_",)),
    ("reverse SDE", ("sde_",)),
    ("reverse ODE", ("ode_",)),
    ("twisted SMC", ("smc_",)),
)


def mirror(part: SubFigure, at: Folders) -> None:
    """Draw every sampler's distance from the tilted distribution."""
    from lightning_toys.mirror_descent.figures import exact_draws_kl

    ax = part.subplots()
    plain(ax)
    r = results(at["analytic"])
    found = {n.partition("@")[2]: values(r, n) for n in r["metrics"] if n.startswith("joint_kl@")}
    order = sorted((n for n in found if not n.endswith("_none")), key=lambda n: float(np.mean(found[n])))
    for i, name in enumerate(order):
        kind = next(k for k, (_, marks) in enumerate(FAMILIES) if name.startswith(marks))
        e = mean_ci(found[name])
        half = 0.0 if math.isnan(e.half_width) else e.half_width
        left = min(half, 0.9 * e.mean)
        colour, marker = COLOURS[kind], MARKERS[kind]
        ax.errorbar(e.mean, i, xerr=[[left], [half]], fmt=marker, color=colour, capsize=2, markersize=5, linewidth=1.3)
    for k, (label, _) in enumerate(FAMILIES):
        ax.plot([], [], MARKERS[k], color=COLOURS[k], markersize=5, label=label)
    low, expected, high = exact_draws_kl(5, len(r["seeds"]), int(r["settings"]["model.chains"]))
    ax.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0, label="exact draws, 95 %")
    ax.axvline(expected, color=GREY, linestyle=":", linewidth=1.3)
    ax.set_xscale("log")
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_xlabel("KL of (a, s') to the tilted distribution (nats)", fontsize=9.5)
    ax.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=8.5, loc="upper right")
    headed(
        part,
        "mirror_descent",
        "Which samplers reach a tilted distribution that is known?",
        "Plain Metropolis steps and weights do, within their errors; guidance by a\n"
        f"product of experts (sde_poe) ends {fixed(float(np.mean(found['sde_poe'])), 2)} nats off.",
    )


def entropy(part: SubFigure, at: Folders) -> None:
    """Draw the measured change of entropy against the step's size, every seed."""
    from gallery.recipes.entropy import each, gained, probes

    ax = part.subplots()
    plain(ax)
    found = probes(at)
    etas: list[str] = []
    for k, (seed, p) in enumerate(found.items()):
        e = p["evaluations"][0]
        etas = list(e["changes"]["full"])
        x = np.array([float(eta) for eta in etas]) * 1.06 ** (k - (len(found) - 1) / 2)
        y = np.array([c["value"] for c in e["changes"]["full"].values()]) * 1000
        half = np.array([c["half_width"] for c in e["changes"]["full"].values()]) * 1000
        style: dict[str, Any] = {"color": COLOURS[k], "marker": MARKERS[k], "markersize": 4.5, "linewidth": 1.2}
        ax.errorbar(x, y, yerr=half, capsize=2, label=f"seed {seed}", **style)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axvline(0.001, color=GREY, linestyle=":", linewidth=1.3)
    ax.text(0.00094, 0.97, "learning rate", rotation=90, ha="right", va="top", fontsize=9, color=GREY,
            transform=blended_transform_factory(ax.transData, ax.transAxes))  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1, linscale=1)
    ax.set_yticks([-1, 0, 1, 10], ["-1", "0", "1", "10"])
    ax.set_xlabel("length of the step (eta)", fontsize=9.5)
    ax.set_ylabel("change of entropy (1/1000 nats a token)", fontsize=9.5)
    ax.legend(frameon=False, fontsize=8.5, loc="upper left")
    raised = sum(v > 0 for v in each(at, lambda e: float(e["changes"]["full"][etas[-1]]["value"])))
    fall = mean_ci(gained(at, "entropy")).mean
    headed(
        part,
        "update_entropy",
        "What does one AdamW step do to a policy's entropy?",
        f"Training {'lowers' if fall < 0 else 'raises'} it by {fixed(abs(fall), 3)} nats a token; one step ten times\n"
        f"as long as those taken raises it in {raised} of {len(found)} seeds.",
    )


METHODS = {  # of the lag study, top to bottom, and the kind that says its colour
    "uniform": ("equal weights", 0),
    "lag_1": ("last observation alone", 0),
    "fixed": ("short window, tuned", 0),
    "least_squares": ("least squares on window", 0),
    "unroll1": ("unroll1", 1),
    "aid": ("aid", 1),
    "funcbo": ("funcbo", 1),
    "optimum": ("best weights, given", 2),
}
KINDS = ("rules without a hypergradient", "hypergradients", "knows the drift")


def bilevel(part: SubFigure, at: Folders) -> None:
    """Draw the learned weights of each lag, and every method's loss over the stream."""
    left, right = part.subplots(1, 2)
    found = {a: results(at["window"] / f"algorithm={a}") for a in ("funcbo", "aid", "unroll1")}
    for ax in (left, right):
        plain(ax)
    best = oracle(found["funcbo"])
    lags = np.arange(1, len(best) + 1)
    left.bar(lags, best, color="#cccccc", width=0.9, label="best, in closed form")
    for k, a in enumerate(found):
        for i, w in enumerate(found[a]["arrays"]["weights_by_seed"]):
            left.plot(lags, w, color=COLOURS[k], marker=MARKERS[k], markersize=2.5, linewidth=0.8, alpha=0.7,
                      label=None if i else a)  # fmt: skip
    left.set_xlabel("lag (steps)", fontsize=9.5)
    left.set_ylabel("weight of each seed", fontsize=9.5)
    left.legend(frameon=False, fontsize=8.5, loc="upper center")
    losses = {name: values(results(at["lags_shipped"] / name, "fit"), "outer_loss_all") for name in METHODS}
    for i, (name, (_, kind)) in enumerate(METHODS.items()):
        points(right, i, losses[name], COLOURS[kind], MARKERS[kind])
    for kind, label in enumerate(KINDS):
        right.plot([], [], MARKERS[kind], color=COLOURS[kind], markersize=5, label=label)
    right.set_xscale("log")
    right.set_yticks(range(len(METHODS)), [label for label, _ in METHODS.values()], fontsize=9.5)
    right.set_ylim(len(METHODS) - 0.4, -0.6)
    ticks = [3, 4, 5, 10, 15]
    right.set_xticks(ticks, [str(t) for t in ticks])
    right.minorticks_off()
    right.set_xlabel("loss over the stream (seeds; geometric mean, 95 %)", fontsize=9.5)
    right.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=8.5, loc="center right")
    mean = {name: figures_of(float(np.mean(found)), 2) for name, found in losses.items()}
    headed(
        part,
        "bilevel",
        "Can a hypergradient find which past to learn from?",
        "On one drift, of period 31.4 steps, the learned weights are large near one period. The mean loss of unroll1\n"
        f"is {mean['unroll1']}, of the last observation alone {mean['lag_1']}, "
        f"of least squares on the window, without a hypergradient, {mean['least_squares']}.",
    )


def oracle(r: dict[str, Any]) -> np.ndarray:
    """Return the weights that an exact inner solver would want."""
    from lightning_toys.bilevel.regression.drift import ExactLoss, Sine

    s = r["settings"]
    drift = Sine(s["data.drift.amplitude"], s["data.drift.omega"])
    return ExactLoss(drift, s["data.window"], s["data.outputs"], s["data.noise"]).oracle()


def draw(at: Folders) -> str:
    """Draw the sheet; return where it is."""
    figure = Figure(figsize=(10, 13), layout="constrained")
    FigureCanvasAgg(figure)
    rows: Any = figure.subfigures(3, 1, height_ratios=[0.92, 1.1, 0.95], hspace=0.04)
    pairs: tuple[tuple[Painter, Painter], ...] = ((flow, policy), (mirror, entropy))
    for row, pair in zip(rows[:2], pairs, strict=True):
        for part, painter in zip(row.subfigures(1, 2, wspace=0.04), pair, strict=True):
            painter(part, at)
    bilevel(rows[2], at)
    if not at.full:
        figure.text(0.5, 0.5, "QUICK SETTING\nnot the documented results", color=COLOURS[1], alpha=0.35, fontsize=44,
                    ha="center", va="center", rotation=30)  # fmt: skip
    path = Path(at["demo"]).parent / "sheet.png"
    figure.savefig(path, dpi=130)
    return str(path)
