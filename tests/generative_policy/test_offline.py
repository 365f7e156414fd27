"""Actions out of a file: which rows are learned from, what is measured without a truth, and files that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.generative_policy import FlowPolicy, GaussianPolicy, OfflineActions, OptimalTransport
from lightning_toys.generative_policy.gaussian import tanh_gaussian_log_prob
from lightning_toys.generative_policy.metrics import compute_metrics, sliced_w2
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.table_files import read_table
from tests.conftest import REPO, Runner

ACTIONS = str(REPO / "docs/examples/own/actions.csv")
SHORT = ("--model.seeds", "[0,1]", "--trainer.max_steps", "4", "--figures.dpi", "20")


def rows(n: int, dim: int) -> np.ndarray:
    drawn: np.ndarray = np.tanh(0.3 + 0.5 * keyed_generator(0, 0, f"test/offline/{dim}").standard_normal((n, dim)))
    return drawn


def saved(folder: Path, dim: int, n: int = 200) -> str:
    path = folder / f"actions{dim}.npz"
    np.savez(path, actions=rows(n, dim), rewards=np.arange(n))
    return str(path)


def test_tables_of_all_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x;y\n1;2\n3;4\n")
    names, table = read_table(str(tmp_path / "a.csv"))
    assert (names, table.tolist()) == (["x", "y"], [[1, 2], [3, 4]])
    assert read_table(str(tmp_path / "a.csv"), ["y"])[1].tolist() == [[2], [4]]
    np.savez(tmp_path / "b.npz", one=np.arange(3), two=np.arange(6).reshape(3, 2))
    assert read_table(str(tmp_path / "b.npz"), ["two", "one"])[1].tolist() == [[0, 1, 0], [2, 3, 1], [4, 5, 2]]
    np.savez(tmp_path / "c.npz", np.ones((2, 3)))
    assert read_table(str(tmp_path / "c.npz"))[1].shape == (2, 3)
    np.savez(tmp_path / "d.npz", a=np.ones(2), b=np.ones(3), c=np.ones((2, 2, 2)), d=np.array([1.0, np.nan]))
    for columns, says in (
        ([], "has 4 arrays, a, b, c, d; give --data.columns"),
        (["a", "b"], "array 'b' has 3 rows, 'a' has 2"),
        (["c"], r"array 'c': shape \(2, 2, 2\) of float64 is not allowed"),
        (["d"], "row 1: missing or not finite"),
        (["e"], "has no column 'e', but a, b, c, d"),
    ):
        with pytest.raises(ToyError, match=says):
            read_table(str(tmp_path / "d.npz"), columns)


def test_held_out_rows_are_not_learned_from() -> None:
    data = OfflineActions(ACTIONS, test_share=0.25)
    everything = read_table(ACTIONS)[1]
    assert (len(data.rows), len(data.held)) == (300, 100)
    both = sorted(map(tuple, [*data.rows.tolist(), *data.held.tolist()]))
    assert both == sorted(map(tuple, everything.tolist()))
    x, e = data.pairs(data.target, data.coupling, [0, 1])(0, 40)
    assert x.shape == e.shape == (2, 40, 256, 2)
    known = {tuple(r) for r in torch.from_numpy(data.rows).float().tolist()}
    counts = [0] * 2
    for r in range(2):
        drawn, times = np.unique(x[r].reshape(-1, 2).numpy(), axis=0, return_counts=True)
        assert {tuple(v) for v in drawn.tolist()} <= known
        # 10 240 draws of 300 rows: chi-square about 299, evenly likely
        counts[r] = float(np.square(times - 10_240 / 300).sum() / (10_240 / 300))
    assert all(200 < c < 400 for c in counts)
    assert torch.equal(x[1], data.pairs(data.target, data.coupling, [1])(0, 40)[0][0])  # by the seed alone
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(OfflineActions(ACTIONS, test_share=0.25, seed=1).held, data.held)
    assert torch.equal(data.reference(0, 20_000), data.held)
    few = data.another(0, 50)
    assert len({tuple(v) for v in few.tolist()}) == 50
    assert {tuple(v) for v in few.tolist()} <= {tuple(v) for v in data.rows.tolist()}


def test_limits_map_onto_the_unit_interval(tmp_path: Path) -> None:
    path = tmp_path / "torque.csv"
    path.write_text("torque\n" + "\n".join(f"{v}" for v in (-2.0, -1.0, 0.0, 1.0, 2.0)) + "\n")
    data = OfflineActions(str(path), test_share=0.4, limits=[-2, 2])
    assert sorted([*data.rows[:, 0].tolist(), *data.held[:, 0].tolist()]) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    with pytest.raises(ToyError, match=r"row 0 lies outside of --data.limits \[-1, 2\]"):
        OfflineActions(str(path), limits=[-1, 2])
    path.write_text("torque\n-2\n-1.5\n1.5\n1.7\n2\n")
    with pytest.raises(ToyError, match=r"Empirical has actions out of \[-1, 1\].*give --data.limits"):
        GaussianPolicy(divergence="forward_kl").measure(OfflineActions(str(path), test_share=0.4))


def test_sliced_w2_of_unequal_numbers() -> None:
    """A sample repeated is the same distribution: 4 against 6 rows is 12 against 12."""
    g = keyed_generator(0, 0, "test/offline/w2")
    x, y = (torch.from_numpy(g.standard_normal((n, 3))) for n in (4, 6))
    wanted = sliced_w2(x.repeat(3, 1), y.repeat(2, 1))
    assert sliced_w2(x, y) == pytest.approx(wanted, rel=1e-12)
    assert sliced_w2(y, x) == pytest.approx(wanted, rel=1e-12)
    line = sliced_w2(torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.0], [0.0], [3.0]]).double())
    # quantiles differ by 0 on [0, 1/2], by 1 on [1/2, 2/3], by 2 on [2/3, 1]
    assert line == pytest.approx(math.sqrt(1 / 6 + 4 / 3))


def test_metrics_without_a_truth() -> None:
    data = OfflineActions(ACTIONS)
    found = compute_metrics(data.another(0, 200), data.target, data.held, 100, 5)
    assert found.keys() == {"energy_distance", "sliced_w2", "entropy_knn"}
    away = compute_metrics(data.another(0, 200) + 0.3, data.target, data.held, 100, 5)
    assert away["energy_distance"] > 0.05 > abs(found["energy_distance"])


def test_the_gaussian_finds_the_likelihoods_maximum(policies: Runner, tmp_path: Path) -> None:
    """In closed form: mean and standard deviation of atanh of the rows; nll of the held-out rows."""
    path = saved(tmp_path, 2)
    flags = ("--data", "OfflineActions", "--data.path", path, "--data.columns", "[actions]", "--data.batch_size", "160")
    flags += ("--model.divergence", "forward_kl", "--model.parameters", "free", "--model.bound", "clip")
    flags += ("--model.seeds", "[0,1]")
    policies.ok("fit", "gaussian", *flags, "--trainer.max_steps", "500", "--model.lr", "0.05")
    found = json.loads((policies.folder("gaussian") / "results.json").read_text())
    assert found["label"] == "Gaussian, maximum likelihood"
    assert "kl" not in found["metrics"]
    assert "tv" not in found["metrics"]
    assert found["headline"] == ["entropy_exact", "nll", "sliced_w2"]
    data = OfflineActions(path, ["actions"])
    y = np.arctanh(data.rows)
    mu, sigma = torch.from_numpy(y.mean(0)), torch.from_numpy(y.std(0))
    wanted = -tanh_gaussian_log_prob(data.held, mu, sigma.log()).mean().item()
    assert found["metrics"]["nll"]["values"] == pytest.approx([wanted] * 2, abs=0.01)
    file = policies.folder("gaussian") / "checkpoints" / "last.ckpt"
    module = GaussianPolicy.load_from_checkpoint(file, weights_only=True)
    learned = [p[:, 0] for p in module.mu_log_sigma(module.net)]
    assert (learned[0] - mu).abs().max() < 0.05
    assert (learned[1].exp() - sigma).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "dim"), [("flow", 2), ("flow", 3), ("meanflow", 1)])
def test_from_a_file_to_figures(policies: Runner, tmp_path: Path, variant: str, dim: int) -> None:
    flags = ("--data", "OfflineActions", "--data.path", saved(tmp_path, dim), "--data.columns", "[actions]", *SHORT)
    flags += ("--data.coupling", "OptimalTransport", "--figures.enabled", "true", "--model.evaluation.test_nfe", "[1]")
    policies.ok("fit", variant, *flags)
    policies.ok("test", variant, *flags)
    policies.ok("predict", variant, *flags)
    folder = policies.folder(variant)
    found = json.loads((folder / "results.json").read_text())
    assert set(found["references"]) == {"training_rows"}
    assert found["references"]["training_rows"]["sliced_w2"] < min(found["metrics"]["sliced_w2"]["values"])
    assert ("nll@dopri5" in found["metrics"]) == (variant == "flow")
    assert set(found["headline"]) == {"entropy_knn", "sliced_w2", "energy_distance"}
    assert not any("tv" in k or "kl" in k or "log_z" in k for k in found["metrics"])
    assert {"samples.png", "training.png"} <= {p.name for p in (folder / "figures").iterdir()}
    with np.load(folder / "predictions.npz") as file:
        assert "log_prob" not in file
        assert file["target"].shape == (2, 40, dim)


BAD = [
    (("--data.path", "nowhere.csv"), "--data.path: no file 'nowhere.csv'"),
    (("--data.path", ACTIONS, "--data.columns", "[stear]"), "has no column 'stear', but steer, throttle"),
    (("--data.path", ACTIONS, "--data.test_share", "0"), "0.0 of 400 rows leaves 0 rows to score on; at least 2"),
    (("--data.path", ACTIONS, "--data.limits", "[1,-1]"), "--data.limits: [1.0, -1.0] is not allowed"),
    ((), "--data.path: a file is missing"),
]


@pytest.mark.parametrize(("flags", "says"), BAD, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_bad_input_is_one_line(policies: Runner, flags: tuple[str, ...], says: str) -> None:
    code, err = policies.code("fit", "flow", "--data", "OfflineActions", *flags)
    assert code == 2, err
    assert says in err.splitlines()[-1]
    assert not policies.root.exists()


def test_what_wants_a_density_is_refused() -> None:
    data = OfflineActions(ACTIONS, coupling=OptimalTransport(64))
    with pytest.raises(ToyError, match="'reverse_kl' needs a density, which Empirical has not; give"):
        GaussianPolicy().measure(data)
    assert FlowPolicy().measure(data)["scale"] == pytest.approx(data.rows.std(0).mean(), rel=0.2)
