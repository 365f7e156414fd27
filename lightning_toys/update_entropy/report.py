"""The files of a probe: summary.json, arrays, tables of sequences and tokens."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_toys.training.files import partial_name, put_in_place, set_aside, write_atomic
from lightning_toys.training.results import Report, to_json
from lightning_toys.update_entropy.cache import to_numpy
from lightning_toys.update_entropy.controls import ControlResult
from lightning_toys.update_entropy.estimators import Estimate, ImportanceEstimate
from lightning_toys.update_entropy.linear_fits import LinearFit, linear_fit
from lightning_toys.update_entropy.plan import Plan
from lightning_toys.update_entropy.probe_result import EvaluationResult, ProbeResult
from lightning_toys.update_entropy.task import Tokenizer

PARTS = {"full": "slope", "momentum": "slope_momentum", "decay": "slope_decay", "grad": "slope_batch"}  # in reports


def run_label(family: str, rank: int, lr: float) -> str:
    """Return the label of a run in comparisons: model family, what is trained, learning rate."""
    return f"{family}, {f'LoRA {rank}' if rank else 'all parameters'}, lr {lr:g}"


def probe_report(seeds: Sequence[int], before: Report, results: Sequence[ProbeResult]) -> Report:
    """Return the metrics of a test: the policies' own, and the probes' by their first evaluation batch.

    Args:
        seeds: of the replicas.
        before: report of the policies' evaluation.
        results: of each replica's probe.
    """
    metrics = dict(before.metrics)

    def put(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(value)

    rewarded = any(x.evaluations[0].reward is not None for x in results)
    for result in results:
        e = result.evaluations[0]
        put("entropy_on_e", e.entropy.value)
        put("entropy_on_e_se", e.entropy.se)
        for name, key in PARTS.items():
            put(key, e.derivatives[name][0])
            put(f"{key}_se", e.derivatives[name][1])
            if name in e.update_se:
                put(f"{key}_update_se", e.update_se[name])
        for direction, by_eta in e.changes.items():
            for eta, w in by_eta.items():
                suffix = "" if direction == "full" else f"_{direction}"
                put(f"change{suffix}@eta_{eta:g}", w.change.value)
                put(f"change{suffix}_se@eta_{eta:g}", w.change.se)
                if direction == "full":
                    put(f"ess@eta_{eta:g}", w.ess)
        for eta, changes in e.sequence_changes.items():
            put(f"linearity@eta_{eta:g}", correlation(e.sequence_influences[0], [w.change.value for w in changes]))
        if e.curvature is not None:
            put("curvature", e.curvature.value)
            put("curvature_se", e.curvature.se)
            put("linear_until", e.linear_until or float("nan"))
        for name, (value, se) in e.counterfactuals.items():
            put(f"slope@{name}", value)
            put(f"slope_se@{name}", se)
        if rewarded:
            nothing = (math.nan, math.nan)
            mean = nothing if e.reward is None else (e.reward.mean.value, e.reward.mean.se)
            pairs = {"reward_on_e": mean}
            pairs |= {f"reward_{k}": nothing if e.reward is None else e.reward.slopes[n] for n, k in PARTS.items()}
            for key, (value, se) in pairs.items():
                put(key, value)
                put(f"{key}_se", se)
            for eta in e.changes["full"]:
                changed = None if e.reward is None else e.reward.changes[eta].change
                put(f"reward_change@eta_{eta:g}", math.nan if changed is None else changed.value)
                put(f"reward_change_se@eta_{eta:g}", math.nan if changed is None else changed.se)
        put("closure", result.residual)
        put("clip_scale", result.update.step.clip_scale)
        put("gradient_norm", result.update.step.grad_norm)
    return Report(seeds, metrics)


def correlation(influences: Tensor, changes: Sequence[float]) -> float:
    """Return the correlation of first-order influences (N_U,) and measured changes; NaN if one of them is constant."""
    x, y = to_numpy(influences), np.array(changes)
    if len(x) < 3 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def estimate_json(estimate: Estimate) -> dict[str, float]:
    """Return an estimate as summary.json has it: value, standard error and half of the 95 % interval."""
    return {"value": estimate.value, "se": estimate.se, "half_width": estimate.half_width}


def change_json(w: ImportanceEstimate) -> dict[str, Any]:
    """Return a change as summary.json has it, with the diagnostics of its weights."""
    return {**estimate_json(w.change), "entropy": w.entropy, "ess": w.ess, "clipped": w.clipped_fraction}


def evaluation_json(e: EvaluationResult) -> dict[str, Any]:
    """Return summary.json's entry of one evaluation batch."""
    out: dict[str, Any] = {
        "sequences": len(e.sequences),
        "tokens": sum(e.sequences.lengths),
        "prompts": len(set(e.sequences.prompt_index)),
        "entropy": estimate_json(e.entropy),
        "slopes": {n: {"value": v, "se": s, "update_se": e.update_se.get(n)} for n, (v, s) in e.derivatives.items()},
        "changes": {n: {f"{eta:g}": change_json(w) for eta, w in x.items()} for n, x in e.changes.items()},
        "other_estimator": {f"{eta:g}": change_json(w) for eta, w in e.other_estimator.items()},
        "within_rounding": e.within_rounding,
        "linearity": {
            f"{eta:g}": correlation(e.sequence_influences[0], [w.change.value for w in x])
            for eta, x in e.sequence_changes.items()
        },
        "linear_fits": {n: asdict(fit) for n, fit in direction_fits(e).items()},
        "counterfactual_slopes": {n: {"value": v, "se": s} for n, (v, s) in e.counterfactuals.items()},
    }
    if e.reward is not None:
        out["reward"] = {
            "mean": estimate_json(e.reward.mean),
            "slopes": {n: {"value": v, "se": s} for n, (v, s) in e.reward.slopes.items()},
            "changes": {
                f"{eta:g}": {**estimate_json(w.change), "reward": w.entropy} for eta, w in e.reward.changes.items()
            },
        }
    if e.curvature is not None:
        out["curvature"], out["linear_until"] = estimate_json(e.curvature), e.linear_until
        out["linear_until_interval"] = e.linear_until_interval
    return out


