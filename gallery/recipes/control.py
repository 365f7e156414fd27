"""bilevel's control: what must a model of the world get right?"""

from __future__ import annotations

from gallery.read import Content, Make, entries, paired, results, spread, spread_to, table, values
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
STOPPED = sweep("stopped", f"--model.agent funcbo {WIDE} --model.solver.state_gradient false", 10)
LAGGED = sweep(
    "lagged", "--model.agent funcbo --grid.model.model_hidden_dim '[3]' --model.solver.inner_value lagged", 5
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
    return table("agent | model width | return | d - y | next state | reward", rows)


def four(at: Folders, name: str, width: str = "32") -> Content:
    """Return a run with four inner steps."""
    if name == "omd":
        return results(at["four_omd"] / f"agent=omd,model_hidden_dim={width}", "test")
    return results(at["four"] / f"agent={name},num_q_steps=4", "test")


def returned(r: Content) -> str:
    """Write the return."""
    return spread(values(r, "return"))


def behind(a: tuple[str, str], b: tuple[str, str]) -> Make:
    """Return what writes a difference of returns of the sweep, paired by seed."""
    return lambda at: paired(agent(at, *a), agent(at, *b), "return")


def more(at: Folders, name: str, width: str = "32") -> str:
    """Write how much four inner steps add."""
    return paired(four(at, name, width), agent(at, name, width), "return")


RECIPE = Recipe(
    name="control",
    runs=(AGENT_SWEEP, FOUR_OMD, FOUR, STOPPED, LAGGED),
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
                "control.funcbo_mle.3": behind(("funcbo", "3"), ("mle", "3")),
                "control.funcbo_mle.32": behind(("funcbo", "32"), ("mle", "32")),
                "control.omd_mle.32": behind(("omd", "32"), ("mle", "32")),
                "control.vep_mle.32": behind(("vep", "32"), ("mle", "32")),
                # adjusted over comparisons that were chosen by hand
                **dict.fromkeys(["control.omd_mle.32.p", "control.vep_mle.32.p"]),
            },
        ),
        *entries(
            ["four_omd", "agents"],
            {
                "control.four.omd.3": lambda at: returned(four(at, "omd", "3")),
                "control.four.omd.3.more": lambda at: more(at, "omd", "3"),
                "control.four.omd": lambda at: returned(four(at, "omd")),
                "control.four.omd.more": lambda at: more(at, "omd"),
                **dict.fromkeys(["control.four.omd.3.p", "control.four.omd.p"]),
            },
        ),
        *entries(
            ["four", "agents"],
            {
                "control.four.mle": lambda at: returned(four(at, "mle")),
                "control.four.mle.short": lambda at: spread_to(values(four(at, "mle"), "return"), 0),
                "control.four.mle.more": lambda at: more(at, "mle"),
                "control.four.funcbo": lambda at: returned(four(at, "funcbo")),
                "control.four.mle_funcbo": lambda at: paired(four(at, "mle"), four(at, "funcbo"), "return"),
                **dict.fromkeys(["control.four.mle.p", "control.four.mle_funcbo.p"]),
            },
        ),
        *entries(
            ["four", "four_omd"],
            {
                "control.four.mle_omd": lambda at: paired(four(at, "mle"), four(at, "omd"), "return"),
                "control.four.mle_omd.p": None,
            },
        ),
        *entries(
            ["stopped", "agents"],
            {
                f"control.stopped.{w}{more}": stopped
                for w in WIDTHS
                for more, stopped in (
                    ("", lambda at, w=w: returned(results(at["stopped"] / f"model_hidden_dim={w}", "test"))),
                    (
                        ".more",
                        lambda at, w=w: paired(
                            agent(at, "funcbo", w), results(at["stopped"] / f"model_hidden_dim={w}", "test"), "return"
                        ),
                    ),
                )
            }
            | {"control.stopped.p": None},
        ),
        *entries(
            ["lagged"], {"control.lagged.3": lambda at: returned(results(at["lagged"] / "model_hidden_dim=3", "test"))}
        ),
    ),
)
