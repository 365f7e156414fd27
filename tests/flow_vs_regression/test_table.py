"""Rows of a file: what is read, what is refused, how they are split and scaled, and from a CSV to figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.cli import main
from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression import FlowVsRegression, PointData, Table
from lightning_toys.flow_vs_regression.data import Points
from lightning_toys.flow_vs_regression.units import Units, unfit_units
from lightning_toys.nets import Network
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.table_files import read_columns

GRID = [[i, 10 * i, i * i] for i in range(20)]


def write(path: Path, rows: list[list[Any]], header: str = "a,b,y", delimiter: str = ",") -> str:
    lines = [header.replace(",", delimiter), *(delimiter.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def table(tmp_path: Path, rows: int = 60, **settings: Any) -> Table:
    g = keyed_generator(0, 0, "test/table")
    c = g.uniform(0, 50, (rows, 2))
    y = 1000 + 3 * c[:, :1] - c[:, 1:] ** 2
    path = write(tmp_path / "points.csv", np.hstack([c, y]).tolist())
    return Table(path, ["a", "b"], ["y"], **settings)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_of_a_csv_by_name(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "points.csv", [[1, "x", 2.5], [-3e2, "1,0" if delimiter != "," else "y", 4]], "a,word,y",
                 delimiter)  # fmt: skip
    assert read_columns(path, ["y", "a"]).tolist() == [[2.5, 1.0], [4.0, -300.0]]


def test_a_byte_order_mark_quotes_and_empty_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes('\ufeff"a, first",y\r\n1,"2"\r\n\r\n3,4\r\n'.encode())
    assert read_columns(str(path), ["a, first", "y"]).tolist() == [[1, 2], [3, 4]]


def test_columns_of_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "points.npz"
    np.savez(path, y=np.array([1, 2]), a=np.array([0.5, 1.5], np.float32), wide=np.zeros((2, 2)), word=np.array(["u"]))
    assert read_columns(str(path), ["a", "y"]).tolist() == [[0.5, 1.0], [1.5, 2.0]]
    for names, says in ((["wide"], r"'wide': shape \(2, 2\) of float64"), (["word"], "'word': shape"),
                        (["z"], "no column 'z', but y, a, wide, word")):  # fmt: skip
        with pytest.raises(ToyError, match=says):
            read_columns(str(path), names)
    np.savez(path, a=np.array([0.0, np.nan]), b=np.zeros(3), o=np.array([None]))
    for names, says in ((["a"], "column 'a', row 1: missing or not finite"), (["a", "b"], "'b' has 3 rows, 'a' has 2"),
                        (["o"], "no npz file of numbers: Object arrays cannot be loaded")):  # fmt: skip
        with pytest.raises(ToyError, match=says):
            read_columns(str(path), names)
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ToyError, match="is no npz file of numbers"):
        read_columns(str(path), ["a"])


@pytest.mark.parametrize(
    ("text", "names", "says"),
    [
        ("a,b,y\n1,2,3\n", "a,z", "'points.csv' has no column 'z', but a, b, y"),
        ("alpha,y\n1,2\n", "alpa", "has no column 'alpa', but alpha, y; did you mean 'alpha'?"),
        ("a,b,y\n1,2,3\n4,x5,6\n", "a,b", "'points.csv', line 3, column 'b': 'x5' is no finite number"),
        ("a,y\n1,inf\n", "y", "line 2, column 'y': 'inf' is no finite number"),
        ("a,b,y\n1,2,3\n4,,6\n", "b", "line 3, column 'b': the value is missing (''); drop such rows, or fill them"),
        ("a,y\n1,NA\n", "y", "line 2, column 'y': the value is missing ('NA')"),
        ("a,y\n1,2\n3\n", "a", "line 3: 1 cells, where the header has 2"),
        ("a,a\n1,2\n", "a", "has 2 columns 'a'; rename one"),
        ("1,2\n3,4\n", "a", "has no header: its first line is '1,2'; name the columns there"),
        ("\n", "a", "has no header: its first line is empty"),
        ("a,y\n", "a", "'points.csv' has no rows"),
        ("a,y\n\xff\xfe,1\n", "a", "is no CSV in UTF-8"),
    ],
)
def test_a_csv_that_does_not_fit_is_one_line(
    text: str, names: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ToyError) as error:
        read_columns("points.csv", names.split(","))
    said = str(error.value)
    assert said.startswith("--data.path: 'points.csv'")
    assert says in said
    assert "\n" not in said


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "gone.csv", r"^--data\.test_path: no file '.*gone\.csv'$"),
        (tmp_path, "is no file$"),
        (tmp_path / "points.xlsx", r"give a file of the kind \.csv, \.tsv, \.txt, \.npz, \.parquet$"),
    ):
        if path.suffix == ".xlsx":
            path.write_text("x")
        with pytest.raises(ToyError, match=says):
            read_columns(str(path), ["a"], "--data.test_path")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"inputs": []}, "--data.inputs: [] is not allowed"),
        ({"outputs": "y"}, "--data.outputs: 'y' is not allowed; give a list of columns"),
        ({"outputs": ["a"]}, "--data.inputs, --data.outputs: column 'a' is given twice"),
        ({"test_share": 1.0}, "--data.test_share: 1.0 is not allowed; give a share in [0, 1)"),
        ({"test_share": 0.01}, "--data.test_share: 0.01 of 20 rows is none; give more, or --data.test_path"),
        ({"holdout": 0.01}, "--data.holdout: 0.01 of 16 rows is none"),
        ({"holdout": 0.95}, "leaves 1 rows to learn from; at least 2"),
        ({"path": ""}, "--data.path: a file is missing"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    given = {"path": write(tmp_path / "p.csv", GRID), "inputs": ["a", "b"], "outputs": ["y"], **settings}
    with pytest.raises(ToyError) as error:
        Table(**given)
    assert says in str(error.value)


def test_rows_are_parted_and_none_is_seen_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", GRID)
    data = Table(path, ["a", "b"], ["y"], test_share=0.25, holdout=0.2)
    points = data.points([0, 1])
    c, truth = data.evaluation_points()
    assert points.c.shape == (2, 12, 2)
    assert points.holdout_x1.shape == (2, 3, 1)
    assert c.shape == (5, 2)
    for r in range(2):
        every = torch.cat([points.c[r], points.holdout_c[r], c])
        assert sorted(every[:, 0].tolist()) == list(range(20))
        assert torch.equal(every[:, 1], 10 * every[:, 0])
    assert torch.equal(truth, c[:, :1] ** 2)  # rows stay whole
    assert torch.equal(points.x1, points.c[..., :1] ** 2)
    assert not torch.equal(points.holdout_c[0], points.holdout_c[1])  # by the replica's own seed
    assert torch.equal(data.points([1]).c[0], points.c[1])
    other = Table(path, ["a", "b"], ["y"], test_share=0.25, seed=1)
    assert not torch.equal(other.evaluation_points()[0], c)


def test_a_test_file_of_its_own(tmp_path: Path) -> None:
    path, test = write(tmp_path / "p.csv", GRID), write(tmp_path / "t.csv", [[7.5, 1, 2], [3.5, 4, 5]])
    data = Table(path, ["a"], ["y", "b"], test_path=test)
    assert data.points([0]).c.shape == (1, 20, 1)
    c, truth = data.evaluation_points()
    assert c.tolist() == [[3.5], [7.5]]
    assert truth.tolist() == [[5, 4], [2, 1]]


def test_few_evaluation_points_are_spread(tmp_path: Path) -> None:
    data = table(tmp_path, 100, test_share=0.5)
    c, truth = data.evaluation_points(7)
    every, values = data.evaluation_points()
    assert c.shape == (7, 2)
    assert torch.equal(c[[0, -1]], every[[0, -1]])
    at = [int((every == row).all(1).nonzero()) for row in c]
    assert torch.equal(truth, values[at])


def test_columns_are_scaled_by_the_training_rows_alone(tmp_path: Path) -> None:
    data = table(tmp_path)
    c, x1 = (column.double() for column in data.train_columns([0, 1]))
    for column in (c, x1):
        torch.testing.assert_close(column.mean(1), torch.zeros_like(column[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(column.std(1, correction=0), torch.ones_like(column[:, 0]), rtol=0, atol=1e-5)
    assert data.units is not None
    raw = data.points([0])
    torch.testing.assert_close(data.units.unscaled_x(data.units.scaled_x(raw.x1)), raw.x1)
    torch.testing.assert_close(data.units.scaled_x(raw.x1), x1[:1], rtol=0, atol=1e-5)
    plain = table(tmp_path, standardise=False)
    assert plain.units is None
    torch.testing.assert_close(plain.train_columns([0])[1].double(), raw.x1, rtol=1e-6, atol=0)


def test_a_constant_column_is_left_where_it_is(tmp_path: Path) -> None:
    data = Table(write(tmp_path / "p.csv", [[i, 5, i] for i in range(9)]), ["a", "b"], ["y"])
    assert not data.train_columns([0])[0][..., 1].any()


class Fixed(torch.nn.Module):
    """Stands for a network whose output, in scaled units, is c_0 - 2 c_1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        return c[..., :1] - 2 * c[..., 1:]


