"""A module in a script: `Trainer.fit(model, datamodule)` does what the command line does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_toys.errors import NonFiniteError, ToyError
from lightning_toys.flow_vs_regression import FlowVsRegression, InterpolationData
from lightning_toys.generative_policy import MeanFlowPolicy, MixtureData
from lightning_toys.mirror_descent import LinearGaussian, Settings, TiltedSampling
from lightning_toys.nets import Network, ReplicaLinear
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.module import ToyModule
from lightning_toys.training.progress import WorkProgress
from lightning_toys.training.progress_bar import Progress
from lightning_toys.training.results import Report, checked_report, is_main
from lightning_toys.training.validation_clock import crossed, validation_interval
from tests.conftest import Runner


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _from_the_repository: None) -> None:
    monkeypatch.chdir(tmp_path)


def flow(**settings: Any) -> FlowVsRegression:
    return FlowVsRegression("flow", **{"seeds": [3, 5], "network": Network(hidden=8), **settings})


def data() -> InterpolationData:
    return InterpolationData(num_eval=50)


def trainer(**settings: Any) -> Trainer:
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_steps": 120, **quiet, **settings})


def test_the_report_is_the_trained_networks(runner: Runner) -> None:
    """Numbers of a script are those of the command line, bit for bit, before and after training."""
    module, t = flow(), trainer()
    t.fit(module, data())
    assert module.last_report is not None
    assert t.global_step == 120
    runner.ok("fit", "flow", "--model.seeds", "[3,5]", "--model.network.hidden", "8", "--trainer.max_steps", "120",
              "--data.num_eval", "50", "--model.evaluation", "{}", "--model.evaluation.solver", "euler",
              "--model.evaluation.nfe", "1")  # fmt: skip
    stored = json.loads((runner.folder("flow") / "results.json").read_text())
    assert module.last_report.metrics["l2"] == stored["metrics"]["l2"]["values"]
    untrained = flow()
    trainer().validate(untrained, data(), verbose=False)
    assert untrained.last_report is not None
    assert untrained.last_report.metrics["l2"] != module.last_report.metrics["l2"]


def test_metrics_reach_the_trainer() -> None:
    module, t = flow(), trainer()
    t.fit(module, data())
    report = module.last_report
    assert report is not None
    found = {k: float(v) for k, v in t.callback_metrics.items()}
    assert found["eval/l2"] == pytest.approx(sum(report.metrics["l2"]) / 2)
    assert {"eval/l1", "eval/l2", "train/loss"} <= found.keys()
    (tested,) = t.test(module, data(), verbose=False)
    report = module.last_report
    assert report is not None
    assert set(tested) == {"test/l1", "test/l2"}
    assert tested["test/l2"] == pytest.approx(sum(report.metrics["l2"]) / 2)
    assert float(t.callback_metrics["test/l2"]) == pytest.approx(tested["test/l2"])
    assert "l2@gaussian/euler-4" in report.metrics
    (validated,) = t.validate(module, data(), verbose=False)
    assert set(validated) == {"eval/l1", "eval/l2"}


def test_the_clock_counts_optimiser_steps() -> None:
    """ModelCheckpoint writes at every validation, at optimiser steps, though a Trainer batch holds 30 of them."""
    save = ModelCheckpoint(dirpath="kept", monitor="eval/l2", filename="{step}", save_top_k=-1)
    trainer(callbacks=[save], val_check_interval=30).fit(flow(), data())
    assert {p.name for p in Path("kept").iterdir()} == {f"step={n}.ckpt" for n in (30, 60, 90, 120)}


@pytest.mark.parametrize(
    ("interval", "steps"), [(1.0, [120]), (0.5, [60, 120]), (0.25, [30, 60, 90, 120]), (50, [50, 100, 120])]
)
def test_intervals(interval: float, steps: list[int]) -> None:
    seen: list[int] = []

    class Watched(FlowVsRegression):
        def validation_step(self, grid: torch.Tensor, batch_idx: int) -> None:
            super().validation_step(grid, batch_idx)
            if not self.trainer.sanity_checking:
                seen.append(self.global_step)

    module = Watched("flow", seeds=[0], network=Network(hidden=4))
    trainer(val_check_interval=interval).fit(module, data())
    assert seen == steps


def test_the_clock_by_itself() -> None:
    assert [n for n in range(1, 13) if crossed(n - 1, n, 4)] == [4, 8, 12]
    assert crossed(3, 9, 4)
    assert not crossed(4, 7, 4)
    assert validation_interval(trainer(val_check_interval=7)) == 7
    assert validation_interval(trainer(val_check_interval=1.0)) == 0
    with pytest.raises(ToyError, match="val_check_interval: a time is not allowed"):
        trainer(val_check_interval="00:00:10:00").fit(flow(), data())


def test_early_stopping_stops() -> None:
    module = flow(lr=1e-12)  # nothing gets better
    t = trainer(callbacks=[EarlyStopping("eval/l2", patience=2, min_delta=0.1)], val_check_interval=10, max_steps=1000)
    t.fit(module, data())
    assert t.global_step == 30


def test_a_monitor_that_is_not_measured_is_refused() -> None:
    with pytest.raises(
        ToyError, match=r"'eval/l3' of EarlyStopping is not measured; give one of .*did you mean 'eval/l"
    ):
        trainer(callbacks=[EarlyStopping("eval/l3")]).fit(flow(), data())


def test_resume_is_bitwise(bitwise: Callable[..., None]) -> None:
    for name, steps, start in (("whole", 120, None), ("cut", 70, None), ("resumed", 120, "cut.ckpt")):
        t = trainer(max_steps=steps, enable_checkpointing=False)
        t.fit(flow(ema_decay=0.9), data(), ckpt_path=start, weights_only=True)
        t.save_checkpoint(f"{name}.ckpt")
    a, b = (torch.load(f"{n}.ckpt", weights_only=True) for n in ("whole", "resumed"))
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(a[key], b[key], key)


def test_a_loaded_module_predicts_and_goes_on() -> None:
    module, t = flow(), trainer()
    t.fit(module, data())
    t.save_checkpoint("a.ckpt")
    c = torch.linspace(0, 1, 7).unsqueeze(1)
    again = FlowVsRegression.load_from_checkpoint("a.ckpt")
    assert torch.equal(again(c), module(c))
    assert again(c).shape == (2, 7, 1)
    (first,) = t.test(module, data(), verbose=False)
    (second,) = trainer().test(again, data(), verbose=False)
    assert first == second


def test_doubles_stay_doubles() -> None:
    t = trainer(precision="64-true", max_steps=3)
    t.fit(flow(), data())
    t.save_checkpoint("double.ckpt")
    again = FlowVsRegression.load_from_checkpoint("double.ckpt")
    stored = torch.load("double.ckpt", weights_only=True)["state_dict"]
    assert {v.dtype for k, v in stored.items() if k.startswith("net.")} == {torch.float64}
    for name, value in again.state_dict().items():
        assert torch.equal(value.double(), stored[name].double()), name


def test_files_go_to_the_trainers_folders(tmp_path: Path) -> None:
    """Snapshots of a policy lie beside the logger's files; nothing lands in the working folder."""
    module = MeanFlowPolicy(seeds=[0], network=Network(hidden=8), optimizer="adamw")
    module.evaluation.samples, module.evaluation.pairs = 100, 50
    logger = CSVLogger("logs", name="mine", version="one")
    trainer(logger=logger, max_steps=4, val_check_interval=2).fit(module, MixtureData(batch_size=16))
    assert module.run_folder == Path("logs/mine/one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "logs"] or sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["logs"]
    assert (tmp_path / "logs/mine/one/metrics.csv").exists()
    with pytest.raises(ToyError, match="run_folder: there is none before a Trainer runs the module"):
        _ = flow().run_folder


def test_a_test_is_logged_at_the_step_that_was_trained_to() -> None:
    """Whichever Trainer tests: the weights' step, not that of a checkpoint which they were once read from."""
    module, t = flow(), trainer(max_steps=20, enable_checkpointing=False)
    t.fit(module, data())
    t.save_checkpoint("a.ckpt")
    again = FlowVsRegression.load_from_checkpoint("a.ckpt")
    trainer(max_steps=30, enable_checkpointing=False).fit(again, data())
    for name, tested, step in (("first", module, "20"), ("again", again, "30")):
        trainer(logger=CSVLogger(".", name, "")).test(tested, data(), verbose=False)
        rows = [r for r in read_csv(Path(name, "metrics.csv")) if r.get("replicas/test/l2/seed_3")]
        assert [r["step"] for r in rows] == [step]


def sampling() -> TiltedSampling:
    return TiltedSampling([0], ["mala"], chains=100, settings=Settings(mcmc_steps=3), sweep_max_refresh=0)


def test_no_file_is_written_where_nothing_is_logged(tmp_path: Path) -> None:
    module = MeanFlowPolicy(seeds=[0], network=Network(hidden=8))
    module.evaluation.samples, module.evaluation.pairs = 100, 50
    t = trainer(max_steps=4, val_check_interval=2, enable_checkpointing=False)
    t.fit(module, MixtureData(batch_size=16))
    assert module.figure_data is not None
    sampler = sampling()
    trainer().test(sampler, LinearGaussian(), verbose=False)
    assert sampler.last_report is not None
    assert list(tmp_path.iterdir()) == []
    logger = CSVLogger("logs", version="one")
    trainer(logger=logger).test(sampling(), LinearGaussian(), verbose=False)
    assert Path("logs/lightning_logs/one/facts.md").exists()


def test_results_are_told_on_the_command_line_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """A script reads them; standard error is for what asks for attention."""
    t = trainer(logger=CSVLogger("logs"))
    t.test(sampling(), LinearGaussian(), verbose=False)
    assert "|" not in capfd.readouterr().err
    command_line = sampling()
    command_line.run_path = Path("run")
    trainer().test(command_line, LinearGaussian(), verbose=False)
    assert "| mala | mean |" in capfd.readouterr().err


@pytest.mark.parametrize("enabled", [True, False])
def test_sampling_shows_progress_as_the_trainer_says(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []

    class Work(WorkProgress):
        def __init__(self, total: int, what: str, shown_here: bool = True) -> None:
            super().__init__(total, what, shown_here)
            shown.append(shown_here)

    monkeypatch.setattr("lightning_toys.mirror_descent.module.WorkProgress", Work)
    trainer(enable_progress_bar=enabled).test(sampling(), LinearGaussian(), verbose=False)
    assert shown == [enabled]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"precision": "bf16-true", "only": ("32-true",)}, "--trainer.precision: 'bf16-true' is not allowed here"),
        ({"limit_train_batches": 3}, "--trainer.overfit_batches, --trainer.limit_train_batches: not allowed"),
        ({"overfit_batches": 1}, "--trainer.overfit_batches, --trainer.limit_train_batches: not allowed"),
        ({"callbacks": [LearningRateMonitor()], "logger": True}, "LearningRateMonitor is not allowed, it would"),
    ],
)  # fmt: skip
def test_a_trainer_that_would_do_something_else_is_refused(settings: dict[str, Any], says: str) -> None:
    module = flow()
    if only := settings.pop("only", None):
        module.precisions = only
    with pytest.raises(ToyError) as refused:
        trainer(**settings).fit(module, data())
    assert str(refused.value).startswith(says) or says in str(refused.value)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_bare_loader_is_refused() -> None:
    with pytest.raises(
        ToyError, match=r"a data module is missing \(a DataLoader alone is none\); give InterpolationData"
    ):
        trainer(max_steps=3, limit_val_batches=0).fit(flow(), DataLoader(torch.zeros(8, 1)))
    with pytest.raises(ToyError, match="--data: MixtureData is not allowed; give InterpolationData"):
        trainer(max_steps=3).fit(flow(), MixtureData())


