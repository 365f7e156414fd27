"""Trials of somebody's own classes, on two replicas and on the second of them alone: what they give is compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_toys.errors import require
from lightning_toys.training.own_classes import shape_of

TOLERANCE = 1e-3  # of single precision's rounding, in a batch of one replica or two, and of what a solver makes of it
LEAST = 1e-3  # numbers that are all below it may be the rounding of larger ones


@contextmanager
def apart() -> Iterator[None]:
    """Let nothing of a trial show in the run: torch's generator is put back, and autograd is as in training."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        yield


Thing = TypeVar("Thing")


def copied(thing: Thing) -> Thing:
    """Return a copy of an object, so that what a trial leaves in it is not in the run; itself where it has none."""
    try:
        return copy.deepcopy(thing)
    except Exception:  # of somebody else's code, which need not be copied to be used
        return thing


def require_tensor(where: str, found: Any, wanted: tuple[int, ...]) -> None:
    """Refuse what is no tensor of the wanted shape, or is not finite.

    Raises:
        ToyError: says what it is.
    """
    shape = shape_of(found)
    require(shape == wanted, f"{where} is {shape}; give a tensor {wanted}")
    require(bool(found.isfinite().all()), f"{where} has numbers that are not finite")


def require_solo(where: str, both: Tensor, alone: Tensor, tolerance: float = TOLERANCE) -> None:
    """Refuse what two replicas give (2, ...) if the second's differs from what it gives alone (1, ...).

    Raises:
        ToyError: says so.
    """
    both, alone = both.detach().double(), alone.detach().double()
    largest = max(float(alone.abs().max()), LEAST) if alone.numel() else LEAST
    same = both[1:].shape == alone.shape and bool(((both[1:] - alone).abs() <= tolerance * largest).all())
    why = "mixes replicas, or draws from a generator; what replica r gives depends on its own seed and rows alone"
    require(same, f"{where} {why}")


def require_drawn_by_seed(where: str, both: Tensor, alone: Tensor) -> None:
    """Refuse parameters (2, ...) if the second replica's are not, bit for bit, those that its seed draws alone.

    Raises:
        ToyError: says so.
    """
    axis = both.dim() > 0 and both.shape[0] == 2 and shape_of(alone) == (1, *both.shape[1:])
    shape = tuple(both.shape)
    require(axis, f"{where} is {shape} for 2 seeds; give a leading replica axis of 2, of 1 for 1 seed")
    same = torch.equal(both[1:], alone)
    require(same, f"{where} depends on more than its replica's seed; draw by noise.keyed_generator")
