"""Samplers, rules and rewards from outside the package: run, judged and drawn like the shipped ones; refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent import (
    ActionValue,
    Cost,
    Draws,
    GaussianMixture,
    LearnedSampling,
    LinearGaussian,
    MixtureSampling,
    Predictor,
    QuadraticReward,
    Sampler,
    Settings,
    TiltedSampling,
)
from lightning_toys.mirror_descent.annealed import PCMALA, PCULA
from lightning_toys.mirror_descent.guidance import Unguided
from lightning_toys.mirror_descent.joint import NoiseLevel
from lightning_toys.mirror_descent.kernels import Noise
from lightning_toys.mirror_descent.samplers import ULA
from lightning_toys.mirror_descent.schedules import Linear, Schedule
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


class Lost(Sampler):
    """Draws of q, but for one in the second block, which is the second seed's."""

    blocks = 0
    wrong: Any = float("nan")

    def draw(self, noise: Noise) -> Draws:
        model, clean = self.problem.model, self.problem.joint.clean
        a = model.draw_action(noise, clean)
        s = model.draw_state(noise, clean, a)
        return self.spoilt(a[0] if a.dim() == 2 else a, s, noise)

    def spoilt(self, a: torch.Tensor, s: torch.Tensor, noise: Noise) -> Draws:
        self.blocks += 1
        if self.blocks == 2:
            a = a.clone()
            a[5] = self.wrong
        return Draws(a, s)

    def cost(self) -> Cost:
        return Cost(prior=1)


class Huge(Lost):
    wrong = 1e35


class Stuck(Lost):
    def spoilt(self, a: torch.Tensor, s: torch.Tensor, noise: Noise) -> Draws:
        return Draws(torch.zeros_like(a), s)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("Lost", "Lost ran away, 5e-05 of its draws of seed 1 are not finite or beyond 1e+30; give smaller steps"),
        ("Huge", "Huge ran away, 5e-05 of its draws of seed 1 are not finite or beyond 1e+30; give smaller steps"),
        ("Stuck", "Stuck draws actions that are all alike in seed 0, which have no distance to the target"),
    ],
)
@pytest.mark.parametrize("verb", ["test", "predict"])
def test_draws_of_any_sampler_that_are_none_are_refused(mirror: Runner, verb: str, kind: str, says: str) -> None:
    """Of the second one too, whose metrics are not those without a name."""
    chosen = f"[gibbs,tests.mirror_descent.test_own.{kind}]"
    code, err = mirror.code(verb, "analytic", "--model.samplers", chosen, "--figures.enabled", "false")
    assert code == 2, err
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(mirror.root.rglob("results.json"))


class Sometimes(PCMALA):
    """Runs away where a sweep leaves the refreshes out."""

    def draw(self, noise: Noise) -> Draws:
        out = super().draw(noise)
        return out if self.problem.settings.refresh_L else Draws(out.a.log(), out.s)


def test_a_point_of_a_sweep_that_ran_away_costs_no_other_result(mirror: Runner) -> None:
    flags = ("--model.samplers", "[tests.mirror_descent.test_own.Sometimes]", "--model.sweep_chains", "1000")
    err = mirror.ok("test", "analytic", *flags, "--model.sweep_max_refresh", "2", "--model.settings.K", "5")
    assert re.search(r"warning: Sometimes ran away in 0\.\d+ of its draws at 0 of the sweep, left out there", err)
    assert (mirror.folder("analytic") / "figures" / "kl_vs_refresh.png").is_file()


class Unruly(Lost):
    """What a sampler of somebody's own may get wrong; ``fault`` says what."""

    fault = ""

    def spoilt(self, a: torch.Tensor, s: torch.Tensor, noise: Noise) -> Draws:
        faults: dict[str, Any] = {
            "short": lambda: Draws(a[:7], s),
            "long": lambda: Draws(a, torch.stack([s.flatten()] * 2)),
            "numpy": lambda: Draws(a.numpy(), s),  # type: ignore[arg-type]
            "pair": lambda: (a, s),
            "raises": lambda: a[len(a) + 1],
            "trace": lambda: Draws(a, s, trace=a[None]),
        }
        out: Draws = faults[self.fault]()
        return out


class Free(Unruly):
    fault = "pair"

    def cost(self) -> Cost:
        return Cost()


