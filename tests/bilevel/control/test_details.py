"""The differences between the forms one by one: each stepped by hand, alone; all of them are the published form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import pytest
import torch

from lightning_toys.bilevel import BilevelControl
from lightning_toys.bilevel.control.agents import half_squared_error, mle_loss
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.settings import FORMS, Details, Form, Solver, form_label
from lightning_toys.bilevel.control.updates import ValueEquivalence, make_agent
from tests.bilevel.control.test_agents import VALUE, batch_of, gradients
from tests.bilevel.control.test_cli import QUIET, SMALL
from tests.bilevel.control.test_updates import adams, d_of, fill, move, nets_of, same, y_of
from tests.conftest import Runner

NAMES = [f.name for f in fields(Details)]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_presets_and_details() -> None:
    assert Details().of("ours") == FORMS["ours"] == Form()
    assert Details().of("published") == FORMS["published"]
    assert {f.name for f in fields(Form)} == {*NAMES, "fresh_moments"}
    for name in NAMES:
        for form in ("ours", "published"):
            for value in (True, False):
                found = asdict(Details(**{name: value}).of(form))
                assert found == asdict(FORMS[form]) | {name: value}
    assert form_label("ours", Details(orthogonal=False)) == ""
    assert form_label("ours", Details(fresh_batches=True)) == ", fresh batches"
    kept = dict(BilevelControl(form="published", details=Details(vep_sum=False)).hparams)
    again = BilevelControl(**kept)
    assert again.form == Details(vep_sum=False).of("published")
    assert again.label.endswith(", published form, not vep sum")


@pytest.mark.parametrize("agent", ["omd", "mle", "vep"])
def test_all_of_them_are_the_published_form(agent: str) -> None:
    """With the moments begun anew, which is `solver.warm_opt`."""
    every = Details(**dict.fromkeys(NAMES, True)).of("ours")
    by_parts = Solver(num_q_steps=2, num_t_steps=2, warm_start=False, warm_opt=agent != "omd")
    whole = Solver(num_q_steps=2, num_t_steps=2, warm_start=False)
    out = []
    for solver, form in ((by_parts, every), (whole, FORMS["published"]), (whole, FORMS["ours"])):
        nets = nets_of(agent, solver, form)
        learner, adam = Learner(nets, agent, solver, VALUE, 0.1, form=form), adams(nets)
        for k in range(2):
            learner.environment_step(lambda j, k=k: batch_of(10 * k + j), *adam)  # type: ignore[misc]
        out.append(nets)
    assert same(out[0], out[1], 0)
    assert not torch.equal(out[0].q.w0, out[2].q.w0)


def run(agent: str, solver: Solver, form: Form) -> tuple[AgentNetworks, AgentNetworks, Any]:
    """Two steps of the environment; the networks, others with the same first weights, and their optimisers."""
    found, hand = (nets_of(agent, solver, form) for _ in range(2))
    learner, adam = Learner(found, agent, solver, VALUE, 0.1, form=form), adams(found)
    for step in range(2):
        learner.environment_step(lambda k, step=step: batch_of(10 * step + k), *adam)  # type: ignore[misc]
    return found, hand, adams(hand)


@pytest.mark.parametrize("agent", ["mle", "model_free"])
def test_a_target_that_moves_at_each_step_alone(agent: str) -> None:
    """Two steps of the values on one batch; the second one's targets are those of the moved target values."""
    found, hand, (outer, inner) = run(agent, Solver(num_q_steps=2), Details(target_each_step=True).of("ours"))
    for step in range(2):
        b = batch_of(10 * step)
        if agent == "mle":
            fill(outer, mle_loss(hand.model(b.observation, b.action), b), hand.model)
        for _ in range(2):
            fill(inner, half_squared_error(d_of(hand, b), y_of(hand, b, agent == "mle").detach()), hand.q)
            move(hand, 0.1)
    assert same(found, hand)


def test_fresh_batches_alone() -> None:
    """A batch for each step of model and values; the target moves once."""
    solver = Solver(num_q_steps=2, num_t_steps=2)
    found, hand, (outer, inner) = run("mle", solver, Details(fresh_batches=True).of("ours"))
    for step in range(2):
        for k in range(2):
            b = batch_of(10 * step + k)
            fill(outer, mle_loss(hand.model(b.observation, b.action), b), hand.model)
        for k in (2, 3):
            b = batch_of(10 * step + k)
            fill(inner, half_squared_error(d_of(hand, b), y_of(hand, b, True).detach()), hand.q)
        move(hand, 0.1)
    assert same(found, hand)


