"""Data of somebody's own, and metrics of a target of one's own: the contracts, and who breaks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import (
    FlowVsRegression,
    InterpolationData,
    Metric,
    PointData,
    Points,
    PublishedRotation,
    Target,
    XPrediction,
)
from lightning_toys.flow_vs_regression.targets import Predict
from lightning_toys.flow_vs_regression.units import Units
from lightning_toys.nets import Network
from lightning_toys.training.noise import keyed_generator


class Line(PointData):
    """y = 2 c at five points of each replica's own, and its mean for a baseline; two rows are held out."""

    condition_dim, output_dim, num_holdout = 1, 1, 2

    def __init__(self) -> None:
        super().__init__(batch_size=4)

    def places(self, seeds: Sequence[int]) -> Tensor:
        rows = [torch.from_numpy(keyed_generator(s, 0, "test/line").random((7, 1))) for s in seeds]
        return torch.stack(rows)

    def points(self, seeds: Sequence[int]) -> Points:
        c = self.places(seeds)
        return Points(c[:, :5], 2 * c[:, :5], c[:, 5:], 2 * c[:, 5:])

    def evaluation_points(self, max_points: int | None = None) -> tuple[Tensor, Tensor]:
        c = torch.linspace(0, 1, 1200 if max_points is None else min(max_points, 1200), dtype=torch.float64)[:, None]
        return c, 2 * c

    def baseline_rows(self, seeds: Sequence[int], c_eval: Tensor) -> list[dict[str, Tensor]]:
        means = self.points(seeds).x1.mean((1, 2))
        return [{"mean": torch.full((1, 1, len(c_eval), 1), float(m))} for m in means]


def broken(name: str, change: Callable[..., Any]) -> type[Line]:
    """A Line one of whose methods gives something else: ``change`` of what it gave, and of the arguments."""
    method = getattr(Line, name)

    def changed(self: Line, *args: Any) -> Any:
        return change(method(self, *args), *args)

    return type("Mine", (Line,), {name: changed, "__module__": __name__})


def with_attribute(**values: Any) -> type[Line]:
    return type("Mine", (Line,), {**values, "__module__": __name__})


class Empty(PointData):
    condition_dim, output_dim = 1, 1

    def __init__(self) -> None:
        super().__init__(4)


class NoDim(Line):
    def __init__(self) -> None:
        super().__init__()

    @property
    def output_dim(self) -> int:  # type: ignore[override]
        raise AttributeError("output_dim")


def with_points(change: Callable[[Points], Any]) -> type[Line]:
    return broken("points", lambda points, seeds: change(points))


def with_rows(change: Callable[[list[dict[str, Tensor]]], Any]) -> type[Line]:
    return broken("baseline_rows", lambda rows, seeds, c: change(rows))


NOT_FINITE = torch.tensor([0.0, torch.nan, 0.0, 0.0, 0.0], dtype=torch.float64)[:, None]


