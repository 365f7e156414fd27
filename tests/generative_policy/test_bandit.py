"""The contextual bandit: its reward, the mirror descent step, and the three policies through the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from lightning_toys.generative_policy import BanditData, BanditPolicy
from lightning_toys.generative_policy.actors import GaussianActor, MirrorGaussianActor
from lightning_toys.generative_policy.bandit import RotatingModes, effective_hills, sample_softmax, turns_to_states
from lightning_toys.generative_policy.bandit_figures import lower_hills
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


@pytest.mark.parametrize(
    ("width", "best", "hills"), [(0.15, 1.0, 3), (0.4, 1.0387, 3), (0.43, 1.0706, 2), (0.45, 1.1007, 2),
                                 (0.46, 1.1191, 2), (0.49, 1.2019, 1), (0.9, 2.1222, 1)]
)  # fmt: skip
def test_hills_that_grow_together(width: float, best: float, hills: int) -> None:
    """Against a grid around each top: all local maxima, each once, at widths where Newton's method has no Hessian."""
    bandit = RotatingModes(width)
    assert len(bandit.tops) == len(bandit.mode_maxima) == hills
    assert [n for n in bandit.baselines if n.startswith("top")] == [f"top_of_hill_{i}" for i in bandit.tops]
    assert bandit.max_reward == pytest.approx(best, abs=1e-4)
    line = torch.linspace(-1, 1, 401, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    reward = bandit.reward(torch.tensor([1.0, 0.0]).double().expand_as(grid), grid)
    around = torch.nn.functional.max_pool2d(reward[None, None], 3, 1, 1)[0, 0]
    inner = reward[1:-1, 1:-1] == around[1:-1, 1:-1]
    peaks = reward[1:-1, 1:-1][inner].tolist()
    assert len(peaks) == hills
    assert sorted(peaks) == pytest.approx(sorted(bandit.mode_maxima), abs=1e-4)
    regrets = [bandit.baselines[f"top_of_hill_{i}"]["regret"] for i in bandit.tops]
    assert lower_hills(bandit.baselines) == sorted(regrets)[1:]
    assert min(regrets) == 0


def test_equal_heights() -> None:
    bandit = BanditData(heights=[1, 1, 1]).bandit
    assert bandit.mode_maxima == pytest.approx([1.0] * 3, abs=1e-3)
    assert BanditData().bandit.mode_heights.tolist() == pytest.approx([1.0, 0.9, 0.8])


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


def test_effective_hills_are_counted_state_by_state() -> None:
    """A policy that is on another hill at each state has one, though over all states its shares are equal."""
    turns_about = torch.arange(3).repeat_interleave(8).reshape(1, 3, 8)
    spread = torch.arange(24).remainder(3).reshape(1, 3, 8)
    mode = torch.cat([turns_about, turns_about.roll(1, 1), spread])
    near = torch.ones_like(mode, dtype=torch.bool)
    assert effective_hills(mode, near)[:2].tolist() == [1.0, 1.0]
    p = np.array([3, 3, 2]) / 8  # of 8 actions, whichever hill has two
    assert effective_hills(mode, near)[2].item() == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-12)
    near[0, 0] = False  # at a third of the states no action is on a hill
    near[1, :, 0] = False  # strays do not count
    assert effective_hills(mode, near)[:2].tolist() == pytest.approx([2 / 3, 1.0])


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


def test_mirror_gaussian_is_fitted_by_maximum_likelihood() -> None:
    """Its loss is -log pi(x | s), least at the distribution that the actions come from."""
    net = Network(hidden=8, activation="silu").build([0], 2, 0, False, 4).double()
    actor = MirrorGaussianActor(net)
    state = turns_to_states(torch.linspace(0, 0.9, 6, dtype=torch.float64)).unsqueeze(0)
    e = torch.from_numpy(keyed_generator(3, 0, "test").standard_normal((1, 6, 2)))
    a, log_prob = actor.sample_with_log_prob(state, e)
    torch.testing.assert_close(actor.fit_losses(state, a), -log_prob)
    edge = actor.fit_losses(state, torch.ones(1, 6, 2).double())
    assert edge.isfinite().all()
    assert (edge > actor.fit_losses(state, a)).all()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x = torch.tensor([0.3, -0.2]).double() + 0.05 * torch.from_numpy(
        keyed_generator(4, 0, "test").standard_normal((1, 300, 2))
    )
    at = state[:, :1].expand(1, 300, 2)
    for _ in range(400):
        optimizer.zero_grad()
        actor.fit_losses(at, x).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    drawn = actor.act(at, torch.from_numpy(keyed_generator(5, 0, "test").standard_normal((1, 300, 2))), e)[0]
    assert drawn.mean(0).tolist() == pytest.approx([0.3, -0.2], abs=0.03)
    assert drawn.std(0).tolist() == pytest.approx([0.05, 0.05], rel=0.3)