@pytest.mark.parametrize("agent", ["mle", "model_free", "omd", "vaml", "lagged"])
@pytest.mark.parametrize("cold", [True, False])
def test_a_cold_start_of_the_target_alone(agent: str, cold: bool) -> None:
    """The first values go into the target too, and the targets are those of it; of the model's gradient as well."""
    solver, form = Solver(num_q_steps=2, warm_start=False), Details(cold_target=cold).of("ours")
    found, hand, (outer, inner) = run(agent, solver, form)
    for step in range(2):
        b = batch_of(10 * step)
        if agent == "mle":
            fill(outer, mle_loss(hand.model(b.observation, b.action), b), hand.model)
        hand.q.load_state_dict(hand.start.state_dict())  # type: ignore[union-attr]
        if cold:
            hand.target.load_state_dict(hand.start.state_dict())  # type: ignore[union-attr]
        y = y_of(hand, b, agent != "model_free").detach()
        for _ in range(2):
            fill(inner, half_squared_error(d_of(hand, b), y), hand.q)
        if agent not in ("mle", "model_free"):  # a problem that remembers nothing
            learner = Learner(hand, agent, solver, VALUE, 0.1, form=form)
            problem = learner.problem(b)
            gradient, _ = learner.model_gradient(problem, problem.model_targets())
            assert gradient is not None
            for n, p in hand.model.named_parameters():
                p.grad = gradient[n]
            outer.step()
        move(hand, 0.1)
    assert same(found, hand)


def test_moments_begun_anew_alone() -> None:
    solver = Solver(warm_opt=False)
    found, hand, (outer, inner) = run("mle", solver, FORMS["ours"])
    for step in range(2):
        b = batch_of(10 * step)
        fill(outer, mle_loss(hand.model(b.observation, b.action), b), hand.model)
        inner.state.clear()
        fill(inner, half_squared_error(d_of(hand, b), y_of(hand, b, True).detach()), hand.q)
        move(hand, 0.1)
    assert same(found, hand)


def test_networks_alone() -> None:
    made = {n: AgentNetworks([3], 3, 2, 5, 4, 2, "vep", Solver(), Details(**{n: True}).of("ours")) for n in NAMES}
    eye = torch.eye(2)
    for name, nets in made.items():
        orthogonal = torch.allclose(nets.q.w2.mT @ nets.q.w2, 1e-4 * eye, atol=1e-12)
        assert orthogonal == (name == "orthogonal")
        assert hasattr(nets.model, "reward") == (name == "separate_reward")
    for name in NAMES:
        method = make_agent("vep", Solver(), Details(**{name: True}).of("ours"))
        assert isinstance(method, ValueEquivalence)
        assert method.summed == (name == "vep_sum")
    nets, b = nets_of("vep", Solver(vep_values=3)), batch_of()
    values, prediction = nets.get_submodule("values"), nets.model(b.observation, b.action)
    off = values(prediction.next_state) - values(b.next_observation)
    expected = gradients(off.square().mean((2, 3)).sum(1) + (prediction.reward - b.reward).square().mean(1), nets.model)
    form = Details(vep_sum=True).of("ours")
    learner = Learner(nets, "vep", Solver(vep_values=3), VALUE, 0.1, form=form)
    found, _ = learner.model_gradient(learner.problem(b))
    assert found is not None
    assert all(torch.allclose(found[n], expected[n], atol=1e-13) for n in expected)


@pytest.fixture
def control(runner: Runner) -> Runner:
    torch.set_default_dtype(torch.float32)
    return Runner(runner.root, runner.capture, "bilevel", (*SMALL, *QUIET, "--trainer.max_steps", "60"))


def test_sampled_evaluation_alone(control: Runner) -> None:
    """What evaluations of the same weights play."""
    import json

    flags = ("--model.alpha", "1", "--model.agent", "mle", "--model.test_episodes", "20")
    control.ok("fit", "control", *flags)
    found = []
    for value in ("false", "true"):
        more = ("--model.details.sampled_evaluation", value, "--ckpt_path", "last")
        control.ok("test", "control", *flags, *more)
        found.append(json.loads((control.folder("control") / "results.json").read_text()))
    assert found[0]["metrics"]["return"]["values"] != found[1]["metrics"]["return"]["values"]
    assert found[1]["label"] == "mle, model width 4, sampled evaluation"


def test_what_a_detail_cannot_do_is_said(control: Runner) -> None:
    err = control.ok("fit", "control", "--model.agent", "omd", "--model.details.vep_sum", "true")
    assert "--model.details.vep_sum" in err
    err = control.ok("fit", "control", "--model.details.cold_target", "true", "--trainer.max_steps", "20")
    assert "--model.details.cold_target" in err
    code, err = control.code("fit", "control", "--model.details.orthogonal", "maybe")
    assert code == 2
    assert err.count("\n") == 1
