"""Rows of scalars for loggers: many steps' at once, each step's in one event of TensorBoard's, none in a lost run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_toys.training.ownership import check_owned

Row = tuple[int, Mapping[str, float]]  # step, and values by name


def log_rows(logger: Logger, rows: Sequence[Row]) -> None:
    """Give rows to a logger.

    TensorBoard's logger writes an event for each value, which takes .05 ms, and tells of a full disk as of a value that
    it does not support; here a step's values are one event. Other loggers, and its subclasses, get each row as usual.

    Raises:
        OSError: TensorBoard's thread could not write an earlier event.
    """
    if isinstance(logger, TensorBoardLogger):
        check_each_event(logger)
    if type(logger) is not TensorBoardLogger or logger._prefix:
        for step, row in rows:
            logger.log_metrics(dict(row), step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    writer: Any = logger.experiment._get_file_writer()
    for step, row in rows:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        writer.add_summary(Summary(value=values), step)


class OwnedRecords:
    """TensorBoard's record writer, which writes nothing to a run that this process has lost.

    Its thread writes what was queued before, be it hours ago that the process was stopped. A process that is stopped in
    the microseconds between the question and the write still writes that one event when it wakes: no system call does
    both.
    """

    def __init__(self, records: Any, folder: str) -> None:
        self.records, self.folder = records, folder

    def write(self, data: bytes) -> None:
        """Write an event."""
        check_owned(self.folder)
        self.records.write(data)

    def flush(self) -> None:
        """Write what is held back."""
        check_owned(self.folder)
        self.records.flush()

    def close(self) -> None:
        """Close the file."""
        self.records.close()


def check_each_event(logger: TensorBoardLogger) -> None:
    """Have TensorBoard's thread ask who owns the run before each event that it writes."""
    queue: Any = logger.experiment._get_file_writer().event_writer._async_writer
    if not isinstance(queue._writer, OwnedRecords):
        queue._writer = queue._worker._record_writer = OwnedRecords(queue._writer, logger.log_dir)
