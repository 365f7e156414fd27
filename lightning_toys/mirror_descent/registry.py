"""All samplers by name."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_toys.errors import ToyError, did_you_mean, require
from lightning_toys.mirror_descent.annealed import PCMALA, PCULA, PCJointMALA
from lightning_toys.mirror_descent.reverse import PREDICTORS, TwistedSMC
from lightning_toys.mirror_descent.samplers import MALA, ULA, Gibbs, Importance, IndependenceMH, Sampler

KINDS: list[type[Sampler]] = [Importance, IndependenceMH, ULA, MALA, Gibbs, PCULA, PCMALA, PCJointMALA]
KINDS += [*PREDICTORS, TwistedSMC]
SAMPLERS = {kind.name: kind for kind in KINDS}


def check_samplers(names: Sequence[str]) -> list[str]:
    """Refuse names that no sampler has."""
    require(len(names) > 0, "--model.samplers: [] is not allowed; give at least one, such as [pc_mala]")
    for name in names:
        if name not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise ToyError(
                f"--model.samplers: {name!r} is not allowed; give names of {known}{did_you_mean(name, SAMPLERS)}"
            )
    require(len(set(names)) == len(names), f"--model.samplers: {list(names)} is not allowed; a sampler appears twice")
    return list(names)
