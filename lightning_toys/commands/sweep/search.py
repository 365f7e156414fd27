"""sweep --search: Optuna chooses the flags of each trial; trials are cells, run and resumed like a grid's.

The driver alone speaks to Optuna: it asks before a trial begins and tells it of the end. The study is search.db.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_toys.commands.sweep.cell import (
    COMMON,
    Cell,
    Plan,
    Task,
    fingerprint,
    is_settled,
    metrics,
    read_mark,
    stacked,
    write_mark,
)
from lightning_toys.commands.sweep.samplers import pruner_of, sampler_of
from lightning_toys.commands.sweep.search_space import corners, distribution, words
from lightning_toys.commands.trainer.arguments import without
from lightning_toys.commands.trainer.toys_cli import run_trainer
from lightning_toys.errors import NonFiniteError, ToyError, did_you_mean, note
from lightning_toys.stats import format_estimate, holm, mean_ci, paired_difference
from lightning_toys.training.files import set_aside, write_atomic
from lightning_toys.training.ownership import HeldError, acquire, last_record
from lightning_toys.training.results import limits_in


def trials(settings: dict[str, Any], first: Task) -> list[Task]:
    """Return the trials as cells, whose flags are chosen when they begin."""
    names = [f"trial-{k:04d}" for k in range(settings["trials"])]
    return [Task(Cell(n, ()), first.folder.parent / n, first.trains) for n in names]


class Search:
    """A search's state: a study in search.db, which one driver at a time reads and writes. A context manager.

    Args:
        plan: the trials, with the settings of the search.
    """

    def __init__(self, plan: Plan) -> None:
        assert plan.search is not None
        self.plan, self.settings = plan, plan.search
        self.folder = plan.tasks[0].folder.parent
        self.metric = str(self.settings["metric"])
        self.prunes = self.settings["pruner"] != "none"
        self.told: set[str] = set()
        self.sampler: Any = None
        self.opened: Any = None
        self.stack = contextlib.ExitStack()

    # the study

    def study(self) -> Any:
        """Open the study, and keep other drivers out of it until the end.

        Raises:
            ToyError: another driver has it, or it is of a search with other settings.
        """
        if self.opened is None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.ERROR)
            try:
                self.stack.enter_context(acquire(self.folder / COMMON))
            except HeldError:
                who = last_record(self.folder / COMMON).who
                raise ToyError(
                    f"--run.variant: {self.folder} is searched by {who}; wait until it has ended, or give another "
                    "--run.variant"
                ) from None
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{(self.folder / 'search.db').resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            self.stack.callback(storage.engine.dispose)
            self.stack.callback(storage.remove_session)
            study = optuna.create_study(
                storage=storage, study_name="search", direction=self.settings["direction"], load_if_exists=True
            )
            usual = {"sampler": "tpe", "pruner": "none"}  # of searches that knew no others
            same = {k: v for k, v in self.settings.items() if k != "trials" and usual.get(k) != v}
            asked = {"settings": same, "flags": fingerprint(self.plan.base, Cell("", ()))}
            if study.user_attrs.get("search", asked) != asked:
                raise ToyError(
                    f"--run.variant: {self.folder} was searched with other settings; give another --run.variant"
                )
            if "search" not in study.user_attrs:
                study.set_user_attr("search", asked)
            self.opened = study
        return self.opened

    def __enter__(self) -> Search:
        """Refuse a folder of another search, and a metric that no trial will have, before any work.

        Raises:
            ToyError: either is the case.
        """
        try:
            if (self.folder / "search.db").exists():
                self.study()
            known = next((t.folder for t in self.plan.tasks if (t.folder / "results.json").exists()), None)
            names = list(metrics(known)) if known else self.rehearse()
            if names and self.metric not in names:
                raise self.unknown(names)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close search.db, and let others drive the search."""
        self.stack.close()

    def unknown(self, names: Sequence[str]) -> ToyError:
        """Return the error of a metric that there is not."""
        main = [n for n in names if "@" not in n] or names
        return ToyError(
            f"--search.metric: no {self.metric!r} in results.json; give one of {', '.join(main)}"
            f"{did_you_mean(self.metric, names)}"
        )

    def rehearse(self) -> list[str]:
        """Take one step and return the names of the metrics that come of it; none where that does not work out."""
        task = self.plan.tasks[0]
        if not task.trains:  # a test without training would be a whole trial
            return []
        with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()):
            cell = corners(self.settings["space"])[0]
            flags = ["--trainer.max_steps", "1", "--trainer.logger", "false", "--figures.enabled", "false"]
            line = [*stacked(self.plan.base, cell), *flags, "--run.root", root, "--run.name", "rehearsal"]
            names: list[str] = []
            with contextlib.suppress(ToyError, NonFiniteError):
                for verb in (["fit"], ["test", "--ckpt_path", "last"]):
                    run_trainer([verb[0], *line, *verb[1:]])
                    names = list(metrics(next(Path(root).rglob("results.json")).parent))
                    if self.metric in names:
                        break
        return names

    # trials

    def choose(self, task: Task) -> Cell:
        """Return a trial with its flags: those it was started with, or new ones of Optuna's."""
        if "params" not in read_mark(task.folder):
            study = self.study()
            self.tell(study)
            index = int(task.cell.name.rpartition("-")[2])
            study.sampler = self.sampler = sampler_of(self.settings, index, len(study.trials), self.sampler)
            try:
                trial = study.ask({k: distribution(a) for k, a in self.settings["space"].items()})
            except ImportError as error:
                lacks = error.name or str(error)
                raise ToyError(f"--search.sampler: {lacks} is not installed; pip install {lacks}") from None
            write_mark(task.folder, {"trial": trial.number, "params": trial.params})
        flags = words(read_mark(task.folder)["params"])
        note(f"{task.cell.name}: {shlex.join(flags)}")
        return Cell(task.cell.name, tuple(flags))

    def prune(self, name: str, step: int, value: float) -> bool:
        """Take note of a trial's validation; return whether it is to stop there."""
        import optuna

        if not math.isfinite(value):  # the trial will end by itself
            return False
        study = self.study()
        if "first_validation" not in study.user_attrs:
            study.set_user_attr("first_validation", step)
        study.pruner = pruner_of(self.settings, study.user_attrs["first_validation"])
        number = read_mark(self.folder / name)["trial"]
        frozen = next(t for t in study.get_trials(deepcopy=False) if t.number == number)
        trial = optuna.trial.Trial(study, frozen._trial_id)
        if step not in frozen.intermediate_values:  # a trial that was cut off comes by here again
            trial.report(value, step)
        return trial.should_prune()

    def report(self) -> None:
        """Tell Optuna of the trials that have ended."""
        self.tell(self.study())

    def tell(self, study: Any) -> None:
        """Tell of what has ended since."""
        import optuna

        known = optuna.trial.TrialState
        for task in self.plan.tasks:
            if task.cell.name in self.told:
                continue
            mark = read_mark(task.folder)
            if "trial" not in mark or not is_settled(task):
                continue
            if mark.get("done"):
                value = float(np.mean(metrics(task.folder)[self.metric]["values"]))
                study.tell(mark["trial"], value, skip_if_finished=True)
            else:
                state = known.PRUNED if mark.get("pruned") else known.FAIL
                study.tell(mark["trial"], state=state, skip_if_finished=True)
            self.told.add(task.cell.name)

    # the end

    def finish(self) -> None:
        """Put the trials in a table, and say what the best one's flags are, and what that is worth.

        Raises:
            NonFiniteError: all trials failed, one of them in training.
            ToyError: all trials were refused.
        """
        import optuna
        from rich.console import Console

        from lightning_toys.commands.compare.tables import ResultTable

        study = self.study()
        self.tell(study)
        ours = {read_mark(t.folder).get("trial") for t in self.plan.tasks}
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            if trial.number not in ours:  # asked for by a driver that died before it could start it
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        marks = {t.cell.name: read_mark(t.folder) for t in self.plan.tasks}
        sign = 1 if self.settings["direction"] == "minimize" else -1
        values = {
            t.cell.name: by_seed(t.folder, self.metric) for t in self.plan.tasks if marks[t.cell.name].get("done")
        }
        order = sorted(values, key=lambda n: sign * mean_ci(list(values[n].values())).mean)
        failed = [n for n in marks if marks[n].get("failed")]
        if not order:
            reasons = {marks[n]["failed"]["kind"] for n in failed}
            error = ToyError if reasons == {"refused"} else NonFiniteError
            raise error(f"all {len(failed)} trials failed, the first by: {marks[failed[0]]['failed']['reason']}")
        differences = {n: paired_difference(values[n], values[order[0]]) for n in order[1:]}
        adjusted = iter(holm([d.p_value for d in differences.values() if d]))
        keys = list(self.settings["space"])
        first = next(t.folder for t in self.plan.tasks if t.cell.name == order[0])
        limits = limits_in(json.loads((first / "results.json").read_text()), self.metric)
        rows, table = [], []
        for name in order:
            estimate, d = mean_ci(list(values[name].values())), differences.get(name)
            shown = [str(value) for value in (short(marks[name]["params"][k]) for k in keys)]
            against = [format_estimate(d.estimate), f"{next(adjusted):.2g}"] if d else ["-", "-"]
            rows.append([name, *shown, format_estimate(estimate, limits=limits), str(estimate.n), *against])
            kept = list(values[name].values())
            table.append(
                [name, *(marks[name]["params"][k] for k in keys), estimate.mean, estimate.lo, estimate.hi, *kept]
            )
        for name in (n for n in marks if n not in values):
            params, mark = marks[name].get("params", {}), marks[name]
            why = f"pruned at step {mark['pruned']['step']}" if mark.get("pruned") else mark["failed"]["kind"]
            rows.append([name, *(str(short(params.get(k, "-"))) for k in keys), why, "", "-", "-"])
            table.append([name, *(params.get(k, "") for k in keys), "", "", ""])
        heads = ["trial", *(k.split(".")[-1] for k in keys), self.metric, "seeds", "minus the best", "p (Holm)"]
        trials_table = ResultTable(
            f"trials, best first: {self.metric} ± half of the 95 % interval, differences by seed", heads, rows
        )
        Console(width=None if Console().is_terminal else 150).print(trials_table.rich())
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["trial", *keys, self.metric, "ci95_lo", "ci95_hi"], *table])
        out = self.folder / "comparison"
        out.mkdir(exist_ok=True)
        for path, content in ((out / "trials.md", trials_table.markdown()), (out / "trials.csv", text.getvalue())):
            set_aside(path)
            write_atomic(path, content)
        note(f"tables: {out}/trials.md, .csv")
        self.advise(marks[order[0]]["params"], list(values[order[0]]), len(order))

    def advise(self, best: dict[str, Any], seeds: list[int], count: int) -> None:
        """Give the best trial's command line with other seeds, and the reason for them."""
        other = [s + max(seeds) + 1 - min(seeds) for s in seeds]
        base = without(without(self.plan.base, "--run.variant"), "--model.seeds")
        line = shlex.join(["python", "cli.py", "fit", *base, *words(best), "--model.seeds", json.dumps(other)])
        if len(seeds) < 2:
            note("one seed has no error: which trial is better may be chance; give more --model.seeds")
        note(
            f"the best of {count} noisy trials looks better than it is, and the others further behind it: it was "
            f"chosen by the seeds that score it. Run it anew with others, and quote those:\n  {line}"
        )


def short(value: Any) -> Any:
    """Write a float in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else value


def by_seed(folder: Path, metric: str) -> dict[int, float]:
    """Return a metric's value by seed."""
    content = json.loads((folder / "results.json").read_text())
    return dict(zip(content["seeds"], content["metrics"][metric]["values"], strict=True))
