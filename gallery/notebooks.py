"""Executes docs/notebooks and stores their outputs: ``python gallery/notebooks.py [NAME ...]``.

What is stored holds no path, no time and no line of standard error: it changes where the code or its numbers do.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "docs" / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: Any, folder: Path) -> Any:
    """Return a copy of a notebook with the outputs of an execution in ``folder``, by this interpreter.

    Raises:
        CellExecutionError: a cell raises.
    """
    done = nbformat.from_dict(notebook)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as own:  # not somebody's IPython profile, and sockets of files, not of ports
        manager = {"transport": "ipc", "connection_file": f"{own}/kernel.json"}
        settings: dict[str, Any] = {
            "timeout": 300,
            "kernel_name": "python3",
            "resources": {"metadata": {"path": str(folder)}},
        }
        client = NotebookClient(done, config=Config(AsyncKernelManager=manager), **settings)
        client.execute(env={**os.environ, "PYTHONPATH": str(REPO), "IPYTHONDIR": own, "OMP_NUM_THREADS": "1"})
    return done


def tidy(notebook: Any) -> Any:
    """Return a copy of an executed notebook as it is stored: no counts, no metadata of a machine, no standard error."""
    out = nbformat.from_dict(notebook)  # type: ignore[no-untyped-call]
    out.metadata = nbformat.from_dict(METADATA)  # type: ignore[no-untyped-call]
    for number, cell in enumerate(out.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = {}
            if "execution_count" in output:
                output.execution_count = None
    return out


def main(names: list[str]) -> None:
    """Execute the notebooks with these names, or all, and store them."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            done = execute(nbformat.read(path, as_version=4), Path(folder))  # type: ignore[no-untyped-call]
        nbformat.write(tidy(done), path)  # type: ignore[no-untyped-call]
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
