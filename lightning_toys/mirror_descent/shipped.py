"""Short names of the shipped samplers, and samplers as they are given: by short name, by class path, or as a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning_toys.errors import ToyError, did_you_mean, require
from lightning_toys.imports import load_class
from lightning_toys.mirror_descent.annealed import PCMALA, PCULA, PCJointMALA
from lightning_toys.mirror_descent.best_of_n import BestOfN
from lightning_toys.mirror_descent.feynman_kac_correctors import FeynmanKacCorrectors
from lightning_toys.mirror_descent.guidance import (
    DiffusionPosteriorSampling,
    GuidanceRule,
    HTransform,
    ProductOfExperts,
    TrainingFreeGuidance,
    Unguided,
)
from lightning_toys.mirror_descent.predictors import Predictor
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.resampling import Multinomial, Residual
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.mirror_descent.samplers import MALA, ULA, Gibbs, Importance, IndependenceMH
from lightning_toys.mirror_descent.soft_value import SoftValue
from lightning_toys.mirror_descent.steering import SVDD, Difference, FKSteering, Max, Sum
from lightning_toys.mirror_descent.tempered_smc import TemperedSMC
from lightning_toys.mirror_descent.twisted_smc import TwistedSMC
from lightning_toys.training.own_classes import attempt

MakeSampler = Callable[[Problem], Sampler]

RULES: dict[str, type[GuidanceRule]] = {
    rule.name: rule
    for rule in (Unguided, ProductOfExperts, DiffusionPosteriorSampling, TrainingFreeGuidance, HTransform)
}
# what `--model.samplers` may be short for; nothing else depends on this table
SHORT_NAMES: dict[str, MakeSampler] = {
    kind.name: kind for kind in (Importance, IndependenceMH, ULA, MALA, Gibbs, PCULA, PCMALA, PCJointMALA)
}
SHORT_NAMES |= {
    f"{process}_{name}": partial(Predictor, process=process, rule=rule)
    for process in ("sde", "ode")
    for name, rule in RULES.items()
}
SHORT_NAMES[TwistedSMC.name] = TwistedSMC

# more of them, which MixtureSampling runs by default beside those above, and TiltedSampling where they are named
MORE_NAMES: dict[str, MakeSampler] = {"best_of_8": BestOfN, "svdd_8": SVDD, TemperedSMC.name: TemperedSMC}
MORE_NAMES |= {f"ddim1_{name}": partial(Predictor, process="ddim", rule=rule) for name, rule in RULES.items()}
MORE_NAMES |= {f"fk_{kind.name}": partial(FKSteering, potential=kind) for kind in (Difference, Max, Sum)}
MORE_NAMES[FeynmanKacCorrectors.name] = FeynmanKacCorrectors
MORE_NAMES |= {
    f"{process}_{SoftValue.name}": partial(Predictor, process=process, rule=SoftValue) for process in ("sde", "ode")
}
MORE_NAMES |= {
    f"{TwistedSMC.name}_{kind.__name__.lower()}": partial(TwistedSMC, resampling=kind)
    for kind in (Residual, Multinomial)
}
KNOWN = SHORT_NAMES | MORE_NAMES


def make_sampler(given: Any, flag: str = "--model.samplers") -> MakeSampler:
    """Return what makes a sampler of a problem.

    Args:
        given: a short name, a class path, a :class:`Sampler` class, or a function of the problem that returns one.
        flag: for the error.

    Raises:
        ToyError: there is no such name or class.
    """
    if isinstance(given, dict):  # a checkpoint's, of a class that is not ours to import
        path = given.get("class_path")
        raise ToyError(f"samplers: the checkpoint was made with {path}; give it: load_from_checkpoint(..., samplers=)")
    if not isinstance(given, str):
        require(callable(given), f"{flag}: {given!r} is not allowed; give names, class paths or Sampler classes")
        make: MakeSampler = given
        return make
    if given in KNOWN:
        return KNOWN[given]
    path = given.split(".")
    if len(path) > 1 and all(part.isidentifier() for part in path):
        try:
            found = load_class(given)
        except ToyError as error:
            raise ToyError(f"{flag}: {given!r} is not allowed: {error}") from None
        require(
            isinstance(found, type) and issubclass(found, Sampler),
            f"{flag}: {given!r} is not allowed; it is no Sampler, which has draw and cost; give a subclass of "
            "lightning_toys.mirror_descent.Sampler",
        )
        make = found
        return make
    known = ", ".join(KNOWN)
    raise ToyError(
        f"{flag}: {given!r} is not allowed; give names of {known}, or the path MODULE.CLASS of a Sampler of your own"
        f"{did_you_mean(given, KNOWN)}"
    )


def make_attempt(entry: Any, make: MakeSampler, problem: Problem) -> Sampler:
    """Return the sampler of a problem.

    Args:
        entry: what the sampler was given as, or its name.
        make: makes it.
        problem: the problem.

    Raises:
        ToyError: it cannot be made (of an abstract class, or one whose constructor fails), or is no :class:`Sampler`.
    """
    where = f"--model.samplers: {entry!r}"
    sampler = attempt(where, lambda: make(problem))
    found = type(sampler).__name__
    require(isinstance(sampler, Sampler), f"{where} gives {found}, which is no Sampler; give a subclass of it")
    require(hasattr(sampler, "problem"), f"{where}: {found} has no problem; call super().__init__(problem)")
    made: Sampler = sampler
    return made


def make_samplers(given: Sequence[Any], problem: Problem, learned: bool = False) -> dict[str, MakeSampler]:
    """Return name to what makes each sampler.

    Args:
        given: see :func:`make_sampler`.
        problem: any problem, on which each is made once to see that it can be, and what it is called.
        learned: whether samplers that read no score are refused.

    Raises:
        ToyError: there is none, one cannot be made, two have one name, or one reads no score.
    """
    flag = "--model.samplers"
    require(len(given) > 0, f"{flag}: [] is not allowed; give at least one, such as [pc_mala]")
    out: dict[str, MakeSampler] = {}
    for entry in given:
        make = make_sampler(entry)
        sampler = make_attempt(entry, make, problem)
        name = sampler.name
        require(isinstance(name, str) and name != "", f"{flag}: {entry!r} has the name {name!r}; give it a word")
        require(
            sampler.reads_score or not learned, f"{flag}: {name!r} is not allowed here, it reads no score; leave it out"
        )
        require(name not in out, f"{flag}: {name!r} is not allowed twice; a Sampler may set a name of its own")
        out[name] = make
    return out


def class_path_of(make: Any) -> str:
    """Return the path of the class that makes a sampler; of a jsonargparse's or functools' partial that inside."""
    if hasattr(make, "func"):
        kinds = [x for x in (*make.args, make.func) if isinstance(x, type)]
        make = kinds[0] if kinds else make.func
    return f"{make.__module__}.{make.__qualname__}"
