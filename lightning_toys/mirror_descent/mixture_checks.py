"""What draws on mixtures are measured by: moments with their errors, beside exact ones, and distances to the truth.

With r_j(x) the probability of component j given x, which no tilt of a changes, E r_j is the weight of component j. With
u_i = P(S_i <= s'_i | a), uniform where s' | a is unchanged, E u = 1 / 2 and E (u - 1 / 2)^2 = 1 / 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample, checks_of
from lightning_toys.mirror_descent.joint import Array, gaussian_kl
from lightning_toys.mirror_descent.mixture import GaussianMixtureJoint
from lightning_toys.mirror_descent.particle_groups import group_estimates, limit_bias, too_skewed
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.mirror_descent.tilt import Reward
from lightning_toys.mirror_descent.truth import Truth

LIMIT_GROUP = 2**8  # particles from which a limit is tested: the bias falls as 1 over their number


def points_of(sample: Sample) -> Array:
    """Return a sample's points x = (a, s') (n, D)."""
    rows = [np.atleast_2d(sample.a), np.atleast_2d(sample.s)]
    return np.concatenate(rows).T


def first_action(sample: Sample) -> Sample:
    """Return a sample with the first coordinate of its actions alone (n,), for diagnostics of mixing."""
    return replace(sample, a=np.atleast_2d(sample.a)[0])


def rewards_of(reward: Reward, x: Array, action_dim: int) -> Array:
    """Return Q (n,) at points x (n, D)."""
    out: Array = reward.value(torch.from_numpy(np.ascontiguousarray(x[:, :action_dim].T))).double().numpy()
    return out


def moment_names(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return name and indices of each entry of a covariance's upper triangle: ``var a1``, ``cov a1,a2``, ...

    >>> moment_names(["a", "s'"])
    [('var a', 0, 0), ("cov a,s'", 0, 1), ("var s'", 1, 1)]
    """
    n = len(names)
    return [
        (f"var {names[i]}" if i == j else f"cov {names[i]},{names[j]}", i, j) for i in range(n) for j in range(i, n)
    ]


def exact_statistics(joint: GaussianMixtureJoint, distribution: Truth) -> dict[str, float]:
    """Return the exact values of :func:`statistics` by name."""
    names, d = joint.coordinates, joint.action_dim
    out = (
        {f"weight {j + 1}": float(w) for j, w in enumerate(distribution.weights)}
        if len(distribution.weights) > 1
        else {}
    )
    out |= {f"mean {c}": float(m) for c, m in zip(names, distribution.mean, strict=True)}
    out |= {name: float(distribution.covariance[i, j]) for name, i, j in moment_names(names)}
    out["Q"] = distribution.mean_reward
    for c in names[d:]:
        out |= {f"u({c}|a) mean": 0.5, f"u({c}|a) var": 1 / 12}
    return out


def statistics(
    joint: GaussianMixtureJoint, reward: Reward, distribution: Truth, x: Array, weight: Array | None = None
) -> tuple[dict[str, float], dict[str, Array]]:
    """Return the moments of draws x (n, D), and what each draw adds to them, times n, to first order (n,).

    Args:
        joint: the mixture.
        reward: gives Q.
        distribution: gives the distribution function of s' | a.
        x: the draws.
        weight: of each draw (n,), of mean 1; all 1 if left out.
    """
    names, d = joint.coordinates, joint.action_dim
    w = np.ones(len(x)) if weight is None else weight
    mean = (w[:, None] * x).mean(0)
    away = x - mean
    columns: dict[str, Array] = {}
    r = joint.clean.responsibilities(x)
    if r.shape[1] > 1:
        columns |= {f"weight {j + 1}": column for j, column in enumerate(r.T)}
    columns |= {f"mean {c}": x[:, i] for i, c in enumerate(names)}
    columns |= {name: away[:, i] * away[:, j] for name, i, j in moment_names(names)}
    columns["Q"] = rewards_of(reward, x, d)
    u = distribution.conditional_cdf(x)
    for i, c in enumerate(names[d:]):
        columns |= {f"u({c}|a) mean": u[:, i], f"u({c}|a) var": np.square(u[:, i] - 0.5)}
    values = {k: float((w * v).mean()) for k, v in columns.items()}
    return values, {k: w * (v - values[k]) for k, v in columns.items()}


