"""Which model serves the learner that learns from it?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.bilevel.control.data import ReplayData
    from lightning_toys.bilevel.control.environments import Disturbance
    from lightning_toys.bilevel.control.learner import Solver
    from lightning_toys.bilevel.control.module import BilevelControl
    from lightning_toys.bilevel.regression.data import DriftStream
    from lightning_toys.bilevel.regression.drift import Drift, Linear, Piecewise, Sine
    from lightning_toys.bilevel.regression.module import WindowRegression

__all__ = [
    "BilevelControl",
    "Disturbance",
    "Drift",
    "DriftStream",
    "Linear",
    "Piecewise",
    "ReplayData",
    "Sine",
    "Solver",
    "WindowRegression",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "control.data": ["ReplayData"],
        "control.environments": ["Disturbance"],
        "control.learner": ["Solver"],
        "control.module": ["BilevelControl"],
        "regression.data": ["DriftStream"],
        "regression.drift": ["Linear", "Piecewise", "Sine"],
        "regression.module": ["WindowRegression"],
    },
    {"regression.drift": ["Drift"]},
)
