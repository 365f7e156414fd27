"""sweep --search: Optuna chooses the flags of each trial; trials are cells, claimed and resumed like a grid's."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_toys.commands.sweep.cell import (
    CLAIMS,
    Cell,
    Plan,
    Task,
    fingerprint,
    read_mark,
    settled,
    stacked,
    write_mark,
)
from lightning_toys.commands.sweep.claims import lock
from lightning_toys.commands.sweep.search_space import corners, distribution, words
from lightning_toys.commands.trainer.toys_cli import run_trainer
from lightning_toys.errors import NonFiniteError, ToyError, did_you_mean, note
from lightning_toys.stats import format_estimate, holm, mean_ci, paired_difference
from lightning_toys.training.files import set_aside, write_atomic


def trials(settings: dict[str, Any], first: Task) -> list[Task]:
    """Return the trials as cells, whose flags are chosen when they are taken."""
    names = [f"trial-{k:04d}" for k in range(settings["trials"])]
    return [Task(Cell(n, ()), first.folder.parent / n, first.trains) for n in names]


class Search:
    """A search's state: a study in search.db, which processes read and write one at a time.

    Args:
        plan: the trials, with the settings of the search.
    """

    def __init__(self, plan: Plan) -> None:
        assert plan.search is not None
        self.plan, self.settings = plan, plan.search
        self.folder = plan.tasks[0].folder.parent
        self.metric = str(self.settings["metric"])
        self.told: set[str] = set()
        self.opened: Any = None
        self.storage: Any = None

    # the study

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other processes out of search.db."""
        return lock(self.folder / CLAIMS / "search.db", self.plan.stale)

    def study(self) -> Any:
        """Open the study; the lock is held.

        Raises:
            ToyError: it is of a search with other settings.
        """
        if self.opened is None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self.folder.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{(self.folder / 'search.db').resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            study = optuna.create_study(
                storage=storage, study_name="search", direction=self.settings["direction"], load_if_exists=True
            )
            same = {k: v for k, v in self.settings.items() if k != "trials"}
            asked = {"settings": same, "flags": fingerprint(self.plan.base, Cell("", ()))}
            if study.user_attrs.get("search", asked) != asked:
                raise ToyError(
                    f"--run.variant: {self.folder} was searched with other settings; give another --run.variant"
                )
            if "search" not in study.user_attrs:
                study.set_user_attr("search", asked)
            self.opened, self.storage = study, storage
        return self.opened

    def close(self) -> None:
        """Close search.db."""
        if self.storage is not None:
            self.storage.remove_session()
            self.storage.engine.dispose()
            self.opened = self.storage = None

    def check(self) -> None:
        """Refuse a folder of another search, and a metric that no trial will have, before any work.

        Raises:
            ToyError: either is the case.
        """
        if (self.folder / "search.db").exists():
            with self.lock():
                self.study()
        known = next((t.folder for t in self.plan.tasks if (t.folder / "results.json").exists()), None)
        names = list(metrics(known)) if known else self.rehearse()
        if names and self.metric not in names:
            raise self.unknown(names)

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
        """Return a trial with its flags: those it was started with, or new ones of Optuna's.

        Those of trial k come from (seed, k) and the trials that have ended.
        """
        if "params" not in read_mark(task.folder):
            import optuna

            with self.lock():
                study = self.study()
                self.tell(study)
                index = int(task.cell.name.rpartition("-")[2])
                key = np.random.SeedSequence([self.settings["seed"], index]).generate_state(1)[0]
                study.sampler = optuna.samplers.TPESampler(seed=int(key))
                trial = study.ask({k: distribution(a) for k, a in self.settings["space"].items()})
                write_mark(task.folder, {"trial": trial.number, "params": trial.params})
        flags = words(read_mark(task.folder)["params"])
        note(f"{task.cell.name}: {shlex.join(flags)}")
        return Cell(task.cell.name, tuple(flags))

    def judge(self, folder: Path) -> None:
        """Look at a trial's results.

        Raises:
            ToyError: they lack the metric.
            NonFiniteError: a replica's value is not finite.
        """
        found = metrics(folder)
        if self.metric not in found:
            raise self.unknown(list(found))
        if None in found[self.metric]["values"]:
            raise NonFiniteError(f"{self.metric} is not finite in every replica")

    def report(self) -> None:
        """Tell Optuna of the trials that have ended."""
        with self.lock():
            self.tell(self.study())

    def tell(self, study: Any) -> None:
        """Tell of what has ended since; the lock is held."""
        import optuna

        for task in self.plan.tasks:
            mark = read_mark(task.folder)
            if task.cell.name in self.told or "trial" not in mark or not settled(task):
                continue
            if mark.get("done"):
                value = float(np.mean(metrics(task.folder)[self.metric]["values"]))
                study.tell(mark["trial"], value, skip_if_finished=True)
            else:
                study.tell(mark["trial"], state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
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

        with self.lock():
            study = self.study()
            self.tell(study)
            ours = {read_mark(t.folder).get("trial") for t in self.plan.tasks}
            for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
                if trial.number not in ours:  # asked for by a process that died before it could start it
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        marks = {t.cell.name: read_mark(t.folder) for t in self.plan.tasks}
        sign = 1 if self.settings["direction"] == "minimize" else -1
        values = {
            t.cell.name: by_seed(t.folder, self.metric) for t in self.plan.tasks if marks[t.cell.name].get("done")
        }
        order = sorted(values, key=lambda n: sign * mean_ci(list(values[n].values())).mean)
        failed = [n for n in marks if n not in values]
        if not order:
            reasons = {marks[n]["failed"]["kind"] for n in failed}
            error = ToyError if reasons == {"refused"} else NonFiniteError
            raise error(f"all {len(failed)} trials failed, the first by: {marks[failed[0]]['failed']['reason']}")
        differences = {n: paired_difference(values[n], values[order[0]]) for n in order[1:]}
        adjusted = iter(holm([d.p_value for d in differences.values() if d]))
        keys = list(self.settings["space"])
        rows, table = [], []
        for name in order:
            estimate, d = mean_ci(list(values[name].values())), differences.get(name)
            shown = [str(value) for value in (short(marks[name]["params"][k]) for k in keys)]
            against = [format_estimate(d.estimate), f"{next(adjusted):.2g}"] if d else ["-", "-"]
            rows.append([name, *shown, format_estimate(estimate), str(estimate.n), *against])
            kept = list(values[name].values())
            table.append(
                [name, *(marks[name]["params"][k] for k in keys), estimate.mean, estimate.lo, estimate.hi, *kept]
            )
        for name in failed:
            params = marks[name].get("params", {})
            rows.append(
                [name, *(str(short(params.get(k, "-"))) for k in keys), marks[name]["failed"]["kind"], "", "-", "-"]
            )
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
            note("one seed has no error: which trial is better cannot be told from chance; give more --model.seeds")
        note(
            f"the best of {count} noisy trials looks better than it is, and the others further behind it: it was "
            f"chosen by the seeds that score it. Run it anew with others, and quote those:\n  {line}"
        )


def short(value: Any) -> Any:
    """Write a float in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else value


def without(line: Sequence[str], flag: str) -> list[str]:
    """Drop a flag and its value from a command line."""
    out: list[str] = []
    for word in line:
        if out and out[-1] == flag:
            out.pop()
        elif not word.startswith(f"{flag}="):
            out.append(word)
    return out


def metrics(folder: Path) -> dict[str, Any]:
    """Return the metrics of a results.json."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    return found


def by_seed(folder: Path, metric: str) -> dict[int, float]:
    """Return a metric's value by seed."""
    content = json.loads((folder / "results.json").read_text())
    return dict(zip(content["seeds"], content["metrics"][metric]["values"], strict=True))
