"""CartPole-v1 in NumPy, all environments at once: as gymnasium writes it, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.bilevel.control.environments import Disturbance, Environments

CARTPOLE = "CartPole-v1"


class CartPole(Environments):
    """CartPole-v1 (Barto, Sutton & Anderson 1983), vectorised: gymnasium's own numbers to the last bit.

    ``physics`` (4, R, copies), float64: the cart's position (m) and velocity, the pole's angle (rad) and velocity.
    """

    MAX_STEPS, X_THRESHOLD, THETA_THRESHOLD = 500, 2.4, 12 * 2 * math.pi / 360
    # gymnasium's masspole, total_mass, length (half the pole's), polemass_length, tau and force_mag
    GRAVITY, POLE_MASS, TOTAL_MASS, LENGTH, POLE_MASS_LENGTH, TAU = 9.8, 0.1, 0.1 + 1.0, 0.5, 0.1 * 0.5, 0.02
    FORCES = np.array([-10.0, 10.0])

    def __init__(self, seeds: Sequence[int], stream: str, copies: int, disturbance: Disturbance) -> None:
        self.physics = np.zeros((4, len(seeds), copies))
        super().__init__(seeds, stream, copies, disturbance, 4, 2)

    def reset_one(self, replica: int, copy: int, seed: int) -> np.ndarray:
        """See :meth:`Environments.reset_one`."""
        start = np.random.Generator(np.random.PCG64(seed)).uniform(-0.05, 0.05, size=4)
        self.physics[:, replica, copy] = start
        return start

    def step_all(self, action: np.ndarray, drift_step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """See :meth:`Environments.step_all`."""
        _, v, theta, omega = self.physics
        cos, sin = np.cos(theta), np.sin(theta)
        # the order of the operations is gymnasium's, so that the rounding is too
        temp = (self.FORCES[action] + self.POLE_MASS_LENGTH * np.square(omega) * sin) / self.TOTAL_MASS
        theta_acc = (self.GRAVITY * sin - cos * temp) / (
            self.LENGTH * (4.0 / 3.0 - self.POLE_MASS * np.square(cos) / self.TOTAL_MASS)
        )
        x_acc = temp - self.POLE_MASS_LENGTH * theta_acc * cos / self.TOTAL_MASS
        new = np.empty_like(self.physics)
        new[0], new[1], new[2], new[3] = v, x_acc, omega, theta_acc
        new *= self.TAU
        new += self.physics
        self.physics = new
        terminated = (np.abs(new[0]) > self.X_THRESHOLD) | (np.abs(new[2]) > self.THETA_THRESHOLD)
        observation = new.transpose(1, 2, 0).astype(np.float32, order="C")
        if self.disturbance.drift:
            distance = np.abs(np.degrees(new[2]) - self.disturbance.centre(drift_step))
            reward = (distance < self.disturbance.drift_width).astype(np.float32)
        else:
            reward = np.ones(self.shape, dtype=np.float32)
        return observation, reward, terminated, self.lengths + 1 >= self.MAX_STEPS

    def state_dict(self) -> dict[str, Tensor]:
        """See :meth:`Environments.state_dict`."""
        return super().state_dict() | {"physics": torch.from_numpy(self.physics.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Environments.load_state_dict`."""
        super().load_state_dict(state)
        self.physics = state["physics"].cpu().numpy().copy()
