"""How predictions are read out of a trained network, and what `test` compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_toys.errors import bounded, check_settings, require
from lightning_toys.flow_vs_regression.objectives import Objective, X0Distribution
from lightning_toys.flows import EVALUATIONS_PER_STEP, Solver, check_nfe


@dataclass
class Evaluation:
    """How predictions are made and evaluated.

    ``l1`` and ``l2`` are those of ``solver``, ``nfe`` and ``x0``; `test` evaluates ``test_solvers``, ``test_nfe`` and
    ``test_x0`` too.

    Args:
        solver: ODE solver of flow.
        nfe: network evaluations of flow and straight_flow.
        x0: where a prediction starts: zeros, or ``draws`` Gaussian draws (the same for every mode and metric).
        draws: Gaussian draws per point; validation within `fit` takes at most 8.
        weights: ``raw``, ``ema`` (needs ``ema_decay``), or ``best`` on held-out training points (needs
            ``data.holdout``).
        test_solvers: solvers that `test` evaluates.
        test_nfe: numbers of network evaluations that `test` evaluates.
        test_x0: starts that `test` evaluates.

    Raises:
        ToyError: a value is not allowed.
    """

    solver: Solver = "euler"
    nfe: int = 1
    x0: X0Distribution = "zeros"
    draws: int = 16
    weights: Literal["raw", "ema", "best"] = "raw"
    test_solvers: list[Solver] = field(default_factory=lambda: ["euler", "midpoint", "rk4", "dopri5"])
    test_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 9])
    test_x0: list[X0Distribution] = field(default_factory=lambda: ["zeros", "gaussian"])

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "--model.evaluation.")
        check_nfe(self.solver, self.nfe)
        bounded("--model.evaluation.draws", self.draws, 1)
        for n in self.test_nfe:
            check_nfe("euler", n, "--model.evaluation.test_nfe")

    def check_test_readouts(self, objective: Objective) -> None:
        """Refuse solvers and numbers of evaluations of which no solver can spend any: `test` would score nothing.

        Raises:
            ToyError: names both flags.
        """
        asked = self.test_solvers and self.test_nfe
        scored = not asked or objective.readouts(self.test_solvers, self.test_nfe)
        each = ", ".join(f"{s} takes multiples of {EVALUATIONS_PER_STEP.get(s, 1)}" for s in self.test_solvers)
        require(
            bool(scored),
            f"--model.evaluation.test_nfe: {self.test_nfe} is not allowed with --model.evaluation.test_solvers "
            f"{self.test_solvers}, which spend none of it: {each}",
        )
