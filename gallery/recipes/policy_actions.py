"""generative_policy, by many actions of each seed: short runs, the ablation, fresh seeds, and ways to add noise."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gallery.read import (
    Content,
    Make,
    between,
    difference,
    entries,
    estimate,
    estimates,
    paired,
    ratio,
    results,
    seeds_in_words,
    short,
    table,
    values,
)
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.bandit import CONFIG, difference_table
from gallery.recipes.policy_modes import GAUSSIAN
from gallery.running import TABLE
from lightning_toys.stats import PairedDifference

DPI = 110
KEPT = ("shares.json", TABLE)  # beside results, of runs that gallery/shares.py measures
CHANGES = {
    "shipped": "",
    "independent": "--data.coupling Independent",
    "edm": "--model.form edm",
    "conditional": "--model.tangent conditional",
}
ABLATION = {
    name: Run(
        name=f"ablation_{name}",
        commands=(
            f"fit {CONFIG}/meanflow.yaml --trainer.max_steps 5000 {words}".strip(),
            "-m gallery.shares --samples 500000",
        ),
        folder=f"generative_policy/ablation/{name}",
        seeds="0 to 3",
        minutes=4,
        quick=None,
        keeps=True,
        files=KEPT,
    )
    for name, words in CHANGES.items()
}


def fresh(name: str, config: str, words: str, readouts: str, minutes: float) -> Run:
    """Return a run of a frozen recipe with seeds and samples that no choice was made by."""
    fit = f"fit {CONFIG}/{config}.yaml --model.seeds '[10,11,12,13]' {words}".strip()
    folder = f"generative_policy/fresh/{name}"
    commands = (fit, f"-m gallery.shares {readouts}")
    files = (*KEPT, "samples/step_*.npy")
    return Run(f"fresh_{name}", commands, folder, "10 to 13", minutes, quick=None, keeps=True, files=files)


def short_run(name: str, words: str) -> Run:
    """Return a run of 2000 steps, evaluated by averaged and by raw weights."""
    fit = f"fit {CONFIG}/meanflow.yaml --trainer.max_steps 2000 {words}".strip()
    check = "-m gallery.shares --weights ema raw --samples 200000"
    folder = f"generative_policy/gallery/{name}"
    return Run(name, (fit, check), folder, "0 to 3", 2, quick=None, keeps=True, files=KEPT)


SHORT = short_run("short_run", "")
SHORT_CONSTANT = short_run("short_run_constant", "--model.ema_warmup false")
EIGHT = "--data.target EightGaussians"
ONE = "--readouts 1 2 noise --samples 200000"
EULER = "--readouts euler-8 log-8 euler-16 log-16 --samples 50000"
FRESH = fresh("three", "meanflow", "", ONE, 14)
FRESH_EIGHT = fresh("eight", "meanflow", EIGHT, ONE, 14)
FRESH_FLOW = fresh("flow", "flow", "", EULER, 10)
DECONVOLVED = fresh(
    "deconvolved", "meanflow", "--model.target_std_as deconvolved", "--readouts 1 2 --samples 200000", 14
)


def of_actions(at: Folders, run: Run, label: str) -> Content:
    """Return what gallery/shares.py measured of a run, in the form of results.

    ``entropy_gap`` is the k-NN entropy less the target's, and ``entropy_error`` its absolute value.
    """
    from lightning_toys.generative_policy import EightGaussians, ThreeModes

    found = json.loads((at[run.name] / "shares.json").read_text())
    row = dict(found["rows"][label])
    exact = (EightGaussians() if EIGHT in run.commands[0] else ThreeModes()).entropy()
    row["entropy_gap"] = [v - exact for v in row["entropy_knn"]]
    row["entropy_error"] = [abs(v) for v in row["entropy_gap"]]
    return {"seeds": found["seeds"], "metrics": {name: {"values": v} for name, v in row.items()}}


SHARES = {
    "tv": "TV",
    "off5": "off 5 sd",
    "off10": "off 10 sd",
    "off3": "off 3 sd",
    "entropy_gap": "entropy minus target's",
}
SHARES_HEAD = " | ".join(SHARES.values())


def short_table(at: Folders) -> str:
    """Return 2000 steps by averaged and by raw weights, with the warmed up decay and the constant one."""
    rows = []
    for label, run in {"warmed up": SHORT, "constant": SHORT_CONSTANT}.items():
        for kind, readout in {"averaged": "1", "last step's": "1 raw"}.items():
            rows.append([label, kind, *estimates(of_actions(at, run, readout), *SHARES)])
    return table(f"decay of the average | weights | {SHARES_HEAD}", rows, left=2)


def averaged_minus_raw(run: Run) -> Make:
    """Return what writes how much more of the actions averaged weights leave beyond 3 sd than the raw ones."""
    return lambda at: paired(of_actions(at, run, "1"), of_actions(at, run, "1 raw"), "off3")


def ablation_table(at: Folders) -> str:
    """Return one change at a time."""
    rows = [
        [f"`{CHANGES[name]}`" if CHANGES[name] else "as shipped", *estimates(of_actions(at, run, "1"), *SHARES)]
        for name, run in ABLATION.items()
    ]
    rows.append(["reference: as many of the target's own", f"{target_tv(at, ABLATION['shipped']):.5f}", *["-"] * 4])
    return table(f"after 5000 steps | {SHARES_HEAD}", rows)


def ablation_questions(at: Folders) -> str:
    """Return what each change adds to the error of the mode weights and to the share beyond 5 sd: one family."""
    base = of_actions(at, ABLATION["shipped"], "1")
    return difference_table(
        "with the change minus as shipped",
        {
            f"`{CHANGES[name]}`: {SHARES[metric]}": difference(of_actions(at, run, "1"), base, metric)
            for metric in ("tv", "off5")
            for name, run in ABLATION.items()
            if CHANGES[name]
        },
    )


def tv_ratio(at: Folders) -> str:
    """Write how many times the error of the mode weights is what it is with optimal transport, and its interval."""
    return ratio(of_actions(at, ABLATION["independent"], "1"), of_actions(at, ABLATION["shipped"], "1"), "tv")


FROZEN = {
    "three modes: SMFP, one step": (FRESH, "1"),
    "three modes: SMFP, two steps": (FRESH, "2"),
    "three modes: flow, 8 even Euler steps": (FRESH_FLOW, "euler-8"),
    "three modes: flow, 8 logarithmic": (FRESH_FLOW, "log-8"),
    "three modes: flow, 16 even": (FRESH_FLOW, "euler-16"),
    "three modes: flow, 16 logarithmic": (FRESH_FLOW, "log-16"),
}
EIGHT_FROZEN = {
    "eight Gaussians: SMFP, one step": (FRESH_EIGHT, "1"),
    "eight Gaussians: SMFP, two steps": (FRESH_EIGHT, "2"),
}


def frozen_table(rows: Mapping[str, tuple[Run, str]]) -> Make:
    """Return what writes the frozen recipes on fresh seeds."""
    return lambda at: table(
        f"seeds 10 to 13 | {SHARES_HEAD}",
        [[label, *estimates(of_actions(at, *of), *SHARES)] for label, of in rows.items()],
    )


def frozen_questions(at: Folders) -> str:
    """Return whether one step has the target's entropy, and what logarithmic times change of the flow: one family."""

    def from_target(run: Run, label: str) -> PairedDifference:
        found = of_actions(at, run, label)
        zero = {"seeds": found["seeds"], "metrics": {"entropy_gap": {"values": [0.0] * len(found["seeds"])}}}
        return difference(found, zero, "entropy_gap")

    asked = {
        "three modes: SMFP's entropy minus the target's": from_target(FRESH, "1"),
        "eight Gaussians: SMFP's entropy minus the target's": from_target(FRESH_EIGHT, "1"),
    }
    for n in (8, 16):
        even, logarithmic = (of_actions(at, FRESH_FLOW, f"{kind}-{n}") for kind in ("euler", "log"))
        for metric, name in {"off5": "off 5 sd", "entropy_error": "error of the entropy"}.items():
            asked[f"flow, {n} steps: {name}, logarithmic minus even"] = difference(logarithmic, even, metric)
    one, eight = of_actions(at, FRESH, "1"), of_actions(at, FRESH_FLOW, "log-8")
    asked["off 5 sd: SMFP by one step minus flow by 8 logarithmic"] = difference(one, eight, "off5")
    return difference_table("difference", asked)


