"""The direction of an AdamW step, against torch.optim.AdamW itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy import adamw
from lightning_toys.update_entropy.adamw import (
    AdamWState,
    AdamWStep,
    Hyperparameters,
    Moments,
    dot,
    norm,
    read_state,
    single_tensor_adamw,
    sum_tensors,
)

KINDS: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def a_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)).to(dtype)


def an_optimizer(net: nn.Module, kind: str, groups: bool = False, **settings: Any) -> torch.optim.AdamW:
    p = list(net.parameters())
    given: Any = p
    if groups:
        given = [
            {"params": p[:2], "lr": 3e-3, "weight_decay": 0.1},
            {"params": p[2:], "lr": 1e-3, "betas": (0.7, 0.95)},
        ]
    return torch.optim.AdamW(given, **{"lr": 2e-3, "weight_decay": 0.01, **settings, **KINDS[kind]})


def put_gradient(net: nn.Module, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 7, generator=g), torch.randn(32, 3, generator=g)
    dtype = next(net.parameters()).dtype
    net.zero_grad()
    (net(x.to(dtype)) - y.to(dtype)).square().sum().backward()
    return gradient_of(net)


def gradient_of(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def walk(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, max_norm: float | None) -> None:
    for k in range(steps):
        put_gradient(net, k)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return dot(a, b) / (norm(a) * norm(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_direction_is_that_of_torchs_step(
    kind: str, amsgrad: bool, groups: bool, steps: int, max_norm: float | None, dtype: torch.dtype
) -> None:
    net = a_net(dtype)
    optimizer = an_optimizer(net, kind, groups, amsgrad=amsgrad)
    walk(net, optimizer, steps, max_norm)
    g, before = put_gradient(net, 99), values(net)
    state = copy.deepcopy(read_state(optimizer, net.named_parameters()))
    step = AdamWStep.from_gradient(before, g, state, max_norm)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        assert step.clip_scale < 1
    optimizer.step()
    taken = {n: p.double() - before[n].double() for n, p in values(net).items()}
    ours = {n: step.eta * v.double() for n, v in step.direction.items()}
    # theta' itself is rounded: in single precision the change carries an error of 1e-7 |theta| / |eta v|
    tolerance = 1e-9 if dtype == torch.float64 else 1e-8
    assert cosine(ours, taken) >= 1 - tolerance
    assert norm(ours) == pytest.approx(norm(taken), rel=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_single_precision_reaches_cosine_1e_9_where_theta_is_not_rounded(kind: str) -> None:
    """At theta = 0 nothing is lost in theta', so that the direction itself is seen."""
    net = a_net()
    optimizer = an_optimizer(net, kind)
    walk(net, optimizer, 4, 1.0)
    g = put_gradient(net, 9)
    for p in net.parameters():
        p.data.zero_()
    state = copy.deepcopy(read_state(optimizer, net.named_parameters()))
    step = AdamWStep.from_gradient(values(net), g, state, 1.0)
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    assert cosine(step.direction, values(net)) >= 1 - 1e-9


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", ["loop", "foreach"])
def test_replayed_operations_are_bit_equal(kind: str, steps: int, amsgrad: bool) -> None:
    net = a_net()
    optimizer = an_optimizer(net, kind, amsgrad=amsgrad, maximize=True)
    walk(net, optimizer, steps, None)
    g, before = put_gradient(net, 50), values(net)
    state = copy.deepcopy(read_state(optimizer, net.named_parameters()))
    optimizer.step()
    for name, after in values(net).items():
        assert torch.equal(
            single_tensor_adamw(before[name], g[name], state.moments[name], state.hyperparameters[name]), after
        )


def parts_of(g: dict[str, Tensor], k: int) -> list[dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(3)
    out = [{n: torch.randn(x.shape, generator=gen) * x.abs().mean() for n, x in g.items()} for _ in range(k - 1)]
    rest = {n: x - sum(p[n] for p in out) for n, x in g.items()}
    return [*out, rest]


def test_momentum_decay_and_the_parts_add_up() -> None:
    net = a_net()
    optimizer = an_optimizer(net, "loop", groups=True, amsgrad=True)
    walk(net, optimizer, 6, 1.0)
    g = put_gradient(net, 7)
    step = AdamWStep.from_gradient(values(net), g, read_state(optimizer, net.named_parameters()), 1.0)
    parts = parts_of(g, 16)
    assert step.residual(parts) < 1e-6
    assert step.residual(parts[:-1]) > 1e-2  # a missing sequence shows
    assert step.residual([*parts, {n: -step.momentum[n] / step.preconditioner[n] for n in g}]) > 1e-2


def test_each_part_by_hand() -> None:
    """One number, every symbol different: t = 3, b1 = .6, b2 = .8, eps = .1, wd = .3, clipped from 2 to 1.5."""
    hyperparameters = Hyperparameters(lr=0.05, betas=(0.6, 0.8), eps=0.1, weight_decay=0.3)
    x = torch.tensor([1.0], dtype=torch.float64)
    state = AdamWState({"w": hyperparameters}, {"w": Moments(2, 0.7 * x, 0.9 * x)})
    step = AdamWStep.from_gradient({"w": 4 * x}, {"w": -2 * x}, state, 1.5)
    c = 1.5 / (2 + 1e-6)
    s = 0.8 * 0.9 + 0.2 * (2 * c) ** 2
    D = math.sqrt(s) / math.sqrt(1 - 0.8**3) + 0.1
    assert step.clip_scale == pytest.approx(c, rel=1e-12)
    assert step.grad_norm == pytest.approx(2, rel=1e-12)
    assert float(step.momentum["w"]) == pytest.approx(-0.6 * 0.7 / ((1 - 0.6**3) * D), rel=1e-12)
    assert float(step.decay["w"]) == pytest.approx(-0.3 * 4, rel=1e-12)
    assert float(step.precondition({"w": -2 * x})["w"]) == pytest.approx(0.4 * 2 * c / ((1 - 0.6**3) * D), rel=1e-12)


def test_settings_come_from_the_groups_not_from_the_defaults() -> None:
    net = a_net(torch.float64)
    optimizer = an_optimizer(net, "loop")
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.2, betas=(0.1, 0.2))
    g, before = put_gradient(net, 0), values(net)
    step = AdamWStep.from_gradient(before, g, read_state(optimizer, net.named_parameters()))
    assert step.eta == 0.5
    optimizer.step()
    taken = {n: (p - before[n]) / 0.5 for n, p in values(net).items()}
    assert cosine(step.direction, taken) > 1 - 1e-12
    wrong = AdamWStep.from_gradient(
        before, g, read_state(optimizer, net.named_parameters()).with_hyperparameters(weight_decay=0.01)
    )
    assert cosine(wrong.direction, taken) < 1 - 1e-4


