"""The plane with four goals: the soft optimum against closed forms, and what policies learn from it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import erf
from scipy.stats import binom, truncnorm
from torch import Tensor

from lightning_toys.generative_policy import MultiGoalData, MultiGoalPolicy
from lightning_toys.generative_policy.metrics import knn_entropy, squashed_knn_entropy
from lightning_toys.generative_policy.multigoal import LOG_VOLUME, MultiGoal, stratified_actions
from lightning_toys.generative_policy.multigoal_optimum import baseline_row, expected_total_variation, play_optimal
from lightning_toys.nets import Network
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner

SMALL = (
    *("--data.grid", "21", "--data.nodes", "8", "--data.horizon", "3", "--data.batch_size", "32"),
    *(
        "--model.episodes",
        "64",
        "--model.network.hidden",
        "16",
        "--model.network.layers",
        "3",
        "--model.candidates",
        "4",
    ),
)


class Quadratic(MultiGoal):
    """r = -weight |s'|^2 - cost |a|^2, for which values are quadratic where the policy keeps off the bounds."""

    weight = 0.0

    def state_reward(self, state: Tensor) -> Tensor:
        return -self.weight * state.square().sum(-1)


def uniforms(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/multigoal/{name}").random(shape))


def test_one_step_in_closed_form() -> None:
    """V = 2 alpha log(sqrt(pi alpha / c) erf(sqrt(c / alpha))) and a truncated normal's entropy, at every state."""
    for alpha, cost in ((0.1, 0.2), (0.5, 0.1), (0.05, 1.0)):
        problem = Quadratic(1, alpha, cost=cost, grid=9, nodes=60)
        wanted = 2 * alpha * math.log(math.sqrt(math.pi * alpha / cost) * erf(math.sqrt(cost / alpha)))
        assert problem.values[0] == pytest.approx(np.full((9, 9), wanted), abs=1e-9)
        assert (problem.values[1] == 0).all()
        std = math.sqrt(alpha / (2 * cost))
        entropy = 2 * truncnorm(-1 / std, 1 / std, scale=std).entropy()
        found = problem.optimal_entropy(torch.zeros(5, dtype=torch.long), 2 * uniforms("states", 5, 2) - 1)
        assert found.numpy() == pytest.approx(entropy, abs=1e-6)


def test_a_linear_quadratic_regulator() -> None:
    """Riccati's recursion k_t = (q + k) c / ((q + k) d^2 + c), and alpha log(pi alpha / ((q + k) d^2 + c)) a step.

    Three steps near the middle, where the policy is a Gaussian of width .1 within the bounds.
    """
    alpha, cost, reach, T = 0.02, 1.0, 0.5, 3
    problem = Quadratic(T, alpha, reach=reach, cost=cost, grid=41, nodes=40)
    problem.weight = 0.7
    state = 0.4 * (2 * uniforms("lqr", 50, 2) - 1)
    k = constant = 0.0
    for t in range(T - 1, -1, -1):
        slope = (problem.weight + k) * reach**2 + cost
        k, constant = (problem.weight + k) * cost / slope, constant + alpha * math.log(math.pi * alpha / slope)
        found = problem.value(torch.full((50,), t), state)
        torch.testing.assert_close(found, constant - k * state.square().sum(1), rtol=0, atol=1e-4)
    assert k > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [2, 6])
def test_the_grid_has_converged(horizon: int) -> None:
    """To 1e-3 at every state, against twice as many points of the states and the actions."""
    one, two = MultiGoal(horizon), MultiGoal(horizon, grid=121, nodes=24)
    gap = np.abs(one.values[0] - two.values[0][::2, ::2])
    assert gap.max() < 1e-3
    coarse = MultiGoal(horizon, grid=13, nodes=6)
    assert np.abs(coarse.values[0] - one.values[0][::5, ::5]).max() > 2e-3
    line = torch.linspace(-1, 1, 61, dtype=torch.float64)
    states = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    found = one.value(torch.zeros(61, 61, dtype=torch.long), states)
    assert (found.numpy() - one.values[0]) == pytest.approx(0, abs=1e-3)


def test_values_between_the_grids_points_up_to_the_edge() -> None:
    """A smooth function at the midpoints of every cell, the outermost too, where it has a slope."""
    problem = MultiGoal(1, grid=31, nodes=2)

    def smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.exp(x - 0.5 * y) + np.sin(2 * x * y)
        return found

    line = np.linspace(-1, 1, 31)
    problem.values = np.stack([smooth(line[:, None], line)] * 2)  # type: ignore[misc]
    fine = np.linspace(-1, 1, 321)
    middles = (line[1:] + line[:-1]) / 2
    found = problem.fine_values[0].numpy()
    assert found == pytest.approx(smooth(fine[:, None], fine), abs=1e-4)
    points = torch.from_numpy(np.stack(np.meshgrid(middles, middles, indexing="ij"), -1))
    value = problem.value(torch.zeros(30, 30, dtype=torch.long), points).numpy()
    assert value == pytest.approx(smooth(middles[:, None], middles), abs=2e-4)


