"""generative_policy: which modes a policy keeps, by its class, its divergence, and where the modes lie."""

from __future__ import annotations

import math

from gallery.read import Content, Make, entries, estimates, fixed, results, spread, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.bandit import CONFIG
from gallery.verdicts import p_words
from lightning_toys.stats import NOT_NEGATIVE, holm, mean_ci

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
STRAYS = 0.1  # share beyond 5 sd from which on no mode counts as kept; a half, at first, lay amid four seeds' values
TARGET_WEIGHTS = (1.4 / 3.6, 1.2 / 3.6, 1.0 / 3.6)


def kept_modes(r: Content) -> list[int]:
    """Return how many modes each seed keeps: those with at least half of their weight; none if a tenth is off."""
    each = zip(*(values(r, f"weight_mode{i}") for i in range(3)), strict=True)
    counts = [sum(x >= w / 2 for x, w in zip(found, TARGET_WEIGHTS, strict=True)) for found in each]
    return [0 if off > STRAYS else n for n, off in zip(counts, values(r, "off5"), strict=True)]


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
        rows.append([policy, divergence, str(len(kept)), by_count, *estimates(r, "tv", "off5", "off10")])
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


RECIPE = Recipe(
    name="policy_modes",
    runs=(GAUSSIAN, *BY_CLASS.values(), *PERMUTED.values()),
    figures=entries([GAUSSIAN.name], {"gaussian_modes_chosen": "figures/modes_chosen.png"}),
    tables=(
        *entries(
            [PERMUTED["as_shipped"].name, *(run.name for run in BY_CLASS.values())], {"policy.classes": classes_table}
        ),
        *entries([run.name for run in PERMUTED.values()], {"policy.weights": weights_table}),
        *entries([GAUSSIAN.name], {"policy.gaussian_modes": gaussian_table}),
    ),
    numbers=(
        *entries([PERMUTED["turned"].name], {"policy.weights.turned": counts_in_words("turned")}),
        *entries([PERMUTED["equal"].name], {"policy.weights.equal": counts_in_words("equal")}),
        *entries([PERMUTED[n].name for n in ("turned", "equal")], {"policy.weights.same": same_mode}),
        *entries(["mixture_reverse"], {"policy.mixture.kept": lambda at: kept_in_words(at, "mixture_reverse")}),
        *entries(
            [GAUSSIAN.name],
            {
                "gaussian.kl": lambda at: fixed(max(values(results(at["gaussian"]), "kl_gap")), 4),
                "gaussian.tv": lambda at: spread(values(results(at["gaussian"]), "tv"), NOT_NEGATIVE),
            },
        ),
    ),
)
