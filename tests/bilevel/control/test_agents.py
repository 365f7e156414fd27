"""The agents' mathematics: closed forms, finite differences, and the identities that the module states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_toys.bilevel.control.agents import (
    Problem,
    SoftValue,
    funcbo_weights,
    half_squared_error,
    inner_hessian_operator,
    mle_gradient,
    mle_loss,
    omd_weights,
    q_of_actions,
    softmax_policy,
    vep_gradient,
)
from lightning_toys.bilevel.control.gradient_check import cosine_similarity, directional_differences, inner_response
from lightning_toys.bilevel.control.learner import AgentNetworks, Learner
from lightning_toys.bilevel.control.nets import MultiHeadMLP
from lightning_toys.bilevel.control.replay import Batch
from lightning_toys.bilevel.control.settings import Solver
from lightning_toys.bilevel.control.world_model import ModelPrediction
from lightning_toys.bilevel.implicit import gauss_newton_product, gradient
from lightning_toys.bilevel.vectors import flatten

SEEDS, STATES, ACTIONS, B = [3, 8], 3, 2, 16
VALUE = SoftValue(0.1, 0.9)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    r = len(SEEDS)
    s = torch.randn(r, B, STATES, generator=g)
    return Batch(
        s,
        torch.randint(ACTIONS, (r, B), generator=g),
        torch.randn(r, B, generator=g),
        s + 0.3 * torch.randn(r, B, STATES, generator=g),
        (torch.rand(r, B, generator=g) < 0.8).double(),
    )


def vep_loss(prediction: ModelPrediction, batch: Batch, values: MultiHeadMLP) -> Tensor:
    """What vep_gradient descends, with autograd's graph."""
    off: Tensor = values(prediction.next_state) - values(batch.next_observation)
    return off.square().mean((1, 2, 3)) + (prediction.reward - batch.reward).square().mean(1)


def nets_of(agent: str = "omd", solver: Solver | None = None, heads: int = 2, hidden: int = 5) -> AgentNetworks:
    nets = AgentNetworks(SEEDS, STATES, ACTIONS, hidden, 4, heads, agent, solver or Solver())  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(5)
    for p in nets.target.parameters():  # a target of its own
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return nets


@cache
def solution(steps: int = 1500) -> dict[str, Tensor]:
    """Return the values' weights close to the inner problem's solution, where its Hessian is positive."""
    nets = nets_of()
    problem = problem_of(nets)
    y = problem.y_model().detach()
    adam = torch.optim.Adam(nets.q.parameters(), lr=1e-2)
    for k in range(steps):
        adam.param_groups[0]["lr"] = 1e-2 * (1 - k / steps)
        found = gradients(problem.inner_loss(problem.q.weights(), y), nets.q)
        for p, g in zip(nets.q.parameters(), found.values(), strict=True):
            p.grad = g
        adam.step()
    return nets.q.state_dict()


def settled(nets: AgentNetworks) -> AgentNetworks:
    nets.q.load_state_dict(solution())
    return nets


def problem_of(nets: AgentNetworks, batch: Batch | None = None) -> Problem:
    return Problem(nets.q, nets.target, nets.model, VALUE, batch or batch_of())


