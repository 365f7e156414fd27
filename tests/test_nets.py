import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.nets import (
    AttentionBlock,
    ConcatMLP,
    ConditionalNet,
    FiLMMLP,
    Network,
    ReplicaLayerNorm,
    ReplicaLinear,
    TokenTransformer,
    count_parameters,
    fourier,
)
from lightning_toys.training.noise import keyed_generator

SEEDS = [3, 11, 4]
VARIANTS = {
    "concat": Network(hidden=16),
    "concat, fourier": Network(hidden=16, fourier_c=3, fourier_t=2),
    "concat, residual": Network(hidden=16, residual=True, activation="gelu"),
    "film": Network("film", hidden=16),
    "film, fourier": Network("film", hidden=16, fourier_c=2, fourier_t=4, activation="silu"),
    "film, residual": Network("film", hidden=16, residual=True, activation="tanh"),
    "transformer": Network("transformer", hidden=16, layers=2),
    "transformer, fourier": Network("transformer", hidden=16, layers=2, fourier_c=2, fourier_t=3, heads=2),
}


def inputs(
    replicas: int, rows: int = 7, x_dim: int = 2, with_time: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(replicas, rows, x_dim, generator=g).double()
    c, t = (torch.rand(replicas, rows, 1, generator=g).double() for _ in range(2))
    return x, c, t if with_time else None


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def as_torch(layer: nn.Module, r: int) -> nn.Linear:
    """Return torch's own layer with the weights of replica r."""
    assert isinstance(layer, ReplicaLinear)
    out = nn.Linear(layer.weight.shape[1], layer.weight.shape[2]).double()
    with torch.no_grad():
        out.weight.copy_(layer.weight[r].T)
        out.bias.zero_()
        if layer.bias is not None:
            out.bias.copy_(layer.bias[r, 0])
    return out


# parts


def test_replica_linear_is_torch_linear() -> None:
    layer = ReplicaLinear(SEEDS, "layer", 5, 4).double()
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)).double()
    for r in range(3):
        close(layer(x)[r], as_torch(layer, r)(x[r]))


def test_replica_linear_without_bias() -> None:
    layer = ReplicaLinear(SEEDS, "layer", 5, 4, bias=False).double()
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)).double()
    for r in range(3):
        close(layer(x)[r], x[r] @ layer.weight[r])
    assert torch.equal(layer.weight, ReplicaLinear(SEEDS, "layer", 5, 4).double().weight)


