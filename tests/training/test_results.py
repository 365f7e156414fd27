"""What a run leaves on disk: results.json, metrics.csv, and the folder they lie in."""

import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_toys.errors import ToyError, note, notes_held, require
from lightning_toys.training import results
from lightning_toys.training.files import set_aside, write_atomic
from lightning_toys.training.metrics_csv import MetricsCSV
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.results import Report, environment, summarise, to_json, write_results
from lightning_toys.training.run_folder import (
    RUN_VARIABLE,
    SWEEP_MARK,
    RunFolder,
    find_run,
    holds_run,
    new_run,
    read_checkpoint,
    resolve_checkpoint,
    versions,
)

NAN = float("nan")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# results.json


def test_to_json() -> None:
    given = {"a": [1.5, NAN, (math.inf, -math.inf)], 3: {"b": NAN, "c": "nan", "d": None, "e": True, "f": 7}}
    assert to_json(given) == {
        "a": [1.5, None, [None, None]],
        "3": {"b": None, "c": "nan", "d": None, "e": True, "f": 7},
    }


def test_summarise() -> None:
    found = summarise([1.0, 3.0])
    half = math.tan(0.475 * math.pi)
    plain = {k: v for k, v in found.items() if "geometric" not in k}
    assert plain == {"values": [1.0, 3.0], "mean": 2.0, "ci95": [pytest.approx(2 - half), pytest.approx(2 + half)]}
    assert found["geometric_mean"] == pytest.approx(math.sqrt(3))
    ends = [math.sqrt(3) * 3 ** (side * half / 2) for side in (-1, 1)]
    assert found["geometric_ci95"] == pytest.approx(ends)
    assert "geometric_mean" not in summarise([0.0, 3.0])
    assert to_json(summarise([1.0]))["ci95"] == [None, None]
    assert "share_ci95" not in found
    low, high = summarise([0.0, 0.0, 0.001], 1000)["share_ci95"]
    assert 0 < low < high < 1


def test_set_aside_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    set_aside(path)
    assert names(tmp_path) == []
    for k in range(12):
        path.write_text(str(k))
        set_aside(path)
        assert not path.exists()
    assert [(tmp_path / f"results-{k + 1}.json").read_text() for k in range(12)] == [str(k) for k in range(12)]
    (tmp_path / "results-5.json").unlink()  # the first free name
    path.write_text("again")
    set_aside(path)
    assert (tmp_path / "results-5.json").read_text() == "again"
    assert len(names(tmp_path)) == 12


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "one\n")
    write_atomic(path, "two\n")
    assert path.read_text() == "two\n"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new" * 1000)
    assert path.read_text() == "old"


REPORT = Report(
    [3, 5],
    {"l2": [0.25, 0.75], "boundary": [NAN, 0.5]},
    {"linear": {"l2": 0.125, "boundary": NAN}},
    {"interval_matrix": [[0.0, NAN], [1.0, 0.5]]},
)


def write(path: Path, **extra: Any) -> None:
    write_results(path, REPORT, "flow_vs_regression", "quick", "cpu", extra)


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return found


def test_results_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write(path, steps=100, seconds=NAN)
    found = strict_json(path)
    assert (found["experiment"], found["variant"], found["seeds"]) == ("flow_vs_regression", "quick", [3, 5])
    assert found["metrics"]["l2"]["values"] == [0.25, 0.75]
    assert found["metrics"]["l2"]["mean"] == 0.5
    assert found["metrics"]["boundary"] == {"values": [None, 0.5], "mean": None, "ci95": [None, None]}
    assert found["references"] == {"linear": {"l2": 0.125, "boundary": None}}
    assert found["arrays"] == {"interval_matrix": [[0.0, None], [1.0, 0.5]]}
    assert (found["steps"], found["seconds"]) == (100, None)
    assert found["environment"]["device"] == "cpu"
    assert path.read_text().endswith("}\n")


