"""Settings of the regression experiment that do nothing beside others, and what they want to do something."""

from __future__ import annotations

from typing import Any

from lightning_toys.training.configuration import unused_flags


def unused_settings(module: Any) -> dict[str, str]:
    """Return flags that do nothing, and what they want; see :meth:`ToyModule.unused_settings`.

    Args:
        module: a WindowRegression.
    """
    out: dict[str, str] = {}
    for algorithm, names in (
        ("aid", ("cg_iterations", "damping", "curvature")),
        ("unroll1", ("unroll_steps",)),
        ("funcbo", ("adjoint", "ridge", "adjoint_steps", "adjoint_lr")),
    ):
        if module.algorithm != algorithm:
            out |= unused_flags(f"--model.algorithm {algorithm}", *names)
    if module.algorithm != "fixed":
        out |= unused_flags("--model.algorithm fixed", "fixed_weights")
    if not module.method.learns:
        return out | unused_flags("an algorithm that learns the weights", "outer_lr", "weights", "smoothing")
    if module.algorithm == "funcbo":
        network = module.adjoint == "network"
        out |= unused_flags("--model.adjoint ridge", "ridge") if network else {}
        out |= {} if network else unused_flags("--model.adjoint network", "adjoint_steps", "adjoint_lr")
    return out
