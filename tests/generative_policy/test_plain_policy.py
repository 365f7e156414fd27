"""Policies without Lightning: actions, densities and entropies against integrals, and one replica against all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy import Actor, BanditData, BanditPolicy, MeanFlowPolicy, MixtureData, PlainPolicy
from lightning_toys.generative_policy.bandit import sample_softmax, turns_to_states
from lightning_toys.generative_policy.gaussian_policy import exact_metrics
from lightning_toys.generative_policy.inversion import invert
from lightning_toys.generative_policy.meanflow import log_det
from lightning_toys.generative_policy.mixture import ThreeModes
from lightning_toys.nets import Network
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner
from tests.generative_policy.test_dimensions import KINDS

SMALL = Network(hidden=8, layers=2, activation="silu")


def normals(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/plain/{name}").standard_normal(shape))


def plain(kind: str, dim: int, scale: float = 1.0, bounded: bool = True) -> PlainPolicy:
    policy = PlainPolicy.build(kind, 3, dim, [4, 9], SMALL, bounded=bounded).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(scale)
    return policy


def density(policy: PlainPolicy, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Midpoints a (n,), log pi (R, n) at one state, and their width, by the angle: a = tanh y where bounded."""
    state = normals("state", 1, 3)
    y = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 16 - 8
    if policy.squashes or policy.actor.__class__.__name__ == "GaussianActor":
        a, width = torch.tanh(y), 16 / n * (1 - torch.tanh(y) ** 2)
    else:
        a, width = y, torch.full_like(y, 16 / n)
    return a, policy.log_prob(a[:, None], state.expand(n, 3)), width


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "meanflow", "flow"])
def test_density_integrates_to_one_and_entropy_is_its_integral(kind: str, bounded: bool) -> None:
    policy = plain(kind, 1, 1.5, bounded)
    _, log_prob, width = density(policy, 800)
    assert (log_prob.exp() @ width).tolist() == pytest.approx([1.0, 1.0], abs=2e-3)
    entropy = -(torch.where(log_prob > -500, log_prob * log_prob.exp(), 0.0) @ width)
    found = policy.entropy(normals("state", 1, 3), draws=4000)[:, 0]
    assert found.tolist() == pytest.approx(entropy.tolist(), abs=0.06)
    assert (entropy[0] - entropy[1]).abs() > 1e-3  # each replica its own


def test_density_of_a_map_with_folds() -> None:
    """A steep network sends several noises to one action: those that a fine grid of noises finds, all of them."""
    policy, state = plain("meanflow", 1, 4.5, bounded=False), normals("state", 1, 3)
    n = 4001
    grid = torch.linspace(-7, 7, n, dtype=torch.float64).expand(2, n).unsqueeze(-1)
    at = policy.states(state.expand(n, 3))
    f = policy.actor.act(at, grid, grid).detach()[..., 0]
    a = torch.linspace(-2.1, 1.9, 25, dtype=torch.float64)
    found = policy.inverse(a[:, None], state.expand(25, 3))
    slopes = log_det(policy.actor.u, grid, at)[0]  # type: ignore[arg-type]
    differ = 0
    for r in range(2):
        for k in range(25):
            i = ((f[r, :-1] - a[k]) * (f[r, 1:] - a[k]) < 0).nonzero()[:, 0]
            share = (a[k] - f[r, i]) / (f[r, i + 1] - f[r, i])
            e = grid[r, i, 0] + share * 14 / (n - 1)
            slope = slopes[r, i] + share * (slopes[r, i + 1] - slopes[r, i])
            wanted = torch.logsumexp(-0.5 * e**2 - 0.5 * math.log(2 * math.pi) - slope, 0)
            same = len(i) == int(found.solutions[r, k]) and abs(float(wanted - found.log_prob[r, k])) < 1e-2
            differ += not (same or bool(torch.isneginf(wanted) & torch.isneginf(found.log_prob[r, k])))
    assert found.solutions.max() >= 2  # not one to one, and it says so
    assert differ <= 1  # beside a fold, where two solutions are one


