"""Optimal transport on a GPU: the assignments are scipy's, and training sees what the host would have paired.

Without a GPU the kernel can run in Triton's interpreter: ``pip install triton``, then ``TRITON_INTERPRET=1 pytest``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import Runner
from scipy.optimize import linear_sum_assignment

from lightning_toys.generative_policy.couplings import Independent, OptimalTransport
from lightning_toys.generative_policy.data import Pairs
from lightning_toys.generative_policy.mixture import ThreeModes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
runs = pytest.mark.skipif(
    not GPU and (os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None),
    reason="no GPU, and no interpreter asked for",
)


def pairs(n: int, problems: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, e = Pairs(ThreeModes(), Independent(), range(problems), n)(0, 1)
    return x[:, 0].to(DEVICE), e[:, 0].to(DEVICE)


def total(x: torch.Tensor, e: torch.Tensor, columns: np.ndarray) -> np.ndarray:
    """Sum of x . e of each problem's pairs, in double precision."""
    a, b = (t.cpu().double().numpy() for t in (x, e))
    out: np.ndarray = (a * np.take_along_axis(b, columns[..., None], 1)).sum((1, 2))
    return out


def scipys(x: torch.Tensor, e: torch.Tensor) -> np.ndarray:
    """scipy's columns (problems, n), of costs in double precision."""
    a, b = (t.cpu().double().numpy() for t in (x, e))
    return np.stack([linear_sum_assignment(p @ q.T, maximize=True)[1] for p, q in zip(a, b, strict=True)])


@runs
@pytest.mark.parametrize("n", [2, 3, 16, 33, 64, *([100, 256] if GPU else [])])
def test_the_assignments_are_scipys(n: int) -> None:
    from lightning_toys.generative_policy.assignment import assign

    x, e = pairs(n, 200 if GPU else 3)
    found = assign(x, e)
    assert np.array_equal(found.cpu().numpy(), scipys(x, e))
    assert torch.equal(assign(x[None], e[None])[0], found)
    assert assign(x[:0], e[:0]).shape == (0, n)
    with pytest.raises(ValueError, match="not finite"):
        assign(x, e / 0)
    # one pair moved is worse, so that the totals below can fail
    shifted = found[:, torch.tensor([1, 0, *range(2, n)])].cpu().numpy()
    assert (total(x, e, shifted) < total(x, e, scipys(x, e))).all()


@runs
def test_ties_and_scales() -> None:
    """Many assignments are the best ones then: a permutation, as good as scipy's."""
    from lightning_toys.generative_policy.assignment import assign

    x, e = pairs(16, 200 if GPU else 3)
    nothing = torch.zeros_like(x)
    for a, b in ((nothing, e), (nothing, nothing), (1e6 * x, 1e-3 * e), (x.round(), e.round()), (1e-20 * x, e)):
        columns = assign(a, b).cpu().numpy()
        assert (np.sort(columns) == np.arange(16)).all()
        wanted = total(a, b, scipys(a, b))
        np.testing.assert_allclose(total(a, b, columns), wanted, rtol=1e-9, atol=0)


def test_training_sees_the_hosts_pairs(
    policies: Runner, bitwise: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whoever draws; the stand-in solves on the host what a GPU would be given."""
    flags = ("--model.seeds", "[4,1]", "--trainer.max_steps", "60", "--trainer.accelerator", "cpu")
    policies.ok("fit", "meanflow", *flags, "--run.name", "host")
    given: list[torch.Size] = []

    def pair_there(self: OptimalTransport, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        given.append(x.shape)
        pairs = [self.pair(x[i].numpy(), e[i].numpy()) for i in np.ndindex(x.shape[:-2])]
        return torch.from_numpy(np.stack(pairs)).view(e.shape)

    monkeypatch.setattr(OptimalTransport, "pairs_on", lambda self, device: device.type == "cpu")
    monkeypatch.setattr(OptimalTransport, "pair_there", pair_there)
    for name, workers in (("there", "0"), ("workers", "2")):
        policies.ok("fit", "meanflow", *flags, "--run.name", name, "--data.num_workers", workers)
        assert given == [torch.Size((2, 50, 256, 2)), torch.Size((2, 10, 256, 2))]
        given.clear()
        for key in ("state_dict", "optimizer_states"):
            bitwise(policies.checkpoint("meanflow", "host")[key], policies.checkpoint("meanflow", name)[key], key)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_training_on_a_gpu(policies: Runner, bitwise: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairs made there or on the host: the same weights, bit for bit."""
    flags = ("--model.seeds", "[4,1]", "--trainer.max_steps", "60", "--trainer.accelerator", "gpu")
    policies.ok("fit", "meanflow", *flags, "--run.name", "there")
    monkeypatch.setattr(OptimalTransport, "pairs_on", lambda self, device: False)
    policies.ok("fit", "meanflow", *flags, "--run.name", "host")
    one, two = (policies.checkpoint("meanflow", name)["state_dict"] for name in ("there", "host"))
    bitwise(one, two, "state_dict")


def test_where_pairs_are_made() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not OptimalTransport().pairs_on(cpu)
    assert OptimalTransport().pairs_on(gpu) == (find_spec("triton") is not None)
    assert not Independent().pairs_on(gpu)
