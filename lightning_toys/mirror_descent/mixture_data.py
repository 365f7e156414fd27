"""Gaussian mixtures of an action and a next state, of up to 16 coordinates in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_toys.errors import LARGEST, ToyError, bounded, require
from lightning_toys.mirror_descent.joint import Array
from lightning_toys.mirror_descent.mixture import GaussianMixtureJoint, Mixture
from lightning_toys.training.data import ToyDataModule

MAX_DIM = 16


def number_array(flag: str, given: Any, dims: int, words: str) -> Array:
    """Return nested lists as an array of so many dimensions.

    Raises:
        ToyError: they are ragged, of another depth, empty, or hold something that is no bounded number.
    """
    try:
        out = np.array(given, np.float64)
    except (TypeError, ValueError):
        raise ToyError(f"{flag}: {str(given)[:60]} is not allowed; give {words}") from None
    require(out.ndim == dims and out.size > 0, f"{flag}: {str(given)[:60]} is not allowed; give {words}")
    require(
        bool(np.isfinite(out).all()) and float(np.abs(out).max()) <= LARGEST,
        f"{flag}: {str(given)[:60]} is not allowed; give numbers from -{LARGEST:g} to {LARGEST:g}",
    )
    return out


class GaussianMixture(ToyDataModule):
    """x = (a, s') ~ sum_j w_j N(m_j, C_j): the data of :class:`MixtureSampling`. The action's coordinates come first.

    Chains are not moved to the mixture's middle: keep the means within some hundreds of its standard deviations of 0.

    Args:
        weights: w, one for each component, not below 0; they are divided by their sum.
        means: m, a list for each component.
        covariances: C, a matrix for each component; ``std`` squared times the identity if left out.
        std: standard deviation of every coordinate within a component, where ``covariances`` are left out.
        action_dim: coordinates of the action; the others are the next state's.
        batch_size: not used, nothing is trained.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(
        self,
        weights: Sequence[float] = (0.6, 0.4),
        means: Sequence[Sequence[float]] = ((-1.0, -0.5), (1.5, 1.0)),
        covariances: Sequence[Sequence[Sequence[float]]] | None = None,
        std: float = 0.5,
        action_dim: int = 1,
        batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size)
        w = number_array("--data.weights", weights, 1, "a number for each component")
        m = number_array("--data.means", means, 2, "a list of as many numbers for each component")
        J, D = m.shape
        require(
            float(w.min()) >= 0 and float(w.sum()) > 0,
            f"--data.weights: {list(weights)} is not allowed; give numbers >= 0 that are not all 0",
        )
        require(len(w) == J, f"--data.means: {J} lists are not allowed with {len(w)} of --data.weights; give as many")
        require(
            2 <= D <= MAX_DIM, f"--data.means: {D} coordinates are not allowed; give 2 to {MAX_DIM}, the action's first"
        )
        bounded("--data.action_dim", action_dim, 1, D - 1)
        bounded("--data.std", std, 0.0, above=True)
        if covariances is None:
            C: Array = np.broadcast_to(std**2 * np.eye(D), (J, D, D)).copy()
        else:
            C = number_array("--data.covariances", covariances, 3, "a matrix for each component")
            require(
                C.shape == (J, D, D),
                f"--data.covariances: shape {C.shape} is not allowed; give {J} matrices of {D} by {D}",
            )
            symmetric = bool(np.allclose(C, C.transpose(0, 2, 1)))
            lowest = float(np.linalg.eigvalsh(C).min()) if symmetric else 0.0
            require(
                symmetric and lowest > 0,
                "--data.covariances: a matrix is not allowed; give symmetric ones with eigenvalues above 0"
                + (f", not {lowest:.3g}" if symmetric else ""),
            )
        self.joint = GaussianMixtureJoint(Mixture(w / w.sum(), m, C, action_dim))
