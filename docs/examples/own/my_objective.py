"""An objective with a path and readouts of its own: the network predicts the end x1 along a cosine path.

lightning-toys fit -c flow_vs_regression/flow --model.objective my_objective.XPrediction
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_toys.flow_vs_regression import Objective, Readout
from lightning_toys.flows import Solver
from lightning_toys.nets import ConditionalNet


class XPrediction(Objective):
    """l(f(x_t, c, t), x1) on x_t = cos(pi t / 2) x0 + sin(pi t / 2) x1.

    Read out by DDIM's steps: the noise that belongs to a predicted x1, e = (x - sin(a) f) / cos(a), is kept, and x
    moves to the next time on the path between both.

    Args:
        t_max: the last time that training draws; the prediction there is taken for x1.
    """

    with_time = True  # the network is called with t
    samples_time = True  # residuals use t

    def __init__(self, t_max: float = 0.98) -> None:
        self.t_max = t_max

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """Return the loss's one term, (R, B, D)."""
        a = self.t_max * t * math.pi / 2
        return [net(a.cos() * x0 + a.sin() * x1, c, self.t_max * t) - x1]

    def readout(self, solver: Solver, nfe: int) -> Readout:
        """Return a readout of ``nfe`` steps; there is no solver to choose."""

        def sample(net: ConditionalNet, c: Tensor, x0: Tensor) -> Tensor:
            x, f = x0, torch.zeros_like(x0)
            for i in range(nfe):
                t, after = self.t_max * i / nfe, self.t_max * (i + 1) / nfe
                f = net(x, c, torch.full_like(x[..., :1], t))
                e = (x - math.sin(t * math.pi / 2) * f) / math.cos(t * math.pi / 2)
                x = math.cos(after * math.pi / 2) * e + math.sin(after * math.pi / 2) * f
            return f

        return Readout(f"ddim-{nfe}", sample)

    def readouts(self, solvers: Sequence[Solver], nfes: Sequence[int]) -> list[Readout]:
        """Return what `test` compares."""
        return [self.readout("euler", n) for n in nfes]
