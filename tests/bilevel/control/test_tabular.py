import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_toys.bilevel.control.tabular import (
    TabularMDP,
    TabularModel,
    bellman_error_objective,
    bellman_jacobian,
    implicit_gradient,
    plan,
    policy_return,
    return_objective,
    soft_bellman,
    soft_policy,
    soft_value,
    soft_value_iteration,
    two_state_mdp,
)
from lightning_toys.training.noise import keyed_generator

GAMMA = 0.9
OUTER = {"return": return_objective, "bellman error": bellman_error_objective}


def wrong_model(states: int = 2, actions: int = 2, seed: int = 0) -> TabularModel:
    """A model that is not the mdp's, by much."""
    generator = keyed_generator(seed, 0, "test/tabular")
    logits = torch.from_numpy(generator.standard_normal((actions, states, states)))
    return TabularModel(logits, torch.from_numpy(0.5 * generator.standard_normal((states, actions))))


def random_mdp(states: int, actions: int, seed: int) -> TabularMDP:
    model = wrong_model(states, actions, seed + 100)
    start = torch.from_numpy(keyed_generator(seed, 1, "test/tabular").dirichlet([1.0] * states))
    return TabularMDP(model.transition, model.reward, start, GAMMA)


def flat(model: TabularModel) -> Tensor:
    return torch.cat([x.flatten() for x in model])


def differences(outer: Callable[[Tensor], Tensor], model: TabularModel, alpha: float, h: float = 1e-3) -> Tensor:
    """Central differences of fourth order through the solved model: the error is h^4 and eps / h."""
    theta, out = flat(model), []
    split = model.logits.numel()

    def value(t: Tensor) -> float:
        moved = TabularModel(t[:split].view_as(model.logits), t[split:].view_as(model.reward))
        return float(outer(plan(moved, GAMMA, alpha)))

    for i in range(theta.numel()):
        e = torch.zeros_like(theta)
        e[i] = h
        near, far = value(theta + e) - value(theta - e), value(theta + 2 * e) - value(theta - 2 * e)
        out.append((8 * near - far) / (12 * h))
    return torch.tensor(out, dtype=theta.dtype)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("alpha", "value"), [(1e-4, 1.0272727), (0.01, 1.0272551)])
def test_the_true_model_earns_what_is_known(alpha: float, value: float) -> None:
    mdp = two_state_mdp()
    q = plan(mdp.true_model(), GAMMA, alpha)
    assert abs(float(return_objective(mdp, alpha)(q)) - value) < 5e-8


def test_no_policy_earns_more_than_the_planner_at_temperature_zero() -> None:
    mdp = two_state_mdp()
    best = max(
        float(policy_return(mdp, torch.eye(2, dtype=torch.float64)[list(choice)]))
        for choice in itertools.product([0, 1], repeat=2)
    )
    assert abs(best - 1.0272727272727) < 1e-12
    assert abs(float(return_objective(mdp, 1e-4)(plan(mdp.true_model(), GAMMA, 1e-4))) - best) < 1e-12


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.1, 0.5, 5.0])
@pytest.mark.parametrize(("states", "actions"), [(2, 2), (5, 3), (30, 4)])
def test_the_planner_solves_the_soft_bellman_equation(alpha: float, states: int, actions: int) -> None:
    model = wrong_model(states, actions)
    q = plan(model, GAMMA, alpha)
    residual = soft_bellman(q, model.transition, model.reward, GAMMA, alpha) - q
    assert float(residual.abs().max()) < 2e-15 * max(1.0, float(q.abs().max()))
    # by hand, one state and action after the other
    s, a = states - 1, 1
    value = [alpha * float(torch.logsumexp(q[t] / alpha, 0)) for t in range(states)]
    hand = float(model.reward[s, a]) + GAMMA * sum(float(model.transition[a, s, t]) * value[t] for t in range(states))
    assert abs(hand - float(q[s, a])) < 1e-12


