"""gallery.json: where every figure, table and number comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gallery.recipe import Entry, Recipe, Run
from gallery.running import REPO

KINDS = ("figures", "tables", "numbers")
DOCS = REPO / "docs" / "gallery.json"


def read(path: Path = DOCS) -> dict[str, Any]:
    """Return a manifest, or an empty one where there is none yet."""
    if not path.is_file():
        return {"setting": "full", "runs": {}, **{kind: {} for kind in KINDS}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(manifest: dict[str, Any], path: Path) -> None:
    """Write a manifest in the order of names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in manifest.items()}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def record_run(manifest: dict[str, Any], run: Run, stamp: dict[str, Any]) -> None:
    """Enter a run that has been run."""
    manifest["runs"][run.name] = {
        "commands": list(run.commands),
        "seeds": run.seeds,
        "rebuilt": True,
        **{k: stamp[k] for k in ("git", "date", "machine")},
        "versions": stamp["identity"]["versions"],
        "code": stamp["identity"]["code"],
        "minutes": round(stamp["seconds"] / 60, 1),
    }


def record_entry(manifest: dict[str, Any], kind: str, entry: Entry, content: dict[str, str]) -> None:
    """Enter what has been made from its runs."""
    manifest[kind][entry.name] = {"runs": list(entry.runs), "rebuilt": True, **content}


def drop_unused(manifest: dict[str, Any], recipes: Sequence[Recipe]) -> None:
    """Take out entries that no recipe makes any more, and runs that none is of."""
    for kind in KINDS:
        made = {entry.name for r in recipes for entry in getattr(r, kind)}
        manifest[kind] = {name: entry for name, entry in manifest[kind].items() if name in made}
    used = {run for kind in KINDS for entry in manifest[kind].values() for run in entry["runs"]}
    manifest["runs"] = {name: run for name, run in manifest["runs"].items() if name in used}


def adopt(manifest: dict[str, Any], kind: str, entry: Entry, runs: Sequence[Run], content: dict[str, str]) -> None:
    """Enter what the docs say and no run here has shown."""
    source = f"docs at {content.pop('commit')}"
    manifest[kind][entry.name] = {"runs": list(entry.runs), "rebuilt": False, "from": source, **content}
    for run in runs:
        if run.name in entry.runs and run.name not in manifest["runs"]:
            manifest["runs"][run.name] = {
                "commands": list(run.commands),
                "seeds": run.seeds,
                "rebuilt": False,
                "from": source,
            }
