import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad, solve_ivp
from scipy.special import expit
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy.meanflow import (
    AverageVelocity,
    Plain,
    Preconditioned,
    TimeDistribution,
    adaptive_loss,
    gaussian_entropy,
    log_det,
    path,
    path_velocity,
    residual,
    sample,
)
from lightning_toys.generative_policy.mixture import Mixture
from lightning_toys.nets import ConditionalNet, Network, Tangent
from lightning_toys.training.noise import keyed_generator

# torch's forward mode scripts its decompositions on first use
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
PATHS = [(0.5, 0.0), (1.3, 0.0), (0.3, 0.1), (2.0, 0.25)]  # (standard deviation of the data, sigma_min)
MEAN = (0.4, -0.7)


def draw(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/meanflow/{name}").standard_normal(shape))


def times(replicas: int, rows: int) -> tuple[Tensor, Tensor]:
    """r <= t, both inside of (0, 1)."""
    g = keyed_generator(0, 0, "test/meanflow/times")
    both = torch.from_numpy(g.uniform(0.02, 0.98, (replicas, rows, 2)))
    return both.amin(-1, keepdim=True), both.amax(-1, keepdim=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# the linear field, where all is closed form


def rms(t: Tensor, d: float, s: float) -> Tensor:
    return ((1 - t) ** 2 * d**2 + (t + s * (1 - t)) ** 2).sqrt()


def flow_map(z: Tensor, t: Tensor, r: Tensor, d: float, s: float) -> Tensor:
    """From time t to time r, for data N(MEAN, d^2 I): Gaussians are mapped onto each other without a turn."""
    mean = torch.tensor(MEAN, dtype=torch.float64)
    return (1 - r) * mean + rms(r, d, s) / rms(t, d, s) * (z - (1 - t) * mean)


def exact(z: Tensor, r: Tensor, t: Tensor, d: float, s: float) -> Tensor:
    return (z - flow_map(z, t, r, d, s)) / (t - r)


class ExactVelocity(AverageVelocity):
    """The exact average velocity of N(MEAN, d^2 I), and the times it was asked at."""

    def __init__(self, d: float, s: float) -> None:
        super().__init__(ConditionalNet(), Plain())
        self.d, self.s = d, s
        self.calls: list[tuple[float, float]] = []

    def forward(self, z: Tensor, r: Tensor, t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        self.calls.append((r.flatten()[0].item(), t.flatten()[0].item()))
        return exact(z, r, t, self.d, self.s), 10 * r + t


class Silent(ConditionalNet):
    """F = 0: what is left of a preconditioned velocity is the exact one of N(0, d^2 I)."""

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)

    def jvp(self, x: Tensor, c: Tensor, t: Tensor, tangent: Tangent) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(tangent.x)


@pytest.mark.parametrize(("d", "s"), PATHS)
def test_the_flow_map_is_that_of_the_marginal_velocity(d: float, s: float) -> None:
    """An independent integration, so that the closed forms below are checked against the field itself."""
    field, z, t, r = Mixture([MEAN], d), draw("z", 1, 2), 0.9, 0.15
    answer = solve_ivp(
        lambda q, y: field.marginal_velocity(torch.from_numpy(y), torch.tensor([q], dtype=torch.float64), s).numpy(),
        (t, r), z[0].numpy(), rtol=1e-11, atol=1e-12,
    )  # fmt: skip
    one = torch.ones(1, 1, dtype=torch.float64)
    close(flow_map(z, t * one, r * one, d, s)[0], torch.from_numpy(answer.y[:, -1]), 1e-9)


def derivative(u: Function, z: Tensor, r: Tensor, t: Tensor, dz: Tensor, dr: float = 0.0, dt: float = 1.0) -> Tensor:
    tangent = (dz, torch.full_like(r, dr), torch.full_like(t, dt))
    return torch.func.jvp(u, (z, r, t), tangent)[1]


@pytest.mark.parametrize(("d", "s"), PATHS)
def test_meanflow_identity_on_a_linear_field(d: float, s: float) -> None:
    z, (r, t) = draw("identity", 2, 40, 2), times(2, 40)
    field = Mixture([MEAN], d)
    v = field.marginal_velocity(z, t, s)

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return exact(z, r, t, d, s)

    value, du = u(z, r, t), derivative(u, z, r, t, v)
    close(value, v - (t - r) * du, 1e-9)
    close(residual(value, du, t - r, v), torch.zeros_like(v), 1e-9)
    wrong = {
        "sign": residual(value, -du, t - r, v),
        "no (t - r)": residual(value, du, torch.ones_like(t), v),
        "no derivative": residual(value, torch.zeros_like(du), t - r, v),
        "r and t swapped in the gap": residual(value, du, r - t, v),
        "r and t swapped in u": residual(u(z, t, r), derivative(u, z, t, r, v), t - r, v),
        "derivative in r": residual(value, derivative(u, z, r, t, v, 1.0, 0.0), t - r, v),
        "r moves along": residual(value, derivative(u, z, r, t, v, 1.0, 1.0), t - r, v),
        "no v . grad": residual(value, derivative(u, z, r, t, torch.zeros_like(v)), t - r, v),
        "along -v": residual(value, derivative(u, z, r, t, -v), t - r, v),
    }
    for name, error in wrong.items():
        assert error.abs().mean() > 0.02, name


@pytest.mark.parametrize(("d", "s"), PATHS)
def test_a_silent_preconditioned_network_obeys_the_identity_and_samples_exactly(d: float, s: float) -> None:
    model, field = AverageVelocity(Silent(), Preconditioned(d, s)), Mixture([[0.0, 0.0]], d)
    z, (r, t) = draw("silent", 2, 40, 2), times(2, 40)
    v = field.marginal_velocity(z, t, s)
    u, _, du = model.jvp(z, r, t, v)
    close(residual(u, du, t - r, v), torch.zeros_like(v), 1e-10)
    close(model.velocity(z, t), v, 1e-10)
    assert residual(u, -du, t - r, v).abs().mean() > 0.02
    for nfe in (1, 2, 5):
        close(sample(model, z, nfe)[0], math.sqrt(d**2 + s**2) * z, 1e-10)


def worst_correlation(model: AverageVelocity, field: Mixture, s_path: float, sign: float) -> float:
    """Return the largest |mean| / SE of residual times a function of (z, r, t).

    The residual against the velocity of the pair is not zero, but its mean given z is: a minimiser's is orthogonal to
    every function of what the network sees.
    """
    n = 40_000
    e, uniform = draw("minimiser e", 1, n, 2), torch.from_numpy(keyed_generator(2, 0, "test/minimiser").random((n, 2)))
    x = field.sample(uniform[:, 0], draw("minimiser x", n, 2)).unsqueeze(0)
    r, t, rows = TimeDistribution(share=0.75).sample(uniform.unsqueeze(0).roll(1, 1), slice(0, n))
    assert rows == 3 * n // 4
    z, v = path(x, e, t, s_path), path_velocity(x, e, s_path)
    u, _, du = model.jvp(z, r, t, v[:, :rows])
    error = residual(u, sign * du, (t - r)[:, :rows], v)
    tests = [torch.ones_like(t), t, r, z, z.roll(1, -1), t * z, (t - r) * z, z.sin() * (5 * t).cos()]
    return max(((error * f).mean((0, 1)).abs() / (error * f).std((0, 1)) * math.sqrt(n)).max().item() for f in tests)


@pytest.mark.parametrize(("d", "s"), [(0.5, 0.0), (0.3, 0.2)])
def test_the_exact_average_velocity_minimises_the_loss_of_pairs(d: float, s: float) -> None:
    field, model = Mixture([[0.0, 0.0]], d), AverageVelocity(Silent(), Preconditioned(d, s))
    assert worst_correlation(model, field, s, 1.0) < 5
    assert worst_correlation(model, field, s, -1.0) > 15
    assert worst_correlation(model, field, s + 0.1, 1.0) > 15
    assert worst_correlation(AverageVelocity(Silent(), Preconditioned(1.5 * d, s)), field, s, 1.0) > 15


@pytest.mark.parametrize("nfe", [1, 2, 3, 7])
def test_sample_is_the_flow_map_however_many_steps(nfe: int) -> None:
    d, s = 0.3, 0.1
    e, model = draw("sample", 2, 9, 2), ExactVelocity(d, s)
    zero, one = torch.zeros(2, 9, 1, dtype=torch.float64), torch.ones(2, 9, 1, dtype=torch.float64)
    z, log_sigma = sample(model, e, nfe)
    close(z, flow_map(e, one, zero, d, s), 1e-12)
    # (r, t) in order from noise to data, and the head of the last step
    assert np.array(model.calls) == pytest.approx(np.array([((k - 1) / nfe, k / nfe) for k in range(nfe, 0, -1)]))
    assert log_sigma is not None
    close(log_sigma, one / nfe)


# path


@pytest.mark.parametrize("s", [0.0, 0.2])
def test_path_ends_and_slope(s: float) -> None:
    x, e, (_, t) = draw("x", 2, 6, 2), draw("e", 2, 6, 2), times(2, 6)
    close(path(x, e, torch.zeros_like(t), s), x + s * e)
    close(path(x, e, torch.ones_like(t), s), e)
    close((path(x, e, t + 1e-3, s) - path(x, e, t - 1e-3, s)) / 2e-3, path_velocity(x, e, s), 1e-11)
    close(path_velocity(x, e, s), (1 - s) * e - x)


# distributions of (r, t)


def uniforms(*shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, "test/meanflow/distribution").random(shape))


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_only_the_first_rows_have_r_below_t(kind: str, share: float) -> None:
    times = TimeDistribution(kind, share=share)  # type: ignore[arg-type]
    r, t, rows = times.sample(uniforms(3, 48, 2), slice(0, 48))
    assert rows == 48 * share
    assert r.shape == t.shape == (3, 48, 1)
    assert (r[:, :rows] < t[:, :rows]).all()
    assert torch.equal(r[:, rows:], t[:, rows:])
    assert r.min() >= 0
    assert t.max() <= 1
    # a rank's rows are those of the whole batch
    parts = [times.sample(uniforms(3, 48, 2), slice(*ends)) for ends in ((0, 20), (20, 48))]
    assert torch.equal(torch.cat([p[0] for p in parts], 1), r)
    assert torch.equal(torch.cat([p[1] for p in parts], 1), t)
    assert [p[2] for p in parts] == [min(rows, 20), max(rows - 20, 0)]


def test_uniform_times() -> None:
    """r and t are the lesser and greater of two uniforms: means 1/3 and 2/3, variances 1/18, covariance 1/36."""
    n = 40_000
    r, t, k = TimeDistribution().sample(uniforms(1, n, 2), slice(0, n))
    assert k == n // 2
    r, t = r[0], t[0]
    first, rest = slice(0, n // 2), slice(n // 2, n)
    moments = [(r[first], 1 / 3), (t[first], 2 / 3), (r[first] ** 2, 1 / 6), (t[first] ** 2, 1 / 2),
               (r[first] * t[first], 1 / 4), (t[rest], 1 / 2), (t[rest] ** 2, 1 / 3)]  # fmt: skip
    for found, wanted in moments:
        assert abs(found.mean().item() - wanted) < 5 * found.std().item() / math.sqrt(len(found))


def test_logit_normal_times_have_scipys_quantiles() -> None:
    u = torch.linspace(0.001, 0.999, 37, dtype=torch.float64)
    times, alone = (TimeDistribution("logit_normal", mean=-0.4, std=1.3, share=share) for share in (1.0, 0.0))
    both = torch.stack([u, u.flip(0)], dim=-1).unsqueeze(0)
    _, t, _ = alone.sample(both, slice(0, 37))
    wanted = expit(stats.norm.ppf(u.numpy(), loc=-0.4, scale=1.3))
    close(t[0, :, 0], torch.from_numpy(wanted))
    low, high, _ = times.sample(both, slice(0, 37))
    close(low[0, :, 0], torch.from_numpy(np.minimum(wanted, wanted[::-1]).copy()))
    close(high[0, :, 0], torch.from_numpy(np.maximum(wanted, wanted[::-1]).copy()))
    r, t, _ = times.sample(torch.tensor([[[0.0, 1 - 2**-24]]]), slice(0, 1))  # the ends of float32 uniforms
    assert 0 < r.item() < 0.01
    assert 0.99 < t.item() < 1


def test_time_distribution_refuses() -> None:
    with pytest.raises(ToyError, match=r"--model\.time\.std: 0"):
        TimeDistribution(std=0.0)
    for share in (-0.1, 1.1):
        with pytest.raises(ToyError, match=rf"--model\.time\.share: {share} "):
            TimeDistribution(share=share)


# preconditioning


@pytest.mark.parametrize(("d", "s"), PATHS)
def test_skip_is_the_average_velocity_of_gaussian_data(d: float, s: float) -> None:
    """(1 - s_r / s_t) / (t - r), and the integral of s'/s along the trajectory z_q = s_q / s_t z_t."""

    def size(q: float) -> float:
        return math.hypot((1 - q) * d, q + s * (1 - q))

    def speed(q: float) -> float:
        return (-(1 - q) * d**2 + (1 - s) * (q + s * (1 - q))) / size(q)

    form = Preconditioned(d, s)
    for r, t in [(0.0, 1.0), (0.2, 0.9), (0.5, 0.6), (0.0, 0.3)]:
        k = form.coefficients(*(torch.tensor([q], dtype=torch.float64) for q in (r, t)))
        mean = quad(speed, r, t, epsabs=1e-12)[0] / size(t) / (t - r)
        assert k.c_skip.item() == pytest.approx(mean, abs=1e-10)
        assert k.c_skip.item() == pytest.approx((1 - size(r) / size(t)) / (t - r), abs=1e-12)
        assert k.c_in.item() == pytest.approx(1 / size(t))
        assert k.c_out.item() == pytest.approx(d / size(t))
    same = torch.tensor([0.3], dtype=torch.float64)
    assert form.coefficients(same, same).c_skip.item() == pytest.approx(speed(0.3) / size(0.3), abs=1e-12)


@pytest.mark.parametrize(("d", "s"), PATHS)
def test_derivatives_of_the_coefficients(d: float, s: float) -> None:
    """In t at fixed r, also at r = t, where a form divided by t - r would fail."""
    form = Preconditioned(d, s)
    r, t = times(1, 30)
    edge = torch.tensor([0.0, 0.4, 1.0, 0.0], dtype=torch.float64).view(1, 4, 1)
    r = torch.cat([r, edge[:, :3], edge[:, 3:]], dim=1)
    t = torch.cat([t, edge[:, :3], torch.ones(1, 1, 1, dtype=torch.float64)], dim=1)
    k = form.coefficients(r, t)
    _, slopes = torch.func.jvp(lambda q: tuple(form.coefficients(r, q)[:3]), (t,), (torch.ones_like(t),))
    up, down = (form.coefficients(r, t + h) for h in (1e-5, -1e-5))
    for i, slope in enumerate(slopes):
        close(k[3 + i], slope, 1e-11)
        close(k[3 + i], (up[i] - down[i]) / 2e-5, 1e-7)
        assert slope.abs().max() > 0.1


@pytest.mark.parametrize(("d", "s"), PATHS)
def test_c_out_is_the_standard_deviation_of_what_is_left_to_predict(d: float, s: float) -> None:
    """Var(v | z) = (d / s_t)^2 for Gaussian data, by regression in closed form."""
    _, t = times(1, 20)
    b = t + s * (1 - t)
    v_variance, z_variance = (1 - s) ** 2 + d**2, (1 - t) ** 2 * d**2 + b**2
    covariance = (1 - s) * b - (1 - t) * d**2
    left = v_variance - covariance**2 / z_variance
    k = Preconditioned(d, s).coefficients(t, t)
    close(k.c_out**2, left)
    close(k.c_skip, covariance / z_variance)


@pytest.mark.parametrize("form", [Plain(), Preconditioned(0.5), Preconditioned(0.5, 0.1, offset=0.3)])
def test_c_noise(form: Plain | Preconditioned) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    found, rate = form.c_noise(t)
    wanted, slope = torch.func.jvp(lambda q: form.c_noise(q)[0], (t,), (torch.ones_like(t),))
    close(found, wanted)
    close(rate, slope)
    assert (found.diff() > 0).all()
    close(found[[0, -1]], torch.tensor([0.0 if isinstance(form, Plain) else -1.0, 1.0], dtype=torch.float64))


# the network's derivative


def build(form: Plain | Preconditioned, with_state: bool, head: bool, kind: str = "concat") -> AverageVelocity:
    spec = Network(kind, hidden=8, activation="silu", fourier_t=1)  # type: ignore[arg-type]
    r, t = times(2, 6)
    conditions = AverageVelocity(ConditionalNet(), form).condition(r, t, draw("s", 2, 6, 3) if with_state else None)
    net = spec.build([3, 8], 2, conditions.shape[-1], True, out_dim=2 + head).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)  # steep, so that no slope is small and the one-step map folds
    return AverageVelocity(net, form, head)


FORMS: dict[str, Plain | Preconditioned] = {
    "plain": Plain(),
    "preconditioned": Preconditioned(0.6),
    "sigma_min": Preconditioned(0.4, 0.15),
}


@pytest.mark.parametrize("kind", ["concat", "film"])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_jvp_is_forward_and_its_jvp(form: str, with_state: bool, head: bool, kind: str) -> None:
    model = build(FORMS[form], with_state, head, kind)
    z, v, (r, t) = draw("z", 2, 6, 2), draw("v", 2, 6, 2), times(2, 6)
    state = draw("state", 2, 6, 3) if with_state else None
    for rows, dt in ((4, 1.0), (6, 1.0), (6, 0.0)):
        first = slice(0, rows)
        part = None if state is None else state[:, first]
        same = torch.arange(6).view(1, 6, 1) >= rows
        begin = torch.where(same, t, r)
        u, log_sigma, du = model.jvp(z, begin, t, v[:, first], state, dt)
        wanted, wanted_sigma = model(z, begin, t, state)
        slope = derivative(
            lambda z, r, t, c=part: model(z, r, t, c)[0], z[:, first], r[:, first], t[:, first], v[:, first], 0.0, dt
        ).detach()
        close(u, wanted)
        close(du, slope)
        assert not du.requires_grad
        assert slope.abs().mean() > 0.01
        assert (log_sigma is None) == (wanted_sigma is None) == (not head)
        extra: Tensor | float = 0.0
        if log_sigma is not None and wanted_sigma is not None:
            close(log_sigma, wanted_sigma)
            extra = log_sigma.square().sum()
        gap = (t - r)[:, first]
        loss = adaptive_loss(residual(u, du, gap, v), 0.5, 1e-3).sum() + extra
        target = torch.cat([v[:, first] - gap * slope, v[:, rows:]], dim=1)
        error = (wanted - target).square().sum(-1)
        weight = (error + 1e-3).rsqrt().detach()
        again = 0.0 if wanted_sigma is None else wanted_sigma.square().sum()
        parameters = list(model.parameters())
        pairs = zip(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad((weight * error).sum() + again, parameters),
            strict=True,
        )
        for a, b in pairs:
            close(a, b, 1e-11)
            assert b.abs().max() > 0


def test_every_input_matters_and_velocity_is_at_r_equal_t() -> None:
    model = build(Preconditioned(0.5), True, True)
    z, state, (r, t) = draw("z", 2, 6, 2), draw("state", 2, 6, 3), times(2, 6)
    u, _ = model(z, r, t, state)
    changed = [model(z + 0.1, r, t, state), model(z, r - 0.1, t, state), model(z, r, t + 0.1, state),
               model(z, r, t, state + 0.1)]  # fmt: skip
    assert all(not torch.allclose(u, other[0]) for other in changed)
    close(model.velocity(z, t, state), model(z, t, t, state)[0])


def test_head_stays_within_its_bounds() -> None:
    model = build(Plain(), False, True)
    raw = torch.tensor([[[0.0, 0.0, q] for q in (-50.0, 0.0, 50.0)]], dtype=torch.float64)
    found = model.log_sigma(raw)
    assert found is not None
    close(found.flatten(), torch.tensor([-12.0, -5.0, 2.0], dtype=torch.float64))
    assert build(Plain(), False, False).log_sigma(raw[..., :2]) is None


# loss


def test_residual_by_hand() -> None:
    u, v = draw("u", 2, 5, 2).requires_grad_(), draw("v", 2, 5, 2)
    du, gap = draw("du", 2, 3, 2).requires_grad_(), times(2, 3)[1]
    found = residual(u, du, gap, v)
    close(found[:, :3], u[:, :3] + gap * du - v[:, :3])
    close(found[:, 3:], u[:, 3:] - v[:, 3:])
    grad_u, grad_du = torch.autograd.grad(found.sum(), (u, du), allow_unused=True)
    close(grad_u, torch.ones_like(u))
    assert grad_du is None
    close(residual(u, du[:, :0], gap[:, :0], v), u - v)


@pytest.mark.parametrize(("power", "floor"), [(0.0, 1e-3), (0.5, 1e-2), (1.0, 1e-3)])
def test_adaptive_loss(power: float, floor: float) -> None:
    error = torch.tensor([[[3.0, -4.0], [0.0, 0.0], [0.01, 0.02]]], dtype=torch.float64, requires_grad=True)
    square = torch.tensor([[25.0, 0.0, 5e-4]], dtype=torch.float64)
    weight = 1 / (square + floor) ** power
    loss = adaptive_loss(error, power, floor)
    close(loss, weight * square)
    (gradient,) = torch.autograd.grad(loss.sum(), error)
    close(gradient, weight.unsqueeze(-1) * 2 * error.detach())


# densities


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [False, True])
def test_log_det_is_that_of_the_jacobian(form: str, with_state: bool) -> None:
    model = build(FORMS[form], with_state, True)
    e, state = draw("log_det", 2, 30, 2), draw("state of log_det", 2, 30, 3) if with_state else None

    def one(r: int, b: int) -> Callable[[Tensor], Tensor]:
        def f(point: Tensor) -> Tensor:
            whole = torch.cat([e[:, :b], torch.where(torch.arange(2).view(2, 1, 1) == r, point, e[:, b : b + 1])], 1)
            part = None if state is None else state[:, : b + 1]
            return sample(model, whole, 1, part)[0][r, b]

        return f

    found, sign = log_det(model, e, state)
    assert found.shape == sign.shape == (2, 30)
    assert not found.requires_grad
    for r in range(2):
        for b in range(30):
            wanted = torch.linalg.slogdet(torch.func.jacrev(one(r, b))(e[r, b]))
            assert sign[r, b] == wanted[0]
            close(found[r, b], wanted[1], 1e-9)
    assert sign.min() == -1
    assert sign.max() == 1


def test_log_det_gives_the_density_of_a_linear_map() -> None:
    """For data N(0, d^2 I) the one-step map is d e: log det = 2 log d, so that entropies differ by it."""
    d, s = 0.5, 0.0
    found, sign = log_det(AverageVelocity(Silent(), Preconditioned(d, s)), draw("linear", 1, 5, 2))
    close(found, torch.full_like(found, 2 * math.log(d)), 1e-12)
    assert (sign == 1).all()
    assert gaussian_entropy() + 2 * math.log(d) == pytest.approx(gaussian_entropy(d))


@pytest.mark.parametrize(("std", "dim"), [(1.0, 2), (0.3, 2), (2.0, 1), (0.1, 5)])
def test_gaussian_entropy(std: float, dim: int) -> None:
    assert gaussian_entropy(std, dim) == pytest.approx(stats.multivariate_normal(cov=std**2 * np.eye(dim)).entropy())
    assert gaussian_entropy(0.0, dim) == -math.inf
