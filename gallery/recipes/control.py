"""bilevel's control at one rate for all: the table from before rates were chosen (agents.py), and README's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gallery.read import (
    Content,
    adjusted,
    difference,
    entries,
    figures_of,
    results,
    short,
    spread,
    spread_to,
    table,
    values,
)
from gallery.recipe import Folders, Recipe, Run

CONFIG = "-c configs/bilevel/control.yaml"
AGENTS, WIDTHS = ("omd", "funcbo", "mle", "vep"), ("3", "32")
QUICK = (
    "--trainer.max_steps 600 --trainer.val_check_interval 300 --data.init_steps 200 --data.batch_size 64 "
    "--model.seeds '[0,1]'"
)


def sweep(name: str, words: str, minutes: float, quick_minutes: float = 0.5) -> Run:
    """Return a sweep with eight seeds a cell."""
    return Run(
        name=name,
        commands=(f"sweep {CONFIG} {words} --run.variant {name}",),
        folder=f"bilevel/{name}",
        seeds="0 to 7",
        minutes=minutes,
        quick=QUICK,
        quick_minutes=quick_minutes,
    )


WIDE = "--grid.model.model_hidden_dim '[3,32]'"
AGENT_SWEEP = Run(
    name="agents",
    commands=(f"sweep {CONFIG} --grid.model.agent '[omd,funcbo,mle,vep]' {WIDE}",),
    folder="bilevel/control-sweep",
    seeds="0 to 7",
    minutes=40,
    quick=QUICK,
    quick_minutes=1.5,
)
FOUR_OMD = sweep("four_omd", f"--grid.model.agent '[omd]' {WIDE} --model.solver.num_q_steps 4", 20)
FOUR = sweep("four", "--grid.model.agent '[funcbo,mle]' --grid.model.solver.num_q_steps '[4]'", 20)
METRICS = ("return", "td_error", "model_error", "reward_error")


def agent(at: Folders, name: str, width: str) -> Content:
    """Return a cell of the sweep over agents."""
    return results(at["agents"] / f"agent={name},model_hidden_dim={width}", "test")


def agents_table(at: Folders) -> str:
    """Return every agent at either width."""
    rows = []
    for width in WIDTHS:
        for name in AGENTS:
            r = agent(at, name, width)
            rows.append([name, width, *(spread(values(r, m)) for m in METRICS)])
    if random := r["references"].get("random actions"):
        rows.append(["random actions", "", figures_of(random["return"], 3), "", "", ""])
    return table("agent | model width | return | d - y | next state | reward", rows)


def four(at: Folders, name: str, width: str = "32") -> Content:
    """Return a run with four inner steps."""
    if name == "omd":
        return results(at["four_omd"] / f"agent=omd,model_hidden_dim={width}", "test")
    return results(at["four"] / f"agent={name},num_q_steps=4", "test")


def returned(r: Content) -> str:
    """Write the return."""
    return spread(values(r, "return"))


def returns_p(pairs: Sequence[tuple[Content, Content]], which: int) -> str:
    """Write the p-value of one paired difference of returns among several, adjusted by Holm."""
    return short(f"{adjusted(difference(a, b, 'return') for a, b in pairs)[which]:.2g}")


def of_four(which: int) -> Callable[[Folders], str]:
    """Return what writes a p-value with four inner steps: mle's gain, its lead on funcbo, on omd; of those three."""

    def write(at: Folders) -> str:
        mle = four(at, "mle")
        return returns_p([(mle, agent(at, "mle", "32")), (mle, four(at, "funcbo")), (mle, four(at, "omd"))], which)

    return write


RECIPE = Recipe(
    name="control",
    runs=(AGENT_SWEEP, FOUR_OMD, FOUR),
    figures=entries(["agents"], {"bilevel_agents": "comparison/agents.png"}),
    tables=entries(["agents"], {"control.agents": agents_table}),
    numbers=(
        *entries(
            ["agents"],
            {
                "control.funcbo32.return": lambda at: returned(agent(at, "funcbo", "32")),
                "control.funcbo32.state": lambda at: spread(values(agent(at, "funcbo", "32"), "model_error")),
                "control.mle32.return": lambda at: returned(agent(at, "mle", "32")),
                "control.mle32.state": lambda at: spread_to(values(agent(at, "mle", "32"), "model_error"), 4),
            },
        ),
        *entries(["four_omd", "agents"], {"control.four.omd": lambda at: returned(four(at, "omd"))}),
        *entries(
            ["four", "agents"],
            {
                "control.four.mle.short": lambda at: spread_to(values(four(at, "mle"), "return"), 0),
                "control.four.funcbo": lambda at: returned(four(at, "funcbo")),
            },
        ),
        *entries(["four", "four_omd", "agents"], {"control.four.mle_omd.p": of_four(2)}),
    ),
)