@pytest.mark.parametrize("seeds", [[7], [0, 1]])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Empty, "Empty has no points; give it (see PointData.points)"),
        (NoDim, "NoDim.output_dim: None is not allowed; give an integer >= 1"),
        (with_attribute(condition_dim=0), "Mine.condition_dim: 0 is not allowed; give an integer >= 1"),
        (with_attribute(num_holdout=None), "Mine.num_holdout: None is not allowed; give an integer >= 0"),
        (
            with_attribute(num_holdout=1),
            "Mine.points: holdout_c, of num_holdout = 1, has shape (R, 2, 1); give (R, 1, 1)",
        ),
        (with_attribute(output_dim=2), "Mine.points: x1 has shape (R, 5, 1); give (R, 5, 2)"),
        (with_attribute(condition_names=("u", "v")), "Mine.condition_names: ['u', 'v'] is not allowed; give condition"),
        (with_attribute(output_names=("u", "v")), "Mine.output_names: ['u', 'v'] is not allowed; give output_dim = 1"),
        (with_attribute(target=3), "Mine.target: 3 is not allowed; give a Target with dim 1 of one input, or None"),
        (with_attribute(units={"c_mean": [0.0]}), "Mine.units: {'c_mean': [0.0]} is not allowed; give Units(...)"),
        (with_attribute(units=Units([0.0], [0.0], [0.0], [1.0])), "Mine.units.c_sd are no 1 finite numbers > 0"),
        (with_points(tuple), "Mine.points gives a tuple; give Points(c, x1, holdout_c, holdout_x1)"),
        (with_points(lambda p: Points(*(x[0] for x in p))), "Mine.points: c has shape (5, 1); give (R, N, 1)"),
        (with_points(lambda p: p._replace(c=p.c[:, :0])), "Mine.points gives no points to learn from"),
        (with_points(lambda p: p._replace(x1=p.x1.float())), "Mine.points: x1 is torch.float32; give torch.float64"),
        (with_points(lambda p: p._replace(x1=p.x1 + NOT_FINITE)), "Mine.points: x1 is not finite"),
        (with_points(lambda p: 1 / 0), "Mine.points fails: ZeroDivisionError: division by zero"),
        (
            with_points(lambda p: p._replace(x1=torch.rand_like(p.x1))),
            "Mine.points: those of a replica depend on more than its seed; draw by keyed_generator",
        ),
        (
            broken("train_columns", lambda columns, seeds: tuple(x[0] for x in columns)),
            "Mine.train_columns gives other shapes than c (R, N, 1) and x1 (R, N, 1)",
        ),
        (
            broken("evaluation_points", lambda pair, most=None: (pair[0], pair[1][:, 0])),
            "Mine.evaluation_points: the value has shape (1200,); give (1200, 1)",
        ),
        (
            broken("evaluation_points", lambda pair, most=None: (pair[0], pair[1] / pair[0])),
            "Mine.evaluation_points: the value is not finite",
        ),
        (
            broken("evaluation_points", lambda pair, most=None: pair[0]),
            "Mine.evaluation_points gives (1200, 1); give c",
        ),
        (
            broken("evaluation_points", lambda pair, most=None: tuple(torch.cat([x, x]) for x in pair)),
            "Mine.evaluation_points(1000) gives 2000 points; give at most 1000",
        ),
        (with_rows(lambda rows: []), "Mine.baseline_rows gives 0 dicts for "),
        (with_rows(lambda rows: rows * 3), "Mine.baseline_rows gives "),
        (with_rows(lambda rows: rows[0]), "Mine.baseline_rows gives a dict; give a list of dicts"),
        (
            with_rows(lambda rows: [{n: v[0, 0] for n, v in row.items()} for row in rows]),
            "Mine.baseline_rows: 'mean' has shape (1000, 1); give (1, 1, 1000, 1)",
        ),
    ],
)
def test_data_that_break_their_contract(kind: Any, says: str, seeds: list[int]) -> None:
    module = FlowVsRegression(seeds=seeds)
    with pytest.raises(ToyError) as error:
        module.measure(kind())
    wanted = says.replace("(R,", f"({len(seeds)},")
    assert str(error.value).startswith(f"--data: {wanted}"), error.value
    assert "\n" not in str(error.value)


def fitted(module: FlowVsRegression, data: PointData, **settings: Any) -> FlowVsRegression:
    quiet: Any = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_steps=2, enable_checkpointing=False, **quiet, **settings)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return module


@pytest.mark.parametrize("kind", [Line, with_rows(lambda rows: rows[:1]), with_rows(lambda rows: [{}])])
def test_data_that_keep_it(kind: Any) -> None:
    module = fitted(FlowVsRegression(seeds=[0, 1], network=Network(hidden=8)), kind())
    assert module.last_report is not None
    assert module.last_report.references.keys() == kind().baseline_rows([0, 1], torch.zeros(1, 1))[0].keys()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_classes_are_tried_in_single_precision_on_the_cpu(precision: Any) -> None:
    """Where a Trainer builds networks in another one, and on another device."""
    module = FlowVsRegression(seeds=[0, 1], network=Network(hidden=8), objective=XPrediction(), metrics=Furthest())
    fitted(module, Line(), precision=precision)
    with torch.device("meta"):
        module.measure(Line())


class Gap(Target):
    dim = 1

    def __call__(self, c: Tensor) -> Tensor:
        return torch.where((c - 0.3).abs() < 0.01, torch.nan, c)


