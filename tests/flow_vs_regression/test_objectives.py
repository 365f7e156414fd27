import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression.module import FlowVsRegression
from lightning_toys.flow_vs_regression.objectives import (
    MIP,
    MIP_FORMS,
    Flow,
    MIPForm,
    MIPOneStep,
    Mode,
    Objective,
    Regression,
    StraightFlow,
    expand_time,
    make_objective,
)
from lightning_toys.flows import Solver, integrate
from lightning_toys.nets import ConditionalNet
from lightning_toys.training.loader import Batch
from lightning_toys.training.noise import NoiseStream, keyed_generator, uniform

MODES: list[Mode] = ["regression", "flow", "straight_flow", "mip", "mip_one_step"]


class Affine(ConditionalNet):
    """2 x + 3 c + 5 t + .7, and a record of the times it was asked at."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float | None] = []

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        if x.numel():
            self.times.append(None if t is None else round(t.flatten()[0].item(), 12))
        return 2 * x + 3 * c + 0.7 + (0 if t is None else 5 * t)


class Field(ConditionalNet):
    """Any function of (x, c, t)."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        return self.function(x, c, torch.zeros_like(c) if t is None else t)


def draw(replicas: int = 2, rows: int = 5, dim: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = keyed_generator(0, 0, "test/objectives")
    shapes = ((replicas, rows, 1), (replicas, rows, dim), (replicas, rows, dim))
    c, x1, x0 = (torch.from_numpy(g.standard_normal(s)) for s in shapes)
    return c, x1, x0, torch.from_numpy(g.random((replicas, rows, 1)))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# residuals


def test_regression_residual() -> None:
    c, x1, x0, t = draw()
    net = Affine()
    (found,) = Regression().residuals(net, c, x1, x0, t)
    close(found, 2 * x0 + 3 * c + 0.7 - x1)
    assert net.times == [None]


def test_flow_residual() -> None:
    c, x1, x0, t = draw()
    (found,) = Flow().residuals(Affine(), c, x1, x0, t)
    close(found, 2 * ((1 - t) * x0 + t * x1) + 3 * c + 5 * t + 0.7 - (x1 - x0))


def test_flow_residual_vanishes_for_the_velocity_of_the_path_alone() -> None:
    """v = (x1 - x) / (1 - t) is x1 - x0 on the path; the other sign, time or end point is not."""
    c, x1, x0, t = draw()

    def worst(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        return Flow().residuals(Field(function), c, x1, x0, t)[0].abs().max().item()

    assert worst(lambda x, _, t: (x1 - x) / (1 - t)) < 1e-12
    assert worst(lambda x, _, t: (x - x0) / t) < 1e-12
    assert worst(lambda x, _, t: (x - x1) / (1 - t)) > 0.1
    assert worst(lambda x, _, t: (x1 - x) / t) > 0.1
    assert worst(lambda x, _, t: (x0 - x) / (1 - t)) > 0.1


def test_straight_flow_residual() -> None:
    c, x1, x0, t = draw()
    net = Affine()
    (found,) = StraightFlow().residuals(net, c, x1, x0, t)
    close(found, 2 * ((1 - t) * x0 + t * x1) + 3 * c + 0.7 - x1)
    assert net.times == [None]


@pytest.mark.parametrize("t_star", [0.9, 0.3])
def test_mip_residuals(t_star: float) -> None:
    c, x1, x0, t = draw()
    net = Affine()
    first, second = MIP(t_star).residuals(net, c, x1, x0, t)
    close(first, 2 * x0 + 3 * c + 0.7 - x1)
    close(second, 2 * ((1 - t_star) * x0 + t_star * x1) + 3 * c + 5 * t_star + 0.7 - x1)
    assert net.times == [0, t_star]


def test_mip_paper_residuals() -> None:
    """The first term starts from zeros, the second from x0 as published."""
    c, x1, x0, t = draw()
    first, second = MIP(form="paper").residuals(Affine(), c, x1, x0, t)
    close(first, 3 * c + 0.7 - x1)
    close(second, MIP().residuals(Affine(), c, x1, x0, t)[1])


@pytest.mark.parametrize("readout", [0, 1])
def test_mip_path_and_paper_agree_at_zero_only(readout: int) -> None:
    c, x1, x0, t = draw()
    path, paper = MIP(form="path"), MIP(form="paper")
    for start, same in ((torch.zeros_like(x0), True), (x0, False)):
        a, b = (m.residuals(Affine(), c, x1, start, t)[0] for m in (path, paper))
        assert torch.equal(a, b) is same
        a, b = (m.readouts([], [])[readout].sample(Affine(), c, start) for m in (path, paper))
        assert torch.allclose(a, b, rtol=0, atol=1e-12) is same


@pytest.mark.parametrize("t_star", [0.9, 0.3])
def test_mip_one_step_has_both_terms_and_no_time(t_star: float) -> None:
    c, x1, x0, t = draw()
    net = Affine()
    first, second = MIPOneStep(t_star).residuals(net, c, x1, x0, t)
    close(first, 2 * x0 + 3 * c + 0.7 - x1)
    close(second, 2 * ((1 - t_star) * x0 + t_star * x1) + 3 * c + 0.7 - x1)
    (readout,) = MIPOneStep(t_star).readouts([], [])
    close(readout.sample(net, c, x0), 2 * x0 + 3 * c + 0.7)
    assert net.times == [None, None, None]
    assert readout.name == "one-step"


# the minimiser of flow matching, and what it integrates to

M, S = 1.5, 0.4  # x1 ~ N(M, S^2), x0 ~ N(0, 1)


def marginal_velocity(x: Tensor, c: Tensor, t: Tensor) -> Tensor:
    """E[x1 - x0 | x_t = x] for independent Gaussians."""
    return M + (t * S**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * S**2) * (x - t * M)


def worst_correlation(objective: Objective, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """Return the largest |mean| / SE of residual times a function of (x_t, t): a minimiser's are orthogonal to all."""
    g, n = keyed_generator(1, 0, "test/minimiser"), 40_000
    x0, x1 = (torch.from_numpy(g.standard_normal((1, n, 1))) for _ in range(2))
    x1, t = M + S * x1, torch.from_numpy(g.random((1, n, 1)))
    xt = (1 - t) * x0 + t * x1
    (r,) = objective.residuals(Field(function), t, x1, x0, t)  # c carries the time, for objectives without it
    tests = [torch.ones_like(t), t, xt, t * xt, xt.square(), xt.sin() * (5 * t).cos()]
    return max((abs((r * f).mean()) / ((r * f).std() / math.sqrt(n))).item() for f in tests)


def test_flow_is_minimised_by_the_conditional_expectation() -> None:
    assert worst_correlation(Flow(), marginal_velocity) < 4.5  # six tests: error rate 4e-5
    assert worst_correlation(Flow(), lambda x, c, t: -marginal_velocity(x, c, t)) > 20
    assert worst_correlation(Flow(), lambda x, c, t: marginal_velocity(x, c, 1 - t)) > 20
    assert worst_correlation(Flow(), lambda x, c, t: 1.05 * marginal_velocity(x, c, t)) > 6


def test_straight_flow_is_minimised_by_the_expected_end_point() -> None:
    def end(x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return x + (1 - c) * marginal_velocity(x, c, c)  # c is t here

    assert worst_correlation(StraightFlow(), end) < 4.5
    assert worst_correlation(StraightFlow(), lambda x, c, t: x - (1 - c) * marginal_velocity(x, c, c)) > 20


@pytest.mark.parametrize(("solver", "nfe"), [("rk4", 160), ("midpoint", 400), ("euler", 1000), ("dopri5", 1)])
def test_flow_readout_carries_one_gaussian_to_the_other(solver: Solver, nfe: int) -> None:
    """The exact flow is x0 -> M + S x0: asymmetric in sign and time."""
    x0 = torch.linspace(-2, 2, 9).double().view(1, 9, 1)
    c, exact = torch.zeros_like(x0), M + S * x0
    sample = Flow().readout(solver, nfe).sample
    tolerance = {"rk4": 1e-5, "midpoint": 1e-4, "euler": 4e-3, "dopri5": 1e-2}[solver]
    close(sample(Field(marginal_velocity), c, x0), exact, tolerance)
    for wrong in (lambda x, c, t: -marginal_velocity(x, c, t), lambda x, c, t: marginal_velocity(x, c, 1 - t)):
        assert (sample(Field(wrong), c, x0) - exact).abs().max() > 0.1


# readouts


def test_regression_readout() -> None:
    c, _, x0, _ = draw()
    net = Affine()
    readout = Regression().readout("rk4", 8)
    close(readout.sample(net, c, x0), 2 * x0 + 3 * c + 0.7)
    assert (readout.name, net.times) == ("direct", [None])
    assert [r.name for r in Regression().readouts(["euler", "rk4"], [1, 4])] == ["direct"]


@pytest.mark.parametrize(("solver", "nfe"), [("euler", 1), ("euler", 3), ("midpoint", 4), ("rk4", 8), ("dopri5", 1)])
def test_flow_readout_of_a_constant_velocity_is_exact(solver: Solver, nfe: int) -> None:
    c, x1, x0, _ = draw()
    found = Flow().readout(solver, nfe).sample(Field(lambda x, c, t: x1 - x0), c, x0)
    close(found, x1)


@pytest.mark.parametrize("nfe", [1, 2, 9])
def test_flow_readout_along_a_straight_path_reaches_its_end(nfe: int) -> None:
    """Euler never asks for v = (x1 - x) / (1 - t) at t = 1, and is exact on straight lines."""
    c, x1, x0, _ = draw()
    close(Flow().readout("euler", nfe).sample(Field(lambda x, c, t: (x1 - x) / (1 - t)), c, x0), x1)
    backwards = Flow().readout("euler", nfe).sample(Field(lambda x, c, t: (x - x1) / (1 - t)), c, x0)
    assert (backwards - x1).abs().max() > 0.1


def test_flow_readout_passes_time_and_condition() -> None:
    c, _, x0, _ = draw()
    net = Affine()
    found = Flow().readout("euler", 2).sample(net, c, x0)
    half = x0 + (2 * x0 + 3 * c + 0.7) / 2
    close(found, half + (2 * half + 3 * c + 0.7 + 5 * 0.5) / 2)
    assert net.times == [0, 0.5]


def test_flow_readouts_leave_out_what_a_solver_cannot_spend() -> None:
    names = [r.name for r in Flow().readouts(["euler", "midpoint", "rk4", "dopri5"], [1, 2, 4, 9])]
    assert names == ["euler-1", "euler-2", "euler-4", "euler-9", "midpoint-2", "midpoint-4", "rk4-4", "dopri5"]
    assert [r.name for r in Flow().readouts(["rk4"], [1, 2])] == []
    with pytest.raises(ToyError, match=r"--model\.evaluation\.nfe"):
        Flow().readout("rk4", 2).sample(Affine(), *draw()[::2])


@pytest.mark.parametrize("nfe", [1, 2, 4, 9, 49])
def test_straight_flow_readout_with_the_exact_end_point_is_exact(nfe: int) -> None:
    c, x1, x0, _ = draw()
    readout = StraightFlow().readout("rk4", nfe)
    close(readout.sample(Field(lambda x, c, t: x1), c, x0), x1)
    assert readout.name == f"affine-{nfe}"


@pytest.mark.parametrize("nfe", [1, 2, 4, 9])
def test_straight_flow_readout_closed_form(nfe: int) -> None:
    """f = a x + b: the distance to the fixed point b / (1 - a) shrinks by 1 - (1 - a) / (n - i) in step i."""
    c, _, x0, _ = draw()
    a, b = 0.6, 1.3
    found = StraightFlow().readout("euler", nfe).sample(Field(lambda x, c, t: a * x + b), c, x0)
    factor = math.prod(1 - (1 - a) / (nfe - i) for i in range(nfe))
    fixed = b / (1 - a)
    close(found, fixed + factor * (x0 - fixed))
    # which is Euler on dx/dt = (f - x) / (1 - t)
    close(found, integrate(lambda t, x: (a * x + b - x) / (1 - t), x0, "euler", nfe), 1e-11)


def test_straight_flow_readouts() -> None:
    names = [r.name for r in StraightFlow().readouts(["euler", "rk4"], [1, 2, 9])]
    assert names == ["affine-1", "affine-2", "affine-9"]


@pytest.mark.parametrize("form", ["published", "path", "paper"])
@pytest.mark.parametrize("t_star", [0.9, 0.25])
def test_mip_readouts(form: MIPForm, t_star: float) -> None:
    c, _, x0, _ = draw()
    net = Affine()
    start = torch.zeros_like(x0) if form == "paper" else x0
    a0 = 2 * start + 3 * c + 0.7
    x = {"published": a0, "path": (1 - t_star) * x0 + t_star * a0, "paper": t_star * a0}[form]
    a1 = 2 * x + 3 * c + 5 * t_star + 0.7
    two, one = MIP(t_star, form).readouts(["euler"], [1, 2])[:2]
    close(one.sample(net, c, x0), a0)
    assert net.times == [0]
    close(two.sample(net, c, x0), a1)
    assert net.times == [0, 0, t_star]


def test_forms_that_are_trained_alike_read_out_each_other_s_second_step() -> None:
    c, x1, x0, t = draw()
    readouts = {form: {r.name: r for r in MIP(form=form).readouts([], [])} for form in MIP_FORMS}
    assert list(readouts["published"]) == ["two-step", "one-step", "two-step-path"]
    assert list(readouts["path"]) == ["two-step", "one-step", "two-step-published"]
    assert list(readouts["paper"]) == ["two-step", "one-step"]
    for one, other in (("published", "path"), ("path", "published")):
        a = readouts[one][f"two-step-{other}"].sample(Affine(), c, x0)
        assert torch.equal(a, MIP(form=other).second_step(Affine(), c, x0))  # type: ignore[arg-type]
        assert (a - readouts[one]["two-step"].sample(Affine(), c, x0)).abs().max() > 0.01
    terms = [MIP(form=form).residuals(Affine(), c, x1, x0, t) for form in ("published", "path")]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))


def test_the_second_step_is_the_published_one_by_default() -> None:
    """``--model.mode mip`` alone hands the first prediction on as it is, as the published code does."""
    c, _, x0, _ = draw()
    module = FlowVsRegression(mode="mip")
    (two,) = (r for r in module.objective.readouts(["euler"], [1]) if r.name == "two-step")
    assert torch.equal(two.sample(Affine(), c, x0), MIP(form="published").second_step(Affine(), c, x0))


def test_which_step_is_reported_first() -> None:
    assert MIP().readout("euler", 1).name == "two-step"
    assert MIPOneStep().readout("euler", 1).name == "one-step"
    with pytest.raises(ToyError, match=r"--model\.mip_form: 'pth' is not allowed.*path"):
        MIP(form="pth")  # type: ignore[arg-type]


@pytest.mark.parametrize("t_star", [0.0, 1.0, -0.5, 1.5])
def test_t_star_out_of_range(t_star: float) -> None:
    for make in (MIP, MIPOneStep):
        with pytest.raises(ToyError, match=r"--model\.t_star"):
            make(t_star)


@pytest.mark.parametrize("mode", MODES)
def test_primary_is_among_the_readouts(mode: Mode) -> None:
    objective = make_objective(mode, 0.9, "published")
    c, _, x0, _ = draw()
    readouts = {r.name: r for r in objective.readouts(["euler"], [2])}
    primary = objective.readout("euler", 2)
    assert torch.equal(primary.sample(Affine(), c, x0), readouts[primary.name].sample(Affine(), c, x0))


@pytest.mark.parametrize(
    ("mode", "kind", "x0", "with_time"),
    [
        ("regression", Regression, "zeros", False),
        ("flow", Flow, "gaussian", True),
        ("straight_flow", StraightFlow, "gaussian", False),
        ("mip", MIP, "gaussian", True),
        ("mip_one_step", MIPOneStep, "gaussian", False),
    ],
)
def test_modes_and_their_default_distribution_of_x0(
    mode: Mode, kind: type[Objective], x0: str, with_time: bool
) -> None:
    objective = make_objective(mode, 0.8, "paper")
    assert isinstance(objective, kind)
    assert (objective.x0_distribution, objective.with_time) == (x0, with_time)
    assert FlowVsRegression(mode).x0_distribution == x0
    assert FlowVsRegression(mode, x0="zeros").x0_distribution == "zeros"
    assert FlowVsRegression(mode, x0="gaussian").x0_distribution == "gaussian"
    if isinstance(objective, MIP):
        assert (objective.t_star, objective.form) == (0.8, "paper")
    if isinstance(objective, MIPOneStep):
        assert objective.t_star == 0.8


def test_full_time() -> None:
    x = torch.zeros(2, 5, 3, dtype=torch.float64)
    assert torch.equal(expand_time(x, 0.25), torch.full((2, 5, 1), 0.25, dtype=torch.float64))
    assert expand_time(x, torch.tensor(0.5)).dtype == torch.float64


# the loss that the module makes of the residuals


def module(mode: Mode, loss: Literal["l1", "l2"]) -> FlowVsRegression:
    out = FlowVsRegression(mode, seeds=[4, 9], loss=loss)
    out.net = Affine()
    out.x0_noise, out.t_noise = NoiseStream([4, 9], "x0", (5, 3)), NoiseStream([4, 9], "t", (5, 1), uniform)
    return out


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_is_the_sum_of_mean_norms(mode: Mode, loss: Literal["l1", "l2"]) -> None:
    c, x1, _, _ = draw()
    m, step = module(mode, loss), 70
    x0 = torch.zeros_like(x1) if mode == "regression" else m.x0_noise.at(step, x1)
    terms = m.objective.residuals(Affine(), c, x1, x0, m.t_noise.at(step, x1))
    expected = sum((r.abs() if loss == "l1" else r**2).mean((1, 2)) for r in terms)
    found = m.replica_losses(Batch((c, x1), total=5, first=0, last=5), step)
    assert found.shape == (2,)
    assert isinstance(expected, Tensor)
    close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_shares_of_the_loss_add_up_to_the_whole(mode: Mode) -> None:
    c, x1, _, _ = draw()
    m = module(mode, "l2")
    whole = m.replica_losses(Batch((c, x1), total=5, first=0, last=5), 3)
    cuts = [(0, 2), (2, 2), (2, 5)]  # one rank has no row
    shares = [m.replica_losses(Batch((c[:, a:b], x1[:, a:b]), total=5, first=a, last=b), 3) for a, b in cuts]
    close(sum(shares[1:], shares[0]), whole)
