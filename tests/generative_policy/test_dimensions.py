"""Every policy on a line, in three and in six dimensions, and what its figures, floors and losses say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy import (
    FlowPolicy,
    GaussianPolicy,
    MeanFlowPolicy,
    Mixture,
    MixtureData,
    ThreeModes,
    TwoMoons,
    figures,
    panels,
)
from lightning_toys.generative_policy.flow_ode import flow_log_prob
from lightning_toys.generative_policy.gaussian import squash
from lightning_toys.generative_policy.gaussian_policy import exact_metrics
from lightning_toys.generative_policy.meanflow import AverageVelocity, Preconditioned, log_det, sample
from lightning_toys.generative_policy.metrics import compute_metrics, knn_entropy, projections, sliced_w2
from lightning_toys.generative_policy.policy import GenerativePolicy
from lightning_toys.nets import Network
from lightning_toys.plotting import new_figure
from lightning_toys.stats import share_interval
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner

DIMS = [1, 2, 3, 6]
KINDS: dict[str, type[GenerativePolicy]] = {"gaussian": GaussianPolicy, "meanflow": MeanFlowPolicy, "flow": FlowPolicy}


def normals(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/dimensions/{name}").standard_normal(shape))


def two(dim: int, std: float = 0.1) -> Mixture:
    return Mixture([[0.5] * dim, [-0.5] * dim], std, [2, 1])


@pytest.mark.parametrize(
    ("variant", "dim", "flags"),
    [
        pytest.param("gaussian", 1, ("--figures.enabled", "true", "--figures.dpi", "20"), marks=pytest.mark.slow),
        ("gaussian", 6, ("--model.parameters", "free")),
        ("meanflow", 1, ("--model.target_std", "0.05")),
        ("meanflow", 3, ("--model.target_std", "0.05", "--model.target_std_as", "deconvolved")),
        pytest.param(
            "meanflow", 6, ("--model.target_std", "0", "--data.coupling", "Independent"), marks=pytest.mark.slow
        ),
        ("flow", 3, ()),
    ],
)
def test_every_policy(policies: Runner, variant: str, dim: int, flags: tuple[str, ...]) -> None:
    means = json.dumps([[0.5] * dim, [-0.5] * dim])
    flags = (*flags, "--data.target", "Mixture", "--data.target.means", means, "--data.target.stds", "0.1")
    flags += ("--model.seeds", "[0,1]")
    policies.ok("fit", variant, *flags, "--trainer.max_steps", "4")
    policies.ok("test", variant, *flags)
    folder = policies.folder(variant)
    found = json.loads((folder / "results.json").read_text())["metrics"]
    assert all(math.isfinite(v) for v in found["tv"]["values"] + found["entropy_knn"]["values"])
    module = KINDS[variant].load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    x = module.sample(20)
    assert x.shape == (2, 20, dim)
    assert len(set(x[0, 0].tolist())) == dim  # no coordinate is another's copy


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("head", [False, True])
def test_velocity_head_and_determinant(dim: int, head: bool) -> None:
    net = Network(hidden=8, activation="silu").build([3, 8], dim, 2, True, dim + head).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    model = AverageVelocity(net, Preconditioned(0.6), head)
    e = normals(f"velocity {dim}", 2, 5, dim)
    u, log_sigma = model(e, torch.zeros(2, 5, 1).double(), torch.ones(2, 5, 1).double())
    assert u.shape == (2, 5, dim)
    assert (None if log_sigma is None else log_sigma.shape) == ((2, 5, 1) if head else None)
    if head:  # the head is an output of its own: with its weights at nought log sigma is -5, and u as it was
        last = list(net.parameters())[-2:]
        with torch.no_grad():
            for p in last:
                p[..., dim:] = 0
        again, flat = model(e, torch.zeros(2, 5, 1).double(), torch.ones(2, 5, 1).double())
        assert torch.equal(again, u)
        assert flat is not None
        assert (flat == -5).all()
    found, sign = log_det(model, e)
    whole = torch.autograd.functional.jacobian(lambda z: sample(model, z, 1)[0].sum(1), e)  # (R, D, R, B, D)
    for r in range(2):
        wanted_sign, wanted = torch.linalg.slogdet(whole[r, :, r].permute(1, 0, 2))
        torch.testing.assert_close(found[r], wanted)
        assert torch.equal(sign[r], wanted_sign)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("dim", DIMS)
def test_likelihood_of_a_linear_flow(dim: int) -> None:
    """The flow of N(m, d^2 I): its density, with the divergence in closed form."""
    m = Mixture([[0.3] * dim], 0.4)
    x = 0.3 + 0.4 * normals(f"linear {dim}", 20, dim)

    def both(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = (t - (1 - t) * 0.16) / (0.16 * (1 - t) ** 2 + t**2)
        return m.marginal_velocity(z, t), dim * slope

    torch.testing.assert_close(flow_log_prob(both, x, 1e-8), m.log_prob(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dim", DIMS)
def test_metrics(dim: int) -> None:
    target = two(dim)
    g = keyed_generator(0, dim, "test/dimensions/metrics")
    x, y = (
        target.sample(torch.from_numpy(g.random(4000)), torch.from_numpy(g.standard_normal((4000, dim))))
        for _ in range(2)
    )
    found = compute_metrics(x, target, y, 2000, 5)
    assert found["tv"] < 5 * math.sqrt(0.5 / 4000)
    assert abs(found["energy_distance"]) < 0.02
    assert found["entropy_knn"] == pytest.approx(target.entropy(), abs=0.05 * dim)
    moved = compute_metrics(x + 0.1, target, y, 2000, 5)
    assert moved["energy_distance"] > 3 * abs(found["energy_distance"])
    # a shift d moves a projection onto a random direction by |d| / sqrt(D) in the mean square
    onto = projections(dim, 4096)
    assert np.square(onto).sum(1) == pytest.approx(1)
    assert sliced_w2(x + 0.1, x, 4096) == pytest.approx(0.1, rel=0.05)
    # scaling by a adds D log a
    assert knn_entropy(3 * x.numpy()) == pytest.approx(knn_entropy(x.numpy()) + dim * math.log(3))


def gaussians(mu: list[float], sigma: float) -> tuple[Tensor, Tensor]:
    m = torch.tensor([[mu]], dtype=torch.float64)
    return m, torch.full_like(m, math.log(sigma))


@pytest.mark.parametrize(("mu", "sigma"), [([0.0, 0.5], 1.0), ([0.3, -0.2], 0.223), ([0.1, 0.05], 1.0)])
def test_reverse_kl_of_a_wide_policy(mu: list[float], sigma: float) -> None:
    """Against a million draws, to their error and to .1 %; 48 Gauss-Hermite nodes were .4, .2 and .3 % off."""
    m, s = gaussians(mu, sigma)
    a, log_pi = squash(m, s, normals("wide", 1, 1_000_000, 2))
    value = (log_pi - ThreeModes().log_prob(a))[0]
    found = exact_metrics(m, s, ThreeModes())
    assert abs(found["kl"].item() - value.mean().item()) < 4 * value.std().item() / 1000
    assert found["kl"].item() == pytest.approx(value.mean().item(), rel=1.5e-3)
    assert abs(found["entropy_exact"].item() + log_pi.mean().item()) < 4 * log_pi.std().item() / 1000


@pytest.mark.parametrize("dim", DIMS)
def test_reverse_kl_of_a_narrow_policy(dim: int) -> None:
    """On one mode's place: KL of Gaussians, the tanh all but linear there, and -log w."""
    mode = 0.02
    target = Mixture([[0.0] * dim, [0.5] * dim], mode, [1, 3])
    m, s = gaussians([0.0] * dim, 0.015)
    ratio = (0.015 / mode) ** 2
    wanted = dim * 0.5 * (ratio - 1 - math.log(ratio)) - math.log(0.25)
    found = exact_metrics(m, s, target)
    assert found["kl"].item() == pytest.approx(wanted, abs=2e-3 * dim)
    assert found["kl_gap"].item() == pytest.approx(wanted + math.log(0.25), abs=2e-3 * dim)
    assert found["entropy_exact"].item() == pytest.approx(
        dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.015)), abs=2e-3 * dim
    )