class Linear(torch.nn.Module):
    """u(z, 0, 1) = A z with its derivative."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = A

    def forward(self, z: Tensor, r: Tensor, t: Tensor, state: Tensor) -> tuple[Tensor, None]:
        return z @ self.A.T, None

    def jvp(
        self, z: Tensor, r: Tensor, t: Tensor, dz: Tensor, state: Tensor | None = None, dt: float = 1.0
    ) -> tuple[Tensor, None, Tensor]:
        return z @ self.A.T, None, dz @ self.A.T


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_singular_jacobian_has_no_solution_and_no_error(scale: float) -> None:
    """f(e) = e - A e sends the plane to a line; with what Newton's method adds its Jacobian is exactly singular."""
    added = 1e-6 * torch.eye(2, dtype=torch.float64)  # by Newton's method
    J = torch.ones(2, 2, dtype=torch.float64) - added
    a = scale * torch.tensor([[[1.0, -1.0], [0.5, -2.0]]], dtype=torch.float64)  # not on the line
    assert torch.linalg.solve_ex(J + added, a[0, 0]).info != 0
    found = invert(Linear(torch.eye(2, dtype=torch.float64) - J), a, torch.zeros(1, 2, 0, dtype=torch.float64))  # type: ignore[arg-type]
    assert (found.solutions == 0).all()
    assert (found.log_prob == -torch.inf).all()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_map_that_is_one_to_one(dim: int) -> None:
    """log q(f(e)) = log N(e) - log|det df/de|, and one solution; with tanh the factor 1 - a^2 of each coordinate."""
    policy, squashed = plain("meanflow", dim, bounded=False), plain("meanflow", dim)
    state, e = normals("states", 2, 6, 3), 0.7 * normals("e", 2, 6, dim)
    a = policy.actor.act(state, e, e).detach()
    found = policy.inverse(a, state)
    assert (found.solutions == 1).all()
    wanted = -0.5 * e.square().sum(-1) - 0.5 * dim * math.log(2 * math.pi) - log_det(policy.actor.u, e, state)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(policy.log_prob(a, state), wanted, rtol=1e-6, atol=1e-6)
    factor = torch.log1p(-(torch.tanh(a) ** 2)).sum(-1)
    torch.testing.assert_close(squashed.log_prob(torch.tanh(a), state), wanted - factor, rtol=1e-5, atol=1e-5)
    assert factor.abs().max() > 0.1
    assert torch.isneginf(squashed.log_prob(torch.ones(2, 6, dim), state)).all()


@pytest.mark.parametrize("kind", ["gaussian", "meanflow", "flow"])
def test_one_replica_is_its_part_of_all(kind: str) -> None:
    policy, state = plain(kind, 2), normals("states", 2, 6, 3)
    action, alone = policy.act(state, seed=5), [policy.replica(r) for r in range(2)]
    assert action.shape == (2, 6, 2)
    assert action.abs().max() < 1
    for r, one in enumerate(alone):
        torch.testing.assert_close(one.act(state[r], seed=5)[0], action[r], rtol=0, atol=1e-12)
        assert one.log_prob(action[r], state[r])[0].tolist() == pytest.approx(
            policy.log_prob(action, state)[r].tolist(), abs=5e-3
        )
    assert (policy.act(state, seed=6) - action).abs().max() > 0.01
    assert torch.equal(policy.act(state, seed=5), action)
    with torch.no_grad():
        next(alone[0].parameters()).add_(1)
    assert torch.equal(policy.act(state, seed=5), action)  # it was a copy
    with pytest.raises(ToyError, match=r"^replica: 2 is not allowed"):
        policy.replica(2)
    with pytest.raises(ToyError, match=r"^state: shape"):
        policy.act(torch.zeros(4, 2))


def test_noise_on_top_has_no_density() -> None:
    policy = PlainPolicy.build("meanflow", 3, 2, [0], SMALL, target_std=0.1)
    state = torch.zeros(4, 3)
    for call in (lambda: policy.log_prob(policy.act(state), state), lambda: policy.entropy(state)):
        with pytest.raises(ToyError, match=r"^log_prob: actions have noise of 0\.1 on top of a map"):
            call()
    with pytest.raises(ToyError, match=r"^inverse: the policy is no one-step map"):
        plain("flow", 2).inverse(torch.zeros(4, 2), state)


@pytest.mark.parametrize("variant", ["gaussian", "meanflow", "flow"])
def test_after_load_from_checkpoint(policies: Runner, variant: str) -> None:
    flags = ("--model.target_std", "0") if variant == "meanflow" else ()
    policies.ok(
        "fit", variant, "--trainer.max_steps", "10", "--model.seeds", "[3,4]", "--data.target.std", "0.2", *flags
    )
    path = policies.folder(variant) / "checkpoints" / "last.ckpt"
    module = KINDS[variant].load_from_checkpoint(path, weights_only=True)
    policy = module.plain().double()
    nothing = torch.zeros(100, 0)
    action = policy.act(nothing)
    assert action.shape == (2, 100, 2)
    log_prob = policy.log_prob(action, nothing)
    assert log_prob.isfinite().all()
    entropy = policy.entropy(torch.zeros(1, 0), draws=500)[:, 0]
    if variant == "gaussian":
        mu, log_sigma = (p.detach() for p in policy.actor.parameters_at(torch.zeros(2, 1, 0)))  # type: ignore[operator, union-attr]
        exact = exact_metrics(mu, log_sigma, ThreeModes(0.2))["entropy_exact"]
        assert entropy.tolist() == pytest.approx(exact.tolist(), abs=0.15)
    if variant != "flow":  # whose actions are of Euler steps, and whose entropy is of the flow
        assert entropy.tolist() == pytest.approx((-log_prob.mean(1)).tolist(), abs=0.5)
    module.double()
    e = policy.noise("e", 0, 100)
    if variant != "flow":
        torch.testing.assert_close(module(e), action)


