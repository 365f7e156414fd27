"""Figures of the training and of the probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_toys.plotting import ACROSS, COLOURS, GREY, MARKERS, band, blocks, new_figure
from lightning_toys.stats import t_quantile
from lightning_toys.training.metrics_reader import read_run, replica_columns
from lightning_toys.update_entropy.cache import to_numpy
from lightning_toys.update_entropy.estimators import EntropyKind
from lightning_toys.update_entropy.grpo import rows_by_prompt
from lightning_toys.update_entropy.history import moving_average, validation_changes
from lightning_toys.update_entropy.probe_result import EvaluationResult, ProbeResult
from lightning_toys.update_entropy.report import correlation
from lightning_toys.update_entropy.screen import entropy_unit
from lightning_toys.update_entropy.task import Tokenizer


def draw_training(
    folder: Path, seeds: Sequence[int], warm_steps: int, kind: EntropyKind, window: int = 5
) -> dict[str, Figure]:
    """Return ``training``: reward, entropy and length over the policy gradient's steps, or nothing if there are none.

    Args:
        folder: of the run, with its metrics.csv.
        seeds: of the replicas.
        warm_steps: supervised steps before the policy gradient's.
        kind: which entropy, for its unit.
        window: steps of the moving average.
    """
    rows = read_run(folder)
    steps, _ = replica_columns(rows, "train/reward", seeds)
    if len(steps) < 2:
        return {}
    figure, axes = new_figure(1, 3, size=(8.8, 3.2))
    names = (("reward", "mean reward"), ("entropy", f"entropy, {entropy_unit(kind)}"), ("length", "length, tokens"))
    for ax, (name, label), colour in zip(axes[0], names, COLOURS, strict=False):
        steps, values = replica_columns(rows, f"train/{name}", seeds)
        for one in values:
            ax.plot(steps - warm_steps, one, color=colour, alpha=0.25, linewidth=0.8)
        band(ax, steps - warm_steps, moving_average(values, window), colour, f"mean of {window} steps")
        ax.set_xlabel("policy-gradient step")
        ax.set_ylabel(label)
    shown = f"{len(seeds)} seeds, band: 95 % interval" if len(seeds) > 1 else "one seed"
    changes = [f"validation: {line}" for line in validation_changes(folder, seeds, warm_steps)]
    title = f"Dr. GRPO after imitation ({shown}; thin: every step; thick: mean of the last {window})"
    figure.suptitle("\n".join([title, *changes]), fontsize=9)
    return {"training": figure}


def draw_predictions(folder: Path, seeds: Sequence[int], first_step: int = 0) -> dict[str, Figure]:
    """Return ``predictions``: what UpdateEntropyCallback predicted and measured, step by step, of the first replica.

    Args:
        folder: of the run, with its metrics.csv.
        seeds: of the replicas.
        first_step: optimiser steps before the first on the axis.
    """
    rows = read_run(folder)
    steps, predicted = replica_columns(rows, "entropy_step/predicted", seeds)
    if len(steps) < 2 or not any("entropy_step/measured" in r for r in rows):
        return {}
    found = {
        k: replica_columns(rows, f"entropy_step/{k}", seeds)[1] for k in ("predicted_se", "measured", "measured_se")
    }
    parts = {k: replica_columns(rows, f"entropy_step/{k}", seeds)[1][0] for k in ("momentum", "decay", "batch")}
    bent = any(r.get("entropy_step/second_order") for r in rows)
    order, name = ("second", "second_order") if bent else ("first", "predicted")
    best, best_se = (replica_columns(rows, f"entropy_step/{k}", seeds)[1] for k in (name, f"{name}_se"))
    clusters = replica_columns(rows, "entropy_step/clusters", seeds)[1]  # nothing in a run of before they were logged
    quantiles = t_quantiles(clusters) if clusters.shape == predicted.shape else np.full(predicted.shape, 1.96)
    error = np.sqrt(best_se**2 + found["measured_se"] ** 2)
    inside = np.abs(found["measured"] - best) <= quantiles * error
    sums = [
        f"{v[0].sum():.4f} ± {np.sqrt((e[0] ** 2).sum()):.4f}"
        for v, e in ((best, best_se), (found["measured"], found["measured_se"]))
    ]
    figure, axes = new_figure(2, 1, size=(8.0, 6.8))
    ax, x = axes[0, 0], steps - first_step
    half = quantiles[0] * best_se[0]
    ax.fill_between(x, best[0] - half, best[0] + half, color=COLOURS[0], alpha=0.22, linewidth=0)
    ax.plot(x, best[0], color=COLOURS[0], label=f"predicted, {order} order, 95 %")
    if bent:
        ax.plot(x, predicted[0], color=GREY, linewidth=0.9, linestyle="--", label="first order")
    ax.errorbar(x, found["measured"][0], yerr=quantiles[0] * found["measured_se"][0], fmt="s", color=COLOURS[1],
                markersize=4, capsize=2, linewidth=0.8, label="measured, 95 %")  # fmt: skip
    among = f"{inside.size} steps" + (f" of {len(inside)} seeds" if len(inside) > 1 else "")
    ax.set_title(
        f"within the {order}-order prediction's 95 % interval (both errors) at {inside.mean():.0%} of {among}\n"
        f"drawn: seed {seeds[0]}; sums (± one s.e.): {sums[0]} predicted, {sums[1]} measured",
        fontsize=8.5,
    )
    ax.set_ylabel("change of entropy, nats a token")
    for (name, values), colour in zip(parts.items(), (COLOURS[1], COLOURS[2], COLOURS[3]), strict=True):
        axes[1, 0].plot(x, values, color=colour, label=name)
    axes[1, 0].plot(x, predicted[0], color="black", linewidth=1, linestyle="--", label="their sum")
    axes[1, 0].set_title(f"seed {seeds[0]}: the prediction and its parts", fontsize=9)
    axes[1, 0].set_ylabel("predicted change, nats a token")
    for a in axes.flat:
        a.axhline(0, color="black", linewidth=0.6)
        a.set_xlabel("policy-gradient step" if first_step else "optimiser step")
        a.legend(frameon=False, fontsize=8)
    return {"predictions": figure}


def t_quantiles(clusters: np.ndarray) -> np.ndarray:
    """Return Student's t of 95 % intervals whose errors are of so many clusters of prompts; infinite for one.

    >>> t_quantiles(np.array([1.0, 2.0, 1e9])).round(2)
    array([  inf, 12.71,  1.96])
    """
    found: np.ndarray = np.vectorize(lambda n: t_quantile(0.975, n - 1) if n > 1 else np.inf, otypes=[float])(clusters)
    return found


def interval_factor(e: EvaluationResult) -> float:
    """Return how many standard errors half a 95 % interval is, by the prompts of E; 0, no bar, where there is one."""
    return t_quantile(0.975, e.entropy.prompts - 1) if e.entropy.prompts > 1 else 0.0


def half_with_update(result: ProbeResult, key: str) -> float:
    """Return half of the 95 % interval of a derivative by both errors, E's and U's draw; NaN where U's is not known.

    Student's t is that of the prompts of U, which are fewer.
    """
    e, prompts = result.evaluations[0], len(rows_by_prompt(result.update.sequences))
    if key not in e.update_se or prompts < 2:
        return math.nan
    return t_quantile(0.975, prompts - 1) * math.hypot(e.derivatives[key][1], e.update_se[key])


def draw_changes(ax: Axes, result: ProbeResult, title: str, unit: str) -> None:
    """Draw dH / eta against eta: it tends to dH/d eta as eta falls, and the curvature adds a straight line in eta."""
    e = result.evaluations[0]
    etas = np.array(sorted(e.changes["full"]))
    found = [e.changes["full"][x].change for x in etas]
    derivative, se = e.derivatives["full"]
    wide, wider = interval_factor(e) * se, half_with_update(result, "full")
    line = np.geomspace(etas[0] / 3, etas[-1] * 1.5, 200)
    ax.axhline(derivative, color=GREY, linestyle="--", label="slope: first order")
    ax.axhspan(derivative - wide, derivative + wide, color=GREY, alpha=0.25, linewidth=0, label="its 95 %, E's draws")
    if not math.isnan(wider):
        ax.axhspan(derivative - wider, derivative + wider, color=GREY, alpha=0.1, linewidth=0, label="with U's draw")
    if e.curvature is not None:
        second_order = derivative + 0.5 * line * e.curvature.value
        ax.plot(line, second_order, color="black", linewidth=1.2, label="with curvature")
    half = [0.0 if np.isnan(x.half_width) else x.half_width for x in found]
    values = np.array([x.value for x in found]) / etas
    ax.errorbar(etas, values, yerr=half / etas, fmt="o", color=COLOURS[0], capsize=3, label="measured", markersize=5)
    shown = np.concatenate([values + half / etas, values - half / etas, [derivative, 0.0]])
    if not math.isnan(wider):
        shown = np.concatenate([shown, [derivative - wider, derivative + wider]])
    margin = 0.12 * (shown.max() - shown.min()) or 1.0
    ax.set_ylim(shown.min() - margin, shown.max() + margin)
    ax.axvline(result.update.step.eta, color=COLOURS[3], linewidth=1, linestyle=":", label="learning rate")
    if e.linear_until is not None:
        ax.axvline(e.linear_until, color=COLOURS[2], linewidth=1, linestyle="-.", label="eta*: bent by a tenth")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlim(line[0], line[-1])
    ax.set_xlabel("step size eta")
    ax.set_ylabel(f"dH / eta, {unit}")
    ax.set_title(title, fontsize=9)
    ax.legend(frameon=False, fontsize=7)


def draw_decomposition(ax: Axes, result: ProbeResult, unit: str) -> None:
    """Draw dH/d eta of the whole step, and the influence of momentum, weight decay and batch."""
    e = result.evaluations[0]
    names = {"whole step": "full", "momentum": "momentum", "weight decay": "decay", "batch": "grad"}
    for i, key in enumerate(names.values()):
        value, se = e.derivatives[key]
        half = interval_factor(e) * se
        both = half_with_update(result, key)
        ax.bar(i, value, color=GREY if i else COLOURS[0], alpha=0.75, width=0.65)
        ax.errorbar(i, value, yerr=half, fmt="none", color="black", linewidth=3, capsize=0)
        if not math.isnan(both):
            ax.errorbar(i, value, yerr=both, fmt="none", color="black", linewidth=1, capsize=4)
        high = max(0.0, value + (half if math.isnan(both) else both))
        ax.annotate(f"{value:.2g}", (i, high), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(names)), list(names))
    ax.set_ylabel(f"dH / d eta, {unit}")
    thin = "; thin: with U's" if e.update_se else ""
    ax.set_title(f"influence (95 %, thick: E's draws{thin})", fontsize=9)


def draw_influences(ax: Axes, result: ProbeResult, unit: str) -> None:
    """Draw each update sequence's influence, sorted; colour and marker show the sign of its advantage."""
    e = result.evaluations[0]
    values, half = to_numpy(e.sequence_influences[0]), interval_factor(e) * to_numpy(e.sequence_influences[1])
    A = to_numpy(result.update.objective.advantages(result.update.sequences))
    order = np.argsort(values)
    for k, (colour, name) in enumerate(((COLOURS[1], "below its group's mean reward"), (COLOURS[0], "above it"))):
        chosen = [i for i, j in enumerate(order) if (A[j] > 0) == bool(k) and A[j] != 0]
        picked = order[chosen]
        ax.errorbar(chosen, values[picked], yerr=half[picked], fmt=MARKERS[k], color=colour, markersize=5,
                    capsize=2, label=name)  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xlabel("rank of the update sequence, by its influence")
    ax.set_ylabel(f"influence: dH / d eta, {unit}")
    ax.set_title("by sequence (bars: 95 %)", fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def draw_linearity(ax: Axes, result: ProbeResult, unit: str) -> None:
    """Draw each update sequence's measured change at the reference eta against eta times its influence."""
    e = result.evaluations[0]
    at = e.sequence_changes[result.reference_eta]
    x = result.reference_eta * to_numpy(e.sequence_influences[0])
    y, half = np.array([w.change.value for w in at]), np.array([interval_factor(e) * w.change.se for w in at])
    ax.errorbar(x, y, yerr=half, fmt="o", color=COLOURS[2], markersize=4, capsize=2, linewidth=0.8)
    ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="equal")
    ax.legend(frameon=False, fontsize=8)
    r = correlation(e.sequence_influences[0], [w.change.value for w in at])
    ax.set_xlabel(f"eta times first-order influence, {unit}")
    ax.set_ylabel(f"measured change, {unit}")
    ax.set_title(f"sequences at eta {result.reference_eta:g}, correlation {r:.3f}", fontsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda v, _: f"{v:.3g}")
        axis.set_major_locator(MaxNLocator(5))


