"""Which policies can act in many ways at once, and in one step?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.generative_policy.actors import Actor
    from lightning_toys.generative_policy.bandit import sample_softmax, turns_to_states
    from lightning_toys.generative_policy.bandit_data import BanditData
    from lightning_toys.generative_policy.bandit_policy import BanditPolicy
    from lightning_toys.generative_policy.couplings import Coupling, Independent, OptimalTransport
    from lightning_toys.generative_policy.data import MixtureData
    from lightning_toys.generative_policy.gaussian_policy import GaussianPolicy
    from lightning_toys.generative_policy.meanflow_policy import FlowPolicy, MeanFlowPolicy
    from lightning_toys.generative_policy.mixture import (
        Checkerboard,
        EightGaussians,
        Mixture,
        ThreeModes,
        TwoMoons,
    )
    from lightning_toys.generative_policy.multigoal_data import MultiGoalData
    from lightning_toys.generative_policy.multigoal_policy import MultiGoalPolicy
    from lightning_toys.generative_policy.offline import OfflineActions
    from lightning_toys.generative_policy.plain_policy import PlainPolicy
    from lightning_toys.generative_policy.policy import Evaluation, GenerativePolicy
    from lightning_toys.generative_policy.samplers import AnnealedMala, ImportanceResampling, Particles, Sampler
    from lightning_toys.generative_policy.target import Target

__all__ = [
    "Actor",
    "AnnealedMala",
    "BanditData",
    "BanditPolicy",
    "Checkerboard",
    "Coupling",
    "EightGaussians",
    "Evaluation",
    "FlowPolicy",
    "GaussianPolicy",
    "GenerativePolicy",
    "ImportanceResampling",
    "Independent",
    "MeanFlowPolicy",
    "Mixture",
    "MixtureData",
    "MultiGoalData",
    "MultiGoalPolicy",
    "OfflineActions",
    "OptimalTransport",
    "Particles",
    "PlainPolicy",
    "Sampler",
    "Target",
    "ThreeModes",
    "TwoMoons",
    "sample_softmax",
    "turns_to_states",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "bandit_data": ["BanditData"],
        "bandit_policy": ["BanditPolicy"],
        "couplings": ["Independent", "OptimalTransport"],
        "data": ["MixtureData"],
        "gaussian_policy": ["GaussianPolicy"],
        "meanflow_policy": ["FlowPolicy", "MeanFlowPolicy"],
        "mixture": ["Checkerboard", "EightGaussians", "Mixture", "ThreeModes", "TwoMoons"],
        "multigoal_data": ["MultiGoalData"],
        "multigoal_policy": ["MultiGoalPolicy"],
        "offline": ["OfflineActions"],
        "samplers": ["AnnealedMala", "ImportanceResampling"],
    },
    {
        "actors": ["Actor"],
        "bandit": ["sample_softmax", "turns_to_states"],
        "couplings": ["Coupling"],
        "plain_policy": ["PlainPolicy"],
        "policy": ["Evaluation", "GenerativePolicy"],
        "samplers": ["Particles", "Sampler"],
        "target": ["Target"],
    },
)
