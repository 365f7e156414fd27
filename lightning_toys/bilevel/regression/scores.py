"""What a run over the stream is worth, of the records of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_toys.bilevel.regression.drift import WindowLoss
from lightning_toys.bilevel.regression.metrics import (
    effective_lags,
    largest_lags,
    local_regret,
    mean_of_last_sixth,
    normalised,
    rolling_mean,
)
from lightning_toys.training.results import Report

REGRET_WINDOW = 10  # recorded hypergradients that the local regret averages over
ROLLING_STEPS = 30  # of the rolling outer loss
CURVE_POINTS = 250  # of a curve in results.json


def score(seeds: Sequence[int], records: Mapping[str, Tensor], exact: WindowLoss, has_weights: bool) -> Report:
    """Return metrics, references and curves of R replicas.

    Args:
        seeds: one seed a replica.
        records: ``loss`` (T, R) of every step; ``lambda`` and ``slope`` (T', R, W), the weights and L dF_t / dlambda,
            at every so many; ``residual`` (T, R) of those by ``aid``.
        exact: the loss of weights, were the inner problem solved exactly.
        has_weights: whether the fit depends on lambda.
    """
    loss = records["loss"]
    late, regret = mean_of_last_sixth(records["lambda"]), local_regret(records["slope"], REGRET_WINDOW)
    metrics = {"outer_loss": mean_of_last_sixth(loss), "outer_loss_all": loss.mean(0)}
    if has_weights:
        metrics["exact_loss"] = torch.from_numpy(exact.loss(late.numpy()))
        metrics |= {"local_regret": mean_of_last_sixth(regret), "local_regret_all": regret.mean(0)}
        metrics["effective_lags"] = effective_lags(late)
    if "residual" in records:
        metrics["cg_residual"] = mean_of_last_sixth(records["residual"])
    # of the weights, and not of a run: a network's outer loss is not what these would have
    references = {name: {"exact_loss": value} for name, value in exact.references().items()}
    kept = torch.linspace(0, len(loss) - 1, min(CURVE_POINTS, len(loss))).round().long()
    arrays = {
        "time": kept.tolist(),
        "outer_loss": rolling_mean(loss, ROLLING_STEPS)[kept].T.tolist(),
        "weights": normalised(late).mean(0).tolist(),
        "weights_by_seed": normalised(late).tolist(),
        "best_weights": exact.oracle().tolist(),
        # names, and no metrics: the mean of the largest weights' lags is the lag of nothing
        "largest_lags": largest_lags(late, 3).tolist(),
    }
    return Report(seeds, {k: v.tolist() for k, v in metrics.items()}, references, arrays)