def test_older_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for k in range(3):
        write(path, run=k)
    assert names(tmp_path) == ["results-1.json", "results-2.json", "results.json"]
    assert [strict_json(tmp_path / n)["run"] for n in names(tmp_path)] == [0, 1, 2]


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write(path, run=0)
    with pytest.raises(TypeError):
        write(path, run=torch.zeros(2))
    assert names(tmp_path) == ["results.json"]
    assert strict_json(path)["run"] == 0


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["some/where/cli.py", "fit", "--name", "two words"])
    monkeypatch.setattr(results, "PACKAGES", ("torch", "no-such-package-anywhere"))
    found = environment("cuda:0")
    assert found["command"] == "cli.py fit --name 'two words'"
    assert found["versions"] == {"torch": torch.__version__, "no-such-package-anywhere": "not installed"}
    assert (found["device"], found["threads"]) == ("cuda:0", torch.get_num_threads())


# metrics.csv


def rows(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    return read_csv(folder / name)


def log(folder: Path, *entries: tuple[int, dict[str, float]], **kwargs: Any) -> MetricsCSV:
    logger = MetricsCSV(folder, **kwargs)
    for step, metrics in entries:
        logger.log_metrics(metrics, step)
    logger.save()
    return logger


def test_a_linked_table_is_written_where_the_link_leads(tmp_path: Path) -> None:
    """Also where it is written anew, for a new column."""
    log(tmp_path / "disk", (1, {"loss": 0.5}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").symlink_to(tmp_path / "disk" / "metrics.csv")
    log(tmp_path / "run", (2, {"loss": 0.25, "rate": 3.0}))
    assert (tmp_path / "run" / "metrics.csv").is_symlink()
    assert [r["step"] for r in rows(tmp_path / "disk")] == ["1", "2"]
    assert rows(tmp_path / "disk") == rows(tmp_path / "run")


def test_csv_round_trip(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 1e-300, -2.5e10, NAN]
    log(tmp_path / "run", *[(10 * k, {"loss": v}) for k, v in enumerate(values)])
    found = rows(tmp_path / "run")
    assert [r["step"] for r in found] == ["0", "10", "20", "30", "40"]
    assert [float(r["loss"]) for r in found[:-1]] == values[:-1]
    assert math.isnan(float(found[-1]["loss"]))


def test_csv_merges_a_step_into_one_row(tmp_path: Path) -> None:
    log(tmp_path, (1, {"a": 1.0}), (2, {"a": 2.0}), (1, {"b": 3.0}))
    assert rows(tmp_path) == [{"step": "1", "a": "1.0", "b": "3.0"}, {"step": "2", "a": "2.0", "b": ""}]


def test_csv_grows_columns_and_keeps_old_rows(tmp_path: Path) -> None:
    logger = log(tmp_path, (1, {"a": 1.0}))
    logger.log_metrics({"b": 2.0}, 2)
    logger.save()
    logger.log_metrics({"a": 3.0, "b": 4.0}, 3)
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,1.0,\n2,,2.0\n3,3.0,4.0\n"
    assert names(tmp_path) == ["metrics.csv"]


def test_csv_goes_on_in_an_earlier_file(tmp_path: Path) -> None:
    log(tmp_path, (1, {"a": 1.0, "b": 5.0}), (2, {"a": 2.0}))
    log(tmp_path, (3, {"b": 3.0, "c": 4.0}))
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b,c\n1,1.0,5.0,\n2,2.0,,\n3,,3.0,4.0\n"


def test_csv_drops_what_a_resumed_run_writes_again_and_keeps_the_old_file(tmp_path: Path) -> None:
    log(tmp_path, *[(s, {"a": float(s)}) for s in (10, 20, 30, 40)])
    before = (tmp_path / "metrics.csv").read_text()
    log(tmp_path, (30, {"a": 0.5}), (40, {"a": 0.25}), resume_step=20)
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n10,10.0\n20,20.0\n30,0.5\n40,0.25\n"
    assert (tmp_path / "metrics-1.csv").read_text() == before
    log(tmp_path, (40, {"a": 7.0}), resume_step=30)
    assert names(tmp_path) == ["metrics-1.csv", "metrics-2.csv", "metrics.csv"]


def test_csv_resumed_at_its_end_keeps_every_row_in_place(tmp_path: Path) -> None:
    log(tmp_path, (10, {"a": 1.0}), (20, {"a": 2.0}))
    log(tmp_path, (30, {"a": 3.0}), resume_step=20)
    assert [r["step"] for r in rows(tmp_path)] == ["10", "20", "30"]
    assert names(tmp_path) == ["metrics.csv"]


def test_csv_resumed_before_its_first_row_starts_anew(tmp_path: Path) -> None:
    log(tmp_path, (10, {"a": 1.0}), (20, {"a": 2.0}))
    log(tmp_path, (10, {"b": 3.0}), resume_step=0)
    assert (tmp_path / "metrics.csv").read_text() == "step,b\n10,3.0\n"
    assert len(rows(tmp_path, "metrics-1.csv")) == 2


@pytest.mark.parametrize("cut", ["30,0", "30,0.12", "30", "30,", "3"])
def test_csv_leaves_out_a_line_that_was_cut_off(tmp_path: Path, cut: str) -> None:
    """A killed run's last line has no end; whatever it holds is not a value."""
    (tmp_path / "metrics.csv").write_text("step,a\n10,1.0\n20,2.0\n" + cut)
    assert [r["step"] for r in rows(tmp_path)] == ["10", "20"]


@pytest.mark.parametrize("cut", ["30,0.12", "30,", "30"])
@pytest.mark.parametrize("resume_step", [None, 20])
def test_csv_does_not_write_on_in_a_line_that_was_cut_off(tmp_path: Path, cut: str, resume_step: int | None) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n10,1.0\n20,2.0\n" + cut)
    log(tmp_path, (30, {"a": 0.5}), (40, {"a": 0.25}), resume_step=resume_step)
    assert [(r["step"], r["a"]) for r in rows(tmp_path)] == [
        ("10", "1.0"),
        ("20", "2.0"),
        ("30", "0.5"),
        ("40", "0.25"),
    ]


def test_csv_writes_nothing_before_there_is_something(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "run")
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "run").exists()
    assert (logger.name, logger.version) == ("csv", "run")


def test_csv_flushes_by_itself(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path, flush_seconds=-1.0)
    logger.log_metrics({"a": 1.0}, 1)
    assert len(rows(tmp_path)) == 1
    patient = MetricsCSV(tmp_path / "other", flush_seconds=1e9)
    patient.log_metrics({"a": 1.0}, 1)
    assert not (tmp_path / "other").exists()


# run folders


def make_run(root: Path, name: str, *checkpoints: str, when: float | None = None) -> Path:
    folder = root / "toy" / "quick" / name / "checkpoints"
    folder.mkdir(parents=True)
    for c in checkpoints:
        torch.save({"toy": {}, "state_dict": {"w": torch.zeros(50)}}, folder / c)
    if when is not None:
        for p in (*folder.iterdir(), folder, folder.parent):
            os.utime(p, (when, when))
    return folder.parent


@pytest.fixture(autouse=True)
def _no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)


def test_version_numbers(tmp_path: Path) -> None:
    assert new_run(tmp_path, "toy", "quick", None) == RunFolder(tmp_path, "toy", "quick", "version_0")
    assert not (tmp_path / "toy").exists()
    for name in ("version_0", "version_2", "version_10", "version_x", "named", "version_99.bak"):
        make_run(tmp_path, name)
    (tmp_path / "toy" / "quick" / "version_50").write_text("a file")
    assert versions(tmp_path / "toy" / "quick") == [0, 2, 10]
    assert new_run(tmp_path, "toy", "quick", None).name == "version_11"
    assert new_run(tmp_path, "toy", "other", None).name == "version_0"


def test_paths() -> None:
    run = RunFolder(Path("logs"), "toy", "quick", "a")
    assert run.path == Path("logs/toy/quick/a")
    assert run.checkpoints == Path("logs/toy/quick/a/checkpoints")
    assert run.figures == Path("logs/toy/quick/a/figures")
    assert not run.used


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "mine", "last.ckpt")
    with pytest.raises(ToyError, match=r"--run\.name: 'mine' is taken"):
        new_run(tmp_path, "toy", "quick", "mine")
    assert new_run(tmp_path, "toy", "quick", "yours").name == "yours"


