"""Rows of scalars in TensorBoard: what Lightning's logger would have written, in fewer events."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_toys.errors import OwnershipLostError
from lightning_toys.training.ownership import OWNER, acquire
from lightning_toys.training.scalar_rows import log_rows

ROWS = [(10 * k, {"train/loss": 1.0 / (k + 1), "interval/train/loss/lo": float(torch.randn(()))}) for k in range(5)]


def points(folder: str) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(folder)
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_the_points_are_lightnings(tmp_path: Path) -> None:
    ours, theirs = (TensorBoardLogger(tmp_path, name=n) for n in ("ours", "theirs"))
    log_rows(ours, ROWS)
    for step, row in ROWS:
        theirs.log_metrics(row, step=step)
    for logger in (ours, theirs):
        logger.finalize("success")
    found = points(ours.log_dir)
    assert found == points(theirs.log_dir)
    assert [s for s, _ in found["train/loss"]] == [0, 10, 20, 30, 40]


def test_others_are_given_each_row(tmp_path: Path) -> None:
    class Own(TensorBoardLogger):
        """Somebody's own, which may do more with a row."""

    prefixed = TensorBoardLogger(tmp_path, name="prefixed", prefix="mine")
    own, table = Own(tmp_path, name="own"), CSVLogger(tmp_path, name="table")
    for logger in (prefixed, own, table):
        log_rows(logger, ROWS)
        logger.finalize("success")
    assert points(own.log_dir).keys() == {"train/loss", "interval/train/loss/lo"}
    assert "mine-train/loss" in points(prefixed.log_dir)
    assert len((Path(table.log_dir) / "metrics.csv").read_text().splitlines()) == 6


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(tmp_path)
    log_rows(logger, ROWS)

    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    with pytest.raises(OSError, match="No space left"):
        log_rows(logger, ROWS * 1000)


def test_a_run_that_was_lost_gets_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in the queue of TensorBoard's thread, and what its end would flush, is not written either."""
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    mine = acquire(tmp_path / "run")
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    log_rows(logger, ROWS[:2])
    logger.experiment.flush()
    (file,) = (tmp_path / "run").glob("events.*")
    before = file.read_bytes()
    assert len(before) > 100
    (tmp_path / "run" / OWNER / str(mine.number + 1)).write_text("{}")  # another has taken it
    writer = logger.experiment._get_file_writer()
    writer.add_event(Event(step=7))
    thread = writer.event_writer._async_writer._worker
    thread.join(10)
    assert isinstance(thread.exception, OwnershipLostError)
    with pytest.raises(OwnershipLostError):
        logger.experiment.flush()
    assert file.read_bytes() == before
    mine.release()