def draw_directions(result: ProbeResult, unit: str, each: int = 3) -> dict[str, Figure]:
    """Return ``directions``: dH / eta against eta along single update sequences, where that was measured.

    Those whose influence raises the entropy most, and those that lower it most, beside their first-order influence: a
    level line is a change that is linear in eta, and bars that are longer than its bend are noise.

    Args:
        result: of the probe.
        unit: of the entropy.
        each: how many of either kind.
    """
    e = result.evaluations[0]
    etas, influences = sorted(set(e.sequence_changes) - set(e.within_rounding)), to_numpy(e.sequence_influences[0])
    if len(etas) < 2:
        return {}
    order, fits = np.argsort(influences), e.fits()
    chosen = [int(i) for i in dict.fromkeys([*order[::-1][:each], *order[:each]])]
    figure, places = blocks(len(chosen))
    for (ax,), i in zip(places, chosen, strict=True):
        found = [e.sequence_changes[eta][i].change for eta in etas]
        y = np.array([x.value for x in found]) / np.array(etas)
        half = interval_factor(e) * np.array([x.se for x in found]) / np.array(etas)
        ax.axhline(influences[i], color=GREY, linestyle="--", linewidth=1, label="first order")
        ax.axhline(0, color="black", linewidth=0.6)
        style: dict[str, Any] = {"color": COLOURS[0], "markersize": 4, "capsize": 2, "linewidth": 0.9}
        ax.errorbar(etas, y, yerr=half, fmt="o-", label="measured, 95 %", **style)
        ax.set_xscale("log")
        ax.set_xlabel("step size eta")
        ax.set_title(f"update sequence {i}\nR² of a straight line {fits[i].r2:.3f}", fontsize=9)
    places[0][0].legend(frameon=False, fontsize=8)
    for (ax,) in places[::ACROSS]:
        ax.set_ylabel(f"dH / eta, {unit}")
    return {"directions": figure}


