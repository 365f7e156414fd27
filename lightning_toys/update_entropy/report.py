"""What a probe leaves behind: summary.json, arrays, tables of sequences and tokens, a few lines to read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_toys.training.results import Report, set_aside, to_json, write_atomic
from lightning_toys.update_entropy.cache import array
from lightning_toys.update_entropy.estimators import Estimate, Kind, Weighted
from lightning_toys.update_entropy.grpo import advantages
from lightning_toys.update_entropy.probe import Plan
from lightning_toys.update_entropy.summary import EvaluationFindings, Findings
from lightning_toys.update_entropy.task import Tokens


def label_of(family: str, rank: int, lr: float) -> str:
    """Return a few words that tell a run from others."""
    return f"{family}, {f'LoRA {rank}' if rank else 'all parameters'}, lr {lr:g}"


def report_of(seeds: Sequence[int], before: Report, findings: Sequence[Findings]) -> Report:
    """Return the numbers of a test: the policy's own, and the probe's by its first evaluation batch."""
    metrics = dict(before.metrics)

    def put(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(value)

    for f in findings:
        e = f.evaluations[0]
        put("entropy_on_e", e.entropy.value)
        put("entropy_on_e_se", e.entropy.se)
        for name, key in (
            ("full", "slope"),
            ("momentum", "slope_momentum"),
            ("decay", "slope_decay"),
            ("grad", "slope_batch"),
        ):
            put(key, e.slopes[name][0])
            put(f"{key}_se", e.slopes[name][1])
            if name in e.update_errors:
                put(f"{key}_update_se", e.update_errors[name])
        for flavour, by_eta in e.changes.items():
            for eta, w in by_eta.items():
                suffix = "" if flavour == "full" else f"_{flavour}"
                put(f"change{suffix}@eta_{eta:g}", w.change.value)
                put(f"change{suffix}_se@eta_{eta:g}", w.change.se)
                if flavour == "full":
                    put(f"ess@eta_{eta:g}", w.ess)
        for eta, singles in e.singles.items():
            put(f"linearity@eta_{eta:g}", correlation(e.influences[0], [w.change.value for w in singles]))
        if e.curvature is not None:
            put("curvature", e.curvature.value)
            put("curvature_se", e.curvature.se)
            put("linear_until", e.linear_until or float("nan"))
        for name, (value, se) in e.counterfactuals.items():
            put(f"slope@{name}", value)
            put(f"slope_se@{name}", se)
        put("closure", f.residual)
        put("clip_scale", f.update.step.clip_scale)
        put("gradient_norm", f.update.step.grad_norm)
    return Report(seeds, metrics)


def correlation(shares: Tensor, changes: Sequence[float]) -> float:
    """Return the correlation of first-order shares and measured changes over U; NaN if one of them is flat."""
    x, y = array(shares), np.array(changes)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def numbers(estimate: Estimate) -> dict[str, float]:
    """Return value, standard error and half of the 95 % interval."""
    return {"value": estimate.value, "se": estimate.se, "half_width": estimate.half_width}


def weighted_numbers(w: Weighted) -> dict[str, Any]:
    """Return a change with what its weights say of it."""
    return {**numbers(w.change), "entropy": w.entropy, "ess": w.ess, "clipped": w.clipped}


def evaluation_summary(e: EvaluationFindings) -> dict[str, Any]:
    """Return what summary.json says of one evaluation batch."""
    out: dict[str, Any] = {
        "sequences": len(e.sequences),
        "tokens": sum(e.sequences.lengths),
        "prompts": len(set(e.sequences.prompt)),
        "entropy": numbers(e.entropy),
        "slopes": {n: {"value": v, "se": s, "update_se": e.update_errors.get(n)} for n, (v, s) in e.slopes.items()},
        "changes": {n: {f"{eta:g}": weighted_numbers(w) for eta, w in x.items()} for n, x in e.changes.items()},
        "other_estimator": {f"{eta:g}": weighted_numbers(w) for eta, w in e.weighting.items()},
        "within_rounding": e.lost,
        "linearity": {
            f"{eta:g}": correlation(e.influences[0], [w.change.value for w in x]) for eta, x in e.singles.items()
        },
        "counterfactual_slopes": {n: {"value": v, "se": s} for n, (v, s) in e.counterfactuals.items()},
    }
    if e.curvature is not None:
        out["curvature"], out["linear_until"] = numbers(e.curvature), e.linear_until
    return out


def summary(f: Findings, seed: int, plan: Plan, step: int) -> dict[str, Any]:
    """Return summary.json's content for a replica."""
    s = f.update.step
    return {
        "seed": seed,
        "step": step,
        "plan": asdict(plan),
        "reference_eta": f.reference_eta,
        "update_sequences": len(f.update.sequences),
        "draws_of_update": f.attempts,
        "closure_residual": f.residual,
        "norms": f.norms,
        "gradient_norm": s.grad_norm,
        "clip_scale": s.clip_scale,
        "learning_rate": s.eta,
        "adamw": {n: asdict(h) for n, h in list(f.update.state.hyper.items())[:1]},
        "adamw_step": max(m.step for m in f.update.state.moments.values()),
        "evaluations": [evaluation_summary(e) for e in f.evaluations],
        "seconds": f.seconds,
    }