def test_counterfactual_states() -> None:
    net = a_net()
    optimizer = an_optimizer(net, "loop")
    walk(net, optimizer, 3, None)
    g = put_gradient(net, 8)
    state = read_state(optimizer, net.named_parameters())
    without = AdamWStep.from_gradient(values(net), g, state.without_momentum())
    whole = AdamWStep.from_gradient(values(net), g, state)
    assert norm(without.momentum) == 0
    # the denominators are those of the batch: the rest of the step is as it was
    difference = {n: whole.direction[n] - whole.momentum[n] - without.direction[n] for n in g}
    assert norm(difference) < 1e-6 * norm(whole.direction)
    signs = AdamWStep.from_gradient(
        values(net), g, state.with_hyperparameters(betas=(0.0, 0.0), weight_decay=0.0, eps=0.0)
    )
    for n in g:  # without memory the step is the gradient's sign
        assert torch.allclose(signs.direction[n], -g[n].sign(), atol=1e-6)


def test_other_optimisers_are_refused() -> None:
    net = a_net()
    with pytest.raises(ToyError, match="SGD; its step is not AdamW's"):
        read_state(torch.optim.SGD(net.parameters(), lr=1.0), net.named_parameters())
    with pytest.raises(ToyError, match="Adam; its step"):  # decay within the gradient
        read_state(torch.optim.Adam(net.parameters(), weight_decay=0.1), net.named_parameters())
    read_state(torch.optim.Adam(net.parameters()), net.named_parameters())
    with pytest.raises(ToyError, match="does not name"):
        read_state(an_optimizer(net, "loop"), list(net.named_parameters())[1:])


def test_sums_and_products() -> None:
    a = {"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}
    assert norm(a) == 5
    assert dot(a, {"x": torch.tensor([2.0]), "y": torch.tensor([-1.0])}) == 2
    assert sum_tensors([a, a])["y"] == 8
    assert a["y"] == 4  # the parts are left alone


@pytest.mark.parametrize("slice_size", [1 << 22, 3])
def test_a_step_that_keeps_nothing_is_the_same_step(slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, in slices too; norms and inner products of slices are those of the whole but for rounding."""
    g = torch.Generator().manual_seed(3)
    theta = {n: torch.randn(shape, generator=g) for n, shape in (("a", (4, 5)), ("b", ()), ("c", (7,)))}
    gradient = {n: torch.randn(p.shape, generator=g) for n, p in theta.items()}
    moments = {
        n: Moments(
            4, torch.randn(p.shape, generator=g), torch.rand(p.shape, generator=g), torch.rand(p.shape, generator=g)
        )
        for n, p in theta.items()
    }
    hyper = {
        n: Hyperparameters(lr, weight_decay=0.3, amsgrad=n == "a") for n, lr in zip(theta, (0.1, 0.2, 0.1), strict=True)
    }
    state = AdamWState(hyper, moments)
    whole = AdamWStep.from_gradient(theta, gradient, state, 0.5)
    sizes = norm(gradient), dot(gradient, whole.direction)
    monkeypatch.setattr(adamw, "SLICE", slice_size)
    lean = AdamWStep.from_gradient(theta, gradient, state, 0.5, keep=False)
    assert (lean.eta, lean.clip_scale) == (whole.eta, pytest.approx(whole.clip_scale, rel=1e-14))
    for part in ("direction", "momentum", "decay", "preconditioner"):
        kept, computed = getattr(whole, part), getattr(lean, part)
        assert isinstance(kept, dict)
        assert not isinstance(computed, dict)
        assert list(computed) == list(kept) == list(theta)
        for n in theta:
            torch.testing.assert_close(computed[n], kept[n], rtol=0 if slice_size > 9 else 1e-6, atol=0)
        with pytest.raises(KeyError):
            computed["d"]
    assert (norm(gradient), dot(gradient, lean.direction)) == pytest.approx(sizes, rel=1e-12)
    mine = {n: x.clone() for n, x in gradient.items()}
    wanted = whole.precondition(gradient)
    assert lean.precondition_in_place(mine) is mine
    assert all(torch.equal(mine[n], wanted[n]) for n in theta) or slice_size < 9
