"""Which past should a learner learn from, and what must a model of the world get right?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.bilevel.control.data import ReplayData
    from lightning_toys.bilevel.control.environments import Disturbance
    from lightning_toys.bilevel.control.module import BilevelControl
    from lightning_toys.bilevel.control.own_model import Dynamics
    from lightning_toys.bilevel.control.settings import Details, Solver
    from lightning_toys.bilevel.control.updates import AgentUpdate, ModelGradient
    from lightning_toys.bilevel.regression.algorithms import Found, LagAlgorithm, TimeStep
    from lightning_toys.bilevel.regression.csv_stream import CsvStream
    from lightning_toys.bilevel.regression.data import DriftStream
    from lightning_toys.bilevel.regression.drift import Drift, Linear, Piecewise, Sine, SwitchingSine
    from lightning_toys.bilevel.regression.module import WindowRegression

__all__ = [
    "AgentUpdate",
    "BilevelControl",
    "CsvStream",
    "Details",
    "Disturbance",
    "Drift",
    "DriftStream",
    "Dynamics",
    "Found",
    "LagAlgorithm",
    "Linear",
    "ModelGradient",
    "Piecewise",
    "ReplayData",
    "Sine",
    "Solver",
    "SwitchingSine",
    "TimeStep",
    "WindowRegression",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "control.data": ["ReplayData"],
        "control.environments": ["Disturbance"],
        "control.module": ["BilevelControl"],
        "control.settings": ["Details", "Solver"],
        "regression.csv_stream": ["CsvStream"],
        "regression.data": ["DriftStream"],
        "regression.drift": ["Linear", "Piecewise", "Sine", "SwitchingSine"],
        "regression.module": ["WindowRegression"],
    },
    {
        "control.own_model": ["Dynamics"],
        "control.updates": ["AgentUpdate", "ModelGradient"],
        "regression.algorithms": ["Found", "LagAlgorithm", "TimeStep"],
        "regression.drift": ["Drift"],
    },
)
