"""A contextual bandit with three reward modes that rotate with the state.

States are points (cos, sin) on the unit circle, actions points of [-1, 1]^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

Array = NDArray[np.float64]

MODE_CENTRES = ((0.0, 0.5), (-0.5, -0.5), (0.5, -0.5))
MODE_HEIGHTS = (1.0, 0.9, 0.8)
TOPS_APART = 0.01  # maxima closer than this are one


class RotatingModes:
    """r(s, a) = sum_i h_i exp(-|a - R_s m_i|^2 / (2 w^2)): three modes, rotated by the angle of s = (cos, sin).

    The centres m_i are those of the toy target, with heights 1, .9 and .8: a policy may settle on a mode that is not
    the best. Actions are clamped to [-1, 1]^2.

    Args:
        width: w.
        heights: h_i.

    Attributes:
        max_reward: the greatest expected reward, the same at every state.
        tops: the local maxima by the first centre that leads up to it: with wide modes several lead to the same.
        mode_maxima: the expected reward at each local maximum.
        baselines: expected regret of uniform actions and of each local maximum.

    Example:
        >>> bandit = RotatingModes()
        >>> bandit.reward(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])).item()
        1.0
    """

    def __init__(self, width: float = 0.15, heights: Sequence[float] = MODE_HEIGHTS) -> None:
        self.width = width
        self.mode_centres, self.mode_heights = torch.tensor(MODE_CENTRES), torch.tensor([float(h) for h in heights])
        self.tops = self.find_tops()
        self.mode_maxima = [reward for _, reward in self.tops.values()]
        self.max_reward = max(self.mode_maxima)
        self.baselines = {"uniform": {"regret": self.max_reward - self.mean_reward()}}
        self.baselines |= {f"top_of_hill_{i}": {"regret": self.max_reward - top} for i, (_, top) in self.tops.items()}

    def centres(self, state: Tensor) -> Tensor:
        """Return the modes' centres (..., 3, 2) at states (..., 2)."""
        x, y = self.mode_centres.to(state).unbind(-1)
        c, s = state[..., :1], state[..., 1:]
        return torch.stack([c * x - s * y, s * x + c * y], dim=-1)

    def reward(self, state: Tensor, action: Tensor) -> Tensor:
        """Return the expected reward (...) of actions (..., 2) at states (..., 2)."""
        a = action.clamp(-1.0, 1.0)
        square = (a.unsqueeze(-2) - self.centres(state)).square().sum(-1)
        return (self.mode_heights.to(a) * torch.exp(-0.5 * square / self.width**2)).sum(-1)

    def mean_reward(self) -> float:
        """Return the expected reward of uniform actions, averaged over 720 states: each mode's mass in [-1, 1]^2."""
        centres = self.centres(turns_to_states(torch.arange(720, dtype=torch.float64) / 720))
        inside = torch.special.ndtr((1 - centres) / self.width) - torch.special.ndtr((-1 - centres) / self.width)
        mass = 2 * math.pi * self.width**2 * inside.prod(-1)  # (states, modes)
        return float((mass @ self.mode_heights.double()).mean()) / 4

    def find_tops(self) -> dict[int, tuple[Array, float]]:
        """Return the local maxima at the state (1, 0), action (2,) and expected reward, by the centre that leads there.

        From each centre uphill by trust regions (scipy's trust-exact), which a singular or indefinite Hessian does not
        stop, as Newton's method is: between widths of .43 and .5 two modes grow into one hill. Maxima less than
        a hundredth apart are the same.
        """
        centres, heights, w2 = self.mode_centres.double().numpy(), self.mode_heights.double().numpy(), self.width**2

        def parts(a: Array) -> tuple[Array, Array]:
            away = a - centres
            return away, heights * np.exp(-0.5 * np.square(away).sum(1) / w2)

        def curvature(a: Array) -> Array:
            away, k = parts(a)
            out: Array = np.eye(2) * k.sum() / w2 - np.einsum("i,ij,ik->jk", k, away, away) / w2**2
            return out

        tops: dict[int, tuple[Array, float]] = {}
        for i, centre in enumerate(centres):
            found = minimize(
                lambda a: -parts(a)[1].sum(),
                centre,
                jac=lambda a: parts(a)[1] @ parts(a)[0] / w2,
                hess=curvature,
                method="trust-exact",
                options={"gtol": 1e-10, "initial_trust_radius": 0.1, "max_trust_radius": 0.2},
            )
            if all(np.linalg.norm(found.x - other) > TOPS_APART for other, _ in tops.values()):
                tops[i] = (found.x, float(-found.fun))
        return tops

    def nearest(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest mode (...) of actions (..., 2) at states (..., 2), and the distance from it in widths."""
        distance = (action.clamp(-1.0, 1.0).unsqueeze(-2) - self.centres(state)).square().sum(-1).sqrt() / self.width
        smallest, mode = distance.min(-1)
        return mode, smallest


def turns_to_states(turns: Tensor) -> Tensor:
    """Return the states (cos, sin) at angles of 2 pi ``turns``: (...) to (..., 2)."""
    angle = 2 * math.pi * turns
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def effective_hills(mode: Tensor, near: Tensor, hills: int = 3) -> Tensor:
    """Return the effective number of hills that are acted on at a state, its mean over states (R,), float64.

    At a state it is exp(-sum_i p_i log p_i), the Hill number of order 1 of the shares p_i of actions near hill i among
    those near any: 1 where all are on one hill, 3 where three are equally common, 0 where no action is near a hill.

    Args:
        mode: the nearest hill of each action (R, S, M), int64.
        near: whether the action is near it (R, S, M).
        hills: how many there are.

    Example:
        >>> mode = torch.tensor([[[0, 0, 0, 0], [0, 0, 1, 1]]])
        >>> effective_hills(mode, torch.ones_like(mode, dtype=torch.bool)).item()  # one hill, and two
        1.5
    """
    counts = torch.stack([((mode == i) & near).double().sum(-1) for i in range(hills)], -1)
    total = counts.sum(-1, keepdim=True)
    p = counts / total.clamp(min=1.0)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), torch.zeros_like(entropy)).mean(-1)


def sample_softmax(values: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Sample from the mirror descent step pi_old exp(Q / lambda) by resampling candidates drawn from pi_old.

    Each candidate is chosen with probability softmax(Q / lambda), by inverting the cumulative sum.

    Args:
        values: Q of the candidates (..., M).
        temperature: lambda.
        uniform: a uniform number in [0, 1) for each draw (...).

    Returns:
        The candidate's index (...), int64.

    Example:
        >>> sample_softmax(torch.tensor([0.0, 0.0]), 1.0, torch.tensor(0.7)).item()
        1
    """
    edges = torch.softmax(values / temperature, dim=-1).cumsum(-1)
    # the last edge may be rounded to less than 1
    return (edges < uniform.unsqueeze(-1)).sum(-1).clamp(max=values.shape[-1] - 1)
