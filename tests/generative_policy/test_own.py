"""Targets, couplings and samplers from outside the package: what they give counts, and what they lack is one line."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy import (
    Checkerboard,
    Coupling,
    FlowPolicy,
    MeanFlowPolicy,
    Mixture,
    MixtureData,
    Particles,
    Sampler,
    Target,
    figures,
    panels,
)
from lightning_toys.generative_policy.metrics import compute_metrics
from lightning_toys.plotting import new_figure
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.results import Report
from tests.conftest import Runner

TWO = Mixture([[0.5, 0.1], [-0.5, -0.1]], 0.05, [2.0, 1.0])
HERE = "tests.generative_policy.test_own"


class Hills(Target):
    """Two hills by their density and their modes alone."""

    mode_weights = TWO.mode_weights

    def log_prob(self, x: Tensor) -> Tensor:
        return TWO.log_prob(x)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return TWO.nearest(x)


class Shaped(Hills):
    """The hills' centres and widths too."""

    def mode_shapes(self) -> tuple[Tensor, Tensor]:
        return TWO.means, TWO.stds


class Sampled(Hills):
    """Samples too, in double precision whatever the noise's."""

    scale = TWO.scale

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return TWO.sample(uniform.double(), normal.double())


class Known(Sampled):
    """All that a mixture knows, and no Mixture."""

    tail_fractions = TWO.tail_fractions

    def marginal_velocity(self, z: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
        return TWO.marginal_velocity(z, t, sigma_min)

    def mean_distance(self, x: Any) -> Any:
        return TWO.mean_distance(x)

    def mean_self_distance(self) -> float:
        return TWO.mean_self_distance()

    def mode_shapes(self) -> tuple[Tensor, Tensor]:
        return TWO.means, TWO.stds

    def deconvolved(self, std: float) -> Target:
        return TWO.deconvolved(std)


def draws(name: str, n: int) -> Tensor:
    g = keyed_generator(0, 0, f"test/own/{name}")
    return TWO.sample(torch.from_numpy(g.random(n)), torch.from_numpy(g.standard_normal((n, 2))))


# what they give


def test_modes_of_a_density_without_samples_are_drawn(policies: Runner) -> None:
    """From fit to figures; the target's share within a standard deviation is that of the reference samples."""
    flags = ("--data.target", f"{HERE}.Shaped", "--data.sampler", "ImportanceResampling", "--model.seeds", "[0,1]")
    policies.ok("fit", "flow", *flags, "--trainer.max_steps", "4", "--figures.enabled", "true", "--figures.dpi", "20")
    folder = policies.folder("flow")
    assert (folder / "figures" / "samples.png").is_file()
    found = json.loads((folder / "results.json").read_text())["metrics"]
    assert all(math.isfinite(v) for v in found["tv"]["values"])


def test_the_share_within_a_deviation_of_a_density_is_that_of_reference_samples() -> None:
    assert math.isnan(Hills().share_within(1))
    data = figures.FigureData(Shaped(), {"1": draws("shown", 50)[None]}, [0], 200, draws("reference", 20_000))
    report = Report([0], {"tv": [0.1], "off3": [0.2]}, {})
    (wanted,) = [ax.get_title() for ax in figures.draw_samples(data, report, "flow").axes if "within" in ax.get_title()]
    share = float(wanted.partition("(target ")[2].rstrip(")"))
    assert share == pytest.approx(1 - math.exp(-0.5), abs=0.02)
    data.reference = None
    (left,) = [ax.get_title() for ax in figures.draw_samples(data, report, "flow").axes if "within" in ax.get_title()]
    assert "target" not in left
    assert Sampled().share_within(1) == pytest.approx(1 - math.exp(-0.5), abs=0.01)


def test_exact_rows_are_those_of_the_mixture() -> None:
    """Distances, bias and width of the modes: bit for bit; without them they are estimates, or left out."""
    x, y = draws("x", 3000) + 0.01, draws("y", 3000)
    exact, known, sampled = (compute_metrics(x, target, y, 1000, 5) for target in (TWO, Known(), Sampled()))
    assert known == exact
    assert {"bias_mode0", "std_mode1"} <= set(known)
    assert set(exact) - set(sampled) == {f"{k}_mode{i}" for k in ("bias", "std") for i in (0, 1)}
    assert sampled["energy_distance"] != exact["energy_distance"]
    assert sampled["energy_distance"] == pytest.approx(exact["energy_distance"], abs=0.01)
    _, axes = new_figure(1, 2)
    for ax, target in zip(axes[0], (TWO, Known()), strict=True):
        panels.draw_mode_zoom(ax, target, x.numpy(), "zoom")
    circles = [[(c.center, c.radius) for c in ax.patches] for ax in axes[0]]  # type: ignore[attr-defined]
    assert circles[0] == circles[1]
    assert len(circles[0]) == 3


@pytest.mark.parametrize("extra", [(), ("--model.target_std", "0.02", "--model.target_std_as", "deconvolved")])
def test_the_oracle_of_an_own_velocity_is_that_of_the_mixture(policies: Runner, extra: tuple[str, ...]) -> None:
    """The same weights after some steps, and the rows of the exact flow."""
    flags = ("--model.tangent", "oracle", "--model.seeds", "[0,1]", "--trainer.max_steps", "4", *extra)
    flags += ("--data.coupling", "Independent")
    means = ("--data.target.means", json.dumps(TWO.means.tolist()), "--data.target.stds", "0.05")
    weights = ("--data.target.weights", "[2,1]")
    policies.ok("fit", "meanflow", *flags, "--data.target", "Mixture", *means, *weights, "--run.name", "shipped")
    policies.ok("fit", "meanflow", *flags, "--data.target", f"{HERE}.Known", "--run.name", "own")
    one, two = (policies.checkpoint("meanflow", name)["state_dict"] for name in ("shipped", "own"))
    for key in one:
        torch.testing.assert_close(one[key], two[key])
    policies.ok("test", "meanflow", *flags[:4], *extra, "--data.coupling", "Independent",
                "--data.target", f"{HERE}.Known", "--run.name", "own")  # fmt: skip
    found = json.loads((policies.folder("meanflow", "own") / "results.json").read_text())
    assert "exact_flow_8" in found["references"]
    assert "flow_map_error" in found["metrics"]


def test_the_oracle_needs_a_velocity() -> None:
    for target in (Sampled(), Checkerboard()):
        name = type(target).__name__
        with pytest.raises(ToyError, match=f"'oracle' is not allowed with {name}, which has no marginal_velocity"):
            FlowPolicy(tangent="oracle").measure(MixtureData(target))

    class Circular(Known):
        def deconvolved(self, std: float) -> Target:
            return Sampled()

    class Wordy(Known):
        def deconvolved(self, std: float) -> Any:
            return "narrower"

    for kind, says in ((Circular, "is not allowed with Sampled"), (Wordy, "Wordy.deconvolved gives str, no Target")):
        policy = MeanFlowPolicy(tangent="oracle", target_std=0.02, target_std_as="deconvolved")
        with pytest.raises(ToyError) as caught:
            policy.measure(MixtureData(kind()))
        assert says in str(caught.value)


# what they lack


def variant(base: type, **given: Any) -> Any:
    """An object of a class that gives something else."""
    return type("Mine", (base,), given)()


TARGETS: list[tuple[type, dict[str, Any], str]] = [
    (Hills, {"mode_weights": [0.5, 0.5]}, ".mode_weights: [0.5, 0.5] is not allowed; give a tensor (M,) of numbers"),
    (Hills, {"mode_weights": np.array([0.5, 0.5])}, ".mode_weights: array([0.5, 0.5]) is not allowed"),
    (Hills, {"mode_weights": torch.tensor([1.0, 2.0])}, ".mode_weights: their sum is 3, not 1; divide them by it"),
    (Hills, {"mode_weights": torch.tensor([1.5, -0.5])}, ".mode_weights: tensor([ 1.5000, -0.5000]) is not allowed"),
    (Hills, {"mode_weights": torch.ones(1)}, ".nearest gives modes ["),
    (Hills, {"nearest": lambda self, x: (x[..., 0], x[..., 1])}, ".nearest gives modes ["),
    (Hills, {"nearest": Target.nearest}, ".nearest fails: NotImplementedError"),
    (Hills, {"weights_inside": lambda self: [1, 1]}, ".weights_inside(): [1, 1] is not allowed"),
    (Hills, {"mode_shapes": lambda self: (TWO.means[:1], TWO.stds)}, ".mode_shapes: centres gives (1, 2); give"),
    (Hills, {"mode_shapes": lambda self: (TWO.means, -TWO.stds)}, ".mode_shapes: a standard deviation is not above 0"),
    (Hills, {"tail_fractions": [0.1]}, ".tail_fractions: [0.1] is not allowed; give {3: ..., 5: ...}"),
    (Hills, {"dim": 2.0}, ".dim: 2.0 is not allowed; give an integer"),
    (Hills, {"marginal": lambda self, axes: 3}, ".marginal gives int; give a Target with a log_prob, or None"),
    (Hills, {"entropy": lambda self: None}, ".entropy gives NoneType; give a float, or NaN"),
    (Known, {"marginal_velocity": lambda self, z, t: z}, ".marginal_velocity fails: TypeError"),
    (Known, {"marginal_velocity": lambda self, z, t, s: t}, ".marginal_velocity gives (2, 5, 1); give"),
    (Known, {"mean_distance": lambda self, x: x}, ".mean_distance gives (5, 2); give an array (5,)"),
    (Known, {"mean_self_distance": lambda self: -1.0}, ".mean_self_distance(): -1.0 is not allowed"),
]  # fmt: skip


IDS = [f"{next(iter(given))}-{i}" for i, (_, given, _) in enumerate(TARGETS)]


@pytest.mark.parametrize(("base", "given", "says"), TARGETS, ids=IDS)
def test_targets_that_break_the_contract(base: type, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ToyError) as caught:
        MixtureData(variant(base, **given))
    assert str(caught.value).startswith("--data.target: Mine")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "--data.coupling: Mine.group_size: 0 is not allowed; give an integer >= 1"),
        (2.0, "--data.coupling: Mine.group_size: 2.0 is not allowed; give an integer"),
        ("all", "--data.coupling: Mine.group_size: all is not allowed"),
        (7, "--data.batch_size: 256 is not allowed; give a multiple of Mine.group_size 7"),
    ],
)
def test_groups_that_are_none(size: Any, says: str) -> None:
    coupling = variant(Coupling, group_size=size, pair=lambda self, x, e: e[::-1])
    with pytest.raises(ToyError) as caught:
        MixtureData(coupling=coupling)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def particles(n: int = 4, dim: int = 2, **given: Any) -> Any:
    points = torch.linspace(-0.5, 0.5, n * dim).view(n, dim)
    return Particles(points, torch.full((n,), -math.log(n)), 0.0, float(n))._replace(**given)


