"""What the driver makes of Ray's answers; no Ray is started here."""

from __future__ import annotations

import json
import os
import signal
import types
from pathlib import Path
from typing import Any

import pytest

from lightning_toys.commands.sweep.agenda import Agenda
from lightning_toys.commands.sweep.cell import Cell, Order, Outcome, Plan, Task, write_mark
from lightning_toys.commands.sweep.settings import Settings
from lightning_toys.errors import Stopped, ToyError

exceptions = pytest.importorskip("ray.exceptions")
from lightning_toys.commands.sweep.ray_engine import RETRIES, RayEngine, environment, socket_folder  # noqa: E402


class Answers:
    """A Ray whose tasks end as they are told to, one after the other; it counts what is asked of it."""

    exceptions = exceptions

    def __init__(self, nodes: list[dict[str, float]] | None = None, **outcomes: list[Any]) -> None:
        self.there, self.outcomes = nodes or [{"CPU": 2.0}], outcomes
        self.submitted: list[str] = []
        self.cancelled: list[tuple[str, bool]] = []
        self.most = 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": r} for r in self.there] + [{"Alive": False, "Resources": {"GPU": 99}}]

    def cluster_resources(self) -> dict[str, float]:
        return self.there[0]

    def remote(self, task: Any) -> Any:
        def options(name: str, **more: Any) -> Any:
            assert more["max_retries"] == RETRIES
            assert more["retry_exceptions"] is False

            def submit(*_: Any) -> str:
                self.submitted.append(name)
                return f"{name}#{self.submitted.count(name)}"

            return types.SimpleNamespace(remote=submit)

        return types.SimpleNamespace(options=options)

    def wait(self, refs: list[str], timeout: float) -> tuple[list[str], list[str]]:
        self.most = max(self.most, len(refs))
        return refs[:1], refs[1:]

    def get(self, ref: str) -> Any:
        found = self.outcomes.get(ref.partition("#")[0], [Outcome("done")]).pop(0)
        if callable(found):
            found = found()
        if isinstance(found, BaseException):
            raise found
        return found

    def cancel(self, ref: str, force: bool, recursive: bool) -> None:
        assert not recursive  # or a worker's question would be cancelled with it
        self.cancelled.append((ref, force))


def engine(ray: Answers, settings: Settings, *words: str) -> RayEngine:
    found = RayEngine(settings, words)
    found.ray = ray
    found.need = found.resources()
    return found


def agenda(tmp_path: Path, count: int = 3) -> Agenda:
    return Agenda(Plan([], [Task(Cell(f"c{k}", ()), tmp_path / f"c{k}") for k in range(count)]))


@pytest.mark.parametrize(
    ("nodes", "settings", "words", "cpus", "gpus"),
    [
        ([{"CPU": 8.0}], Settings(jobs=4), (), 1, 0),
        ([{"CPU": 8.0, "GPU": 4.0}], Settings(jobs=4), (), 1, 1),
        ([{"CPU": 8.0, "GPU": 4.0}], Settings(jobs=8), (), 1, 0.5),
        ([{"CPU": 8.0, "GPU": 2.0}], Settings(jobs=3), (), 1, 0.5),
        ([{"CPU": 8.0, "GPU": 4.0}], Settings(jobs=2), (), 1, 1),
        ([{"CPU": 8.0, "GPU": 4.0}], Settings(jobs=4), ("--trainer.accelerator", "cpu"), 1, 0),
        ([{"CPU": 8.0, "GPU": 4.0}], Settings(jobs=4, gpus=0.25, cpus=2), (), 2, 0.25),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], Settings(address="auto"), (), 1, 1),
    ],
)
def test_what_a_cell_takes(
    nodes: list[dict[str, float]], settings: Settings, words: tuple[str, ...], cpus: float, gpus: float
) -> None:
    assert engine(Answers(nodes), settings, *words).need == {"num_cpus": cpus, "num_gpus": gpus}


def test_more_than_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ToyError, match=r"--sweep\.gpus: 2 is not allowed; this machine has 1"):
        engine(Answers([{"CPU": 8.0, "GPU": 1.0}]), Settings(jobs=2, gpus=2))
    engine(Answers(), Settings(address="auto", gpus=1))  # a node may join
    assert "cells wait until one joins" in capsys.readouterr().err


