"""What do flows and regression do between the data points?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.flow_vs_regression.data import InterpolationData, PointData, Points
    from lightning_toys.flow_vs_regression.evaluation import Evaluation
    from lightning_toys.flow_vs_regression.flow_maps import (
        ConsistencyTraining,
        LagrangianFlowMap,
        MeanFlow,
        Shortcut,
    )
    from lightning_toys.flow_vs_regression.module import FlowVsRegression
    from lightning_toys.flow_vs_regression.objectives import Objective, Readout
    from lightning_toys.flow_vs_regression.own import Architecture, Metric
    from lightning_toys.flow_vs_regression.parametrisations import AuthorsMIP, VPrediction, XPrediction
    from lightning_toys.flow_vs_regression.published import PublishedPiecewise, PublishedRotation
    from lightning_toys.flow_vs_regression.reflow import Reflow
    from lightning_toys.flow_vs_regression.table import Table
    from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation, Target, Trigonometric

__all__ = [
    "Architecture",
    "AuthorsMIP",
    "ConsistencyTraining",
    "Evaluation",
    "FlowVsRegression",
    "InterpolationData",
    "LagrangianFlowMap",
    "MeanFlow",
    "Metric",
    "Objective",
    "Piecewise",
    "PointData",
    "Points",
    "Projected",
    "PublishedPiecewise",
    "PublishedRotation",
    "Readout",
    "Reflow",
    "Rotation",
    "Shortcut",
    "Table",
    "Target",
    "Trigonometric",
    "VPrediction",
    "XPrediction",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "data": ["InterpolationData"],
        "module": ["FlowVsRegression"],
        "flow_maps": ["ConsistencyTraining", "LagrangianFlowMap", "MeanFlow", "Shortcut"],
        "parametrisations": ["AuthorsMIP", "VPrediction", "XPrediction"],
        "published": ["PublishedPiecewise", "PublishedRotation"],
        "reflow": ["Reflow"],
        "table": ["Table"],
        "targets": ["Piecewise", "Projected", "Rotation", "Trigonometric"],
    },
    {
        "data": ["PointData", "Points"],
        "evaluation": ["Evaluation"],
        "objectives": ["Objective", "Readout"],
        "own": ["Architecture", "Metric"],
        "targets": ["Target"],
    },
)
