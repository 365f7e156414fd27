"""compare: its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_toys.errors import ToyError, did_you_mean, printable

FLAGS = {
    "--baseline": "the label of a run, part of it, or its folder's name",
    "--out": "a folder",
    "--html": "a file that ends in .html",
}


class OneLineParser(argparse.ArgumentParser):
    """argparse with our errors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing a usage."""
        raise ToyError(f"compare: {message}")


def joined(args: Sequence[str]) -> list[str]:
    """Return the words with each flag and its value in one, so that a value may begin with a dash.

    Raises:
        ToyError: a flag has no value.
    """
    out, words = [], iter(args)
    for word in words:
        if word in FLAGS:
            value = next(words, None)
            if value is None or value.partition("=")[0] in FLAGS:
                raise ToyError(f"{word}: a value is missing; give {FLAGS[word]}")
            word = f"{word}={value}"
        out.append(word)
        if word == "--":
            return [*out, *words]
    return out


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Return what a command line of `compare` says.

    Raises:
        ToyError: it has an unknown flag, a flag without value, or no run.
    """
    parser = OneLineParser(prog="lightning-toys compare", description="Put runs side by side.", allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN_OR_FOLDER", help="run folders, or folders above them")
    parser.add_argument(
        "--baseline", help="label (or part of one) or folder name that differences are taken from; default: the first"
    )
    parser.add_argument("--out", help="folder for the files; default: comparison/ beside the runs")
    parser.add_argument("--html", metavar="FILE", help="one page with all of it: FILE.html; without it none is made")
    given, unknown = parser.parse_known_intermixed_args(joined(args))
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = did_you_mean(flag, FLAGS) or ("" if flag.startswith("--") else f"; a run of that name is ./{flag}")
        raise ToyError(f"{flag}: no such flag; give {', '.join(FLAGS)}{hint}")
    if not given.runs:
        raise ToyError("compare: RUN_OR_FOLDER is required; give run folders, or folders above them")
    return given


def compare_command(args: Sequence[str]) -> None:
    """Run `compare RUN_OR_FOLDER ... [--baseline LABEL] [--out FOLDER] [--html FILE]`.

    Raises:
        ToyError: says on one line what is not allowed, whatever characters are in the names of others' files.
    """
    given = parse(args)
    try:
        compare_named([Path(x) for x in given.runs], given.baseline, given.out, given.html)
    except ToyError as error:
        raise ToyError(printable(str(error))) from None


def compare_named(paths: Sequence[Path], baseline: str | None, out: str | None, html: str | None) -> None:
    """Compare the runs in some folders."""
    # after the help, which need not wait for them
    from lightning_toys.commands.compare.output import check_folder, check_page
    from lightning_toys.commands.compare.report import baselines_named, compare_runs
    from lightning_toys.commands.compare.runs import find_results, load_runs

    folder = None if out is None else check_folder(out)
    page = None if html is None else check_page(html)
    runs = load_runs(find_results(paths))
    baselines = {} if baseline is None else baselines_named(runs, baseline)
    if folder is None:
        first = paths[0]
        above = first.is_dir() and not (first / "results.json").exists()
        folder = check_folder(str((first if above else runs[0].folder.parent) / "comparison"))
    compare_runs(runs, folder, baselines, page)
