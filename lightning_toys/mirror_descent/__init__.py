"""Which samplers and guidance rules reach an exactly known tilted distribution?"""

from lightning_toys.mirror_descent.data import LinearGaussian
from lightning_toys.mirror_descent.learned import LearnedSampling
from lightning_toys.mirror_descent.module import TiltedSampling
from lightning_toys.mirror_descent.problem import Settings
from lightning_toys.mirror_descent.schedules import (
    Constant,
    LateConstant,
    LateRamp,
    Linear,
    SigmaPower,
    TFGPlusFinalMALA,
)
from lightning_toys.mirror_descent.tilt import ActionValue, StateReward

__all__ = [
    "ActionValue",
    "Constant",
    "LateConstant",
    "LateRamp",
    "LearnedSampling",
    "Linear",
    "LinearGaussian",
    "Settings",
    "SigmaPower",
    "StateReward",
    "TFGPlusFinalMALA",
    "TiltedSampling",
]
