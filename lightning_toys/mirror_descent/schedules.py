"""How the tilt grows from the noisy end to the clean one: beta_k = lambda f(abar_k)."""

from __future__ import annotations

import math

from lightning_toys.errors import REPEATS, bounded, check_settings, require


class Schedule:
    """f(abar), the tilt at a noise level as a fraction of lambda: a base class for schedules of your own.

    Below, r = clip((abar - abar_min) / (1 - abar_min), 0, 1).

    >>> Linear().fraction(0.625, abar_min=0.25)
    0.5

    Attributes:
        final_steps: MALA steps of annealed samplers on the clean target after the last level.
    """

    final_steps = 0

    def fraction(self, abar: float, abar_min: float) -> float:
        """Return f(abar), the fraction of lambda at a level; ``abar_min`` is the noisiest level's abar."""
        raise NotImplementedError

    @property
    def reaches_target(self) -> bool:
        """Whether the last level's target is the clean one: f(1) = 1."""
        return self.fraction(1.0, 0.0) == 1.0


def normalized_level(abar: float, abar_min: float) -> float:
    """Return r = clip((abar - abar_min) / (1 - abar_min), 0, 1)."""
    return min(1.0, max(0.0, (abar - abar_min) / (1 - abar_min)))


class Linear(Schedule):
    """f = r."""

    def fraction(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.fraction`."""
        return normalized_level(abar, abar_min)


class Constant(Schedule):
    """f = 1."""

    def fraction(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.fraction`."""
        return 1.0


def check_window(w_lo: float, w_hi: float) -> None:
    """Raise ToyError unless 0 <= w_lo < w_hi <= 1."""
    flag = "--model.schedule"
    require(
        0 <= w_lo < w_hi <= 1, f"{flag}.w_lo, {flag}.w_hi: {w_lo}, {w_hi} are not allowed; give 0 <= w_lo < w_hi <= 1"
    )


class LateConstant(Schedule):
    """f = 1 for abar in [w_lo, w_hi], else 0.

    Args:
        w_lo: abar where the tilt starts.
        w_hi: abar where it ends; below 1 samplers miss the target.

    Raises:
        ToyError: not 0 <= w_lo < w_hi <= 1.
    """

    def __init__(self, w_lo: float = 0.5, w_hi: float = 1.0) -> None:
        check_settings(LateConstant, locals(), "--model.schedule.")
        check_window(w_lo, w_hi)
        self.w_lo, self.w_hi = w_lo, w_hi

    def fraction(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.fraction`."""
        return 1.0 if self.w_lo <= abar <= self.w_hi else 0.0


class LateRamp(Schedule):
    """f = ((abar - w_lo) / (w_hi - w_lo))^ramp_p within [w_lo, w_hi], 0 below and 1 above.

    Args:
        w_lo: abar where the tilt starts.
        w_hi: abar where f reaches 1.
        ramp_p: power, above 0.

    Raises:
        ToyError: not 0 <= w_lo < w_hi <= 1, or the power is not above 0.
    """

    def __init__(self, w_lo: float = 0.5, w_hi: float = 1.0, ramp_p: float = 2.0) -> None:
        check_settings(LateRamp, locals(), "--model.schedule.")
        check_window(w_lo, w_hi)
        bounded("--model.schedule.ramp_p", ramp_p, 0.0, above=True)
        self.w_lo, self.w_hi, self.ramp_p = w_lo, w_hi, ramp_p

    def fraction(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.fraction`."""
        inside = min(1.0, max(0.0, (abar - self.w_lo) / (self.w_hi - self.w_lo)))
        return float(inside**self.ramp_p)


class TFGPlusFinalMALA(Schedule):
    """f = (1 - r)^tfg_p, which ends at no tilt, then MALA steps on the clean target.

    Args:
        tfg_p: power, above 0.
        final_steps: MALA steps; with few of them the samples miss the target, and the run warns of it.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(self, tfg_p: float = 1.0, final_steps: int = 50) -> None:
        bounded("--model.schedule.tfg_p", tfg_p, 0.0, above=True)
        bounded("--model.schedule.final_steps", final_steps, 0, REPEATS)
        self.tfg_p, self.final_steps = tfg_p, final_steps

    def fraction(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.fraction`."""
        return float((1 - normalized_level(abar, abar_min)) ** self.tfg_p)


class SigmaPower(Schedule):
    """f = sqrt(1 - abar)^sigma_p, which ends at no tilt.

    Args:
        sigma_p: power, above 0.

    Raises:
        ToyError: the power is not above 0.
    """

    def __init__(self, sigma_p: float = 1.0) -> None:
        bounded("--model.schedule.sigma_p", sigma_p, 0.0, above=True)
        self.sigma_p = sigma_p

    def fraction(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.fraction`."""
        return float(math.sqrt(max(0.0, 1 - abar)) ** self.sigma_p)
