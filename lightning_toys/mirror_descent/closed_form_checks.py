"""Closed forms beside what a run measured, row by row; the tables of facts.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_toys.mirror_descent.annealed import PCMALA, PCULA
from lightning_toys.mirror_descent.diagnostics import (
    ClosedFormCheck,
    Sample,
    check_mean,
    check_moments,
    lag_one_autocorrelation,
)
from lightning_toys.mirror_descent.joint import Gaussian, gaussian_kl
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.samplers import IMPORTANCE_GROUP, Gibbs, Importance, Sampler
from lightning_toys.mirror_descent.twisted_smc import TwistedSMC
from lightning_toys.stats import format_estimate, mean_ci

OFF_TARGET_KL = 1e-4  # nats by which a schedule may miss the target without a warning


def gaussian_moments(x: Gaussian, sigma: float) -> dict[str, float]:
    """Return mean and variance of the action, slope of s' on it, and Var(s' | a) / sigma^2, by name."""
    return {
        "mean": float(x.m[0]),
        "var": float(x.C[0, 0]),
        "slope": x.rho,
        "cond_ratio": x.v / sigma**2,
    }


def density_moments(sampler: PCMALA) -> tuple[float, float]:
    """Return mean and variance of the action's exact density."""
    grid, p = sampler.action_density()
    h = float(grid[1] - grid[0])
    mean = float((grid * p).sum() * h)
    return mean, float((np.square(grid - mean) * p).sum() * h)


def closed_form_checks(sampler: Sampler, samples: list[Sample]) -> list[ClosedFormCheck]:
    """Return a sampler's closed forms beside the estimates of its samples, one a seed; none without enough groups."""
    problem, sigma = sampler.problem, sampler.problem.joint.sigma_sprime
    distribution = sampler.exact_distribution()
    source = "law"
    if distribution is not None:
        exact = gaussian_moments(distribution, sigma)
    else:
        exact, source = gaussian_moments(problem.tilted_joint, sigma), "target"
        if isinstance(sampler, PCMALA):
            (exact["mean"], exact["var"]), source = density_moments(sampler), "law"
    # samples that were weighted against each other depend on each other
    group = IMPORTANCE_GROUP if isinstance(sampler, Importance) else problem.settings.smc_particles
    dependent = 0 if sampler.independent else group
    if dependent and sum(len(x.a) // dependent for x in samples) < 8:
        return []  # too few groups for a standard error
    out = check_moments(sampler.name, samples, exact, source, sigma, dependent)
    if isinstance(sampler, Importance):
        extra = [x.extra or {} for x in samples]
        ess_fractions = [v for e in extra for v in e["ess_fraction"]]
        out.append(check_mean(sampler.name, "ess_fraction", problem.target.importance_ess_fraction, ess_fractions))
    if isinstance(sampler, Importance | TwistedSMC):
        z = [math.exp(v - problem.target.log_z) for x in samples for v in (x.extra or {})["log_z"]]
        out.append(check_mean(sampler.name, "Z / exact Z", 1.0, z))
    if isinstance(sampler, Gibbs):
        precision = problem.joint.alpha**2 / problem.joint.sigma_sprime**2  # of s' as an observation of a
        found = [v for x in samples if x.trace is not None for v in lag_one_autocorrelation(x.trace)]
        exact_lag_one = precision / (problem.target.tau + precision)
        out.append(check_mean(sampler.name, "lag-1 autocorrelation", exact_lag_one, found))
    return out


def check_table(checks: Sequence[ClosedFormCheck]) -> list[str]:
    """Return the lines of a Markdown table, a row a check."""
    lines = ["| sampler | quantity | closed form | of | measured | error | z |", "|---|---|---:|---|---:|---:|---:|"]
    for c in checks:
        lines.append(
            f"| {c.sampler} | {c.quantity} | {c.exact:.5f} | {c.source} | {c.estimate:.5f} | {c.standard_error:.5f} "
            f"| {c.z:+.1f} |"
        )
    return lines


def distribution_table(
    problem: Problem, distributions: Mapping[str, Gaussian], measured: Mapping[str, Sequence[float]]
) -> list[str]:
    """Return a Markdown table of the exact distributions of samplers that miss the target, with their KL to it.

    Args:
        problem: gives the target.
        distributions: exact distribution of each sampler.
        measured: joint KL by moments (nats) of each sampler's samples, one a seed.
    """
    sigma, target = problem.joint.sigma_sprime, problem.tilted_joint
    lines = [
        "| sampler | mean | variance | slope of s' | Var(s' given a), ratio | joint KL, exact | joint KL, measured |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, x in {"target": target, **distributions}.items():
        kl = gaussian_kl(x.m, x.C, target.m, target.C)
        if name != "target" and kl < 1e-9:
            continue
        numbers = [f"{value:.4f}" for value in gaussian_moments(x, sigma).values()]
        found = format_estimate(mean_ci(list(measured[name]))) if name in measured else "-"
        lines.append(f"| {name} | {' | '.join(numbers)} | {kl:.3g} | {found} |")
    return lines


def off_target_warning(problem: Problem) -> str:
    """Return a warning with the distributions that annealed samplers end at; empty where MALA reaches the target."""
    target = problem.target

    def kl_to_target(mean: float, var: float) -> float:
        return gaussian_kl(mean, var, target.mu, 1 / target.tau)

    mean, var = density_moments(PCMALA(problem))
    if kl_to_target(mean, var) < OFF_TARGET_KL:
        return ""
    ends = [f"pc_mala ends at mean {mean:.3f}, variance {var:.3f}, action KL {kl_to_target(mean, var):.2g}"]
    if (distribution := PCULA(problem).exact_distribution()) is not None:
        mean, var = float(distribution.m[0]), float(distribution.C[0, 0])
        ends.append(f"pc_ula at mean {mean:.3f}, variance {var:.3f}, action KL {kl_to_target(mean, var):.2g}")
    wanted = f"N({target.mu:.3f}, {1 / target.tau:.3f})"
    name = type(problem.schedule).__name__
    return f"warning: schedule {name} does not end at the target {wanted}: {'; '.join(ends)}"