def test_replica_layer_norm_is_torch_layer_norm() -> None:
    norm, g = ReplicaLayerNorm(3, 6).double(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        norm.gain.copy_(torch.randn(3, 6, generator=g))
        norm.bias.copy_(torch.randn(3, 6, generator=g))
    x = torch.randn(3, 4, 2, 6, generator=g).double()
    for r in range(3):
        close(norm(x)[r], F.layer_norm(x[r], (6,), norm.gain[r], norm.bias[r]))
        close(norm(x[:, :, 0])[r], F.layer_norm(x[r, :, 0], (6,), norm.gain[r], norm.bias[r]))


def test_fourier_features() -> None:
    u = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    expected = [0.3, -1.2]
    for f in (math.sin, math.cos):
        expected += [f(math.pi * k * v) for v in (0.3, -1.2) for k in (1, 2, 3)]
    close(fourier(u, 3), torch.tensor([expected], dtype=torch.float64))
    assert fourier(u, 0) is u
    assert fourier(torch.zeros(2, 5, 1), 4).shape == (2, 5, 9)


@pytest.mark.parametrize("fan_in", [1, 4, 300])
def test_init_is_uniform_up_to_one_over_root_fan_in(fan_in: int) -> None:
    layer, bound = ReplicaLinear([0], "layer", fan_in, 2000), 1 / math.sqrt(fan_in)
    for p in (layer.weight, layer.bias):
        n = p.numel()
        assert p is not None
        assert p.abs().max() <= bound * (1 + 1e-6)
        assert p.abs().max() > 0.99 * bound
        assert abs(p.mean().item()) < 5 * bound / math.sqrt(3 * n)
        assert abs(p.square().mean().item() / bound**2 - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


def test_init_bound_is_torchs() -> None:
    ours, theirs = ReplicaLinear([0], "layer", 9, 4000), nn.Linear(9, 4000)
    for a, b in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert a is not None
        assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=1e-2)


def test_init_depends_on_seed_and_name() -> None:
    a, b = ReplicaLinear([0, 1, 0], "a", 4, 4), ReplicaLinear([0], "b", 4, 4)
    assert torch.equal(a.weight[0], a.weight[2])
    assert not torch.equal(a.weight[0], a.weight[1])
    assert not torch.equal(a.weight[0], b.weight[0])
    direct = keyed_generator(1, 0, "init/a.weight").uniform(-0.5, 0.5, (4, 4))
    assert torch.equal(a.weight[1], torch.from_numpy(direct).float())


@pytest.mark.parametrize("kind", ["concat", "film", "transformer"])
def test_all_layers_start_differently(kind: str) -> None:
    net = Network(kind, hidden=8, layers=3, heads=2).build([0], 8, 8, True)  # type: ignore[arg-type]
    flat = [p.flatten()[:8] for n, p in net.named_parameters() if "norm" not in n]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


# parity with torch


@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("features", [0, 2])
def test_concat_is_a_stack_of_torch_layers(with_time: bool, residual: bool, features: int) -> None:
    spec = Network(hidden=16, residual=residual, fourier_c=features, fourier_t=features)
    net = spec.build(SEEDS, 2, 1, with_time).double()
    assert isinstance(net, ConcatMLP)
    x, c, t = inputs(3, with_time=with_time)
    out = net(x, c, t)
    for r in range(3):
        parts = [x[r], fourier(c[r], features)] + ([] if t is None else [fourier(t[r], features)])
        h = F.relu(as_torch(net.first, r)(torch.cat(parts, dim=1)))
        assert len(net.hidden) == 2
        for layer in net.hidden:
            h = F.relu(as_torch(layer, r)(h)) + (h if residual else 0)
        close(out[r], as_torch(net.last, r)(h))


@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("features", [0, 2])
def test_film_is_a_stack_of_torch_layers(with_time: bool, residual: bool, features: int) -> None:
    spec = Network("film", hidden=16, residual=residual, fourier_c=features, fourier_t=features)
    net = spec.build(SEEDS, 2, 1, with_time).double()
    assert isinstance(net, FiLMMLP)
    x, c, t = inputs(3, with_time=with_time)
    out = net(x, c, t)
    for r in range(3):
        parts = [fourier(c[r], features)] + ([] if t is None else [fourier(t[r], features)])
        h = F.relu(as_torch(net.first, r)(x[r]))
        assert len(net.hidden) == len(net.film) == 2
        for layer, film in zip(net.hidden, net.film, strict=True):
            condition = as_torch(film, r)(torch.cat(parts, dim=1))
            gamma, beta = condition[:, :16], condition[:, 16:]
            h = F.relu(gamma * as_torch(layer, r)(h) + beta) + (h if residual else 0)
        close(out[r], as_torch(net.last, r)(h))


@pytest.mark.parametrize(
    ("name", "function"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu), ("tanh", torch.tanh)]
)
def test_activations(name: str, function: Callable[[Tensor], Tensor]) -> None:
    net = Network(hidden=16, layers=1, activation=name).build([0], 2, 1, True).double()  # type: ignore[arg-type]
    x, c, t = inputs(1)
    assert t is not None
    h = function(as_torch(net.first, 0)(torch.cat([x[0], c[0], t[0]], dim=1)))  # type: ignore[arg-type]
    close(net(x, c, t)[0], as_torch(net.last, 0)(h))  # type: ignore[arg-type]


def attention(block: AttentionBlock, r: int, tokens: Tensor) -> Tensor:
    """torch's own multi-head attention with the same weights."""
    theirs = nn.MultiheadAttention(tokens.shape[-1], block.heads, batch_first=True).double()
    qkv, proj = [as_torch(layer, r) for layer in (block.query, block.key, block.value)], as_torch(block.proj, r)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in qkv]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in qkv]))
        theirs.out_proj.weight.copy_(proj.weight)
        theirs.out_proj.bias.copy_(proj.bias)
    out: Tensor = theirs(tokens, tokens, tokens, need_weights=False)[0]
    return out


def reference_block(block: AttentionBlock, r: int, tokens: Tensor) -> Tensor:
    width = tokens.shape[-1]
    normed = F.layer_norm(tokens, (width,), block.norm1.gain[r], block.norm1.bias[r])
    tokens = tokens + attention(block, r, normed)
    normed = F.layer_norm(tokens, (width,), block.norm2.gain[r], block.norm2.bias[r])
    return tokens + as_torch(block.down, r)(F.relu(as_torch(block.up, r)(normed)))


