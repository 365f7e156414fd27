"""How many refreshes, and how many action steps, annealed samplers need: one knob is varied, the other stays."""

from __future__ import annotations

import dataclasses

import numpy as np

from lightning_toys.mirror_descent.annealed import PCULA
from lightning_toys.mirror_descent.joint import gaussian_kl
from lightning_toys.mirror_descent.problem import Problem, Settings

# knob to metric to values (R, number of settings)
Curves = dict[str, dict[str, np.ndarray]]


def sweep_settings(settings: Settings, most: int) -> dict[str, dict[int, Settings]]:
    """Return the settings of each sweep: knob to its values to settings.

    ``refresh_L`` goes from 0 to ``most`` at as many action steps a level (or the settings', if those are more):
    refreshes beyond the steps would change nothing. ``action_steps_per_level`` goes from 1 to ``most`` at the settings'
    refreshes. Samplers do not refresh at the end, so that what is left of the last step's s' | a shows.
    """
    if most == 0:
        return {}
    still = dataclasses.replace(settings, final_refresh=False)
    steps = max(most, settings.action_steps_per_level)
    refreshes = {n: dataclasses.replace(still, refresh_L=n, action_steps_per_level=steps) for n in range(most + 1)}
    actions = {n: dataclasses.replace(still, action_steps_per_level=n) for n in range(1, most + 1)}
    return {"refresh_L": refreshes, "action_steps_per_level": actions}


def refresh_lines(problem: Problem, most: int) -> list[str]:
    """Return a Markdown table of pc_ula's exact action KL (nats) by refreshes and action steps a level.

    Empty where its distribution is not known, or where the reward does not read s', so that refreshes change nothing.

    Args:
        problem: gives the target and all other settings.
        most: largest ``refresh_L``.
    """
    s, target = problem.settings, problem.target
    steps = sorted({s.action_steps_per_level, most, 1})
    if most == 0 or problem.reward.state_weight == 0:
        return []
    head = " | ".join(f"refresh_L {n}" for n in range(most + 1))
    lines = [f"| action steps a level | {head} |", "|---|" + "---:|" * (most + 1)]
    for n in steps:
        cells = []
        for L in range(most + 1):
            settings = dataclasses.replace(s, refresh_L=L, action_steps_per_level=n)
            x = PCULA(dataclasses.replace(problem, settings=settings)).exact_distribution()
            if x is None:
                return []
            cells.append(f"{gaussian_kl(x.m[0], x.C[0, 0], target.mu, 1 / target.tau):.3g}" if n >= L else "-")
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return [
        "KL of pc_ula's action to the target's (nats), exact, by refreshes and action steps at each level:",
        "",
        *lines,
    ]


def scaled_settings(settings: Settings, factor: float) -> Settings:
    """Return settings with a factor of the work: steps of plain samplers, and levels of all others.

    >>> scaled_settings(Settings(), 0.1).mcmc_steps, scaled_settings(Settings(), 0.001).predictor_K
    (10, 2)
    """

    def times(n: int, least: int) -> int:
        return max(least, round(factor * n))

    s = settings
    return dataclasses.replace(
        s,
        K=times(s.K, 1),
        mcmc_steps=times(s.mcmc_steps, 1),
        predictor_K=times(s.predictor_K, 2),
        smc_K=times(s.smc_K, 2),
    )
