"""Tables of runs tuned alike: what is chosen, what is compared with what, and how much of it is chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lightning_toys.bilevel.paired_table import Question, base_of, difference, main, parse
from lightning_toys.bilevel.tuned_runs import Key, Run, choice, chosen, groups, method_name
from lightning_toys.stats import holm
from tests.commands.compare.runs_of_others import WHOLE, a_run

SEEDS = [0, 1, 2, 100, 101]
RNG = np.random.default_rng(8)


def put(
    root: Path, name: str, values: list[float], settings: dict[str, Any], step: int = 500, unused: tuple[str, ...] = ()
) -> Path:
    """A run whose whole-stream loss is ten times that of its end."""
    metrics = {
        "outer_loss": {"values": values, "mean": float(np.mean(values))},
        "outer_loss_all": {"values": [10 * v for v in values], "mean": 10 * float(np.mean(values))},
        "local_regret": {"values": [v**3 for v in values], "mean": 1.0},
    }
    settings = {"model.inner_lr": 0.003, "data.noise": 1.0, "model.seeds": "[0]"} | settings
    content = WHOLE | {"seeds": SEEDS, "metrics": metrics, "settings": settings, "step": step, "unused": list(unused)}
    return a_run(root / name, content)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """funcbo at two rates, of which the one that the tuning seeds like is worse on the others; lag_1; two streams."""
    control = ("model.outer_lr",)
    for noise in (1.0, 3.0):
        put(
            tmp_path,
            f"slow{noise}",
            [5.0, 6.0, 8.0, 2.0, 2.0],
            {"model.algorithm": "funcbo", "model.outer_lr": 0.01, "data.noise": noise},
        )
        put(
            tmp_path,
            f"fast{noise}",
            [1.0, 1.5, 2.0, 3.0, 3.0],
            {"model.algorithm": "funcbo", "model.outer_lr": 0.1, "data.noise": noise},
        )
        put(
            tmp_path,
            f"lag{noise}",
            [noise, 4.0, 4.5, 9.0, 9.0],
            {"model.algorithm": "lag_1", "model.outer_lr": 0.03, "data.noise": noise},
            unused=control,
        )
    return tmp_path


def rows(text: str) -> list[list[str]]:
    return [[w.strip() for w in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_rates_are_chosen_on_other_seeds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--tune", "100,101", "--over", "lag_1", "--metrics", "outer_loss"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("**")] == ["**data.noise 1.0**", "**data.noise 3.0**"]
    found = [r for r in rows(text) if r[0] == "funcbo"]
    # the tuning seeds like 2.0 at .01 better than 3.0 at .1: what is better on the scored seeds is not looked at
    assert [r[1] for r in found] == ["outer_lr 0.01 (at the edge)"] * 2
    assert [r[-1] for r in found] == ["5, 6, 8"] * 2
    gaps = [np.array([5.0, 6, 8]) - [noise, 4.0, 4.5] for noise in (1.0, 3.0)]
    p = holm([float(scipy_stats.ttest_1samp(g, 0).pvalue) for g in gaps])
    for row, gap, adjusted in zip(found, gaps, p, strict=True):
        assert row[4].startswith(f"{gap.mean():.1f} ± ")
        assert f"(p = {adjusted:.2g}, " in row[4]
    assert "Holm over the 2 comparisons above" in text
    assert "least mean outer_loss of seeds 100, 101, which are not scored" in text
    assert [r[4] for r in rows(text) if r[0] == "lag_1"] == ["-", "-"]
    # two that are compared with are compared once
    assert main([str(runs), "--tune", "100,101", "--over", "lag_1,funcbo", "--metrics", "outer_loss"]) == 0
    text = capsys.readouterr().out
    assert "Holm over the 2 comparisons above" in text
    assert [r[4:6] for r in rows(text) if r[0] == "lag_1"] == [["-", "-"]] * 2
    assert [r[5] for r in rows(text) if r[0] == "funcbo"] == ["-"] * 2
    # by whatever name they are called
    by_setting = "model.algorithm=lag_1,lag_1,model.algorithm=funcbo"
    assert main([str(runs), "--tune", "100,101", "--over", by_setting, "--metrics", "outer_loss"]) == 0
    text = capsys.readouterr().out
    assert "Holm over the 2 comparisons above" in text
    assert [[c == "-" for c in r[4:7]] for r in rows(text) if r[0] == "lag_1"] == [[True, True, True]] * 2
    assert [[c == "-" for c in r[4:7]] for r in rows(text) if r[0] == "funcbo"] == [[False, True, True]] * 2
    # more is better: the other rate
    assert main([str(runs), "--tune", "100,101", "--metrics", "outer_loss", "--maximize"]) == 0
    assert [r[1] for r in rows(capsys.readouterr().out) if r[0] == "funcbo"] == ["outer_lr 0.1 (at the edge)"] * 2


def test_ratios_and_the_other_metrics(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs), "--tune", "100,101", "--over", "lag_1", "--metrics", "outer_loss_all,local_regret"]
    assert main(words) == 0
    text = capsys.readouterr().out
    whole, regret = (next(r for r in rows(text) if r[0] == "funcbo" and r[2] == m) for m in words[-1].split(","))
    assert whole[3].startswith("63 ± ")
    ratio = 5.0 * 6 * 8 / (1.0 * 4 * 4.5)  # the geometric mean of three cubes is their bases' product
    assert regret[4].startswith(f"x {ratio:.3g} (")
    assert "local_regret: geometric means and their ratios" in text
    assert "Holm over the 4 comparisons" in text


def test_the_same_method_with_another_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each smoothed run beside its own, not beside another algorithm's; a control has no smoothing."""
    for name in ("funcbo", "aid"):
        for n in (1, 10):
            values = [float(v) for v in RNG.uniform(1, 2, 5) + n + (50 if name == "aid" else 0)]
            put(tmp_path, f"{name}{n}", values, {"model.algorithm": name, "model.smoothing": n})
    put(tmp_path, "lag", [1.0, 2, 3, 4, 5], {"model.algorithm": "lag_1"}, unused=("model.smoothing",))
    assert main([str(tmp_path), "--over", "model.smoothing=1", "--metrics", "outer_loss"]) == 0
    found = {r[0]: r[4] for r in rows(capsys.readouterr().out)[1:]}
    assert set(found) == {
        "funcbo, smoothing 1",
        "funcbo, smoothing 10",
        "aid, smoothing 1",
        "aid, smoothing 10",
        "lag_1",
    }
    for name in ("funcbo", "aid"):
        assert found[f"{name}, smoothing 1"] == "-"
        assert 8 < float(found[f"{name}, smoothing 10"].split(" ")[0]) < 10
    assert found["lag_1"] == "-"


