"""What samplers and rules need of a joint distribution: its levels, rewards as functions, tilts. No mathematics here.

It is the clean distribution q(a, s') of actions and next states with its noise levels. The linear-Gaussian one is
:class:`joint.LinearGaussianJoint`, mixtures are :class:`mixture.GaussianMixtureJoint`. What chains do on it (draws,
scores, targets) is its :class:`model.JointModel`. A sampler that uses these alone runs in every problem.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class ActionFunction(ABC):
    """A function f of the action: a reward, scaled or smoothed. Actions are rows (d_a, ...)."""

    @abstractmethod
    def value(self, a: Tensor) -> Tensor:
        """Return f (...) at actions a (d_a, ...), up to a constant."""

    @abstractmethod
    def gradient(self, a: Tensor) -> Tensor:
        """Return the gradient (d_a, ...) at actions a (d_a, ...); 0 where there is none."""

    @abstractmethod
    def scaled(self, beta: float) -> ActionFunction:
        """Return beta f."""

    @abstractmethod
    def smoothed(self, scale: float, variance: float, beta: float) -> ActionFunction:
        """Return (beta / scale) log E exp(scale f(a + sqrt(variance) z)), z standard normal, up to a constant."""


class Level(ABC):
    """The distribution of x = (a, s') at one noise level, sqrt(abar) x_0 + sqrt(1 - abar) eps.

    Attributes:
        abar: alpha-bar, the fraction of signal variance, in [0, 1]; 1 is clean.
    """

    abar: float

    @abstractmethod
    def value_of(self, reward: Any) -> ActionFunction:
        """Return a reward's action value Q at this level."""


class Tilted(ABC):
    """q(a, s') exp(beta Q(a)) / Z at one noise level.

    Attributes:
        level: what is tilted; s' | a is unchanged.
        beta: inverse temperature of the tilt.
    """

    level: Any
    beta: float

    @property
    @abstractmethod
    def tau(self) -> float:
        """A precision of the tilted action that step sizes are divided by."""

    @abstractmethod
    def log_weight(self, a: Tensor) -> Tensor:
        """Return beta Q (B,) at actions a (d_a, B), less :attr:`log_weight_offset`."""

    @property
    @abstractmethod
    def log_weight_offset(self) -> float:
        """What is missing in :meth:`log_weight`."""

    @property
    @abstractmethod
    def log_z(self) -> float:
        """log Z = log E_q exp(beta Q(a))."""

    @property
    @abstractmethod
    def importance_ess_fraction(self) -> float:
        """Effective sample size of importance weights per sample of q: (E w)^2 / E w^2; 0 without a variance."""


class JointDistribution(ABC):
    """The clean distribution of x = (a, s'), and its noise levels.

    Attributes:
        action_dim: d_a, coordinates of the action, which come first.
        dim: coordinates of x in all.
    """

    action_dim: int
    dim: int

    @property
    @abstractmethod
    def clean(self) -> Any:
        """The :class:`Level` without noise."""

    @abstractmethod
    def level(self, abar: float) -> Any:
        """Return the :class:`Level` of sqrt(abar) x_0 + sqrt(1 - abar) eps, abar in [0, 1]."""

    @property
    def centre(self) -> NDArray[np.float64]:
        """Where chains have their clean origin (dim,): 0, or the mean of q."""
        return np.zeros(self.dim)


def as_rows(x: Tensor) -> Tensor:
    """Return actions or states as rows (d, B), whether given so or as (B,).

    >>> import torch
    >>> as_rows(torch.zeros(5)).shape, as_rows(torch.zeros(3, 5)).shape
    (torch.Size([1, 5]), torch.Size([3, 5]))
    """
    return x.unsqueeze(0) if x.dim() == 1 else x


def without_rows(x: Tensor) -> Tensor:
    """Return rows (d, B) as samples have them: (B,) where there is one."""
    return x[0] if x.dim() == 2 and len(x) == 1 else x
