"""Cells as Ray tasks: on this machine, where Ray is started and ended here, or on a cluster that is there already."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from lightning_toys.commands.sweep.agenda import Agenda
from lightning_toys.commands.sweep.cell import Order, Outcome, fail
from lightning_toys.commands.sweep.ray_worker import Mailbox, work
from lightning_toys.commands.sweep.settings import Settings
from lightning_toys.commands.trainer.arguments import flags
from lightning_toys.errors import Stopped, ToyError, note
from lightning_toys.training.ownership import acquire

RETRIES = 3  # of a cell whose worker or node was lost
STORE = 80 * 2**20  # bytes of shared memory for objects, of which there are none to speak of; Ray's least is 75 MiB


def check_ray() -> None:
    """Refuse a sweep that wants Ray where it is not installed.

    Raises:
        ToyError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ToyError("--sweep.jobs, --sweep.address: ray is not installed; pip install 'lightning-toys[sweep]'")


def environment(local: bool) -> dict[str, str]:
    """Return what Ray reads from the environment when it is imported and started; what the user has set stays."""
    found = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # a line that two cells say is two lines
        "RAY_COLOR_PREFIX": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # ray_worker.work hides the GPUs itself
        "RAY_task_oom_retries": str(RETRIES),  # without end by default
    }
    if local:
        found |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what makes Ray stay on loopback, on Linux too
            "RAY_AUTH_MODE": "token",  # other users of the machine see loopback too
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    return {k: v for k, v in found.items() if k not in os.environ}


def socket_folder() -> str:
    """Return a new folder for Ray's files whose name leaves room for those of its sockets (107 bytes)."""
    where = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="toys-", dir=where if len(where) < 30 else "/tmp")