def test_predictions_are_in_the_files_units(tmp_path: Path) -> None:
    """By hand: (c - mean) / sd goes in, out comes mean + sd * prediction; not one of them twice, none swapped."""
    data = table(tmp_path)
    module = FlowVsRegression("regression", [0, 1], network=Network(hidden=4))
    module.sizes = module.measure(data)
    module.net = Fixed()  # type: ignore[assignment]
    c, _ = data.evaluation_points()
    rows = torch.cat([data.points([0]).c[0], data.points([0]).x1[0]], dim=1).numpy()
    m, s = rows.mean(0), rows.std(0)
    scaled = (c.numpy() - m[:2]) / s[:2]
    wanted = m[2] + s[2] * (scaled[:, 0] - 2 * scaled[:, 1])
    x0 = torch.zeros(2, 1, len(c), 1)
    found = module.predictions(module.net, module.configured_readout, c.expand(2, -1, -1), x0)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[1, 0, :, 0].detach().numpy(), wanted, rtol=1e-5)


def test_units_of_a_checkpoint_are_looked_at() -> None:
    whole: dict[str, Any] = {"c_mean": [0.0, 1.0], "c_sd": [1.0, 2.0], "x_mean": [3.0], "x_sd": [4.0]}
    assert unfit_units(None, 2, 1) == ""
    assert unfit_units(whole, 2, 1) == ""
    for wrong in ({"c_sd": [1.0, 0.0]}, {"x_sd": [float("nan")]}, {"c_mean": [1.0]}, {"x_mean": [1]}, {"x_mean": "3"}):
        (name,) = wrong
        assert unfit_units({**whole, **wrong}, 2, 1).startswith(f"sizes.units.{name} are no")
    assert "no means" in unfit_units({"c_mean": []}, 2, 1)
    assert "no means" in unfit_units([1], 2, 1)
    assert Units(**whole).scaled_c(torch.tensor([2.0, 5.0])).tolist() == [2.0, 2.0]


