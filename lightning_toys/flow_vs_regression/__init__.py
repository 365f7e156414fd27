"""What do flows and regression do between the data points?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.flow_vs_regression.data import InterpolationData
    from lightning_toys.flow_vs_regression.module import Evaluation, FlowVsRegression
    from lightning_toys.flow_vs_regression.published import PublishedPiecewise, PublishedRotation
    from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation, Target, Trigonometric

__all__ = [
    "Evaluation",
    "FlowVsRegression",
    "InterpolationData",
    "Piecewise",
    "Projected",
    "PublishedPiecewise",
    "PublishedRotation",
    "Rotation",
    "Target",
    "Trigonometric",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "data": ["InterpolationData"],
        "module": ["FlowVsRegression"],
        "published": ["PublishedPiecewise", "PublishedRotation"],
        "targets": ["Piecewise", "Projected", "Rotation", "Trigonometric"],
    },
    {"module": ["Evaluation"], "targets": ["Target"]},
)
