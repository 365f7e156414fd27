"""Closed forms that a run is held against, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_toys.mirror_descent.affine import Law
from lightning_toys.mirror_descent.annealed import PCMALA, PCULA
from lightning_toys.mirror_descent.diagnostics import Fact, Sample, lag_one, mean_fact, moment_facts
from lightning_toys.mirror_descent.joint import gaussian_kl
from lightning_toys.mirror_descent.problem import World
from lightning_toys.mirror_descent.reverse import TwistedSMC
from lightning_toys.mirror_descent.samplers import GROUP, Gibbs, Importance, Sampler, exact_law
from lightning_toys.stats import mean_ci, written

OFF = 1e-4  # nats that a schedule may end off the target without a warning


def law_numbers(law: Law, sigma: float) -> dict[str, float]:
    """Return the numbers of a Gaussian law that draws are held against."""
    return {
        "mean": float(law.m[0]),
        "var": float(law.C[0, 0]),
        "slope": law.rho,
        "cond_ratio": law.v / sigma**2,
    }


def density_moments(sampler: PCMALA) -> tuple[float, float]:
    """Return mean and variance of the action's exact density."""
    grid, p = sampler.density()
    h = float(grid[1] - grid[0])
    mean = float((grid * p).sum() * h)
    return mean, float((np.square(grid - mean) * p).sum() * h)


def facts_of(sampler: Sampler, samples: list[Sample]) -> list[Fact]:
    """Return a sampler's closed forms beside what was measured."""
    world, sigma = sampler.world, sampler.world.joint.sigma_sprime
    law = sampler.law()
    source = "law"
    if law is not None:
        exact = law_numbers(law, sigma)
    else:
        exact, source = law_numbers(exact_law(world), sigma), "target"
        if isinstance(sampler, PCMALA):
            (exact["mean"], exact["var"]), source = density_moments(sampler), "law"
    # draws that were weighed against each other
    dependent = 0 if sampler.independent else GROUP if isinstance(sampler, Importance) else world.settings.smc_particles
    if dependent and sum(len(x.a) // dependent for x in samples) < 8:
        return []  # too few groups for an error
    out = moment_facts(sampler.name, samples, exact, source, sigma, dependent)
    if isinstance(sampler, Importance):
        extra = [x.extra or {} for x in samples]
        shares = [v for e in extra for v in e["ess_fraction"]]
        out.append(mean_fact(sampler.name, "ess_fraction", world.target.importance_efficiency, shares))
    if isinstance(sampler, Importance | TwistedSMC):
        z = [math.exp(v - world.target.log_z) for x in samples for v in (x.extra or {})["log_z"]]
        out.append(mean_fact(sampler.name, "Z / exact Z", 1.0, z))
    if isinstance(sampler, Gibbs):
        pull = world.joint.alpha**2 / world.joint.sigma_sprime**2
        found = [v for x in samples if x.path is not None for v in lag_one(x.path)]
        out.append(mean_fact(sampler.name, "lag-1 autocorrelation", pull / (world.target.tau + pull), found))
    return out


def fact_table(facts: Sequence[Fact]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| sampler | quantity | closed form | of | measured | error | z |", "|---|---|---:|---|---:|---:|---:|"]
    for f in facts:
        lines.append(
            f"| {f.sampler} | {f.name} | {f.exact:.5f} | {f.source} | {f.measured:.5f} | {f.error:.5f} | {f.z:+.1f} |"
        )
    return lines


def law_table(world: World, laws: Mapping[str, Law], measured: Mapping[str, Sequence[float]]) -> list[str]:
    """Return a Markdown table of samplers' exact laws, correct ones left out, and how far each is from the target.

    Args:
        world: the question.
        laws: exact law of each sampler.
        measured: KL of (a, s') by moments of each sampler's draws, one a seed.
    """
    sigma, target = world.joint.sigma_sprime, exact_law(world)
    lines = [
        "| sampler | mean | variance | slope of s' | Var(s' given a), ratio | joint KL, exact | joint KL, measured |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, law in {"target": target, **laws}.items():
        kl = gaussian_kl(law.m, law.C, target.m, target.C)
        if name != "target" and kl < 1e-9:
            continue
        words = [f"{x:.4f}" for x in law_numbers(law, sigma).values()]
        found = written(mean_ci(list(measured[name]))) if name in measured else "-"
        lines.append(f"| {name} | {' | '.join(words)} | {kl:.3g} | {found} |")
    return lines


def law_reached(world: World) -> str:
    """Say which law an annealed sampler ends at where that is not the target; nothing where MALA ends there."""
    target = world.target

    def distance(mean: float, var: float) -> float:
        return gaussian_kl(mean, var, target.mu, 1 / target.tau)

    mean, var = density_moments(PCMALA(world))
    if distance(mean, var) < OFF:
        return ""
    words = [f"pc_mala ends at mean {mean:.3f}, variance {var:.3f}, action KL {distance(mean, var):.2g}"]
    if (law := PCULA(world).law()) is not None:
        mean, var = float(law.m[0]), float(law.C[0, 0])
        words.append(f"pc_ula at mean {mean:.3f}, variance {var:.3f}, action KL {distance(mean, var):.2g}")
    wanted = f"N({target.mu:.3f}, {1 / target.tau:.3f})"
    name = type(world.schedule).__name__
    return f"warning: schedule {name} does not end at the target {wanted}: {'; '.join(words)}"
