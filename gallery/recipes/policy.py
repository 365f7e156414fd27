"""generative_policy: which policies can act in many ways at once, and in one step?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gallery.read import (
    Content,
    Make,
    adjusted,
    between,
    csv_rows,
    difference,
    entries,
    fixed,
    paired,
    ratio,
    results,
    short,
    spread,
    spread_to,
    table,
    values,
)
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.bandit import difference_table
from gallery.running import TABLE
from gallery.verdicts import p_words
from lightning_toys.stats import PairedDifference, format_estimate, holm, mean_ci

QUICK = "--trainer.max_steps 300 --model.seeds '[0,1]' --model.evaluation.samples 3000"
CONFIG = "-c configs/generative_policy"
KEPT = ("shares.json", TABLE)  # beside results, of runs that gallery/shares.py measures
STDS = {"0.0": "0", "0.001": ".001", "0.01": ".01", "0.1": ".1"}
CHANGES = {
    "shipped": "",
    "independent": "--data.coupling Independent",
    "edm": "--model.form edm",
    "conditional": "--model.tangent conditional",
}

TARGET_STD = Run(
    name="target_std",
    commands=(f"sweep {CONFIG}/meanflow.yaml --grid.model.target_std '[0.01,0.0,0.001,0.1]'",),
    folder="generative_policy/meanflow-sweep",
    seeds="0 to 3",
    minutes=85,
    quick=QUICK,
    quick_minutes=2,
)
FLOW = Run(
    name="policy_flow",
    commands=(f"fit {CONFIG}/flow.yaml", f"test {CONFIG}/flow.yaml"),
    folder="generative_policy/gallery/flow",
    seeds="0 to 3",
    minutes=20,
    quick=QUICK,
    quick_minutes=1,
)
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
    return Run(f"fresh_{name}", commands, folder, "10 to 13", minutes, quick=None, keeps=True, files=KEPT)


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
EDM = Run(
    name="edm",
    commands=(f"fit {CONFIG}/meanflow.yaml --model.form edm --model.target_std 0.006",),
    folder="generative_policy/gallery/edm",
    seeds="0 to 3",
    minutes=21,
    quick=QUICK,
)
GAUSSIAN = Run(
    name="gaussian",
    commands=(f"fit {CONFIG}/gaussian.yaml",),
    folder="generative_policy/gallery/gaussian",
    seeds="0 to 63",
    minutes=8,
    quick="--trainer.max_steps 3000 --model.seeds '[0,1,2,3,4,5,6,7]' --model.lr 0.003",
)
PLACES = "--data.target Mixture --data.target.means '[[0,0.5],[-0.5,-0.5],[0.5,-0.5]]' --data.target.stds 0.02"
WEIGHTS = {"as_shipped": "[1.4,1.2,1]", "turned": "[1,1.2,1.4]", "equal": "[1,1,1]"}
PERMUTED = {
    name: Run(
        name=f"gaussian_{name}",
        commands=(f"fit {CONFIG}/gaussian.yaml --trainer.max_steps 10000 {PLACES} --data.target.weights '{weights}'",),
        folder=f"generative_policy/gaussian-weights/{name}",
        seeds="0 to 63",
        minutes=4,
        quick=None,
        keeps=True,
    )
    for name, weights in WEIGHTS.items()
}
SIXTEEN = "[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]"
MIXTURE = (
    f"fit {CONFIG}/flow.yaml --model docs.examples.own.my_policy.MixturePolicy --model.components 3"
    f" --model.seeds '{SIXTEEN}' --data.coupling Independent --trainer.max_steps 10000"
)
CLASSES = {
    "gaussian_forward": f"fit {CONFIG}/gaussian.yaml --model.divergence forward_kl --model.seeds '{SIXTEEN}'"
    " --model.lr 0.003 --trainer.max_steps 10000",
    "mixture_reverse": f"{MIXTURE} --model.divergence reverse_kl",
    "mixture_forward": f"{MIXTURE} --model.divergence forward_kl",
}
BY_CLASS = {
    name: Run(name, (words,), f"generative_policy/classes/{name}", "0 to 15", 3, quick=None, keeps=True)
    for name, words in CLASSES.items()
}
PENDULUM = Run(
    name="pendulum",
    commands=("-m docs.examples.pendulum",),
    folder="generative_policy/gallery/pendulum",
    seeds="0 to 3",
    minutes=10,
    quick=None,
    needs="gymnasium",
    keeps=True,
    files=KEPT,
)
BANDIT = Run(
    name="bandit",
    commands=(f"sweep {CONFIG}/bandit.yaml --grid.model.policy '[gaussian,meanflow,flow]'",),
    folder="generative_policy/bandit-sweep",
    seeds="0 to 7",
    minutes=12,
    quick="--trainer.max_steps 300 --model.seeds '[0,1]' --trainer.val_check_interval 100",
    quick_minutes=1,
)


def words(r: Content, *metrics: str) -> list[str]:
    """Write metrics with their intervals; those that a run lacks as a dash."""
    found = [values(r, m) if m in r["metrics"] else [] for m in metrics]
    return ["0" if v and not any(v) else format_estimate(mean_ci(v)) if v else "-" for v in found]


def cell(at: Folders, std: str) -> Content:
    """Return a test of the sweep over target_std."""
    return results(at["target_std"] / f"target_std={std}", "test")


def shipped(at: Folders) -> Content:
    """Return the test of the shipped recipe: the sweep's cell with the configuration's own target_std."""
    return cell(at, "0.01")


def reference(r: Content, name: str, metric: str, digits: int) -> str:
    """Write a reference row's metric, or a dash."""
    value = r["references"].get(name, {}).get(metric)
    return "-" if value is None else f"{value:.{digits}f}"


