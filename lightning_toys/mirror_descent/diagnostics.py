"""How far draws are from the tilted law, and how well chains mix. Draws are float64 arrays (n,)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats  # type: ignore[attr-defined]
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from lightning_toys.mirror_descent.joint import gaussian_kl
from lightning_toys.mirror_descent.problem import World
from lightning_toys.training.noise import keyed_generator

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Draws of one sampler and one seed.

    Attributes:
        a: actions (n,).
        s: next states (n,).
        accepted: mean acceptance, or none.
        path: actions of some chains at every step (T, W), or none.
        jump: mean squared jump of the action in one step, or none.
        extra: other numbers by name, one of each independent group of draws.
    """

    a: Array
    s: Array
    accepted: float | None = None
    path: Array | None = None
    jump: float | None = None
    extra: Mapping[str, list[float]] | None = None


def exact_draws(world: World, seeds: Sequence[int], n: int) -> list[Sample]:
    """Return n exact draws of the tilted law of each seed."""
    out = []
    for seed in seeds:
        z = keyed_generator(seed, 0, "truth").standard_normal((2, n))
        a = world.target.mu + z[0] / math.sqrt(world.target.tau)
        s = world.joint.alpha * a + world.joint.shift + world.joint.sigma_sprime * z[1]
        out.append(Sample(a, s))
    return out


def residual(world: World, sample: Sample) -> Array:
    """Return r = (s' - alpha a - d s - mu_eps) / sigma_sprime, standard normal where s' | a is what it was."""
    joint = world.joint
    out: Array = (sample.s - joint.alpha * sample.a - joint.shift) / joint.sigma_sprime
    return out


def histogram_kl(x: Array, mean: float, std: float, bins: int) -> float:
    """Return KL(draws || N(mean, std^2)) over ``bins`` equally likely bins.

    Its expectation under the right law is about (bins - 1) / (2 n): the estimator's floor.
    """
    edges = scipy_stats.norm.ppf(np.arange(1, bins) / bins, mean, std)
    counts = np.bincount(np.searchsorted(edges, x), minlength=bins)
    share = counts[counts > 0] / len(x)
    return float((share * np.log(share * bins)).sum())


def wasserstein(x: Array, mean: float, std: float) -> float:
    """Return the 1-Wasserstein distance to N(mean, std^2): the mean distance between equal quantiles."""
    n = len(x)
    return float(np.abs(np.sort(x) - scipy_stats.norm.ppf((np.arange(n) + 0.5) / n, mean, std)).mean())


def law_metrics(world: World, sample: Sample, bins: int, independent: bool = True) -> dict[str, float]:
    """Return how far one seed's draws are from the tilted law.

    Kolmogorov-Smirnov p-values are for draws that are independent of each other.
    """
    target = world.tilted_joint
    a, s, r = sample.a, sample.s, residual(world, sample)
    m, C = np.array([a.mean(), s.mean()]), np.cov(a, s)
    found = moments(a, s, world.joint.sigma_sprime)
    out: dict[str, float] = {}
    for name, x, i in (("action", a, 0), ("state", s, 1)):
        mean, variance = float(target.m[i]), float(target.C[i, i])
        out[f"{name}_kl"] = gaussian_kl(m[i], C[i, i], mean, variance)
        out[f"{name}_kl_hist"] = histogram_kl(x, mean, math.sqrt(variance), bins)
        out[f"{name}_w1"] = wasserstein(x, mean, math.sqrt(variance))
        if independent:
            out[f"{name}_ks_p"] = float(scipy_stats.kstest((x - mean) / math.sqrt(variance), "norm").pvalue)
        out[f"{name}_mean"], out[f"{name}_var"] = float(m[i]), float(C[i, i])
    out["joint_kl"] = gaussian_kl(m, C, target.m, target.C)
    if independent:
        out["residual_ks_p"] = float(scipy_stats.kstest(r, "norm").pvalue)
    out["residual_var"] = float(r.var(ddof=1))
    out["residual_corr"] = float(np.corrcoef(r, a)[0, 1])
    return out | {k: found[k] for k in ("slope", "cond_ratio")}


