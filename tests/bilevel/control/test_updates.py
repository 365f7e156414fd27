"""Agents as classes: the control without a model, vaml and its alias, the published form stepped by hand, one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.bilevel import BilevelControl
from lightning_toys.bilevel.control.agents import half_squared_error, mle_loss, q_of_actions
from lightning_toys.bilevel.control.episodes import SampledPolicy
from lightning_toys.bilevel.control.gymnasium_environments import make_environments
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.nets import MultiHeadMLP, keyed_orthogonal
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.control.settings import FORMS, Form, Solver
from lightning_toys.bilevel.control.world_model import WorldModel
from lightning_toys.errors import ToyError
from tests.bilevel.control.test_agents import ACTIONS, SEEDS, STATES, VALUE, batch_of, gradients
from tests.bilevel.control.test_cli import QUIET, SMALL
from tests.conftest import Runner

OWN = Path(__file__).parents[2] / "own_classes"
PUBLISHED = FORMS["published"]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def nets_of(agent: str, solver: Solver, form: Form = FORMS["ours"]) -> AgentNetworks:
    nets = AgentNetworks(SEEDS, STATES, ACTIONS, 5, 4, 2, agent, solver, form)
    g = torch.Generator().manual_seed(5)
    for p in nets.parameters():  # biases and last layers away from 0, the target away from the values
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return nets


def adams(nets: AgentNetworks) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    return torch.optim.Adam(nets.model.parameters(), 1e-2), torch.optim.Adam(nets.q.parameters(), 1e-2)


def fill(optimizer: torch.optim.Optimizer, losses: Tensor, net: torch.nn.Module) -> None:
    for p, g in zip(net.parameters(), gradients(losses, net).values(), strict=True):
        p.grad = g
    optimizer.step()


def same(a: torch.nn.Module, b: torch.nn.Module, atol: float = 1e-12) -> bool:
    return all(torch.allclose(p, q, atol=atol) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def value(nets: AgentNetworks, state: Tensor) -> Tensor:
    """V of the target values, from its definition."""
    return 0.1 * torch.logsumexp(nets.target(state).amin(1) / 0.1, -1)


def y_of(nets: AgentNetworks, batch: Batch, model: bool) -> Tensor:
    state, reward = batch.next_observation, batch.reward
    if model:
        state, reward = nets.model(batch.observation, batch.action)
    return reward + 0.9 * batch.not_terminated * value(nets, state)


def d_of(nets: AgentNetworks, batch: Batch) -> Tensor:
    return q_of_actions(nets.q(batch.observation), batch.action)


def move(nets: AgentNetworks, tau: float) -> None:
    for t, q in zip(nets.target.parameters(), nets.q.parameters(), strict=True):
        t.data = (1 - tau) * t.data + tau * q.data


# without a model


def test_without_a_model_the_values_learn_from_what_happened() -> None:
    """Stepped by hand with autograd; the model stays, and no error of it is told."""
    found, hand = (nets_of("model_free", Solver(num_q_steps=2)) for _ in range(2))
    learner, adam = Learner(found, "model_free", Solver(num_q_steps=2), VALUE, 0.1), adams(found)
    by_hand = adams(hand)[1]
    for k in range(3):
        loss = learner.environment_step(lambda _, k=k: batch_of(k), *adam)  # type: ignore[misc]
        y = y_of(hand, batch_of(k), False).detach()
        assert torch.allclose(loss, half_squared_error(d_of(hand, batch_of(k)), y))
        for _ in range(2):
            fill(by_hand, half_squared_error(d_of(hand, batch_of(k)), y), hand.q)
        move(hand, 0.1)
    assert same(found, hand)
    assert not adam[0].state
    assert set(learner.measure_errors(batch_of())) == {"td_error", "value"}
    error = d_of(hand, batch_of()) - y_of(hand, batch_of(), False).unsqueeze(1)
    assert torch.allclose(learner.measure_errors(batch_of())["td_error"], error.square().mean((1, 2)).sqrt())


def test_a_perfect_model_is_no_model() -> None:
    """Where the model's targets are those of what happened, mle's values are model_free's: it is the ceiling."""
    nets = [nets_of(a, Solver()) for a in ("mle", "model_free")]
    real = nets[0].model.forward(batch_of().observation, batch_of().action)
    true = batch_of()._replace(next_observation=real.next_state.detach(), reward=real.reward.detach())
    for n, agent in zip(nets, ("mle", "model_free"), strict=True):
        Learner(n, agent, Solver(), VALUE, 0.1).outer_iteration(true, *adams(n))
    assert same(nets[0].q, nets[1].q)
    nets[1].model.net.b2.data += 1  # and what the model says is not heard
    again = nets_of("model_free", Solver())
    again.model.net.b2.data += 1
    Learner(again, "model_free", Solver(), VALUE, 0.1).outer_iteration(true, *adams(again))
    assert same(again.q, nets[0].q)


