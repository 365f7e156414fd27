"""Calling the module without a Trainer: values, actions and predictions are those that the commands measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_toys.bilevel import BilevelControl, ReplayData
from lightning_toys.bilevel.control.agents import q_of_actions
from lightning_toys.bilevel.control.episodes import rollout
from lightning_toys.bilevel.control.gymnasium_environments import make_environments
from lightning_toys.bilevel.control.nets import MultiHeadMLP
from lightning_toys.errors import ToyError
from tests.bilevel.control.test_cli import SMALL
from tests.conftest import Runner

FLAGS = {
    "omd": ("--model.agent", "omd"),
    "mle": ("--model.agent", "mle", "--model.double_q", "false", "--trainer.precision", "64-true"),
    "distracted": ("--model.agent", "funcbo", "--model.disturbance.distractors", "2"),
}


def built(**options: Any) -> BilevelControl:
    agent = BilevelControl(seeds=[4, 1], hidden_dim=8, model_hidden_dim=4, **options)
    agent.sizes = agent.measure(ReplayData(16, 40, 100))
    agent.configure_model()
    return agent


def states(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FLAGS)
def test_a_loaded_agent_is_the_one_that_was_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    runner = Runner(tmp_path / "logs", capsys, "bilevel", (*SMALL, "--figures.enabled", "false", *FLAGS[name]))
    runner.ok("fit", "control", "--trainer.max_steps", "100")
    runner.ok("test", "control", "--ckpt_path", "last")
    folder = runner.folder("control")
    results = json.loads((folder / "results.json").read_text())
    found = {k: v["values"] for k, v in results["metrics"].items()}
    agent = BilevelControl.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    dtype = torch.float64 if name == "mle" else torch.float32
    # the episodes of the test, played once more
    environments = make_environments("CartPole-v1", [4, 1], "test", 3, agent.disturbance)
    totals, lengths = rollout(environments, lambda x: agent.act(torch.from_numpy(x)).numpy())
    assert totals.mean(1).tolist() == found["return"]
    assert lengths.mean(1).tolist() == found["length"]
    # the errors on the same draws of the replay buffer
    batch = agent.sample_replay(100, 1024, "judge")
    q = agent(batch.observation)
    assert q.dtype == dtype
    assert q.shape == (2, 1024, 2)
    values = q_of_actions(q.unsqueeze(1), batch.action)[:, 0].double().mean(1)
    assert values.tolist() == pytest.approx(found["value"], rel=1e-6, abs=1e-7)
    predicted = agent.predict_next(batch.observation, batch.action)
    state_error = (predicted.next_state - batch.next_observation).double().square().mean((1, 2)).sqrt()
    reward_error = (predicted.reward - batch.reward).double().square().mean(1).sqrt()
    assert state_error.tolist() == pytest.approx(found["model_error"], rel=1e-6)
    assert reward_error.tolist() == pytest.approx(found["reward_error"], rel=1e-6)
    # which an agent that has learned nothing would not pass
    start = built(double_q=agent.heads == 2, disturbance=agent.disturbance).to(dtype)
    assert (start(batch.observation) - q).abs().amax((1, 2)).min() > 1e-2


def test_values_with_a_graph_and_without() -> None:
    agent, x = built(), states(2, 64, 4)
    q = agent(x)
    assert q.requires_grad
    with torch.no_grad():
        assert torch.equal(agent(x), agent.nets.q.forward_pass(x).output.mean(1))
        torch.testing.assert_close(agent(x), q.detach(), rtol=1e-5, atol=1e-6)
        heads = agent.nets.q(x)
    assert heads.shape == (2, 2, 64, 2)
    assert (heads[:, 0] - heads[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(q.detach(), (heads[:, 0] + heads[:, 1]) / 2)


def test_greedy_actions_have_the_greatest_value() -> None:
    agent, x = built(), states(2, 64, 4)
    actions = agent.act(x)
    assert actions.shape == (2, 64)
    assert actions.dtype == torch.int64
    assert set(actions.flatten().tolist()) == {0, 1}
    q = agent(x).detach()
    chosen = q_of_actions(q.unsqueeze(1), actions)[:, 0]
    assert (chosen >= q.amax(-1) - 1e-6).all()
    assert np.array_equal(agent.greedy_actions(x.numpy()), actions.numpy())


def test_inputs_without_a_replica_axis_are_every_replicas() -> None:
    agent, x, a = built(), states(7, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    both, actions = torch.stack([x, x]), torch.stack([a, a])
    with torch.no_grad():
        assert torch.equal(agent(x), agent(both))
        assert agent(x).shape == (2, 7, 2)
    assert torch.equal(agent.act(x), agent.act(both))
    predicted, expected = agent.predict_next(x, a), agent.predict_next(both, actions)
    assert predicted.next_state.shape == (2, 7, 4)
    assert predicted.reward.shape == (2, 7)
    assert not predicted.reward.requires_grad
    for found in (predicted, agent.predict_next(x, actions), agent.predict_next(both, a)):
        assert torch.equal(found.next_state, expected.next_state)
        assert torch.equal(found.reward, expected.reward)
    other = agent.predict_next(x, 1 - a)
    assert (other.reward - predicted.reward).abs().min() > 0
    assert (predicted.reward[0] - predicted.reward[1]).abs().max() > 1e-3


def test_the_model_predicts_as_its_network_does() -> None:
    """[s, onehot a] in, next state and reward out."""
    agent, x, a = built(), states(2, 7, 4), torch.tensor([[0, 1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1, 0]])
    inputs = torch.cat([x, torch.nn.functional.one_hot(a, 2).float()], -1)
    out = agent.nets.model.net(inputs).detach()[:, 0]
    predicted = agent.predict_next(x, a)
    torch.testing.assert_close(predicted.next_state, out[..., :4])
    torch.testing.assert_close(predicted.reward, out[..., 4])


@pytest.mark.parametrize("shape", [(), (4,), (6, 5), (3, 6, 4), (2, 6, 3), (1, 2, 6, 4)])
def test_other_observations_are_refused_in_one_line(shape: tuple[int, ...]) -> None:
    agent, x = built(), torch.zeros(shape)
    for call in (agent, agent.act, lambda x: agent.predict_next(x, torch.zeros(6, dtype=torch.int64))):
        with pytest.raises(ToyError) as caught:
            call(x)
        assert str(caught.value) == f"observations: shape {shape} is not allowed; give (M, 4) or (2, M, 4)"


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), "actions for 5 observations are not allowed; give one for each of 6"),
        (torch.zeros(6), "actions of torch.float32 are not allowed; give integers from 0 to 1"),
        (torch.zeros(6, dtype=torch.bool), "actions of torch.bool are not allowed; give integers from 0 to 1"),
        (torch.arange(6) - 1, "actions [-1, 2, 3] are not allowed; give integers from 0 to 1"),
        (torch.zeros(3, 6, dtype=torch.int64), "actions: shape (3, 6) is not allowed; give (M,) or (2, M)"),
    ],
)
def test_other_actions_are_refused_in_one_line(actions: Tensor, message: str) -> None:
    with pytest.raises(ToyError) as caught:
        built().predict_next(torch.zeros(6, 4), actions)
    assert str(caught.value) == message


def test_an_agent_that_is_not_built_says_what_to_do() -> None:
    agent = BilevelControl(seeds=[0])
    for call in (agent, agent.act, lambda x: agent.predict_next(x, torch.zeros(3, dtype=torch.int64))):
        with pytest.raises(ToyError, match=r"^BilevelControl has no networks yet: .*load_from_checkpoint.*$"):
            call(torch.zeros(3, 4))


def test_a_written_out_pass_sees_what_became_of_the_parameters() -> None:
    """Stepped in place, cast, loaded, or one replaced by another."""
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    net = MultiHeadMLP([0, 1], "q", (4, 8, 8, 2), heads=2)

    def check(before: torch.Tensor) -> torch.Tensor:
        now = x.to(net.weights()["w0"].dtype)
        found = net.forward_pass(now).output
        torch.testing.assert_close(found, net(now).detach())
        assert found.dtype != before.dtype or not torch.equal(found, before)
        assert not found.requires_grad
        return found

    found = check(torch.zeros(2, 2, 5, 2))
    with torch.no_grad():
        net.w1 += 1
    found = check(found)
    net.w2 = nn.Parameter(net.w2.detach() * 2)
    found = check(found)
    net.load_state_dict(MultiHeadMLP([5, 6], "q", (4, 8, 8, 2), heads=2).state_dict())
    found = check(found)
    net.double()
    check(found)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied.w0 += 1
    assert not torch.equal(copied.forward_pass(x.double()).output, net.forward_pass(x.double()).output)
