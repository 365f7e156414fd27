"""The bilevel agent whose values lag behind its model, and why it swings: a loop with a delay, and what damps it.

``vaml`` takes the inner problem for solved; ``lagged`` takes the values as they are. With e = d - y, the values' error,
and x = y_T - y, the model's, for one transition and plain gradient steps,

    d   <- d - a (d - y_T)                          the values follow the model, a share a of the gap at each step
    m   <- beta m + (1 - beta) ((1 - c) e + c x)    the model's first moment (Adam's beta)
    y_T <- y_T - b m                                the model descends

Undamped (c = 0) this is an oscillator: the model goes on in one direction until the values have come after it. Without
momentum it decays, by sqrt(1 - a) a step at the slowest: with a value rate a of a thousandth, over thousands of steps.
Momentum delays the model by beta / (1 - beta) steps, 9 for Adam's .9, and makes the swing grow where b is above about
one over that. Adam divides its gradient by its root mean square, so that b has no bound near a solution: there the
undamped agent is not stable at any learning rate, only slow. The term c x is its derivative feedback: e' = -a (e - x),
so that x = e + e' / a. :func:`spectral_radius` is the whole of it in a number.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def spectral_radius(value_rate: float, model_rate: float, damping: float, momentum: float = 0.0) -> float:
    """Return the factor by which the loop above grows a step, at the slowest of its modes; below 1 it is stable.

    Args:
        value_rate: a.
        model_rate: b.
        damping: c.
        momentum: beta.

    >>> round(spectral_radius(0.01, 0.1, 0.0), 4), round((1 - 0.01) ** 0.5, 4)  # undamped, no momentum
    (0.995, 0.995)
    >>> spectral_radius(0.01, 0.3, 0.0, momentum=0.9) > 1 > spectral_radius(0.01, 0.3, 0.5, momentum=0.9)
    True
    """
    a, b, c, beta = value_rate, model_rate, damping, momentum
    # (d, x, m) in units of value, y = 0; the model sees the values after their step, and its targets before its own
    new_d = np.array([1 - a, a, 0.0])
    x = np.array([0.0, 1.0, 0.0])
    new_m = beta * np.array([0.0, 0.0, 1.0]) + (1 - beta) * ((1 - c) * new_d + c * x)
    return float(np.abs(np.linalg.eigvals(np.stack([new_d, x - b * new_m, new_m]))).max())


def damped_error(d: Tensor, y_model: Tensor, y: Tensor, damping: float, clip: float | None = None) -> Tensor:
    """Return (1 - c) (d_k - y) + c (y_T - y) (R, K, B), each transition's clipped to [-clip, clip].

    Args:
        d: the values (R, K, B).
        y_model: y_T (R, B).
        y: y (R, B).
        damping: c: 0 takes the values as they are, 1 takes them for solved.
        clip: in units of value; None is without.
    """
    mixed = (1 - damping) * d + damping * y_model.unsqueeze(1) - y.unsqueeze(1)
    return mixed if clip is None else mixed.clamp(-clip, clip)


def wrong_side(error: Tensor, y_model: Tensor, y: Tensor) -> Tensor:
    """Return the share (R,) of values that drive their model's target away from its solution.

    There d - y, which an undamped model descends, has another sign than y_T - y, which it would descend were the values
    solved for. It is small where an agent settles, and near a half where it oscillates: also where it is by chance.

    Args:
        error: d - y of the values as they are (R, K, B).
        y_model: y_T (R, B).
        y: y (R, B).
    """
    return (error * (y_model - y).unsqueeze(1) < 0).to(y).mean((1, 2))
