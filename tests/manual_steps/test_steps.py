"""Steps with a written-out backward pass against autograd's, for every objective, loss and network option."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_toys.flow_vs_regression.objectives import Objective, make_objective
from lightning_toys.manual_steps import ManualSteps, is_plain, is_plain_adamw, record_terms
from lightning_toys.manual_steps import mlp as written
from lightning_toys.manual_steps.steps import group_sizes
from lightning_toys.nets import ConditionalNet, Network
from lightning_toys.training.averaging import average_decay
from lightning_toys.training.optimization import clip_per_replica

R, D = 5, 2
SEEDS = [3, 1, 4, 0, 5]
ROWS = (7, 4)  # batch sizes that take turns
MODES: tuple[Any, ...] = ("regression", "flow", "straight_flow", "mip", "mip_one_step")
NETS = [
    Network(kind="concat", hidden=8, layers=3),
    Network(kind="concat", hidden=8, layers=1),
    Network(kind="concat", hidden=8, layers=3, residual=True, activation="gelu", fourier_c=2, fourier_t=1),
    Network(kind="concat", hidden=8, layers=4, residual=True),
    Network(kind="film", hidden=8, layers=3),
    Network(kind="film", hidden=8, layers=2, activation="tanh", fourier_c=1),
    Network(kind="film", hidden=8, layers=4, residual=True, activation="silu", fourier_t=2),
]


def draw(steps: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    sizes = [(ROWS[s % 2], d) for s in range(steps) for d in (1, D, D, 1)]
    found = [torch.randn(R, n, d, generator=g, dtype=dtype) for n, d in sizes]
    names = ("c", "x1", "x0", "t")
    return [dict(zip(names, found[i : i + 4], strict=True)) for i in range(0, len(found), 4)]


def build(spec: Network, objective: Objective, dtype: torch.dtype = torch.float64) -> ConditionalNet:
    return spec.build(SEEDS, D, 1, objective.with_time).to(dtype)


def adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02, fused=True)


def by_autograd(
    net: ConditionalNet,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    loss: str,
    steps: list[dict[str, Tensor]],
    clip: float | None = None,
    average: nn.Module | None = None,
) -> Tensor:
    losses = []
    for n, given in enumerate(steps):
        norm = torch.square if loss == "l2" else torch.abs
        terms = [norm(r).sum((1, 2)) for r in objective.residuals(net, **given)]
        each = sum(terms[1:], terms[0]) / (given["x1"].shape[1] * D)
        optimizer.zero_grad()
        each.sum().backward()
        if clip is not None:
            clip_per_replica(list(net.parameters()), clip)
        optimizer.step()
        if average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - average_decay(0.4, n))
        losses.append(each.detach())
    return torch.stack(losses)


def by_hand(steps_of: ManualSteps, objective: Objective, steps: list[dict[str, Tensor]], rate: float = 3e-3) -> Tensor:
    together = {name: torch.cat([given[name] for given in steps], 1) for name in steps[0]}
    sizes = [given["x1"].shape[1] for given in steps]
    rows = steps_of.rows(record_terms(lambda net: objective.residuals(net, **together)), sizes)
    return steps_of.run(rows, sizes, [rate] * len(steps))


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-11) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("spec", NETS, ids=lambda s: f"{s.kind}-{s.layers}-{s.activation}-{s.residual}")
@pytest.mark.parametrize("mode", MODES)
def test_training_is_autograds(mode: Any, spec: Network, loss: Literal["l1", "l2"]) -> None:
    """Losses, weights, moments and gradients of two blocks, in two groups of replicas and in one."""
    objective, given = make_objective(mode, 0.9, "paper"), draw(9)
    expected = build(spec, objective)
    its_optimizer = adamw(expected)
    losses = by_autograd(expected, its_optimizer, objective, loss, given)
    assert losses.std() > 0
    for group_bytes in (1, 10**9):
        net = build(spec, objective)
        optimizer = adamw(net)
        manual = ManualSteps(net, optimizer, loss, group_bytes=group_bytes)
        assert len(manual.groups) == (2 if group_bytes == 1 else 1)
        found = torch.cat([by_hand(manual, objective, given[:4]), by_hand(manual, objective, given[4:])])
        torch.testing.assert_close(found, losses, rtol=1e-11, atol=1e-12)
        assert_same(net, expected)
        for p, q in zip(net.parameters(), expected.parameters(), strict=True):
            ours, theirs = optimizer.state[p], its_optimizer.state[q]
            assert ours.keys() == theirs.keys()
            assert ours["step"].dtype == theirs["step"].dtype
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-13)
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("spec", [NETS[0], NETS[2], NETS[6]], ids=lambda s: f"{s.kind}-{s.activation}")
@pytest.mark.parametrize("mode", ["flow", "mip"])
def test_in_single_precision_groups_are_autograds_eight_replicas_to_the_bit(mode: Any, spec: Network) -> None:
    """Over thousands of steps a difference in rounding grows into another network: there is none.

    Eight, since then autograd's own parameters fill vector registers, of which torch computes the rest otherwise.
    """
    objective = make_objective(mode, 0.9, "paper")
    g = torch.Generator().manual_seed(1)
    given = [
        {name: torch.randn(8, 16, d, generator=g) for name, d in (("c", 1), ("x1", D), ("x0", D), ("t", 1))}
        for _ in range(60)
    ]
    wide = replace(spec, hidden=32)
    expected, net = (wide.build(list(range(8)), D, 1, objective.with_time) for _ in range(2))
    theirs, ours = adamw(expected), adamw(net)
    losses = by_autograd(expected, theirs, objective, "l2", given)
    per_replica = 4 * sum(p[0].numel() * p.element_size() for p in net.parameters())
    manual = ManualSteps(net, ours, group_bytes=3 * per_replica)
    assert [len(range(8)[g.replicas]) for g in manual.groups] == [3, 3, 2]
    found = torch.cat([by_hand(manual, objective, given[:30]), by_hand(manual, objective, given[30:])])
    torch.testing.assert_close(found, losses)
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])
    assert not torch.equal(p, next(iter(wide.build(list(range(8)), D, 1, objective.with_time).parameters())))


@pytest.mark.parametrize(
    ("replicas", "most", "sizes"),
    [
        (1, 0, [1]),
        (1, 9, [1]),
        (2, 1, [2]),
        (3, 1, [3]),
        (5, 1, [3, 2]),
        (8, 3, [3, 3, 2]),
        (8, 8, [8]),
        (9, 4, [3, 3, 3]),
        (4, 3, [2, 2]),
    ],
)
def test_groups_are_even_and_none_is_of_one(replicas: int, most: int, sizes: list[int]) -> None:
    assert group_sizes(replicas, most) == sizes


@pytest.mark.parametrize(("clip", "averages"), [(0.05, False), (None, True), (0.05, True)])
def test_clipping_and_averages(clip: float | None, averages: bool) -> None:
    objective, given, spec = make_objective("flow", 0.9, "paper"), draw(8), NETS[0]
    nets = [build(spec, objective) for _ in range(4)]
    by_autograd(nets[0], adamw(nets[0]), objective, "l2", given, clip, nets[1] if averages else None)
    manual = ManualSteps(nets[2], adamw(nets[2]), "l2", clip, nets[3] if averages else None, 0.4, group_bytes=1)
    by_hand(manual, objective, given[:2])  # it is met after five steps: the count goes on in the second block
    by_hand(manual, objective, given[2:])
    assert_same(nets[2], nets[0])
    assert_same(nets[3], nets[1])
    if averages:
        assert not torch.equal(next(nets[3].parameters()), next(nets[2].parameters()))
    if clip:  # it did clip
        free = build(spec, objective)
        by_autograd(free, adamw(free), objective, "l2", given)
        assert not torch.allclose(next(free.parameters()), next(nets[0].parameters()), rtol=1e-3)


def test_it_goes_on_where_autograd_stopped_and_back() -> None:
    """One optimiser state for both: in turns they train as autograd alone does."""
    objective, given, spec = make_objective("mip", 0.9, "published"), draw(9), NETS[1]
    expected, net = build(spec, objective), build(spec, objective)
    by_autograd(expected, adamw(expected), objective, "l2", given)
    optimizer = adamw(net)
    by_autograd(net, optimizer, objective, "l2", given[:3])
    by_hand(ManualSteps(net, optimizer, "l2"), objective, given[3:6])
    by_autograd(net, optimizer, objective, "l2", given[6:])
    assert_same(net, expected)


def test_each_replica_is_the_solo_run() -> None:
    objective, spec = make_objective("flow", 0.9, "paper"), NETS[4]
    given = draw(30, torch.float32)
    net = build(spec, objective, torch.float32)
    by_hand(ManualSteps(net, adamw(net)), objective, given)
    for r, seed in enumerate(SEEDS):
        solo = spec.build([seed], D, 1, True)
        by_hand(ManualSteps(solo, adamw(solo)), objective, [{k: v[r : r + 1] for k, v in g.items()} for g in given])
        for x, y in zip(net.parameters(), solo.parameters(), strict=True):
            torch.testing.assert_close(x[r : r + 1], y, rtol=1e-5, atol=1e-5)


def test_a_wrong_term_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: a sign, a factor, a forgotten term each move the weights by more than the tests allow."""
    objective, given = make_objective("flow", 0.9, "paper"), draw(3)
    plain = written.Linear.backward

    def without_bias(self: written.Linear, x: Tensor, d_out: Tensor) -> None:
        plain(self, x, d_out)
        self.bias_grad.zero_()

    faults: list[tuple[Any, str, Any]] = [
        (written.Linear, "backward", without_bias),
        (written.Linear, "input_grad", lambda self, d, out: torch.bmm(d, self.transposed, out=out).neg_()),
        (written.BACKWARD, "relu", lambda d, a, h: d),
    ]
    for spec, (owner, name, wrong) in itertools.product((NETS[0], NETS[4]), faults):
        expected, net = build(spec, objective), build(spec, objective)
        by_autograd(expected, adamw(expected), objective, "l2", given)
        with monkeypatch.context() as patch:
            if isinstance(owner, dict):
                patch.setitem(owner, name, wrong)
            else:
                patch.setattr(owner, name, wrong)
            by_hand(ManualSteps(net, adamw(net)), objective, given)
        with pytest.raises(AssertionError):
            assert_same(net, expected, 1e-5)


