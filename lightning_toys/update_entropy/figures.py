"""Figures of the training and of the probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from lightning_toys.plotting import COLOURS, GREY, MARKERS, band, new_figure
from lightning_toys.training.metrics_csv import replica_columns
from lightning_toys.update_entropy.history import gains, read, smoothed
from lightning_toys.update_entropy.memo import array
from lightning_toys.update_entropy.probe import Findings
from lightning_toys.update_entropy.report import correlation
from lightning_toys.update_entropy.task import Tokens


def draw_training(folder: Path, seeds: Sequence[int], warm_steps: int, window: int = 5) -> dict[str, Figure]:
    """Draw reward, entropy and length over the policy gradient's steps."""
    rows = read(folder)
    steps, _ = replica_columns(rows, "train/reward", seeds)
    if len(steps) < 2:
        return {}
    figure, axes = new_figure(1, 3, size=(10.5, 3.2))
    names = (("reward", "mean reward"), ("entropy", "entropy, nats a token"), ("length", "length, tokens"))
    for ax, (name, label), colour in zip(axes[0], names, COLOURS, strict=False):
        steps, values = replica_columns(rows, f"train/{name}", seeds)
        for one in values:
            ax.plot(steps - warm_steps, one, color=colour, alpha=0.25, linewidth=0.8)
        band(ax, steps - warm_steps, smoothed(values, window), colour, f"mean of {window} steps")
        ax.set_xlabel("policy-gradient step")
        ax.set_ylabel(label)
    shown = f"{len(seeds)} seeds, band: 95 % interval" if len(seeds) > 1 else "one seed"
    found = "; ".join(gains(folder, seeds, warm_steps))
    below = f"\nat validation, paired by seed: {found}" if found else ""
    figure.suptitle(f"Dr. GRPO after imitation ({shown}; thin: every step){below}", fontsize=10)
    return {"training": figure}


def draw_predictions(folder: Path, seeds: Sequence[int], first_step: int = 0) -> dict[str, Figure]:
    """Draw what UpdateEntropyCallback predicted and measured, step by step, the first replica's."""
    rows = read(folder)
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
    figure, axes = new_figure(1, 2, size=(11.0, 3.8))
    ax, x = axes[0, 0], steps - first_step
    half = 1.96 * found["predicted_se"][0]
    ax.fill_between(x, predicted[0] - half, predicted[0] + half, color=COLOURS[0], alpha=0.22, linewidth=0)
    ax.plot(x, predicted[0], color=COLOURS[0], label="predicted, 95 %")
    ax.errorbar(x, found["measured"][0], yerr=1.96 * found["measured_se"][0], fmt="s", color=COLOURS[1], markersize=4,
                capsize=2, linewidth=0.8, label="measured, 95 %")  # fmt: skip
    ax.set_title(
        f"measured within the predicted interval at {alone:.0%} of the steps, within both errors at {inside:.0%}",
        fontsize=9,
    )
    ax.set_ylabel("change of entropy by the step, nats a token")
    for (name, values), colour in zip(parts.items(), (COLOURS[1], COLOURS[2], COLOURS[3]), strict=True):
        axes[0, 1].plot(x, values, color=colour, label=name)
    axes[0, 1].plot(x, predicted[0], color="black", linewidth=1, linestyle="--", label="their sum")
    axes[0, 1].set_title(f"seed {seeds[0]}: whose share it is", fontsize=9)
    for a in axes[0]:
        a.axhline(0, color="black", linewidth=0.6)
        a.set_xlabel("policy-gradient step" if first_step else "optimiser step")
        a.legend(frameon=False, fontsize=8)
    return {"predictions": figure}


def draw_changes(ax: Axes, f: Findings, title: str) -> None:
    """Draw dH against eta, with the line through 0 and its curvature."""
    e = f.evaluations[0]
    etas = np.array(sorted(e.changes["full"]))
    found = [e.changes["full"][x].change for x in etas]
    line = np.linspace(0, etas[-1], 200)
    slope, se = e.slopes["full"]
    ax.plot(line, line * slope, color=GREY, linestyle="--", label="first order")
    ax.fill_between(line, line * (slope - 2 * se), line * (slope + 2 * se), color=GREY, alpha=0.15, linewidth=0)
    if e.curvature is not None:
        bent = line * slope + 0.5 * line**2 * e.curvature.value
        ax.plot(line, bent, color=COLOURS[1], linewidth=1.2, label="second order")
    half = [0.0 if np.isnan(x.half_width) else x.half_width for x in found]
    ax.errorbar(
        etas, [x.value for x in found], yerr=half, fmt="o", color=COLOURS[0], capsize=3, label="measured", markersize=5
    )
    values = np.array([x.value for x in found])
    reach = np.abs(values).max() + max(half) + 1e-12
    ax.set_ylim(-1.5 * reach, 1.5 * reach)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xlabel("step size eta")
    ax.set_ylabel("change of entropy, nats a token")
    ax.set_title(title, fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def draw_split(ax: Axes, f: Findings) -> None:
    """Draw the shares of momentum, decay and batch in dH / d eta."""
    e = f.evaluations[0]
    names = {"whole step": "full", "momentum": "momentum", "weight decay": "decay", "batch": "grad"}
    for i, key in enumerate(names.values()):
        value, se = e.slopes[key]
        ax.bar(i, value, color=COLOURS[i], width=0.65, yerr=1.96 * se, capsize=4)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(names)), list(names))
    ax.set_ylabel("dH / d eta, nats a token")
    ax.set_title("whose share it is (bars: 95 %)", fontsize=9)