def test_the_values_next_to_the_edge_have_converged() -> None:
    """At the midpoints of the cells at the edge, of the default grid and one twice as fine: to 1e-3."""
    one, two = MultiGoal(2, nodes=12), MultiGoal(2, grid=121, nodes=12)
    edge = np.full(60, -1 + 1 / 60)
    along = np.linspace(-1, 1, 121)[1::2]
    points = torch.from_numpy(np.stack([edge, along], -1))
    found, wanted = (p.value(torch.zeros(60, dtype=torch.long), points) for p in (one, two))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_values_look_where_they_should() -> None:
    """The middle is symmetric, a goal is worth most, and the gradient of Q in the action is that of differences."""
    problem = MultiGoal(3)
    V = problem.values[0]
    assert pytest.approx(V[::-1]) == V
    assert pytest.approx(V.T) == V
    lopsided = MultiGoal(2, grid=21, nodes=8)
    lopsided.goals = torch.tensor([[0.8, 0.0]], dtype=torch.float64)
    V = lopsided.values[0]
    i, j = np.unravel_index(V.argmax(), V.shape)
    assert i > 15  # the first coordinate lies along the first axis
    assert j == 10
    at = lopsided.value(torch.zeros(2, dtype=torch.long), torch.tensor([[0.8, 0.0], [0.0, 0.8]]).double())
    assert at[0] > at[1] + 0.5
    state, action = 0.8 * (2 * uniforms("q state", 40, 2) - 1), 0.8 * (2 * uniforms("q action", 40, 2) - 1)
    step = torch.arange(40) % 3
    action.requires_grad_(True)
    (slope,) = torch.autograd.grad(problem.q_value(step, state, action).sum(), action)
    for i in range(2):
        e = torch.zeros(2).double()
        e[i] = 0.03
        with torch.no_grad():
            high, low = (problem.q_value(step, state, action + s * e) for s in (1, -1))
        torch.testing.assert_close(slope[:, i], (high - low) / 0.06, rtol=0, atol=0.06)
    assert slope.abs().max() > 0.3


def test_the_optimums_episodes_have_its_value() -> None:
    """The soft return of play_optimal is E V_0 within four errors, and uniform actions are far below."""
    problem = MultiGoal(4, grid=41, nodes=16)
    start = 0.1 * (2 * uniforms("start", 400, 2) - 1)
    states, rewards = play_optimal(problem, start)
    assert states.shape == (5, 400, 2)
    error = float(rewards.sum(0).std()) / 20
    row = baseline_row(problem, start, True, 400)
    assert abs(row["soft_gap"]) < 4 * error + 0.01
    assert row["reached"] > 0.5
    shares = torch.bincount(problem.goal_of(states[-1])[0], minlength=4) / 400
    assert max(abs(s - 0.25) for s in shares.tolist()) < 0.1
    assert [row[f"share_goal{g}"] for g in range(4)] == [0.25] * 4  # by symmetry
    uniform = baseline_row(problem, start, False, 400)
    assert uniform["entropy"] == LOG_VOLUME
    assert uniform["soft_gap"] > 0.3
    assert row["entropy"] < LOG_VOLUME


def test_the_goals_shares_of_the_optimum() -> None:
    """Even by symmetry, counted where there is none; their total variation's floor is a binomial's mean deviation."""
    for n, p in ((64, [0.25] * 4), (7, [0.6, 0.3, 0.1, 0.0])):
        k = np.arange(n + 1)
        wanted = sum(float((binom.pmf(k, n, q) * abs(k / n - q)).sum()) for q in p) / 2
        assert expected_total_variation(p, n) == pytest.approx(wanted, rel=1e-12)
    problem = Quadratic(1, 1.0, grid=5, nodes=4)
    start = 0.01 * (2 * uniforms("few", 30, 2) - 1)
    row = baseline_row(problem, start, True, 64)
    assert problem.symmetric
    assert [row[f"share_goal{g}"] for g in range(4)] == [0.25] * 4
    assert row["goal_tv"] == pytest.approx(expected_total_variation([0.25] * 4, 64))
    problem.goals = torch.tensor([[0.8, 0.0], [0.0, 0.8], [-0.8, 0.0], [0.0, -0.7]], dtype=torch.float64)
    assert not problem.symmetric
    counted = baseline_row(problem, start, True, 64)
    assert sum(counted[f"share_goal{g}"] for g in range(4)) == pytest.approx(1)
    assert any(counted[f"share_goal{g}"] != 0.25 for g in range(4))


