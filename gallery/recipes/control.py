"""bilevel's control at one rate for all: the table from before rates were chosen (agents.py)."""

from __future__ import annotations

from gallery.read import Content, entries, figures_of, results, spread, table, values
from gallery.recipe import Folders, Recipe, Run

CONFIG = "-c configs/bilevel/control.yaml"
AGENTS, WIDTHS = ("omd", "funcbo", "mle", "vep"), ("3", "32")
QUICK = (
    "--trainer.max_steps 600 --trainer.val_check_interval 300 --data.init_steps 200 --data.batch_size 64 "
    "--model.seeds '[0,1]'"
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


RECIPE = Recipe(
    name="control",
    runs=(AGENT_SWEEP,),
    figures=entries(["agents"], {"bilevel_agents": "comparison/agents.png"}),
    tables=entries(["agents"], {"control.agents": agents_table}),
)
