"""Settings of the control experiment that do nothing beside others, what they want, and what a run will not do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_toys.training.configuration import unused_flags


def unused_settings(module: Any) -> dict[str, str]:
    """Return flags that do nothing, and what they want; see :meth:`ToyModule.unused_settings`.

    Args:
        module: a BilevelControl.
    """
    out: dict[str, str] = {}
    agent, solver, method = module.agent, module.solver, module.method
    if agent != "omd":
        out |= unused_flags("--model.agent omd", "solver.inverse", "solver.cg_steps", "solver.cg_damping")
    elif solver.inverse == "identity":
        wants = "--model.solver.inverse gauss_newton or hessian"
        # the check of the gradient has the damping in its finite differences, whatever the inverse
        out |= unused_flags(wants, "solver.cg_steps", *(() if module.check_gradient else ("solver.cg_damping",)))
    for only, names in (
        ("vep", ("solver.vep_values", "details.vep_sum")),
        ("funcbo", ("solver.inner_value",)),
        ("lagged", ("solver.lag_damping", "solver.lag_clip", "solver.lag_target")),
    ):
        out |= {} if agent == only else unused_flags(f"--model.agent {only}", *names)
    if agent == "lagged" and solver.lag_damping == 1:
        out |= unused_flags("--model.solver.lag_damping below 1", "solver.lag_target")
    if agent not in ("omd", "funcbo", "vaml", "lagged"):
        out |= unused_flags("--model.agent omd, funcbo, vaml or lagged", "solver.state_gradient")
    if not method.uses_model:
        wants = "an agent that learns a model"
        out |= unused_flags(wants, "model_hidden_dim", "lr", "clip_grad_norm", "check_gradient", "regret_every")
        out |= unused_flags(wants, "solver.smoothing", "solver.smoothing_present")
        out |= unused_flags(wants, "details.separate_reward", "world_model")
    elif solver.smoothing == 1:
        out |= unused_flags("--model.solver.smoothing above 1", "solver.smoothing_present")
    if method.uses_model and module.dynamics is not None:
        out |= unused_flags("the shipped --model.world_model", "details.separate_reward")
    out |= unused_by_batches(module)
    if not module.disturbance.drift:
        wants = "--model.disturbance.drift above 0"
        out |= unused_flags(wants, *(f"disturbance.drift_{x}" for x in ("shape", "period", "width")))
    return out


def unused_by_batches(module: Any) -> dict[str, str]:
    """Return flags that do nothing with the published form's batches, or without a cold start."""
    out: dict[str, str] = {}
    fits, fresh, warm = module.method.fits, module.form.fresh_batches, module.solver.warm_start
    if fresh:
        ours = "--model.details.fresh_batches false (as --model.form ours)"
        which, flag = ("does not fit", "solver.warm_start") if fits else ("fits", "solver.num_t_steps")
        out |= unused_flags(f"{ours}, or an agent that {which} its model first", flag)
    if warm or (fresh and fits):
        out |= unused_flags("--model.solver.warm_start false", "details.cold_target")
    return out


def idle_parts(module: Any, warm: int, most: int) -> Iterator[str]:
    """Yield notes on what a run will not do at all with settings that are allowed.

    Args:
        module: a BilevelControl.
        warm: ``--data.init_steps``.
        most: ``--trainer.max_steps``.
    """
    if most <= warm:
        yield f"nothing will be learned: --trainer.max_steps {most} are all random, with --data.init_steps {warm}"
    every = module.regret_every
    if hasattr(module, "regret") and most // every * every <= warm:
        yield (
            f"no local regret will be measured: no step from {warm} (--data.init_steps) to {most} "
            f"(--trainer.max_steps) is a multiple of --model.regret_every {every}"
        )
    steps = module.solver.num_q_steps
    cold = not module.solver.warm_start and not (module.form.fresh_batches and module.method.fits)
    if cold and steps == 1:
        yield (
            "the values will learn nothing: --model.solver.warm_start false begins every inner loop at the initial "
            f"values, and --model.solver.num_q_steps {steps} leaves it after one step; give more steps"
        )