def test_stratified_actions_are_uniform() -> None:
    a = stratified_actions(3, uniforms("places", 5000, 9, 2))
    assert a.shape == (5000, 9, 2)
    counts, _, _ = np.histogram2d(*a.reshape(-1, 2).T.numpy(), bins=6, range=[[-1, 1], [-1, 1]])
    assert counts.sum() == 45_000
    assert counts == pytest.approx(np.full((6, 6), 1250), abs=150)
    cell = ((a + 1) * 1.5).floor()  # one in each
    assert (cell[..., 0] * 3 + cell[..., 1] == torch.arange(9)).all()
    smooth = torch.exp(-stratified_actions(16, uniforms("fine", 5, 256, 2)).square().sum(-1)).mean(1)
    assert smooth.numpy() == pytest.approx((math.sqrt(math.pi) * erf(1) / 2) ** 2, rel=0.01)


def known(policy: str, **settings: object) -> tuple[MultiGoalPolicy, MultiGoalData]:
    module = MultiGoalPolicy(policy, [0, 1], Network(hidden=16), critic="known", **settings)  # type: ignore[arg-type]
    data = MultiGoalData(horizon=3, grid=41, nodes=16)
    module.sizes = module.measure(data)
    module.configure_model()
    type(module).data = property(lambda self: data)  # type: ignore[assignment, method-assign]
    return module, data


def test_entropies_have_no_bias_from_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform actions have log 4, which an estimate among the actions themselves misses by .07."""
    monkeypatch.setattr(MultiGoalPolicy, "data", MultiGoalPolicy.data)
    y = np.arctanh(2 * uniforms("edge", 120, 400, 2).numpy() - 1)
    assert np.mean([squashed_knn_entropy(x) for x in y]) == pytest.approx(LOG_VOLUME, abs=0.02)
    assert np.mean([knn_entropy(np.tanh(x)) for x in y]) > LOG_VOLUME + 0.04
    for policy in ("flow", "gaussian"):
        module, _ = known(policy)
        drawn = torch.from_numpy(y.reshape(2, -1, 2))
        monkeypatch.setattr(module.plain_policy, "before_tanh", lambda state, seed, y=drawn: y[:, : state.shape[1]])
        found = module.entropies_at(1, torch.zeros(2, 60, 2), 0)
        assert found.shape == (2, 60)
        assert found.mean().item() == pytest.approx(LOG_VOLUME, abs=0.02)


@pytest.mark.parametrize("policy", ["gaussian", "meanflow"])  # a flow's own entropy is not that of its Euler steps
def test_entropies_are_those_of_the_actions(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """tanh of before_tanh is act, draw by draw; the estimate is that of the closed form or the change of variables."""
    monkeypatch.setattr(MultiGoalPolicy, "data", MultiGoalPolicy.data)
    module, _ = known(policy)
    plain, state = module.plain_policy, 2 * uniforms("entropies", 2, 8, 2) - 1
    seen = module.inputs(torch.ones(2, 8), state)
    with torch.no_grad():
        torch.testing.assert_close(torch.tanh(plain.before_tanh(seen, 3)), plain.act(seen, 3))
    # at the start the one-step map is one to one
    wanted = plain.entropy(seen).double()
    found = module.entropies_at(1, state, 0)
    # of 16 states, each with a standard error of .1 or so
    assert (found - wanted).mean().abs().item() < 0.1
    assert (found - wanted).abs().max() < 0.4


def test_improved_actions_follow_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one state the mean and the mean square of resampled actions are those of exp(Q / alpha); soft_value is V."""
    monkeypatch.setattr(MultiGoalPolicy, "data", MultiGoalPolicy.data)  # what `known` replaces is put back
    module, data = known("flow", candidates=16)
    problem, n = data.problem, 4000
    state = torch.tensor([0.3, -0.2], dtype=torch.float64).expand(2, n, 2)
    at = torch.ones(2, n, dtype=torch.long)
    noise = {"places": uniforms("improve", 2, n, 256, 2), "choice": uniforms("choice", 2, n)}
    a = module.sample_improved_actions(at, state, noise)
    nodes, weights = problem.action_rule
    q = problem.q_value(at[0, :1], state[0, :1], nodes) / problem.temperature
    density = (q + weights.log()).softmax(0)
    mean, square = density @ nodes, density @ nodes.square()
    for found, wanted, spread in (
        (a.mean(1), mean, (square - mean.square()).sqrt()),
        (a.square().mean(1), square, a.square().std((0, 1))),
    ):
        assert ((found - wanted).abs() < 4 * spread / math.sqrt(n)).all()
    assert mean.abs().max() > 0.1
    error = module.soft_value(at, state, noise["places"]) - problem.value(at, state)
    assert error.abs().max() < 0.05
    assert abs(error.mean().item()) < 2e-3