def test_temperature_is_in_units_of_reward() -> None:
    """Q*(c r, c alpha) = c Q*(r, alpha); and one action leaves nothing to choose: Q = (I - gamma P)^-1 r."""
    model = wrong_model(4, 3)
    scaled = plan(TabularModel(model.logits, 3 * model.reward), GAMMA, 0.6)
    assert torch.allclose(scaled, 3 * plan(model, GAMMA, 0.2), rtol=1e-13, atol=1e-13)
    single = wrong_model(4, 1)
    eye = torch.eye(4, dtype=torch.float64)
    exact = torch.linalg.solve(eye - GAMMA * single.transition[0], single.reward)
    assert torch.allclose(plan(single, GAMMA, 0.3), exact, rtol=1e-13, atol=1e-13)


def test_the_soft_value_is_reward_and_entropy_of_its_own_policy() -> None:
    """V* = (I - gamma P_pi)^-1 (r_pi + alpha H(pi)), in the model."""
    alpha, model = 0.3, wrong_model(4, 3)
    q = plan(model, GAMMA, alpha)
    pi = soft_policy(q, alpha)
    reward = (pi * (model.reward - alpha * pi.log())).sum(-1)
    step = torch.einsum("sa,ast->st", pi, model.transition)
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - GAMMA * step, reward)
    assert torch.allclose(soft_value(q, alpha), exact, rtol=1e-13, atol=1e-13)


def test_the_return_is_the_sum_over_time() -> None:
    mdp, alpha = random_mdp(4, 3, 0), 0.3
    pi = soft_policy(plan(wrong_model(4, 3), GAMMA, alpha), alpha)
    distribution, total = mdp.initial, 0.0
    for t in range(400):
        total += GAMMA**t * float((distribution[:, None] * pi * mdp.reward).sum())
        distribution = torch.einsum("s,sa,ast->t", distribution, pi, mdp.transition)
    assert abs(total - float(policy_return(mdp, pi))) < 1e-12


def test_the_bellman_error_is_zero_for_the_true_model_alone() -> None:
    mdp, alpha = two_state_mdp(), 0.1
    assert float(bellman_error_objective(mdp, alpha)(plan(mdp.true_model(), GAMMA, alpha))) < 1e-28
    assert float(bellman_error_objective(mdp, alpha)(plan(wrong_model(), GAMMA, alpha))) > 1e-3


