"""What do flows and regression do between the data points?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.flow_vs_regression.data import InterpolationData, PointData
    from lightning_toys.flow_vs_regression.evaluation import Evaluation
    from lightning_toys.flow_vs_regression.module import FlowVsRegression
    from lightning_toys.flow_vs_regression.objectives import Objective, Readout
    from lightning_toys.flow_vs_regression.own import Architecture, Metric
    from lightning_toys.flow_vs_regression.table import Table
    from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation, Target, Trigonometric

__all__ = [
    "Architecture",
    "Evaluation",
    "FlowVsRegression",
    "InterpolationData",
    "Metric",
    "Objective",
    "Piecewise",
    "PointData",
    "Projected",
    "Readout",
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
    {
        "data": ["PointData"],
        "evaluation": ["Evaluation"],
        "objectives": ["Objective", "Readout"],
        "own": ["Architecture", "Metric"],
        "targets": ["Target"],
    },
)
