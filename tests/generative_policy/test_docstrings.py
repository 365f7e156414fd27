"""The examples in the docstrings."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from lightning_toys.generative_policy import (
    bandit,
    bandit_policy,
    couplings,
    figures,
    gaussian,
    meanflow,
    meanflow_policy,
    metrics,
    mixture,
)


@pytest.mark.parametrize(
    "module",
    [bandit, bandit_policy, couplings, figures, gaussian, meanflow, meanflow_policy, metrics, mixture],
    ids=lambda m: m.__name__.rpartition(".")[2],
)
def test_examples(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
