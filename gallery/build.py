"""Rebuild the figures, tables and numbers of README and docs from the code, or check them (--check)."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python gallery/build.py` puts gallery/ there

from gallery import check, kept, manifest, placeholders
from gallery.recipe import Entry, Folders, Recipe, Run
from gallery.recipes import RECIPES
from gallery.running import REPO, finished, git_state, perform, read_stamp

IMAGES = REPO / "docs" / "images"


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def wanted(only: Sequence[str]) -> tuple[list[Recipe], list[Run]]:
    """Return the recipes and runs that --only names; all of them without it.

    Raises:
        SystemExit: a name is neither a recipe's nor a run's.
    """
    known = {r.name for r in RECIPES} | {run.name for r in RECIPES for run in r.runs}
    if unknown := [n for n in only if n not in known]:
        raise SystemExit(f"error: --only: {unknown[0]!r} is not allowed; give some of {', '.join(sorted(known))}")
    named = {n for r in RECIPES if r.name in only for kind in manifest.KINDS for e in getattr(r, kind) for n in e.runs}
    named |= set(only) | {run.name for r in RECIPES if r.name in only for run in r.runs}
    runs = [run for r in RECIPES for run in r.runs if not only or run.name in named]
    return [r for r in RECIPES if not only or r.name in only or any(run in runs for run in r.runs)], runs


def what_is_kept(runs: Sequence[Run]) -> str:
    """Say in one line which runs are not run again, by name if they are few, and how to have one run."""
    few = ", ".join(run.name for run in runs) if len(runs) <= 6 else f"{len(runs)} runs"
    return f"kept: {few}: not run again; to have a run made anew, delete gallery/kept/NAME.json"


def perform_all(runs: Sequence[Run], root: Path, full: bool, jobs: int) -> list[str]:
    """Run what is not finished, ``jobs`` side by side, and say what time is left; return what went wrong."""
    if there := [run for run in runs if full and not finished(run, root, full) and kept.read(run)]:
        say(what_is_kept(there))
        runs = [run for run in runs if run not in there]
    for run in runs:
        if why := run.left_out(full):
            say(f"left out: {why}")
    runs = [run for run in runs if not run.left_out(full)]
    waiting = [run for run in runs if not finished(run, root, full)]
    guesses = [run.minutes if full else run.quick_minutes for run in waiting]
    left = f", about {sum(guesses) / jobs:.0f} min" if waiting else ""
    say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already{left}")
    failed, started = [], time.monotonic()

    def attempt(run: Run) -> str:
        try:
            perform(run, root, full)
            stamp = read_stamp(run, root, full)
            if full and run.keeps and stamp is not None:
                kept.keep(run, root, stamp)
        except RuntimeError as error:
            return str(error)
        return "" if finished(run, root, full) else f"{run.name}: its code changed while it ran; build again"

    with ThreadPoolExecutor(jobs) as pool:
        for k, error in enumerate(pool.map(attempt, waiting), 1):
            spent = (time.monotonic() - started) / 60
            left = f"{spent / sum(guesses[:k]) * sum(guesses[k:]):.0f} min left"
            say(f"error: {error}" if error else f"{k} of {len(waiting)}: {waiting[k - 1].name} is done, {left}")
            failed += [error] if error else []
    return failed


def make(entry: Entry, kind: str, folders: Folders, place: Path) -> dict[str, str]:
    """Make an entry from its runs' folders; a figure's PNG goes to ``place``."""
    assert entry.make is not None
    if kind != "figures":
        assert not isinstance(entry.make, str)
        return {"text" if kind == "tables" else "value": entry.make(folders)}
    path = place / f"{entry.name}.png"
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(entry.make, str):
        shutil.copyfile(folders[entry.runs[0]] / entry.make, path)
    else:
        made = entry.make(folders)
        if Path(made) != path:
            shutil.move(made, path)
    return {"sha256": check.sha256(path)}


def collect(found: dict[str, Any], recipes: Sequence[Recipe], out: Path, full: bool) -> list[str]:
    """Enter all that the finished runs allow into the manifest; return what went wrong."""
    root, failed = out / "runs", []
    runs = {run.name: run for r in RECIPES for run in r.runs}
    stamps = {n: read_stamp(run, root, full) for n, run in runs.items() if finished(run, root, full)}
    places = {n: root / runs[n].folder for n in stamps}
    for name in runs.keys() - stamps.keys() if full else ():
        if stamp := kept.unpack(runs[name], out / "kept"):
            stamps[name], places[name] = stamp, out / "kept" / runs[name].folder
    drawn = {name for name, place in places.items() if place.is_relative_to(root)}  # what is kept has no pictures
    folders = Folders(places, full)
    for recipe in recipes:
        for kind in manifest.KINDS:
            for entry in getattr(recipe, kind):
                if entry.make is None or not set(entry.runs) <= set(stamps):
                    continue
                if isinstance(entry.make, str) and not set(entry.runs) <= drawn:  # the docs have it, as it was drawn
                    continue
                try:
                    content = make(entry, kind, folders, IMAGES if full else out / "figures")
                except Exception as error:  # one entry's trouble is not the others'
                    failed.append(f"{entry.name}: {type(error).__name__}: {error}")
                    continue
                old = found[kind].get(entry.name, {})
                for key, value in content.items():
                    if key in old and old[key] != value:
                        shown = f"{old[key]!r} -> {value!r}" if kind == "numbers" else "differs from the one before"
                        say(f"changed: {entry.name}: {shown}")
                manifest.record_entry(found, kind, entry, content)
                for name in entry.runs:
                    stamp = stamps[name]
                    assert stamp is not None
                    manifest.record_run(found, runs[name], stamp)
    return failed


def build(full: bool, only: Sequence[str], out: Path, jobs: int = 1) -> int:
    """Run the recipes and write what they make; return the exit code."""
    recipes, runs = wanted(only)
    started = time.monotonic()
    failed = perform_all(runs, out / "runs", full, jobs)
    target = manifest.DOCS if full else out / "gallery.json"
    found = manifest.read(target)
    found["setting"] = "full" if full else "quick"
    failed += collect(found, recipes, out, full)
    manifest.write(found, target)
    if full:
        fill_docs(found)
    else:
        (out / "tables").mkdir(parents=True, exist_ok=True)
        for name, entry in found["tables"].items():
            (out / "tables" / f"{name}.md").write_text(entry["text"] + "\n")
        lines = [f"{name}: {entry['value']}" for name, entry in sorted(found["numbers"].items())]
        (out / "numbers.txt").write_text("\n".join(lines) + "\n")
    for line in failed:
        say(f"error: {line}")
    say(
        f"{sum(len(found[k]) for k in manifest.KINDS)} entries in {target}, {(time.monotonic() - started) / 60:.1f} min"
    )
    return 1 if failed else 0


def fill_docs(found: dict[str, Any]) -> None:
    """Put the manifest's texts between the marks of README and docs."""
    tables = {name: entry["text"] for name, entry in found["tables"].items()}
    numbers = {name: entry["value"] for name, entry in found["numbers"].items()}
    for page, text in check.read_docs(REPO).pages.items():
        (REPO / page).write_text(placeholders.fill(text, tables, numbers))


