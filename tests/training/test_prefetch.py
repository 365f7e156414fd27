"""Draws made ahead by other processes: the numbers, the signals and the runs of draws made in between."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_toys.commands.sweep.cell import Cell, fingerprint
from lightning_toys.errors import ToyError
from lightning_toys.generative_policy.couplings import OptimalTransport
from lightning_toys.generative_policy.data import Pairs
from lightning_toys.generative_policy.mixture import ThreeModes
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.training.prefetch import PrefetchLoader, chunks
from tests.conftest import REPO, Runner
from tests.processes import wait_for

SEEDS = [5, 0, 9]
SHORT = ("--model.seeds", "[4,1,7]", "--trainer.max_steps", "130", "--trainer.val_check_interval", "60")


def pairs(seeds: list[int]) -> Pairs:
    return Pairs(ThreeModes(), OptimalTransport(4), seeds, 8)


def settled(loader: DrawnLoader, begin: int = 0) -> DrawnLoader:
    loader.max_steps, loader.block_steps, loader.next_step = 75, 20, begin
    return loader


def test_chunks_are_all_replicas_in_order() -> None:
    for replicas in range(1, 9):
        for workers in range(1, 12):
            parts = chunks(replicas, workers)
            assert [r for c in parts for r in range(replicas)[c]] == list(range(replicas))
            assert len(parts) == min(replicas, workers)
            sizes = [len(range(replicas)[c]) for c in parts]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("begin", [0, 20, 27, 60])
@pytest.mark.parametrize("workers", [1, 2, 5, 7])
def test_the_same_blocks(begin: int, workers: int) -> None:
    """Whatever the number of processes, and from within a block too; the last block is cut."""
    plain = list(settled(DrawnLoader(pairs(SEEDS), 8), begin))
    ahead = PrefetchLoader([pairs(SEEDS[c]) for c in chunks(3, workers)], 8, workers)
    blocks = list(settled(ahead, begin))
    assert [(b.start, b.stop) for b in blocks] == [(b.start, b.stop) for b in plain]
    assert blocks[-1].stop == 75
    for one, two in zip(plain, blocks, strict=True):
        for a, b in zip(one.columns, two.columns, strict=True):
            assert torch.equal(a, b)
            assert a.shape == (3, one.stop - one.start, 8, 2)


def test_two_readers_at_once_and_a_reader_at_the_end() -> None:
    ahead = settled(PrefetchLoader([pairs(SEEDS)], 8, 1))
    first, second = iter(ahead), iter(ahead)
    begun = [next(first).start, next(second).start]
    del first
    assert [*begun, next(second).start] == [0, 20, 40]
    ahead.next_step = ahead.max_steps
    with pytest.raises(RuntimeError, match="at step 75 of 75"):
        next(iter(ahead))


def test_draws_can_be_sent_to_a_fresh_process() -> None:
    """As where processes are not forked."""
    draw = pairs(SEEDS)
    for one, two in zip(draw(3, 9), pickle.loads(pickle.dumps(draw))(3, 9), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_leave_signals_to_the_main_one(number: signal.Signals) -> None:
    before, blocks = set(multiprocessing.active_children()), iter(settled(PrefetchLoader([pairs(SEEDS)], 8, 2)))
    first = next(blocks)
    mine = set(multiprocessing.active_children()) - before
    assert len(mine) == 2
    for process in mine:
        os.kill(process.pid or 0, number)
    assert [b.start for b in (first, *blocks)] == [0, 20, 40, 60]
    ended(before)


class Failing(OptimalTransport):
    """A coupling that fails in its own way."""

    def __init__(self, how: str) -> None:
        super().__init__(4)
        self.how = how

    def pair(self, x: Any, e: Any) -> Any:
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ToyError("--data.coupling: this is not allowed")


@pytest.mark.parametrize(("how", "said"), [("raises", "--data.coupling: this"), ("dies", "has died")])
def test_a_failure_in_a_process_is_told_of(how: str, said: str) -> None:
    """With the words of the error, and no process is left."""
    before = set(multiprocessing.active_children())
    ahead = settled(PrefetchLoader([Pairs(ThreeModes(), Failing(how), SEEDS, 8)], 8, 2))
    with pytest.raises(ToyError, match=said):
        list(ahead)
    ended(before)


def ended(before: set[Any]) -> None:
    """Wait until no more processes are there than before."""
    end = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_processes_that_cannot_be_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before, started = set(multiprocessing.active_children()), os.fork
    forks = []

    def fork() -> int:
        if len(forks) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forks.append(1)
        return started()

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ToyError, match=r"--data\.num_workers: 3 is not allowed; not all of them can be started"):
        list(settled(PrefetchLoader([pairs(SEEDS)], 8, 3)))
    ended(before)


def test_the_global_generator_stays_as_it_is() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1]
    list(settled(PrefetchLoader([pairs(SEEDS)], 8, 1)))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.slow  # the blocks are held above
def test_training_is_bitwise_the_same(policies: Runner, bitwise: Callable[..., None]) -> None:
    """And a run stopped with two processes goes on with none."""
    constant = ("--model.lr_decay", "constant")
    policies.ok("fit", "meanflow", *SHORT, *constant, "--run.name", "plain")
    policies.ok("fit", "meanflow", *SHORT, *constant, "--run.name", "ahead", "--data.num_workers", "2")
    cut = (*SHORT, *constant, "--run.name", "cut")
    policies.ok("fit", "meanflow", *cut, "--trainer.max_steps", "70", "--data.num_workers", "2")
    policies.ok("fit", "meanflow", *cut, "--ckpt_path", "last", "--data.num_workers", "0")
    plain = policies.checkpoint("meanflow", "plain")
    for other in ("ahead", "cut"):
        found = policies.checkpoint("meanflow", other)
        for key in ("state_dict", "optimizer_states", "global_step"):
            bitwise(plain[key], found[key], key)
    rows = [(policies.folder("meanflow", n) / "metrics.csv").read_bytes() for n in ("plain", "ahead")]
    assert rows[0] == rows[1]


def started(policies: Runner) -> subprocess.Popen[str]:
    """Start a run with two processes in a group of its own; return it once it has a checkpoint."""
    words = policies.words("fit", "meanflow", *SHORT, "--trainer.max_steps", "100000", "--run.name", "cut")
    words = [sys.executable, "cli.py", *words, "--data.num_workers", "2", "--checkpoint.every_n_steps", "20"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, cwd=REPO, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    last = policies.folder("meanflow", "cut") / "checkpoints" / "last.ckpt"
    wait_for(last, process, 90)
    return process


def nobody_is_left(group: int) -> None:
    """Wait until a group of processes has ended."""
    end = time.monotonic() + 20
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.slow  # test_signals.py has signals in the gate
def test_a_signal_to_the_whole_group(policies: Runner, number: signal.Signals) -> None:
    """Ctrl-C and a scheduler reach every process: one checkpoint, no traceback of a worker, no process left."""
    process = started(policies)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert "Error" not in err
    nobody_is_left(process.pid)
    assert policies.checkpoint("meanflow", "cut")["global_step"] > 0


@pytest.mark.slow  # tests/test_kill.py has kills in the gate
def test_a_kill_leaves_no_process(policies: Runner) -> None:
    """As for want of memory: the others see that the main one is gone."""
    process = started(policies)
    process.kill()
    process.communicate(timeout=60)
    nobody_is_left(process.pid)
    assert policies.checkpoint("meanflow", "cut")["global_step"] > 0


def test_no_run_is_told_by_its_processes(policies: Runner) -> None:
    """Neither its checkpoint, nor its results, nor a sweep's cells."""
    policies.ok("fit", "meanflow", *SHORT, "--trainer.max_steps", "2", "--data.num_workers", "2")
    assert "num_workers" not in policies.checkpoint("meanflow")["toy"]["config"]["data"]["init_args"]
    assert "num_workers" not in (policies.folder("meanflow") / "results.json").read_text().partition('"command"')[0]
    cell = Cell("a", ("--model.lr", "1"))
    wanted = fingerprint(["--model.lr", "2", "--trainer.max_steps", "3"], cell)
    for flag in (["--data.num_workers", "4"], ["--data.num_workers=4"]):
        assert fingerprint(["--model.lr", "2", *flag, "--trainer.max_steps", "3"], cell) == wanted
    assert fingerprint(["--model.lr", "3", "--trainer.max_steps", "3"], cell) != wanted


def test_bad_numbers_of_processes_are_refused(policies: Runner) -> None:
    code, err = policies.code("fit", "meanflow", "--data.num_workers", "-1")
    assert code == 2
    assert "--data.num_workers: -1 is not allowed; give an integer >= 0" in err
    assert err.count("\n") == 1