def mixing_metrics(sample: Sample, stationary: bool) -> dict[str, float]:
    """Return acceptance, expected squared jump, and of the second half of a stationary path R-hat and ESS (ArviZ).

    ``ess_per_step`` is of the bulk: 1 is independent draws.
    """
    out: dict[str, float] = {}
    if sample.accepted is not None:
        out["acceptance"] = sample.accepted
    if sample.jump is not None:
        out["esjd"] = sample.jump
    if stationary and sample.path is not None and len(sample.path) >= 8:
        late = sample.path[len(sample.path) // 2 :].T  # (chains, draws)
        out["rhat"] = float(array_stats.rhat(late, chain_axis=0, draw_axis=1))
        out["ess_per_step"] = float(array_stats.ess(late, chain_axis=0, draw_axis=1)) / late.size
    return out


# closed forms against measurements


@dataclass(frozen=True)
class Fact:
    """A number that is known, and its measurement.

    Attributes:
        sampler: whose it is.
        name: the quantity.
        exact: the closed form.
        source: of what: ``law``, exactly what this sampler ends at, or ``target``.
        measured: the estimate over all seeds.
        error: its standard error.
    """

    sampler: str
    name: str
    exact: float
    source: str
    measured: float
    error: float

    @property
    def z(self) -> float:
        """(measured - exact) / error."""
        return (self.measured - self.exact) / self.error if self.error > 0 else math.nan


def moment_facts(
    name: str, samples: list[Sample], exact: Mapping[str, float], source: str, sigma: float, blocks: int = 0
) -> list[Fact]:
    """Hold mean and variance of the action, slope and conditional variance against ``exact``.

    Args:
        name: the sampler's.
        samples: one a seed.
        exact: the closed forms: ``mean``, ``var``, ``slope``, ``cond_ratio``, any of them.
        source: see :class:`Fact`.
        sigma: sigma_sprime.
        blocks: draws within a block of this many depend on each other: errors are taken between blocks; 0: all are
            independent.
    """
    a, s = np.concatenate([x.a for x in samples]), np.concatenate([x.s for x in samples])
    n = len(a)
    values = moments(a, s, sigma)
    if blocks:
        parts = [moments(x.a[i : i + blocks], x.s[i : i + blocks], sigma)
                 for x in samples for i in range(0, len(x.a) - blocks + 1, blocks)]  # fmt: skip
        errors = {k: float(np.std([p[k] for p in parts], ddof=1)) / math.sqrt(len(parts)) for k in values}
    else:
        fourth = np.square(np.square(a - a.mean()) - values["var"]).mean()  # no normality taken for granted
        left = values["cond_ratio"] * sigma**2
        errors = {
            "mean": math.sqrt(values["var"] / n),
            "var": math.sqrt(float(fourth) / n),
            "slope": math.sqrt(left / values["var"] / n),
            "cond_ratio": values["cond_ratio"] * math.sqrt(2 / n),
        }
    return [Fact(name, k, exact[k], source, values[k], errors[k]) for k in exact]


def moments(a: Array, s: Array, sigma: float) -> dict[str, float]:
    """Return mean and variance of the action, slope of s' on it, and Var(s' | a) / sigma^2."""
    C = np.cov(a, s)
    return {
        "mean": float(a.mean()),
        "var": float(C[0, 0]),
        "slope": float(C[0, 1] / C[0, 0]),
        "cond_ratio": float((C[1, 1] - C[0, 1] ** 2 / C[0, 0]) / sigma**2),
    }


def mean_fact(name: str, quantity: str, exact: float, values: list[float]) -> Fact:
    """Hold the mean of independent values against a closed form."""
    x = np.asarray(values)
    return Fact(name, quantity, exact, "law", float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))))


def lag_one(path: Array) -> list[float]:
    """Return one number a chain of the late half of a path (T, W): their mean is the lag-1 autocorrelation.

    Their spread is that of the ratio of means (its linearisation): chains with large squares have large products.
    """
    late = path[len(path) // 2 :]
    late = late - late.mean()
    top, bottom = (late[1:] * late[:-1]).mean(0), np.square(late).mean(0)
    ratio = top.mean() / bottom.mean()
    return [float(x) for x in ratio + (top - ratio * bottom) / bottom.mean()]
