"""The regression's controls, algorithms and drifts of one's own, and streams from files: closed forms and commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.bilevel.regression.algorithms import FixedWeights, NoTracking, Optimum, TimeStep, scaled
from lightning_toys.bilevel.regression.csv_stream import CsvStream, read_stream
from lightning_toys.bilevel.regression.data import DriftStream
from lightning_toys.bilevel.regression.drift import Drift, EmpiricalLoss, ExactLoss, Linear, Sine, check_drift
from lightning_toys.bilevel.regression.hypergradients import AdamMoments, Window
from lightning_toys.bilevel.regression.metrics import effective_lags
from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.bilevel.regression.module import WindowRegression
from lightning_toys.errors import ToyError
from tests.bilevel.regression.test_cli import TINY
from tests.conftest import Runner

OWN = Path(__file__).parents[2] / "own_classes"


@pytest.fixture
def tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.syspath_prepend(str(OWN))
    flags = (*TINY, "--trainer.max_steps", "24", "--trainer.precision", "64-true")
    return Runner(tmp_path / "logs", capsys, "bilevel", flags)


def records(runner: Runner, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = runner.checkpoint("regression", name)["toy"]["records"]
    return found


def results(runner: Runner, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runner.folder("regression", name) / "results.json").read_text())
    return found


def test_controls_against_each_other_and_the_closed_form(tiny: Runner) -> None:
    """lag_1 is a window of 1; weights of one's own make every other control; the optimum's J is the oracle's."""
    best = ExactLoss(Sine(10, 0.2), 7, 3, 1.0)
    oracle = [float(f"{w:.17g}") for w in best.oracle()]
    runs = {
        "lag_1": ("--model.algorithm", "lag_1"),
        "window_1": ("--model.algorithm", "uniform", "--data.window", "1", "--model.lambda0", "7"),
        "uniform": ("--model.algorithm", "uniform"),
        "fixed_one": ("--model.algorithm", "fixed", "--model.fixed_weights", "[4]", "--model.weights", "softmax"),
        "fixed_all": ("--model.algorithm", "fixed", "--model.fixed_weights", "[2,2,2,2,2,2,2]"),
        "optimum": ("--model.algorithm", "optimum"),
        "fixed_best": ("--model.algorithm", "fixed", "--model.fixed_weights", json.dumps(oracle)),
        "no_tracking": ("--model.algorithm", "no_tracking"),
    }
    for name, flags in runs.items():
        tiny.ok("fit", "regression", *flags, "--run.name", name)
    loss = {name: records(tiny, name)["loss"] for name in runs}
    for one, same in (
        ("lag_1", "window_1"),
        ("lag_1", "fixed_one"),
        ("uniform", "fixed_all"),
        ("optimum", "fixed_best"),
    ):
        torch.testing.assert_close(loss[one], loss[same], rtol=1e-9, atol=1e-9)
    for one, other in (("lag_1", "uniform"), ("lag_1", "optimum"), ("uniform", "no_tracking"), ("optimum", "uniform")):
        assert (loss[one] - loss[other]).abs().max() > 1e-2, (one, other)
    arrays = results(tiny, "optimum")["arrays"]
    assert [row[0] for row in arrays["largest_lags"]] == [1 + int(np.argmax(best.oracle()))] * 2
    assert arrays["weights_by_seed"] == [pytest.approx(arrays["best_weights"])] * 2
    exact = {n: results(tiny, n)["metrics"].get("exact_loss", {}).get("mean") for n in runs}
    lines = {k: v["exact_loss"] for k, v in results(tiny, "optimum")["references"].items()}
    assert exact["optimum"] == pytest.approx(lines["oracle"])
    assert exact["lag_1"] == pytest.approx(lines["lag_1"])
    assert exact["uniform"] == pytest.approx(lines["uniform"])
    assert exact["no_tracking"] is None  # its weights do nothing
    assert results(tiny, "no_tracking")["label"] == "no tracking"
    assert results(tiny, "fixed_one")["metrics"]["effective_lags"]["values"] == [1, 1]


