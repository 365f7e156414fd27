"""Distances of samples to the tilted target, and how well chains mix. Samples are float64 arrays (n,)."""

from __future__ import annotations

import itertools
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
        a: actions (n,), or (d_a, n) where they have several coordinates.
        s: next states, likewise.
        accepted: mean acceptance rate, or None.
        trace: actions of some chains after every step (T, W), or None.
        squared_jump: mean squared jump of the action in a step, or None.
        extra: other numbers by name, one for each independent group of chains.
        steps: of each chain; 0 where none are recorded.
        states: next states of the traced chains after every step (T, W), or None.
    """

    a: Array
    s: Array
    accepted: float | None = None
    trace: Array | None = None
    squared_jump: float | None = None
    extra: Mapping[str, list[float]] | None = None
    steps: int = 0
    states: Array | None = None


def exact_draws(problem: Problem, seeds: Sequence[int], n: int) -> list[Sample]:
    """Return n independent draws of the tilted target for each seed."""
    out = []
    for seed in seeds:
        z = keyed_generator(seed, 0, "truth").standard_normal((2, n))
        a = problem.target.mu + z[0] / math.sqrt(problem.target.tau)
        s = problem.linear_joint.alpha * a + problem.linear_joint.shift + problem.linear_joint.sigma_sprime * z[1]
        out.append(Sample(a, s))
    return out


def residual(problem: Problem, sample: Sample) -> Array:
    """Return r = (s' - alpha a - d s - mu_eps) / sigma_sprime, standard normal where s' | a is unchanged (n,)."""
    joint = problem.linear_joint
    out: Array = (sample.s - joint.alpha * sample.a - joint.shift) / joint.sigma_sprime
    return out


def redrawn_states(problem: Problem, sample: Sample) -> Array:
    """Return next states (n,) drawn exactly given a sample's own actions: the seed script's ``_gt``.

    What is wrong with them comes from the actions; what is wrong with the sample's own alone comes from s' | a.
    """
    z = keyed_generator(len(sample.a), 0, "redrawn states").standard_normal(len(sample.a))
    out: Array = (
        problem.linear_joint.alpha * sample.a + problem.linear_joint.shift + problem.linear_joint.sigma_sprime * z
    )
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


def ks_p_values(problem: Problem, sample: Sample) -> dict[str, float]:
    """Return Kolmogorov-Smirnov p-values of independent draws: action, next state and residual against the target's."""
    target = problem.tilted_joint
    columns = {
        "action": (sample.a - target.m[0]) / math.sqrt(target.C[0, 0]),
        "state": (sample.s - target.m[1]) / math.sqrt(target.C[1, 1]),
        "residual": residual(problem, sample),
    }
    return {f"{name}_ks_p": float(scipy_stats.kstest(x, "norm").pvalue) for name, x in columns.items()}


def distribution_metrics(problem: Problem, sample: Sample, bins: int) -> dict[str, float]:
    """Return metrics of one seed's sample against the tilted target, by name; KLs are in nats.

    Args:
        problem: gives the target.
        sample: the sample.
        bins: bins of the histogram KL.
    """
    target = problem.tilted_joint
    a, s, r = sample.a, sample.s, residual(problem, sample)
    m, C = np.array([a.mean(), s.mean()]), np.cov(a, s)
    found = moments(a, s, problem.linear_joint.sigma_sprime)
    out: dict[str, float] = {}
    for name, x, i in (("action", a, 0), ("state", s, 1)):
        mean, variance = float(target.m[i]), float(target.C[i, i])
        out[f"{name}_kl"] = gaussian_kl(m[i], C[i, i], mean, variance)
        out[f"{name}_kl_hist"] = histogram_kl(x, mean, math.sqrt(variance), bins)
        out[f"{name}_w1"] = wasserstein(x, mean, math.sqrt(variance))
        out[f"{name}_mean"], out[f"{name}_var"] = float(m[i]), float(C[i, i])
    out["joint_kl"] = gaussian_kl(m, C, target.m, target.C)
    again = redrawn_states(problem, sample)
    out["state_kl_redrawn"] = gaussian_kl(again.mean(), again.var(ddof=1), float(target.m[1]), float(target.C[1, 1]))
    out["residual_var"] = float(r.var(ddof=1))
    out["residual_corr"] = float(np.corrcoef(r, a)[0, 1])
    return out | {k: found[k] for k in ("slope", "cond_ratio")}


MIN_DRAWS = 20  # of a chain's second half, below which R-hat and ESS say nothing


def mixing_metrics(sample: Sample, stationary: bool, evaluations: float = math.nan) -> dict[str, float]:
    """Return acceptance rate, expected squared jump, and R-hat and ESS (ArviZ) where there is enough to tell them from.

    ``ess_per_step`` is the bulk ESS per draw of a stationary trace's second half: 1 for independent draws.
    ``ess_per_sample`` is that of the samples in their order, cut into four. ``esjd_per_cost`` is the squared jumps of
    all steps together, per evaluation.

    Args:
        sample: the sample.
        stationary: whether all steps of its trace are of one kernel.
        evaluations: to a sample.
    """
    out: dict[str, float] = {}
    if sample.accepted is not None:
        out["acceptance"] = sample.accepted
    if sample.squared_jump is not None:
        out["esjd"] = sample.squared_jump
        if not math.isnan(evaluations):
            out["esjd_per_cost"] = sample.squared_jump * sample.steps / evaluations
            quarters = sample.a[: len(sample.a) // 4 * 4].reshape(4, -1)
            out["ess_per_sample"] = float(array_stats.ess(quarters, chain_axis=0, draw_axis=1)) / quarters.size
    if stationary and sample.trace is not None and len(sample.trace) // 2 >= MIN_DRAWS:
        late = sample.trace[len(sample.trace) // 2 :].T  # (chains, draws)
        out["rhat"] = float(array_stats.rhat(late, chain_axis=0, draw_axis=1))
        out["ess_per_step"] = float(array_stats.ess(late, chain_axis=0, draw_axis=1)) / late.size
    return out


# closed forms beside estimates


@dataclass(frozen=True)
class ClosedFormCheck:
    """An estimate beside what it should be.

    Attributes:
        sampler: the sampler's name.
        quantity: name of the quantity.
        exact: the closed form of what the sampler draws from; NaN where it is not known.
        source: ``exact``, exactly what this sampler draws from; ``limit``, what it tends to as its groups grow;
            ``unknown``; ``skewed``, values of which few are so large that no test holds (``particle_groups.py``).
        target: the tilted target's value; None where the quantity is the sampler's own.
        estimate: over all seeds.
        standard_error: of the estimate; NaN where there is one group alone.
        groups: independent groups that the standard error is taken between; 0: so many that it is as good as known.
        bias: how far the mean estimate of a right sampler may be from ``exact``, at most: what is less is no error.
    """

    sampler: str
    quantity: str
    exact: float
    source: str
    target: float | None
    estimate: float
    standard_error: float
    groups: int = 0
    bias: float = 0.0

    @property
    def z(self) -> float:
        """(estimate - exact) / standard_error, nearer to 0 by what may be a bias."""
        return self.errors_from(self.exact, self.bias)

    @property
    def goal_z(self) -> float:
        """(estimate - target) / standard_error."""
        return self.errors_from(self.target)

    def errors_from(self, value: float | None, bias: float = 0.0) -> float:
        """Return how many standard errors the estimate is from a value; NaN where that is not known."""
        if value is None or math.isnan(value):
            return math.nan
        difference = self.estimate - value
        difference = math.copysign(max(0.0, abs(difference) - bias), difference) if bias > 0 else difference
        if self.standard_error == 0:
            return 0.0 if abs(difference) < 1e-12 * max(1.0, abs(value)) else math.copysign(math.inf, difference)
        return difference / self.standard_error

    def p_value(self, z: float) -> float:
        """Return the two-sided p-value of a number of standard errors: Student's t where groups are few."""
        if self.groups:
            return float(2 * scipy_stats.t.sf(abs(z), self.groups - 1))
        return float(2 * scipy_stats.norm.sf(abs(z)))


def check_moments(
    name: str, samples: list[Sample], exact: Mapping[str, float], source: str, target: Mapping[str, float],
    sigma: float, group: int = 0,
) -> list[ClosedFormCheck]:  # fmt: skip
    """Return checks of mean and variance of the action, slope and conditional variance.

    Standard errors are those of the linearised estimates (their influence functions), without assuming normality.

    Args:
        name: the sampler's name.
        samples: one a seed.
        exact: the closed forms: ``mean``, ``var``, ``slope``, ``cond_ratio``, any of them.
        source: see :class:`ClosedFormCheck`.
        target: the target's, all of them.
        sigma: sigma_sprime.
        group: draws within a group of this many depend on each other, and standard errors are taken between groups;
            0: all are independent.
    """
    a, s = np.concatenate([x.a for x in samples]), np.concatenate([x.s for x in samples])
    values, influences = moments(a, s, sigma), influence_functions(a, s, sigma)
    return checks_of(name, values, influences, [len(x.a) for x in samples], exact, source, target, group)


def checks_of(
    name: str, values: Mapping[str, float], influences: Mapping[str, Array], sizes: Sequence[int],
    exact: Mapping[str, float], source: str, target: Mapping[str, float], group: int = 0,
) -> list[ClosedFormCheck]:  # fmt: skip
    """Return checks of estimates, by name.

    Args:
        name: the sampler's name.
        values: the estimates, of all seeds together.
        influences: what each draw adds to them, times n, to first order (n,).
        sizes: draws of each seed, in order.
        exact: the closed forms, any of them.
        source: see :class:`ClosedFormCheck`.
        target: the target's, all of them.
        group: draws within a group of this many depend on each other; 0: all are independent.
    """
    groups, n = 0, sum(sizes)
    if group:
        ends = np.cumsum([0, *sizes])
        starts = [k for i, j in itertools.pairwise(ends) for k in range(i, j - group + 1, group)]
        groups = len(starts)
        means = {k: np.array([v[i : i + group].mean() for i in starts]) for k, v in influences.items()}
        errors = {k: standard_error(v) for k, v in means.items()}
    else:
        errors = {k: math.sqrt(float(np.square(v).mean()) / n) for k, v in influences.items()}
    return [
        ClosedFormCheck(
            name,
            k,
            exact.get(k, math.nan),
            source if k in exact else "unknown",
            target[k],
            values[k],
            errors[k],
            groups,
        )
        for k in target
    ]


def standard_error(values: Array) -> float:
    """Return the standard error of the mean of independent values (n,); NaN for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def influence_functions(a: Array, s: Array, sigma: float) -> dict[str, Array]:
    """Return what each draw adds to the moments, times n, to first order (n,): by the names of :func:`moments`."""
    C = np.cov(a, s)
    x, y = a - a.mean(), s - s.mean()
    variance = max(float(C[0, 0]), 1e-300)
    e = y - float(C[0, 1]) / variance * x
    return {
        "mean": x,
        "var": np.square(x) - np.square(x).mean(),
        "slope": x * e / variance,
        "cond_ratio": (np.square(e) - np.square(e).mean()) / sigma**2,
    }


def moments(a: Array, s: Array, sigma: float) -> dict[str, float]:
    """Return mean and variance of the action, slope of s' on it, and Var(s' | a) / sigma^2, by name."""
    C = np.cov(a, s)
    return {
        "mean": float(a.mean()),
        "var": float(C[0, 0]),
        "slope": float(C[0, 1] / C[0, 0]),
        "cond_ratio": float((C[1, 1] - C[0, 1] ** 2 / C[0, 0]) / sigma**2),
    }


def check_mean(name: str, quantity: str, exact: float, values: Sequence[float]) -> ClosedFormCheck:
    """Return the check of the mean of independent values; ``name`` is the sampler's."""
    x = np.asarray(values, np.float64)
    return ClosedFormCheck(name, quantity, exact, "exact", None, float(x.mean()), standard_error(x), len(x))


def lag_one_autocorrelation(trace: Array) -> list[float]:
    """Return one number a chain of the second half of a trace (T, W): their mean is the lag-1 autocorrelation.

    Their spread gives its standard error: they are the linearised ratio of means (delta method).
    """
    late = trace[len(trace) // 2 :]
    late = late - late.mean()
    covariance, variance = (late[1:] * late[:-1]).mean(0), np.square(late).mean(0)
    ratio = covariance.mean() / variance.mean()
    return [float(x) for x in ratio + (covariance - ratio * variance) / variance.mean()]
