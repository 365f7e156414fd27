"""Implicit differentiation against closed forms, in double precision; each check is shown to catch a wrong version."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_toys.bilevel.implicit import (
    BilevelProblem,
    aid_hypergradient,
    conjugate_gradient,
    finite_differences,
    functional_hypergradient,
    gauss_newton_product,
    gradient,
    hessian_operator,
    hvp,
    unrolled_hypergradient,
)
from lightning_toys.bilevel.inner_optimizers import Adam, AdamState, GradientDescent, adam_init, adam_step
from lightning_toys.bilevel.vectors import Tensors, flatten, inner_product, unflatten
from lightning_toys.training.noise import keyed_generator

R = 3


def draw(*shape: int, name: str = "x") -> Tensor:
    return torch.from_numpy(keyed_generator(7, 0, f"test/{name}").standard_normal(shape))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def net(theta: Tensors, x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x @ theta["first"] + theta["bias"]) @ theta["last"]


def small_net(name: str = "theta") -> Tensors:
    return {
        "first": draw(R, 2, 4, name=f"{name}/first"),
        "bias": draw(R, 1, 4, name=f"{name}/bias"),
        "last": draw(R, 4, 2, name=f"{name}/last"),
    }


# vectors and products


def test_flatten_and_back() -> None:
    v = small_net()
    flat = flatten(v)
    assert flat.shape == (R, 20)
    back = unflatten(flat, v)
    assert all(torch.equal(back[k], v[k]) for k in v)
    torch.testing.assert_close(inner_product(v, v), flat.square().sum(1))


@pytest.mark.parametrize("once", [True, False])
def test_hessian_products(once: bool) -> None:
    """Against the whole Hessian, replica by replica; the loss of one replica does not reach another."""
    x, y = draw(R, 5, 2, name="x"), draw(R, 5, 2, name="y")
    theta, v = small_net(), small_net("v")

    def loss(p: Tensors) -> Tensor:
        return (net(p, x) - y).square().mean((1, 2)) + p["last"].pow(3).sum((1, 2))

    found = hessian_operator(loss, theta)(v) if once else hvp(loss, theta, v)
    full = torch.func.hessian(lambda f: loss(unflatten(f, theta)).sum())(flatten(theta))
    for r in range(R):
        torch.testing.assert_close(flatten(found)[r], full[r, :, r] @ flatten(v)[r], rtol=1e-10, atol=1e-12)
        assert full[r, :, (r + 1) % R].abs().max() == 0
    assert not any(t.requires_grad for t in found.values())


def test_hessian_of_a_linear_loss_is_zero() -> None:
    theta = small_net()
    found = hessian_operator(lambda p: sum(x.flatten(1).sum(1) for x in p.values()), theta)(theta)  # type: ignore[arg-type,return-value]
    assert flatten(found).abs().max() == 0


def test_gauss_newton_product() -> None:
    """J' W J v against the Jacobian; without the weight it is another vector."""
    x, weight = draw(R, 5, 2, name="x"), draw(R, 5, 1, name="w").square() + 0.1
    theta, v = small_net(), small_net("v")
    found = flatten(gauss_newton_product(lambda p: net(p, x), theta, v, weight))
    called = flatten(gauss_newton_product(lambda p: net(p, x), theta, v, lambda u: weight * u))
    plain = flatten(gauss_newton_product(lambda p: net(p, x), theta, v))
    torch.testing.assert_close(found, called)
    full = torch.func.jacrev(lambda f: net(unflatten(f, theta), x))(flatten(theta))
    for r in range(R):
        j = full[r, :, :, r].reshape(10, -1)
        w = weight[r].expand(5, 2).reshape(10)
        torch.testing.assert_close(found[r], j.T @ (w * (j @ flatten(v)[r])), rtol=1e-10, atol=1e-12)
    assert (found - plain).abs().max() > 1e-2


# conjugate gradient


def spd(n: int) -> Tensor:
    a = draw(R, n, n, name="a")
    return a @ a.mT + 0.5 * torch.eye(n, dtype=torch.float64)