def pooling_weights(samples: Sequence[Sample], group: int) -> Array | None:
    """Return the weight of each draw (n,), of mean 1, that its group's estimate of Z gives it.

    For any number of particles E[Z_g f_g] = Z E f, f_g the mean of f over a group's draws and Z_g its estimate of Z: so
    the mean of f over draws with these weights tends to the target's as the groups, not the particles, grow in number.
    None where groups have no estimates, where draws are no whole groups, or where the estimates are too skewed for the
    pooled means to be normal.

    Args:
        samples: one a seed.
        group: draws of a group.
    """
    log_z: list[float] = []
    for sample in samples:
        n, found = len(points_of(sample)), (sample.extra or {}).get("log_z", [])
        if not group or n % group or len(found) < n // group:
            return None
        log_z += found[: n // group]
    z = np.exp(np.array(log_z) - max(log_z))
    if too_skewed(z):
        return None
    return np.repeat(z / z.mean(), group)


def mixture_checks(
    sampler: Sampler, samples: Sequence[Sample], joint: GaussianMixtureJoint, target: Truth, complete: bool = True
) -> list[ClosedFormCheck]:
    """Return the checks of a sampler's draws, one sample a seed.

    *Implementation* is the distribution of what the sampler does where it is known (``exact``), the target of one
    that is exact as its groups grow (``limit``), else unknown. *Goal* is the target in any case. Groups below
    ``LIMIT_GROUP`` are not tested against their limit: their bias shows. What bias larger ones may have is no error
    (``particle_groups.py``). Nor are draws tested from which some are left out: no distribution is known of those
    that remain. Groups of any size that estimate Z are tested once more, pooled by Z: rows ``pooled ...``. They have
    no goal, since their weights are not the draws'.

    Args:
        sampler: that drew.
        samples: one a seed.
        joint: the mixture.
        target: the tilted distribution.
        complete: whether no draw is left out.
    """
    goal = exact_statistics(joint, target)
    exact: dict[str, float] = {}
    if complete and sampler.exact_in_the_limit:
        exact = goal if sampler.group >= LIMIT_GROUP else {}
    elif complete and (distribution := sampler.exact_distribution_on_mixtures()) is not None:
        exact = exact_statistics(joint, distribution)
    source = "limit" if sampler.exact_in_the_limit else "exact"
    x = np.concatenate([points_of(s) for s in samples])
    values, influences = statistics(joint, sampler.problem.reward, target, x)
    sizes = [len(points_of(s)) for s in samples]
    out = checks_of(sampler.name, values, influences, sizes, exact, source, goal, sampler.group)
    if source == "limit":
        bias = limit_bias(group_estimates(samples))
        out = [replace(c, bias=bias * c.standard_error) for c in out]
    weight = pooling_weights(samples, sampler.group) if complete and sampler.exact_in_the_limit else None
    if weight is not None:
        values, influences = statistics(joint, sampler.problem.reward, target, x, weight)
        pooled = checks_of(sampler.name, values, influences, sizes, goal, "limit", goal, sampler.group)
        out += [replace(c, quantity=f"pooled {c.quantity}", target=None) for c in pooled]
    return [*out, *sampler.own_checks(samples)]


def distances(joint: GaussianMixtureJoint, reward: Reward, target: Truth, x: Array) -> dict[str, float]:
    """Return distances of draws x (n, D) of one seed to the target, by name.

    ``w1`` is the 1-Wasserstein distance of a coordinate's marginal in units of the target's standard deviation, the
    mean of all coordinates (``action_w1``: of the action's); ``mode_tv`` the total variation distance of the weights of
    the components; ``moment_kl`` the KL of Gaussians with the mean and covariance of draws and target (nats);
    ``conditional_ks`` the Kolmogorov-Smirnov distance of u(s' | a) to uniforms, the greatest of its coordinates;
    ``reward`` the mean of Q.
    """
    n, d = len(x), joint.action_dim
    ordered = np.sort(x, axis=0)
    std = np.sqrt(np.diag(target.covariance))
    w1 = [float(np.abs(ordered[:, i] - target.quantiles(i, n)).mean() / std[i]) for i in range(joint.dim)]
    weights = joint.clean.responsibilities(x).mean(0)
    u = np.sort(target.conditional_cdf(x), axis=0)
    steps = np.arange(n + 1)[:, None] / n
    ks = np.maximum((steps[1:] - u).max(0), (u - steps[:-1]).max(0))
    covariance = np.atleast_2d(np.cov(x.T))
    singular = np.linalg.eigvalsh(covariance).min() <= 0
    return {
        "w1": float(np.mean(w1)),
        "action_w1": float(np.mean(w1[:d])),
        "mode_tv": float(0.5 * np.abs(weights - target.weights).sum()),
        "moment_kl": math.inf if singular else gaussian_kl(x.mean(0), covariance, target.mean, target.covariance),
        "conditional_ks": float(ks.max()),
        "reward": float(rewards_of(reward, x, d).mean()),
    }