def write_arrays(folder: Path, f: Findings) -> None:
    """Write the arrays, named and shaped as in the published pipeline.

    eval_XX_delta_matrix.npy (N_E, N_U): contribution of each evaluation sequence to the change that each update
    sequence makes at the reference eta; eval_XX_per_sequence/FLAVOUR/eta_X.npy (N_E,): contributions to the change
    along a flavour; eval_XX_grad_eta/eta_X.npy (N_E, N_U): those of each update sequence alone, with diagnostics.json;
    eval_XX_first_order_matrix.npy (N_E, N_U): derivatives in the place of changes.
    """
    for k, e in enumerate(f.evaluations):
        name = f"eval_{k:02d}"
        np.save(folder / f"{name}_first_order_matrix.npy", array(e.influence))
        if e.singles:
            at = e.singles[f.reference_eta]
            np.save(folder / f"{name}_delta_matrix.npy", np.stack([array(w.change.rows) for w in at], 1))
        for flavour, by_eta in e.changes.items():
            inside = folder / f"{name}_per_sequence" / flavour
            inside.mkdir(parents=True)
            for eta, w in by_eta.items():
                np.save(inside / f"eta_{eta:g}.npy", array(w.change.rows))
        inside = folder / f"{name}_grad_eta"
        inside.mkdir()
        diagnostics = {}
        for eta, singles in e.singles.items():
            np.save(inside / f"eta_{eta:g}.npy", np.stack([array(w.change.rows) for w in singles], 1))
            diagnostics[f"{eta:g}"] = [weighted_numbers(w) for w in singles]
        write_atomic(inside / "diagnostics.json", json.dumps(to_json(diagnostics), indent=1) + "\n")


def text_array(words: Sequence[str]) -> np.ndarray:
    """Return strings as an array that needs no pickle."""
    return np.array(list(words), dtype=np.str_)