def target_std_table(at: Folders) -> str:
    """Return one step by target_std, and what needs no network."""
    metrics = ("tv", "off3", "off5", "entropy_knn", "entropy_exact", "entropy_surrogate")
    rows = []
    for std, label in STDS.items():
        r = cell(at, std)
        row = words(r, *metrics)
        row[4], row[5] = (row[4], "-") if label == "0" else ("-", row[5])
        rows.append([label, str(len(r["seeds"])), *row])
    r = cell(at, "0.01")
    for name in ("target", "exact_flow_8", "exact_flow_64"):
        cells = [reference(r, name, m, d) for m, d in zip(metrics[:5], (4, 4, 5, 3, 3), strict=True)]
        rows.append([f"reference: {name}", "", *cells, "-"])
    head = "target_std | seeds | TV | off 3 sd | off 5 sd | entropy, k-NN | exact | surrogate"
    return table(head, rows).replace("|  |", "| |")


def steps_table(r: Content, readouts: dict[str, str], head: str) -> str:
    """Return the measures by readout of one checkpoint."""
    rows = []
    for label, readout in readouts.items():
        rows.append([label, *words(r, *(f"{m}{readout}" for m in ("tv", "off3", "off5", "entropy_knn")))])
    return table(f"{head} | TV | off 3 sd | off 5 sd | entropy, k-NN", rows)


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
            rows.append([label, kind, *words(of_actions(at, run, readout), *SHARES)])
    return table(f"decay of the average | weights | {SHARES_HEAD}", rows, left=2)


def averaged_minus_raw(run: Run) -> Make:
    """Return what writes how much more of the actions averaged weights leave beyond 3 sd than the raw ones."""
    return lambda at: paired(of_actions(at, run, "1"), of_actions(at, run, "1 raw"), "off3")