@pytest.mark.parametrize("dim", [1, 2])
def test_floor_of_a_mode_on_an_edge(dim: int) -> None:
    """Half of the mode lies outside, where no action is: the floor is -log(w / 2), and kl_gap counts from there."""
    target = Mixture([[1.0, *[0.0] * (dim - 1)], [-0.5] * dim], 0.1, [3, 1])
    theta = torch.tensor([1.5, *[0.0] * (dim - 1), *[-1.0] * dim], dtype=torch.float64, requires_grad=True)
    xi = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    xi = xi[:, None] if dim == 1 else torch.stack([xi, xi[(torch.arange(4000) * 1597) % 4000]], -1)
    optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        a, log_pi = squash(theta[:dim], theta[dim:], xi)
        value: Tensor = (log_pi - target.log_prob(a)).mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type, no-untyped-call]
    found = exact_metrics(theta[:dim].detach()[None, None], theta[dim:].detach()[None, None], target)
    assert 0 < found["kl_gap"].item() < 0.15
    assert found["kl"].item() - found["kl_gap"].item() == pytest.approx(math.log(8 / 3), abs=1e-9)
    assert found["kl"].item() + math.log(0.75) > 0.6  # what it was above -log w


def test_a_deconvolved_heads_ideal_map_gives_the_target(policies: Runner) -> None:
    """The map is trained on stds sqrt(.1^2 - .08^2) = .06, and noise of .08 makes them .1: not so with `head`."""
    module, data = MeanFlowPolicy(target_std=0.08, target_std_as="deconvolved"), MixtureData(ThreeModes(0.1))
    module.sizes = module.measure(data)
    narrow = module.training_target(data.target)
    assert isinstance(narrow, Mixture)
    assert narrow.stds.tolist() == pytest.approx([0.06] * 3)
    plain = MeanFlowPolicy(target_std=0.08)
    assert plain.training_target(data.target) is data.target
    module.configure_model()
    e, xi = normals("e", 1, 50, 2).float(), normals("xi", 1, 50, 2).float()
    one = sample(module.evaluation_net, e, 1)[0]
    torch.testing.assert_close(module.actions("1", e, xi), one + 0.08 * xi)
    with pytest.raises(ToyError, match=r"--model\.target_std_as: 'deconvolved' is not allowed here"):
        MeanFlowPolicy(target_std=0.1, target_std_as="deconvolved").measure(data)
    # what is drawn for training: its spread within a mode, through the Trainer's loader
    flags = ("--data.target.std", "0.1", "--model.target_std", "0.08", "--model.target_std_as", "deconvolved")
    flags += ("--data.coupling", "Independent", "--trainer.max_steps", "2", "--model.seeds", "[0]")
    seen: list[Tensor] = []
    plain_losses = MeanFlowPolicy.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MeanFlowPolicy, "losses", lambda self, x, *rest: (seen.append(x), plain_losses(self, x, *rest))[1]
        )
        policies.ok("fit", "meanflow", *flags, "--data.batch_size", "4096")
    x = seen[0][0].double()
    mode = ThreeModes(0.06).nearest(x)[0]
    inside = torch.cat([x[mode == i] - ThreeModes().means[i] for i in range(3)])
    assert inside.std().item() == pytest.approx(0.06, rel=0.05)