def stir_norms(net: nn.Module) -> None:
    """Make gains and biases differ between replicas and layers."""
    g = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, ReplicaLayerNorm):
            for p in module.parameters():
                p.data += 0.3 * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_block_is_torchs_multihead_attention(heads: int) -> None:
    block = AttentionBlock(Network("transformer", hidden=16, heads=heads), SEEDS, "block").double()
    stir_norms(block)
    tokens = torch.randn(3, 7, 3, 16, generator=torch.Generator().manual_seed(3)).double()
    out = block(tokens)
    for r in range(3):
        close(out[r], reference_block(block, r, tokens[r]))


@pytest.mark.parametrize("with_time", [False, True])
def test_transformer_reads_the_token_of_x(with_time: bool) -> None:
    spec = Network("transformer", hidden=16, layers=2, fourier_c=2, fourier_t=3)
    net = spec.build(SEEDS, 2, 1, with_time).double()
    assert isinstance(net, TokenTransformer)
    stir_norms(net)
    x, c, t = inputs(3, with_time=with_time)
    out = net(x, c, t)
    for r in range(3):
        tokens = [as_torch(net.embed_x, r)(x[r]), as_torch(net.embed_c, r)(fourier(c[r], 2))]
        if t is not None and net.embed_t is not None:
            tokens.append(as_torch(net.embed_t, r)(fourier(t[r], 3)))
        h = torch.stack(tokens, dim=1)
        assert len(net.blocks) > 0
        for block in net.blocks:
            assert isinstance(block, AttentionBlock)
            h = reference_block(block, r, h)
        close(out[r], as_torch(net.last, r)(F.layer_norm(h[:, 0], (16,), net.norm.gain[r], net.norm.bias[r])))


@pytest.mark.parametrize(
    ("kind", "with_time", "expected"),
    [("concat", False, 132_609), ("concat", True, 132_865), ("film", False, 134_401), ("film", True, 135_425)],
)
def test_parameter_counts(kind: str, with_time: bool, expected: int) -> None:
    net = Network(kind).build([0, 1], 1, 1, with_time)  # type: ignore[arg-type]
    assert count_parameters(net) == expected
    assert sum(p.numel() for p in net.parameters()) == 2 * expected


# replicas


def gradients(net: ConditionalNet, x: Tensor, c: Tensor, t: Tensor | None) -> list[Tensor]:
    net.zero_grad()
    net(x, c, t).sin().square().sum().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_replica_of_many_is_the_solo_net(name: str, with_time: bool) -> None:
    spec = VARIANTS[name]
    many = spec.build(SEEDS, 2, 1, with_time).double()
    x, c, t = inputs(3, with_time=with_time)
    grads = gradients(many, x, c, t)
    assert len(grads) == len(list(many.parameters()))
    for r, seed in enumerate(SEEDS):
        solo = spec.build([seed], 2, 1, with_time).double()
        for p, q in zip(many.parameters(), solo.parameters(), strict=True):
            assert torch.equal(p[r], q[0])
        one = (x[r : r + 1], c[r : r + 1], None if t is None else t[r : r + 1])
        close(many(x, c, t)[r], solo(*one)[0])
        for g, h in zip(grads, gradients(solo, *one), strict=True):
            close(g[r], h[0])
            assert h.abs().max() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_every_input_matters(name: str) -> None:
    net = VARIANTS[name].build([0], 2, 1, True).double()
    x, c, t = inputs(1)
    assert t is not None
    out = net(x, c, t)
    assert out.shape == (1, 7, 2)
    for changed in (net(x + 0.1, c, t), net(x, c + 0.1, t), net(x, c, t + 0.1)):
        assert not torch.allclose(changed, out)
    # rows do not see each other
    close(net(x[:, :3], c[:, :3], t[:, :3]), out[:, :3])


def test_building_is_repeatable_and_touches_no_global_state() -> None:
    state = torch.get_rng_state()
    nets = [Network("transformer", hidden=8, layers=1).build([5], 2, 1, True) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"hidden": 0}, "hidden"),
        ({"layers": 0}, "layers"),
        ({"heads": 0}, "heads"),
        ({"fourier_c": -1}, "fourier_c"),
        ({"fourier_t": -1}, "fourier_t"),
        ({"kind": "transformer", "hidden": 10, "heads": 4}, "heads"),
    ],
)
def test_bad_values_name_the_flag(values: dict[str, int], flag: str) -> None:
    with pytest.raises(ToyError, match=rf"--model\.network\.{flag}\b"):
        Network(**values)  # type: ignore[arg-type]
