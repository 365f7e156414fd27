"""A pruner of somebody's own."""

from __future__ import annotations

import optuna


class Early(optuna.pruners.BasePruner):
    """Stops what is worse than the median of the targets after the first validation."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        first = min(trial.intermediate_values.values())
        return bool(first > 0.9)
