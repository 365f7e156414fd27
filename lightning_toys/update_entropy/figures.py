"""Figures of the training and of the probe."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_toys.plotting import COLOURS, GREY, MARKERS, band, new_figure
from lightning_toys.training.metrics_csv import read_run, replica_columns
from lightning_toys.update_entropy.cache import array
from lightning_toys.update_entropy.estimators import Kind
from lightning_toys.update_entropy.history import gains, smoothed
from lightning_toys.update_entropy.report import correlation, unit_of
from lightning_toys.update_entropy.summary import Findings
from lightning_toys.update_entropy.task import Tokens


def draw_training(
    folder: Path, seeds: Sequence[int], warm_steps: int, kind: Kind, window: int = 5
) -> dict[str, Figure]:
    """Draw reward, entropy and length over the policy gradient's steps."""
    rows = read_run(folder)
    steps, _ = replica_columns(rows, "train/reward", seeds)
    if len(steps) < 2:
        return {}
    figure, axes = new_figure(1, 3, size=(10.5, 3.2))
    names = (("reward", "mean reward"), ("entropy", f"entropy, {unit_of(kind)}"), ("length", "length, tokens"))
    for ax, (name, label), colour in zip(axes[0], names, COLOURS, strict=False):
        steps, values = replica_columns(rows, f"train/{name}", seeds)
        for one in values:
            ax.plot(steps - warm_steps, one, color=colour, alpha=0.25, linewidth=0.8)
        band(ax, steps - warm_steps, smoothed(values, window), colour, f"mean of {window} steps")
        ax.set_xlabel("policy-gradient step")
        ax.set_ylabel(label)
    shown = f"{len(seeds)} seeds, band: 95 % interval" if len(seeds) > 1 else "one seed"
    found = [f"validation: {line}" for line in gains(folder, seeds, warm_steps)]
    title = f"Dr. GRPO after imitation ({shown}; thin: every step; thick: mean of the last {window})"
    figure.suptitle("\n".join([title, *found]), fontsize=9)
    return {"training": figure}


def draw_predictions(folder: Path, seeds: Sequence[int], first_step: int = 0) -> dict[str, Figure]:
    """Draw what UpdateEntropyCallback predicted and measured, step by step, the first replica's."""
    rows = read_run(folder)
    steps, predicted = replica_columns(rows, "entropy_step/predicted", seeds)
    if len(steps) < 2 or not any("entropy_step/measured" in r for r in rows):
        return {}
    found = {
        k: replica_columns(rows, f"entropy_step/{k}", seeds)[1] for k in ("predicted_se", "measured", "measured_se")
    }
    parts = {k: replica_columns(rows, f"entropy_step/{k}", seeds)[1][0] for k in ("momentum", "decay", "batch")}
    error = np.sqrt(found["predicted_se"] ** 2 + found["measured_se"] ** 2)
    off = np.abs(found["measured"] - predicted)
    inside, alone = np.mean(off < 1.96 * error), np.mean(off < 1.96 * found["predicted_se"])
    sums = [
        f"{v[0].sum():.4f} ± {np.sqrt((e[0] ** 2).sum()):.4f}"
        for v, e in ((predicted, found["predicted_se"]), (found["measured"], found["measured_se"]))
    ]
    figure, axes = new_figure(1, 2, size=(11.0, 3.8))
    ax, x = axes[0, 0], steps - first_step
    half = 1.96 * found["predicted_se"][0]
    ax.fill_between(x, predicted[0] - half, predicted[0] + half, color=COLOURS[0], alpha=0.22, linewidth=0)
    ax.plot(x, predicted[0], color=COLOURS[0], label="predicted, 95 %")
    ax.errorbar(x, found["measured"][0], yerr=1.96 * found["measured_se"][0], fmt="s", color=COLOURS[1], markersize=4,
                capsize=2, linewidth=0.8, label="measured, 95 %")  # fmt: skip
    ax.set_title(
        f"within the predicted interval at {alone:.0%} of the steps, within both errors at {inside:.0%}\n"
        f"seed {seeds[0]}, sums (± one s.e.): {sums[0]} predicted, {sums[1]} measured",
        fontsize=8.5,
    )
    ax.set_ylabel("change of entropy, nats a token")
    for (name, values), colour in zip(parts.items(), (COLOURS[1], COLOURS[2], COLOURS[3]), strict=True):
        axes[0, 1].plot(x, values, color=colour, label=name)
    axes[0, 1].plot(x, predicted[0], color="black", linewidth=1, linestyle="--", label="their sum")
    axes[0, 1].set_title(f"seed {seeds[0]}: whose share of the prediction it is", fontsize=9)
    axes[0, 1].set_ylabel("predicted change, nats a token")
    for a in axes[0]:
        a.axhline(0, color="black", linewidth=0.6)
        a.set_xlabel("policy-gradient step" if first_step else "optimiser step")
        a.legend(frameon=False, fontsize=8)
    return {"predictions": figure}