def test_a_difference_is_a_minus_b() -> None:
    a, b = ({s: float(v) for s, v in enumerate(RNG.normal(m, 1, 6))} for m in (3, 2))
    d = np.array(list(a.values())) - np.array(list(b.values()))
    found = difference(a, b)
    assert found is not None
    assert found.estimate.mean == pytest.approx(d.mean())
    assert found.p_value == pytest.approx(float(scipy_stats.ttest_rel(list(a.values()), list(b.values())).pvalue))
    apart = difference(a, b, unpaired=True)
    assert apart is not None
    welch = scipy_stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False)
    assert apart.p_value == pytest.approx(float(welch.pvalue))
    va, vb = (np.var(list(x.values()), ddof=1) / 6 for x in (a, b))
    dof = (va + vb) ** 2 / (va**2 / 5 + vb**2 / 5)
    half = float(scipy_stats.t.ppf(0.975, dof)) * np.sqrt(va + vb)
    assert apart.estimate.half_width == pytest.approx(half)
    x, y = ({s: float(np.exp(v)) for s, v in z.items()} for z in (a, b))
    for unpaired in (False, True):
        ratio = difference(x, y, True, unpaired)
        assert ratio is not None
        assert ratio.estimate.mean == pytest.approx(np.exp(d.mean()))
    assert difference(a | {0: float("nan")}, b) is None
    assert difference({0: 1.0, 1: -1.0}, {0: 1.0, 1: 2.0}, ratio=True) is None


def run(**settings: str) -> Run:
    return Run(Path(), {f"model.{k}": v for k, v in settings.items()}, {"m": {1: float(settings.get("value", "nan"))}})


def test_what_is_chosen() -> None:
    some = [run(value="nan"), run(value="3"), run(value="2")]
    assert chosen(some, "x", "m", [1]) is some[2]
    assert chosen(some, "x", "m", [1], maximize=True) is some[1]
    rates = [run(lr=v, value="1") for v in ("0.1", "0.3", "1.0")]
    assert [choice(r, rates, ["model.lr"]) for r in rates] == [
        "lr 0.1 (at the edge)",
        "lr 0.3",
        "lr 1.0 (at the edge)",
    ]
    assert choice(rates[0], rates[:1], ["model.lr"]) == "-"
    assert choice(run(w="[1]"), [run(w="[1]"), run(w="[1, 1]")], ["model.w"]) == "w [1]"


def test_groups_and_names() -> None:
    a, b, control = run(x="1", y="1"), run(x="2", y="1"), run(y="1")
    found = groups([a, b, control], ["model.x"])
    assert found == {("1",): [a, control], ("2",): [b, control]}
    assert groups([control], ["model.x"]) == {("*",): [control]}
    key = (("model.agent", "mine.RewardOnly"), ("model.solver.smoothing", "5"))
    assert method_name(key, []) == "RewardOnly"
    assert method_name(key, ["model.solver.smoothing"]) == "RewardOnly, smoothing 5"
    names: dict[Key, str] = {(("a", "1"),): "one", (("a", "2"),): "two"}
    assert base_of((("a", "2"),), "one", names) == (("a", "1"),)
    assert base_of((("a", "2"),), "a=1", names) == (("a", "1"),)
    assert base_of((("a", "1"),), "a=1", names) is None
    assert base_of((("a", "1"),), "a=3", names) is None
    question = parse(["x", "--over", "lag_1, optimum"])[1]
    assert isinstance(question, Question)
    assert question.over == ["lag_1", "optimum"]
    assert question.choose == "outer_loss_all"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--tune: 2 runs are funcbo ("),
        (("--tune", "100", "--over", "lag1"), "--over: 'lag1' is not allowed; give one of funcbo, lag_1"),
        (("--tune", "7"), "has no seed 7"),
        (("--tune", "0,1,2,100,101"), "has no other seed to be scored"),
        (("--tune", "x"), "--tune: 'x' is not allowed"),
        (("--tune", "100", "--metrics", "outer_los"), "did you mean 'outer_loss'?"),
        (("--tune", "100", "--rows", "model.algo"), "--rows: 'model.algo' is not allowed"),
    ],
)
def test_bad_input_is_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert main([str(runs), *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    a_run(tmp_path / "x", b"{")
    assert main([str(tmp_path)]) == 2
    assert "is no results.json of a run" in capsys.readouterr().err