@pytest.mark.parametrize("algorithm", ["no_tracking", "least_squares"])
def test_a_control_resumes(tiny: Runner, algorithm: str) -> None:
    """The mean so far of no_tracking is part of the checkpoint, and so is what least_squares has seen."""
    flags = ("--model.algorithm", algorithm)
    tiny.ok("fit", "regression", *flags, "--run.name", "whole")
    tiny.ok("fit", "regression", *flags, "--run.name", "cut", "--trainer.max_steps", "11")
    tiny.ok("fit", "regression", *flags, "--run.name", "cut", "--ckpt_path", "last")
    assert torch.equal(records(tiny, "whole")["loss"], records(tiny, "cut")["loss"])
    states = [tiny.checkpoint("regression", name)["state_dict"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    if algorithm == "no_tracking":
        assert float(states[1]["net.times_so_far"]) == 7 + 23  # a window, then one more at each step
        return
    found = results(tiny, "cut")
    assert found["metrics"]["exact_loss"]["mean"] < 0.5 * found["references"]["uniform"]["exact_loss"]
    total = records(tiny, "cut")["lambda"].sum(2)
    torch.testing.assert_close(total, torch.full_like(total, 7.0))  # as every other run's at its start


def no_moments() -> AdamMoments:
    return AdamMoments(torch.empty(0), torch.empty(0), 0)


def test_no_tracking_fits_the_mean_of_all_so_far() -> None:
    stream = DriftStream(4, Sine(), inner_points=6, outer_points=5).stream([0, 3])
    like = torch.zeros(1, dtype=torch.float64)
    method, net = NoTracking(), MLP((5, 3))
    memory = method.memory(net, [0, 3], {"points": 6, "outputs": 3})
    memory = {k: v.double() for k, v in memory.items()}
    for t in range(9):
        window = Window(*stream.points(like), *stream.window(t, 4, like))
        lam = torch.full((2, 4), 0.5, dtype=torch.float64)
        step = TimeStep(net, lam, lam, window, no_moments, 0.1, memory)
        found = method.targets(step)
        every = stream.window(t, t + 4, like)[0]  # all times from -4 to t - 1
        torch.testing.assert_close(found.mean, every.mean(1))
        assert found.total.tolist() == [2, 2]


def test_weights_are_scaled_to_a_sum() -> None:
    assert scaled([1, 0, 3], 8).tolist() == [2, 0, 6]
    data = DriftStream(5)
    assert FixedWeights([2.0, 1.0]).measure(data) == {"start": [2, 1, 0, 0, 0]}
    start = np.array(Optimum().measure(data)["start"])
    assert float(data.exact_loss.loss(start)) == data.exact_loss.references()["oracle"]
    assert effective_lags(torch.tensor([[3.0, 0, 0], [2, 2, 2]])).tolist() == pytest.approx([1, 3])


BAD = [
    (("--model.algorithm", "fixed"), "--model.fixed_weights: none is not allowed with --model.algorithm fixed"),
    (("--model.algorithm", "fixed", "--model.fixed_weights", "[0,0]"), "give one weight above 0 at least"),
    (("--model.algorithm", "fixed", "--model.fixed_weights", "[1,-1]"), "--model.fixed_weights: -1.0 is not allowed"),
    (("--model.algorithm", "fixed", "--model.fixed_weights", "[1,1,1,1,1,1,1,1]"), "give at most --data.window, 7"),
    (("--model.algorithm", "lag1"), "'lag1' is not allowed; give one of funcbo, aid"),
    (("--model.algorithm", "lag_rules.Chirp"), "lag_rules.Chirp"),
    (("--data.drift", "lag_rules.Lopsided"), "--data.drift: Lopsided.mean returns"),
    (("--data.drift", "lightning_toys.bilevel.regression.drift.Drift"), "--data.drift: Drift.mean fails"),
]


@pytest.mark.parametrize(("flags", "says"), BAD, ids=lambda x: "-".join(x[1:4:2]) if isinstance(x, tuple) else "")
def test_bad_input_is_one_line(tiny: Runner, flags: tuple[str, ...], says: str) -> None:
    code, err = tiny.code("fit", "regression", *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert says in err
    assert not (tiny.root / "bilevel").exists()


# of one's own


def test_an_algorithm_and_a_drift_of_ones_own(tiny: Runner) -> None:
    flags = ("--model.algorithm", "lag_rules.Towards", "--model.algorithm.lag", "5", "--data.drift", "lag_rules.Chirp")
    flags = (*flags, "--model.outer_lr", "0.2", "--trainer.max_steps", "60")
    tiny.ok("fit", "regression", *flags, "--run.name", "own")
    found = results(tiny, "own")
    assert found["label"] == "towards lag 5"
    assert [row[0] for row in found["arrays"]["largest_lags"]] == [5, 5]
    assert max(found["metrics"]["effective_lags"]["values"]) < 1.5  # all weight but a rest is on it
    assert found["references"]["oracle"]["exact_loss"] < found["references"]["no_tracking"]["exact_loss"]
    tiny.ok("test", "regression", *flags, "--run.name", "own", "--ckpt_path", "last")
    checkpoint = tiny.folder("regression", "own") / "checkpoints" / "last.ckpt"
    from lag_rules import Towards  # type: ignore[import-not-found]

    loaded = WindowRegression.load_from_checkpoint(checkpoint)
    assert loaded.label == "towards lag 5"
    assert int(loaded.lag_weights[0].argmax()) == 4
    # a script's checkpoint holds the path alone, which is no reason to import it
    kept = dict(WindowRegression(Towards(2)).hparams)
    assert kept["algorithm"] == "lag_rules.Towards"
    with pytest.raises(ToyError, match=r"load_from_checkpoint takes it: algorithm=Towards"):
        WindowRegression(**kept)
    assert WindowRegression(**{**kept, "algorithm": Towards(2)}).label == "towards lag 2"


class MeanAlone(Drift):
    def mean(self, t: np.ndarray) -> np.ndarray:
        return Sine(10, 0.2).mean(t)


def test_moments_that_a_drift_does_not_give_are_estimated() -> None:
    """Against the sine's closed form: off by the phases that 10 000 times do not end with."""
    closed, found = Sine(10, 0.2), MeanAlone()
    scale = closed.power
    np.testing.assert_allclose(found.lag_moments(40), closed.lag_moments(40), atol=2e-3 * scale)
    assert abs(found.lag_moments(3)[0, 1] - closed.lag_moments(3)[0, 2]) > 1e-2 * scale / 10  # lags in their order
    assert found.power == pytest.approx(closed.power, rel=2e-3)
    assert math.isnan(Linear().power)  # one that says that it has none keeps that
    one, other = (ExactLoss(d, 40, 3, 1.0).references() for d in (found, closed))
    assert one == pytest.approx(other, rel=5e-3)


def test_a_drift_that_fails_is_named() -> None:
    class Asymmetric(MeanAlone):
        def lag_moments(self, window: int) -> np.ndarray:
            return np.triu(np.ones((window, window)))

    class Infinite(MeanAlone):
        def mean(self, t: np.ndarray) -> np.ndarray:
            return np.full(np.shape(t), np.inf)

    for drift, says in ((Asymmetric(), "Asymmetric.lag_moments returns"), (Infinite(), "Infinite.mean returns")):
        with pytest.raises(ToyError, match=says):
            check_drift(drift)


# from a file


def write_csv(path: Path, lags: int, steps: int) -> DriftStream:
    """Write what a stream shows, with 17 digits."""
    data = DriftStream(lags, Sine(4, 0.5), inputs=2, outputs=2, inner_points=6, outer_points=5)
    stream = data.stream([9])
    y = stream.observations(-lags, steps, torch.zeros(1, dtype=torch.float64))[0].numpy()
    lines = ["t,x1,x2,y1,y2"]
    for t, rows in enumerate(y):
        lines += [
            f"{t - lags}," + ",".join(f"{v:.17g}" for v in (*x, *row)) for x, row in zip(stream.x[0], rows, strict=True)
        ]
    path.write_text("\n".join(lines) + "\n")
    return data


def test_a_stream_from_a_file_is_the_stream(tmp_path: Path) -> None:
    given = write_csv(tmp_path / "y.csv", 5, 12)
    read = CsvStream(str(tmp_path / "y.csv"), 5, 6)
    like = torch.zeros(1, dtype=torch.float64)
    one, two = given.stream([9]), read.stream([0, 1])
    assert read.steps == 12
    for a, b in zip(one.points(like), two.points(like), strict=True):
        assert torch.equal(b[1], a[0])
    for t in (0, 4, 11):
        for a, b in zip(one.window(t, 5, like), two.window(t, 5, like), strict=True):
            assert b.shape[0] == 2
            assert torch.equal(b[1], a[0])


def test_the_files_loss_is_the_exact_loss_in_the_mean() -> None:
    """By its definition, and against the closed form of a long stream."""
    data = DriftStream(6, Sine(4, 0.5), inner_points=6, outer_points=40)
    y = data.stream([2]).observations(0, 2000, torch.zeros(1, dtype=torch.float64))[0, :, 6:].numpy()
    found, w = EmpiricalLoss(y, 6), np.array([0.5, 0, 0.1, 0.2, 0, 0.2])
    predicted = sum(w[k - 1] * y[6 - k : len(y) - k] for k in range(1, 7))
    assert float(found.loss(3 * w)) == pytest.approx(np.square(y[6:] - predicted).mean())
    assert found.references() == pytest.approx(data.exact_loss.references(), rel=0.02)


def test_a_run_on_a_file(tiny: Runner, tmp_path: Path) -> None:
    write_csv(tmp_path / "y.csv", 7, 24)
    tiny.small = ("--figures.enabled", "false", "--model.seeds", "[2,5]", "--model.hidden", "6")
    flags = ("--data", "CsvStream", "--data.path", str(tmp_path / "y.csv"), "--data.window", "7")
    tiny.ok("fit", "regression", *flags, "--model.algorithm", "optimum", "--trainer.max_steps", "24")
    found = results(tiny, "version_0")
    assert found["metrics"]["exact_loss"]["mean"] == pytest.approx(found["references"]["oracle"]["exact_loss"])
    code, err = tiny.code("fit", "regression", *flags, "--trainer.max_steps", "25")
    assert code == 2
    assert "--trainer.max_steps: 25 is not allowed; the stream has 24 times after the first window" in err


GOOD = [f"{t},{x},{t + x}" for t in range(4) for x in range(8)]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["t,x,y", *GOOD[:-1]], "times of different lengths"),
        (["t,x,y", *GOOD[:20], "2,9,1", *GOOD[21:]], "other points at other times"),
        (["t,x,y", *GOOD[:20], "2,4,a", *GOOD[21:]], "line 22, column 'y': 'a' is no finite number"),
        (["t,x,y", *GOOD[:20], "2,4,nan", *GOOD[21:]], "line 22, column 'y': the value is missing"),
        (["t,x,y", *GOOD[:20], "2,4", *GOOD[21:]], "line 22: 2 cells, where the header has 3"),
        (["t,x,y", *GOOD[:20], "2", *GOOD[21:]], "line 22: 1 cells, where the header has 3"),
        (["x,y,t", "1"], "line 2: 1 cells, where the header has 3"),
        (["0,1,2", *GOOD], "has no header: its first line is '0,1,2'"),
        (["t,x,x,y", "0,1,2,3"], "has 2 columns 'x'; rename one"),
        (["t,x,z", *GOOD], "has the columns t, x, z"),
        (["t,x,y"], "has no rows"),
        ([], "has no header"),
    ],
)
def test_a_file_that_is_no_stream(tmp_path: Path, lines: list[str], says: str) -> None:
    (tmp_path / "y.csv").write_text("\n".join(lines))
    with pytest.raises(ToyError, match=r"--data.path: ") as error:
        CsvStream(str(tmp_path / "y.csv"), 2)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_bounds_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "y.csv"
    path.write_text("\n".join(["t,x,y", *GOOD]))
    x, y = read_stream(str(path))
    assert x[:, 0].tolist() == list(range(8))
    assert y[3, :, 0].tolist() == list(range(3, 11))
    with pytest.raises(ToyError, match=r"--data.window: 4 is not allowed; give less than the 4 times"):
        CsvStream(str(path), 4)
    with pytest.raises(ToyError, match=r"--data.inner_points: 5 of 8 points"):
        CsvStream(str(path), 2, 5)
    with pytest.raises(ToyError, match=r"--data.path: no file"):
        CsvStream(str(tmp_path / "none.csv"), 2)
    with pytest.raises(ToyError, match="is no file"):
        CsvStream(str(tmp_path), 2)
    (tmp_path / "y.npz").write_bytes(b"PK")
    with pytest.raises(ToyError, match=r"y.npz' is not allowed; give a CSV or Parquet file"):
        CsvStream(str(tmp_path / "y.npz"), 2)
    (tmp_path / "latin.csv").write_bytes("t,x,y\n0,1,\xfc".encode("latin-1"))
    with pytest.raises(ToyError, match=r"latin.csv' is no CSV in UTF-8"):
        CsvStream(str(tmp_path / "latin.csv"), 2)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_csv_as_a_spreadsheet_writes_it(tmp_path: Path, delimiter: str, start: str) -> None:
    """A mark at its beginning, semicolons, tabs, spaces, empty lines, and dates for times: the same stream."""
    lines = [f"2024-01-{t + 1:02d},{x},{x / 4 + t}" for t in range(4) for x in range(8)]
    text = "\n".join(["t, x, y", *lines, ""]).replace(",", delimiter)
    (tmp_path / "y.csv").write_text(start + text + "\n\n", encoding="utf-8", newline="\r\n")
    x, y = read_stream(str(tmp_path / "y.csv"))
    assert x[:, 0].tolist() == list(range(8))
    assert y.shape == (4, 8, 1)
    assert y[3, :, 0].tolist() == [v / 4 + 3 for v in range(8)]
    assert CsvStream(str(tmp_path / "y.csv"), 2).steps == 2
