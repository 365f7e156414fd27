"""Targets, networks, objectives and metrics of somebody's own: the contracts, and who breaks them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import (
    Architecture,
    FlowVsRegression,
    InterpolationData,
    Metric,
    Objective,
    Readout,
    Target,
)
from lightning_toys.flow_vs_regression.data import highest_frequency
from lightning_toys.nets import ConditionalNet, Network, keyed_uniform


class NoCall(Target):
    dim = 1


class NoDim(Target):
    def __call__(self, c: Tensor) -> Tensor:
        return c


class Wide(NoDim):
    dim = 2


class Single(NoDim):
    dim = 1

    def __call__(self, c: Tensor) -> Tensor:
        return c.float()


class Pole(NoDim):
    dim = 1

    def __call__(self, c: Tensor) -> Tensor:
        return 1 / c


class Broken(NoDim):
    dim = 1

    def __call__(self, c: Tensor) -> Tensor:
        raise KeyError("amplitude")


class Method(NoDim):
    dim = 1

    def highest_frequency(self) -> float:  # type: ignore[override]
        return 3.0


class Plain(NoDim):
    dim = 1


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (NoCall, "NoCall has no __call__; give it (c (M, 1) to f(c) (M, dim))"),
        (NoDim, "NoDim has no dim; give it (the number of outputs)"),
        (Wide, "Wide.__call__ maps c (3, 1) to shape (3, 1); give a tensor (3, dim) = (3, 2)"),
        (Single, "Single.__call__ gives torch.float32 for float64; compute in c's own"),
        (Pole, "Pole.__call__ is not finite at c = 0, 0.5 or 1"),
        (Broken, "Broken.__call__ fails on c (3, 1): KeyError: 'amplitude'"),
        (Method, "Method.highest_frequency: <bound method"),
    ],
)
def test_a_target_that_lacks_something_is_one_line_at_the_start(target: type[Target], says: str) -> None:
    with pytest.raises(ToyError) as error:
        InterpolationData(target())
    assert str(error.value).startswith(f"--data.target: {says}")
    assert "\n" not in str(error.value)


def test_the_highest_frequency_may_be_left_out() -> None:
    assert highest_frequency(InterpolationData(Plain()).target) == 0.0
    assert InterpolationData(Plain()).points([0]).x1.shape == (1, 50, 1)


class Matrix(ConditionalNet):
    """x W + c V, plus t: one matrix a replica."""

    def __init__(self, seeds: Sequence[int], x_dim: int, c_dim: int) -> None:
        super().__init__()
        self.w = keyed_uniform(seeds, "w", (x_dim, x_dim), 1.0)
        self.v = keyed_uniform(seeds, "v", (c_dim, x_dim), 1.0)

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        out = torch.bmm(x, self.w) + torch.bmm(c, self.v)
        return out if t is None else out + t


class MeanOverReplicas(Matrix):
    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        out = super().forward(x, c, t)
        return out - out.mean(0, keepdim=True)


class MeanOverRows(Matrix):
    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        out = super().forward(x, c, t)
        return out - out.mean(1, keepdim=True)


class FirstOutput(Matrix):
    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        return super().forward(x, c, t)[..., :1]


class Global(Matrix):
    def __init__(self, seeds: Sequence[int], x_dim: int, c_dim: int) -> None:
        super().__init__(seeds, x_dim, c_dim)
        self.w = nn.Parameter(torch.randn(self.w.shape))


class Shared(Matrix):
    def __init__(self, seeds: Sequence[int], x_dim: int, c_dim: int) -> None:
        super().__init__(seeds, x_dim, c_dim)
        self.v = nn.Parameter(self.v.data[0])

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        return torch.bmm(x, self.w) + c @ self.v


class Own(Architecture):
    """Builds any of the above."""

    def __init__(self, kind: type[nn.Module] = Matrix) -> None:
        self.kind = kind

    def build(
        self, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool, out_dim: int | None = None
    ) -> ConditionalNet:
        return self.kind(seeds, x_dim, c_dim)  # type: ignore[call-arg,return-value]


class Alone(nn.Module):
    def __init__(self, *sizes: Any) -> None:
        super().__init__()


TWO_OUTPUTS = InterpolationData(num_train=5)
TWO_OUTPUTS.output_dim = 2


def measured(seeds: Sequence[int] = (0, 1, 2), mode: str = "flow", **settings: Any) -> FlowVsRegression:
    module = FlowVsRegression(mode, seeds, **settings)  # type: ignore[arg-type]
    module.sizes = module.measure(TWO_OUTPUTS)
    return module


@pytest.mark.parametrize("seeds", [[5], [0, 1, 2]])
@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Own(Alone), "Own.build gives a Alone; give a ConditionalNet"),
        (Own(Shared), "Own: parameter 'v' has shape (1, 2) for 2 seeds; give it the replica axis, (2, ...)"),
        (Own(Global), "Own: parameter 'w' of a replica depends on more than its seed"),
        (Own(FirstOutput), "Own maps x (2, 3, 2) to (2, 3, 1); give (2, 3, 2)"),
        (Own(MeanOverReplicas), "Own: what a replica gives depends on its neighbours"),
        (Own(MeanOverRows), "Own: what a row gives depends on the other rows of its batch"),
    ],
)
def test_a_network_that_breaks_its_contract(network: Architecture, says: str, seeds: list[int]) -> None:
    with pytest.raises(ToyError) as error:
        measured(seeds, network=network)
    assert str(error.value).startswith(f"--model.network: {says}"), error.value


def test_a_network_of_ones_own_is_built_and_its_weights_are_the_solo_runs() -> None:
    both, solo = (measured(seeds, network=Own()) for seeds in ([3, 4], [4]))
    for module in (both, solo):
        module.configure_model()
    assert both.label == "flow Own"
    c = torch.linspace(0, 1, 7).unsqueeze(1)
    torch.testing.assert_close(both(c)[1], solo(c)[0])


class Halves(Objective):
    """Regression in two terms, by hand."""

    with_time = False

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        return [net(x0, c) - x1]

    def readout(self, solver: Any, nfe: int) -> Readout:
        return Readout("mine", lambda net, c, x0: net(x0, c))


class NoReadout(Objective):
    with_time = False
    residuals = Halves.residuals


class NoTime(Halves):
    with_time = "no"  # type: ignore[assignment]


class UnsaidTime(Halves):
    with_time = True

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        return [net(x0 + t * (x1 - x0), c, t.expand(*c.shape[:2], 1)) - x1]


class Bare(Halves):
    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        return net(x0, c) - x1  # type: ignore[return-value]


class Reduced(Halves):
    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        return [(net(x0, c) - x1).mean(0)]


class Mixing(Halves):
    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        return [net(x0, c) - x1.mean(0, keepdim=True)]


class Narrow(Halves):
    def readout(self, solver: Any, nfe: int) -> Readout:
        return Readout("mine", lambda net, c, x0: net(x0, c)[..., :1])


class Slashed(Halves):
    def readout(self, solver: Any, nfe: int) -> Readout:
        return Readout("one/two", lambda net, c, x0: net(x0, c))


class Neighbourly(Halves):
    def readout(self, solver: Any, nfe: int) -> Readout:
        return Readout("mine", lambda net, c, x0: net(x0, c).mean(0, keepdim=True).expand_as(x0))


class Pair(Halves):
    """Works for two replicas only, which a run of one does not have."""

    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        return [torch.stack([net(x0, c)[0] - x1[0], net(x0, c)[1] - x1[1]])]


class Fewer(Halves):
    def residuals(self, net: ConditionalNet, c: Tensor, x1: Tensor, x0: Tensor, t: Tensor) -> list[Tensor]:
        return [net(x0, c) - x1] * len(c)


class PairRead(Halves):
    def readout(self, solver: Any, nfe: int) -> Readout:
        return Readout("mine", lambda net, c, x0: net(x0, c)[[0, 1]])


class OneReadout(Halves):
    def readouts(self, solvers: Any, nfes: Any) -> Any:
        return self.readout("euler", 1)


class NoPart(Halves):
    def of_replicas(self, replicas: Sequence[int], count: int) -> Any:
        return None


class Normal(Halves):
    x0_distribution = "normal"  # type: ignore[assignment]


class NoTimes(Halves):
    times = 0


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (Pair(), "Pair.residuals fails: IndexError: "),
        (Fewer(), "Fewer.residuals gives 2 terms for two replicas and 1 for one"),
        (PairRead(), "PairRead's readout mine fails: IndexError: "),
        (OneReadout(), "OneReadout.readouts gives Readout; give a list of Readout"),
        (NoPart(), "NoPart.of_replicas gives a NoneType; give an Objective"),
        (Normal(), "Normal.x0_distribution: 'normal' is not allowed; give 'zeros' or 'gaussian'"),
        (NoTimes(), "NoTimes.times: 0 is not allowed; give an integer >= 1"),
        (NoReadout(), "NoReadout has no readout; give it"),
        (NoTime(), "NoTime.with_time: 'no' is not allowed"),
        (UnsaidTime(), "UnsaidTime.residuals is not finite; set samples_time = True where t is used"),
        (Bare(), "Bare.residuals gives Tensor; give a list of tensors (R, B, D)"),
        (Reduced(), "Reduced.residuals: shape (3, 2); give (2, 3, 2)"),
        (Mixing(), "Mixing.residuals: a replica's residuals depend on its neighbours"),
        (Narrow(), "Narrow's readout mine gives (2, 3, 1); give (2, 3, 2), as x0"),
        (Slashed(), "Slashed.readout: the name 'one/two' is not allowed"),
        (Neighbourly(), "Neighbourly's readout mine: a replica's prediction depends on its neighbours"),
    ],
)
def test_an_objective_that_breaks_its_contract(objective: Objective, says: str) -> None:
    with pytest.raises(ToyError) as error:
        measured(objective=objective, network=Network(hidden=8))
    assert str(error.value).startswith(f"--model.objective: {says}"), error.value


def test_an_objective_of_ones_own_gives_losses_and_readouts() -> None:
    """Halves is regression, and has regression's losses and predictions, to the bit."""
    own, shipped = measured(objective=Halves(), network=Network(hidden=8)), measured(
        mode="regression", network=Network(hidden=8)
    )  # fmt: skip
    for module in (own, shipped):
        module.configure_model()
    g = torch.Generator().manual_seed(0)
    c, x1 = torch.rand(3, 4, 1, generator=g), torch.randn(3, 4, 2, generator=g)
    rows = (c, x1, torch.zeros_like(x1), torch.zeros(()), 4)
    assert torch.equal(own.losses(*rows), shipped.losses(*rows))
    assert torch.equal(own(c), shipped(c))
    assert own.label == "Halves concat"
    assert [way.name for way in own.objective.readouts(["euler", "rk4"], [1, 4])] == ["mine"]
    assert set(own.unused_settings()) >= {"--model.mode", "--model.t_star", "--model.mip_form"}


