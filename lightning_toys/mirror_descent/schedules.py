"""How the tilt's strength grows from the noisy end to the clean one: beta_k = lambda f(abar_k)."""

from __future__ import annotations

import math

from lightning_toys.errors import require


class Schedule:
    """f(abar), with r = clip((abar - abar_min) / (1 - abar_min), 0, 1)."""

    final_steps = 0  # MALA steps on the clean target after the last level

    def share(self, abar: float, abar_min: float) -> float:
        """Return f."""
        raise NotImplementedError

    @property
    def full_at_the_end(self) -> bool:
        """Whether the last level's law is the tilted one: f(1) = 1."""
        return self.share(1.0, 0.0) == 1.0


def rise(abar: float, abar_min: float) -> float:
    """Return r."""
    return min(1.0, max(0.0, (abar - abar_min) / (1 - abar_min)))


class Linear(Schedule):
    """f = r."""

    def share(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.share`."""
        return rise(abar, abar_min)


class Constant(Schedule):
    """f = 1."""

    def share(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.share`."""
        return 1.0


def check_window(w_lo: float, w_hi: float) -> None:
    """Refuse a window that is none."""
    flag = "--model.schedule"
    require(
        0 <= w_lo < w_hi <= 1, f"{flag}.w_lo, {flag}.w_hi: {w_lo}, {w_hi} are not allowed; give 0 <= w_lo < w_hi <= 1"
    )


class LateConstant(Schedule):
    """f = 1 for abar in [w_lo, w_hi], else 0.

    Args:
        w_lo: where it starts.
        w_hi: where it ends; below 1 it ends off the target.
    """

    def __init__(self, w_lo: float = 0.5, w_hi: float = 1.0) -> None:
        check_window(w_lo, w_hi)
        self.w_lo, self.w_hi = w_lo, w_hi

    def share(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.share`."""
        return 1.0 if self.w_lo <= abar <= self.w_hi else 0.0


class LateRamp(Schedule):
    """f = ((abar - w_lo) / (w_hi - w_lo))^ramp_p within [w_lo, w_hi], 0 below and 1 above.

    Args:
        w_lo: where it starts.
        w_hi: where it is full.
        ramp_p: power.
    """

    def __init__(self, w_lo: float = 0.5, w_hi: float = 1.0, ramp_p: float = 2.0) -> None:
        check_window(w_lo, w_hi)
        require(0 < ramp_p < math.inf, f"--model.schedule.ramp_p: {ramp_p} is not allowed; give a number > 0")
        self.w_lo, self.w_hi, self.ramp_p = w_lo, w_hi, ramp_p

    def share(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.share`."""
        inside = min(1.0, max(0.0, (abar - self.w_lo) / (self.w_hi - self.w_lo)))
        return float(inside**self.ramp_p)


class TFGPlusFinalMALA(Schedule):
    """f = (1 - r)^tfg_p, which ends at no tilt, then MALA steps on the clean target.

    Args:
        tfg_p: power.
        final_steps: MALA steps; with a few the law stays off the target, and the run says so.
    """

    def __init__(self, tfg_p: float = 1.0, final_steps: int = 50) -> None:
        require(0 < tfg_p < math.inf, f"--model.schedule.tfg_p: {tfg_p} is not allowed; give a number > 0")
        require(final_steps >= 0, f"--model.schedule.final_steps: {final_steps} is not allowed; give an integer >= 0")
        self.tfg_p, self.final_steps = tfg_p, final_steps

    def share(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.share`."""
        return float((1 - rise(abar, abar_min)) ** self.tfg_p)


class SigmaPower(Schedule):
    """f = sqrt(1 - abar)^sigma_p, which ends at no tilt.

    Args:
        sigma_p: power.
    """

    def __init__(self, sigma_p: float = 1.0) -> None:
        require(0 < sigma_p < math.inf, f"--model.schedule.sigma_p: {sigma_p} is not allowed; give a number > 0")
        self.sigma_p = sigma_p

    def share(self, abar: float, abar_min: float) -> float:
        """See :meth:`Schedule.share`."""
        return float(math.sqrt(max(0.0, 1 - abar)) ** self.sigma_p)
