"""What a Ray worker does: one cell of a sweep, in its main thread, where signals arrive. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

from lightning_toys.errors import RunFolderError, run_folder_error

if TYPE_CHECKING:
    from lightning_toys.commands.sweep.cell import Order, Outcome

# what makes Lightning, or process_rank, believe in a group of processes
GROUP = re.compile(
    r"(RANK|LOCAL_RANK|GROUP_RANK|NODE_RANK|ROLE_RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME|MASTER_ADDR|MASTER_PORT"
    r"|TORCHELASTIC_\w+|JSM_NAMESPACE_\w+|SLURM_(PROCID|LOCALID|NTASKS|NPROCS|NTASKS_PER_NODE))"
)


def leave_group() -> None:
    """Make this process one of its own, whatever launcher started Ray on its node: no rank, no peers."""
    for name in [n for n in os.environ if GROUP.fullmatch(n)]:
        del os.environ[name]
    if fabric := sys.modules.get("lightning.fabric.utilities.rank_zero"):
        fabric.rank_zero_only.rank = 0  # read from the environment when Lightning was imported


def work(order: Order, folder: str, threads: int, gpu: bool, mailbox: Any = None) -> Outcome:
    """Run a cell.

    Args:
        order: the cell.
        folder: the driver's working folder, which paths are relative to.
        threads: that torch may take, unless OMP_NUM_THREADS says otherwise.
        gpu: whether the cell has a GPU, or a part of one.
        mailbox: the Ray actor through which validations are reported; None if they are not.
    """
    leave_group()
    try:
        os.chdir(folder)
    except OSError as error:
        raise FileNotFoundError(f"{folder} cannot be entered on this node ({error.strerror})") from None
    if "" not in sys.path:
        sys.path.insert(0, "")
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from lightning_toys.commands.trainer.start import prepare

    prepare()
    import torch

    from lightning_toys.commands.sweep.cell import Outcome, run_cell

    torch.set_num_threads(threads)
    sys.argv = order.command or sys.argv
    pruner = None
    if mailbox is not None:
        import ray

        def pruner(step: int, value: float) -> bool:
            try:
                return bool(ray.get(mailbox.ask.remote(order.task.cell.name, step, value)))
            except ray.exceptions.RayError:  # nobody is there to answer: the sweep is ending
                return False

    try:
        return run_cell(order, pruner)
    except (KeyboardInterrupt, SystemExit):  # asked to stop: at a checkpoint, where one was being trained
        return Outcome("stopped")
    except Exception as error:
        if isinstance(error, OSError):
            error = run_folder_error(error, order.task.folder) or error
        if isinstance(error, RunFolderError):
            return Outcome("unwritable", str(error))
        return Outcome("crashed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


class Mailbox:
    """Carries questions from workers to the driver, which alone speaks to Optuna, and its answers back. A Ray actor."""

    def __init__(self) -> None:
        import asyncio

        self.questions: asyncio.Queue[tuple[int, str, int, float]] = asyncio.Queue()
        self.answers: dict[int, asyncio.Future[bool]] = {}
        self.count = 0

    async def ask(self, name: str, step: int, value: float) -> bool:
        """Report a trial's validation; return whether the trial is to stop."""
        import asyncio

        self.count += 1
        answer = self.answers[self.count] = asyncio.get_running_loop().create_future()
        number = self.count
        await self.questions.put((number, name, step, value))
        try:
            stop: bool = await answer
            return stop
        finally:
            self.answers.pop(number, None)

    async def take(self) -> tuple[int, str, int, float]:
        """Return the next question: its number, the trial, the step, the metric."""
        return await self.questions.get()

    async def answer(self, number: int, stop: bool) -> None:
        """Answer a question; whoever asked may be dead by now."""
        if (waiting := self.answers.get(number)) and not waiting.done():
            waiting.set_result(stop)