SHORT = ("--model.network.hidden", "16", "--trainer.max_steps", "30", "--model.seeds", "[0,1]", "--figures.dpi", "30")


@pytest.mark.parametrize(
    ("inputs", "outputs", "drawn"),
    [
        ("[a]", "[y]", {"predictions", "errors"}),
        ("[a,b]", "[y,d]", {"predictions", "surface"}),
        ("[a,b,c]", "[y]", {"predictions", "pairs"}),
    ],
)
def test_from_a_csv_to_figures(
    inputs: str, outputs: str, drawn: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As a new user would: five columns, one command; then the verbs that follow, from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    rows = keyed_generator(1, 0, "test/table").uniform(0, 9, (40, 5))
    write(Path("points.csv"), rows.tolist(), "a,b,c,d,y")
    data = ("--data", "Table", "--data.path", "points.csv", "--data.inputs", inputs, "--data.outputs", outputs)
    words = ("-c", "flow_vs_regression/flow", *data, *SHORT)
    assert main(["fit", *words]) == 0, capsys.readouterr().err
    folder = tmp_path / "lightning_logs/flow_vs_regression/flow/version_0"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["references"]) >= {"mean", "nearest", "linear", "gaussian_process"}
    assert results["metric_labels"]["l2"] == "RMSE on 8 test rows (l2)"
    assert drawn <= {p.stem for p in (folder / "figures").glob("*.png")}
    fitted = results["metrics"]["l2"]["values"]
    if "surface" not in drawn:
        return  # one of them is taken further
    assert main(["test", *words, "--ckpt_path", "last", "--figures.enabled", "false"]) == 0, capsys.readouterr().err
    assert json.loads((folder / "results.json").read_text())["metrics"]["l2"]["values"] == pytest.approx(fitted)
    assert main(["predict", *words, "--ckpt_path", "last"]) == 0, capsys.readouterr().err
    module = FlowVsRegression.load_from_checkpoint(folder / "checkpoints/last.ckpt", weights_only=True)
    with np.load(folder / "predictions.npz") as file:
        c, truth, prediction = (torch.from_numpy(file[k]) for k in ("c", "truth", "prediction"))
    torch.testing.assert_close(module.predict(c).double(), prediction)
    rmse = (prediction - truth).square().mean((1, 2, 3)).sqrt()
    assert rmse.tolist() == pytest.approx(fitted, rel=1e-5)


