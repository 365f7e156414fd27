"""Reflow, the second rectified flow: a flow trained on the pairs that a first flow makes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_toys.errors import require
from lightning_toys.flow_vs_regression.module import FlowVsRegression
from lightning_toys.flow_vs_regression.objectives import Flow
from lightning_toys.flows import Solver, check_nfe, integrate
from lightning_toys.nets import ConditionalNet


class Reflow(Flow):
    """2-rectified flow (Liu et al. 2022, arXiv 2209.03003): flow matching between x0 and where a teacher carries it.

    Each replica learns from the teacher's replica of the same place; pairs are made anew in each step.

    Args:
        teacher: checkpoint of a run with ``--model.mode flow`` and as many seeds.
        solver: that integrates the teacher.
        nfe: its number of network evaluations.

    Raises:
        ToyError: there is no such file, or ``nfe`` cannot be spent.
    """

    def __init__(self, teacher: str, solver: Solver = "rk4", nfe: int = 64):
        flag = "--model.objective.teacher"
        check_nfe(solver, nfe, "--model.objective.nfe")
        require(Path(teacher).is_file(), f"{flag}: {teacher!r} is no file; give the checkpoint of a flow")
        self.teacher, self.solver, self.steps = teacher, solver, nfe
        self.net: ConditionalNet | None = None

    def loaded(self, like: Tensor) -> ConditionalNet:
        """Return the teacher's network where a tensor (R, B, D) is.

        Raises:
            ToyError: it has another number of replicas, or is no flow.
        """
        if self.net is None:
            module = FlowVsRegression.load_from_checkpoint(self.teacher, weights_only=True)
            flag = "--model.objective.teacher"
            require(isinstance(module.objective, Flow), f"{flag}: {self.teacher} was trained as {module.mode}, no flow")
            require(
                len(module.seeds) == len(like),
                f"{flag}: {self.teacher} has {len(module.seeds)} replicas, this run {len(like)}; give as many seeds",
            )
            net = module.ema_net if module.ema_net is not None else module.net
            assert isinstance(net, ConditionalNet)
            self.net = net.to(like).requires_grad_(False)
        return self.net

    def end_of(self, x0: Tensor, c: Tensor) -> Tensor:
        """Return where the teacher carries x0, (R, B, D)."""
        net = self.loaded(x0)
        with torch.no_grad():
            out: Tensor = integrate(
                lambda t, x: net(x, c, torch.as_tensor(t).to(x).expand(*x.shape[:-1], 1)), x0, self.solver, self.steps
            )
        return out

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`; of the target's own x1 nothing is used."""
        return super().residuals(net, c, self.end_of(x0, c), x0, t)