class RayEngine:
    """A driver of Ray; a context manager.

    Args:
        settings: the sweep's.
        words: the words that all cells have.
    """

    def __init__(self, settings: Settings, words: Sequence[str]) -> None:
        check_ray()
        self.settings = settings
        self.wants_gpu = flags(words).get("--trainer.accelerator") != "cpu"
        self.signal = 0
        self.asked = False  # whether the workers have been told to stop
        self.folder: str | None = None
        self.flying: dict[Any, Order] = {}
        self.returned: dict[str, int] = {}
        self.mailbox: Any = None
        self.question: Any = None
        self.old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> RayEngine:
        """Start Ray here, or connect to a cluster.

        Raises:
            ToyError: there is no cluster, or it does not let us in.
        """
        os.environ.update(environment(self.settings.address is None))
        import ray

        self.ray: Any = ray
        self.old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}  # ray.init changes one
        try:
            if self.settings.address is None:
                self.start()
            else:
                self.connect(self.settings.address)
            self.need = self.resources()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        for number in self.old:
            signal.signal(number, self.on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what was started, the signals' handlers last."""
        try:
            self.ray.shutdown()
        finally:
            for number, handler in self.old.items():
                signal.signal(number, handler)
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start Ray on this machine, with room for as many cells as are to run at a time."""
        jobs, cpus = self.settings.jobs or 1, self.settings.cpus or 1
        self.folder = socket_folder()
        self.ray.init(
            address="local",
            num_cpus=max(1, math.ceil(jobs * cpus)),
            include_dashboard=self.settings.dashboard,
            object_store_memory=STORE,
            logging_level=logging.ERROR,
            _temp_dir=self.folder,
        )
        if self.settings.dashboard:
            note(f"dashboard: http://{self.ray._private.worker.get_dashboard_url()}")

    def connect(self, address: str) -> None:
        """Connect to a cluster."""
        refused = f"--sweep.address: {address!r} is not allowed"
        if address != "auto":
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                why = error.strerror or str(error)
                raise ToyError(f"{refused}: nothing answers there ({why}); start Ray with `ray start --head`") from None
        try:
            self.ray.init(address=address, logging_level=logging.ERROR)
        except Exception as error:  # no cluster, no node of it here, another version, another token
            why = " ".join(str(error).split())[:200]
            raise ToyError(f"{refused}: {why}; `ray start` on this machine makes it a node (docs/scale.md)") from None

    def resources(self) -> dict[str, float]:
        """Return the CPUs and GPUs that a cell takes.

        Raises:
            ToyError: this machine has less.
        """
        nodes = [n["Resources"] for n in self.ray.nodes() if n["Alive"]]
        there, jobs = sum(n.get("GPU", 0) for n in nodes), self.settings.jobs
        gpus = self.settings.gpus
        if gpus is None:
            gpus = (1 / math.ceil(jobs / there) if jobs else 1) if there and self.wants_gpu else 0
        cpus = self.settings.cpus or 1
        fits = any(n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= gpus for n in nodes)
        if not fits and self.settings.address is None:
            raise ToyError(f"--sweep.gpus: {gpus:g} is not allowed; this machine has {there:g}")
        if not fits:
            note(f"no node has {cpus:g} CPUs and {gpus:g} GPUs free of others' use: cells wait until one joins")
        return {"num_cpus": cpus, "num_gpus": gpus}

    def run(self, agenda: Agenda) -> None:
        """See :class:`lightning_toys.commands.sweep.engine.Engine`."""
        if agenda.chooser and agenda.chooser.prunes and self.mailbox is None:
            self.mailbox = self.ray.remote(Mailbox).options(num_cpus=0, max_concurrency=10_000).remote()
            self.question = self.mailbox.take.remote()
        task = self.ray.remote(work)
        try:
            while True:
                if self.signal and not self.asked:
                    self.ask_to_stop()
                while not self.signal and len(self.flying) < self.at_once(agenda) and (order := agenda.next()):
                    self.flying[self.submit(task, order)] = order
                if not self.flying:
                    break
                waiting = [*self.flying, *([self.question] if self.question is not None else [])]
                for ref in self.ray.wait(waiting, timeout=0.5)[0]:
                    if ref == self.question:
                        self.answer(agenda)
                    else:
                        self.land(agenda, ref)
        except Stopped:  # the second signal
            self.ask_to_stop(force=True)
            raise
        except BaseException:
            self.ask_to_stop()
            if self.mailbox is not None:  # nobody answers any more
                self.ray.kill(self.mailbox)
            refs = [*self.flying]
            while refs:
                refs = self.ray.wait(refs, timeout=0.5)[1]
            raise
        if self.signal:
            note("stopped; the same command goes on")
            raise Stopped(self.signal, told=True)

    def at_once(self, agenda: Agenda) -> float:
        """Return how many cells may be with Ray at a time.

        Those of a grid may all wait there, so that nodes that join, or are started for them, get some at once; those
        of a search are chosen as late as can be.
        """
        if self.settings.jobs:
            return self.settings.jobs
        if agenda.chooser is None:
            return math.inf
        there = self.ray.cluster_resources()
        wanted = {"CPU": self.need["num_cpus"], "GPU": self.need["num_gpus"]}
        return max(1.0, min(float(there.get(k, 0)) // v for k, v in wanted.items() if v))

    def submit(self, task: Any, order: Order) -> Any:
        """Give a cell to Ray; return what will be its outcome."""
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, self.need["num_cpus"]))
        options = {"name": order.task.cell.name, "max_retries": RETRIES, "retry_exceptions": False, **self.need}
        mailbox = self.mailbox if order.prunes else None
        return task.options(**options).remote(order, os.getcwd(), threads, self.need["num_gpus"] > 0, mailbox)

    def answer(self, agenda: Agenda) -> None:
        """Answer a worker's question."""
        number, name, step, value = self.ray.get(self.question)
        assert agenda.chooser is not None
        self.mailbox.answer.remote(number, agenda.chooser.prune(name, step, value))
        self.question = self.mailbox.take.remote()

    def land(self, agenda: Agenda, ref: Any) -> None:
        """Take note of a cell that has ended, and say how far the sweep is."""
        order = self.flying.pop(ref)
        outcome, name = self.outcome(order, ref), order.task.cell.name
        if outcome.kind == "stopped":
            self.returned[name] = self.returned.get(name, 0) + 1
            if not self.signal and self.returned[name] <= RETRIES:  # its node was told to go
                agenda.give_back(order)
            return
        agenda.end(order, outcome)
        how = outcome.kind + (f": {outcome.reason}" if outcome.kind == "crashed" else "")
        note(
            f"{name}: {how}; {agenda.ended} of {agenda.total} cells ended, {len(self.flying)} at work or waiting"
            f"{agenda.time_left()}"
        )

    def outcome(self, order: Order, ref: Any) -> Outcome:
        """Return how a cell ended.

        Raises:
            ToyError: the worker could not even begin.
        """
        known, name = self.ray.exceptions, order.task.cell.name
        try:
            found: Outcome = self.ray.get(ref)
            return found
        except known.TaskCancelledError:
            return Outcome("stopped")
        except known.RayTaskError as error:
            if isinstance(error, known.TaskCancelledError):
                return Outcome("stopped")
            why = " ".join(str(error.cause or error).split())[:300]
            raise ToyError(f"--sweep.address: a worker could not begin with {name}: {why}") from None
        except known.RayError as error:  # worker or node lost, again and again
            why = re.split(r"(?<=\w\.) ", " ".join(str(error).split()))[0][:200]
            failed = {"kind": "crashed", "reason": f"its worker was lost {RETRIES + 1} times: {why}"}
            with acquire(order.task.folder, order.session):
                fail(order.task, failed)
            return Outcome(**failed)

    def ask_to_stop(self, force: bool = False) -> None:
        """Have the workers stop, each at a checkpoint: Ray interrupts them as SIGINT would; or end them at once."""
        self.asked = True
        for ref in self.flying:
            with suppress(Exception):  # it has just ended
                self.ray.cancel(ref, force=force, recursive=False)  # not their questions, which are answered

    def on_signal(self, number: int, frame: Any) -> None:
        """Ask the workers to stop at a checkpoint; the second time, do not ask."""
        if self.signal:
            raise Stopped(number)
        self.signal = number
        note("\nstopping the workers, each at a checkpoint; interrupt again to stop them at once")