@pytest.mark.parametrize("bar", [None, RichProgressBar])
def test_the_bar_counts_optimiser_steps(bar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's own bar, which would count blocks, makes way for one of steps."""
    seen: list[tuple[int, int]] = []
    true_end = Progress.on_train_batch_end

    def end(self: Progress, t: Trainer, *args: Any) -> None:
        true_end(self, t, *args)
        seen.append((t.global_step, t.max_steps))

    monkeypatch.setattr(Progress, "on_train_batch_end", end)
    t = trainer(enable_progress_bar=True, callbacks=[bar()] if bar else [])
    t.fit(flow(), data())
    assert seen[-1] == (120, 120)
    assert t.progress_bar_callback is None
    t.test(flow(), data(), verbose=False)  # with another module: nothing is left over


def test_a_non_finite_training_stops() -> None:
    with pytest.raises(NonFiniteError, match=r"at step \d+ in the replicas of seeds"):
        trainer(max_steps=50).fit(flow(lr=1e30), data())


def test_best_weights_and_holdout_monitors() -> None:
    module = FlowVsRegression("regression", seeds=[0, 1], network=Network(hidden=8))
    save = ModelCheckpoint(dirpath="kept", monitor="holdout/l2", save_top_k=1)
    t = trainer(callbacks=[save], val_check_interval=40)
    t.fit(module, InterpolationData(num_eval=50, holdout=0.2))
    assert len(list(Path("kept").iterdir())) == 1
    assert math.isfinite(float(t.callback_metrics["holdout/l2"]))


def test_a_scripts_runs_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """ResultsWriter and FigureWriter make a script's folders runs that `compare` reads, labelled by what differs."""
    from lightning_toys.cli import main
    from lightning_toys.training.reporting import FigureWriter, ResultsWriter

    for mode in ("regression", "flow"):
        module = FlowVsRegression(mode, seeds=[3, 5], network=Network(hidden=8))  # type: ignore[arg-type]
        logger = CSVLogger("logs", name=mode, version="one")
        t = trainer(logger=logger, max_steps=20, callbacks=[ResultsWriter(), FigureWriter(dpi=20)])
        t.fit(module, data())
        t.test(module, data(), verbose=False)
        folder = Path("logs") / mode / "one"
        assert json.loads((folder / "results.json").read_text())["stage"] == "test"
        assert json.loads((folder / "results-1.json").read_text())["stage"] == "fit"
        assert (folder / "figures" / "predictions.png").exists()
    capsys.readouterr()
    assert main(["compare", "logs"]) == 0
    said = capsys.readouterr().out
    assert "flow" in said
    assert "regression" in said
    assert "paired by seed: run minus flow" in said


class Spring(ToyModule):
    """The smallest module: a number a replica."""

    experiment = "spring"
    headline = ("error",)

    def __init__(self, found: Any = None, headline: tuple[str, ...] = ("error",)) -> None:
        super().__init__([0, 1])
        self.found, self.headline = found, headline

    def measure(self, data: Any) -> dict[str, Any]:
        return {"inputs": 1}

    def build(self) -> torch.nn.Module:
        return ReplicaLinear(self.local_seeds, "line", 1, 1)

    def replica_losses(self, batch: Any, step: int) -> torch.Tensor:
        c, x1 = batch.columns
        errors: torch.Tensor = self.net(c) - x1
        return errors.square().sum((1, 2)) / batch.total

    def report(self, stage: str) -> Report:
        return Report(self.seeds, {"error": self.found})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


@pytest.mark.parametrize(
    ("found", "headline", "says"),
    [
        (0.5, ("error",), "Spring.report: metric 'error' is float 0.5; give a list of 2 numbers, one a seed"),
        ([0.5], ("error",), r"Spring.report: metric 'error' is list \[0.5\]; give a list of 2 numbers"),
        (["a", "b"], ("error",), "give a list of 2 numbers, one a seed"),
        ([1, 2], ("eror",), "Spring.headline: 'eror' is not among the metrics of report; did you mean 'error'?"),
    ],
)
def test_a_report_that_is_none(found: Any, headline: tuple[str, ...], says: str) -> None:
    with pytest.raises(ToyError, match=says):
        trainer(max_steps=2).validate(Spring(found, headline), data(), verbose=False)


def test_a_report_may_hold_tensors() -> None:
    module = Spring(torch.tensor([1.0, 3.0]))
    (found,) = trainer().validate(module, data(), verbose=False)
    assert found == {"eval/error": 2.0}
    assert module.last_report is not None
    assert module.last_report.metrics["error"] == [1.0, 3.0]


def test_a_metric_whose_name_has_mode_or_dim_in_it() -> None:
    """``_mode0`` and ``_dim1`` are of a single mode and output; ``found_modes`` is of the whole."""
    names = ("found_modes", "mid_dimming", "share_mode", "error_dim0x", "error_mode0", "error_dim12", "error@zeros")
    assert [n for n in names if is_main(n)] == [*names[:4]]
    report = Report([0, 1], {name: [1.0, 3.0] for name in names})
    assert checked_report(report, "Spring", names[:4]).means("test") == {f"test/{n}": 2.0 for n in names[:4]}
    for name in names[4:]:
        with pytest.raises(ToyError, match=f"'{name}' is a metric of a single readout, output or mode"):
            checked_report(report, "Spring", (name,))


class FoundModes(Spring):
    """A module whose headline has a mode in its name, and is not always finite."""

    def __init__(self, found: list[list[float]]) -> None:
        super().__init__()
        self.headline, self.finds = ("found_modes",), found

    def report(self, stage: str) -> Report:
        return Report(self.seeds, {"found_modes": self.finds.pop(0)})


def test_such_a_metric_is_returned_and_monitored() -> None:
    watch = EarlyStopping("eval/found_modes", patience=100)
    t = trainer(max_steps=20, val_check_interval=10, callbacks=[watch], num_sanity_val_steps=0)
    module = FoundModes([[1.0, 2.0]] * 3)
    t.fit(module, data())
    assert float(t.callback_metrics["eval/found_modes"]) == 1.5
    assert t.test(module, data(), verbose=False) == [{"test/found_modes": 1.5}]


def test_a_fit_whose_last_validation_is_not_finite_ends_with_an_error() -> None:
    """What a validation before it was is past: a solver may fail on a network that has not learned yet."""
    wanted = "the results of fit's last validation are not finite: found_modes in the replicas of seeds .1.$"
    settings: dict[str, Any] = {"max_steps": 20, "val_check_interval": 10, "num_sanity_val_steps": 0}
    settings["enable_checkpointing"] = False
    with pytest.raises(NonFiniteError, match=wanted):
        trainer(**settings).fit(FoundModes([[1.0, 2.0], [1.0, math.nan]]), data())
    trainer(**settings).fit(FoundModes([[1.0, math.nan], [1.0, 2.0]]), data())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_what_a_module_of_ones_own_cannot_do() -> None:
    with pytest.raises(ToyError, match="predict: Spring has no predict_step; call the module, or give it one"):
        trainer().predict(Spring([1, 2]), data())
    with pytest.raises(ToyError, match="training data: a Tensor is no block of steps; give a data module with ToyData"):
        trainer(max_steps=2).fit(Spring([1, 2]), DataLoader(torch.zeros(8, 1)))


@pytest.mark.parametrize(
    ("mode", "seeds", "says"),
    [
        ("flwo", [0], "--model.mode: 'flwo' is not allowed; give one of regression, .*; did you mean 'flow'?"),
        ("flow", 3, r"--model.seeds: 3 is not allowed; give a list of integers, such as .0.$"),
        ("flow", [0.5], "--model.seeds: .* is not allowed; give a list of integers"),
    ],
)
def test_constructors_refuse_what_the_command_line_does(mode: Any, seeds: Any, says: str) -> None:
    with pytest.raises(ToyError, match=says):
        FlowVsRegression(mode, seeds=seeds)