# vaml


def test_vaml_is_funcbo_with_the_inner_problem_solved() -> None:
    out = []
    for agent, inner in (("vaml", "exact"), ("funcbo", "exact"), ("vaml", "lagged"), ("funcbo", "lagged")):
        solver = Solver(inner_value=inner)
        nets = nets_of(agent, solver)
        learner, adam = Learner(nets, agent, solver, VALUE, 0.1), adams(nets)
        for k in range(3):
            learner.outer_iteration(batch_of(k), *adam)
        out.append(nets)
    assert same(out[0], out[1], 0)
    assert same(out[0], out[2], 0)
    assert not same(out[0], out[3])


def test_vaml_is_a_loss_of_the_model_alone() -> None:
    """Its gradient is that of mean (y_T - y)^2, whatever the values are: no bilevel problem is left."""
    nets = nets_of("vaml", Solver())
    learner, batch = Learner(nets, "vaml", Solver(), VALUE, 0.1), batch_of()
    expected = gradients((y_of(nets, batch, True) - y_of(nets, batch, False)).square().mean(1), nets.model)
    for shift in (0.0, 1.0):
        nets.q.b2.data += shift
        problem = learner.problem(batch)
        found, _ = learner.model_gradient(problem, problem.model_targets())
        assert found is not None
        assert all(torch.allclose(found[n], expected[n], atol=1e-13) for n in expected)


# the published form


def test_first_weights_are_orthogonal() -> None:
    for shape in ((2, 7, 4), (2, 4, 7), (1, 5, 5)):
        w = keyed_orthogonal([3, 8], "test", shape, 1.5)
        narrow = w if shape[1] >= shape[2] else w.mT
        eye = torch.eye(min(shape[1:])).expand(2, shape[0], -1, -1)
        assert torch.allclose(narrow.mT @ narrow, 1.5**2 * eye, atol=1e-12)
        assert torch.equal(keyed_orthogonal([8], "test", shape, 1.5)[0], w[1])
        assert not torch.allclose(w[0], w[1])
    one = keyed_orthogonal(list(range(4000)), "test", (1, 1, 1), 1.0).detach()
    assert abs(float(one.mean())) < 0.1  # both signs: QR alone gives one
    net = MultiHeadMLP([0], "q", (4, 6, 6, 2), 2, orthogonal=True)
    assert torch.allclose(net.w2.mT @ net.w2, 1e-4 * torch.eye(2), atol=1e-15)
    assert torch.allclose(net.w1.mT @ net.w1, 2 * torch.eye(6), atol=1e-12)
    assert net.b0.abs().max() == net.b2.abs().max() == 0


def test_a_reward_network_of_its_own() -> None:
    """Prediction and reverse pass against autograd; nothing of the reward reaches the state's network."""
    model = WorldModel(SEEDS, STATES, ACTIONS, 4, True, True)
    batch = batch_of()
    found = model(batch.observation, batch.action)
    inputs = torch.cat([batch.observation, model.one_hot(batch.action, batch.observation)], -1)
    assert torch.allclose(found.next_state, model.net(inputs)[:, 0], atol=1e-15)
    assert torch.allclose(found.reward, model.reward(inputs)[:, 0, :, 0], atol=1e-15)
    g = torch.Generator().manual_seed(2)
    s, r = torch.randn(found.next_state.shape, generator=g), torch.randn(found.reward.shape, generator=g)
    expected = gradients((found.next_state * s).sum((1, 2)) + (found.reward * r).sum(1), model)
    given = model.vjp(model.forward_pass(inputs), s, r)
    assert list(given) == [n for n, _ in model.named_parameters()]
    assert all(torch.allclose(given[n], expected[n], atol=1e-13) for n in expected)
    still = model.vjp(model.forward_pass(inputs), 0 * s, r)
    assert max(float(v.abs().max()) for n, v in still.items() if n.startswith("net.")) == 0


