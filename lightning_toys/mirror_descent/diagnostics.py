"""Distances of samples to the tilted target, and how well chains mix. Samples are float64 arrays (n,)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats  # type: ignore[attr-defined]
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from lightning_toys.mirror_descent.joint import gaussian_kl
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.training.noise import keyed_generator

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """The sample of one sampler and one seed.

    Attributes:
        a: actions (n,).
        s: next states (n,).
        accepted: mean acceptance rate, or None.
        trace: actions of some chains after every step (T, W), or None.
        squared_jump: mean squared jump of the action in a step, or None.
        extra: other numbers by name, one for each independent group of chains.
    """

    a: Array
    s: Array
    accepted: float | None = None
    trace: Array | None = None
    squared_jump: float | None = None
    extra: Mapping[str, list[float]] | None = None


def exact_draws(problem: Problem, seeds: Sequence[int], n: int) -> list[Sample]:
    """Return n independent draws of the tilted target for each seed."""
    out = []
    for seed in seeds:
        z = keyed_generator(seed, 0, "truth").standard_normal((2, n))
        a = problem.target.mu + z[0] / math.sqrt(problem.target.tau)
        s = problem.joint.alpha * a + problem.joint.shift + problem.joint.sigma_sprime * z[1]
        out.append(Sample(a, s))
    return out


def residual(problem: Problem, sample: Sample) -> Array:
    """Return r = (s' - alpha a - d s - mu_eps) / sigma_sprime, standard normal where s' | a is unchanged (n,)."""
    joint = problem.joint
    out: Array = (sample.s - joint.alpha * sample.a - joint.shift) / joint.sigma_sprime
    return out


def histogram_kl(x: Array, mean: float, std: float, bins: int) -> float:
    """Return KL(x || N(mean, std^2)) in nats over ``bins`` equally likely bins.

    For draws of N(mean, std^2) its expectation is about (bins - 1) / (2 n): the estimator's floor.
    """
    edges = scipy_stats.norm.ppf(np.arange(1, bins) / bins, mean, std)
    counts = np.bincount(np.searchsorted(edges, x), minlength=bins)
    fraction = counts[counts > 0] / len(x)
    return float((fraction * np.log(fraction * bins)).sum())


def wasserstein(x: Array, mean: float, std: float) -> float:
    """Return the 1-Wasserstein distance of x to N(mean, std^2): the mean distance between equal quantiles."""
    n = len(x)
    return float(np.abs(np.sort(x) - scipy_stats.norm.ppf((np.arange(n) + 0.5) / n, mean, std)).mean())


def distribution_metrics(problem: Problem, sample: Sample, bins: int, independent: bool = True) -> dict[str, float]:
    """Return metrics of one seed's sample against the tilted target, by name; KLs are in nats.

    Args:
        problem: gives the target.
        sample: the sample.
        bins: bins of the histogram KL.
        independent: whether draws are independent of each other; only then are there Kolmogorov-Smirnov p-values.
    """
    target = problem.tilted_joint
    a, s, r = sample.a, sample.s, residual(problem, sample)
    m, C = np.array([a.mean(), s.mean()]), np.cov(a, s)
    found = moments(a, s, problem.joint.sigma_sprime)
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
    """Return acceptance rate, expected squared jump, and of a stationary trace's second half R-hat and ESS (ArviZ).

    ``ess_per_step`` is the bulk ESS per draw: 1 for independent draws.
    """
    out: dict[str, float] = {}
    if sample.accepted is not None:
        out["acceptance"] = sample.accepted
    if sample.squared_jump is not None:
        out["esjd"] = sample.squared_jump
    if stationary and sample.trace is not None and len(sample.trace) >= 8:
        late = sample.trace[len(sample.trace) // 2 :].T  # (chains, draws)
        out["rhat"] = float(array_stats.rhat(late, chain_axis=0, draw_axis=1))
        out["ess_per_step"] = float(array_stats.ess(late, chain_axis=0, draw_axis=1)) / late.size
    return out


# closed forms beside estimates


@dataclass(frozen=True)
class ClosedFormCheck:
    """A closed form and its estimate.

    Attributes:
        sampler: the sampler's name.
        quantity: name of the quantity.
        exact: the closed form.
        source: of which distribution: ``law``, the one that this sampler exactly draws from, or ``target``.
        estimate: over all seeds.
        standard_error: of the estimate.
    """

    sampler: str
    quantity: str
    exact: float
    source: str
    estimate: float
    standard_error: float

    @property
    def z(self) -> float:
        """(estimate - exact) / standard_error."""
        return (self.estimate - self.exact) / self.standard_error if self.standard_error > 0 else math.nan


def check_moments(
    name: str, samples: list[Sample], exact: Mapping[str, float], source: str, sigma: float, group: int = 0
) -> list[ClosedFormCheck]:
    """Return checks of mean and variance of the action, slope and conditional variance.

    Args:
        name: the sampler's name.
        samples: one a seed.
        exact: the closed forms: ``mean``, ``var``, ``slope``, ``cond_ratio``, any of them.
        source: see :class:`ClosedFormCheck`.
        sigma: sigma_sprime.
        group: draws within a group of this many depend on each other, and standard errors are taken between groups;
            0: all are independent.
    """
    a, s = np.concatenate([x.a for x in samples]), np.concatenate([x.s for x in samples])
    n = len(a)
    values = moments(a, s, sigma)
    if group:
        parts = [moments(x.a[i : i + group], x.s[i : i + group], sigma)
                 for x in samples for i in range(0, len(x.a) - group + 1, group)]  # fmt: skip
        errors = {k: float(np.std([p[k] for p in parts], ddof=1)) / math.sqrt(len(parts)) for k in values}
    else:
        fourth = np.square(np.square(a - a.mean()) - values["var"]).mean()  # without assuming normality
        residual_variance = values["cond_ratio"] * sigma**2
        errors = {
            "mean": math.sqrt(values["var"] / n),
            "var": math.sqrt(float(fourth) / n),
            "slope": math.sqrt(residual_variance / values["var"] / n),
            "cond_ratio": values["cond_ratio"] * math.sqrt(2 / n),
        }
    return [ClosedFormCheck(name, k, exact[k], source, values[k], errors[k]) for k in exact]


def moments(a: Array, s: Array, sigma: float) -> dict[str, float]:
    """Return mean and variance of the action, slope of s' on it, and Var(s' | a) / sigma^2, by name."""
    C = np.cov(a, s)
    return {
        "mean": float(a.mean()),
        "var": float(C[0, 0]),
        "slope": float(C[0, 1] / C[0, 0]),
        "cond_ratio": float((C[1, 1] - C[0, 1] ** 2 / C[0, 0]) / sigma**2),
    }


def check_mean(name: str, quantity: str, exact: float, values: list[float]) -> ClosedFormCheck:
    """Return the check of the mean of independent values; ``name`` is the sampler's."""
    x = np.asarray(values)
    return ClosedFormCheck(name, quantity, exact, "law", float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))))


def lag_one_autocorrelation(trace: Array) -> list[float]:
    """Return one number a chain of the second half of a trace (T, W): their mean is the lag-1 autocorrelation.

    Their spread gives its standard error: they are the linearised ratio of means (delta method).
    """
    late = trace[len(trace) // 2 :]
    late = late - late.mean()
    covariance, variance = (late[1:] * late[:-1]).mean(0), np.square(late).mean(0)
    ratio = covariance.mean() / variance.mean()
    return [float(x) for x in ratio + (covariance - ratio * variance) / variance.mean()]