def test_a_sweeps_mark_alone_is_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "quick" / "cell"
    assert not holds_run(folder)
    folder.mkdir(parents=True)
    assert not holds_run(folder)
    (folder / SWEEP_MARK).write_text("{}")
    assert not holds_run(folder)
    assert new_run(tmp_path, "toy", "quick", "cell").name == "cell"
    (folder / "config.yaml").write_text("")
    assert holds_run(folder)


def test_a_child_process_uses_its_parents_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "version_3", "last.ckpt")
    monkeypatch.setenv(RUN_VARIABLE, "version_3")
    assert new_run(tmp_path, "toy", "quick", None).name == "version_3"


def test_find_run_takes_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path, "version_0", "last.ckpt", when=3000)
    make_run(tmp_path, "version_1", "last.ckpt", when=1000)
    make_run(tmp_path, "named", "last.ckpt", when=2000)
    (tmp_path / "toy" / "quick" / "version_9").mkdir()  # no checkpoint
    assert find_run(tmp_path, "toy", "quick", None).name == "version_0"
    os.utime(tmp_path / "toy" / "quick" / "version_1" / "checkpoints" / "last.ckpt", (4000, 4000))
    assert find_run(tmp_path, "toy", "quick", None).name == "version_1"
    assert find_run(tmp_path, "toy", "quick", "named") == RunFolder(tmp_path, "toy", "quick", "named")