def test_the_published_mle_by_hand() -> None:
    """num_t_steps of the model, then num_q_steps of the values, a fresh batch each; the target moves at each."""
    solver = Solver(num_t_steps=2, num_q_steps=3)
    found, hand = (nets_of("mle", solver, PUBLISHED) for _ in range(2))
    learner = Learner(found, "mle", solver, VALUE, 0.1, form=PUBLISHED)
    adam, (outer, inner) = adams(found), adams(hand)
    assert learner.batches == 5
    for step in range(2):
        learner.environment_step(lambda k, step=step: batch_of(10 * step + k), *adam)  # type: ignore[misc]
        for k in range(2):
            b = batch_of(10 * step + k)
            fill(outer, mle_loss(hand.model(b.observation, b.action), b), hand.model)
        for k in range(2, 5):
            b = batch_of(10 * step + k)
            fill(inner, half_squared_error(d_of(hand, b), y_of(hand, b, True).detach()), hand.q)
            move(hand, 0.1)
    assert same(found, hand)


@pytest.mark.parametrize("warm", [True, False])
def test_the_published_omd_by_hand(warm: bool) -> None:
    """Adam begins anew, the target moves at each step, and the gradient (by double backward) is at the moved one."""
    solver = Solver(num_t_steps=4, num_q_steps=2, warm_start=warm)
    found, hand = (nets_of("omd", solver, PUBLISHED) for _ in range(2))
    learner = Learner(found, "omd", solver, VALUE, 0.1, form=PUBLISHED)
    adam, (outer, inner) = adams(found), adams(hand)
    assert learner.batches == 1
    for k in range(2):
        b = batch_of(k)
        learner.environment_step(lambda _, b=b: b, *adam)  # type: ignore[misc]
        if not warm:
            for net in (hand.q, hand.target):
                net.load_state_dict(hand.start.state_dict())
        inner.state.clear()
        for _ in range(2):
            fill(inner, half_squared_error(d_of(hand, b), y_of(hand, b, True).detach()), hand.q)
            move(hand, 0.1)
        v = gradients(half_squared_error(d_of(hand, b), y_of(hand, b, False).detach()), hand.q)
        loss = half_squared_error(d_of(hand, b), y_of(hand, b, True)).sum()
        first = torch.autograd.grad(loss, list(hand.q.parameters()), create_graph=True)
        along = sum((g * x).sum() for g, x in zip(first, v.values(), strict=True))
        assert isinstance(along, Tensor)
        for p, g in zip(
            hand.model.parameters(), torch.autograd.grad(along, list(hand.model.parameters())), strict=True
        ):
            p.grad = -g
        outer.step()
    assert same(found, hand, 1e-10)
    ours = nets_of("omd", solver, PUBLISHED)
    other = Learner(ours, "omd", solver, VALUE, 0.1, form=FORMS["ours"])
    steps = adams(ours)
    for k in range(2):
        other.outer_iteration(batch_of(k), *steps)
    assert not same(ours.q, hand.q, 1e-6)


def test_who_keeps_the_inner_moments() -> None:
    """Nobody's begin anew in our form; in the published one omd's do, unless it is told otherwise."""
    for agent in ("mle", "vep", "omd", "vaml", "model_free"):
        for form, warm, kept in (
            ("ours", None, True),
            ("ours", False, False),
            ("published", None, agent in ("mle", "vep", "model_free")),
            ("published", True, True),
        ):
            solver = Solver(warm_opt=warm)
            nets = nets_of(agent, solver, FORMS[form])
            learner, adam = Learner(nets, agent, solver, VALUE, 0.1, form=FORMS[form]), adams(nets)
            for _ in range(3):
                learner.environment_step(lambda k: batch_of(k), *adam)
            assert int(adam[1].state[nets.q.w0]["step"]) == (3 if kept else 1), (agent, form, warm)


def test_veps_errors_are_summed_in_the_published_form() -> None:
    nets, batch = nets_of("vep", Solver(vep_values=3), PUBLISHED), batch_of()
    learner = Learner(nets, "vep", Solver(vep_values=3), VALUE, 0.1, form=PUBLISHED)
    prediction = nets.model(batch.observation, batch.action)
    values = nets.get_submodule("values")
    off = values(prediction.next_state) - values(batch.next_observation)
    expected = off.square().mean((2, 3)).sum(1) + (prediction.reward - batch.reward).square().mean(1)
    found, loss = learner.model_gradient(learner.problem(batch))
    assert found is not None
    assert torch.allclose(loss, expected)
    right = gradients(expected, nets.model)
    assert all(torch.allclose(found[n], right[n], atol=1e-13) for n in right)


