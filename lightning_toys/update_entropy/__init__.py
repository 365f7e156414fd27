"""What does one AdamW step do to a policy's entropy?"""

from typing import TYPE_CHECKING

from lightning_toys.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_toys.update_entropy.callback import UpdateEntropyCallback
    from lightning_toys.update_entropy.data import ArithmeticData, TextData
    from lightning_toys.update_entropy.losses import PolicyLoss
    from lightning_toys.update_entropy.module import UpdateEntropy
    from lightning_toys.update_entropy.plan import Plan
    from lightning_toys.update_entropy.policy import TinyPolicy
    from lightning_toys.update_entropy.prompt_data import PromptData
    from lightning_toys.update_entropy.rollout_data import RolloutData
    from lightning_toys.update_entropy.task import CharacterTokenizer, Problem, Task
    from lightning_toys.update_entropy.training import Rollouts
    from lightning_toys.update_entropy.word_problems import WordProblemData

__all__ = [
    "ArithmeticData",
    "CharacterTokenizer",
    "Plan",
    "PolicyLoss",
    "Problem",
    "PromptData",
    "RolloutData",
    "Rollouts",
    "Task",
    "TextData",
    "TinyPolicy",
    "UpdateEntropy",
    "UpdateEntropyCallback",
    "WordProblemData",
]

__getattr__, __dir__, PLACES = lazy_exports(
    __name__,
    {
        "callback": ["UpdateEntropyCallback"],
        "data": ["ArithmeticData"],
        "module": ["UpdateEntropy"],
        "policy": ["TinyPolicy"],
        "plan": ["Plan"],
        "prompt_data": ["PromptData"],
        "rollout_data": ["RolloutData"],
        "training": ["Rollouts"],
        "word_problems": ["WordProblemData"],
    },
    {"data": ["TextData"], "losses": ["PolicyLoss"], "task": ["CharacterTokenizer", "Problem", "Task"]},
)
