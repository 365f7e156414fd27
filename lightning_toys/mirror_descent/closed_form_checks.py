"""Closed forms beside what a run measured, row by row, with verdicts; the tables of facts.md.

Each row is tested twice. *Implementation*: against the exact moments of what the sampler does, right or wrong. *Goal*:
against the tilted target. P-values are adjusted over all rows of a run (Holm 1979), for each of the two questions by
itself, and a row differs where its adjusted p-value is below ``ALPHA``. ``detectable`` is the power: an error of that
size would have been found with probability ``POWER``, even as the family's smallest p-value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats as scipy_stats

from lightning_toys.mirror_descent.annealed import PCMALA, PCULA
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample, check_moments
from lightning_toys.mirror_descent.joint import Gaussian, gaussian_kl
from lightning_toys.mirror_descent.particle_groups import group_estimates, limit_bias
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.sampler import Sampler, gaussian_moments
from lightning_toys.stats import NOT_NEGATIVE, format_estimate, holm, mean_ci

OFF_TARGET_KL = 1e-4  # nats by which annealed MALA may miss the target without a warning
ALPHA = 0.01  # probability that a run of right samplers has a row that differs
POWER = 0.95
MOST_NAMED = 6  # quantities of a sampler that a table of verdicts names


class ImplementationError(SystemExit):
    """Samples differ from the exact moments of what their sampler does, and ``assert_implementation`` is set.

    As a command it ends with exit code 1, once all results are written.
    """

    def __init__(self, message: str) -> None:
        super().__init__(1)
        self.message = message

    def __str__(self) -> str:
        return self.message


def closed_form_checks(sampler: Sampler, samples: list[Sample], label: str = "") -> list[ClosedFormCheck]:
    """Return a sampler's closed forms beside the estimates of its samples, one a seed.

    Args:
        sampler: of the problem in its original coordinates.
        samples: one a seed.
        label: what the rows call the sampler; its name if left out.
    """
    problem, sigma = sampler.problem, sampler.problem.linear_joint.sigma_sprime
    closed = problem.model.exact
    exact = sampler.exact_moments() if closed else {}
    source = "limit" if sampler.exact_in_the_limit else "exact"
    target = gaussian_moments(problem.tilted_joint, sigma)
    out = check_moments(sampler.name, samples, exact, source, target, sigma, sampler.group)
    if closed and sampler.exact_in_the_limit:
        bias = limit_bias(group_estimates(samples))
        out = [replace(c, bias=bias * c.standard_error) for c in out]
    out += sampler.own_checks(samples) if closed else []
    return [replace(c, sampler=label or sampler.name) for c in out]


@dataclass(frozen=True)
class Row:
    """A check with its verdicts.

    Attributes:
        check: the check.
        p: adjusted p-value of the implementation; NaN where it could not be tested.
        goal_p: adjusted p-value of the goal; likewise.
        detectable: the error that would have been found with probability ``POWER``.
    """

    check: ClosedFormCheck
    p: float
    goal_p: float
    detectable: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for results.json."""
        c = self.check
        found: dict[str, Any] = {k: getattr(c, k) for k in ("sampler", "quantity", "estimate", "standard_error")}
        found |= {"exact": c.exact, "of": c.source, "z": c.z, "p_holm": self.p, "implementation": verdict(self.p)}
        found |= {"target": c.target, "goal_z": c.goal_z, "goal_p_holm": self.goal_p, "goal": verdict(self.goal_p)}
        return found | {"detectable": self.detectable}


def verdict(p: float) -> str:
    """Return the word for an adjusted p-value."""
    return "not tested" if math.isnan(p) else "differs" if p < ALPHA else "agrees"


def judge(checks: Sequence[ClosedFormCheck]) -> list[Row]:
    """Return the rows of a family of checks with their verdicts."""
    raw = {
        "p": [c.p_value(c.z) if not math.isnan(c.z) else math.nan for c in checks],
        "goal_p": [c.p_value(c.goal_z) if not math.isnan(c.goal_z) else math.nan for c in checks],
    }
    adjusted: dict[str, list[float]] = {}
    for name, p in raw.items():
        tested = [i for i, x in enumerate(p) if not math.isnan(x)]
        adjusted[name] = [math.nan] * len(checks)
        for i, x in zip(tested, holm([p[i] for i in tested]), strict=True):
            adjusted[name][i] = float(x)
    family = max(1, sum(not math.isnan(x) for x in raw["p"]))
    return [
        Row(c, p, goal_p, detectable_error(c, family))
        for c, p, goal_p in zip(checks, adjusted["p"], adjusted["goal_p"], strict=True)
    ]


def detectable_error(check: ClosedFormCheck, family: int) -> float:
    """Return the error that would be found with probability ``POWER`` in a family of so many tests (Bonferroni)."""
    level = 1 - ALPHA / (2 * family)
    distribution = scipy_stats.t(check.groups - 1) if check.groups > 1 else scipy_stats.norm
    return check.bias + float((distribution.ppf(level) + distribution.ppf(POWER)) * check.standard_error)