def test_the_unweighted_loss_is_logged_beside_the_weighted(policies: Runner) -> None:
    """With p = 1 and no floor to speak of the weighted one is 1 at every step, whatever is learned."""
    flags = ("--model.loss_power", "1", "--model.loss_floor", "1e-12", "--model.target_std", "0")
    flags += ("--trainer.max_steps", "60", "--trainer.log_every_n_steps", "20", "--model.seeds", "[0,1]")
    policies.ok("fit", "meanflow", *flags)
    rows = read_csv(policies.folder("meanflow") / "metrics.csv")
    weighted = [float(r["train/loss"]) for r in rows if r.get("train/loss")]
    plain = [float(r["train/loss_unweighted"]) for r in rows if r.get("train/loss_unweighted")]
    assert len(weighted) == len(plain) == 3
    assert weighted == pytest.approx([1.0] * 3, abs=1e-4)
    assert plain[-1] < 0.9 * plain[0]
    policies.ok("fit", "flow", *flags[6:], "--run.name", "flow", "--model.optimizer", "adamw")  # its loss has no weight
    assert "train/loss_unweighted" not in read_csv(policies.folder("flow", "flow") / "metrics.csv")[0]


# figures


def test_intervals_of_shares_stay_within_the_unit_interval() -> None:
    shares = np.array([[0.0, 0.5, 1.0], [0.0002, 0.52, 1.0], [0.0, 0.47, 0.999]])
    low, high = share_interval(shares, 10_000)
    assert ((low > 0) & (high < 1) & (low < high)).all()
    assert low[1] < 0.4967 < high[1]
    half = 4.3027 * shares[:, 1].std(ddof=1) / math.sqrt(3)  # near one half it is Student's
    assert (high[1] - low[1]) / 2 == pytest.approx(half, rel=0.02)
    assert shares[:, 0].mean() < 4.3027 * shares[:, 0].std(ddof=1) / math.sqrt(3)  # which reaches below 0 there