def test_the_critic_regresses_on_the_soft_bellman_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the optimum in the place of the average, the target is the optimum's Q; the last step has no successor."""
    monkeypatch.setattr(MultiGoalPolicy, "data", MultiGoalPolicy.data)
    module, data = known("flow", candidates=20)
    problem = data.problem
    state = 2 * uniforms("bellman", 2, 60, 2) - 1
    at = torch.arange(3).repeat(2, 20)
    noise = {"action": uniforms("bellman a", 2, 60, 2), "next/places": uniforms("bellman s", 2, 60, 400, 2)}
    # a known value above every Q: its error has the sign of the target too
    high = torch.full((2, 60), 10.0).double()
    monkeypatch.setattr(module, "critic_value", lambda name, *rest: high)
    goal = 10 - module.critic_losses(at, state, noise).sqrt()
    wanted = problem.q_value(at, state, 2 * noise["action"] - 1)
    assert wanted.max() < 10
    torch.testing.assert_close(goal, wanted, rtol=0, atol=2e-2)
    assert wanted[:, 2::3].mean() < 0.7 * wanted[:, 0::3].mean()  # it has two steps less to come


def test_the_average_follows_the_critic() -> None:
    module = MultiGoalPolicy("flow", [0], Network(hidden=16), average=0.25)
    module.sizes = module.measure(MultiGoalData())
    module.configure_model()
    assert isinstance(module.net, torch.nn.ModuleDict)
    critic, average = (list(module.net[k].parameters()) for k in ("critic", "average"))
    assert all(torch.equal(a, b) for a, b in zip(critic, average, strict=True))
    before = [p.detach().clone() for p in average]
    with torch.no_grad():
        for p in critic:
            p.add_(1.0)
    module.follow()
    assert all(torch.allclose(a, b + 0.25) for a, b in zip(average, before, strict=True))
    assert not any(p.requires_grad for p in average)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["meanflow", "gaussian", "flow"])
def test_every_policy(policies: Runner, policy: str) -> None:
    flags = ("--model.policy", policy, "--model.seeds", "[0,1]", "--trainer.max_steps", "4")
    policies.small = ("--figures.dpi", "20")
    policies.ok("fit", "multigoal", *SMALL, *flags)
    folder = policies.folder("multigoal")
    fitted = json.loads((folder / "results.json").read_text())
    assert (folder / "figures" / "episodes.png").exists()
    policies.ok("test", "multigoal", *SMALL, *flags)
    tested = json.loads((folder / "results.json").read_text())
    assert tested["metrics"] == fitted["metrics"]
    assert {"soft_gap", "goal_tv", "entropy", "critic_error"} <= tested["metrics"].keys()
    assert min(tested["metrics"]["soft_gap"]["values"]) > 0
    assert set(tested["references"]) == {"optimal", "uniform"}
    assert np.array(tested["arrays"]["trajectories"]).shape == (40, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "steps", "share"),
    [("gaussian", 1500, 0.5), ("gaussian_mirror", 1500, 0.5), ("flow", 1500, 0.25), ("meanflow", 1500, 0.5)],
)
def test_policies_come_near_the_optimum(policies: Runner, policy: str, steps: int, share: float) -> None:
    """With the critic known the gap falls to a share of that of uniform actions."""
    policies.small = ("--figures.enabled", "false")
    flags = ("--model.policy", policy, "--model.seeds", "[0]", "--model.critic", "known", "--model.candidates", "8")
    flags += ("--trainer.max_steps", f"{steps}", "--trainer.val_check_interval", f"{steps}", "--data.grid", "31")
    flags += ("--model.network.hidden", "32", "--model.network.layers", "3", "--model.episodes", "256")
    policies.ok("fit", "multigoal", *flags)
    found = json.loads((policies.folder("multigoal") / "results.json").read_text())
    assert max(found["metrics"]["soft_gap"]["values"]) < share * found["references"]["uniform"]["soft_gap"]


@pytest.mark.slow
def test_a_learned_critic_comes_near_the_optimums(policies: Runner) -> None:
    """Its RMS error, over values up to 3, falls to less than half of what an untrained one has."""
    policies.small = ("--figures.enabled", "false")
    flags = ("--model.policy", "gaussian", "--model.seeds", "[0]", "--model.candidates", "6", "--data.grid", "31")
    flags += ("--model.network.hidden", "32", "--model.network.layers", "3", "--model.episodes", "64")
    errors = []
    for steps in ("1", "1000"):
        more = ("--trainer.max_steps", steps, "--trainer.val_check_interval", steps, "--run.name", steps)
        policies.ok("fit", "multigoal", *flags, *more)
        found = json.loads((policies.folder("multigoal", steps) / "results.json").read_text())
        errors.append(found["metrics"]["critic_error"]["values"][0])
    assert errors[1] < 0.45 * errors[0]
