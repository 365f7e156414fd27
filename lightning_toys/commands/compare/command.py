"""compare: its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_toys.errors import ToyError


def said(error: OSError | ValueError) -> str:
    """Return what an error of the file system's says, without the name."""
    return str(getattr(error, "strerror", None) or error)


class OneLineParser(argparse.ArgumentParser):
    """argparse with our errors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing a usage."""
        raise ToyError(f"compare: {message}")


def compare_command(args: Sequence[str]) -> None:
    """Run `compare RUN_OR_FOLDER ... [--baseline LABEL] [--out FOLDER]`."""
    parser = OneLineParser(prog="lightning-toys compare", description="Put runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument(
        "--baseline", help="label (or part of one) or folder name that differences are taken from; default: the first"
    )
    parser.add_argument("--out", type=Path, help="folder for the files; default: comparison/ beside the runs")
    given = parser.parse_args(list(args))
    # after the help, which need not wait for them
    from lightning_toys.commands.compare.report import baselines_named, compare_runs
    from lightning_toys.commands.compare.runs import find_results, load_runs

    if given.out is not None:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise ToyError(f"--out: {given.out} is no folder that can be made ({said(error)})") from None
    runs = load_runs(find_results(given.runs))
    baselines = {} if given.baseline is None else baselines_named(runs, given.baseline)
    out = given.out
    if out is None:
        first = given.runs[0]
        out = (
            first if first.is_dir() and not (first / "results.json").exists() else runs[0].folder.parent
        ) / "comparison"
    compare_runs(runs, out, baselines)