SAMPLERS: list[tuple[Any, str]] = [
    (particles(dim=3), "points are (4, 3); give a tensor (N, 2), a point a row"),
    (particles(points=np.zeros((4, 2))), "points are ndarray; give a tensor (N, 2)"),
    (particles(points=torch.full((4, 2), math.nan)), "a point is not finite"),
    (particles(log_weights=torch.zeros(3)), "log_weights gives (3,); give a tensor (4,)"),
    (particles(log_weights=torch.zeros(4)), "exp(log_weights) sums to 4, not 1; take off its logarithm"),
    (particles(log_z=math.nan), "log_z is nan; give a finite number"),
    (particles(effective=0.0), "effective: 0.0 is not allowed; give a number > 0"),
    (torch.zeros(4, 2), "gives Tensor; give Particles"),
]


@pytest.mark.parametrize(("found", "says"), SAMPLERS, ids=[says[:12] for _, says in SAMPLERS])
def test_particles_that_are_none(found: Any, says: str) -> None:
    data = MixtureData(Hills(), sampler=variant(Sampler, draw=lambda self, target, seed, stream: found))
    with pytest.raises(ToyError) as caught:
        data.pairs(data.target, data.coupling, [0])
    assert str(caught.value).startswith("--data.sampler: Mine.draw")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_samplers_that_draw_nothing_or_fail() -> None:
    with pytest.raises(ToyError, match=r"^--data\.sampler: Mine has no draw; give one"):
        MixtureData(Hills(), sampler=variant(Sampler))
    data = MixtureData(Hills(), sampler=variant(Sampler, draw=lambda self, target, seed, stream: target.nowhere))
    with pytest.raises(ToyError, match=r"^--data\.sampler: Mine\.draw fails: AttributeError: .*nowhere"):
        data.particles(0, "training")


def test_particles_in_single_precision_count_in_double() -> None:
    data = MixtureData(Hills(), sampler=variant(Sampler, draw=lambda self, target, seed, stream: particles(400)))
    found = data.reference(0, 50)
    assert found.dtype == torch.float64
    assert math.isfinite(compute_metrics(found, data.target, found, 20, 5)["energy_distance"])
    assert data.pairs(data.target, data.coupling, [0])(0, 1)[0].dtype == torch.float32
    assert MixtureData(Sampled()).pairs(Sampled(), data.coupling, [0])(0, 1)[0].dtype == torch.float32


def test_a_gaussian_on_nine_modes_is_drawn(policies: Runner) -> None:
    """From fit to figures: there are eight colours."""
    means = json.dumps([[0.2 * i - 0.8, 0.0] for i in range(9)])
    flags = ("--data.target", "Mixture", "--data.target.means", means, "--model.seeds", "[0,1]")
    policies.ok(
        "fit", "gaussian", *flags, "--trainer.max_steps", "4", "--figures.enabled", "true", "--figures.dpi", "20"
    )
    assert (policies.folder("gaussian") / "figures" / "modes_chosen.png").is_file()