def test_conjugate_gradient_solves() -> None:
    a, b = spd(6), draw(R, 6, name="b")
    found = conjugate_gradient(lambda p: (a @ p[..., None])[..., 0], b, 20, damping=0.3)
    expected = torch.linalg.solve(a + 0.3 * torch.eye(6, dtype=torch.float64), b)
    torch.testing.assert_close(found.x, expected, rtol=1e-10, atol=1e-12)
    assert found.residual.max() < 1e-13
    undamped = conjugate_gradient(lambda p: (a @ p[..., None])[..., 0], b, 20)
    assert (undamped.x - expected).abs().max() > 1e-2
    # a first guess that is the answer is kept; from any other the same is reached
    again = conjugate_gradient(lambda p: (a @ p[..., None])[..., 0], b, 1, 0.3, x0=expected)
    torch.testing.assert_close(again.x, expected)
    moved = conjugate_gradient(lambda p: (a @ p[..., None])[..., 0], b, 20, 0.3, x0=expected + b)
    torch.testing.assert_close(moved.x, expected)


def test_residual_is_the_residual() -> None:
    """At every number of iterations; it ends at rounding with as many as there are dimensions."""
    a, b = spd(6), draw(R, 6, name="b")
    for n in range(7):
        found = conjugate_gradient(lambda p: (a @ p[..., None])[..., 0], b, n)
        true = (b - (a @ found.x[..., None])[..., 0]).norm(dim=1) / b.norm(dim=1)
        torch.testing.assert_close(found.residual, true, rtol=1e-6, atol=1e-11)
    assert found.residual.max() < 1e-9


def test_rounding_does_not_grow() -> None:
    """A few large eigenvalues and many small ones, as a network has: single precision against double, step for step.

    Without the orthogonal residuals the two part.
    """
    values = torch.cat([torch.logspace(5, 2, 5), torch.logspace(1, -4, 200)]).double()
    b = draw(R, 205, name="b").float().double()

    def solve(dtype: torch.dtype, reorthogonalise: bool) -> Tensor:
        a = values.to(dtype)
        return conjugate_gradient(lambda p: a * p, b.to(dtype), 12, reorthogonalise=reorthogonalise).x.double()

    exact = solve(torch.float64, True)
    errors = [((solve(torch.float32, o) - exact).norm(dim=1) / exact.norm(dim=1)).max() for o in (True, False)]
    assert errors[0] < 1e-4
    assert errors[1] > 100 * errors[0]


def test_masked_replicas() -> None:
    """b = 0, no curvature, and a negative direction: each stops, and the replica beside them is the solo one."""
    a, b = spd(6), draw(R, 6, name="b")
    a = torch.cat([a, torch.zeros(1, 6, 6), -a[:1]]).double()
    b = torch.cat([b, b[:2]])
    b[1] = 0
    found = conjugate_gradient(lambda p: (a @ p[..., None])[..., 0], b, 30)
    assert torch.isfinite(found.x).all()
    assert found.x[[1, 3, 4]].abs().max() == 0
    assert found.residual.tolist()[1] == 0
    torch.testing.assert_close(found.residual[3:], torch.ones(2, dtype=torch.float64))
    alone = conjugate_gradient(lambda p: (a[2:3] @ p[..., None])[..., 0], b[2:3], 30)
    torch.testing.assert_close(found.x[2:3], alone.x, rtol=1e-13, atol=1e-14)


# Adam


def test_adam_is_torchs() -> None:
    """Where eps is negligible, after 30 steps; a wrong bias correction or beta is not."""
    theta, target = small_net(), small_net("target")
    parameters = {k: v.clone().requires_grad_(True) for k, v in theta.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.03, betas=(0.8, 0.99), eps=1e-14)

    def loss(p: Tensors) -> Tensor:
        return sum((x - target[k]).square().flatten(1).sum(1) for k, x in p.items())  # type: ignore[return-value]

    p, state = theta, adam_init(theta)
    for _ in range(30):
        optimizer.zero_grad()
        loss(parameters).sum().backward()
        optimizer.step()
        p, state = adam_step(p, gradient(loss, p), state, 0.03, (0.8, 0.99), 1e-14)
    for k, x in p.items():
        torch.testing.assert_close(x, parameters[k].detach(), rtol=1e-10, atol=1e-12)
    assert float(state.step) == 30
    late = adam_step(theta, gradient(loss, theta), AdamState(state.exp_avg, state.exp_avg_sq, state.step * 0), 0.03)[0]
    assert (flatten(late) - flatten(p)).abs().max() > 1e-3