def draw_changes(ax: Axes, f: Findings, title: str, unit: str) -> None:
    """Draw dH / eta against eta, which tends to the slope; the straight line in eta is the curvature's share."""
    e = f.evaluations[0]
    etas = np.array(sorted(e.changes["full"]))
    found = [e.changes["full"][x].change for x in etas]
    slope, se = e.slopes["full"]
    line = np.geomspace(etas[0] / 3, etas[-1] * 1.5, 200)
    ax.axhline(slope, color=GREY, linestyle="--", label="slope: first order")
    ax.axhspan(slope - 1.96 * se, slope + 1.96 * se, color=GREY, alpha=0.15, linewidth=0)
    if e.curvature is not None:
        ax.plot(line, slope + 0.5 * line * e.curvature.value, color="black", linewidth=1.2, label="with curvature")
    half = [0.0 if np.isnan(x.half_width) else x.half_width for x in found]
    values = np.array([x.value for x in found]) / etas
    ax.errorbar(etas, values, yerr=half / etas, fmt="o", color=COLOURS[0], capsize=3, label="measured", markersize=5)
    reach = np.concatenate([values + half / etas, values - half / etas, [slope, 0.0]])
    room = 0.12 * (reach.max() - reach.min()) or 1.0
    ax.set_ylim(reach.min() - room, reach.max() + room)
    ax.axvline(f.update.step.eta, color=COLOURS[3], linewidth=1, linestyle=":", label="learning rate")
    if e.linear_until is not None:
        ax.axvline(e.linear_until, color=COLOURS[2], linewidth=1, linestyle="-.", label="eta*: bent by a tenth")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xscale("log")
    ax.set_xlim(line[0], line[-1])
    ax.set_xlabel("step size eta")
    ax.set_ylabel(f"dH / eta, {unit}")
    ax.set_title(title, fontsize=9)
    ax.legend(frameon=False, fontsize=7)


def draw_split(ax: Axes, f: Findings, unit: str) -> None:
    """Draw the shares of momentum, decay and batch in dH / d eta."""
    e = f.evaluations[0]
    names = {"whole step": "full", "momentum": "momentum", "weight decay": "decay", "batch": "grad"}
    for i, key in enumerate(names.values()):
        value, se = e.slopes[key]
        ax.bar(i, value, color=GREY if i else COLOURS[0], width=0.65, yerr=1.96 * se, capsize=4)
        high = max(0.0, value + 1.96 * se)
        ax.annotate(f"{value:.2g}", (i, high), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(names)), list(names))
    ax.set_ylabel(f"dH / d eta, {unit}")
    ax.set_title("whose share it is (bars: 95 %)", fontsize=9)


def draw_influences(ax: Axes, f: Findings, unit: str) -> None:
    """Draw each update sequence's share, in the order of its size; colour and marker tell the advantage's sign."""
    values, errors = (array(x) for x in f.evaluations[0].influences)
    A = array(f.update.strengths)
    order = np.argsort(values)
    for k, (colour, name) in enumerate(((COLOURS[1], "below its group's mean reward"), (COLOURS[0], "above it"))):
        chosen = [i for i, j in enumerate(order) if (A[j] > 0) == bool(k) and A[j] != 0]
        picked = order[chosen]
        ax.errorbar(chosen, values[picked], yerr=1.96 * errors[picked], fmt=MARKERS[k], color=colour, markersize=5,
                    capsize=2, label=name)  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xlabel("rank of the update sequence, by its share")
    ax.set_ylabel(f"share in dH / d eta, {unit}")
    ax.set_title("by sequence (bars: 95 %)", fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def draw_linearity(ax: Axes, f: Findings, unit: str) -> None:
    """Draw each update sequence's measured change at the reference eta against its first-order share."""
    e = f.evaluations[0]
    at = e.singles[f.reference_eta]
    x = f.reference_eta * array(e.influences[0])
    y, half = np.array([w.change.value for w in at]), np.array([1.96 * w.change.se for w in at])
    ax.errorbar(x, y, yerr=half, fmt="o", color=COLOURS[2], markersize=4, capsize=2, linewidth=0.8)
    ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="equal")
    ax.legend(frameon=False, fontsize=8)
    r = correlation(e.influences[0], [w.change.value for w in at])
    ax.set_xlabel(f"eta times first-order share, {unit}")
    ax.set_ylabel(f"measured change, {unit}")
    ax.set_title(f"sequences at eta {f.reference_eta:g}, correlation {r:.3f}", fontsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda v, _: f"{v:.3g}")
        axis.set_major_locator(MaxNLocator(5))