def draw_influences(ax: Axes, f: Findings) -> None:
    """Draw each update sequence's share, in the order of its size; colour and marker tell the advantage's sign."""
    values, errors = (array(x) for x in f.evaluations[0].influences)
    A = array(f.update.strengths)
    order = np.argsort(values)
    for k, (colour, name) in enumerate(((COLOURS[1], "worse than its group"), (COLOURS[0], "better"))):
        chosen = [i for i, j in enumerate(order) if (A[j] > 0) == bool(k) and A[j] != 0]
        picked = order[chosen]
        ax.errorbar(chosen, values[picked], yerr=1.96 * errors[picked], fmt=MARKERS[k], color=colour, markersize=5,
                    capsize=2, label=name)  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xlabel("update sequence, by its share")
    ax.set_ylabel("share in dH / d eta")
    ax.set_title("by sequence (bars: 95 %)", fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def draw_linearity(ax: Axes, f: Findings) -> None:
    """Draw each update sequence's measured change at the reference eta against its first-order share."""
    e = f.evaluations[0]
    at = e.singles[f.reference_eta]
    x = f.reference_eta * array(e.influences[0])
    y, half = np.array([w.change.value for w in at]), np.array([1.96 * w.change.se for w in at])
    ax.errorbar(x, y, yerr=half, fmt="o", color=COLOURS[2], markersize=4, capsize=2, linewidth=0.8)
    ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
    r = correlation(e.influences[0], [w.change.value for w in at])
    ax.set_xlabel("eta times first-order share")
    ax.set_ylabel("measured change")
    ax.set_title(f"sequences at eta {f.reference_eta:g}, correlation {r:.3f}", fontsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_formatter().set_powerlimits((-2, 3))  # type: ignore[attr-defined]


def draw_tokens(f: Findings, tokens: Tokens, rows: int = 8) -> Figure:
    """Draw the update sequences with the greatest shares, token by token."""
    shares = array(f.token_slopes)
    order = np.argsort(-np.abs(shares.sum(1)))[:rows]
    width = max(f.update.sequences.lengths[i] for i in order)
    figure, axes = new_figure(1, 1, size=(min(16.0, 3.2 + 0.3 * width), 1.2 + 0.42 * len(order)))
    ax = axes[0, 0]
    ax.grid(False)
    shown = shares[order, :width]
    bound = float(np.abs(shown).max()) or 1.0
    image = ax.imshow(shown, cmap="PuOr", norm=TwoSlopeNorm(0, -bound, bound), aspect="auto")
    labels = []
    for i, j in enumerate(order):
        response = f.update.sequences.responses[j]
        for k, token in enumerate(response):
            word = tokens.decode([token]) or "■"
            dark = abs(shown[i, k]) > 0.6 * bound
            ax.text(k, i, word.strip()[:6] or "␣", ha="center", va="center", fontsize=8 if len(word) < 3 else 5,
                    color="white" if dark else "black")  # fmt: skip
        asked = " ".join(tokens.decode(f.update.sequences.prompts[j]).split())[-18:]
        labels.append(
            f"{asked}  A {float(f.update.strengths[j] > 0) * 2 - 1:+.0f}" if f.update.strengths[j] else f"{asked}  A 0"
        )
    ax.set_yticks(range(len(order)), labels, fontsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("token of the response")
    figure.colorbar(image, ax=ax, label="share in dH / d eta", pad=0.01)
    ax.set_title("the sequences with the greatest shares (A: sign of the advantage; ■: end)", fontsize=9)
    return figure


def draw_findings(seeds: Sequence[int], findings: Sequence[Findings], tokens: Tokens) -> dict[str, Figure]:
    """Return every figure of a probe by file name: the first replica's, and all replicas' changes."""
    f = findings[0]
    figure, axes = new_figure(2, 2, size=(10.0, 7.2))
    draw_changes(axes[0, 0], f, f"one AdamW step of seed {seeds[0]} (bars, band: 95 %)")
    draw_split(axes[0, 1], f)
    draw_influences(axes[1, 0], f)
    if f.evaluations[0].singles:
        draw_linearity(axes[1, 1], f)
    else:
        axes[1, 1].set_visible(False)
    return {"probe": figure, "tokens": draw_tokens(f, tokens)}
