"""Which model serves the learner that learns from it?"""

from lightning_toys.bilevel.control.data import ReplayData
from lightning_toys.bilevel.control.environments import Disturbance
from lightning_toys.bilevel.control.learner import Solver
from lightning_toys.bilevel.control.module import BilevelControl
from lightning_toys.bilevel.regression import DriftStream, Linear, Piecewise, Sine, WindowRegression

__all__ = [
    "BilevelControl",
    "Disturbance",
    "DriftStream",
    "Linear",
    "Piecewise",
    "ReplayData",
    "Sine",
    "Solver",
    "WindowRegression",
]