class Infinite(Target):
    """Not finite at a training point alone: c = 1 / 3 is none of 51 evaluation points."""

    dim = 1

    def __call__(self, c: Tensor) -> Tensor:
        return torch.where((c - 1 / 3).abs() < 1e-6, torch.inf, c)


@pytest.mark.parametrize(("target", "where"), [(Gap, "0.3"), (Infinite, "0.3333")])
def test_a_target_that_is_not_finite_is_named_and_not_the_number_of_points(target: type[Target], where: str) -> None:
    with pytest.raises(ToyError) as error:
        FlowVsRegression().measure(InterpolationData(target(), num_train=4, num_eval=51))
    assert str(error.value).startswith(f"--data.target: {target.__name__}.__call__ is not finite at c = [{where}")


class Furthest(Metric):
    name = "furthest"

    def __call__(self, prediction: Tensor, truth: Tensor, c: Tensor) -> Tensor:
        return (prediction - truth).abs().amax((1, 2, 3))


class Measured(Target):
    """f(c) = c, with a metric: the mean at c = 2, less 2."""

    dim = 1

    def __call__(self, c: Tensor) -> Tensor:
        return c

    def extra_metrics(self, c: Tensor, prediction: Tensor, predict: Predict) -> dict[str, Tensor]:
        return {"beyond": (predict(torch.full((1, 1), 2.0, dtype=torch.float64), None) - 2).mean((1, 2, 3))}


def measuring(extra: Callable[[Tensor, Predict], Any]) -> type[Measured]:
    def extra_metrics(self: Measured, c: Tensor, prediction: Tensor, predict: Predict) -> Any:
        return extra(prediction, predict)

    return type("Mine", (Measured,), {"extra_metrics": extra_metrics, "__module__": __name__})


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (measuring(lambda p, predict: {"l2": torch.zeros(len(p))}), "the name 'l2' is taken; give another"),
        (measuring(lambda p, predict: {"evaluations": torch.zeros(len(p))}), "the name 'evaluations' is taken"),
        (measuring(lambda p, predict: {"a b": torch.zeros(len(p))}), "the name 'a b' is not allowed"),
        (measuring(lambda p, predict: {"bend": p.mean()}), "bend of 3 replicas is (); give one value a replica, (3,)"),
        (measuring(lambda p, predict: {"bend": 0.5}), "bend of 3 replicas is float; give one value a replica"),
        (measuring(lambda p, predict: [p.mean()]), "gives list; give a dict of tensors (R,) by name"),
        (measuring(lambda p, predict: {"bend": (p - p.mean()).mean((1, 2, 3))}), "bend: a replica's value depends on"),
        (measuring(lambda p, predict: {"bend": p[9]}), "fails: IndexError: index 9 is out of bounds"),
    ],
)
def test_a_targets_metrics_that_break_their_contract(target: type[Target], says: str) -> None:
    with pytest.raises(ToyError) as error:
        FlowVsRegression().measure(InterpolationData(target()))
    where = "--data.target: Mine.extra_metrics"
    assert str(error.value).replace(f"{where}: ", f"{where} ").startswith(f"{where} {says}"), error.value


@pytest.mark.parametrize(
    ("target", "name"), [(Measured(), "beyond"), (PublishedRotation(), "published_cosine_min"), (Measured(), "spread")]
)
def test_a_metrics_name_may_not_be_a_targets(target: Target, name: str) -> None:
    metric = Furthest()
    metric.name = name
    with pytest.raises(ToyError, match=rf"^--model.metrics: Furthest.name: '{name}' is taken; give another$"):
        FlowVsRegression(metrics=metric).measure(InterpolationData(target))


def test_a_targets_metric_is_measured() -> None:
    module = FlowVsRegression(seeds=[0, 1], network=Network(hidden=8), metrics=Furthest())
    fitted(module, InterpolationData(Measured(), num_eval=20))
    assert module.last_report is not None
    metrics = module.last_report.metrics
    beyond = module(torch.full((1, 1), 2.0))[:, 0, 0] - 2
    torch.testing.assert_close(torch.tensor(metrics["beyond"]).float(), beyond.detach())
    assert {"l2", "furthest", "beyond@zeros/direct"} <= metrics.keys()