class Worst(Metric):
    name = "worst"

    def __call__(self, prediction: Tensor, truth: Tensor, c: Tensor) -> Tensor:
        return (prediction - truth).abs().amax((1, 2, 3))


class Nameless(Metric):
    __call__ = Worst.__call__


class Taken(Worst):
    name = "l2"


class OfADim(Worst):
    name = "worst_dim0"


class Number(Worst):
    def __call__(self, prediction: Tensor, truth: Tensor, c: Tensor) -> Tensor:
        return (prediction - truth).abs().max()


class Ranked(Worst):
    def __call__(self, prediction: Tensor, truth: Tensor, c: Tensor) -> Tensor:
        out = super().__call__(prediction, truth, c)
        return out - out.mean()


class PairMetric(Worst):
    def __call__(self, prediction: Tensor, truth: Tensor, c: Tensor) -> Tensor:
        return super().__call__(prediction, truth, c) + 0 * prediction[2].mean()


class Silent(Metric):
    name = "silent"


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ([Silent()], "Silent has no __call__; give it"),
        ([Nameless()], "Nameless.name: None is not allowed; give letters, digits and underscores"),
        ([OfADim()], "OfADim.name: 'worst_dim0' is not allowed"),
        ([Taken()], "Taken.name: 'l2' is taken"),
        ([Worst(), Worst()], "Worst.name: 'worst' is taken"),
        ([Number()], "Number maps 3 replicas to (); give one value a replica, (3,)"),
        (PairMetric(), "PairMetric fails: IndexError: "),
        (Ranked(), "Ranked: a replica's value depends on its neighbours"),
    ],
)
def test_a_metric_that_breaks_its_contract(metrics: Any, says: str) -> None:
    module = FlowVsRegression(metrics=metrics)
    with pytest.raises(ToyError) as error:
        module.measure(InterpolationData())
    assert str(error.value).startswith(f"--model.metrics: {says}"), error.value


def test_metrics_of_ones_own_are_headlines() -> None:
    module = FlowVsRegression(metrics=Worst())
    module.measure(InterpolationData())
    assert list(module.headline) == ["l2", "worst"]
    found = Worst()(torch.tensor([[[[3.0], [-5.0]]], [[[1.0], [1.0]]]]), torch.ones(2, 1), torch.zeros(2, 1))
    assert found.tolist() == [6.0, 0.0]


def test_a_checkpoints_class_is_not_imported() -> None:
    for name in ("network", "objective"):
        with pytest.raises(ToyError, match=rf"^{name}: the checkpoint was made with os\.System; give it: load_from_"):
            FlowVsRegression(**{name: {"class_path": "os.System"}})


def test_hyper_parameters_are_plain_values() -> None:
    module = FlowVsRegression(network=Own(), objective=Halves(), metrics=[Worst()])
    assert module.hparams["network"] == {"class_path": f"{__name__}.Own"}
    assert module.hparams["objective"] == {"class_path": f"{__name__}.Halves"}
    assert module.hparams["metrics"] is None
    assert math.isclose(module.hparams["lr"], 1e-3)