def ablation_table(at: Folders) -> str:
    """Return one change at a time."""
    rows = [
        [f"`{CHANGES[name]}`" if CHANGES[name] else "as shipped", *words(of_actions(at, run, "1"), *SHARES)]
        for name, run in ABLATION.items()
    ]
    shipped_run = json.loads((at[ABLATION["shipped"].name] / "shares.json").read_text())
    rows.append(["reference: as many of the target's own", f"{shipped_run['target']['tv']:.5f}", *["-"] * 4])
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
        [[label, *words(of_actions(at, *of), *SHARES)] for label, of in rows.items()],
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


NOISES = {
    "`head`, as shipped": (FRESH, "1"),
    "the same map, noise of the likeliest width": (FRESH, "noise"),
    "`deconvolved`": (DECONVOLVED, "1"),
}


def noise_table(at: Folders) -> str:
    """Return the ways to add noise."""
    rows = []
    for label, of in NOISES.items():
        found = of_actions(at, *of)
        width = between(values(found, "width"), 3) if "width" in found["metrics"] else ".01"
        rows.append([label, width, *words(found, *SHARES)])
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


TARGET_WEIGHTS = (1.4 / 3.6, 1.2 / 3.6, 1.0 / 3.6)


def kept_modes(r: Content) -> list[int]:
    """Return how many modes each seed keeps: those with at least half of their weight; none if most actions are off."""
    each = zip(*(values(r, f"weight_mode{i}") for i in range(3)), strict=True)
    counts = [sum(x >= w / 2 for x, w in zip(found, TARGET_WEIGHTS, strict=True)) for found in each]
    return [0 if off > 0.5 else n for n, off in zip(counts, values(r, "off5"), strict=True)]


def kept_in_words(at: Folders, name: str) -> str:
    """Write how many seeds keep three modes, two and one."""
    kept = kept_modes(results(at[name]))
    return f"{kept.count(3)}, {kept.count(2)} and {kept.count(1)} of {len(kept)}"


def classes_table(at: Folders) -> str:
    """Return policy classes by the divergence that they are fitted by."""
    runs = {
        ("Gaussian", "reverse KL"): PERMUTED["as_shipped"],
        ("Gaussian", "maximum likelihood"): BY_CLASS["gaussian_forward"],
        ("mixture of three", "reverse KL"): BY_CLASS["mixture_reverse"],
        ("mixture of three", "maximum likelihood"): BY_CLASS["mixture_forward"],
    }
    rows = []
    for (policy, divergence), run in runs.items():
        r = results(at[run.name])
        kept = kept_modes(r)
        by_count = ", ".join(f"{kept.count(n)} keep {n}" for n in sorted(set(kept)))
        rows.append([policy, divergence, str(len(kept)), by_count, *words(r, "tv", "off5", "off10")])
    return table("policy | fitted by | seeds | modes | TV | off 5 sd | off 10 sd", rows, left=2)


def counts_of(at: Folders, name: str) -> list[int]:
    """Return on which mode how many seeds of a Gaussian settle."""
    r = results(at[PERMUTED[name].name])
    return [int(sum(values(r, f"chose_mode{i}"))) for i in range(3)]


def counts_in_words(name: str) -> Make:
    """Return what writes how many seeds settle on each mode."""
    return lambda at: "{}, {} and {}".format(*counts_of(at, name))


def same_mode(at: Folders) -> str:
    """Write how many seeds end on the same mode with the weights turned as with equal ones."""
    turned, equal = (results(at[PERMUTED[name].name]) for name in ("turned", "equal"))
    each = [zip(*(values(r, f"chose_mode{i}") for i in range(3)), strict=True) for r in (turned, equal)]
    same = [x == y for x, y in zip(*each, strict=True)]
    return f"{sum(same)} of {len(same)}"


