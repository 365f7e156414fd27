"""Second derivatives twice forward, and the operations of torch that cannot be trusted with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from lightning_toys.update_entropy.derivatives import DecomposedOps

x, v, w = (torch.randn(5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3))
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda p: (F.layer_norm(p, (5,)) * w).sum(),
    "layer_norm, weights that move": lambda p: (F.layer_norm(p**2, (5,), p, p.sin()) * w).sum(),
    "rms_norm": lambda p: (F.rms_norm(p, (5,), p.cos(), 1e-6) * w).sum(),
    "silu": lambda p: (F.silu(p) * w).sum(),
    "gelu": lambda p: (F.gelu(p) * w).sum(),
    "log_softmax": lambda p: (torch.log_softmax(p, -1) * w).sum(),
    "softmax": lambda p: (torch.softmax(p, -1) * w).sum(),
    "linear": lambda p: (F.linear(p[None], torch.outer(p, p), p) * w).sum(),
}


def twice(f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    first, second = jvp(lambda p: jvp(f, (p,), (v,))[1], (x,), (v,))
    return float(first), float(second)


def differences(f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    e = 1e-4
    up, here, down = f(x + e * v), f(x), f(x - e * v)
    return float((up - down) / (2 * e)), float((up - 2 * here + down) / e**2)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_twice_forward_is_the_second_difference(name: str) -> None:
    f = OPERATIONS[name]
    with DecomposedOps():
        first, second = twice(f)
    wanted = differences(f)
    assert first == pytest.approx(wanted[0], rel=1e-6)
    assert second == pytest.approx(wanted[1], rel=1e-5)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "silu"])
def test_decomposed_operations_have_torchs_values(name: str) -> None:
    with DecomposedOps():
        ours = OPERATIONS[name](x)
    assert float(ours) == pytest.approx(float(OPERATIONS[name](x)), rel=1e-12)


def test_torchs_own_layer_norm_is_still_wrong_there() -> None:
    """When this fails, torch has mended it, and DecomposedOps may go."""
    f = OPERATIONS["layer_norm"]
    assert twice(f)[0] == pytest.approx(differences(f)[0], rel=1e-6)
    assert twice(f)[1] != pytest.approx(differences(f)[1], rel=0.01)