def test_find_run_errors(tmp_path: Path) -> None:
    with pytest.raises(ToyError, match=r"--ckpt_path: no run with a checkpoint in .*quick"):
        find_run(tmp_path, "toy", "quick", None)
    make_run(tmp_path, "long_run", "last.ckpt")
    with pytest.raises(ToyError, match=r"--run\.name: no run 'lnog_run' .*did you mean 'long_run'"):
        find_run(tmp_path, "toy", "quick", "lnog_run")


def test_resolve_last_and_best(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "version_0", "last.ckpt", when=1000)
    make_run(tmp_path, "version_1", "last.ckpt", "best.ckpt", when=2000)
    path, run = resolve_checkpoint("best", tmp_path, "toy", "quick", None)
    assert (path, run.name) == (run.checkpoints / "best.ckpt", "version_1")
    path, run = resolve_checkpoint("last", tmp_path, "toy", "quick", "version_0")
    assert (path, run.path) == (folder / "checkpoints" / "last.ckpt", folder)
    with pytest.raises(ToyError, match=r"--ckpt_path: no best\.ckpt .*\['last\.ckpt'\].*--data\.holdout"):
        resolve_checkpoint("best", tmp_path, "toy", "quick", "version_0")


def test_resolve_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "logs", "version_0", "last.ckpt")
    found, run = resolve_checkpoint(str(folder / "checkpoints" / "last.ckpt"), Path("elsewhere"), "x", "y", None)
    assert found == folder / "checkpoints" / "last.ckpt"
    assert run == RunFolder((tmp_path / "logs").resolve(), "toy", "quick", "version_0")
    monkeypatch.chdir(folder)
    _, run = resolve_checkpoint("checkpoints/last.ckpt", Path("elsewhere"), "x", "y", None)
    assert run.path == folder.resolve()
    foreign = tmp_path / "mine.ckpt"
    foreign.write_bytes(b"")
    assert resolve_checkpoint(str(foreign), tmp_path, "x", "y", None)[1] == RunFolder(tmp_path, "x", "y", "mine")
    assert resolve_checkpoint(str(foreign), tmp_path, "x", "y", "named")[1].name == "named"


def test_a_path_is_gone_on_with_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part that the user gives beats the checkpoint's own folder; what is only a default does not."""
    folder = make_run(tmp_path, "version_0", "last.ckpt")
    word, home = str(folder / "checkpoints" / "last.ckpt"), RunFolder(tmp_path.resolve(), "toy", "quick", "version_0")
    settings = (Path("elsewhere"), "toy", "other", "fork")
    for given, expected in (
        ((), home),
        (("name",), replace(home, name="fork")),
        (("variant",), replace(home, variant="other")),
        (("root",), replace(home, root=Path("elsewhere"))),
        (("root", "variant", "name"), RunFolder(Path("elsewhere"), "toy", "other", "fork")),
    ):
        assert resolve_checkpoint(word, *settings, given)[1] == expected
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(word, Path(), "toy", "quick", "version_0", ("root", "variant", "name"))[1] == home


def test_resolve_a_missing_path(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "version_0", "last.ckpt") / "checkpoints"
    with pytest.raises(ToyError, match=r"--ckpt_path: no file .*did you mean .*last\.ckpt") as error:
        resolve_checkpoint(str(folder / "lats.ckpt"), tmp_path, "toy", "quick", None)
    assert "\n" not in str(error.value)
    with pytest.raises(ToyError, match=r"--ckpt_path: no file 'no/such.ckpt'; give last, best or a path"):
        resolve_checkpoint("no/such.ckpt", tmp_path, "toy", "quick", None)