def direction_fits(e: EvaluationResult) -> dict[str, LinearFit]:
    """Return how straight the changes are in eta, along the step and its parts; without etas within rounding."""
    out = {}
    for name, by_eta in e.changes.items():
        if etas := sorted(set(by_eta) - set(e.within_rounding)):
            out[name] = linear_fit(etas, [by_eta[eta].change.value for eta in etas])
    return out


def microbatches(result: ProbeResult, plan: Plan) -> dict[str, int]:
    """Return in how many passes U's gradients and E's scores were taken, on one process that has all of them."""
    return {
        "update": math.ceil(len(result.update.sequences) / plan.grad_chunk_size),
        "evaluation": math.ceil(len(result.evaluations[0].sequences) / plan.tf_batch_size),
    }


def controls_json(controls: ControlResult) -> dict[str, Any]:
    """Return summary.json's entry of the step's controls."""
    changes = {n: {f"{eta:g}": estimate_json(x) for eta, x in found.items()} for n, found in controls.changes.items()}
    return {"responses": controls.responses, "changes": changes}


def summary_json(result: ProbeResult, seed: int, plan: Plan, step: int) -> dict[str, Any]:
    """Return the content of a replica's summary.json; ``step`` is that of the checkpoint."""
    s, objective = result.update.step, result.update.objective
    return {
        "seed": seed,
        "step": step,
        "plan": asdict(plan),
        "loss": {
            "name": objective.name,
            "scale_rewards": objective.scale,
            "beta": objective.beta,
            "entropy_coef": objective.entropy_coef,
            "text": objective.describe(),
        },
        "reference_eta": result.reference_eta,
        "update_sequences": len(result.update.sequences),
        "draws_of_update": result.attempts,
        "microbatches": microbatches(result, plan),
        "closure_residual": result.residual,
        "norms": result.norms,
        "gradient_norm": s.grad_norm,
        "clip_scale": s.clip_scale,
        "learning_rate": s.eta,
        "adamw": {n: asdict(h) for n, h in list(result.update.state.hyperparameters.items())[:1]},
        "adamw_step": max(m.step for m in result.update.state.moments.values()),
        "evaluations": [evaluation_json(e) for e in result.evaluations],
        **({} if result.controls is None else {"controls": controls_json(result.controls)}),
        "seconds": result.seconds,
    }