def test_the_bandits_policy() -> None:
    module = BanditPolicy("gaussian", seeds=[3, 4], network=SMALL)
    module.sizes = module.measure(BanditData())
    module.configure_model()
    policy, state = module.plain(), turns_to_states(torch.arange(5) / 5)
    torch.testing.assert_close(
        policy.actor.act(state.expand(2, 5, 2), *(module.evaluation_noise(k, 5).float() for k in ("e", "xi"))),
        module.act(state),
    )
    assert policy.entropy(state).shape == (2, 5)
    untrained = MeanFlowPolicy()
    with pytest.raises(ToyError, match="has no networks yet"):
        untrained.plain()
    untrained.sizes = untrained.measure(MixtureData())
    untrained.configure_model()
    assert untrained.plain().act(torch.zeros(3, 0)).shape == (1, 3, 2)


@pytest.mark.parametrize("kind", ["gaussian", "meanflow", "flow"])
def test_learning_to_draw_given_actions(kind: str) -> None:
    """Two actions, by the sign of the state: each is learned; with both at every state a flow keeps them apart."""
    policy = PlainPolicy.build(kind, 1, 1, [0], Network(hidden=32, layers=2, activation="silu"), nfe=8)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    g = keyed_generator(0, 0, "test/plain/learn")
    for step in range(300):
        state = torch.from_numpy(g.choice([-1.0, 1.0], (128, 1))).float()
        action = 0.6 * state + 0.05 * torch.from_numpy(g.standard_normal((128, 1))).float()
        optimizer.zero_grad()
        policy.fit_loss(action, state, step).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for sign in (-1.0, 1.0):
        found = policy.act(torch.full((500, 1), sign)).detach()
        assert found.mean().item() == pytest.approx(0.6 * sign, abs=0.15)
        assert found.std() < 0.25


class Shift(Actor):
    """y = W s + e / 2, of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[[0.3], [0.1], [-0.2]], [[0.0], [0.5], [0.4]]]).double())

    def act(self, state: Tensor, e: Tensor, xi: Tensor) -> Tensor:
        return state @ self.weight + 0.5 * e


class KnownShift(Shift):
    """Its density too, and a loss."""

    def log_prob(self, state: Tensor, action: Tensor) -> Tensor:
        return torch.distributions.Normal(state @ self.weight, 0.5).log_prob(action).sum(-1)  # type: ignore[no-untyped-call,no-any-return]

    def fit_losses(self, state: Tensor, x: Tensor) -> Tensor:
        return -self.log_prob(state, x)


@pytest.mark.parametrize("bounded", [True, False])
def test_an_actor_of_ones_own(bounded: bool) -> None:
    """Its density through tanh integrates to one, its entropy is that of the density; what it lacks is one line."""
    policy, state = PlainPolicy(KnownShift(), [4, 9], 3, 1, bounded), normals("state", 1, 3)
    _, log_prob, width = density(policy, 800)
    assert (log_prob.exp() @ width).tolist() == pytest.approx([1.0, 1.0], abs=2e-3)
    entropy = -(torch.where(log_prob > -500, log_prob * log_prob.exp(), 0.0) @ width)
    assert policy.entropy(state, draws=4000)[:, 0].tolist() == pytest.approx(entropy.tolist(), abs=0.06)
    action = policy.act(state, seed=3)
    outside = policy.log_prob(torch.tensor([[2.0]]).double(), state)
    assert bool(outside.isneginf().all()) == bounded
    assert policy.fit_loss(action, state).shape == (2,)
    if not bounded:
        torch.testing.assert_close(policy.fit_loss(action, state), -policy.log_prob(action, state).mean(1))
        closed = 0.5 * math.log(2 * math.pi * math.e * 0.25)
        assert entropy.tolist() == pytest.approx([closed] * 2, abs=1e-3)
    lacking = PlainPolicy(Shift(), [4, 9], 3, 1, bounded)
    for call, name in (
        (lambda: lacking.log_prob(action, state), "log_prob"),
        (lambda: lacking.entropy(state), "log_prob"),
        (lambda: lacking.fit_loss(action, state), "fit_losses"),
    ):
        with pytest.raises(ToyError, match=f"^Shift has no {name}; give the class one"):
            call()


def test_softmax_of_candidates_is_a_step_of_mirror_descent() -> None:
    """What the page's example does: of many candidates the chosen have the density pi exp(Q / T) / Z."""
    policy = plain("gaussian", 1)
    n = 4000
    a = policy.act(torch.zeros(n * 16, 3))[0].detach().reshape(n, 16)
    chosen = sample_softmax(-((a - 0.5) ** 2), 0.1, torch.from_numpy(keyed_generator(0, 0, "u").random(n)))
    found = a.gather(1, chosen[:, None]).mean()
    weight = torch.softmax(-((a.flatten() - 0.5) ** 2) / 0.1, 0)
    assert found.item() == pytest.approx((weight @ a.flatten()).item(), abs=0.05)