def test_who_takes_it() -> None:
    objective = make_objective("flow", 0.9, "paper")
    for spec in NETS:
        net = build(spec, objective)
        assert is_plain(net)
        assert is_plain_adamw(adamw(net), net)
    assert not is_plain(build(Network(kind="transformer", hidden=8, layers=1), objective))

    class Own(type(net)):  # type: ignore[misc]
        pass

    hooked, frozen, listened, half = (build(NETS[0], objective) for _ in range(4))
    own = build(NETS[4], objective)
    own.__class__ = Own
    hooked.first.register_forward_hook(lambda *args: None)  # type: ignore[union-attr, operator]
    next(frozen.parameters()).requires_grad_(False)
    next(listened.parameters()).register_hook(lambda g: g)
    for other in (hooked, frozen, listened, half.to(torch.bfloat16), own):
        assert not is_plain(other)
    optimizers = [
        torch.optim.Adam(net.parameters(), fused=True),
        torch.optim.AdamW(net.parameters(), fused=False),
        torch.optim.AdamW(net.parameters(), amsgrad=True, fused=True),
        torch.optim.AdamW(list(net.parameters())[::-1], fused=True),
    ]
    watched = adamw(net)
    watched.register_step_post_hook(lambda *args: None)
    for optimizer in (*optimizers, watched):
        assert not is_plain_adamw(optimizer, net)