def level(run: Run, label: str, metric: str) -> Make:
    """Return what writes a metric's mean over seeds and its interval."""
    return lambda at: short(estimate(of_actions(at, run, label), metric))


def entropy_gap(run: Run) -> Make:
    """Return what writes one step's entropy minus the target's."""
    return level(run, "1", "entropy_gap")


def target_tv(at: Folders, run: Run) -> float:
    """Return the total variation that as many of the target's own samples have."""
    return float(json.loads((at[run.name] / "shares.json").read_text())["target"]["tv"])


NOISES = {
    "`head`, as shipped": (FRESH, "1"),
    "the same map, noise of the likeliest width": (FRESH, "noise"),
    "`deconvolved`": (DECONVOLVED, "1"),
}


# measured with the same command, and not among the questions
EIGHT_NOISES = {
    "eight Gaussians: `head`, as shipped": (FRESH_EIGHT, "1"),
    "eight Gaussians: noise of the likeliest width": (FRESH_EIGHT, "noise"),
}


def noise_table(at: Folders) -> str:
    """Return the ways to add noise."""
    rows = []
    for label, of in (NOISES | EIGHT_NOISES).items():
        found = of_actions(at, *of)
        width = between(values(found, "width"), 3) if "width" in found["metrics"] else ".01"
        rows.append([label, width, *estimates(found, *SHARES)])
    return table(f"noise | its width | {SHARES_HEAD}", rows)


