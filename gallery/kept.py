"""What runs of many hours came to, kept in the repository: a page of theirs can be built where they were not run.

A run that ``keeps`` leaves gallery/kept/NAME.json when the full setting has run it: its stamp (commands, commit, day,
machine), of every results.json below its folder what recipes read, of every metrics.csv the columns that the run's
``curves`` name, and small files that its ``files`` name, as they are (arrays in base 64). Pictures that the run itself
draws are not in it: they stand in docs/images. As long as the file is there and its commands are the run's, the run is
not run again; whoever wants it anew deletes the file.
"""

from __future__ import annotations

import base64
import csv
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gallery.recipe import Run
from gallery.running import REPO

PLACE = REPO / "gallery" / "kept"
DIGITS = 7  # of each value: single precision has no more
# those by which recipes tell a run's tests apart, or that they count by
SETTINGS = ("model.evaluation.", "model.settings.", "model.samplers", "model.chains", "model.warm_steps", "model.lr")
ARRAYS = ("trajectories", "frontier", "verdicts")  # that pictures and tables are made from; numbers to four digits


def path_of(run: Run, place: Path = PLACE) -> Path:
    """Return where a run is kept."""
    return place / f"{run.name}.json"


def condensed(content: dict[str, Any]) -> dict[str, Any]:
    """Return what recipes read of a results.json."""
    metrics = {
        name: {"values": [None if v is None else float(f"{v:.{DIGITS}g}") for v in metric["values"]]}
        for name, metric in content["metrics"].items()
    }
    settings = {name: v for name, v in content["settings"].items() if name.startswith(SETTINGS)}
    arrays = {name: rounded(x) for name, x in content.get("arrays", {}).items() if name in ARRAYS}
    named = {k: content[k] for k in ("stage", "seeds", "references", "step") if k in content}
    return named | {"settings": settings, "metrics": metrics} | ({"arrays": arrays} if arrays else {})


def rounded(content: Any) -> Any:
    """Return nested lists and mappings, their numbers to four significant digits."""
    if isinstance(content, dict):
        return {key: rounded(x) for key, x in content.items()}
    if isinstance(content, list):
        return [rounded(x) for x in content]
    return float(f"{content:.4g}") if isinstance(content, float) else content


def curves(run: Run, path: Path) -> dict[str, list[str]]:
    """Return the columns of a metrics.csv that match a run's ``curves``, the step's first, where any has a value."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [k for k in (rows[0] if rows else {}) if any(fnmatch(k, pattern) for pattern in run.curves)]
    rows = [row for row in rows if any(row[k] for k in names)]
    return {name: [short_number(row[name]) for row in rows] for name in ("step", *names)} if rows else {}


def short_number(text: str) -> str:
    """Return a number's text with no more digits than are kept; no number where there is none."""
    return f"{float(text):.{DIGITS}g}" if text else text


def write_curves(columns: dict[str, list[str]], path: Path) -> None:
    """Write :func:`curves` as a metrics.csv."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def small_file(path: Path) -> str:
    """Return what is kept of a small file: its text, of an array (.npy) its bytes in base 64."""
    return base64.b64encode(path.read_bytes()).decode() if path.suffix == ".npy" else path.read_text()


def keep(run: Run, root: Path, stamp: dict[str, Any], place: Path = PLACE) -> Path:
    """Write what a finished run came to; return where."""
    folder = root / run.folder
    found = sorted(path for place in run.places(root) for path in place.rglob("results*.json"))
    results = {str(path.relative_to(folder)): condensed(json.loads(path.read_text())) for path in found}
    csvs = sorted(path for place in run.places(root) for path in place.rglob("metrics.csv")) if run.curves else []
    small = sorted({p for pattern in run.files for p in folder.glob(pattern)})
    parts: dict[str, dict[str, Any]] = {
        "results": results,
        "curves": {str(path.relative_to(folder)): curves(run, path) for path in csvs},
        "files": {str(p.relative_to(folder)): small_file(p) for p in small},
    }
    path = path_of(run, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'{{"stamp": {json.dumps(stamp)}'
    for part, found_there in parts.items():
        if found_there:
            lines = [f"{json.dumps(name)}: {json.dumps(content)}" for name, content in found_there.items()]
            text += f',\n"{part}": {{\n' + ",\n".join(lines) + "\n}"
    path.write_text(text + "}\n")
    return path


def read(run: Run, place: Path = PLACE) -> dict[str, Any] | None:
    """Return what a run came to, where it is kept and its commands are still the same."""
    path = path_of(run, place)
    if not (run.keeps and path.is_file()):
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["stamp"]["identity"]["commands"] == list(run.commands) else None


def unpack(run: Run, root: Path, place: Path = PLACE) -> dict[str, Any] | None:
    """Lay a kept run's results below ``root`` as the run itself would, its stamp too; return the stamp."""
    found = read(run, place)
    if found is None:
        return None
    folder, stamps = root / run.folder, root / "stamps"
    for place in run.places(root):
        shutil.rmtree(place)
    for name, content in found.get("results", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for name, columns in found.get("curves", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_curves(columns, path)
    for name, text in found.get("files", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(text) if path.suffix == ".npy" else text.encode())
    stamps.mkdir(parents=True, exist_ok=True)
    (stamps / f"{run.name}.json").write_text(json.dumps(found["stamp"]))
    stamp: dict[str, Any] = found["stamp"]
    return stamp