def write_table(path: Path, **columns: np.ndarray) -> None:
    """Write columns of one length as ``path``.npz, and as ``path``.csv for a person to open."""
    np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **columns)
    with path.with_suffix(".csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))


def write_tables(folder: Path, f: Findings, tokens: Tokens) -> None:
    """Write sequences (one row a sequence of U), tokens (one row a token of U), and each E's sequences."""
    u, e = f.update.sequences, f.evaluations[0]
    asked = [tokens.decode(p) for p in u.prompts]
    said = [tokens.decode(r) for r in u.responses]
    scores, A = f.batch_scores, array(advantages(u))
    singles = e.singles.get(f.reference_eta)
    nothing = np.full(len(u), np.nan)
    left = e.leave_one_out
    write_table(
        folder / "sequences",
        row=np.arange(len(u)),
        prompt_number=np.array(u.prompt),
        prompt=text_array(asked),
        response=text_array(said),
        length=np.array(u.lengths),
        reward=np.array(u.rewards),
        advantage=A,
        logp=array(scores.logp.sum(1)),
        entropy=array(scores.entropy.sum(1)),
        influence=array(e.influences[0]),
        influence_se=array(e.influences[1]),
        change=np.array([w.change.value for w in singles]) if singles else nothing,
        change_se=np.array([w.change.se for w in singles]) if singles else nothing,
        slope_without=array(left[0]) if left else nothing,
        slope_without_se=array(left[1]) if left else nothing,
    )
    live = array(scores.mask).astype(bool)
    rows, positions = np.nonzero(live)
    ids = [token for r in u.responses for token in r]
    write_table(
        folder / "tokens",
        row=rows,
        position=positions,
        token=np.array(ids),
        text=text_array([tokens.decode([t]) for t in ids]),
        logp=array(scores.logp)[live],
        entropy=array(scores.entropy)[live],
        reward=np.array(u.rewards)[rows],
        advantage=A[rows],
        influence=array(f.token_slopes)[live],
        covariance=array(f.covariances)[live],
    )
    for k, x in enumerate(f.evaluations):
        np.savez_compressed(
            folder / f"eval_{k:02d}_sequences.npz",
            prompt_number=np.array(x.sequences.prompt),
            prompt=text_array([tokens.decode(p) for p in x.sequences.prompts]),
            response=text_array([tokens.decode(r) for r in x.sequences.responses]),
            length=np.array(x.sequences.lengths),
            reward=np.array(x.sequences.rewards),
            logp=array(x.scores.logp),
            entropy=array(x.scores.entropy),
            mask=array(x.scores.mask),
        )


def write_findings(
    folder: Path, seeds: Sequence[int], findings: Sequence[Findings], tokens: Tokens, plan: Plan, step: int
) -> None:
    """Write a folder a replica; what an earlier probe left is moved aside, not overwritten."""
    set_aside(folder)
    for seed, f in zip(seeds, findings, strict=True):
        inside = folder / f"seed_{seed}"
        inside.mkdir(parents=True)
        write_arrays(inside, f)
        write_tables(inside, f, tokens)
        write_atomic(inside / "summary.json", json.dumps(to_json(summary(f, seed, plan, step)), indent=1) + "\n")


def unit_of(kind: Kind) -> str:
    """Return the unit of an entropy."""
    return {"token": "nats a token", "sequence": "nats a sequence", "surprisal": "nats a token (surprisal)"}[kind]


def pm(value: float, se: float) -> str:
    """Write a value with its standard error."""
    return f"{value:.4g} ± {se:.2g}"


def summary_lines(seeds: Sequence[int], findings: Sequence[Findings], folder: Path, kind: Kind) -> list[str]:
    """Return what a reader wants first, a few lines a replica."""
    out = []
    for seed, f in zip(seeds, findings, strict=True):
        e = f.evaluations[0]
        parts = ", ".join(
            f"{n} {pm(*e.slopes[k])}" for n, k in (("momentum", "momentum"), ("decay", "decay"), ("batch", "grad"))
        )
        drawn = f" ± {e.update_errors['full']:.2g} (U)" if e.update_errors else ""
        h = f"H {pm(e.entropy.value, e.entropy.se)} {unit_of(kind)}"
        out.append(f"seed {seed}: {h}; dH/d eta {pm(*e.slopes['full'])}{drawn} ({parts})")
        for eta, w in e.changes["full"].items():
            lost = "; within rounding, no number to trust" if eta in e.lost else ""
            out.append(
                f"  eta {eta:g}: dH {pm(w.change.value, w.change.se)}, linear {eta * e.slopes['full'][0]:.4g}, "
                f"effective sample size {w.ess:.0f} of {len(e.sequences)}{lost}"
            )
        if e.linear_until is not None:
            out.append(f"  linear within a tenth up to eta {e.linear_until:.2g}; closure residual {f.residual:.1g}")
    out.append("(± one standard error of the draws of E; with (U): of those of the update batch)")
    out.append(f"arrays and tables are in {folder}")
    return out
