"""Optimal transport on a GPU: the assignments are scipy's, and training sees what the host would have paired.

Without a GPU the kernel runs on numpy (lanes.py), or in Triton's interpreter: ``pip install triton``, then
``TRITON_INTERPRET=1 pytest``.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from lightning_toys.generative_policy import couplings
from lightning_toys.generative_policy.couplings import Independent, OptimalTransport
from lightning_toys.generative_policy.data import Pairs
from lightning_toys.generative_policy.mixture import ThreeModes
from tests import lanes
from tests.conftest import Runner

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
KERNEL = "lightning_toys.generative_policy.assignment"
Assign = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture
def assign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Assign]:
    if GPU or INTERPRETED:
        yield importlib.import_module(KERNEL).assign
        return
    monkeypatch.setitem(sys.modules, "triton", lanes.triton)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "triton.language", lanes.language)  # type: ignore[arg-type]
    yield importlib.import_module(KERNEL).assign
    del sys.modules[KERNEL]


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


@pytest.mark.parametrize("n", [2, 3, 16, 33, 64, *([100, 256] if GPU else [])])
def test_the_assignments_are_scipys(n: int, assign: Assign) -> None:
    x, e = pairs(n, 200 if GPU else 3)
    found = assign(x, e)
    assert np.array_equal(found.cpu().numpy(), scipys(x, e))
    assert torch.equal(assign(x[None], e[None])[0], found)
    assert assign(x[:0], e[:0]).shape == (0, n)
    for wrong in (e / 0, 1e39 * e.double()):  # the second is finite, and is not in single precision
        with pytest.raises(ValueError, match="not finite"):
            assign(x, wrong)
    # two pairs changed are worse
    shifted = found[:, torch.tensor([1, 0, *range(2, n)])].cpu().numpy()
    assert (total(x, e, shifted) < total(x, e, scipys(x, e))).all()


def test_ties_and_scales(assign: Assign) -> None:
    """Many assignments are the best ones then: a permutation, as good as scipy's."""
    x, e = pairs(16, 200 if GPU else 3)
    nothing = torch.zeros_like(x)
    for a, b in ((nothing, e), (nothing, nothing), (1e6 * x, 1e-3 * e), (x.round(), e.round()), (1e-20 * x, e)):
        columns = assign(a, b).cpu().numpy()
        assert (np.sort(columns) == np.arange(16)).all()
        wanted = total(a, b, scipys(a, b))
        np.testing.assert_allclose(total(a, b, columns), wanted, rtol=1e-9, atol=0)


@pytest.mark.slow  # the pairs themselves are held above
def test_training_sees_the_hosts_pairs(
    policies: Runner, bitwise: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whoever draws; the stand-in solves on the host what a GPU would be given."""
    flags = ("--model.seeds", "[4,1]", "--trainer.max_steps", "60", "--trainer.accelerator", "cpu")
    policies.ok("fit", "meanflow", *flags, "--run.name", "host")
    given: list[torch.Size] = []

    def pair_on_device(self: OptimalTransport, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        given.append(x.shape)
        pairs = [self.pair(x[i].numpy(), e[i].numpy()) for i in np.ndindex(x.shape[:-2])]
        out = torch.from_numpy(np.stack(pairs)).view(e.shape)
        assert not torch.equal(out, e)  # nobody has paired them before
        return out

    monkeypatch.setattr(OptimalTransport, "supports_device", lambda self, device: device.type == "cpu")
    monkeypatch.setattr(OptimalTransport, "pair_on_device", pair_on_device)
    for name, workers in (("there", "0"), ("workers", "2")):
        policies.ok("fit", "meanflow", *flags, "--run.name", name, "--data.num_workers", workers)
        assert given == [torch.Size((2, 50, 256, 2)), torch.Size((2, 10, 256, 2))]
        given.clear()
        for key in ("state_dict", "optimizer_states"):
            bitwise(policies.checkpoint("meanflow", "host")[key], policies.checkpoint("meanflow", name)[key], key)
    # Lightning would round the points first
    policies.ok("fit", "meanflow", *flags, "--run.name", "halved", "--trainer.precision", "bf16-true")
    assert given == []


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_training_on_a_gpu(policies: Runner, bitwise: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairs made there or on the host: the same weights, bit for bit."""
    assert couplings.gpu_assignment_works("cuda:0")
    flags = ("--model.seeds", "[4,1]", "--trainer.max_steps", "60", "--trainer.accelerator", "gpu")
    policies.ok("fit", "meanflow", *flags, "--run.name", "there")
    monkeypatch.setattr(OptimalTransport, "supports_device", lambda self, device: False)
    policies.ok("fit", "meanflow", *flags, "--run.name", "host")
    one, two = (policies.checkpoint("meanflow", name)["state_dict"] for name in ("there", "host"))
    bitwise(one, two, "state_dict")


def test_where_pairs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that triton can use; on the host where it cannot."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    tried: list[str] = []

    def works(device: str) -> bool:
        tried.append(device)
        return len(tried) == 1

    monkeypatch.setattr(couplings, "gpu_assignment_works", works)
    assert [OptimalTransport().supports_device(d) for d in (cpu, gpu, gpu)] == [False, True, False]
    assert tried == ["cuda", "cuda"]
    assert not Independent().supports_device(gpu)


def test_a_kernel_that_does_not_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    def swapped(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1, 0])

    for found, f in ((False, None), (True, broken), (True, swapped), (True, lambda x, e: torch.tensor([0, 1]))):
        monkeypatch.setattr(couplings, "find_spec", lambda name, found=found: found or None)
        monkeypatch.setitem(sys.modules, KERNEL, types.SimpleNamespace(assign=f))  # type: ignore[arg-type]
        couplings.gpu_assignment_works.cache_clear()
        assert couplings.gpu_assignment_works("cpu") == (found and f not in (broken, swapped))
        said = capsys.readouterr().err
        assert ("on the host: triton does not work here (Failed to find C compiler. Please" in said) == (f is broken)
    couplings.gpu_assignment_works.cache_clear()
