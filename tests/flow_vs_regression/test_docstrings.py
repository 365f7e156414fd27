"""The examples in the docstrings."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from lightning_toys.flow_vs_regression import baselines, data, metrics, module, targets


@pytest.mark.parametrize(
    "tested", [baselines, data, metrics, module, targets], ids=lambda m: m.__name__.rpartition(".")[2]
)
def test_examples(tested: ModuleType) -> None:
    failed, attempted = doctest.testmod(tested)
    assert attempted > 0
    assert failed == 0