def test_adam_at_a_zero_gradient() -> None:
    """The step is zero and its derivative is -lr / eps, as the limit has it; torch's denominator gives NaN."""
    theta = {"x": torch.zeros(R, 2, dtype=torch.float64)}
    jacobian = torch.func.jacrev(lambda g: adam_step(theta, {"x": g}, adam_init(theta), 0.1, eps=1e-3)[0]["x"])
    found = jacobian(theta["x"])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0, :, 0], torch.eye(2, dtype=torch.float64) * (-0.1 / 1e-3))
    g = torch.zeros(2, requires_grad=True)
    (0.1 * g / ((g * g).sqrt() + 1e-3)).sum().backward()
    assert torch.isnan(g.grad).all()  # type: ignore[arg-type]


# hypergradients of the linear-quadratic window


class Window(NamedTuple):
    """h = Phi theta; L_in = sum_s lambda_s mean |h - y_s|^2 at inner points, L_out = mean |h - y|^2 at outer ones."""

    inside: Tensor  # (R, B, k)
    outside: Tensor
    past: Tensor  # (R, S, B, d)
    now: Tensor  # (R, B, d)

    def gram(self, lam: Tensors) -> Tensor:
        return 2 * lam["w"].sum(1)[:, None, None] * self.inside.mT @ self.inside / self.inside.shape[1]

    def solve(self, lam: Tensors) -> Tensors:
        y = torch.einsum("rs,rsbd->rbd", lam["w"], self.past)
        return {"theta": torch.linalg.solve(self.gram(lam), 2 * self.inside.mT @ y / self.inside.shape[1])}

    def inner_values(self, lam: Tensors, h: Tensors) -> Tensor:
        errors = (h["h"][:, None] - self.past).square().sum(-1).mean(-1)
        return (lam["w"] * errors).sum(1)

    def outer_values(self, lam: Tensors, h: Tensors) -> Tensor:
        return (h["h"] - self.now).square().mean((1, 2))

    @property
    def problem(self) -> BilevelProblem:
        return BilevelProblem(
            lambda lam, p: self.inner_values(lam, {"h": self.inside @ p["theta"]}),
            lambda lam, p: self.outer_values(lam, {"h": self.outside @ p["theta"]}),
        )

    def closed_form(self, lam: Tensors) -> Tensor:
        """v_s = -<2/B Phi' (Phi theta - y_s), z>, (2 L / B) Phi' Phi z = dL_out/dtheta."""
        theta, b = self.solve(lam)["theta"], self.inside.shape[1]
        g = 2 * (self.outside @ theta - self.now) / self.now[0].numel()
        z = torch.linalg.solve(self.gram(lam), self.outside.mT @ g)
        h, a = self.inside @ theta, self.inside @ z
        return -2 / b * ((h[:, None] - self.past) * a[:, None]).sum((2, 3))


@pytest.fixture
def window() -> tuple[Window, Tensors]:
    B, k, S, d = 12, 4, 5, 2
    mix = torch.linalg.qr(draw(R, k, k, name="mix"))[0] * torch.linspace(0.6, 1.2, k, dtype=torch.float64)
    found = Window(
        torch.linalg.qr(draw(R, B, k, name="in"))[0] * B**0.5 @ mix,
        draw(R, B, k, name="out"),
        draw(R, S, B, d, name="past"),
        draw(R, B, d, name="now"),
    )
    return found, {"w": draw(R, S, name="w").square() + 0.2}


