"""The 95 % interval of a step's change covers where its prompts are few and come several times."""

from __future__ import annotations

import torch
from scipy import stats

from lightning_toys.update_entropy.estimators import clustered_standard_errors
from lightning_toys.update_entropy.step_prediction import within_interval

REPLICATES, PROMPTS, EACH = 4000, 5, 12


def test_five_prompts_that_repeat_are_covered() -> None:
    """Of draws with variance between prompts and within them; 1.96 standard errors cover far less."""
    g = torch.Generator().manual_seed(0)
    index = torch.arange(PROMPTS * EACH) % PROMPTS
    between = torch.randn(PROMPTS, REPLICATES, generator=g, dtype=torch.float64)
    draws = between[index] + 2 * torch.randn(len(index), REPLICATES, generator=g, dtype=torch.float64)
    mean = draws.mean(0)
    errors, clusters = clustered_standard_errors((draws - mean) / len(index), index)
    assert clusters == PROMPTS
    zero = [0.0] * REPLICATES
    found = {"predicted": mean.tolist(), "predicted_se": errors.tolist(), "measured": zero, "measured_se": zero}
    covered = sum(within_interval(found, [PROMPTS] * REPLICATES)) / REPLICATES
    normal = sum(within_interval(found, [10**6] * REPLICATES)) / REPLICATES
    low, high = stats.binom.interval(0.9999, REPLICATES, 0.95)
    assert low <= REPLICATES * covered <= high
    assert normal < 0.9  # what 1.96 standard errors cover
    assert within_interval(found, [1] * REPLICATES) == [False] * REPLICATES
