"""All samplers by name."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_toys.errors import ToyError, did_you_mean, require
from lightning_toys.mirror_descent.annealed import PCMALA, PCULA, PCJointMALA
from lightning_toys.mirror_descent.predictors import PREDICTORS
from lightning_toys.mirror_descent.samplers import MALA, ULA, Gibbs, Importance, IndependenceMH, Sampler
from lightning_toys.mirror_descent.twisted_smc import TwistedSMC

SAMPLER_CLASSES: list[type[Sampler]] = [Importance, IndependenceMH, ULA, MALA, Gibbs, PCULA, PCMALA, PCJointMALA]
SAMPLER_CLASSES += [*PREDICTORS, TwistedSMC]
SAMPLERS = {kind.name: kind for kind in SAMPLER_CLASSES}
SCORE_BASED = [name for name in SAMPLERS if name not in ("importance", "independence_mh", "gibbs")]


def check_samplers(names: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Return the names as a list.

    Raises:
        ToyError: there is none, one is given twice, or is not among those allowed.
    """
    require(len(names) > 0, "--model.samplers: [] is not allowed; give at least one, such as [pc_mala]")
    for name in names:
        if name not in allowed:
            known = ", ".join(allowed)
            why = " here, it reads no score" if name in SAMPLERS else ""
            raise ToyError(
                f"--model.samplers: {name!r} is not allowed{why}; give names of {known}{did_you_mean(name, allowed)}"
            )
    require(len(set(names)) == len(names), f"--model.samplers: {list(names)} is not allowed; a sampler appears twice")
    return list(names)
