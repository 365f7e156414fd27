"""A contextual bandit with three reward modes that rotate with the state.

States are points (cos, sin) on the unit circle, actions points of [-1, 1]^2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODE_CENTRES = ((0.0, 0.5), (-0.5, -0.5), (0.5, -0.5))
MODE_HEIGHTS = (1.0, 0.9, 0.8)


class RotatingModes:
    """r(s, a) = sum_i h_i exp(-|a - R_s m_i|^2 / (2 w^2)): three modes, rotated by the angle of s = (cos, sin).

    The centres m_i are those of the toy target, with heights 1, .9 and .8: a policy may settle on a mode that is not
    the best. Actions are clamped to [-1, 1]^2.

    Args:
        width: w.

    Attributes:
        max_reward: the greatest expected reward, the same at every state.
        mode_maxima: the expected reward at each mode's maximum.
        baselines: expected regret of uniform actions and of each mode's maximum.

    Example:
        >>> bandit = RotatingModes()
        >>> bandit.reward(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])).item()
        1.0
    """

    def __init__(self, width: float = 0.15) -> None:
        self.width = width
        self.mode_centres, self.mode_heights = torch.tensor(MODE_CENTRES), torch.tensor(MODE_HEIGHTS)
        self.max_reward, self.mode_maxima = self.find_maxima()
        self.baselines = {"uniform": {"regret": self.max_reward - self.mean_reward()}}
        self.baselines |= {
            f"top_of_hill_{i}": {"regret": self.max_reward - top} for i, top in enumerate(self.mode_maxima)
        }

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

    def find_maxima(self) -> tuple[float, list[float]]:
        """Return the greatest expected reward, the same at every state, and the reward at each mode's maximum.

        By Newton's method from the modes' centres: the modes overlap a little, which moves the maxima.
        """
        state = torch.tensor([1.0, 0.0], dtype=torch.float64)
        # reverse mode twice: forward mode loads torch.jit, which is deprecated and slow
        curvature = torch.func.jacrev(torch.func.jacrev(self.reward, argnums=1), argnums=1)
        maxima = []
        for centre in self.mode_centres.double():
            a = centre.clone()
            for _ in range(20):
                a.requires_grad_(True)
                gradient = torch.autograd.grad(self.reward(state, a), a)[0]
                a = (a - torch.linalg.solve(curvature(state, a.detach()), gradient)).detach()
            maxima.append(float(self.reward(state, a)))
        return max(maxima), maxima

    def nearest(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest mode (...) of actions (..., 2) at states (..., 2), and the distance from it in widths."""
        distance = (action.clamp(-1.0, 1.0).unsqueeze(-2) - self.centres(state)).square().sum(-1).sqrt() / self.width
        smallest, mode = distance.min(-1)
        return mode, smallest


def turns_to_states(turns: Tensor) -> Tensor:
    """Return the states (cos, sin) at angles of 2 pi ``turns``: (...) to (..., 2)."""
    angle = 2 * math.pi * turns
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


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
