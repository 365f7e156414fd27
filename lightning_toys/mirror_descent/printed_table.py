"""What a module with a table of its own does when it is run by ``python -m``: print it, and write it where asked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def print_table(table: Callable[[], Sequence[str]], description: str | None, args: Sequence[str] | None = None) -> int:
    """Print a table; with ``--out FILE`` write it there too, where no file is yet. Return the exit code.

    Args:
        table: returns the lines; called once ``--out`` is known to be allowed.
        description: a module's docstring, whose first line ``--help`` shows.
        args: words of the command line; those of the process if left out.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a Markdown file that is not there yet")
    out: Path | None = parser.parse_args(args).out
    if out is not None and (out.exists() or not out.parent.is_dir()):
        print(f"error: --out: {str(out)!r} is not allowed; give a new file in a folder that exists", file=sys.stderr)
        return 2
    text = "\n".join(table())
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    return 0
