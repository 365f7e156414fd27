"""Reflow, the second rectified flow: a flow trained on the pairs that a first flow makes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_toys.errors import ToyError, check_settings, require
from lightning_toys.flow_vs_regression.module import FlowVsRegression
from lightning_toys.flow_vs_regression.objectives import Flow
from lightning_toys.flows import Solver, check_nfe, integrate
from lightning_toys.nets import ConditionalNet
from lightning_toys.training.own_classes import attempt

FLAG = "--model.objective.teacher"


class Reflow(Flow):
    """2-rectified flow (Liu et al. 2022, arXiv 2209.03003): flow matching between x0 and where a teacher carries it.

    Each replica learns from the teacher's replica of the same place; pairs are made anew in each step.

    Args:
        teacher: checkpoint of a run with ``--model.mode flow``, on the same data and with as many seeds.
        solver: that integrates the teacher.
        nfe: its number of network evaluations.

    Raises:
        ToyError: there is no such file, or ``nfe`` cannot be spent.
    """

    def __init__(self, teacher: str, solver: Solver = "rk4", nfe: int = 64):
        check_settings(Reflow, locals(), "--model.objective.")
        check_nfe(solver, nfe, "--model.objective.nfe")
        require(Path(teacher).is_file(), f"{FLAG}: {teacher!r} is no file; give the checkpoint of a flow")
        self.teacher, self.solver, self.steps = teacher, solver, nfe
        self.net: ConditionalNet | None = None
        self.sizes: tuple[int, int] | None = None  # of c and x in the network that was read

    def loaded(self) -> ConditionalNet:
        """Return the teacher's network, read once.

        Raises:
            ToyError: the file holds no flow that can be read without classes of somebody's own.
        """
        if self.net is None:
            read = partial(FlowVsRegression.load_from_checkpoint, self.teacher, weights_only=True, map_location="cpu")
            try:
                module = attempt(f"{FLAG}: reading {self.teacher}", read)
            except ToyError as error:
                known = str(error).startswith(FLAG)
                raise ToyError(str(error) if known else f"{FLAG}: {self.teacher} cannot be read: {error}") from None
            require(isinstance(module.objective, Flow), f"{FLAG}: {self.teacher} was trained as {module.mode}, no flow")
            net = module.ema_net if module.ema_net is not None else module.net
            assert isinstance(net, ConditionalNet)
            self.net, self.sizes = net.requires_grad_(False), (module.condition_dim, module.sizes["dim"])
        return self.net

    def of_replicas(self, replicas: Sequence[int], count: int) -> Reflow:
        """See :meth:`Objective.of_replicas`: with those replicas of the teacher.

        Raises:
            ToyError: the teacher has another number of replicas than the run.
        """
        net = self.loaded()
        held = len(next(net.parameters()))
        require(held == count, f"{FLAG}: {self.teacher} has {held} replicas, this run {count}; give as many seeds")
        part = copy.copy(self)
        part.net = copy.deepcopy(net)
        for p in part.net.parameters():
            p.data = p.data[list(replicas)]
        return part

    def end_of(self, x0: Tensor, c: Tensor) -> Tensor:
        """Return where the teacher carries x0, (R, B, D)."""
        net = self.loaded()
        if self.sizes is not None:  # a network that was read
            given = (c.shape[-1], x0.shape[-1])
            require(
                given == self.sizes,
                f"{FLAG}: {self.teacher} maps {self.sizes[0]} inputs to {self.sizes[1]} "
                f"outputs, these data {given[0]} to {given[1]}",
            )
        net = net.to(x0)  # a Trainer may have moved on to another device or precision
        with torch.no_grad():
            out: Tensor = integrate(
                lambda t, x: net(x, c, torch.as_tensor(t).to(x).expand(*x.shape[:-1], 1)), x0, self.solver, self.steps
            )
        return out

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        """See :meth:`Objective.residuals`; of the target's own x1 nothing is used."""
        return super().residuals(net, c, self.end_of(x0, c), x0, t)