def test_the_jacobian_is_autograds() -> None:
    model, alpha = wrong_model(3, 2), 0.2
    q = torch.from_numpy(keyed_generator(0, 2, "test/tabular").standard_normal((3, 2)))

    def backup(flattened: Tensor) -> Tensor:
        return soft_bellman(flattened.view(3, 2), model.transition, model.reward, GAMMA, alpha).flatten()

    by_autograd = torch.autograd.functional.jacobian(backup, q.flatten())
    assert torch.allclose(bellman_jacobian(q, model.transition, GAMMA, alpha), by_autograd, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("alpha", [0.1, 0.5])
@pytest.mark.parametrize("where", ["wrong", "true", "larger"])
def test_the_implicit_gradient_is_that_of_finite_differences(outer: str, alpha: float, where: str) -> None:
    mdp = random_mdp(3, 2, 1) if where == "larger" else two_state_mdp()
    model = {"wrong": wrong_model(), "true": mdp.true_model(), "larger": wrong_model(3, 2)}[where]
    if (outer, where) == ("bellman error", "true"):
        assert float(flat(implicit_gradient(OUTER[outer](mdp, alpha), model, GAMMA, alpha).model).norm()) < 1e-14
        return  # a minimum: nothing to be relative to
    gradient = implicit_gradient(OUTER[outer](mdp, alpha), model, GAMMA, alpha)
    assert relative_error(flat(gradient.model), differences(OUTER[outer](mdp, alpha), model, alpha)) < 1e-8


@pytest.mark.parametrize("outer", OUTER)
def test_the_implicit_gradient_is_that_of_unrolling(outer: str) -> None:
    """Autograd through 400 plain backups, to which gamma^400 = 5e-19 is missing."""
    mdp, model, alpha = two_state_mdp(), wrong_model(), 0.1
    leaf = TabularModel(*(x.clone().requires_grad_() for x in model))
    q = torch.zeros_like(model.reward)
    for _ in range(400):
        q = soft_bellman(q, leaf.transition, leaf.reward, GAMMA, alpha)
    unrolled = TabularModel(*torch.autograd.grad(OUTER[outer](mdp, alpha)(q), tuple(leaf)))
    gradient = implicit_gradient(OUTER[outer](mdp, alpha), model, GAMMA, alpha)
    assert torch.allclose(gradient.q, q.detach(), rtol=1e-13, atol=1e-13)
    assert relative_error(flat(gradient.model), flat(unrolled)) < 1e-11


@pytest.mark.parametrize("broken", ["sign", "no inverse", "no transpose", "discount", "none"])
def test_the_check_fails_for_wrong_gradients(broken: str) -> None:
    """Negative controls. The last is the right formula, written out once more."""
    mdp, model, alpha = two_state_mdp(), wrong_model(), 0.1
    outer = return_objective(mdp, alpha)
    right = implicit_gradient(outer, model, GAMMA, alpha)
    q = right.q.clone().requires_grad_()
    (outer_grad,) = torch.autograd.grad(outer(q), q)
    leaf = TabularModel(*(x.clone().requires_grad_() for x in model))
    discount = GAMMA**2 if broken == "discount" else GAMMA
    system = torch.eye(4, dtype=torch.float64) - bellman_jacobian(right.q, model.transition, discount, alpha)
    if broken != "no transpose":
        system = system.T
    adjoint = (
        outer_grad if broken == "no inverse" else torch.linalg.solve(system, outer_grad.flatten()).view_as(outer_grad)
    )
    backup = soft_bellman(right.q, leaf.transition, leaf.reward, GAMMA, alpha)
    gradient = flat(TabularModel(*torch.autograd.grad(backup, tuple(leaf), -adjoint if broken == "sign" else adjoint)))
    error = relative_error(gradient, differences(outer, model, alpha))
    assert error < 1e-8 if broken == "none" else error > 1e-3


def test_the_gradient_respects_what_changes_nothing() -> None:
    """A constant added to a distribution's logits, and one added to every reward, move no policy."""
    gradient = implicit_gradient(return_objective(two_state_mdp(), 0.1), wrong_model(), GAMMA, 0.1).model
    assert float(gradient.logits.norm()) > 1e-2
    assert float(gradient.logits.sum(-1).abs().max()) < 1e-14
    assert abs(float(gradient.reward.sum())) < 1e-13 * float(gradient.reward.abs().max()) / (1 - GAMMA)


def test_a_model_that_cannot_be_right_still_learns_to_earn() -> None:
    """OMD's point: with every transition uniform, ascent on the rewards alone finds a policy as good as the best."""
    mdp, alpha = two_state_mdp(), 0.1
    outer = return_objective(mdp, alpha)
    model = TabularModel(torch.zeros(2, 2, 2, dtype=torch.float64), mdp.reward.clone())
    before = float(outer(plan(model, GAMMA, alpha)))
    for _ in range(60):
        gradient = implicit_gradient(outer, model, GAMMA, alpha)
        model = TabularModel(model.logits, model.reward + 0.3 * gradient.model.reward)
    after = float(outer(plan(model, GAMMA, alpha)))
    assert before < 0.9
    assert 1.02 < after < 1.0272728


def test_a_planner_that_does_not_get_there_says_so() -> None:
    mdp = two_state_mdp()
    with pytest.raises(RuntimeError, match="after 2 steps"):
        soft_value_iteration(mdp.transition, mdp.reward, GAMMA, 0.1, max_steps=2)