def bandit_module(**settings: Any) -> BanditPolicy:
    module = BanditPolicy(seeds=[3, 4], network=Network(hidden=8, activation="silu"), **settings)
    module.sizes = {"batch_size": 5}
    module.configure_model()
    return module.double()


def test_sac_of_several_actions_and_its_temperature() -> None:
    """A mean over the actions of a state; alpha rises where the entropy is below its target, and falls above."""
    reward = RotatingModes().reward
    state = turns_to_states(torch.arange(10, dtype=torch.float64).reshape(2, 5) / 10)
    e = torch.from_numpy(keyed_generator(6, 0, "test").standard_normal((2, 5, 3, 2)))
    noise = {"e": e[:, :, 0], "more/e": e[:, :, 1:]}
    for target, sign in ((-60.0, 1), (60.0, -1), (None, 0)):
        module = bandit_module(policy="gaussian", sac_actions=3, entropy=0.2, target_entropy=target)
        module.q_value = reward  # type: ignore[method-assign, assignment]
        actor = module.actor
        assert isinstance(actor, GaussianActor)
        found = module.sac_losses(actor, state, noise)
        each = torch.stack([actor.losses(state, e[:, :, k], reward, 0.2) for k in range(3)])
        if target is None:
            assert module.log_alpha is None
            torch.testing.assert_close(found, each.mean(0))
            continue
        assert module.log_alpha is not None
        (slope,) = torch.autograd.grad(found.sum(), module.log_alpha)
        log_prob = torch.stack([actor.sample_with_log_prob(state, e[:, :, k])[1] for k in range(3)])
        torch.testing.assert_close(slope[:, 0], -(log_prob + target).mean(0).sum(1).detach())
        assert (slope.sign() == sign).all()
        # the policy's part is as it is without
        torch.testing.assert_close(found + module.log_alpha * (log_prob + target).mean(0), each.mean(0))


def test_noise_of_a_flow() -> None:
    state = turns_to_states(torch.zeros(2, 5).double())
    e, xi = (torch.from_numpy(keyed_generator(7, k, "test").standard_normal((2, 5, 2))) for k in (0, 1))
    plain, noisy = (bandit_module(policy="flow", nfe=2, flow_std=s).actor for s in (0.0, 0.1))
    torch.testing.assert_close(noisy.act(state, e, xi), plain.act(state, e, xi) + 0.1 * xi)


def test_automatic_temperature_follows_its_target(bandit: Runner) -> None:
    """From .05 it rises towards an entropy that the policy has not, and falls where it has more than is wanted."""
    flags = (
        "--model.policy",
        "gaussian",
        "--model.critic",
        "known",
        "--model.seeds",
        "[0,1]",
        "--model.sac_actions",
        "4",
    )
    flags += ("--trainer.max_steps", "120", "--trainer.val_check_interval", "120", "--model.optimizer", "adamw")
    alphas = {}
    for target in ("1.3", "-8.0"):
        bandit.ok("fit", "bandit", *flags, "--model.target_entropy", target, "--run.name", target)
        found = json.loads((bandit.folder("bandit", target) / "results.json").read_text())["metrics"]
        assert found["critic_evaluations"]["values"] == [120 * 64 * 4] * 2
        alphas[target] = found["alpha"]["values"]
    assert min(alphas["1.3"]) > 0.055
    assert max(alphas["-8.0"]) < 0.045


@pytest.mark.parametrize("policy", ["gaussian", "gaussian_mirror", "meanflow", "flow"])
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
        (("--data.heights", "[1,2]"), "--data.heights: [1.0, 2.0] is not allowed; give three numbers"),
        (("--model.flow_std", "1"), "--model.flow_std: 1.0 is not allowed"),
        (("--data", "MixtureData"), "--data: MixtureData is not allowed; give BanditData"),
    ],
)
def test_bad_input_is_one_line(bandit: Runner, flags: tuple[str, ...], says: str) -> None:
    code, err = bandit.code("fit", "bandit", *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert says in err
