"""The contextual bandit: its reward, the mirror descent step, and the three policies through the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from lightning_toys.generative_policy.actors import GaussianActor
from lightning_toys.generative_policy.bandit import RotatingModes, sample_softmax, turns_to_states
from lightning_toys.nets import Network
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner

TINY = ("--model.network.hidden", "16", "--model.draws", "8", "--figures.enabled", "false", "--model.candidates", "4")


@pytest.fixture
def bandit(policies: Runner) -> Runner:
    policies.small = TINY
    return policies


def test_reward_turns_with_the_state() -> None:
    """r(R s, R a) = r(s, a): a turn of both changes nothing, a turn of one does."""
    bandit = RotatingModes()
    generator = keyed_generator(0, 0, "test")
    a = torch.from_numpy(generator.uniform(-0.6, 0.6, (50, 2)))
    turns = torch.from_numpy(generator.random(50))
    state, zero = turns_to_states(turns), turns_to_states(torch.zeros(50, dtype=torch.float64))
    c, s = state.unbind(-1)
    turned = torch.stack([c * a[:, 0] - s * a[:, 1], s * a[:, 0] + c * a[:, 1]], -1)
    inside = turned.abs().max(1).values <= 1
    there, here = bandit.reward(state, turned)[inside], bandit.reward(zero, a)[inside]
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-7)
    assert (bandit.reward(state, a)[inside] - here).abs().max() > 0.1


def test_tops_are_the_greatest_rewards() -> None:
    """Against a fine grid; with wide hills the tops lie beside the centres, and above the heights."""
    for width in (0.15, 0.3):
        bandit = RotatingModes(width)
        line = torch.linspace(-1, 1, 801, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
        state = torch.tensor([1.0, 0.0], dtype=torch.float64)
        top = float(bandit.reward(state.expand_as(grid), grid).max())
        assert top <= bandit.max_reward < top + 1e-4
    assert RotatingModes(0.3).max_reward > 1.0


@pytest.mark.parametrize("width", [0.15, 0.4])
def test_regret_of_uniform_actions(width: float) -> None:
    """Against a grid of actions at other states than it is averaged over; the hills reach over the edge."""
    bandit = RotatingModes(width)
    line = (torch.arange(200, dtype=torch.float64) + 0.5) / 100 - 1
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    states = turns_to_states((torch.arange(50, dtype=torch.float64) + 0.3) / 50)
    mean = float(torch.stack([bandit.reward(s.expand_as(grid), grid).mean() for s in states]).mean())
    assert bandit.baselines["uniform"]["regret"] == pytest.approx(bandit.max_reward - mean, abs=1e-5)
    everywhere = 2 * math.pi * width**2 * 2.7 / 4
    assert abs(mean - everywhere) > 5e-4  # as if no hill reached over it


def test_choose_draws_the_mirror_descent_step() -> None:
    """Frequencies of softmax(Q / lambda), chi-squared at 1e-4; a wrong temperature or sign fails."""
    q = torch.tensor([0.1, 0.7, -0.3, 0.5], dtype=torch.float64)
    n, temperature = 20_000, 0.4
    u = torch.from_numpy(keyed_generator(1, 0, "test").random(n))
    counts = torch.bincount(sample_softmax(q.expand(n, 4), temperature, u), minlength=4).numpy()

    def distance(p: torch.Tensor) -> float:
        expected = p.numpy() * n
        return float((np.square(counts - expected) / expected).sum())

    limit = chi2.ppf(1 - 1e-4, 3)
    assert distance(torch.softmax(q / temperature, 0)) < limit
    assert distance(torch.softmax(q, 0)) > limit
    assert distance(torch.softmax(-q / temperature, 0)) > limit
    assert sample_softmax(q, temperature, torch.tensor(1.0, dtype=torch.float64)) == 3


def test_gaussian_loss_is_sacs() -> None:
    """Its gradient in the action's place is that of entropy * log pi - Q, and the critic gets none."""
    net = Network(hidden=8, activation="silu").build([0], 2, 0, False, 4).double()
    actor = GaussianActor(net)
    bandit = RotatingModes()
    state = turns_to_states(torch.linspace(0, 0.9, 6, dtype=torch.float64)).unsqueeze(0)
    e = torch.from_numpy(keyed_generator(2, 0, "test").standard_normal((1, 6, 2)))
    loss = actor.losses(state, e, bandit.reward, 0.2)
    a, log_prob = actor.sample_with_log_prob(state, e)
    torch.testing.assert_close(loss, 0.2 * log_prob - bandit.reward(state, a))
    # a step against the gradient lowers it
    gradient = torch.autograd.grad(loss.sum(), list(net.parameters()))
    with torch.no_grad():
        for p, g in zip(net.parameters(), gradient, strict=True):
            p -= 1e-4 * g
    assert actor.losses(state, e, bandit.reward, 0.2).sum() < loss.sum()


