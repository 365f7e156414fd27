"""Settings of the control experiment that do nothing beside others, and what they want to do something."""

from __future__ import annotations

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
