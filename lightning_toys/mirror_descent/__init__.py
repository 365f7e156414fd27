"""Which samplers and guidance rules reach an exactly known tilted distribution?

``joint.py``, ``tilt.py`` and ``schedules.py`` define the problem, ``problem.py`` holds it together. ``sampler.py`` has
the abstract class of samplers; ``samplers.py``, ``annealed.py``, ``predictors.py`` and ``twisted_smc.py`` are shipped
ones, ``shipped.py`` their short names, ``model.py`` and ``energy.py`` what they know of the untilted distribution.
``diagnostics.py`` and ``closed_form_checks.py`` compare samples with closed forms and judge them, ``action_density.py``
has the exact densities of Metropolis-Hastings chains, ``evaluation.py`` runs it all.
``module.py`` and ``learned.py`` are the LightningModules.
"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.mirror_descent.data import LinearGaussian
    from lightning_toys.mirror_descent.guidance import GuidanceRule, action_gradient
    from lightning_toys.mirror_descent.joint import Gaussian, NoiseLevel
    from lightning_toys.mirror_descent.learned import LearnedSampling
    from lightning_toys.mirror_descent.module import TiltedSampling
    from lightning_toys.mirror_descent.predictors import Predictor
    from lightning_toys.mirror_descent.problem import Cost, Problem, Settings
    from lightning_toys.mirror_descent.sampler import Draws, Sampler, refresh, sample_prior
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
    "Cost",
    "Draws",
    "Gaussian",
    "GuidanceRule",
    "LateConstant",
    "LateRamp",
    "LearnedSampling",
    "Linear",
    "LinearGaussian",
    "NoiseLevel",
    "Predictor",
    "Problem",
    "Quadratic",
    "Reward",
    "Sampler",
    "Schedule",
    "Settings",
    "SigmaPower",
    "StateReward",
    "TFGPlusFinalMALA",
    "TiltedSampling",
    "action_gradient",
    "refresh",
    "sample_prior",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "data": ["LinearGaussian"],
        "learned": ["LearnedSampling"],
        "module": ["TiltedSampling"],
        "predictors": ["Predictor"],
        "problem": ["Settings"],
        "schedules": ["Constant", "LateConstant", "LateRamp", "Linear", "SigmaPower", "TFGPlusFinalMALA"],
        "tilt": ["ActionValue", "StateReward"],
    },
    {
        "guidance": ["GuidanceRule", "action_gradient"],
        "joint": ["Gaussian", "NoiseLevel"],
        "problem": ["Cost", "Problem"],
        "sampler": ["Draws", "Sampler", "refresh", "sample_prior"],
        "schedules": ["Schedule"],
        "tilt": ["Quadratic", "Reward"],
    },
)
