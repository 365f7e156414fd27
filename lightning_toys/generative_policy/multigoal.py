"""A point in the plane, four goals, a finite horizon; the soft-optimal values and policy by dynamic programming.

States are points of [-1, 1]^2, actions of [-1, 1]^2. With the temperature alpha, over the steps t = T - 1 to 0,

    Q_t(s, a) = r(s, a) + V_{t+1}(s'),    V_t(s) = alpha log int exp(Q_t(s, a) / alpha) da,    V_T = 0,

and pi*_t(a | s) is proportional to exp(Q_t(s, a) / alpha): it maximises the soft return E sum_t (r + alpha H(pi_t))
(Ziebart 2010; Haarnoja et al. 2017, arXiv 1702.08165, whose example with four goals this is).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from torch import Tensor

from lightning_toys.errors import bounded

Array = NDArray[np.float64]
GOALS = ((0.8, 0.0), (0.0, 0.8), (-0.8, 0.0), (0.0, -0.8))
LOG_VOLUME = math.log(4.0)  # of the actions: the entropy of uniform ones, in nats
FINE = 321  # points along an axis of the values that are looked up between


class MultiGoal:
    """s' = clamp(s + reach a), r(s, a) = sum_g exp(-|s' - g|^2 / (2 width^2)) - cost |a|^2.

    Args:
        horizon: T, steps of an episode.
        temperature: alpha, the weight of the entropy.
        reach: length of the longest step along a coordinate.
        width: of a goal.
        cost: of an action.
        grid: points along an axis of the states' grid.
        nodes: of Gauss-Legendre's rule along an axis of the actions.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(
        self,
        horizon: int = 6,
        temperature: float = 0.1,
        reach: float = 0.25,
        width: float = 0.15,
        cost: float = 0.1,
        grid: int = 61,
        nodes: int = 20,
    ) -> None:
        bounded("--data.horizon", horizon, 1, 1000)
        bounded("--data.temperature", temperature, 0.0, 1e3, above=True)
        bounded("--data.reach", reach, 0.0, 2.0, above=True)
        bounded("--data.width", width, 0.0, 10.0, above=True)
        bounded("--data.cost", cost, 0.0, 1e3)
        bounded("--data.grid", grid, 5, 1001)
        bounded("--data.nodes", nodes, 2, 200)
        self.horizon, self.temperature, self.reach = horizon, temperature, reach
        self.width, self.cost, self.grid, self.nodes = width, cost, grid, nodes
        self.goals = torch.tensor(GOALS, dtype=torch.float64)

    # the problem

    def move(self, state: Tensor, action: Tensor) -> Tensor:
        """Return the next states (..., 2)."""
        return (state + self.reach * action.clamp(-1.0, 1.0)).clamp(-1.0, 1.0)

    def state_reward(self, state: Tensor) -> Tensor:
        """Return the reward (...) of having arrived at states (..., 2)."""
        square = (state.unsqueeze(-2) - self.goals.to(state)).square().sum(-1)
        return torch.exp(-0.5 * square / self.width**2).sum(-1)

    def reward(self, state: Tensor, action: Tensor) -> Tensor:
        """Return r (...) of actions (..., 2) at states (..., 2)."""
        a = action.clamp(-1.0, 1.0)
        return self.state_reward(self.move(state, a)) - self.cost * a.square().sum(-1)

    # the optimum

    @cached_property
    def action_rule(self) -> tuple[Tensor, Tensor]:
        """Gauss-Legendre's nodes (A, 2) on [-1, 1]^2 and their weights (A,), of sum 4."""
        z, w = np.polynomial.legendre.leggauss(self.nodes)
        nodes = np.stack(np.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
        return torch.from_numpy(nodes), torch.from_numpy(np.outer(w, w).reshape(-1))

    @cached_property
    def values(self) -> Array:
        """V_t on the grid, (T + 1, n, n), the state's first coordinate along the first axis."""
        n = self.grid
        line = torch.linspace(-1, 1, n, dtype=torch.float64)
        states = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 1, 2)
        actions, weights = self.action_rule
        out = np.zeros((self.horizon + 1, n, n))
        # the same at every step: where actions lead, coordinate by coordinate, and what they earn there
        z = torch.from_numpy(np.polynomial.legendre.leggauss(self.nodes)[0])
        lead = spline_matrix(n, self.move(line[:, None], z).numpy())
        rewards = torch.cat([self.reward(s, actions) for s in torch.split(states, 512)]).reshape(n, n, -1)
        for t in range(self.horizon - 1, -1, -1):
            first = lead @ out[t + 1]  # (n, nodes, n), the first coordinate moved
            for i in range(n):
                after = (first[i] @ lead.reshape(-1, n).T).reshape(self.nodes, n, self.nodes).transpose(1, 0, 2)
                q = (rewards[i] + torch.from_numpy(after).reshape(n, -1)) / self.temperature
                out[t, i] = (self.temperature * torch.logsumexp(q + weights.log(), -1)).numpy()
        return out

    @cached_property
    def fine_values(self) -> Tensor:
        """V_t between the grid's points, (T + 1, FINE, FINE), by cubic splines."""
        between = spline_matrix(self.grid, np.linspace(-1, 1, FINE))
        return torch.from_numpy(between @ self.values @ between.T)

    def value(self, step: Tensor, state: Tensor) -> Tensor:
        """Return V_t(s) (...) at integer steps t (...) in 0 to T and states (..., 2), differentiable in the state."""
        shape = np.broadcast_shapes(tuple(step.shape), tuple(state.shape[:-1]))
        step, state = step.expand(shape).reshape(-1), state.expand(*shape, 2).reshape(-1, 2)
        out = state.new_zeros(len(state))
        for t in sorted(set(step.tolist())):
            at = (step == t).nonzero()[:, 0]
            # grid_sample has the last axis of the picture first
            picture, points = self.fine_values[int(t)].to(state)[None, None], state[at].flip(-1)[None, None]
            found = F.grid_sample(picture, points, mode="bilinear", padding_mode="border", align_corners=True)
            out = out.index_copy(0, at, found[0, 0, 0])
        return out.reshape(shape)

    def q_value(self, step: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """Return Q_t(s, a) (...) at steps (...), states and actions (..., 2), differentiable in the action."""
        return self.reward(state, action) + self.value(step + 1, self.move(state, action))

    def optimal_entropy(self, step: Tensor, state: Tensor) -> Tensor:
        """Return H(pi*_t(. | s)) = (V_t - E Q_t) / alpha (B,), in nats, at steps (B,) and states (B, 2)."""
        nodes, weights = self.action_rule
        q = self.q_value(step.unsqueeze(-1), state.unsqueeze(-2), nodes.to(state)) / self.temperature
        log_z = torch.logsumexp(q + weights.log().to(q), -1, keepdim=True)
        density = (q - log_z).exp() * weights.to(q)
        return (log_z - (density * q).sum(-1, keepdim=True))[..., 0]

    @property
    def symmetric(self) -> bool:
        """Whether a quarter turn takes the goals to one another: then the optimum from the middle reaches each alike.

        The squares of states and actions, and the distribution of the first state, have the symmetry too.
        """
        turned = torch.stack([-self.goals[:, 1], self.goals[:, 0]], 1)
        return len(self.goals) == 4 and bool((torch.cdist(turned, self.goals).amin(1) < 1e-9).all())

    def goal_of(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest goal (...) of states (..., 2), and the distance to it."""
        distance = (state.unsqueeze(-2) - self.goals.to(state)).square().sum(-1).sqrt()
        nearest, goal = distance.min(-1)
        return goal, nearest


def spline_matrix(n: int, at: Array) -> Array:
    """Return the matrix B (..., n) of the cubic spline at points (...): its values are B f, for f on a grid of [-1, 1].

    The spline is "not a knot" at its ends, so it is of fourth order up to the edge. B V B^T is the spline of a function
    of two coordinates, with values V (n, n).

    Example:
        >>> x = np.linspace(-1, 1, 7)
        >>> (spline_matrix(7, np.array([-0.95, 0.3])) @ x**3).round(6).tolist()
        [-0.857375, 0.027]
    """
    found: Array = make_interp_spline(np.linspace(-1, 1, n), np.eye(n), k=3)(at)
    return found


def stratified_actions(side: int, uniform: Tensor) -> Tensor:
    """Return an action (..., side^2, 2) in each of the side^2 cells of [-1, 1]^2, at ``uniform`` in [0, 1) of the cell.

    Together they are uniform, and a mean over them has far less error than one over independent actions.

    >>> stratified_actions(2, torch.tensor([0.5, 0.25]).expand(4, 2)).tolist()
    [[-0.5, -0.75], [-0.5, 0.25], [0.5, -0.75], [0.5, 0.25]]
    """
    k = torch.arange(side, device=uniform.device, dtype=uniform.dtype)
    cells = torch.stack(torch.meshgrid(k, k, indexing="ij"), -1).reshape(-1, 2)
    return 2 * (cells + uniform) / side - 1