def noise_questions(at: Folders) -> str:
    """Return what the other two change against the head: one family."""
    (_, head), *others = ((label, of_actions(at, *of)) for label, of in NOISES.items())
    return difference_table(
        "difference",
        {
            f"{label} minus `head`: {name}": difference(found, head, metric)
            for label, found in others
            for metric, name in {"off5": "off 5 sd", "entropy_error": "error of the entropy"}.items()
        },
    )


def by_step(at: Folders) -> str:
    """Draw the one-step policy's actions by training step."""
    from lightning_toys.generative_policy import ThreeModes
    from lightning_toys.generative_policy.figures import draw_by_step, read_snapshots

    path = at[FRESH.name] / "by_step.png"
    draw_by_step(ThreeModes(), read_snapshots(at[FRESH.name]), "SMFP, one step").savefig(path, dpi=DPI)
    return str(path)


def side_by_side(at: Folders) -> str:
    """Draw one seed of each policy beside the others."""
    from lightning_toys.generative_policy import MixtureData, ThreeModes
    from lightning_toys.generative_policy.figures import draw_side_by_side, read_snapshots, results_in_words

    runs = {"Gaussian": at[GAUSSIAN.name], "SMFP, one step": at[FRESH.name], "flow, 8 steps": at[FRESH_FLOW.name]}
    snapshots = {label: read_snapshots(folder) for label, folder in runs.items()}
    last = {label: found[max(found)] for label, found in snapshots.items()}
    # all three have the shipped target; what is kept of a run has no config.yaml
    data = dict.fromkeys(runs, MixtureData(ThreeModes()))
    numbers = {label: results_in_words(results(folder, "fit")) for label, folder in runs.items()}
    path = at[FRESH.name] / "side_by_side.png"
    draw_side_by_side(last, data, numbers).savefig(path, dpi=DPI)
    return str(path)


RECIPE = Recipe(
    name="policy_actions",
    runs=(SHORT, SHORT_CONSTANT, *ABLATION.values(), FRESH, DECONVOLVED, FRESH_FLOW, FRESH_EIGHT),
    figures=(
        *entries([FRESH.name], {"meanflow_by_step": by_step}),
        *entries([FRESH.name, GAUSSIAN.name, FRESH_FLOW.name], {"policies_side_by_side": side_by_side}),
    ),
    tables=(
        *entries(
            [run.name for run in ABLATION.values()],
            {"policy.ablation": ablation_table, "policy.ablation.differences": ablation_questions},
        ),
        *entries([SHORT.name, SHORT_CONSTANT.name], {"policy.short": short_table}),
        *entries([FRESH.name, FRESH_FLOW.name], {"policy.fresh": frozen_table(FROZEN)}),
        *entries([FRESH_EIGHT.name], {"policy.fresh.eight": frozen_table(EIGHT_FROZEN)}),
        *entries([FRESH.name, FRESH_FLOW.name, FRESH_EIGHT.name], {"policy.fresh.differences": frozen_questions}),
        *entries([FRESH.name, DECONVOLVED.name, FRESH_EIGHT.name], {"policy.noise": noise_table}),
        *entries([FRESH.name, DECONVOLVED.name], {"policy.noise.differences": noise_questions}),
    ),
    numbers=(
        *entries([SHORT.name], {"policy.short.difference": averaged_minus_raw(SHORT)}),
        *entries([SHORT_CONSTANT.name], {"policy.short.constant": averaged_minus_raw(SHORT_CONSTANT)}),
        *entries([run.name for run in ABLATION.values()], {"policy.ablation.ratio": tv_ratio}),
        *entries(
            [FRESH.name],
            {
                "policy.fresh.entropy": entropy_gap(FRESH),
                "policy.fresh.target_tv": lambda at: short(f"{target_tv(at, FRESH):.4f}"),
                **{f"policy.fresh.{m}": level(FRESH, "1", m) for m in ("tv", "off5", "off10")},
                "policy.fresh.tv.seeds": lambda at: seeds_in_words(values(of_actions(at, FRESH, "1"), "tv"), 4),
                "policy.fresh.likeliest": level(FRESH, "noise", "entropy_gap"),
            },
        ),
        *entries([FRESH_EIGHT.name], {"policy.fresh.likeliest.eight": level(FRESH_EIGHT, "noise", "entropy_gap")}),
        *entries([FRESH_EIGHT.name], {"policy.fresh.entropy.eight": entropy_gap(FRESH_EIGHT)}),
        *entries(
            [FRESH.name, DECONVOLVED.name],
            {
                "policy.noise.deconvolved": lambda at: paired(
                    of_actions(at, DECONVOLVED, "1"), of_actions(at, FRESH, "1"), "entropy_error"
                )
            },
        ),
    ),
)