def draw_tradeoff(result: ProbeResult, unit: str) -> dict[str, Figure]:
    """Return ``tradeoff``: each update sequence's influence on J and on H, nothing where E has no rewards."""
    e = result.evaluations[0]
    if e.reward is None:
        return {}
    figure, axes = new_figure(1, 1, size=(5.6, 4.2))
    ax = axes[0, 0]
    x, y = to_numpy(e.reward.tokens.sum(1)), to_numpy(e.sequence_influences[0])
    A = to_numpy(result.update.objective.advantages(result.update.sequences))
    half = interval_factor(e) * to_numpy(e.sequence_influences[1])
    for k, (colour, name) in enumerate(((COLOURS[1], "below its group's mean reward"), (COLOURS[0], "above it"))):
        chosen = (A != 0) & ((A > 0) == bool(k))
        ax.errorbar(x[chosen], y[chosen], yerr=half[chosen], fmt=MARKERS[k], color=colour,
                    markersize=5, capsize=2, linewidth=0.8, label=name)  # fmt: skip
    (dj, dj_se), (dh, dh_se) = e.reward.slopes["full"], e.derivatives["full"]
    for line in (ax.axhline, ax.axvline):
        line(0, color="black", linewidth=0.6)
    ax.set_xlabel("influence: dJ / d eta, reward")
    ax.set_ylabel(f"influence: dH / d eta, {unit}")
    ax.set_title(
        "by sequence (bars: 95 %)\n"
        f"the whole step (± one s.e.): dJ/d eta {dj:.3g} ± {dj_se:.2g}, dH/d eta {dh:.3g} ± {dh_se:.2g}",
        fontsize=8,
    )
    ax.legend(frameon=False, fontsize=8)
    return {"tradeoff": figure}