def test_cells_at_a_time(tmp_path: Path) -> None:
    ray = Answers(c0=[Outcome("done")], c1=[Outcome("done")], c2=[Outcome("done")])
    engine(ray, Settings(jobs=2)).run(agenda(tmp_path))
    assert ray.submitted == ["c0", "c1", "c2"]
    assert ray.most == 2
    ray = Answers(c0=[Outcome("done")], c1=[Outcome("done")], c2=[Outcome("done")])
    engine(ray, Settings(address="auto")).run(agenda(tmp_path))
    assert ray.most == 3  # all wait with Ray, for nodes that join


def test_a_worker_that_is_lost_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cell is marked, once Ray gives up; the others go on."""
    write_mark(tmp_path / "c0", {"flags": [], "done": False})
    ray = Answers(c0=[exceptions.WorkerCrashedError()], c1=[Outcome("done")])
    it = agenda(tmp_path, 2)
    engine(ray, Settings(jobs=2)).run(it)
    failed = json.loads((tmp_path / "c0" / "sweep.json").read_text())["failed"]
    assert failed["kind"] == "crashed"
    assert failed["reason"].startswith("its worker was lost 4 times: ")
    assert ray.submitted == ["c0", "c1"]
    assert it.ended == 2
    said = capsys.readouterr().err
    assert "c0: crashed: its worker was lost 4 times" in said
    assert "2 of 2 cells ended, 0 at work or waiting, about 0.0 min left" in said


def test_a_node_that_goes_away_gives_its_cell_back(tmp_path: Path) -> None:
    """A worker that was stopped, and not by us: its node shuts down. So a few times, and no more."""
    ray = Answers(c0=[Outcome("stopped"), Outcome("done")], c1=[Outcome("stopped")] * 9, c2=[Outcome("done")])
    engine(ray, Settings(jobs=1)).run(agenda(tmp_path))
    assert ray.submitted == ["c0", "c0", *["c1"] * (RETRIES + 1), "c2"]


def test_a_worker_that_cannot_begin(tmp_path: Path) -> None:
    """No package on the node, no folder: nothing of the cell's, and the same for all."""
    error = exceptions.RayTaskError("work", "trace", FileNotFoundError("/here cannot be entered on this node"))
    ray = Answers(c0=[error])
    it = agenda(tmp_path)
    with pytest.raises(ToyError, match="a worker could not begin with c0: /here cannot be entered"):
        engine(ray, Settings(jobs=1)).run(it)
    assert not (tmp_path / "c0" / "sweep.json").exists()


def test_an_interrupt_is_passed_on_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ray = Answers()
    it = engine(ray, Settings(jobs=2))

    def interrupt() -> Outcome:
        it.on_signal(signal.SIGTERM, None)
        return Outcome("done")

    stopped = exceptions.TaskCancelledError()
    ray.outcomes = {"c0": [interrupt], "c1": [stopped]}
    with pytest.raises(Stopped) as stop:
        it.run(agenda(tmp_path))
    assert stop.value.code == 128 + signal.SIGTERM
    assert ray.cancelled == [("c1#1", False)]
    assert ray.submitted == ["c0", "c1"]
    assert "stopped; the same command goes on" in capsys.readouterr().err


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    ray = Answers()
    it = engine(ray, Settings(jobs=2))

    def twice() -> None:
        it.on_signal(signal.SIGINT, None)
        it.on_signal(signal.SIGINT, None)

    ray.outcomes = {"c0": [twice]}
    with pytest.raises(Stopped):
        it.run(agenda(tmp_path))
    assert ray.cancelled == [("c1#1", True)]


def test_what_the_user_says_of_ray_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    local = environment(local=True)
    assert "RAY_DEDUP_LOGS" not in local
    assert local["RAY_USAGE_STATS_ENABLED"] == "0"
    assert len(local["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in environment(local=False)  # a cluster has its own


def test_names_of_sockets_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = socket_folder()
    try:
        assert len(folder) < 40
    finally:
        os.rmdir(folder)


def test_an_order_is_all_that_a_worker_needs() -> None:
    import pickle

    order = Order(["-c", "a.yaml"], Task(Cell("c", ("--x", "1")), Path("c")), "me", "l2", True, ["cli.py"])
    assert pickle.loads(pickle.dumps(order)) == order
