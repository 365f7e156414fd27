"""A sweep's processes: workers of one machine, each on a device of its own, and the ranks of a launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from lightning_toys.commands.sweep.cell import Plan, holders, settled, work
from lightning_toys.commands.trainer.start import prepare
from lightning_toys.errors import NonFiniteError, RunFolderError, note

PARENT = "LIGHTNING_TOYS_PARENT"  # tells a worker who started it
DEVICES = "CUDA_VISIBLE_DEVICES"

# what makes Lightning, or process_rank, believe in a group of processes
GROUP = re.compile(
    r"(RANK|LOCAL_RANK|GROUP_RANK|NODE_RANK|ROLE_RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME|MASTER_ADDR|MASTER_PORT"
    r"|TORCHELASTIC_\w+|JSM_NAMESPACE_\w+|SLURM_(PROCID|LOCALID|NTASKS|NPROCS|NTASKS_PER_NODE))"
)
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "JSM_NAMESPACE_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def leave_group() -> int:
    """Make a launcher's rank a process of its own, on its own device; return how many ranks this machine has.

    A sweep's ranks share nothing but the folder: none may wait for the others, or take itself for a silent one.
    """
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    local = next((int(os.environ[v]) for v in LOCAL_RANKS if v in os.environ), None)
    size = next((int(m[0]) for v in LOCAL_SIZES if (m := re.match(r"\d+", os.environ.get(v, "")))), 1)
    for name in [n for n in os.environ if GROUP.fullmatch(n)]:
        del os.environ[name]
    rank_zero_only.rank = 0  # type: ignore[attr-defined]  # read from the environment when Lightning was imported
    found = devices()
    if local is not None and found:
        os.environ[DEVICES] = found[local % len(found)]
    return size


def devices() -> list[str]:
    """Return the names of the GPUs that this process may use, without waking them."""
    if DEVICES in os.environ:
        return [name.strip() for name in os.environ[DEVICES].split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(torch.cuda.device_count())]


class Worker:
    """One process of ``--sweep.jobs``; what it says is passed on behind its number."""

    def __init__(self, number: int, plan: str, device: str | None) -> None:
        env = {**os.environ, PARENT: str(os.getpid())}
        env.setdefault("OMP_NUM_THREADS", "1")
        home = str(Path(__file__).resolve().parents[3])
        env["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [env.get("PYTHONPATH")])])
        if device is not None:
            env[DEVICES] = device
        self.number = number
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_toys.commands.sweep.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            text=True,
            errors="replace",
            start_new_session=True,  # an interrupt from the keyboard reaches the parent alone, which passes it on once
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(plan)
        self.process.stdin.close()
        self.reader = threading.Thread(target=self.relay, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def relay(self, lines: IO[str]) -> None:
        """Pass lines on."""
        with lines:
            for line in lines:
                if line.strip():
                    print(f"[{self.number}] {line.rstrip()}", file=sys.stderr, flush=True)

    def ended(self) -> bool:
        """Whether it has ended; all that it said has been passed on then."""
        if self.process.poll() is None:
            return False
        self.reader.join(timeout=10)
        return True


class Foreman:
    """Keeps a number of workers busy until nothing is left for them to take.

    Args:
        plan: what is to be done.
        jobs: number of workers.
        names: devices, one a worker in turn; none where there are no GPUs.
        poll: seconds between two looks.
    """

    def __init__(self, plan: Plan, jobs: int, names: Sequence[str], poll: float = 0.5) -> None:
        self.plan, self.names, self.poll = plan, names, poll
        self.text = plan.dump()
        self.left = [t for t in plan.tasks if not settled(t)]
        self.total, self.started = len(self.left), time.monotonic()
        self.signal = 0
        self.spare = jobs  # workers that may die in silence, and be replaced
        self.workers = [self.start(k) for k in range(min(jobs, self.total))]

    def start(self, k: int) -> Worker:
        """Start the k-th worker."""
        return Worker(k, self.text, self.names[k % len(self.names)] if self.names else None)

    def run(self) -> None:
        """Wait for the workers; replace those that die, as long as that gets anywhere.

        Raises:
            SystemExit: SIGINT or SIGTERM came; the workers have left checkpoints.
            NonFiniteError: workers died, and those that took their places, before all was done.
        """
        old = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.workers:
                time.sleep(self.poll)
                ended = [w for w in self.workers if w.ended()]
                gone = self.look()
                for worker in ended:
                    self.workers.remove(worker)
                    code = worker.process.returncode
                    if code and not self.signal:
                        note(f"[{worker.number}] worker ended with exit code {code}")
                        self.spare += gone - 1
                        if self.spare >= 0 and holders(self.plan)[1]:
                            self.workers.append(self.start(worker.number))
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            for worker in self.workers:
                worker.process.kill()
        if self.signal:
            note("stopped; the same command goes on")
            raise SystemExit(128 + self.signal)
        if free := holders(self.plan)[1]:
            raise NonFiniteError(f"{free} of {len(self.plan.tasks)} cells are left, whose workers died in silence")

    def look(self) -> int:
        """See which cells were settled since the last look, and say how far the sweep is."""
        before = len(self.left)
        self.left = [t for t in self.left if not settled(t)]
        if len(self.left) < before:
            done = self.total - len(self.left)
            eta = (time.monotonic() - self.started) / done * len(self.left) / 60
            note(f"{done} of {self.total} cells done, {len(self.workers)} at work, about {eta:.1f} min left")
        return before - len(self.left)

    def on_signal(self, number: int, frame: Any) -> None:
        """Ask the workers to stop at a checkpoint; the second time, do not ask."""
        for worker in self.workers:
            if self.signal:
                worker.process.kill()
            else:
                worker.process.terminate()
        if not self.signal:
            note("\nstopping the workers, each at a checkpoint; interrupt again to stop them at once")
        self.signal = number


def terminate(number: int, frame: Any) -> None:
    """End this process in good order where a signal comes: what it holds is released on the way out."""
    raise SystemExit(128 + number)


def watch_parent(parent: int) -> None:
    """Stop, as SIGTERM would, when the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    nowhere = os.open(os.devnull, os.O_WRONLY)  # nobody reads what we say any more
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Be a worker: read the plan from standard input, take cells until there are none."""
    signal.signal(signal.SIGTERM, terminate)
    threading.Thread(target=watch_parent, args=(int(os.environ[PARENT]),), daemon=True).start()
    plan = Plan.load(sys.stdin.read())
    prepare()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = plan.command or sys.argv
    chooser = None
    if plan.search:
        from lightning_toys.commands.sweep.search import Search

        chooser = Search(plan)
    try:
        work(plan, chooser, guess=False)  # the parent does
    except RunFolderError as error:
        note(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