def verdicts(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return each sampler's two verdicts, over its rows, and the errors that would have been found."""
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(r.check.sampler for r in rows):
        own = [r for r in rows if r.check.sampler == name]
        found: dict[str, Any] = {}
        for what, p in (("implementation", "p"), ("goal", "goal_p")):
            words = {verdict(getattr(r, p)) for r in own}
            found[what] = next(w for w in ("differs", "agrees", "not tested") if w in words)
            found[f"{what}_differs"] = [r.check.quantity for r in own if verdict(getattr(r, p)) == "differs"]
        found["detectable"] = {r.check.quantity: r.detectable for r in own}
        out[name] = found
    return out


def check_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table, a row a check."""

    def number(x: float | None) -> str:
        return "-" if x is None or math.isnan(x) else f"{x:.5f}"

    def errors(x: float) -> str:
        return "-" if math.isnan(x) else f"{x:+.1f}"

    lines = [
        "| sampler | quantity | closed form | of | measured | error | z | implementation | target | z | goal "
        "| detectable |",
        "|---|---|---:|---|---:|---:|---:|---|---:|---:|---|---:|",
    ]
    for r in rows:
        c = r.check
        lines.append(
            f"| {c.sampler} | {c.quantity} | {number(c.exact)} | {c.source} | {c.estimate:.5f} "
            f"| {number(c.standard_error)} | {errors(c.z)} | {verdict(r.p)} | {number(c.target)} | {errors(c.goal_z)} "
            f"| {'-' if c.target is None else verdict(r.goal_p)} | {number(r.detectable)} |"
        )
    return lines


def named(quantities: Sequence[str]) -> str:
    """Return quantities in parentheses, the first few by name.

    >>> named([]), named(["var"]), named([str(k) for k in range(9)])
    ('', ' (var)', ' (0, 1, 2, 3, 4, 5, ... 9 in all)')
    """
    if not quantities:
        return ""
    more = f", ... {len(quantities)} in all" if len(quantities) > MOST_NAMED else ""
    return f" ({', '.join(quantities[:MOST_NAMED])}{more})"


def verdict_lines(rows: Sequence[Row], shown: Sequence[str] = ("mean", "var", "slope")) -> list[str]:
    """Return a Markdown table of the two verdicts of each sampler, below a sentence that says what they mean.

    Args:
        rows: of all samplers.
        shown: quantities whose detectable errors are shown.
    """
    tested = sum(not math.isnan(r.p) for r in rows)
    lines = [
        f"Differs: p < {ALPHA:g} after Holm's adjustment over {tested} rows (implementation: against the exact moments "
        "of what the sampler does) or all rows with a target (goal: against the tilted target). Detectable: the error "
        f"that would have been found with probability {POWER:g}.",
        "",
        f"| sampler | implementation | goal | detectable: {' | '.join(shown)} |",
        "|---|---|---|" + "---:|" * len(shown),
    ]
    for name, v in verdicts(rows).items():
        words = [v[k] + named(v[f"{k}_differs"]) for k in ("implementation", "goal")]
        power = [f"{v['detectable'].get(k, math.nan):.2g}" for k in shown]
        lines.append(f"| {name} | {' | '.join([*words, *power])} |")
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
    sigma, target = problem.linear_joint.sigma_sprime, problem.tilted_joint
    lines = [
        "| sampler | mean | variance | slope of s' | Var(s' given a), ratio | joint KL, exact | joint KL, measured |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, x in {"target": target, **distributions}.items():
        kl = gaussian_kl(x.m, x.C, target.m, target.C)
        if name != "target" and kl < 1e-9:
            continue
        numbers = [f"{value:.4f}" for value in gaussian_moments(x, sigma).values()]
        found = format_estimate(mean_ci(list(measured[name])), limits=NOT_NEGATIVE) if name in measured else "-"
        lines.append(f"| {name} | {' | '.join(numbers)} | {kl:.3g} | {found} |")
    return lines


def off_target_warning(problem: Problem) -> str:
    """Return a warning with the distributions that annealed samplers end at; empty where MALA reaches the target.

    Where MALA's density is too much to compute, ULA's distribution decides.
    """
    target = problem.target

    def kl_to_target(mean: float, var: float) -> float:
        return gaussian_kl(mean, var, target.mu, 1 / target.tau)

    ends, kls = [], []
    if found := PCMALA(problem).exact_moments():
        mean, var = found["mean"], found["var"]
        kls.append(kl_to_target(mean, var))
        ends.append(f"pc_mala ends at mean {mean:.3f}, variance {var:.3f}, action KL {kls[0]:.2g}")
    stable = problem.settings.ula_step * max(at.tau for at in problem.levels) < 2
    if stable and (distribution := PCULA(problem).exact_distribution()) is not None:
        mean, var = float(distribution.m[0]), float(distribution.C[0, 0])
        kls.append(kl_to_target(mean, var))
        ends.append(f"pc_ula {'ends ' * (not found)}at mean {mean:.3f}, variance {var:.3f}, action KL {kls[-1]:.2g}")
    if not kls or kls[0] < OFF_TARGET_KL:
        return ""
    wanted = f"N({target.mu:.3f}, {1 / target.tau:.3f})"
    name, s = type(problem.schedule).__name__, problem.settings
    work = f"K = {s.K}, {s.action_steps_per_level} action step{'s' if s.action_steps_per_level > 1 else ''} a level"
    return f"warning: schedule {name} does not end at the target {wanted} with {work}: {'; '.join(ends)}"
