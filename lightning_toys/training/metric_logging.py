"""What a module of replicas writes down: every replica's value, the mean and its interval; and when it gives up."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from lightning_toys.errors import NonFiniteError, note
from lightning_toys.stats import geometric_ci, mean_ci, share_ci
from lightning_toys.training.ownership import check_owned
from lightning_toys.training.replica_parallel import ReplicaParallel
from lightning_toys.training.results import Report, part_of
from lightning_toys.training.scalar_rows import log_rows


class ReplicaLogging(ReplicaParallel):
    """Replicas whose metrics go to the loggers, and whose run stops where one of them is not finite.

    Attributes:
        monitors_loss: whether there is a training loss at every validation.
        error_metrics: metrics that are positive and different by factors: their intervals are of geometric means, and
            `compare` adds geometric means and ratios.
        positive_loss: whether the training loss is such a one too.
        interval_names: names of what was logged with its interval, in their order, and whether that is of the geometric
            mean.
        last_losses: each replica's loss at the last step.
        loaded_step: the step that the weights are of, by a checkpoint or by the last training that ended.
        run_path: the command line's folder of the run; None in a script.
    """

    monitors_loss: bool = True
    error_metrics: Sequence[str] = ()
    positive_loss: bool = False
    run_path: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        self.interval_names: dict[str, bool] = {}
        self.last_losses = torch.zeros(0)
        self.loaded_step = 0

    def write_scalars(
        self, metrics: dict[str, Tensor], step: int | None = None, shares: Mapping[str, float] | None = None
    ) -> None:
        """Write metrics (R,) to every logger: mean, 95 % interval, and each replica's value.

        The intervals of ``shares`` lie in [0, 1]: by name how many samples each value is of, as :class:`Report` says.

        This goes past ``self.log``: a call of that costs as much as a quarter of a training step, and its x-axis
        counts Trainer batches, not optimiser steps.
        """
        self.write_rows([(step or self.weights_step, metrics)], shares)

    def write_rows(
        self, rows: Sequence[tuple[int, dict[str, Tensor]]], shares: Mapping[str, float] | None = None
    ) -> None:
        """Write several steps' metrics as :meth:`write_scalars` writes one step's."""
        if not rows or not self.trainer.is_global_zero:
            return
        if self.run_path is not None:
            check_owned(self.run_path)  # before a logger's own thread appends what it is given
        found = [(step, self.scalars(metrics, shares)) for step, metrics in rows]
        for logger in self.trainer.loggers:
            log_rows(logger, found)

    def scalars(self, metrics: dict[str, Tensor], shares: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return metrics (R,) as a row of scalars, see :meth:`write_scalars`."""
        row: dict[str, float] = {}
        for name, values in metrics.items():
            v = values.detach().double().cpu().tolist()
            estimate = mean_ci(v)
            row[name] = estimate.mean
            if len(v) > 1:
                # groups of their own: TensorBoard's first cards are the means
                multiplies = self.multiplies(name)
                self.interval_names[name] = multiplies
                if multiplies:  # whose bands reach no 0; where a value is 0 after all, the arithmetic mean's
                    estimate = geometric_ci(v) or estimate
                    row[f"interval/{name}/geometric_mean"] = estimate.mean
                elif shares and name in shares:
                    estimate = share_ci(v, shares[name])
                row[f"interval/{name}/lo"], row[f"interval/{name}/hi"] = estimate.lo, estimate.hi
                row.update({f"replicas/{name}/seed_{s}": x for s, x in zip(self.seeds, v, strict=True)})
        return row

    def multiplies(self, name: str) -> bool:
        """Whether a scalar, such as ``eval/l2@zeros/euler-9``, is an error: positive, and different by factors."""
        metric = name.partition("/")[2].partition("@")[0]
        return metric in self.error_metrics or (metric == "loss" and self.positive_loss)

    def log_means(self, means: dict[str, float]) -> None:
        """Give the Trainer means that callbacks can monitor, and that ``trainer.validate`` and ``test`` return.

        They return what Lightning's loggers get, so in a script these get it from Lightning; the command line's loggers
        have it from :meth:`write_scalars`, with its interval.
        """
        returned = self.run_path is None and self.trainer.state.fn in ("validate", "test")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*but have no logger configured")  # they are returned all the same
            self.log_dict(means, logger=returned, batch_size=1, sync_dist=self.trainer.world_size > 1)

    @property
    def keeps_files(self) -> bool:
        """Whether a run's own files are wanted: on the command line, and in a script whose Trainer has a logger."""
        return self.run_path is not None or bool(self.trainer.loggers)

    def tell(self, text: str) -> None:
        """Print results on standard error, on the command line alone: a script reads ``last_report``."""
        if self.run_path is not None:
            note(text)

    @property
    def weights_step(self) -> int:
        """The optimiser step that the weights are of: trained to, or else loaded."""
        return self.global_step or self.loaded_step

    def write_evaluation(self, report: Report) -> None:
        """Write a validation's metrics as ``eval/...``; means under these names are what callbacks can monitor."""
        means = report.means("eval")
        if self.trainer.state.fn == "fit" and self.monitors_loss:
            means["train/loss"] = float(self.last_losses.mean())
        self.log_means(means)
        if not self.trainer.sanity_checking:
            shown = {k: torch.tensor(v) for k, v in report.metrics.items() if part_of(k) != "dim"}
            # a group of their own: TensorBoard's first cards are those of the whole distribution
            tags = {k: f"{'modes' if part_of(k) else 'eval'}/{k}" for k in shown}
            shares = {tags[k]: n for k, n in report.shares.items() if k in tags}
            self.write_scalars({tags[k]: v for k, v in shown.items()}, shares=shares)

    def refuse_non_finite(self, what: str, bad: Tensor, step: int) -> NoReturn:
        """Stop the run, naming the replicas where ``bad`` (R,) is true."""
        who = [s for s, b in zip(self.seeds, bad.tolist(), strict=True) if b]
        raise NonFiniteError(f"the {what} not finite at step {step} in the replicas of seeds {who}")
