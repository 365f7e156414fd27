"""What do flows and regression do between the data points?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.flow_vs_regression.data import InterpolationData, PointData
    from lightning_toys.flow_vs_regression.evaluation import Evaluation
    from lightning_toys.flow_vs_regression.module import FlowVsRegression
    from lightning_toys.flow_vs_regression.table import Table
    from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation, Target, Trigonometric

__all__ = [
    "Evaluation",
    "FlowVsRegression",
    "InterpolationData",
    "Piecewise",
    "PointData",
    "Projected",
    "Rotation",
    "Table",
    "Target",
    "Trigonometric",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "data": ["InterpolationData"],
        "module": ["FlowVsRegression"],
        "table": ["Table"],
        "targets": ["Piecewise", "Projected", "Rotation", "Trigonometric"],
    },
    {"data": ["PointData"], "evaluation": ["Evaluation"], "targets": ["Target"]},
)
