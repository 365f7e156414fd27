"""What does one AdamW step do to a policy's entropy?"""

from lightning_toys.update_entropy.callback import UpdateEntropyCallback
from lightning_toys.update_entropy.data import ArithmeticData
from lightning_toys.update_entropy.module import UpdateEntropy
from lightning_toys.update_entropy.policy import TinyPolicy
from lightning_toys.update_entropy.probe import Plan
from lightning_toys.update_entropy.training import Rollouts
from lightning_toys.update_entropy.word_problems import WordProblemData

__all__ = [
    "ArithmeticData",
    "Plan",
    "Rollouts",
    "TinyPolicy",
    "UpdateEntropy",
    "UpdateEntropyCallback",
    "WordProblemData",
]
