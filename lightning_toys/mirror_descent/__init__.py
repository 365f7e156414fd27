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
    from lightning_toys.mirror_descent.best_of_n import BestOfN
    from lightning_toys.mirror_descent.data import LinearGaussian
    from lightning_toys.mirror_descent.feynman_kac_correctors import FeynmanKacCorrectors
    from lightning_toys.mirror_descent.guidance import GuidanceRule, action_gradient
    from lightning_toys.mirror_descent.joint import Gaussian, NoiseLevel
    from lightning_toys.mirror_descent.learned import LearnedSampling
    from lightning_toys.mirror_descent.mixture import GaussianMixtureJoint, Mixture
    from lightning_toys.mirror_descent.mixture_data import GaussianMixture
    from lightning_toys.mirror_descent.mixture_model import MixtureModel
    from lightning_toys.mirror_descent.mixture_sampling import MixtureSampling
    from lightning_toys.mirror_descent.model import refresh, sample_prior
    from lightning_toys.mirror_descent.module import TiltedSampling
    from lightning_toys.mirror_descent.predictors import Predictor
    from lightning_toys.mirror_descent.problem import Cost, Problem, Settings
    from lightning_toys.mirror_descent.resampling import Multinomial, Resampling, Residual, Systematic
    from lightning_toys.mirror_descent.rewards import QuadraticReward, Quartic, Step
    from lightning_toys.mirror_descent.sampler import Draws, Sampler
    from lightning_toys.mirror_descent.schedules import (
        Constant,
        LateConstant,
        LateRamp,
        Linear,
        Schedule,
        SigmaPower,
        TFGPlusFinalMALA,
    )
    from lightning_toys.mirror_descent.soft_value import SoftValue
    from lightning_toys.mirror_descent.steering import SVDD, Difference, FKSteering, Max, Potential, Sum
    from lightning_toys.mirror_descent.tempered_smc import TemperedSMC
    from lightning_toys.mirror_descent.tilt import ActionValue, Quadratic, QuadraticForm, Reward, StateReward
    from lightning_toys.mirror_descent.twisted_smc import TwistedSMC

__all__ = [
    "SVDD",
    "ActionValue",
    "BestOfN",
    "Constant",
    "Cost",
    "Difference",
    "Draws",
    "FKSteering",
    "FeynmanKacCorrectors",
    "Gaussian",
    "GaussianMixture",
    "GaussianMixtureJoint",
    "GuidanceRule",
    "LateConstant",
    "LateRamp",
    "LearnedSampling",
    "Linear",
    "LinearGaussian",
    "Max",
    "Mixture",
    "MixtureModel",
    "MixtureSampling",
    "Multinomial",
    "NoiseLevel",
    "Potential",
    "Predictor",
    "Problem",
    "Quadratic",
    "QuadraticForm",
    "QuadraticReward",
    "Quartic",
    "Resampling",
    "Residual",
    "Reward",
    "Sampler",
    "Schedule",
    "Settings",
    "SigmaPower",
    "SoftValue",
    "StateReward",
    "Step",
    "Sum",
    "Systematic",
    "TFGPlusFinalMALA",
    "TemperedSMC",
    "TiltedSampling",
    "TwistedSMC",
    "action_gradient",
    "refresh",
    "sample_prior",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "best_of_n": ["BestOfN"],
        "data": ["LinearGaussian"],
        "feynman_kac_correctors": ["FeynmanKacCorrectors"],
        "learned": ["LearnedSampling"],
        "mixture_data": ["GaussianMixture"],
        "module": ["TiltedSampling"],
        "predictors": ["Predictor"],
        "problem": ["Settings"],
        "resampling": ["Multinomial", "Residual", "Systematic"],
        "rewards": ["QuadraticReward", "Quartic", "Step"],
        "schedules": ["Constant", "LateConstant", "LateRamp", "Linear", "SigmaPower", "TFGPlusFinalMALA"],
        "soft_value": ["SoftValue"],
        "steering": ["SVDD", "Difference", "FKSteering", "Max", "Sum"],
        "tempered_smc": ["TemperedSMC"],
        "tilt": ["ActionValue", "StateReward"],
        "twisted_smc": ["TwistedSMC"],
        "mixture_sampling": ["MixtureSampling"],
    },
    {
        "guidance": ["GuidanceRule", "action_gradient"],
        "joint": ["Gaussian", "NoiseLevel"],
        "mixture": ["GaussianMixtureJoint", "Mixture"],
        "mixture_model": ["MixtureModel"],
        "model": ["refresh", "sample_prior"],
        "problem": ["Cost", "Problem"],
        "resampling": ["Resampling"],
        "sampler": ["Draws", "Sampler"],
        "schedules": ["Schedule"],
        "steering": ["Potential"],
        "tilt": ["Quadratic", "QuadraticForm", "Reward"],
    },
)