def test_figures_say_what_they_lack(tmp_path: Path) -> None:
    data = figures.FigureData(TwoMoons(), {"1": torch.zeros(2, 10, 2).double()}, [0, 1], 200)
    steps = {100 * k: np.zeros((4, 2)) for k in range(1, 9)}
    drawn = figures.draw_by_step(data.target, steps, "SMFP")
    assert drawn.get_suptitle().endswith("not shown: steps 300, 600")
    assert len(drawn.axes) == 6
    six = figures.draw_by_step(two(6), {1: np.zeros((4, 6))}, "SMFP")
    assert len(six.axes) == 3
    assert "3 of 15 pairs" in six.get_suptitle()
    (tmp_path / "metrics.csv").write_text(
        "step,eval/tv,replicas/eval/tv/seed_0,replicas/eval/tv/seed_1\n1,0.1,0.1,0.1\n"
    )
    training = figures.draw_training(data, tmp_path, "SMFP")
    assert training is not None
    empty = [t.get_text() for ax in training.axes for t in ax.texts]
    assert empty == [f"no {m} in metrics.csv" for m in ("off3", "off5", "energy_distance", "sliced_w2", "entropy_knn")]
    report_metrics = {k: [0.5, 0.5] for k in ("tv", "off3")}
    samples = figures.draw_samples(data, figures.Report([0, 1], report_metrics, {}), "SMFP")
    titles = [ax.get_title() for ax in samples.axes]
    assert sum("(target 0.67)" in t for t in titles) == 2
    _, axes = new_figure()
    panels.draw_mode_zoom(axes[0, 0], ThreeModes(), np.full((3, 2), 0.9), "zoom")
    assert [t.get_text() for t in axes[0, 0].texts] == ["no sample here"]


def test_the_targets_share_beyond_three_is_drawn(tmp_path: Path) -> None:
    """The dashed line of off3 in training.png, at .0111 for ThreeModes."""
    data = figures.FigureData(ThreeModes(), {"1": torch.zeros(2, 10, 2).double()}, [0, 1], 200)
    head = ",".join(
        f"eval/off3,replicas/eval/off3/seed_{s}" if s == 0 else f"replicas/eval/off3/seed_{s}" for s in (0, 1)
    )
    (tmp_path / "metrics.csv").write_text(f"step,{head}\n1,0.3,0.3,0.3\n2,0.2,0.2,0.2\n")
    drawn = figures.draw_training(data, tmp_path, "SMFP")
    assert drawn is not None
    levels = [np.ravel(line.get_ydata()).tolist() for line in drawn.axes[1].lines if line.get_linestyle() == "--"]
    assert levels == [[pytest.approx(math.exp(-4.5))] * 2]


def test_more_modes_than_colours_are_drawn() -> None:
    """Nine modes, of which one lies out of reach: a bar each, a line at -log of the weight where there is any."""
    means = [[0.2 * i - 0.8, 0.0] for i in range(8)] + [[3.0, 0.0]]
    target = Mixture(means, 0.02)
    mu, log_sigma = (torch.tensor(means[:3]).double().atanh().unsqueeze(1) * k for k in (1, 0))
    found = {k: v.tolist() for k, v in exact_metrics(mu, log_sigma - 3, target).items()}
    data = figures.FigureData(target, {"1": torch.zeros(3, 10, 2).double()}, [0, 1, 2], 200)
    drawn = figures.draw_modes_chosen(data, figures.Report([0, 1, 2], found, {}), "gaussian")
    assert drawn is not None
    shares, kl = drawn.axes
    assert [bar.get_height() for bar in shares.patches] == [pytest.approx(1 / 3)] * 3 + [0] * 6
    dashed = [np.ravel(line.get_ydata()) for line in kl.lines if line.get_linestyle() == "--"]
    levels = [y[0] for y in dashed if len(y)]
    assert levels == [pytest.approx(math.log(9))] * 8
    assert shares.get_xlabel() == "mode"  # names would lie on each other