def write_arrays(folder: Path, result: ProbeResult) -> None:
    """Write the arrays, named and shaped as in the published pipeline.

    eval_XX_delta_matrix.npy (N_E, N_U): contribution of each evaluation sequence to the change that each update
    sequence makes at the reference eta; eval_XX_per_sequence/DIRECTION/eta_X.npy (N_E,): contributions to the change
    along a direction; eval_XX_grad_eta/eta_X.npy (N_E, N_U): those along each update sequence's direction, with
    diagnostics.json; eval_XX_first_order_matrix.npy (N_E, N_U): derivatives in the place of changes. In nats, and nats
    per unit of eta.
    """
    for k, e in enumerate(result.evaluations):
        name = f"eval_{k:02d}"
        np.save(folder / f"{name}_first_order_matrix.npy", to_numpy(e.influence_matrix))
        if e.sequence_changes:
            at = e.sequence_changes[result.reference_eta]
            np.save(folder / f"{name}_delta_matrix.npy", np.stack([to_numpy(w.change.contributions) for w in at], 1))
        for direction, by_eta in e.changes.items():
            inside = folder / f"{name}_per_sequence" / direction
            inside.mkdir(parents=True)
            for eta, w in by_eta.items():
                np.save(inside / f"eta_{eta:g}.npy", to_numpy(w.change.contributions))
        inside = folder / f"{name}_grad_eta"
        inside.mkdir()
        diagnostics = {}
        for eta, changes in e.sequence_changes.items():
            np.save(inside / f"eta_{eta:g}.npy", np.stack([to_numpy(w.change.contributions) for w in changes], 1))
            diagnostics[f"{eta:g}"] = [change_json(w) for w in changes]
        write_atomic(inside / "diagnostics.json", json.dumps(to_json(diagnostics), indent=1) + "\n")


def text_array(words: Sequence[str]) -> np.ndarray:
    """Return strings as a NumPy array of fixed width, which is stored without pickle."""
    return np.array(list(words), dtype=np.str_)