def draw_tokens(f: Findings, tokens: Tokens, unit: str, rows: int = 8) -> Figure:
    """Draw the update sequences with the greatest shares, token by token."""
    shares = array(f.token_slopes)
    order = np.argsort(-np.abs(shares.sum(1)))[:rows]
    width = max(f.update.sequences.lengths[i] for i in order)
    figure, axes = new_figure(1, 1, size=(min(16.0, 3.2 + 0.34 * width), 1.2 + 0.42 * len(order)))
    ax = axes[0, 0]
    ax.grid(False)
    shown = shares[order, :width]
    bound = float(np.abs(shown).max()) or 1.0
    image = ax.imshow(shown, cmap="PuOr", norm=TwoSlopeNorm(0, -bound, bound), aspect="auto")
    labels = []
    questions = told_apart([tokens.decode(f.update.sequences.prompts[j]) for j in order])
    for i, (j, asked) in enumerate(zip(order, questions, strict=True)):
        response = f.update.sequences.responses[j]
        for k, token in enumerate(response):
            word = tokens.decode([token]) or "■"
            dark = abs(shown[i, k]) > 0.6 * bound
            word = word.strip()[:9] or "␣"
            size = 8.0 if len(word) < 3 else min(5.0, 36 / len(word))
            ax.text(k, i, word, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        labels.append(
            f"{asked}  A {float(f.update.strengths[j] > 0) * 2 - 1:+.0f}" if f.update.strengths[j] else f"{asked}  A 0"
        )
    ax.set_yticks(range(len(order)), labels, fontsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("token of the response, from 0")
    figure.colorbar(image, ax=ax, label=f"share in dH / d eta, {unit}", pad=0.01)
    ax.set_title(
        "the sequences with the greatest shares (brown: lowers the entropy; A: sign of the advantage; ■: end)",
        fontsize=9,
    )
    return figure


def told_apart(texts: Sequence[str], most: int = 28) -> list[str]:
    """Return the ends of texts, without the words that all of them end in, cut to ``most`` characters."""
    words = [text.split() for text in texts]
    if len({tuple(w) for w in words}) > 1:
        alike = next(k for k in count(1) if len({tuple(w[-k:]) for w in words}) > 1) - 1
        words = [w[: len(w) - alike] for w in words]
    whole = [" ".join(w) for w in words]
    return [text if len(text) <= most else "…" + text[1 - most :] for text in whole]


def draw_findings(seeds: Sequence[int], findings: Sequence[Findings], tokens: Tokens, kind: Kind) -> dict[str, Figure]:
    """Return every figure of a probe by file name; replicas but the first have their seed in it."""
    out: dict[str, Figure] = {}
    for i, (seed, f) in enumerate(zip(seeds, findings, strict=True)):
        after = f"_seed_{seed}" if i else ""
        out |= {f"{name}{after}": figure for name, figure in draw_probe(seed, f, tokens, unit_of(kind)).items()}
    return out


def draw_probe(seed: int, f: Findings, tokens: Tokens, unit: str) -> dict[str, Figure]:
    """Return the figures of one replica's probe."""
    figure, axes = new_figure(2, 2, size=(10.0, 7.2))
    draw_changes(axes[0, 0], f, f"one AdamW step of seed {seed} (bars, band: 95 %)", unit)
    draw_split(axes[0, 1], f, unit)
    draw_influences(axes[1, 0], f, unit)
    if f.evaluations[0].singles:
        draw_linearity(axes[1, 1], f, unit)
    else:
        axes[1, 1].set_visible(False)
    return {"probe": figure, "tokens": draw_tokens(f, tokens, unit)}
