"""Whether each table, number and picture of README and docs is that of docs/gallery.json, and none stands beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gallery import placeholders
from gallery.recipe import Recipe

SCREENSHOTS = tuple(  # by `make screenshots`
    f"tensorboard_{name}"
    for name in (
        *("scalars", "hparams", "images", "bands"),
        *("flow_vs_regression", "generative_policy", "mirror_descent", "update_entropy", "bilevel"),
    )
)
KINDS = ("figures", "tables", "numbers")


@dataclass(frozen=True)
class Docs:
    """Pages, manifest, pictures and the list of numbers that no run of ours measures."""

    pages: dict[str, str]
    manifest: dict[str, Any]
    pictures: dict[str, str]  # name to SHA-256
    allowed: dict[str, Any]


def sha256(path: Path) -> str:
    """Return a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_docs(repo: Path) -> Docs:
    """Read what the check is about."""
    files = [repo / "README.md", *sorted((repo / "docs").glob("*.md"))]
    return Docs(
        pages={str(p.relative_to(repo)): p.read_text() for p in files},
        manifest=json.loads((repo / "docs/gallery.json").read_text()),
        pictures={p.stem: sha256(p) for p in sorted((repo / "docs/images").glob("*.png"))},
        allowed=yaml.safe_load((repo / "gallery/allowed.yaml").read_text()),
    )


def problems(docs: Docs, recipes: Sequence[Recipe]) -> list[str]:
    """Return one line for each thing that is wrong."""
    out = [f"{page}: {why}" for page, text in docs.pages.items() for why in placeholders.broken(text)]
    return out + wrong_texts(docs) + wrong_pictures(docs) + wrong_entries(docs, recipes) + wrong_prose(docs)


def wrong_texts(docs: Docs) -> list[str]:
    """Blocks and marked numbers that are not the manifest's, byte for byte."""
    out = []
    for kind, find, what in (("tables", placeholders.blocks, "text"), ("numbers", placeholders.spans, "value")):
        for page, name, text in placeholders.each_page(docs.pages, find):
            entry = docs.manifest[kind].get(name)
            if entry is None:
                out.append(f"{page}: {name} is not among the {kind} of docs/gallery.json")
            elif entry[what] != text:
                out.append(f"{page}: {name} is {difference(text, entry[what])}")
    return out


def difference(found: str, wanted: str) -> str:
    """Return the first lines that differ, in words."""
    a, b = found.split("\n"), wanted.split("\n")
    k = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    x, y = ("".join(lines[k : k + 1]) or "(nothing)" for lines in (a, b))
    return f"{x!r} in the docs and {y!r} in docs/gallery.json"


def wrong_pictures(docs: Docs) -> list[str]:
    """Pictures that are shown and not there, there and not listed, or not the ones that were listed."""
    out = []
    listed = docs.manifest["figures"]
    for page, text in docs.pages.items():
        named = placeholders.images(text)
        out += [f"{page}: docs/images/{n}.png is not there" for n in named if n not in docs.pictures]
    for name, digest in docs.pictures.items():
        if name in SCREENSHOTS:
            continue
        if name not in listed:
            out.append(f"docs/images/{name}.png is not among the figures of docs/gallery.json")
        elif listed[name]["sha256"] != digest:
            out.append(f"docs/images/{name}.png is not the picture that docs/gallery.json lists")
    return out


def wrong_entries(docs: Docs, recipes: Sequence[Recipe]) -> list[str]:
    """Entries that no page uses, that no recipe makes or that are made and not listed."""
    out = []
    used: dict[str, set[str]] = {
        "figures": {n for text in docs.pages.values() for n in placeholders.images(text)},
        "tables": {name for _, name, _ in placeholders.each_page(docs.pages, placeholders.blocks)},
        "numbers": {name for _, name, _ in placeholders.each_page(docs.pages, placeholders.spans)},
    }
    runs: set[str] = set()
    for kind in KINDS:
        made = {entry.name: list(entry.runs) for r in recipes for entry in getattr(r, kind)}
        for name, entry in docs.manifest[kind].items():
            runs.update(entry["runs"])
            if name not in used[kind]:
                out.append(f"docs/gallery.json: {kind}: {name} is used by no page")
            if name not in made:
                out.append(f"docs/gallery.json: {kind}: {name} is made by no recipe")
            elif made[name] != entry["runs"]:
                out.append(f"docs/gallery.json: {kind}: {name} is of other runs than its recipe says")
        out += [
            f"gallery/recipes: {kind}: {n} is not in docs/gallery.json" for n in made if n not in docs.manifest[kind]
        ]
    commands = {run.name: list(run.commands) for r in recipes for run in r.runs}
    for name in sorted(runs | set(docs.manifest["runs"])):
        if name not in docs.manifest["runs"] or name not in runs:
            out.append(f"docs/gallery.json: the run {name} is {'unused' if name not in runs else 'missing'}")
        elif commands.get(name) != docs.manifest["runs"][name]["commands"]:
            out.append(f"docs/gallery.json: the run {name} has other commands than its recipe")
    return out


def wrong_prose(docs: Docs) -> list[str]:
    """Numbers outside of marks that gallery/allowed.yaml does not account for, and what it lists in vain."""
    out = []
    for page, text in docs.pages.items():
        rule = docs.allowed.get(page) or []
        if isinstance(rule, dict):  # a page that is another command's
            continue
        free: list[tuple[int, int]] = []
        for item in rule:
            at = text.find(item["text"])
            if at < 0 or not str(item.get("why", "")).strip():
                out.append(f"gallery/allowed.yaml: {page}: {item['text']!r} is not there, or has no reason")
            while at >= 0:
                free.append((at, at + len(item["text"])))
                at = text.find(item["text"], at + 1)
        for start, end, number in placeholders.unmarked(text):
            if not any(a <= start and end <= b for a, b in free):
                where = f"{page}:{placeholders.line_of(text, start)}"
                out.append(f"{where}: {number!r} is neither marked nor in gallery/allowed.yaml with a reason")
    out += [f"gallery/allowed.yaml: no page {page}" for page in docs.allowed if page not in docs.pages]
    return out


def summary(manifest: dict[str, Any]) -> str:
    """Return how much of the docs was rebuilt."""
    words, left = [], 0
    for kind in KINDS:
        rebuilt = [e["rebuilt"] for e in manifest[kind].values()]
        words.append(f"{sum(rebuilt)} of {len(rebuilt)} {kind}")
        left += len(rebuilt) - sum(rebuilt)
    more = "; the others are as an earlier run left them in the docs" if left else ""
    return f"rebuilt from their runs: {', '.join(words)}{more}"