def weights_table(at: Folders) -> str:
    """Return on which mode the Gaussian settles, by the modes' weights, and a test against these weights."""
    from scipy.stats import chisquare

    found, p = [], []
    for name in PERMUTED:
        weights = [float(w) for w in WEIGHTS[name].strip("[]").split(",")]
        counts = counts_of(at, name)
        found.append([" : ".join(f"{w:g}" for w in weights), *map(str, counts)])
        p.append(float(chisquare(counts, [w / sum(weights) * sum(counts) for w in weights]).pvalue))
    rows = [[*row, p_words(x)] for row, x in zip(found, holm(p), strict=True)]
    places = " | ".join(f"at ({x})" for x in ("0, .5", "-.5, -.5", ".5, -.5"))
    return table(f"weights | {places} | p of counts in proportion to the weights (Holm)", rows)


def gaussian_table(at: Folders) -> str:
    """Return how many seeds settled on each mode, and at which divergence."""
    import math

    from scipy.stats import binomtest

    r = results(at["gaussian"])
    rows = []
    n, weights = len(r["seeds"]), [w / 3.6 for w in (1.4, 1.2, 1.0)]
    for i, w in enumerate(weights):
        chose = values(r, f"chose_mode{i}")
        k = int(sum(chose))
        ci = binomtest(k, n).proportion_ci(method="wilson")
        share = f"{fixed(k / n, 3)} ({fixed(ci.low, 3)} to {fixed(ci.high, 3)})"
        kl = [x for x, c in zip(values(r, "kl"), chose, strict=True) if c]
        end = fixed(mean_ci(kl).mean, 4) if kl else "-"
        rows.append([str(i), fixed(w, 3), str(k), share, end, fixed(-math.log(w), 4)])
    return table("mode | weight | seeds | share (95 % Wilson) | KL at the end | -log w", rows)


def bandit_table(at: Folders) -> str:
    """Return each policy's regret, paired with the Gaussian's."""
    labels = {"gaussian": "SAC Gaussian", "meanflow": "SMFP, one step", "flow": "flow, 8 Euler steps"}
    found = {n: bandit(at, n) for n in labels}
    against = {n: difference(found[n], found["gaussian"], "regret") for n in ("meanflow", "flow")}
    p = dict(zip(against, adjusted(against.values()), strict=True))
    rows = []
    for name, label in labels.items():
        row = [label, *words(found[name], "regret")]
        if name in against:
            row += [format_estimate(against[name].estimate), short(f"{p[name]:.1g}")]
        rows.append(row if name in against else [*row, "", ""])
    uniform = found["gaussian"]["references"]["uniform"]["regret"]
    rows += [["reference: uniform actions", f"{uniform:.3f}", "", ""]]
    rows += [["reference: top of the second, third hill", "0.1, 0.2", "", ""]]
    return table("policy | regret | minus the Gaussian's, paired | p (Holm)", rows).replace("|  |  |", "| | |")


def bandit(at: Folders, policy: str) -> Content:
    """Return a policy's results."""
    return results(at["bandit"] / f"policy={policy}")


def regrets(at: Folders, policy: str) -> list[float]:
    """Return each seed's regret."""
    return values(bandit(at, policy), "regret")


def early(folder: Path, step: int) -> float:
    """Return the mean regret of the last validation up to a step."""
    rows = [r for r in csv_rows(folder / "metrics.csv") if r.get("eval/regret") and int(r["step"]) <= step]
    return float(rows[-1]["eval/regret"])


def seeds_in_words(found: list[float]) -> str:
    """Write one number a seed."""
    each = [fixed(x, 3) for x in found]
    return f"{', '.join(each[:-1])} and {each[-1]}"


def meanflow(metric: str, digits: int) -> Make:
    """Return what writes the mean of a metric of the shipped recipe."""
    return lambda at: fixed(mean_ci(values(shipped(at), metric)).mean, digits)


def target(metric: str, digits: int) -> Make:
    """Return what writes a metric of a sample of the target itself."""
    return lambda at: fixed(shipped(at)["references"]["target"][metric], digits)


