"""What do flows and regression do between the data points?"""

from lightning_toys.flow_vs_regression.data import InterpolationData
from lightning_toys.flow_vs_regression.module import FlowVsRegression
from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation, Trigonometric

__all__ = ["FlowVsRegression", "InterpolationData", "Piecewise", "Projected", "Rotation", "Trigonometric"]