def draw_token_influences(result: ProbeResult, tokenizer: Tokenizer, unit: str, rows: int = 8) -> Figure:
    """Return a heat map of the token influences of the ``rows`` update sequences with the greatest influence."""
    influences = to_numpy(result.token_influences)
    order = np.argsort(-np.abs(influences.sum(1)))[:rows]
    width = max(result.update.sequences.lengths[i] for i in order)
    figure, axes = new_figure(1, 1, size=(min(16.0, 3.2 + 0.34 * width), 1.2 + 0.42 * len(order)))
    ax = axes[0, 0]
    ax.grid(False)
    shown = influences[order, :width]
    bound = float(np.abs(shown).max()) or 1.0
    image = ax.imshow(shown, cmap="PuOr", norm=TwoSlopeNorm(0, -bound, bound), aspect="auto")
    labels = []
    advantages = result.update.objective.advantages(result.update.sequences)
    prompts = strip_common_suffix([tokenizer.decode(result.update.sequences.prompts[j]) for j in order])
    for i, (j, prompt) in enumerate(zip(order, prompts, strict=True)):
        response = result.update.sequences.responses[j]
        for k, token in enumerate(response):
            word = tokenizer.decode([token]) or "■"
            dark = abs(shown[i, k]) > 0.6 * bound
            word = word.strip()[:9] or "␣"
            size = 8.0 if len(word) < 3 else min(5.0, 36 / len(word))
            ax.text(k, i, word, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        weight = float(advantages[j])
        labels.append(f"{prompt}  A {np.sign(weight):+.0f}" if weight else f"{prompt}  A 0")
    ax.set_yticks(range(len(order)), labels, fontsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("token of the response, from 0")
    figure.colorbar(image, ax=ax, label=f"influence: dH / d eta, {unit}", pad=0.01)
    ax.set_title(
        "the sequences with the greatest influence (brown: lowers the entropy; A: sign of the advantage; ■: end)",
        fontsize=9,
    )
    return figure


def strip_common_suffix(texts: Sequence[str], max_length: int = 28) -> list[str]:
    """Return texts without the words that all of them end in, the last ``max_length`` characters.

    >>> strip_common_suffix(["how many eggs? now", "how many hens? now"], 11)
    ['…many eggs?', '…many hens?']
    """
    words = [text.split() for text in texts]
    if len({tuple(w) for w in words}) > 1:
        common = next(k for k in count(1) if len({tuple(w[-k:]) for w in words}) > 1) - 1
        words = [w[: len(w) - common] for w in words]
    stripped = [" ".join(w) for w in words]
    return [text if len(text) <= max_length else "…" + text[1 - max_length :] for text in stripped]


def draw_probe_results(
    seeds: Sequence[int], results: Sequence[ProbeResult], tokenizer: Tokenizer, kind: EntropyKind
) -> dict[str, Figure]:
    """Return every figure of the replicas' probes by file name; of all but the first replica, with the seed in it."""
    out: dict[str, Figure] = {}
    for i, (seed, result) in enumerate(zip(seeds, results, strict=True)):
        suffix = f"_seed_{seed}" if i else ""
        drawn = draw_probe(seed, result, tokenizer, entropy_unit(kind))
        out |= {f"{name}{suffix}": figure for name, figure in drawn.items()}
    return out


def draw_probe(seed: int, result: ProbeResult, tokenizer: Tokenizer, unit: str) -> dict[str, Figure]:
    """Return a replica's figures: ``probe``, ``tokens``, ``directions`` and, where E has rewards, ``tradeoff``."""
    figure, axes = new_figure(2, 2, size=(10.0, 7.2))
    draw_changes(axes[0, 0], result, f"one AdamW step of seed {seed} (bars, band: 95 %)", unit)
    draw_decomposition(axes[0, 1], result, unit)
    draw_influences(axes[1, 0], result, unit)
    if result.evaluations[0].sequence_changes:
        draw_linearity(axes[1, 1], result, unit)
    else:
        axes[1, 1].set_visible(False)
    tokens = draw_token_influences(result, tokenizer, unit)
    return {"probe": figure, "tokens": tokens, **draw_tradeoff(result, unit), **draw_directions(result, unit)}