class Broken(Lost):
    def __init__(self, problem: Any) -> None:
        raise KeyError("colour")


class Unmade(Lost):
    def __init__(self, problem: Any) -> None:
        pass


class Bare:
    """No subclass of Sampler."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    def draw(self, noise: Any) -> Any:
        raise NotImplementedError

    def cost(self) -> Cost:
        return Cost(prior=1)


UNRULY = [
    (type("Short", (Unruly,), {"fault": "short"}), "Short.draw: a is (7,) of one block of chains; give a tensor (32"),
    (type("Long", (Unruly,), {"fault": "long"}), "Long.draw: s is (2, 32768) of one block of chains; give a tensor"),
    (type("Numpy", (Unruly,), {"fault": "numpy"}), "Numpy.draw: a is ndarray of one block of chains; give a tensor"),
    (type("Pair", (Unruly,), {"fault": "pair"}), "Pair.draw gives tuple; give Draws(a, s)"),
    (type("Raises", (Unruly,), {"fault": "raises"}), "Raises.draw fails: IndexError: index 32769 is out of bounds"),
    (type("Trace", (Unruly,), {"fault": "trace"}), "Trace.draw: trace is (1, 32768) of one block of chains"),
    (Free, "Free.cost gives Cost(prior=0, score=0, value=0, refresh=0); give a Cost"),
    (Broken, "fails: KeyError: 'colour'"),
    (Unmade, "Unmade has no problem; call super().__init__(problem)"),
    (Bare, "gives Bare, which is no Sampler; give a subclass of it"),
]


@pytest.mark.parametrize(("kind", "says"), UNRULY, ids=[kind.__name__ for kind, _ in UNRULY])
@pytest.mark.parametrize("module", [TiltedSampling, MixtureSampling])
def test_samplers_that_break_the_contract_are_refused_before_drawing(module: Any, kind: Any, says: str) -> None:
    data: Any = LinearGaussian() if module is TiltedSampling else GaussianMixture()
    with pytest.raises(ToyError) as caught:
        module(samplers=["gibbs" if module is TiltedSampling else "mala", kind]).measure(data)
    assert says in str(caught.value)
    assert str(caught.value).startswith("--model.samplers: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_class_that_is_no_sampler_is_refused_by_its_path(mirror: Runner) -> None:
    path = "tests.mirror_descent.test_own.Bare"
    code, err = mirror.code("test", "analytic", "--model.samplers", f"[{path}]")
    assert code == 2, err
    assert f"'{path}' is not allowed; it is no Sampler, which has draw and cost; give a subclass" in err
    assert err.count("\n") == 1


class OwnRule(Unguided):
    """A rule of three coordinates, where there are two."""

    def affine_term(self, level: Any, beta: float) -> Any:
        _, g = super().affine_term(level, beta)
        return np.eye(3), g


def test_an_own_rule_is_tried_too() -> None:
    made = TiltedSampling(samplers=[lambda problem: Predictor(problem, "ode", OwnRule)])
    with pytest.raises(ToyError, match=r"^--model\.samplers: ode_OwnRule\.draw fails: "):
        made.measure(LinearGaussian())


def failing(*args: Any) -> Any:
    raise KeyError("colour")


def made(base: type, **given: Any) -> Any:
    return type("Mine", (base,), given)()


FAULTS: list[tuple[str, type, dict[str, Any], str]] = [
    ("schedule", Schedule, {}, "Mine.fraction fails: NotImplementedError"),
    ("schedule", Schedule, {"fraction": failing}, "Mine.fraction fails: KeyError: 'colour'"),
    ("schedule", Schedule, {"fraction": lambda *x: "all"}, "Mine.fraction at abar = 0.05 gives 'all'; give a finite"),
    ("schedule", Schedule, {"fraction": lambda *x: float("nan")}, "Mine.fraction at abar = 0.05 gives nan; give a"),
    ("schedule", Linear, {"final_steps": -1}, "Mine.final_steps: -1 is not allowed"),
    ("reward", Reward, {"action_value": failing, "value": failing}, "fails: KeyError: 'colour'"),
]


@pytest.mark.parametrize(("part", "base", "given", "says"), FAULTS)
@pytest.mark.parametrize("module", [TiltedSampling, MixtureSampling])
def test_schedules_and_rewards_that_fail(module: Any, part: str, base: type, given: dict[str, Any], says: str) -> None:
    data: Any = LinearGaussian() if module is TiltedSampling else GaussianMixture()
    with pytest.raises(ToyError) as caught:
        module(samplers=["mala"], **{part: made(base, **given)}).measure(data)
    assert str(caught.value).startswith(f"--model.{part}: Mine")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"value": lambda self, a: a}, "Mine.value of actions (1, 5) is (1, 5); give a tensor (5,)"),
        ({"value": lambda self, a: a.numpy()[0]}, "Mine.value of actions (1, 5) is ndarray; give a tensor (5,)"),
        ({"quadratic": lambda self, d: 3.0}, "Mine.quadratic gives float; give a QuadraticForm, or None"),
        ({"breakpoints": ["here"]}, "Mine.breakpoints fails: ValueError"),
        ({"curvature": -1.0}, "Mine.curvature: -1.0 is not allowed; give a number >= 0"),
    ],
)
def test_rewards_of_mixtures_that_break_the_contract(given: dict[str, Any], says: str) -> None:
    kind = made(Reward, **{"value": lambda self, a: -a[0].square(), **given})
    with pytest.raises(ToyError) as caught:
        MixtureSampling(samplers=["mala"], reward=kind).measure(GaussianMixture())
    assert str(caught.value).startswith("--model.reward: Mine.")
    assert says in str(caught.value)


class MyUla(ULA):
    """A subclass under another name."""


class MyAnnealedUla(PCULA):
    """A subclass under another name."""


@pytest.mark.parametrize("kind", [MyUla, MyAnnealedUla])
def test_steps_that_are_too_long_are_refused_of_subclasses_too(kind: Any) -> None:
    """At tau = 4 steps have to be below 1 / 2; of a mixture likewise."""
    settings = Settings(ula_step=0.6)
    with pytest.raises(ToyError, match=rf"ula_step: 0\.6 is not allowed here, {kind.__name__} would run away"):
        TiltedSampling(samplers=[kind], settings=settings).measure(LinearGaussian())
    with pytest.raises(ToyError, match=rf"ula_step: 6\.0 is not allowed here, {kind.__name__} may run away"):
        MixtureSampling(samplers=[kind], settings=Settings(ula_step=6.0)).measure(GaussianMixture())


def test_a_reward_with_lists_is_kept_in_a_checkpoint(mirror: Runner) -> None:
    """Fit, resume and test by the command line, and load: with the numbers that were given, and as ActionValue does."""
    reward = ("--model.reward", "QuadraticReward", "--model.reward.weights", "[0.8]", "--model.reward.optimum", "[0.7]")
    small = ("--model.network.hidden", "4", "--data.batch_size", "16", "--figures.enabled", "false")
    small += ("--model.samplers", "[pc_mala]", "--model.settings.K", "2", "--model.chains", "200")
    mirror.ok("fit", "learned", *small, *reward, "--trainer.max_steps", "2")
    mirror.ok("fit", "learned", *small, *reward, "--trainer.max_steps", "4", "--ckpt_path", "last")
    mirror.ok("test", "learned", *small, *reward, "--ckpt_path", "last")
    path = mirror.folder("learned") / "checkpoints" / "last.ckpt"
    loaded = LearnedSampling.load_from_checkpoint(path, weights_only=True)
    assert isinstance(loaded.reward, QuadraticReward)
    assert (loaded.reward.weights.tolist(), loaded.reward.optimum.tolist()) == ([0.8], [0.7])
    assert loaded.hparams["reward"] == {
        "class_path": "lightning_toys.mirror_descent.QuadraticReward",
        "init_args": {"weights": [0.8], "optimum": [0.7]},
    }
    same = LearnedSampling.load_from_checkpoint(path, weights_only=True, reward=ActionValue(0.8, 0.7))
    ours, theirs = (m.sample("pc_mala", 100, LinearGaussian(batch_size=16)) for m in (loaded, same))
    torch.testing.assert_close(ours, theirs)


def test_a_reward_of_two_actions_is_refused_where_there_is_one() -> None:
    module = TiltedSampling(reward=QuadraticReward([1.0, 1.0], [0.0, 0.0]), samplers=["mala"])
    with pytest.raises(ToyError, match=r"reward\.weights: 2 numbers are not allowed where actions have 1"):
        module.measure(LinearGaussian())