def test_a_sampled_policy_has_its_probabilities() -> None:
    environments = make_environments("CartPole-v1", [4, 1], "test", 50)

    def drawn() -> np.ndarray:
        policy = SampledPolicy(environments, lambda x: np.broadcast_to([0.2, 0.8], (*x.shape[:2], 2)))
        return np.stack([policy(environments.observation) for _ in range(100)])

    found = drawn()
    assert np.array_equal(found, drawn())
    assert abs(found.mean() - 0.8) < 4 * 0.4 / found.size**0.5
    assert not np.array_equal(found[:, 0], found[:, 1])
    sure = SampledPolicy(environments, lambda x: np.broadcast_to([1.0, 0.0], (*x.shape[:2], 2)))
    assert sure(environments.observation).max() == 0


# the command line


@pytest.fixture
def control(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    torch.set_default_dtype(torch.float32)
    monkeypatch.syspath_prepend(str(OWN))
    return Runner(runner.root, runner.capture, "bilevel", (*SMALL, *QUIET, "--trainer.max_steps", "100"))


def results(runner: Runner, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runner.folder("control", name) / "results.json").read_text())
    return found


@pytest.mark.parametrize(
    "flags",
    [
        ("--model.agent", "model_free", "--model.check_gradient", "2"),
        ("--model.agent", "reward_only.RewardOnly", "--model.agent.weight", "3", "--model.check_gradient", "2"),
        ("--model.form", "published", "--model.agent", "omd", "--model.env", "FrozenLake-v1"),
        pytest.param(
            ("--model.form", "published", "--model.agent", "mle", "--model.solver.num_q_steps", "2"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda f: f[1] + f[3],
)
def test_a_run_and_its_resume(control: Runner, bitwise: Any, flags: tuple[str, ...]) -> None:
    control.ok("fit", "control", *flags, "--run.name", "whole")
    control.ok("fit", "control", *flags, "--run.name", "cut", "--trainer.max_steps", "60")
    control.ok("fit", "control", *flags, "--run.name", "cut", "--ckpt_path", "last")
    one, two = (control.checkpoint("control", n) for n in ("whole", "cut"))
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(one[key], two[key], key)
    control.ok("test", "control", *flags, "--run.name", "whole", "--ckpt_path", "last")
    found = results(control, "whole")
    names = {"model_free": "model_free", "reward_only.RewardOnly": "rewards times 3, model width 4"}
    own = f"{flags[3]}, model width 4, published form"
    assert found["label"] == names.get(flags[1], own)
    assert ("model_error" in found["metrics"]) == (flags[1] != "model_free")
    if flags[1].startswith("reward_only"):
        assert min(found["metrics"]["gradient_cosine"]["values"]) > 0.99
        loaded = BilevelControl.load_from_checkpoint(
            control.folder("control", "whole") / "checkpoints" / "last.ckpt", weights_only=True
        )
        assert loaded.label == names[flags[1]]


def test_a_form_and_a_start_are_said(control: Runner) -> None:
    err = control.ok("fit", "control", "--model.solver.warm_start", "false")
    assert "the values will learn nothing: --model.solver.warm_start false" in err
    more = ("--model.solver.warm_start", "false", "--model.solver.num_q_steps", "2")
    assert "learn nothing" not in control.ok("fit", "control", *more)
    # which the published mle has no use for
    published = ("--model.form", "published", "--model.agent", "mle", "--model.solver.warm_start", "false")
    err = control.ok("fit", "control", *published)
    assert "learn nothing" not in err
    assert "--model.solver.warm_start" in err
    code, err = control.code("fit", "control", "--model.agent", "omd2")
    assert code == 2
    assert err.count("\n") == 1
    assert "--model.agent: 'omd2' is not allowed; give one of mle, vep, omd, funcbo, vaml, lagged, model_free" in err


def test_an_agent_of_ones_own_in_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OWN))
    from reward_only import RewardOnly  # type: ignore[import-not-found]

    kept = dict(BilevelControl(RewardOnly(2.0)).hparams)
    assert kept["agent"] == "reward_only.RewardOnly"
    with pytest.raises(ToyError, match=r"load_from_checkpoint takes it: agent=RewardOnly"):
        BilevelControl(**kept)
    assert BilevelControl(**{**kept, "agent": RewardOnly(2.0)}).label == "rewards times 2, model width 32"
