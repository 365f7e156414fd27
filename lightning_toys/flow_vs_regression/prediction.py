"""How FlowVsRegression predicts: from what start, by which readout, with which weights, in chunks of rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import bounded
from lightning_toys.flow_vs_regression.evaluation import Evaluation
from lightning_toys.flow_vs_regression.objectives import Objective, Readout, X0Distribution
from lightning_toys.flow_vs_regression.own import Architecture
from lightning_toys.flow_vs_regression.units import Units
from lightning_toys.nets import ConditionalNet, Network
from lightning_toys.training.inference import require_built, with_replica_axis
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import keyed_generator

CHUNK = 2**21  # activations of one layer that are evaluated at a time: 8 MiB, which stays in a CPU's cache
GPU_CHUNK = 2**27  # on a GPU, 512 MiB: each chunk reads all weights anew


class Predictor(ToyModule):
    """Predicts f(c) for R replicas; what it is trained on is a subclass's.

    Attributes:
        network: the network, or an architecture of one's own.
        objective: whose readouts there are.
        evaluation: which of them is taken, from what start and with which weights.
    """

    network: Network | Architecture
    objective: Objective
    evaluation: Evaluation

    @property
    def units(self) -> Units | None:
        """What the network's inputs and outputs are scaled by; None where they are not."""
        given = self.sizes.get("units")
        return None if given is None else Units(**given)

    @property
    def condition_dim(self) -> int:
        """The dimension of c; older checkpoints are of one."""
        return int(self.sizes.get("condition_dim", 1))

    @property
    def evaluation_net(self) -> ConditionalNet:
        """The weights that are evaluated."""
        net = {"raw": self.net, "ema": self.ema_net, "best": self.best_net}[self.evaluation.weights]
        assert isinstance(net, ConditionalNet)
        return net

    def sample_x0(self, distribution: X0Distribution, draws: int, points: int, dim: int) -> Tensor:
        """Return x0 (R, K, M, D), float32: K = 1 for zeros, K = ``draws`` keyed Gaussian draws otherwise."""
        if distribution == "zeros":
            return torch.zeros(len(self.seeds), 1, points, dim)
        shape = (draws, points, dim)
        rows = [keyed_generator(s, 0, "evaluation/x0").standard_normal(shape, np.float32) for s in self.seeds]
        return torch.from_numpy(np.stack(rows))

    def predictions(self, net: ConditionalNet, readout: Readout, c: Tensor, x0: Tensor) -> Tensor:
        """Return predictions (R, K, M, D) at c (R, M, C) from x0 (R, K, M, D), computed in chunks of rows.

        ``last_evaluations`` (R,) is left with the mean number of network evaluations of each replica's predictions,
        where the readout counts them.
        """
        like, units = next(net.parameters()), self.units
        R, K, M, D = x0.shape
        c = c if units is None else units.scaled_c(c)
        c_rows = c.to(like).unsqueeze(1).expand(R, K, M, -1).reshape(R, K * M, -1)
        x_rows = x0.to(like).reshape(R, K * M, D)
        size = max(
            1, (CHUNK if like.device.type == "cpu" else GPU_CHUNK) // (R * int(getattr(self.network, "hidden", 256)))
        )
        parts = list(zip(torch.split(c_rows, size, dim=1), torch.split(x_rows, size, dim=1), strict=True))
        self.last_evaluations: Tensor | None = None
        if readout.counted is None:
            out = [readout.sample(net, a, b) for a, b in parts]
        else:
            found = [readout.counted(net, a, b) for a, b in parts]
            out = [x for x, _ in found]
            self.last_evaluations = torch.cat([n for _, n in found], dim=1).mean(1).double().cpu()
        x = torch.cat(out, dim=1).reshape(R, K, M, D)
        return x if units is None else units.unscaled_x(x)

    def forward(self, c: Tensor) -> Tensor:
        """Predict f(c), one prediction per row and replica: c (M, C) or (R, M, C) to (R, M, D).

        The readout, the weights and the start x0 are those of ``evaluation``. From Gaussian x0 a prediction is one
        sample, the first of those of :meth:`predict`: not their mean, which is no sample of a flow. Differentiable in
        c; on the device and in the dtype of the weights.

        Raises:
            ToyError: there is no network yet, or c has another shape.
        """
        return self.predict_from(c, 1)[:, 0]

    @torch.no_grad()
    def predict(
        self, c: Tensor, draws: int | None = None, x0: X0Distribution | None = None, readout: Readout | None = None
    ) -> Tensor:
        """Predict f(c) from several draws of x0, without gradients: c (M, C) or (R, M, C) to (R, K, M, D).

        What is left out is that of ``evaluation``, so that ``predict(c)`` on the grid is what `predict` writes.

        Args:
            c: where to predict.
            draws: K for Gaussian x0, keyed by the replica's seed and the rows' order; from zeros there is one, K = 1.
            x0: ``zeros`` or ``gaussian``.
            readout: one of ``self.objective.readouts(solvers, nfes)``.

        Raises:
            ToyError: there is no network yet, c has another shape, or ``draws`` is below 1.
        """
        return self.predict_from(c, self.evaluation.draws if draws is None else draws, x0, readout)

    def predict_from(
        self, c: Tensor, draws: int, x0: X0Distribution | None = None, readout: Readout | None = None
    ) -> Tensor:
        """Return the predictions (R, K, M, D) of :meth:`predict`, with gradients."""
        require_built(self)
        bounded("draws", draws, 1)
        c = with_replica_axis(c, len(self.seeds), (self.condition_dim,), "c")
        start = self.sample_x0(x0 or self.evaluation.x0, draws, c.shape[1], self.sizes["dim"])
        return self.predictions(self.evaluation_net, readout or self.configured_readout, c, start)

    @property
    def configured_readout(self) -> Readout:
        """The readout of ``evaluation``, whose errors are ``l1`` and ``l2``."""
        return self.objective.readout(self.evaluation.solver, self.evaluation.nfe)