def gradients(losses: Tensor, net: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of each replica's loss (R,) in a network's weights, by autograd."""
    named = dict(net.named_parameters())
    return dict(zip(named, torch.autograd.grad(losses.sum(), list(named.values())), strict=True))


# networks


def test_heads_are_perceptrons_of_their_own() -> None:
    net, x = MultiHeadMLP(SEEDS, "q", (STATES, 5, 5, ACTIONS), 2), batch_of().observation
    out = net(x)
    for r in range(2):
        for k in range(2):
            h = x[r]
            for i in range(3):
                h = h @ getattr(net, f"w{i}")[r, k] + getattr(net, f"b{i}")[r, k]
                h = h.relu() if i < 2 else h
            assert torch.allclose(out[r, k], h, atol=1e-14)
    alone = MultiHeadMLP(SEEDS[1:], "q", (STATES, 5, 5, ACTIONS), 2)
    assert torch.equal(alone(x[1:]), out[1:])


@pytest.mark.parametrize("heads", [1, 2])
def test_a_derivative_along_the_weights(heads: int) -> None:
    net, x = MultiHeadMLP(SEEDS, "q", (STATES, 5, 5, ACTIONS), heads), batch_of().observation
    g = torch.Generator().manual_seed(1)
    v = {n: torch.randn(p.shape, generator=g) for n, p in net.named_parameters()}
    names = list(v)

    def f(*weights: Tensor) -> Tensor:
        return net(x, dict(zip(names, weights, strict=True)))

    expected = torch.func.jvp(f, tuple(p.detach() for p in net.parameters()), tuple(v.values()))[1]
    assert torch.allclose(net.jvp(net.forward_pass(x), v), expected, atol=1e-13)


@pytest.mark.parametrize("heads", [1, 2])
def test_reverse_passes_written_out(heads: int) -> None:
    net, x = MultiHeadMLP(SEEDS, "q", (STATES, 5, 5, ACTIONS), heads), batch_of().observation.requires_grad_()
    out = net(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    params = list(net.parameters())
    *expected, expected_x = torch.autograd.grad(out, [*params, x], cotangent)
    forward = net.forward_pass(x.detach())
    assert torch.equal(forward.output, out.detach())
    found = net.vjp(forward, cotangent)
    assert list(found) == [n for n, _ in net.named_parameters()]
    for g, w in zip(found.values(), expected, strict=True):
        assert torch.allclose(g, w, atol=1e-13)
        assert g.is_contiguous()
    assert torch.allclose(net.vjp_input(forward, cotangent), expected_x, atol=1e-13)


# values and targets


@pytest.mark.parametrize("heads", [1, 2])
def test_the_gradient_of_the_soft_value(heads: int) -> None:
    q = torch.randn(2, heads, 7, 3, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (expected,) = torch.autograd.grad(VALUE.value(q).sum(), q)
    assert torch.allclose(VALUE.grad(q.detach(), VALUE.value(q.detach())), expected, atol=1e-14)
    same = torch.ones(1, 2, 1, 2, requires_grad=True)  # both heads are the smaller: each has half, as in torch
    (expected,) = torch.autograd.grad(VALUE.value(same).sum(), same)
    assert torch.allclose(VALUE.grad(same.detach(), VALUE.value(same.detach())), expected)


def test_gradients_written_out_are_autograds() -> None:
    """Of y_T in the model, of the values' loss, of both models' own losses."""
    nets = nets_of("vep")
    problem = problem_of(nets)
    targets = problem.model_targets()
    y = problem.y_model()
    assert torch.allclose(targets.y, y.detach(), atol=1e-14)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    named = dict(nets.model.named_parameters())
    model = nets.model.forward_pass(problem.inputs)
    cases = [
        (problem.model_vjp(targets, w), torch.autograd.grad(y, list(named.values()), w)),
        (
            mle_gradient(problem, model)[0],
            list(gradients(mle_loss(problem.predict(), problem.batch), nets.model).values()),
        ),
        (
            vep_gradient(problem, model, nets.values)[0],
            list(gradients(vep_loss(problem.predict(), problem.batch, nets.values), nets.model).values()),
        ),
    ]
    for found, expected in cases:
        assert list(found) == list(named)
        for g, x in zip(found.values(), expected, strict=True):
            assert torch.allclose(g, x, atol=1e-13)
    inner = gradients(problem.inner_loss(nets.q.weights(), targets.y), nets.q)
    for n, g in problem.q_gradient(problem.td_error(targets.y)).items():
        assert torch.allclose(g, inner[n], atol=1e-13)
    assert torch.allclose(mle_gradient(problem, model)[1], mle_loss(problem.predict(), problem.batch))
    assert torch.allclose(
        vep_gradient(problem, model, nets.values)[1], vep_loss(problem.predict(), problem.batch, nets.values)
    )


def test_the_soft_value() -> None:
    q = torch.tensor([[[[1.0, 2.0]], [[1.5, 0.5]]]])  # the smaller: 1, .5
    assert float(VALUE.value(q)[0, 0]) == pytest.approx(0.1 * np.log(np.exp(10) + np.exp(5)))
    assert float(SoftValue(1e-4, 0.9).value(q)[0, 0]) == pytest.approx(1.0)  # no overflow, the hard maximum
    assert float(VALUE.value(q[:, :1])[0, 0]) == pytest.approx(0.1 * np.log(np.exp(10) + np.exp(20)))


def test_a_truncated_step_is_bootstrapped_and_a_terminated_one_is_not() -> None:
    q = torch.tensor([[[[1.0, 1.0]]]])
    V = 1 + 0.1 * np.log(2)
    assert float(VALUE.bellman_target(torch.tensor([[2.0]]), torch.ones(1, 1), VALUE.value(q))) == pytest.approx(
        2 + 0.9 * V
    )
    assert float(VALUE.bellman_target(torch.tensor([[2.0]]), torch.zeros(1, 1), VALUE.value(q))) == pytest.approx(2)


def test_the_policy_is_of_the_mean_of_both_values() -> None:
    q = torch.tensor([[[[1.0, 2.0]], [[3.0, 1.0]]]])
    probabilities = softmax_policy(q, 0.5)[0, 0]
    assert probabilities.tolist() == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])


def test_q_of_actions() -> None:
    q = torch.arange(24.0).view(1, 2, 6, 2)
    action = torch.tensor([[0, 1, 1, 0, 1, 0]])
    assert q_of_actions(q, action)[0, 1].tolist() == [12, 15, 17, 18, 21, 22]


def test_losses_by_hand() -> None:
    d, y = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]]), torch.tensor([[0.0, 1.0]])
    assert float(half_squared_error(d, y)) == pytest.approx(0.5 * ((1 + 1) / 2 + (0 + 9) / 2))
    nets, batch = nets_of("vep"), batch_of()
    prediction = problem_of(nets, batch).predict()
    off = prediction.next_state - batch.next_observation
    mle = (off**2).sum(-1).mean(1) + ((prediction.reward - batch.reward) ** 2).mean(1)
    assert torch.allclose(mle_loss(prediction, batch), mle)
    values = [nets.values(x) for x in (prediction.next_state, batch.next_observation)]
    vep = (values[0] - values[1]).square().flatten(1).mean(1) + ((prediction.reward - batch.reward) ** 2).mean(1)
    assert torch.allclose(vep_loss(prediction, batch, nets.values), vep)


# the outer gradient


def model_gradient(problem: Problem, w: Tensor) -> Tensor:
    params = list(problem.model.parameters())
    found = torch.autograd.grad(problem.y_model(), params, w)
    return torch.cat([g.flatten(1) for g in found], 1)


def test_the_gauss_newton_product() -> None:
    nets = nets_of()
    problem = problem_of(nets)
    g = torch.Generator().manual_seed(7)
    v = {n: torch.randn(p.shape, generator=g) for n, p in nets.q.named_parameters()}
    theta = {n: p.detach() for n, p in nets.q.named_parameters()}
    expected = gauss_newton_product(problem.d, theta, v, torch.tensor(1 / B))
    found = inner_hessian_operator(problem, "gauss_newton", problem.y)(v)
    assert all(torch.allclose(found[n], expected[n], atol=1e-13) for n in v)


@pytest.mark.parametrize("inverse", ["identity", "gauss_newton", "hessian"])
def test_omd_is_the_double_backward(inverse: str) -> None:
    """-(d_T d_theta L_in)' v by a second-order graph, and by values' weights w alone."""
    nets = settled(nets_of())
    problem = problem_of(nets)
    y = problem.y_model().detach()
    w, _, residual = omd_weights(problem, inverse, 400, 0.1, y)  # type: ignore[arg-type]
    assert float(residual.max()) < 1e-8
    # the same v, dense
    v = gradients(problem.outer_loss(problem.q.weights()), problem.q)
    flat = flatten(v)
    if inverse != "identity":
        product = inner_hessian_operator(problem, inverse, y)  # type: ignore[arg-type]
        size = flat.shape[1]
        columns = []
        for j in range(size):
            e = torch.zeros_like(flat)
            e[:, j] = 1
            like, parts = {}, torch.split(e, [p[0].numel() for p in v.values()], 1)
            for (n, x), part in zip(v.items(), parts, strict=True):
                like[n] = part.view_as(x)
            columns.append(flatten(product(like)))
        H = torch.stack(columns, -1)
        assert torch.allclose(H, H.mT, atol=1e-10)
        flat = torch.linalg.solve(H + 0.1 * torch.eye(size), flat)
    weights = problem.q.weights()
    inner = problem.inner_loss(weights, problem.y_model()).sum()
    first = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    directional = (torch.cat([g.flatten(1) for g in first], 1) * flat).sum()
    expected = [-g for g in torch.autograd.grad(directional, list(problem.model.parameters()))]
    assert torch.allclose(model_gradient(problem, w), torch.cat([g.flatten(1) for g in expected], 1), atol=1e-8)


def test_funcbo_with_the_inner_problem_solved_is_the_gradient_of_the_targets_distance() -> None:
    problem = problem_of(nets_of())
    y = problem.y_model()
    w, loss = funcbo_weights(problem, y.detach(), True)
    expected = (y - problem.y).square().mean(1)
    found = torch.autograd.grad(expected.sum(), list(problem.model.parameters()))
    assert torch.allclose(model_gradient(problem, w), torch.cat([g.flatten(1) for g in found], 1), atol=1e-12)
    assert torch.allclose(loss, expected.detach())


CASES = [
    ("mle", Solver()),
    ("vep", Solver()),
    ("omd", Solver(inverse="hessian", cg_steps=300, cg_damping=0.5)),
    pytest.param("omd", Solver(inverse="gauss_newton", cg_steps=300, cg_damping=0.5), marks=pytest.mark.slow),
    pytest.param("omd", Solver(cg_damping=0.5), marks=pytest.mark.slow),
    ("funcbo", Solver()),
    ("funcbo", Solver(inner_value="lagged")),
]


def checked(agent: str, solver: Solver) -> Tensor:
    nets, batch = nets_of(agent, solver), batch_of()
    if agent == "omd":
        settled(nets)
    learner = Learner(nets, agent, solver, VALUE, 0.01)  # type: ignore[arg-type]
    problem = learner.problem(batch)
    fits = learner.agent.response == "loss"
    found, _ = learner.model_gradient(problem, None if fits else problem.model_targets())
    assert found is not None
    directions, differences = directional_differences(
        problem,
        learner.agent.response,
        SEEDS,
        6,
        0,
        solver.cg_damping,
        partial(learner.model_gradient, problem) if fits else None,
    )
    return cosine_similarity(found, directions, differences)


@pytest.mark.parametrize(("agent", "solver"), CASES)
def test_outer_gradients_against_finite_differences(agent: str, solver: Solver) -> None:
    """Exact ones to rounding, or to the kinks of ReLU; the identity is near where the damping is large."""
    found = checked(agent, solver)
    lowest = 1 - 1e-6 if agent != "omd" else 0.95 if solver.inverse == "identity" else 0.999
    assert float(found.min()) > lowest, found


def test_a_gradient_without_the_inverse_fails_the_check() -> None:
    """With little damping the identity is far from the response that it stands for."""
    nets = settled(nets_of())
    problem = problem_of(nets)
    y = problem.y_model().detach()
    claimed = {}
    for inverse in ("identity", "hessian"):
        w, _, _ = omd_weights(problem, inverse, 300, 0.05, y)  # type: ignore[arg-type]
        named = dict(nets.model.named_parameters())
        found = torch.autograd.grad(problem.y_model(), list(named.values()), w)
        claimed[inverse] = dict(zip(named, found, strict=True))
    directions, differences = directional_differences(problem, "weights", SEEDS, 6, 0, 0.05)
    right, wrong = (cosine_similarity(claimed[k], directions, differences) for k in ("hessian", "identity"))
    assert float(right.min()) > 0.999
    assert float(wrong.min()) < 0.99


def test_the_inner_response_is_the_start_where_nothing_changes() -> None:
    nets = nets_of()
    problem = problem_of(nets)
    y = problem.y_model().detach()
    start = {n: p.detach().clone() for n, p in nets.q.named_parameters()}
    start_gradient = gradient(lambda w: problem.inner_loss(w, y), start)
    theta, _ = inner_response(problem, y, start, start_gradient, 0.5)
    assert all(torch.allclose(theta[n], start[n], atol=1e-12) for n in start)


def test_differences_are_nan_where_there_is_no_response() -> None:
    """Far from the inner solution the Hessian is indefinite: no number is better than a wrong one."""
    problem = problem_of(nets_of())
    _, differences = directional_differences(problem, "weights", SEEDS, 2, 0, 1e-3)
    assert differences.isnan().any()
    settled_problem = problem_of(settled(nets_of()))
    _, differences = directional_differences(settled_problem, "weights", SEEDS, 2, 0, 0.05)
    assert not differences.isnan().any()


def test_values_that_are_not_finite_show_in_every_agents_loss() -> None:
    for agent in ("mle", "vep", "omd", "funcbo"):
        nets = nets_of(agent)
        nets.q.w0.data[1] = torch.inf
        learner = Learner(nets, agent, Solver(), VALUE, 0.1)  # type: ignore[arg-type]
        sgd = [torch.optim.SGD(n.parameters(), 0.1) for n in (nets.model, nets.q)]
        loss = learner.outer_iteration(batch_of(), *sgd)
        assert loss.isfinite().tolist() == [True, False], agent


@pytest.mark.parametrize("agent", ["omd", "funcbo"])
def test_the_state_head_has_a_gradient(agent: str) -> None:
    """The published code's is exactly 0: its dynamics never learn."""
    solver = Solver()
    nets = nets_of(agent, solver)
    learner = Learner(nets, agent, solver, VALUE, 0.01)  # type: ignore[arg-type]
    problem = learner.problem(batch_of())
    found, _ = learner.model_gradient(problem, problem.model_targets())
    last = found["net.w2"]  # (R, 1, h, S + 1)
    assert (last[..., :-1].flatten(1).norm(dim=1) > 1e-6).all()
    assert (last[..., -1].flatten(1).norm(dim=1) > 1e-6).all()


def test_without_the_states_gradient_dynamics_stay_as_they_are() -> None:
    """What the published code does, as an option, so that what it costs can be seen."""
    problem = problem_of(nets_of("funcbo"))
    targets = problem.model_targets()
    w, _ = funcbo_weights(problem, targets.y, True)
    whole, still = problem.model_vjp(targets, w), problem.model_vjp(targets, w, False)
    assert float(still["net.w2"][..., :-1].abs().max()) == 0
    assert torch.equal(still["net.w2"][..., -1], whole["net.w2"][..., -1])
    assert float(still["net.w0"].abs().max()) > 0


def test_a_terminated_step_says_nothing_of_the_next_state() -> None:
    nets, batch = nets_of(), batch_of()
    over = batch._replace(not_terminated=torch.zeros_like(batch.not_terminated))
    problem = problem_of(nets, over)
    w = torch.ones_like(batch.reward)
    params = dict(nets.model.named_parameters())
    found = dict(zip(params, torch.autograd.grad(problem.y_model(), list(params.values()), w), strict=True))
    assert float(found["net.w2"][..., :-1].abs().max()) == 0
    assert float(found["net.w2"][..., -1].abs().max()) > 0


# outer iterations


def run(agent: str, solver: Solver, seeds: list[int], steps: int = 4, clip: float | None = None) -> AgentNetworks:
    nets = AgentNetworks(seeds, STATES, ACTIONS, 5, 4, 2, agent, solver)  # type: ignore[arg-type]
    learner = Learner(nets, agent, solver, VALUE, 0.1, clip)  # type: ignore[arg-type]
    # fused, as in a run: torch's reads a strided gradient as if it lay in one piece
    outer = torch.optim.Adam(nets.model.parameters(), lr=1e-2, fused=True)
    inner = torch.optim.Adam(nets.q.parameters(), lr=1e-2, fused=True)
    rows = [SEEDS.index(s) for s in seeds]
    for k in range(steps):
        batch = Batch(*(x[rows] for x in batch_of(k)))
        learner.outer_iteration(batch, outer, inner)
    return nets


ALL = [
    ("mle", Solver()),
    ("vep", Solver(vep_values=3)),
    ("omd", Solver(num_q_steps=3)),
    ("omd", Solver(inverse="gauss_newton", warm_opt=False)),
    ("omd", Solver(inverse="hessian", warm_start=False)),
    ("funcbo", Solver(smoothing=3)),
    ("funcbo", Solver(inner_value="lagged", num_t_steps=2)),
]


@pytest.mark.parametrize(("agent", "solver"), ALL)
def test_a_replica_is_alone(agent: str, solver: Solver) -> None:
    both, one = run(agent, solver, SEEDS, clip=0.5), run(agent, solver, SEEDS[1:], clip=0.5)
    for (n, p), q in zip(both.named_parameters(), one.parameters(), strict=True):
        assert torch.allclose(p[1:], q, atol=1e-9), n


@pytest.mark.parametrize(("agent", "solver"), ALL)
def test_everything_that_learns_moves(agent: str, solver: Solver) -> None:
    start = AgentNetworks(SEEDS, STATES, ACTIONS, 5, 4, 2, agent, solver)  # type: ignore[arg-type]
    end = run(agent, solver, SEEDS)
    for (n, p), q in zip(start.named_parameters(), end.parameters(), strict=True):
        still = n.startswith(("values", "start"))
        assert torch.equal(p, q) == still, n


def test_smoothing_is_the_mean_of_the_last() -> None:
    nets = nets_of("omd", Solver(smoothing=3))
    names = dict(nets.model.named_parameters())
    given = [{n: torch.full_like(p, float(k)) for n, p in names.items()} for k in (1, 2, 6, 10)]
    found = [float(nets.smooth_gradient(g)["net.b0"][0, 0, 0, 0]) for g in given]
    assert found == pytest.approx([1, 1.5, 3, 6])


def test_the_present_gradient_has_its_share_of_the_step() -> None:
    """b g + (1 - b) mean: OFBO's rule by hand, over gradients 1, 2 and 6 of which the last two are averaged."""
    solver = Solver(smoothing=2, smoothing_present=0.3)
    nets = nets_of("omd", solver)
    learner = Learner(nets, "omd", solver, VALUE, 0.1)
    sgd = torch.optim.SGD(nets.model.parameters(), lr=1.0)
    moves = []
    for k in (1.0, 2.0, 6.0):
        before = nets.model.net.b0.detach().clone()  # type: ignore[union-attr]
        learner.step_model({n: torch.full_like(p, k) for n, p in nets.model.named_parameters()}, sgd)
        moves.append(float((before - nets.model.net.b0.detach())[0, 0, 0, 0]))  # type: ignore[union-attr]
    assert moves == pytest.approx([1.0, 0.3 * 2 + 0.7 * 1.5, 0.3 * 6 + 0.7 * 4], rel=1e-6)


def test_clipping_is_a_replicas_own() -> None:
    nets = nets_of()
    learner = Learner(nets, "omd", Solver(), VALUE, 0.1, 1.0)
    sgd = torch.optim.SGD(nets.model.parameters(), lr=1.0)
    before = flatten({n: p.detach().clone() for n, p in nets.model.named_parameters()})
    size = flatten(dict(nets.model.named_parameters())).shape[1]
    scale = torch.tensor([10.0, 0.01]).view(-1, 1, 1, 1)
    learner.step_model({n: scale * torch.ones_like(p) for n, p in nets.model.named_parameters()}, sgd)
    moved = (flatten({n: p.detach() for n, p in nets.model.named_parameters()}) - before).norm(dim=1)
    assert moved.tolist() == pytest.approx([1.0, 0.01 * size**0.5], rel=1e-5)


def test_inner_moments_are_kept_or_not_for_every_agent() -> None:
    for agent in ("mle", "vep", "omd", "funcbo"):
        steps = {}
        for keep in (True, False):
            solver = Solver(warm_opt=keep)
            nets = nets_of(agent, solver)
            learner = Learner(nets, agent, solver, VALUE, 0.1)  # type: ignore[arg-type]
            outer = torch.optim.Adam(nets.model.parameters(), lr=1e-2)
            inner = torch.optim.Adam(nets.q.parameters(), lr=1e-2)
            for k in range(3):
                learner.outer_iteration(batch_of(k), outer, inner)
            steps[keep] = int(inner.state[nets.q.w0]["step"])
        assert steps == {True: 3, False: 1}, agent


def test_the_target_follows_slowly() -> None:
    nets = nets_of()
    before = copy.deepcopy(nets.target)
    learner = Learner(nets, "mle", Solver(), VALUE, 0.25)
    learner.outer_iteration(
        batch_of(), torch.optim.SGD(nets.model.parameters(), 0.1), torch.optim.SGD(nets.q.parameters(), 0.1)
    )
    for a, b, q in zip(before.parameters(), nets.target.parameters(), nets.q.parameters(), strict=True):
        assert torch.allclose(b, 0.75 * a + 0.25 * q, atol=1e-14)


def test_double_q_takes_the_smaller() -> None:
    one, two = nets_of(heads=1), nets_of(heads=2)
    batch = batch_of()
    y1, y2 = (problem_of(n, batch).y for n in (one, two))
    smaller = two.target(batch.next_observation).amin(1)
    V = 0.1 * torch.logsumexp(smaller / 0.1, -1)
    assert torch.allclose(y2, batch.reward + 0.9 * batch.not_terminated * V)
    assert y1.shape == y2.shape
    assert not torch.allclose(y1, y2)
