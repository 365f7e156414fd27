"""Which samplers and guidance rules reach an exactly known tilted distribution?

``joint.py``, ``tilt.py`` and ``schedules.py`` define the problem, ``problem.py`` holds it together. ``samplers.py``,
``annealed.py``, ``predictors.py`` and ``twisted_smc.py`` are the samplers, ``model.py`` and ``energy.py`` what they
know of the untilted distribution. ``diagnostics.py`` and ``closed_form_checks.py`` compare samples with closed forms;
``module.py`` and ``learned.py`` are the LightningModules.
"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.mirror_descent.data import LinearGaussian
    from lightning_toys.mirror_descent.joint import NoiseLevel
    from lightning_toys.mirror_descent.learned import LearnedSampling
    from lightning_toys.mirror_descent.module import TiltedSampling
    from lightning_toys.mirror_descent.problem import Settings
    from lightning_toys.mirror_descent.schedules import (
        Constant,
        LateConstant,
        LateRamp,
        Linear,
        Schedule,
        SigmaPower,
        TFGPlusFinalMALA,
    )
    from lightning_toys.mirror_descent.tilt import ActionValue, Quadratic, Reward, StateReward

__all__ = [
    "ActionValue",
    "Constant",
    "LateConstant",
    "LateRamp",
    "LearnedSampling",
    "Linear",
    "LinearGaussian",
    "NoiseLevel",
    "Quadratic",
    "Reward",
    "Schedule",
    "Settings",
    "SigmaPower",
    "StateReward",
    "TFGPlusFinalMALA",
    "TiltedSampling",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "data": ["LinearGaussian"],
        "learned": ["LearnedSampling"],
        "module": ["TiltedSampling"],
        "problem": ["Settings"],
        "schedules": ["Constant", "LateConstant", "LateRamp", "Linear", "SigmaPower", "TFGPlusFinalMALA"],
        "tilt": ["ActionValue", "StateReward"],
    },
    {"joint": ["NoiseLevel"], "schedules": ["Schedule"], "tilt": ["Quadratic", "Reward"]},
)
