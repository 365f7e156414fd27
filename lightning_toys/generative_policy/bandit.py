"""A contextual bandit whose best actions come in three places that turn with the state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODE_CENTRES = ((0.0, 0.5), (-0.5, -0.5), (0.5, -0.5))
MODE_HEIGHTS = (1.0, 0.9, 0.8)


class RotatingModes:
    """r(s, a) = sum_i h_i exp(-|a - R_s m_i|^2 / (2 w^2)): three hills, turned by the angle of s = (cos, sin).

    The hills are the modes of the toy target, with heights 1, .9 and .8: a policy may hold on to one that is not the
    best. Actions are cut to [-1, 1]^2.

    Args:
        width: w.
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
        """Return the hills' places (..., 3, 2) at states (..., 2)."""
        x, y = self.mode_centres.to(state).unbind(-1)
        c, s = state[..., :1], state[..., 1:]
        return torch.stack([c * x - s * y, s * x + c * y], dim=-1)

    def reward(self, state: Tensor, action: Tensor) -> Tensor:
        """Return the expected reward (...) of actions (..., 2) at states (..., 2)."""
        a = action.clamp(-1.0, 1.0)
        square = (a.unsqueeze(-2) - self.centres(state)).square().sum(-1)
        return (self.mode_heights.to(a) * torch.exp(-0.5 * square / self.width**2)).sum(-1)

    def mean_reward(self) -> float:
        """Return the expected reward of uniform actions, over evenly spaced states: each hill's mass in [-1, 1]^2."""
        centres = self.centres(turns_to_states(torch.arange(720, dtype=torch.float64) / 720))
        inside = torch.special.ndtr((1 - centres) / self.width) - torch.special.ndtr((-1 - centres) / self.width)
        mass = 2 * math.pi * self.width**2 * inside.prod(-1)  # (states, hills)
        return float((mass @ self.mode_heights.double()).mean()) / 4

    def find_maxima(self) -> tuple[float, list[float]]:
        """Return the greatest expected reward, the same at every state, and that at each hill's top.

        Newton steps from the hills' centres: the hills overlap a little, and the tops lie beside the centres.
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
        """Return the nearest hill, and the distance from its centre in widths."""
        distance = (action.clamp(-1.0, 1.0).unsqueeze(-2) - self.centres(state)).square().sum(-1).sqrt() / self.width
        smallest, mode = distance.min(-1)
        return mode, smallest


def turns_to_states(turns: Tensor) -> Tensor:
    """Return (cos, sin) of 2 pi turns: (...) to (..., 2)."""
    angle = 2 * math.pi * turns
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def sample_softmax(values: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw from the mirror descent step pi_old exp(Q / lambda) by weighing candidates drawn from pi_old.

    Args:
        values: Q of the candidates (..., M).
        temperature: lambda.
        uniform: one uniform number for each draw (...,).

    Returns:
        The index of the candidate (...,): candidate m with probability softmax(Q / lambda)_m.
    """
    edges = torch.softmax(values / temperature, dim=-1).cumsum(-1)
    # the last edge may be rounded to less than 1
    return (edges < uniform.unsqueeze(-1)).sum(-1).clamp(max=values.shape[-1] - 1)