def test_a_resumed_run_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("points.csv"), GRID)
    data = ("--data", "Table", "--data.path", "points.csv", "--data.inputs", "[a]", "--data.outputs", "[y]")
    words = ("-c", "flow_vs_regression/regression", *data, *SHORT, "--figures.enabled", "false")
    assert main(["fit", *words]) == 0, capsys.readouterr().err
    write(Path("points.csv"), [[a, b, 2 * y] for a, b, y in GRID])
    capsys.readouterr()
    assert main(["fit", *words, "--ckpt_path", "last", "--trainer.max_steps", "40"]) == 2
    assert "toy.sizes.units are those of other training rows" in capsys.readouterr().err
    assert main(["test", *words, "--ckpt_path", "last"]) == 0, capsys.readouterr().err  # in its own units
    assert main(["fit", *words, "--data.path", "gone.csv"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --data.path: no file 'gone.csv'"
    assert main(["fit", *words, "--data.inputs", "[a,q]"]) == 2
    assert "error: --data.path: 'points.csv' has no column 'q', but a, b, y" in capsys.readouterr().err


class Plane(PointData):
    """Data of somebody's own: y = c_0 + 2 c_1, five points and three to judge on."""

    condition_dim, output_dim, condition_names = 2, 1, ("u", "v")

    def __init__(self) -> None:
        super().__init__(batch_size=4)

    @staticmethod
    def pairs(n: int) -> tuple[Tensor, Tensor]:
        c = torch.from_numpy(keyed_generator(n, 0, "test/plane").random((n, 2)))
        return c, c[:, :1] + 2 * c[:, 1:]

    def points(self, seeds: Any) -> Points:
        c, x1 = (part.expand(len(seeds), -1, -1) for part in self.pairs(5))
        return Points(c, x1, c[:, :0], x1[:, :0])

    def evaluation_points(self, max_points: int | None = None) -> tuple[Tensor, Tensor]:
        return self.pairs(3)

    def baseline_rows(self, seeds: Any, c_eval: Tensor) -> list[dict[str, Tensor]]:
        return [{"zero": torch.zeros(1, 1, len(c_eval), 1)}]


def test_a_data_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("-c", "flow_vs_regression/flow", "--data", f"{__name__}.Plane", *SHORT)
    assert main(["fit", *words]) == 0, capsys.readouterr().err
    folder = tmp_path / "lightning_logs/flow_vs_regression/flow/version_0"
    results = json.loads((folder / "results.json").read_text())
    assert results["references"]["zero"]["l2"] == pytest.approx(Plane.pairs(3)[1].square().mean().sqrt().item())
    assert (folder / "figures/surface.png").exists()
