"""The moving average of weights: its decay, which warms up."""

from __future__ import annotations


def average_decay(decay: float, updates: int) -> float:
    """Return the decay of an average's next update, when ``updates`` lie behind it: min(decay, (1 + n) / (10 + n)).

    An average begins at the initial weights, which are random. With a constant decay d their share is d^n after n
    updates: a third after 1000 with d = .999. Warmed up it is n! 9! / (n + 9)!, 1e-8 after 50, until the decay is met
    (after 8990 updates for .999); the average reaches back over a tenth of the updates till then.

    Args:
        decay: the decay in the end, in (0, 1).
        updates: optimiser steps taken before this one, the global step: a resumed run is the whole one.

    Example:
        >>> [round(average_decay(0.9, n), 3) for n in (0, 1, 10, 80, 81)]
        [0.1, 0.182, 0.55, 0.9, 0.9]
    """
    return min(decay, (1 + updates) / (10 + updates))