def write_table(path: Path, arrays: Mapping[str, np.ndarray] | None = None, **columns: np.ndarray) -> None:
    """Write columns of one length as ``path``.npz and as ``path``.csv, and further arrays into the former."""
    np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **columns, **(arrays or {}))
    with path.with_suffix(".csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))


def write_tables(folder: Path, result: ProbeResult, tokenizer: Tokenizer) -> None:
    """Write the tables sequences (a row for each of U), tokens (of U), parameters (of the policy), and E's arrays."""
    u, e = result.update.sequences, result.evaluations[0]
    prompts = [tokenizer.decode(p) for p in u.prompts]
    responses = [tokenizer.decode(r) for r in u.responses]
    scores, A = result.batch_scores, to_numpy(result.update.objective.advantages(u))
    changes = e.sequence_changes.get(result.reference_eta)
    missing, live = np.full(len(u), np.nan), to_numpy(scores.mask).astype(bool)
    on_reward = np.full(live.shape, np.nan) if e.reward is None else to_numpy(e.reward.tokens)
    without, fits = e.leave_one_out, e.fits()
    write_table(
        folder / "sequences",
        u.id_arrays() | u.given_arrays(),
        row=np.arange(len(u)),
        prompt_number=np.array(u.prompt_index),
        prompt=text_array(prompts),
        response=text_array(responses),
        length=np.array(u.lengths),
        reward=np.array(u.rewards),
        advantage=A,
        logp=to_numpy(scores.logp.sum(1)),
        entropy=to_numpy(scores.entropy.sum(1)),
        influence=to_numpy(e.sequence_influences[0]),
        influence_se=to_numpy(e.sequence_influences[1]),
        reward_influence=on_reward.sum(1),
        change=np.array([w.change.value for w in changes]) if changes else missing,
        change_se=np.array([w.change.se for w in changes]) if changes else missing,
        fit_slope=np.array([fit.slope for fit in fits]) if fits else missing,
        fit_r2=np.array([fit.r2 for fit in fits]) if fits else missing,
        fit_curvature=np.array([fit.quadratic[1] for fit in fits]) if fits else missing,
        slope_without=to_numpy(without[0]) if without else missing,
        slope_without_se=to_numpy(without[1]) if without else missing,
    )
    rows, positions = np.nonzero(live)
    ids = [token for r in u.responses for token in r]
    write_table(
        folder / "tokens",
        row=rows,
        position=positions,
        token=np.array(ids),
        text=text_array([tokenizer.decode([t]) for t in ids]),
        logp=to_numpy(scores.logp)[live],
        entropy=to_numpy(scores.entropy)[live],
        reward=np.array(u.rewards)[rows],
        advantage=A[rows],
        influence=to_numpy(result.token_influences)[live],
        reward_influence=on_reward[live],
        covariance=to_numpy(result.covariances)[live],
    )
    parts = result.parameters
    suffixes = (("full", ""), ("momentum", "_momentum"), ("decay", "_decay"), ("grad", "_batch"))
    columns = {f"norm{s}": np.array([p.norms[d] for p in parts.values()]) for d, s in suffixes}
    columns |= {f"influence{s}": np.array([p.influences[d] for p in parts.values()]) for d, s in suffixes}
    columns["residual"] = np.array([p.residual for p in parts.values()])
    sizes = np.array([p.size for p in parts.values()])
    write_table(folder / "parameters", None, parameter=text_array(list(parts)), size=sizes, **columns)
    for k, x in enumerate(result.evaluations):
        np.savez_compressed(
            folder / f"eval_{k:02d}_sequences.npz",
            prompt_number=np.array(x.sequences.prompt_index),
            prompt=text_array([tokenizer.decode(p) for p in x.sequences.prompts]),
            response=text_array([tokenizer.decode(r) for r in x.sequences.responses]),
            length=np.array(x.sequences.lengths),
            reward=np.array(x.sequences.rewards),
            logp=to_numpy(x.scores.logp),
            entropy=to_numpy(x.scores.entropy),
            mask=to_numpy(x.scores.mask),
            allow_pickle=False,
            **x.sequences.id_arrays(),
        )


def write_probe_results(
    folder: Path, seeds: Sequence[int], results: Sequence[ProbeResult], tokenizer: Tokenizer, plan: Plan, step: int
) -> None:
    """Write a folder for each replica; an earlier probe's folder is moved to a numbered name, not overwritten.

    Args:
        folder: of the run's probe.
        seeds: of the replicas.
        results: of each replica's probe.
        tokenizer: of the policies.
        plan: of the probe.
        step: optimiser step of the checkpoint.
    """
    partial = partial_name(folder)
    for seed, result in zip(seeds, results, strict=True):
        inside = partial / f"seed_{seed}"
        inside.mkdir(parents=True)
        write_arrays(inside, result)
        write_tables(inside, result, tokenizer)
        content = to_json(summary_json(result, seed, plan, step))
        write_atomic(inside / "summary.json", json.dumps(content, indent=1) + "\n")
    set_aside(folder)
    put_in_place(partial, folder)
