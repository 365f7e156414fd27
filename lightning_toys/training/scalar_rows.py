"""Rows of scalars for loggers: many steps' at once, each step's in one event of TensorBoard's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

Row = tuple[int, Mapping[str, float]]  # step, and values by name


def log_rows(logger: Logger, rows: Sequence[Row]) -> None:
    """Give rows to a logger.

    TensorBoard's logger writes an event for each value, which takes .05 ms, and tells of a full disk as of a value that
    it does not support; here a step's values are one event. Other loggers, and its subclasses, get each row as usual.

    Raises:
        OSError: TensorBoard's thread could not write an earlier event.
    """
    if type(logger) is not TensorBoardLogger or logger._prefix:
        for step, row in rows:
            logger.log_metrics(dict(row), step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    writer: Any = logger.experiment._get_file_writer()
    for step, row in rows:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        writer.add_summary(Summary(value=values), step)
