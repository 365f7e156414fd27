import pytest
import torch
from torch import Tensor

from lightning_toys.nets import ConditionalNet, Network, Tangent, TokenTransformer, fourier, fourier_jvp
from lightning_toys.training.noise import keyed_generator

# torch's forward mode scripts its decompositions on first use
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

SEEDS = [3, 11, 4]
ROWS = 6
ACTIVATIONS = ["relu", "gelu", "silu", "tanh"]


def draw(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/dual/{name}").standard_normal(shape))


def inputs(replicas: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return draw("x", replicas, ROWS, 2), draw("c", replicas, ROWS, 3), draw("t", replicas, ROWS, 1)


def direction(rows: int, replicas: int = 3) -> Tangent:
    dx, dc, dt = draw("dx", replicas, ROWS, 2), draw("dc", replicas, ROWS, 3), draw("dt", replicas, ROWS, 1)
    return Tangent(dx[:, :rows], dc[:, :rows], dt[:, :rows])


def build(kind: str, activation: str, residual: bool, features: bool, seeds: list[int] = SEEDS) -> ConditionalNet:
    c, t = (2, 3) if features else (0, 0)
    spec = Network(kind, 8, 3, activation, fourier_c=c, fourier_t=t, residual=residual)  # type: ignore[arg-type]
    return spec.build(seeds, 2, 3, True, out_dim=4).double()


def reference(net: ConditionalNet, x: Tensor, c: Tensor, t: Tensor, tangent: Tangent) -> tuple[Tensor, Tensor]:
    """The derivative of the first rows by torch's forward mode, and the value of all."""
    k = tangent.x.shape[1]
    _, derivative = torch.func.jvp(net.forward, (x[:, :k], c[:, :k], t[:, :k]), tuple(tangent))
    return net(x, c, t), derivative


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("features", [0, 1, 4])
def test_fourier_jvp(features: int) -> None:
    u, du = draw("u", 2, 5, 3), draw("du", 2, 5, 3)
    _, expected = torch.func.jvp(lambda v: fourier(v, features), (u,), (du,))
    close(fourier_jvp(u, du, features), expected)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["concat", "film"])
def test_jvp_is_forward_and_its_jvp(kind: str, activation: str, residual: bool, features: bool) -> None:
    net = build(kind, activation, residual, features)
    x, c, t = inputs()
    for rows in (2, ROWS):
        tangent = direction(rows)
        value, derivative = net.jvp(x, c, t, tangent)
        value_wanted, wanted = reference(net, x, c, t, tangent)
        close(value, value_wanted)
        close(derivative, wanted.detach())
        assert wanted.abs().mean() > 0.01
        assert derivative.shape == (3, rows, 4)
        assert not derivative.requires_grad
        # the loss sees the derivative, its gradient takes it for a constant
        grads = []
        for f, df in ((value, derivative), (value_wanted, wanted.detach())):
            loss = (f[:, :rows] + 0.7 * df).sin().square().sum() + f.pow(3).sum()
            grads.append(torch.autograd.grad(loss, list(net.parameters())))
        for a, b in zip(*grads, strict=True):
            close(a, b)
            assert b.abs().max() > 0


@pytest.mark.parametrize("part", ["x", "c", "t"])
@pytest.mark.parametrize("kind", ["concat", "film"])
def test_jvp_by_finite_differences_in_each_input(kind: str, part: str) -> None:
    net, full = build(kind, "silu", True, True), direction(ROWS)
    tangent = Tangent(*(d if name == part else torch.zeros_like(d) for name, d in full._asdict().items()))
    x, c, t = inputs()
    h = 1e-5
    with torch.no_grad():
        up, down = (net(x + s * tangent.x, c + s * tangent.c, t + s * tangent.t) for s in (h, -h))
    derivative = net.jvp(x, c, t, tangent)[1]
    torch.testing.assert_close(derivative, (up - down) / (2 * h), rtol=1e-6, atol=1e-7)
    assert derivative.abs().min() > 1e-6


@pytest.mark.parametrize("kind", ["concat", "film"])
def test_no_rows_have_no_derivative(kind: str) -> None:
    net = build(kind, "gelu", False, True)
    x, c, t = inputs()
    value, derivative = net.jvp(x, c, t, direction(0))
    close(value, net(x, c, t))
    assert derivative.shape == (3, 0, 4)


@pytest.mark.parametrize("kind", ["concat", "film"])
def test_a_replica_of_many_is_the_solo_net(kind: str) -> None:
    many, tangent = build(kind, "silu", True, True), direction(4)
    x, c, t = inputs()
    value, derivative = many.jvp(x, c, t, tangent)
    for r, seed in enumerate(SEEDS):
        solo = build(kind, "silu", True, True, [seed])
        one = slice(r, r + 1)
        f, df = solo.jvp(x[one], c[one], t[one], Tangent(*(d[one] for d in tangent)))
        close(value[one], f)
        close(derivative[one], df)


def test_the_transformer_has_no_jvp() -> None:
    net = Network("transformer", hidden=8, layers=1).build([0], 2, 3, True).double()
    assert isinstance(net, TokenTransformer)
    with pytest.raises(NotImplementedError, match="TokenTransformer"):
        net.jvp(*inputs(1), direction(2, 1))


@pytest.mark.parametrize("kind", ["concat", "film", "transformer"])
def test_out_dim(kind: str) -> None:
    spec = Network(kind, hidden=8, layers=2)  # type: ignore[arg-type]
    wide, same = (spec.build([0], 2, 3, True, out_dim=d).double() for d in (5, None))
    assert wide(*inputs(1)).shape == (1, ROWS, 5)
    assert same(*inputs(1)).shape == (1, ROWS, 2)
    for (name, p), q in zip(wide.named_parameters(), same.parameters(), strict=True):
        assert name.startswith("last.") or torch.equal(p, q)  # only the read-out changes
