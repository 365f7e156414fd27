"""What data are scaled by before a network sees them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor


class Units(NamedTuple):
    """What is subtracted from data, and then divided by, before a network sees them.

    Attributes:
        c_mean: of each input, C numbers.
        c_sd: likewise.
        x_mean: of each output, D numbers.
        x_sd: likewise.
    """

    c_mean: list[float]
    c_sd: list[float]
    x_mean: list[float]
    x_sd: list[float]

    def scaled_c(self, c: Tensor) -> Tensor:
        """Return conditions (..., C) as the network sees them."""
        return (c - c.new_tensor(self.c_mean)) / c.new_tensor(self.c_sd)

    def scaled_x(self, x: Tensor) -> Tensor:
        """Return values (..., D) as the network sees them."""
        return (x - x.new_tensor(self.x_mean)) / x.new_tensor(self.x_sd)

    def unscaled_x(self, x: Tensor) -> Tensor:
        """Return what the network says, (..., D), in the data's units."""
        return x * x.new_tensor(self.x_sd) + x.new_tensor(self.x_mean)


def unfit_units(given: Any, inputs: int, outputs: int) -> str:
    """Say what is wrong with the units that a checkpoint holds, if something is."""
    if given is None:
        return ""
    lengths = {"c_mean": inputs, "c_sd": inputs, "x_mean": outputs, "x_sd": outputs}
    if not isinstance(given, dict) or given.keys() != lengths.keys():
        return "sizes.units are no means and deviations of inputs and outputs"
    for name, length in lengths.items():
        values = given[name]
        fits = isinstance(values, list) and len(values) == length and all(type(v) is float for v in values)
        if not fits or not all(math.isfinite(v) and (v > 0 or name.endswith("mean")) for v in values):
            return f"sizes.units.{name} are no {length} finite numbers{' > 0' if name.endswith('sd') else ''}"
    return ""
