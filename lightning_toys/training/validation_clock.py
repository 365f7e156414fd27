"""When a run is validated: ``val_check_interval`` counts optimiser steps, and the last step is always validated.

The Trainer counts batches, and a batch of ours holds many steps.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Trainer

from lightning_toys.errors import require


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]; never for ``every`` = 0.

    Example:
        >>> crossed(0, 50, 50), crossed(50, 90, 50), crossed(0, 90, 0)
        (True, False, False)
    """
    return every > 0 and before // every < after // every


def validation_interval(trainer: Trainer) -> int:
    """Return the optimiser steps between two validations; 0 where only the last step is validated.

    An integer ``val_check_interval`` is that number of steps. A float is a share of the run, as of the epoch elsewhere:
    1.0, Lightning's default, is the end of the run alone.

    Raises:
        ToyError: it is neither.
    """
    every: Any = getattr(trainer, "val_check_interval", None)  # a time is kept under another name
    is_steps = isinstance(every, int) and not isinstance(every, bool) and every >= 1
    is_share = isinstance(every, float) and 0 < every <= 1
    given = "a time" if every is None else repr(every)
    require(
        is_steps or is_share,
        f"val_check_interval: {given} is not allowed; give optimiser steps, an integer >= 1 (or a share of the run, a "
        "float in (0, 1])",
    )
    if is_steps:
        return int(every)
    return 0 if every == 1.0 or trainer.max_steps < 0 else max(1, round(every * trainer.max_steps))


def validation_due(trainer: Trainer, before: int) -> bool:
    """Whether a validation is due after the block of steps that began at step ``before``."""
    step = trainer.global_step
    return step >= trainer.max_steps or crossed(before, step, validation_interval(trainer))


def set_validation(trainer: Trainer, due: bool) -> None:
    """Tell the Trainer whether to validate after this batch."""
    trainer.val_check_batch = 1 if due else sys.maxsize