def test_closed_form_aid_functional_finite_differences(window: tuple[Window, Tensors]) -> None:
    w, lam = window
    expected, theta = w.closed_form(lam), w.solve(lam)
    assert expected.abs().min() > 1e-4

    def linear(c: Tensors) -> tuple[Tensor, Tensor]:
        return w.inside @ c["c"], w.outside @ c["c"]

    implicit = aid_hypergradient(w.problem, lam, theta, 30)
    values = BilevelProblem(w.inner_values, w.outer_values)
    h_in, h_out = linear({"c": theta["theta"]})
    in_functions = functional_hypergradient(values, lam, h_in, h_out, linear, {"c": theta["theta"]}, 30)
    torch.testing.assert_close(implicit.value["w"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_functions.value["w"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_functions.adjoint["c"], -implicit.adjoint["theta"], rtol=1e-11, atol=1e-12)
    assert implicit.residual.max() < 1e-12
    reference = finite_differences(w.problem, lam, w.solve, 1e-4)
    assert (reference - expected).abs().max() < 1e-7
    # every wrong version fails the same check: the published sign, a forgotten factor, damping, too few iterations
    for wrong in (
        -expected,
        expected / 2,
        aid_hypergradient(w.problem, lam, theta, 30, damping=0.1).value["w"],
        aid_hypergradient(w.problem, lam, theta, 1).value["w"],
        functional_hypergradient(values, lam, h_in, h_out, linear, {"c": theta["theta"]}, 30, ridge=0.1).value["w"],
    ):
        assert (reference - wrong).abs().max() > 1e-4
    assert float(cosine(reference, -expected).max()) < -0.999


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-24, 1.0, 1e18, 1e25, 1e37])
def test_the_size_of_the_right_hand_side_decides_nothing(size: float) -> None:
    """In single precision |b|^2 is 0 for b of 1e-23, and infinite for 1e20; a power of two changes no digit."""
    a = torch.diag_embed(torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 5.0]]))
    b = torch.tensor([[1.0, -1.0, 0.5], [0.3, 0.2, -1.0]])
    scale = torch.tensor([[size], [1.0]])  # each replica has its own

    def matvec(p: Tensor) -> Tensor:
        return (a @ p[..., None])[..., 0]

    one, found = conjugate_gradient(matvec, b, 3, 0.1), conjugate_gradient(matvec, scale * b, 3, 0.1)
    torch.testing.assert_close(found.x / scale, one.x, rtol=1e-5, atol=0)
    assert found.residual.max() < 1e-5
    short = conjugate_gradient(matvec, scale * b, 1, 0.1)
    assert short.residual.min() > 0.01  # not solved, and said so
    assert torch.equal(short.x[1], conjugate_gradient(matvec, b, 1, 0.1).x[1])
    warm = conjugate_gradient(matvec, scale * b, 2, 0.1, x0=found.x)
    torch.testing.assert_close(warm.x, found.x, rtol=1e-5, atol=0)
    none = conjugate_gradient(matvec, 0 * b, 2)
    assert none.x.abs().max() == none.residual.max() == 0


def test_scale_of_lambda_is_free(window: tuple[Window, Tensors]) -> None:
    """sum_s lambda_s v_s = 0: the inner solution is that of lambda times any number."""
    w, lam = window
    theta = w.solve(lam)
    v = aid_hypergradient(w.problem, lam, theta, 30).value["w"]
    assert (lam["w"] * v).sum(1).abs().max() < 1e-12
    assert v.sum(1).abs().max() > 1e-3  # and not any other sum
    off = {"theta": theta["theta"] + 0.1}  # nor away from the inner solution
    assert (lam["w"] * aid_hypergradient(w.problem, lam, off, 30).value["w"]).sum(1).abs().max() > 1e-4


def test_unrolling_converges(window: tuple[Window, Tensors]) -> None:
    """From the inner solution, k steps of gradient descent are off by (I - lr H)^k: geometric."""
    w, lam = window
    expected, theta = w.closed_form(lam), w.solve(lam)
    eigenvalues = torch.linalg.eigvalsh(w.gram(lam))
    lr = float(1 / eigenvalues.max())
    rate = float(1 - lr * eigenvalues.min())
    errors = []
    for steps in (1, 10, 100):
        found = unrolled_hypergradient(w.problem, lam, theta, steps, GradientDescent(lr))
        errors.append(float((found.value["w"] - expected).abs().max()))
        assert (found.theta["theta"] - theta["theta"]).abs().max() < 1e-12  # a solution stays one
        assert errors[-1] < 2 * rate**steps * expected.abs().max() * 5**0.5 + 1e-12
    assert errors[0] > 10 * errors[1] / 4
    assert errors[1] > 1e-4
    assert errors[2] < 1e-5 * errors[0]


def test_replicas_never_mix(window: tuple[Window, Tensors]) -> None:
    w, lam = window
    theta = w.solve(lam)
    one = Window(*(x[1:2] for x in w))
    a, b = {"w": lam["w"][1:2]}, {"theta": theta["theta"][1:2]}
    torch.testing.assert_close(
        aid_hypergradient(w.problem, lam, theta, 9).value["w"][1:2], aid_hypergradient(one.problem, a, b, 9).value["w"]
    )
    many = unrolled_hypergradient(w.problem, lam, theta, 3, Adam(0.01)).value["w"][1:2]
    torch.testing.assert_close(many, unrolled_hypergradient(one.problem, a, b, 3, Adam(0.01)).value["w"])


