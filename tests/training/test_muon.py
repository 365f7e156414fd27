import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.nets import Network, ReplicaLinear
from lightning_toys.training import muon
from lightning_toys.training.module import ToyModule
from lightning_toys.training.muon import ReplicaMuon, orthogonalise, split_hidden
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner

SHAPES = [(24, 16), (16, 24), (32, 32)]


def draw(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/muon/{name}").standard_normal(shape)).float()


def conditioned(m: int, n: int, replicas: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """U, V' and g = U S V' with singular values from .1 to 1."""
    u, _, v = torch.linalg.svd(draw("g", replicas, m, n), full_matrices=False)
    return u, v, u @ torch.diag(torch.logspace(-1, 0, min(m, n))) @ v


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(m: int, n: int) -> None:
    u, v, g = conditioned(m, n)
    core = u.mT @ orthogonalise(g) @ v.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65
    assert values.max() < 1.25
    # bfloat16 keeps 8 bits: 2^-8 an operation
    assert (core - torch.diag_embed(values)).abs().max() < 0.03
    assert orthogonalise(g).dtype == torch.float32


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_orthogonalise_takes_each_replica_by_itself(m: int, n: int) -> None:
    _, _, g = conditioned(m, n)
    whole = orthogonalise(g)
    scale = torch.tensor([1e3, 1.0, 1e-3]).view(3, 1, 1)
    for r in range(3):
        torch.testing.assert_close(whole[r], orthogonalise(g[r : r + 1])[0], rtol=0, atol=0.02)
    torch.testing.assert_close(orthogonalise(g * scale), whole, rtol=0, atol=0.02)
    assert torch.equal(orthogonalise(torch.zeros(2, m, n)), torch.zeros(2, m, n))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_bfloat16_only_where_the_processor_has_it(m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = conditioned(m, n)[2]
    exact = orthogonalise(g.double())
    errors = {}
    for native in (False, True):
        monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device, native=native: native)
        errors[native] = float((orthogonalise(g) - exact).abs().max())
    assert errors[False] < 1e-5
    assert 1e-4 < errors[True] < 0.02


@pytest.mark.parametrize(
    ("known", "native"),
    [({"avx2": True}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_what_torch_says_of_the_processor_decides(
    known: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    asked = muon.multiplies_bfloat16.__wrapped__
    assert asked("cpu") is native
    assert asked("cuda") is True
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # older torch does not say
    assert asked("cpu") is False


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is newer than this torch")
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_matrices_follow_torchs_muon(m: int, n: int) -> None:
    """Ours are (in, out) and torch's (out, in), so the scale sqrt(max(1, rows / columns)) has rows = out = n."""
    start, lr, steps, replicas = draw("start", 3, m, n), 0.02, 6, 3
    p = nn.Parameter(start.clone())
    ours = ReplicaMuon([p], [], lr, 1.0, momentum=0.9, weight_decay=0.1)
    theirs = [nn.Parameter(start[r].T.clone()) for r in range(replicas)]
    reference = torch.optim.Muon(theirs, lr=lr, momentum=0.9, weight_decay=0.1, nesterov=True)
    worst = 0.02 * lr * max(1, n / m) ** 0.5  # of an entry in a step: bfloat16, normalised before or after rounding
    for k in range(steps):
        p.grad = conditioned(m, n)[2] + 0.1 * draw(f"noise {k}", 3, m, n)
        for r, q in enumerate(theirs):
            q.grad = p.grad[r].T.clone()
        ours.step()
        reference.step()
        for r, q in enumerate(theirs):
            torch.testing.assert_close(p[r].detach(), q.detach().T, rtol=0, atol=worst * (k + 1))
    assert (p - start).abs().mean() > 0.02 * lr * steps


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_matrices_by_hand(m: int, n: int) -> None:
    """Nesterov's momentum as an average, decay that is decoupled, and the scale, over five steps."""
    start, lr, beta, decay = draw("start", 2, m, n), 0.03, 0.8, 0.5
    p = nn.Parameter(start.clone())
    optimiser = ReplicaMuon([p], [], lr, 1.0, momentum=beta, weight_decay=decay)
    expected, average = start.clone(), torch.zeros_like(start)
    for k in range(5):
        g = p.grad = draw(f"grad {k}", 2, m, n)
        optimiser.step()
        average = beta * average + (1 - beta) * g
        update = orthogonalise((1 - beta) * g + beta * average)
        expected = (1 - lr * decay) * expected - lr * (n / m if n > m else 1) ** 0.5 * update
        # an input that differs in its last bit may round to another bfloat16
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0.01 * lr * (k + 1))


def test_the_others_follow_torchs_adamw() -> None:
    shapes, lr, decay = [(3, 4, 5), (3, 1, 5), (7,)], 0.01, 0.3
    mine, theirs = ([nn.Parameter(draw(f"p{i}", *s)) for i, s in enumerate(shapes)] for _ in range(2))
    mine.append(nn.Parameter(torch.ones(2)))  # without a gradient
    ours = ReplicaMuon([], mine, 1.0, lr, weight_decay=decay)
    reference = torch.optim.AdamW(theirs, lr=lr, weight_decay=decay, foreach=False, fused=False)
    for _ in range(20):
        for params, optimiser in ((mine[:3], ours), (theirs, reference)):
            optimiser.zero_grad()
            sum(p.square().sum() + (3 * p).cos().sum() for p in params).backward()  # type: ignore[union-attr]
            optimiser.step()
        for p, q in zip(mine, theirs, strict=False):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert all((p - draw(f"p{i}", *s)).abs().max() > 0.1 for i, (p, s) in enumerate(zip(mine, shapes, strict=False)))
    assert torch.equal(mine[3].detach(), torch.ones(2))


def problem(seeds: list[int]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Two matrices and two vectors a replica."""

    def stack(name: str, *shape: int) -> nn.Parameter:
        rows = [keyed_generator(s, 0, f"test/muon/{name}").standard_normal(shape) for s in seeds]
        return nn.Parameter(torch.stack([torch.from_numpy(row) for row in rows]).float())

    return [stack("a", 6, 8), stack("b", 8, 8)], [stack("c", 1, 8), stack("d", 8)]


def train(matrices: list[nn.Parameter], others: list[nn.Parameter], optimiser: ReplicaMuon, steps: int) -> None:
    def closure() -> float:
        optimiser.zero_grad()
        loss = ((matrices[0] @ matrices[1] + others[0]).tanh() * others[1].unsqueeze(1)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    losses = [optimiser.step(closure) for _ in range(steps)]
    assert all(isinstance(loss, float) for loss in losses)


def make(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> ReplicaMuon:
    return ReplicaMuon(matrices, others, 0.02, 0.01, weight_decay=0.1)


def test_a_state_dict_continues_bitwise(bitwise: Callable[..., None]) -> None:
    whole = problem([5, 6])
    optimiser = make(*whole)
    train(*whole, optimiser, 4)
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    part = copy.deepcopy(whole)
    resumed = ReplicaMuon(*part, 1.0, 1.0, momentum=0.1)  # every number comes from the file
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(*whole, optimiser, 4)
    train(*part, resumed, 4)
    bitwise([p.detach() for group in whole for p in group], [p.detach() for group in part for p in group])
    bitwise(optimiser.state_dict(), resumed.state_dict())


def test_a_replica_of_many_is_the_solo_run() -> None:
    seeds = [5, 6, 7]
    many = problem(seeds)
    train(*many, make(*many), 5)
    for r, seed in enumerate(seeds):
        solo = problem([seed])
        before = copy.deepcopy(solo)
        train(*solo, make(*solo), 5)
        for p, q, old in zip(*(a + b for a, b in (many, solo, before)), strict=True):
            torch.testing.assert_close(p[r], q[0], rtol=1e-5, atol=1e-3)  # bfloat16 may round otherwise
            assert (q - old).abs().max() > 0.02


def test_counts_of_steps_go_to_the_parameters_device() -> None:
    """A fused kernel wants them there; a checkpoint is read to the CPU, and Lightning moves all but these."""
    here = problem([5])
    optimiser = make(*here)
    train(*here, optimiser, 2)
    there = [[nn.Parameter(p.detach().to("meta")) for p in group] for group in here]
    resumed = make(*there)
    resumed.load_state_dict(optimiser.state_dict())
    states = [resumed.state[p] for p in there[1]]
    assert [s["step"].device.type for s in states] == ["meta"] * len(states)
    assert [s["exp_avg"].device.type for s in states] == ["meta"] * len(states)


SEEDS = [0, 1]


def linear(m: int, n: int) -> ReplicaLinear:
    return ReplicaLinear(SEEDS, f"{m}.{n}", m, n)


def sequential(*sizes: int) -> nn.Sequential:
    layers = [linear(m, n) for m, n in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def network(**settings: Any) -> nn.Module:
    return Network(**{"hidden": 8, **settings}).build(SEEDS, 2, 1, True)


class Within(nn.Module):
    """A network that holds others, and a layer and a matrix of its own; ``hidden`` is a number here."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.hidden = 8
        for name, part in parts.items():
            self.add_module(name, part)


class Bare(nn.Module):
    """Three matrices, a bias with an axis of one and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(2, m, 4)) for m in (3, 4, 5))
        self.bias, self.gain = nn.Parameter(torch.zeros(2, 1, 4)), nn.Parameter(torch.zeros(2, 4))


BLOCK = ["query", "key", "value", "proj", "up", "down"]


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (network(layers=3), ["hidden.0.weight", "hidden.1.weight"]),
        (network(layers=1), []),
        (network(kind="film", layers=2), ["hidden.0.weight"]),
        (network(kind="transformer", layers=2), [f"blocks.{i}.{name}.weight" for i in range(2) for name in BLOCK]),
        (sequential(2, 8, 9, 7, 1), ["2.weight", "4.weight"]),
        (sequential(2, 8, 1), []),
        (Within(first=linear(2, 8), middle=linear(8, 8), last=linear(8, 1)), ["middle.weight"]),
        (Within(body=sequential(2, 8, 8), head=linear(8, 1)), ["body.2.weight"]),
        (Within(net=network(layers=2), head=linear(2, 2)), ["net.hidden.0.weight"]),
        (
            nn.ModuleDict({"actor": sequential(2, 8, 8, 1), "critic": network(layers=2), "small": sequential(2, 8, 1)}),
            ["actor.2.weight", "critic.hidden.0.weight"],
        ),
        (nn.ModuleDict({"actor": network(layers=1), "critic": network(layers=1)}), []),
        (Bare(), ["b"]),
        (linear(3, 3), []),
    ],
)
def test_what_muon_is_for(net: nn.Module, names: list[str]) -> None:
    """Every weight between hidden layers, wherever the network lies, and no first or last layer, bias or gain."""
    known = {id(p): name for name, p in net.named_parameters()}
    hidden, others = ([known[id(p)] for p in group] for group in split_hidden(net))
    assert hidden == names
    assert sorted(hidden + others) == sorted(known.values())
    for p in net.parameters():
        p.requires_grad_(False)
    assert split_hidden(net) == ([], [])


class Built(ToyModule):
    """A module whose network is the one given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(SEEDS, optimizer="muon")
        self.net = net


def test_a_network_without_hidden_matrices_is_refused(policies: Runner) -> None:
    optimizer = Built(sequential(2, 8, 8, 1)).configure_optimizers()
    assert isinstance(optimizer, ReplicaMuon)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 5]
    with pytest.raises(ToyError, match=r"^--model.optimizer: muon is not allowed with this network \(Sequential\)"):
        Built(sequential(2, 8, 1)).configure_optimizers()
    flags = ("--model.network.kind", "concat", "--trainer.max_steps", "1", "--model.seeds", "[0]")
    code, err = policies.code("fit", "flow", *flags, "--model.network.layers", "1")
    assert code == 2
    assert "error: --model.optimizer: muon is not allowed with this network" in err
    assert "give more layers (--model.network.layers), or adamw" in err
    assert not policies.folder("flow").exists()
