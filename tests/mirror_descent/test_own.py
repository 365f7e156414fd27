"""Samplers, rules and rewards from outside the package: run, judged and drawn like the shipped ones; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent import LearnedSampling, LinearGaussian, TiltedSampling
from lightning_toys.mirror_descent.joint import NoiseLevel
from lightning_toys.mirror_descent.tilt import Quadratic, Reward
from tests.conftest import REPO, Runner

SMALL = (
    *("--model.seeds", "[0,1]", "--model.sweep_max_refresh", "0", "--figures.dpi", "30"),
    *("--model.chains", "20000", "--model.settings.predictor_K", "40"),
)


@pytest.fixture
def mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    for name in ("own_sampler", "own_rule"):
        shutil.copy(REPO / "docs" / "examples" / "own_classes" / f"{name}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Runner(tmp_path / "logs", capsys, "mirror_descent", SMALL)


def code_lines(name: str) -> int:
    """Lines of a class, without blank ones and docstrings."""
    text = (REPO / "docs" / "examples" / "own_classes" / f"{name}.py").read_text()
    body = text[text.index("class ") :].splitlines()[1:]
    return len([line for line in body if line.strip() and '"""' not in line])


@pytest.mark.slow  # tests/docs has own samplers in the gate
def test_examples_are_judged_and_drawn(mirror: Runner) -> None:
    chosen = (
        "[own_sampler.RandomWalk, {class_path: own_sampler.RandomWalk, init_args: {step: 0.7, steps: 90}},"
        " {class_path: Predictor, init_args: {rule: own_rule.Delayed, process: ode}}, pc_mala]"
    )
    code, err = mirror.code("test", "analytic", "--model.samplers", chosen)
    assert code == 2
    assert "'RandomWalk' is not allowed twice" in err
    chosen = chosen.replace("own_sampler.RandomWalk, {", "{", 1)
    err = mirror.ok("test", "analytic", "--model.samplers", chosen)
    folder = mirror.folder("analytic")
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    verdicts = found["arrays"]["verdicts"]
    assert set(verdicts) == {"RandomWalk", "ode_Delayed", "pc_mala"}
    # the walk's distribution is not known, but it is the target's
    assert (verdicts["RandomWalk"]["implementation"], verdicts["RandomWalk"]["goal"]) == ("not tested", "agrees")
    # the rule's is, and is not
    assert (verdicts["ode_Delayed"]["implementation"], verdicts["ode_Delayed"]["goal"]) == ("agrees", "differs")
    assert found["metrics"]["joint_kl@RandomWalk"]["mean"] < 1e-3 < found["metrics"]["joint_kl@ode_Delayed"]["mean"]
    assert found["metrics"]["evaluations@RandomWalk"]["mean"] == 1 + 91 + 91 + 1
    names = {p.name for p in (folder / "figures").iterdir()}
    assert {"match_RandomWalk.png", "match_ode_Delayed.png", "frontier.png"} <= names
    assert "| RandomWalk | not tested | agrees |" in err
    assert code_lines("own_sampler") <= 15
    assert code_lines("own_rule") <= 5


REFUSED = [
    ("[own_sampler.RandomWork]", "'own_sampler' has no class 'RandomWork'; did you mean 'RandomWalk'?"),
    ("[nowhere.Walk]", "no module 'nowhere'"),
    ("[own_rule.Delayed]", "it is no Sampler, which has draw and cost"),
    ("[lightning_toys.mirror_descent.Sampler]", "abstract"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_refusals(mirror: Runner, given: str, says: str) -> None:
    code, err = mirror.code("test", "analytic", "--model.samplers", given)
    assert code == 2, err
    assert says in err
    assert err.count("\n") == 1
    assert not mirror.root.exists()


class Convex(Reward):
    """Rewards actions far from 0: no integral once lambda is 1 or more."""

    def action_value(self, level: NoiseLevel) -> Quadratic:
        return Quadratic(-1.0, 0.0, 0.0)


class FourthPower(Reward):
    """No quadratic."""

    def action_value(self, level: NoiseLevel) -> Any:
        return lambda a: -(a**4)


def test_rewards_that_closed_forms_lack_are_refused_before_drawing() -> None:
    for reward, says in ((Convex(), "has no integral (precision 0)"), (FourthPower(), "need a Quadratic(A, b, const)")):
        with pytest.raises(ToyError, match=r"--model\.reward") as caught:
            TiltedSampling(reward=reward, samplers=["importance"]).measure(LinearGaussian())
        assert says in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    fine = TiltedSampling(reward=Convex(), samplers=["mala"], lambda_scale=0.5)
    pairs = fine.sample("mala", 20000, LinearGaussian())
    assert float(pairs[..., 0].var()) == pytest.approx(2.0, rel=0.05)  # precision 1 - .5


def test_classes_from_python_and_in_a_checkpoint(mirror: Runner, tmp_path: Path) -> None:
    from own_sampler import RandomWalk  # type: ignore[import-not-found]

    module = LearnedSampling(seeds=[0], samplers=[RandomWalk, "mala"])
    assert module.sampler_names == ["RandomWalk", "mala"]
    assert module.hparams["samplers"] == [{"class_path": "own_sampler.RandomWalk"}, "mala"]
    with pytest.raises(ToyError, match=r"the checkpoint was made with own_sampler\.RandomWalk; give it"):
        LearnedSampling(**{**module.hparams, "seeds": [0]})
    again = LearnedSampling(**{**module.hparams, "samplers": [RandomWalk, "mala"]})
    assert again.hparams["samplers"] == module.hparams["samplers"]
    a = TiltedSampling(samplers=[RandomWalk]).sample("RandomWalk", 30000, LinearGaussian(mu_a=50.0))
    assert torch.isfinite(a).all()