# checkpoints


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("sprung",)


def refused(path: Path) -> str:
    with pytest.raises(ToyError, match="--ckpt_path: ") as error:
        read_checkpoint(path)
    text = str(error.value)
    assert "\n" not in text
    assert path.name in text
    return text


def test_read_checkpoint(tmp_path: Path) -> None:
    path = make_run(tmp_path, "version_0", "last.ckpt") / "checkpoints" / "last.ckpt"
    found = read_checkpoint(path)
    assert set(found) == {"toy", "state_dict"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_a_line(tmp_path: Path, share: float) -> None:
    path = make_run(tmp_path, "version_0", "last.ckpt") / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "cannot be read as a checkpoint" in refused(path)


def test_a_foreign_file_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert "cannot be read as a checkpoint" in refused(path)
    path.write_text("lr: 0.1\n")
    refused(path)
    refused(tmp_path)  # a folder


def test_another_projects_checkpoint_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(3)):
        torch.save(content, path)
        assert "is not a checkpoint of lightning_toys" in refused(path)


def test_no_code_is_run_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trap.ckpt"
    torch.save({"toy": Trap()}, path)
    refused(path)
    path.write_bytes(pickle.dumps({"toy": Trap()}))
    refused(path)
    assert not (tmp_path / "sprung").exists()


def test_csv_keeps_one_row_a_step_whenever_it_is_flushed(tmp_path: Path) -> None:
    """The same file, however long the run took between two metrics of a step."""
    eager, patient = MetricsCSV(tmp_path / "eager", flush_seconds=-1.0), MetricsCSV(tmp_path / "patient")
    for logger in (eager, patient):
        for step, metrics in ((1, {"a": 1.0, "b": 0.0}), (2, {"a": 2.0}), (2, {"b": 3.0}), (3, {"a": 4.0})):
            logger.log_metrics(metrics, step)
        logger.save()
    assert (tmp_path / "eager" / "metrics.csv").read_text() == (tmp_path / "patient" / "metrics.csv").read_text()
    # a resumed run adds to the row of the step it goes on from; another verb has a row of its own
    log(tmp_path / "eager", (3, {"b": 5.0}), resume_step=3)
    assert rows(tmp_path / "eager")[-1] == {"step": "3", "a": "4.0", "b": "5.0"}
    log(tmp_path / "eager", (3, {"b": 6.0}))
    assert [r["b"] for r in rows(tmp_path / "eager")[-2:]] == ["5.0", "6.0"]


def test_other_loggers_are_shown_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what those packages are asked; with the packages themselves it was tried by hand."""
    from types import SimpleNamespace

    from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, WandbLogger

    from lightning_toys.plotting import new_figure
    from lightning_toys.training.reporting import SHOWING, show

    asked: list[tuple[Any, ...]] = []
    experiment = SimpleNamespace(log_figure=lambda *words, **more: asked.append((*words, more)))
    for kind in (MLFlowLogger, CometLogger):
        monkeypatch.setattr(kind, "experiment", experiment)
    monkeypatch.setattr(MLFlowLogger, "run_id", "r")
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, *words: asked.append(words))
    figure, axes = new_figure(size=(2, 1))
    axes[0, 0].plot([0, 1])
    for kind in (MLFlowLogger, CometLogger, WandbLogger, CSVLogger):
        show(object.__new__(kind), "fit/errors", figure, 7)
    assert asked[0] == ("r", figure, "fit/errors-7.png", {})
    assert asked[1] == ("fit/errors", figure, {"step": 7})
    name, (pixels,), step = asked[2]
    assert (name, step, pixels.shape) == ("fit/errors", 7, (100, 200, 4))
    assert len(set(pixels[..., 0].flat)) > 2  # it is drawn
    assert len(asked) == 3
    assert CSVLogger not in SHOWING


def test_notes_of_a_block_that_ends_with_an_error_are_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    @notes_held()
    def says(fails: bool) -> None:
        note("unused weights")
        assert capsys.readouterr().err == ""
        require(not fails, "refused")

    with pytest.raises(ToyError):
        says(fails=True)
    assert capsys.readouterr().err == ""
    says(fails=False)
    assert capsys.readouterr().err == "unused weights\n"