def side_by_side(at: Folders) -> str:
    """Draw one seed of each policy beside the others."""
    from lightning_toys.generative_policy.figures import compare_figures

    runs = {"Gaussian": at["gaussian"]}
    runs |= {f"SMFP, target_std {label}": at["target_std"] / f"target_std={s}" for s, label in list(STDS.items())[1:]}
    runs["flow, 8 steps"] = at["policy_flow"]
    path = at["target_std"] / "side_by_side.png"
    compare_figures(runs)["samples_side_by_side"].savefig(path, dpi=110)
    return str(path)


STEPS = {"1": "", **{str(n): f"@{n}" for n in (2, 4, 8, 16, 32, 64)}}
FLOW_STEPS = {"1 (Euler)": "@euler-1", **{str(n): f"@euler-{n}" for n in (2, 4, 8, 64)}, "dopri5": "@dopri5"}

RECIPE = Recipe(
    name="policy",
    runs=(
        TARGET_STD,
        FLOW,
        EDM,
        GAUSSIAN,
        BANDIT,
        SHORT,
        SHORT_CONSTANT,
        *ABLATION.values(),
        *BY_CLASS.values(),
        *PERMUTED.values(),
        PENDULUM,
        FRESH,
        DECONVOLVED,
        FRESH_FLOW,
        FRESH_EIGHT,
    ),
    figures=(
        *entries(
            ["target_std"],
            {f"meanflow_{n}": f"target_std=0.01/figures/{n}.png" for n in ("samples", "by_step")},
        ),
        *entries(["target_std", "gaussian", "policy_flow"], {"policies_side_by_side": side_by_side}),
        *entries(["gaussian"], {"gaussian_modes_chosen": "figures/modes_chosen.png"}),
        *entries(["bandit"], {"bandit_regret": "comparison/regret_curves.png"}),
    ),
    tables=(
        *entries(
            ["target_std"],
            {
                "policy.target_std": target_std_table,
                "policy.steps": lambda at: steps_table(shipped(at), STEPS, "steps"),
            },
        ),
        *entries(
            ["policy_flow"],
            {
                "policy.flow_steps": lambda at: steps_table(
                    results(at["policy_flow"], "test"), FLOW_STEPS, "flow, network evaluations"
                )
            },
        ),
        *entries(
            [run.name for run in ABLATION.values()],
            {"policy.ablation": ablation_table, "policy.ablation.differences": ablation_questions},
        ),
        *entries([SHORT.name, SHORT_CONSTANT.name], {"policy.short": short_table}),
        *entries([FRESH.name, FRESH_FLOW.name], {"policy.fresh": frozen_table(FROZEN)}),
        *entries([FRESH_EIGHT.name], {"policy.fresh.eight": frozen_table(EIGHT_FROZEN)}),
        *entries([FRESH.name, FRESH_FLOW.name, FRESH_EIGHT.name], {"policy.fresh.differences": frozen_questions}),
        *entries(
            [FRESH.name, DECONVOLVED.name], {"policy.noise": noise_table, "policy.noise.differences": noise_questions}
        ),
        *entries(
            [PERMUTED["as_shipped"].name, *(run.name for run in BY_CLASS.values())], {"policy.classes": classes_table}
        ),
        *entries([run.name for run in PERMUTED.values()], {"policy.weights": weights_table}),
        *entries([PENDULUM.name], {"policy.pendulum": lambda at: (at[PENDULUM.name] / TABLE).read_text().strip()}),
        *entries(["gaussian"], {"policy.gaussian_modes": gaussian_table}),
        *entries(["bandit"], {"policy.bandit": bandit_table}),
    ),
    numbers=(
        *entries(
            ["target_std"],
            {
                "policy.tv": lambda at: spread_to(values(shipped(at), "tv"), 3),
                "policy.off3": lambda at: spread_to(values(shipped(at), "off3"), 3),
                "policy.off5": lambda at: spread(values(shipped(at), "off5")),
                "policy.off5.mean": meanflow("off5", 4),
                "policy.off3.two": meanflow("off3@2", 3),
                "policy.off3.64": meanflow("off3@64", 3),
                "policy.entropy.two": meanflow("entropy_knn@2", 2),
                "policy.off3.seeds": lambda at: between(values(shipped(at), "off3"), 3),
                "policy.tv.seeds": lambda at: seeds_in_words(values(shipped(at), "tv")),
                "policy.target.tv": target("tv", 3),
                "policy.target.off3": target("off3", 3),
                "policy.target.off3.long": target("off3", 4),
                "policy.target.entropy": target("entropy_knn", 2),
                "policy.exact_flow": lambda at: fixed(shipped(at)["references"]["exact_flow_64"]["entropy_knn"], 2),
                "policy.entropy.none": lambda at: " and ".join(
                    fixed(mean_ci(values(cell(at, s), "entropy_knn")).mean, 1) for s in ("0.0", "0.001")
                ),
                "policy.surrogate": lambda at: between(
                    [
                        mean_ci(values(cell(at, s), "entropy_knn")).mean
                        - mean_ci(values(cell(at, s), "entropy_surrogate")).mean
                        for s in ("0.001", "0.01", "0.1")
                    ],
                    1,
                ),
            },
        ),
        *entries(
            ["policy_flow"],
            {
                "policy.flow.entropy": lambda at: format_estimate(
                    mean_ci(values(results(at["policy_flow"], "test"), "entropy_exact@dopri5"))
                ),
                "policy.flow.kl": lambda at: spread(values(results(at["policy_flow"], "test"), "kl_forward@dopri5")),
                "policy.flow.off3": lambda at: fixed(
                    mean_ci(values(results(at["policy_flow"], "test"), "off3@euler-1")).mean, 2
                ),
            },
        ),
        *entries([SHORT.name], {"policy.short.difference": averaged_minus_raw(SHORT)}),
        *entries([SHORT_CONSTANT.name], {"policy.short.constant": averaged_minus_raw(SHORT_CONSTANT)}),
        *entries([run.name for run in ABLATION.values()], {"policy.ablation.ratio": tv_ratio}),
        *entries([PERMUTED["turned"].name], {"policy.weights.turned": counts_in_words("turned")}),
        *entries([PERMUTED["equal"].name], {"policy.weights.equal": counts_in_words("equal")}),
        *entries([PERMUTED[n].name for n in ("turned", "equal")], {"policy.weights.same": same_mode}),
        *entries(["mixture_reverse"], {"policy.mixture.kept": lambda at: kept_in_words(at, "mixture_reverse")}),
        *entries(
            ["edm"],
            {
                "policy.edm.off3": lambda at: spread(values(results(at["edm"]), "off3")),
                "policy.edm.entropy": lambda at: spread(values(results(at["edm"]), "entropy_knn")),
            },
        ),
        *entries(
            ["gaussian"],
            {
                "gaussian.kl": lambda at: fixed(max(values(results(at["gaussian"]), "kl_gap")), 4),
                "gaussian.tv": lambda at: spread(values(results(at["gaussian"]), "tv")),
            },
        ),
        *entries(
            ["bandit"],
            {
                "bandit.gaussian.second": lambda at: fixed(mean_ci(sorted(regrets(at, "gaussian"))[1:]).mean, 2),
                "bandit.gaussian.first": lambda at: fixed(min(regrets(at, "gaussian")), 3),
                "bandit.flow.early": lambda at: fixed(early(at["bandit"] / "policy=flow", 600), 2),
                "bandit.flow_meanflow": lambda at: paired(bandit(at, "flow"), bandit(at, "meanflow"), "regret"),
                "bandit.flow.end": lambda at: fixed(mean_ci(regrets(at, "flow")).mean, 2),
                "bandit.flow.seeds": lambda at: between(regrets(at, "flow"), 2),
            },
        ),
    ),
)