def test_lambda_zero_and_zero_gradient(window: tuple[Window, Tensors]) -> None:
    """No NaN: without weights there is no curvature; with y_now predicted exactly there is no gradient."""
    w, lam = window
    theta = w.solve(lam)
    none = {"w": torch.zeros_like(lam["w"])}
    solved = Window(w.inside, w.outside, w.past, w.outside @ theta["theta"])
    for problem, at in ((w.problem, none), (solved.problem, lam), (solved.problem, none)):
        found = [aid_hypergradient(problem, at, theta, 5), aid_hypergradient(problem, at, theta, 5, damping=1e-4)]
        values = [f.value["w"] for f in found]
        values += [
            unrolled_hypergradient(problem, at, theta, 2, rule).value["w"] for rule in (GradientDescent(0.1), Adam(0.1))
        ]
        assert all(torch.isfinite(v).all() for v in values)


# a small network


def test_unrolled_adam_against_finite_differences() -> None:
    """Through three steps of Adam on a network, its running means included, entry by entry."""
    x, past, now = draw(R, 6, 2, name="x"), draw(R, 3, 6, 2, name="past"), draw(R, 6, 2, name="now")
    theta, lam = small_net(), {"w": draw(R, 3, name="w").square() + 0.3}

    def inside(a: Tensors, p: Tensors) -> Tensor:
        return (a["w"] * (net(p, x)[:, None] - past).square().sum(-1).mean(-1)).sum(1)

    problem = BilevelProblem(
        inside, lambda a, p: (net(p, x) - now).square().mean((1, 2)) + 0.1 * a["w"].square().sum(1)
    )
    rule = Adam(0.02)
    p, state = rule.step(theta, gradient(lambda q: inside(lam, q), theta), rule.init(theta))

    def solve(a: Tensors) -> Tensors:
        return unrolled_hypergradient(problem, a, p, 3, rule, state).theta

    found = unrolled_hypergradient(problem, lam, p, 3, rule, state)
    reference = finite_differences(problem, lam, solve, 1e-5)
    torch.testing.assert_close(found.value["w"], reference, rtol=1e-6, atol=1e-8)
    one_step = unrolled_hypergradient(problem, lam, p, 1, rule, state).value["w"]
    assert (one_step - reference).abs().max() > 1e-5
    some = finite_differences(problem, lam, solve, 1e-5, entries=[2])
    torch.testing.assert_close(some, reference[:, 2:])


def test_functional_with_a_networks_jacobian_is_gauss_newton_aid() -> None:
    """The basis a = J c gives J' C J: AID with that matrix, also where the Hessian has another term."""
    x, z, past, now = (draw(R, *s, name=f"n{i}") for i, s in enumerate([(6, 2), (4, 2), (3, 6, 2), (4, 2)]))
    theta, lam = small_net(), {"w": draw(R, 3, name="w").square() + 0.3}
    values = BilevelProblem(
        lambda a, h: (a["w"] * (h["h"][:, None] - past).square().sum(-1).mean(-1)).sum(1),
        lambda a, h: (h["h"] - now).square().mean((1, 2)),
    )
    problem = BilevelProblem(
        lambda a, p: values.inner_loss(a, {"h": net(p, x)}), lambda a, p: values.outer_loss(a, {"h": net(p, z)})
    )

    def jacobian(c: Tensors) -> tuple[Tensor, Tensor]:
        return (
            torch.func.jvp(lambda p: net(p, x), (theta,), (c,))[1],
            torch.func.jvp(lambda p: net(p, z), (theta,), (c,))[1],
        )

    found = functional_hypergradient(values, lam, net(theta, x), net(theta, z), jacobian, theta, 60, ridge=0.01)
    weight = 2 * lam["w"].sum(1)[:, None, None] / 6
    newton = aid_hypergradient(
        problem, lam, theta, 60, 0.01, lambda v: gauss_newton_product(lambda p: net(p, x), theta, v, weight)
    )
    torch.testing.assert_close(found.value["w"], newton.value["w"], rtol=1e-7, atol=1e-9)
    assert (aid_hypergradient(problem, lam, theta, 60, 0.01).value["w"] - newton.value["w"]).abs().max() > 1e-3