@pytest.mark.parametrize("policy", ["gaussian", "meanflow", "flow"])
def test_resume_and_solo(bandit: Runner, bitwise: Callable[..., None], policy: str) -> None:
    """Cut between two mirror descent steps: pi_old is part of the checkpoint."""
    flags = ("--model.policy", policy, "--model.inner_steps", "30", "--model.lr_decay", "constant")
    flags += ("--trainer.val_check_interval", "50", "--model.optimizer", "adamw", "--model.nfe", "2")
    bandit.ok("fit", "bandit", *flags, "--model.seeds", "[2,5]", "--run.name", "whole", "--trainer.max_steps", "100")
    bandit.ok("fit", "bandit", *flags, "--model.seeds", "[2,5]", "--run.name", "cut", "--trainer.max_steps", "50")
    resumed = ("--ckpt_path", "last", "--trainer.max_steps", "100")
    bandit.ok("fit", "bandit", *flags, "--model.seeds", "[2,5]", "--run.name", "cut", *resumed)
    one, two = bandit.checkpoint("bandit", "whole"), bandit.checkpoint("bandit", "cut")
    for key in ("state_dict", "optimizer_states"):
        bitwise(one[key], two[key], key)
    bandit.ok("fit", "bandit", *flags, "--model.seeds", "[5]", "--run.name", "solo", "--trainer.max_steps", "100")
    solo = bandit.checkpoint("bandit", "solo")["state_dict"]
    # mirror descent picks candidates: a rounding error can flip a choice, and then the runs part
    names = [k for k in solo if k.startswith("net.")]
    assert max((one["state_dict"][k][1] - solo[k][0]).abs().max().item() for k in names) < 1e-4
    assert max((one["state_dict"][k][0] - solo[k][0]).abs().max().item() for k in names) > 1e-2


@pytest.mark.parametrize("critic", ["known", "learned"])
def test_regret_falls(bandit: Runner, critic: str) -> None:
    """A Gaussian with a known critic climbs a hill; the critic learns."""
    flags = ("--model.policy", "gaussian", "--model.critic", critic, "--model.seeds", "[0,1]", "--model.draws", "64")
    bandit.ok("fit", "bandit", *flags, "--trainer.max_steps", "600", "--trainer.val_check_interval", "600")
    results = json.loads((bandit.folder("bandit") / "results.json").read_text())
    found, uniform = results["metrics"], results["references"]["uniform"]["regret"]
    if critic == "known":
        assert max(found["regret"]["values"]) < 0.6 * uniform
    else:
        assert max(found["critic_error"]["values"]) < 0.3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model.policy", "gausian"), "did you mean 'gaussian'?"),
        (("--model.temperature", "0"), "--model.temperature: 0.0 is not allowed; give a number > 0"),
        (("--model.candidates", "1"), "--model.candidates: 1 is not allowed"),
        (("--data.width", "-1"), "--data.width: -1.0 is not allowed"),
        (("--data", "MixtureData"), "--data: MixtureData is not allowed; give BanditData"),
    ],
)
def test_bad_input_is_one_line(bandit: Runner, flags: tuple[str, ...], says: str) -> None:
    code, err = bandit.code("fit", "bandit", *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert says in err
