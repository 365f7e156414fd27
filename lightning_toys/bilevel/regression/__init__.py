"""A window of weights over a drifting stream."""

from lightning_toys.bilevel.regression.data import DriftStream
from lightning_toys.bilevel.regression.drift import Linear, Piecewise, Sine
from lightning_toys.bilevel.regression.module import WindowRegression

__all__ = ["DriftStream", "Linear", "Piecewise", "Sine", "WindowRegression"]