def adopt() -> int:
    """Enter what the docs have of a recipe, as not rebuilt: what is new, or was so and is of other runs now."""
    found, commit = manifest.read(), git_state()["commit"]
    pages = {str(p): p.read_text() for p in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))}
    texts = {
        "figures": {p.stem: {"sha256": check.sha256(p)} for p in IMAGES.glob("*.png")},
        "tables": {name: {"text": t} for _, name, t in placeholders.each_page(pages, placeholders.blocks)},
        "numbers": {name: {"value": t} for _, name, t in placeholders.each_page(pages, placeholders.spans)},
    }
    for recipe in RECIPES:
        for kind in manifest.KINDS:
            for entry in getattr(recipe, kind):
                old = found[kind].get(entry.name)
                new = old is None or (not old["rebuilt"] and old["runs"] != list(entry.runs))
                if new and entry.name in texts[kind]:
                    content = {**texts[kind][entry.name], "commit": commit}
                    manifest.adopt(found, kind, entry, [run for r in RECIPES for run in r.runs], content)
                    say(f"adopted, not rebuilt: {entry.name}")
    manifest.drop_unused(found, RECIPES)
    manifest.write(found, manifest.DOCS)
    return 0


def run_check() -> int:
    """Print what is wrong with README and docs; return the exit code."""
    docs = check.read_docs(REPO)
    found = check.problems(docs, RECIPES)
    for line in found:
        say(f"error: {line}")
    say(check.summary(docs.manifest))
    return 1 if found else 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="full settings, into README and docs; else quick ones")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="recipes or runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: build/gallery-quick or build/gallery-full")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs side by side")
    parser.add_argument("--check", action="store_true", help="check README and docs against docs/gallery.json")
    parser.add_argument("--adopt", action="store_true", help="enter new marks of the docs as they stand, not rebuilt")
    given = parser.parse_args(args)
    if given.check:
        return run_check()
    if given.adopt:
        return adopt()
    out = given.out or REPO / "build" / ("gallery-full" if given.full else "gallery-quick")
    return build(given.full, given.only, out.resolve(), max(1, given.jobs))


if __name__ == "__main__":
    raise SystemExit(main())
