"""The shipped configurations: what makes each small, and what each can do. A new file is found by itself."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import yaml
from lightning.pytorch import LightningModule

from lightning_toys.training.module import ToyModule

REPO = Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPO / "configs").glob("*/*.yaml"))
PRECISIONS = ("32-true", "bf16-mixed", "64-true")
VERBS = ("fit", "validate", "test", "predict")
READS = {"smollm2"}  # a real model: run by the README's command, not here

WHOLE = os.environ.get("LIGHTNING_TOYS_MATRIX") == "all"
# in the gate, samplers of each kind; each one has tests of its own
SOME = () if WHOLE else ("--model.samplers", "[importance,mala,pc_joint_mala,sde_dps,ode_h_transform,smc_twisted]")
SOME_LEARNED = () if WHOLE else ("--model.samplers", "[mala,pc_joint_mala,sde_dps,smc_twisted]")
SOME_SAMPLERS = () if WHOLE else ("--model.samplers", "[importance,pc_mala,sde_dps,smc_tempered]")
# with so few levels fkc runs away under the quartic, and is refused
QUARTIC = yaml.safe_load((REPO / "configs/mirror_descent/quartic.yaml").read_text())["model"]["init_args"]["samplers"]
SOME_QUARTIC = SOME_SAMPLERS or ("--model.samplers", f"[{','.join(name for name in QUARTIC if name != 'fkc')}]")

# by configuration, or else by experiment: flags with which two steps and a test last a second
TINY: dict[str, tuple[str, ...]] = {
    "flow_vs_regression": (
        *("--data.num_eval", "200", "--model.evaluation.draws", "2", "--model.network.hidden", "16"),
    ),
    "generative_policy": (
        *("--model.network.hidden", "16", "--model.seeds", "[0,1]"),
        *("--model.evaluation.samples", "200", "--model.evaluation.pairs", "50"),
    ),
    "mirror_descent": (
        *("--model.seeds", "[0,1]", "--model.chains", "200", "--model.sweep_max_refresh", "1"),
        *("--model.sweep_chains", "200", "--model.settings.mcmc_steps", "10", "--model.settings.smc_particles", "64"),
        *SOME,
    ),
    "learned": (
        *("--model.seeds", "[0,1]", "--model.chains", "200", "--model.network.hidden", "8", "--data.batch_size", "64"),
        *("--model.settings.mcmc_steps", "2", "--model.settings.predictor_K", "3", "--model.settings.smc_K", "3"),
        *("--model.settings.K", "2", "--model.settings.smc_particles", "64"),
        *SOME_LEARNED,
    ),
    **{
        name: (
            *("--model.seeds", "[0,1]", "--model.chains", "200", "--model.settings.mcmc_steps", "5"),
            *("--model.settings.predictor_K", "20", "--model.settings.smc_K", "8", "--model.settings.K", "3"),
            *("--model.settings.smc_particles", "64", *some),
        )
        for name, some in (("mixture", SOME_SAMPLERS), ("quartic", SOME_QUARTIC))
    },
    "bilevel": ("--model.seeds", "[0,1]", "--model.hidden", "8"),
    "control": (
        *("--model.seeds", "[0,1]", "--model.hidden_dim", "8", "--model.eval_episodes", "1"),
        *("--model.test_episodes", "1", "--data.batch_size", "4", "--data.init_steps", "4"),
    ),
    "bandit": ("--model.network.hidden", "16", "--model.seeds", "[0,1]", "--model.draws", "8"),
    "multigoal": (
        *(
            "--model.network.hidden",
            "16",
            "--model.seeds",
            "[0,1]",
            "--model.episodes",
            "16",
            "--model.candidates",
            "3",
        ),
        *("--data.grid", "15", "--data.nodes", "6", "--data.horizon", "2", "--data.batch_size", "16"),
        *("--model.candidates", "3"),
    ),
    "update_entropy": (
        *("--model.seeds", "[0,1]", "--model.warm_steps", "1", "--model.policy.hidden", "16"),
        *("--model.eval_prompts", "4", "--model.policy.layers", "1"),
        *("--model.rollouts.prompts", "2", "--model.rollouts.group", "2"),
        *("--model.plan.prompts", "1", "--model.plan.group", "3", "--model.plan.eval_prompts", "3"),
        *("--model.plan.filter_zero_advantage", "false", "--data.batch_size", "4"),
    ),
}


def kind_of(config: Path) -> str:
    """The name under which a configuration's flags are kept: its own, its first word (control_ofbo), its experiment."""
    return next((n for n in (config.stem, config.stem.partition("_")[0]) if n in TINY), config.parent.name)


def tiny(config: Path) -> tuple[str, ...]:
    """The flags that make a configuration small."""
    return TINY.get(kind_of(config), ())


def module_class(config: Path) -> type[ToyModule]:
    """The configuration's LightningModule."""
    name = yaml.safe_load(config.read_text())["model"]["class_path"]
    package = importlib.import_module(f"lightning_toys.{config.parent.name}")
    kind: type[ToyModule] = getattr(package, name.rpartition(".")[2])
    return kind


SHIPPED = [c for c in CONFIGS if c.stem not in READS]
FIRST = {module_class(c): c for c in reversed(SHIPPED)}  # the first configuration of each module


def refusal(config: Path, verb: str, precision: str) -> str | None:
    """What a configuration's module declares that it cannot do, in words of its one line; None if it can."""
    kind = module_class(config)
    if verb == "predict" and kind.predict_step is LightningModule.predict_step:
        return f"{kind.__name__} has no predictions to write"
    if precision not in precisions(config):
        return f"--trainer.precision: {precision!r} is not allowed here; give one of {', '.join(kind.precisions)}"
    if verb == "fit" and not kind.trains:
        return "has nothing to train"
    return None


def precisions(config: Path) -> tuple[str, ...]:
    """The precisions of the matrix that a configuration's module runs in."""
    declared = module_class(config).precisions
    return tuple(p for p in PRECISIONS if not declared or p in declared)
