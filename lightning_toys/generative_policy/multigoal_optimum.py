"""Episodes of the soft-optimal policy, and what they measure: the row that policies are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from lightning_toys.generative_policy.bandit import sample_softmax
from lightning_toys.generative_policy.multigoal import LOG_VOLUME, MultiGoal, stratified_actions
from lightning_toys.training.noise import keyed_generator

OPTIMAL_SIDE = 32  # cells along an axis that optimal actions are drawn from


def play_optimal(problem: MultiGoal, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return states (T + 1, n, 2) and rewards (T, n) of the soft-optimal policy from first states (n, 2), float64."""
    states, rewards = [start], []
    for t in range(problem.horizon):
        g = keyed_generator(0, t, "multigoal/optimal")
        places = torch.from_numpy(g.random((len(start), OPTIMAL_SIDE**2, 2)))
        choice = torch.from_numpy(g.random(len(start)))
        state, chosen = states[-1], []
        for s, u, c in zip(*(torch.split(x, 200) for x in (state, places, choice)), strict=True):
            a = stratified_actions(OPTIMAL_SIDE, u)
            q = problem.q_value(torch.full((len(s), 1), t), s.unsqueeze(1), a)
            chosen.append(a[torch.arange(len(s)), sample_softmax(q, problem.temperature, c)])
        action = torch.cat(chosen)
        rewards.append(problem.reward(state, action))
        states.append(problem.move(state, action))
    return torch.stack(states), torch.stack(rewards)


def expected_total_variation(shares: Sequence[float], n: int) -> float:
    """Return E sum_g |k_g / n - p_g| / 2 of n independent draws with the probabilities p: what no policy goes below.

    De Moivre's mean absolute deviation of a binomial, 2 m (1 - p) P(k = m) with m = floor(n p) + 1.

    >>> expected_total_variation([0.5, 0.5], 1), expected_total_variation([1.0, 0.0], 9)
    (0.5, 0.0)
    """
    p = np.asarray(shares, dtype=np.float64)
    m = np.floor(n * p) + 1
    return float((2 * m * (1 - p) * binom.pmf(m, n, p)).sum() / (2 * n))


def baseline_row(problem: MultiGoal, start: Tensor, optimal: bool, episodes: int) -> dict[str, float]:
    """Return the metrics of the soft-optimal policy, or of uniform actions, over episodes from first states (n, 2).

    The goals' shares of both are exactly even where the problem is symmetric, and counted else. ``goal_tv`` of the
    optimum is what ``episodes`` of it, as many as a policy plays, have on average: the floor of a policy's.
    """
    T, n = problem.horizon, len(start)
    if optimal:
        states, rewards = play_optimal(problem, start)
        steps = torch.arange(T)[:, None].expand(T, n)
        few = slice(0, 100)
        entropy = float(problem.optimal_entropy(steps[:, few].reshape(-1), states[:T, few].reshape(-1, 2)).mean())
    else:
        state, moved, earned = start, [start], []
        for t in range(T):
            action = 2 * torch.from_numpy(keyed_generator(0, t, "multigoal/uniform").random((n, 2))) - 1
            earned.append(problem.reward(state, action))
            state = problem.move(state, action)
            moved.append(state)
        states, rewards, entropy = torch.stack(moved), torch.stack(earned), LOG_VOLUME
    optimum = float(problem.value(torch.zeros(n, dtype=torch.long), start).mean())
    goal, away = problem.goal_of(states[-1])
    out = {"return": float(rewards.sum(0).mean()), "entropy": entropy}
    out["soft_gap"] = optimum - out["return"] - problem.temperature * T * entropy
    out["reached"] = float((away < 2 * problem.width).double().mean())
    shares = [0.25] * 4 if problem.symmetric else [float((goal == g).double().mean()) for g in range(4)]
    if optimal:
        out["goal_tv"] = expected_total_variation(shares, episodes)
    return out | {f"share_goal{g}": share for g, share in enumerate(shares)}
