"""bilevel's control: what must a model of the world get right?"""

from __future__ import annotations

from collections.abc import Sequence

from gallery.read import (
    Content,
    Make,
    adjusted,
    difference,
    entries,
    figures_of,
    paired,
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
STOPPED = sweep("stopped", f"--model.agent funcbo {WIDE} --model.solver.state_gradient false", 10)
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


def behind(a: tuple[str, str], b: tuple[str, str]) -> Make:
    """Return what writes a difference of returns of the sweep, paired by seed."""
    return lambda at: paired(agent(at, *a), agent(at, *b), "return")


AGAINST_MLE = [(a, w) for a in ("omd", "funcbo", "vep") for w in WIDTHS]


def returns_p(pairs: Sequence[tuple[Content, Content]], which: int) -> str:
    """Write the p-value of one paired difference of returns among several, adjusted by Holm."""
    return short(f"{adjusted(difference(a, b, 'return') for a, b in pairs)[which]:.2g}")


def behind_mle(name: str, width: str) -> Make:
    """Return what writes the p-value of an agent's difference from mle, adjusted over every agent and width."""
    which = AGAINST_MLE.index((name, width))
    return lambda at: returns_p([(agent(at, a, w), agent(at, "mle", w)) for a, w in AGAINST_MLE], which)


def more_omd(width: str) -> Make:
    """Return what writes the p-value of what four inner steps add to omd, adjusted over both widths."""
    return lambda at: returns_p([(four(at, "omd", w), agent(at, "omd", w)) for w in WIDTHS], WIDTHS.index(width))


def of_four(which: int) -> Make:
    """Return what writes a p-value with four inner steps: mle's gain, its lead on funcbo, on omd; of those three."""

    def write(at: Folders) -> str:
        mle = four(at, "mle")
        return returns_p([(mle, agent(at, "mle", "32")), (mle, four(at, "funcbo")), (mle, four(at, "omd"))], which)

    return write


def stopped_p(at: Folders) -> str:
    """Write the p-values of what the stopped gradient costs at each width, adjusted over both."""
    pairs = [(agent(at, "funcbo", w), results(at["stopped"] / f"model_hidden_dim={w}", "test")) for w in WIDTHS]
    return " and ".join(returns_p(pairs, i) for i in range(len(pairs)))


def more(at: Folders, name: str, width: str = "32") -> str:
    """Write how much four inner steps add."""
    return paired(four(at, name, width), agent(at, name, width), "return")


RECIPE = Recipe(
    name="control",
    runs=(AGENT_SWEEP, FOUR_OMD, FOUR, STOPPED),
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
                "control.omd_mle.32.p": behind_mle("omd", "32"),
                "control.vep_mle.32.p": behind_mle("vep", "32"),
            },
        ),
        *entries(
            ["four_omd", "agents"],
            {
                "control.four.omd.3": lambda at: returned(four(at, "omd", "3")),
                "control.four.omd.3.more": lambda at: more(at, "omd", "3"),
                "control.four.omd": lambda at: returned(four(at, "omd")),
                "control.four.omd.more": lambda at: more(at, "omd"),
                "control.four.omd.3.p": more_omd("3"),
                "control.four.omd.p": more_omd("32"),
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
            },
        ),
        *entries(
            ["four", "four_omd"],
            {"control.four.mle_omd": lambda at: paired(four(at, "mle"), four(at, "omd"), "return")},
        ),
        *entries(
            ["four", "four_omd", "agents"],
            {
                "control.four.mle.p": of_four(0),
                "control.four.mle_funcbo.p": of_four(1),
                "control.four.mle_omd.p": of_four(2),
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
            | {"control.stopped.p": stopped_p},
        ),
    ),
)
