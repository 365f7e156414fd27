"""How Sphinx builds the site (`make docs`): out of the Markdown pages of this folder, and the docstrings."""

from __future__ import annotations

import re
import sys
import tomllib
from functools import cache
from os.path import relpath
from pathlib import Path
from typing import Any

from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
REPO = DOCS.parent
sys.path.insert(0, str(REPO))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]

project = "lightning_toys"
author = PROJECT["authors"][0]["name"]
copyright = author
extensions = ["myst_parser", *(f"sphinx.ext.{name}" for name in ("apidoc", "autodoc", "napoleon", "viewcode"))]
exclude_patterns = ["examples", "notebooks", "api/modules/modules.rst"]  # linked, not rendered; a list of one
myst_heading_anchors = 4  # the anchors that GitHub gives

html_theme = "furo"  # no font and no script from elsewhere; searches without a server
html_title = project
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_copy_source = False
smartquotes = False  # two dashes begin a flag, and quotes are what is typed
html_theme_options = {
    "source_repository": PROJECT["urls"]["Homepage"],
    "source_branch": "main",
    "source_directory": "docs/",
}

# every module has a page, written anew by each build; what it no longer writes is removed
apidoc_modules = [
    {
        "path": str(REPO / "lightning_toys"),  # as the patterns below begin
        "destination": "api/modules",
        "exclude_patterns": [str(REPO / "lightning_toys" / name) for name in ("__main__.py", "commands/template*")],
        "separate_modules": True,
        "module_first": True,
        "max_depth": 1,
    }
]
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
    "ignore-module-all": True,  # what a package only passes on is on the page of the module that defines it
}
autodoc_typehints_format = "short"
autodoc_mock_imports = ["triton"]  # comes with CUDA builds of torch alone
napoleon_use_ivar = True  # else attributes of a dataclass are described twice
default_role = "code"  # `x` in a docstring
toc_object_entries = False

if tags.has("pages"):  # noqa: F821  # the pages alone, without the API: quick
    apidoc_modules = []
    exclude_patterns += ["api/modules"]
    suppress_warnings = ["toc.excluded", "toc.not_readable", "myst.xref_missing"]

PAGES = {  # files outside of docs that a page includes
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
INLINE_CODE = re.compile(r"(``.+?``|`[^`]+`)")


def relinked(text: str, folder: Path, docname: str) -> str:
    """Lead links that are written from a folder to pages, else to the repository, as README's in the wheel are."""
    page = (DOCS / docname).parent

    def target(match: re.Match[str]) -> str:
        path = (folder / match[1]).resolve()
        if path.is_relative_to(DOCS) and not path.is_dir():
            return relpath(path, page)
        relative = path.relative_to(REPO).as_posix()
        return PAGES.get(relative) or f"{PROJECT['urls']['Homepage']}/tree/main/{relative}"

    return LINK.sub(target, text)


def link_to_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Rewrite the links of a page."""
    source[0] = relinked(source[0], (DOCS / docname).parent, docname)


def link_included(app: Sphinx, relative_path: Path, docname: str, source: list[str]) -> None:
    """Rewrite the links of a file outside of docs that a page includes."""
    source[0] = relinked(source[0], (DOCS / relative_path).resolve().parent, docname)


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep stars and bars of formulas from being markup, and an indented block below a line of text as it is."""
    out: list[str] = []
    verbatim = doctest = False
    for i, line in enumerate(lines):
        indented = line.startswith(" ")
        if indented and i > 1 and not lines[i - 1] and lines[i - 2] and not lines[i - 2].startswith((" ", "-")):
            out += ["::", ""]
            verbatim = True
        verbatim = verbatim and (indented or not line)
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        if verbatim or doctest:
            out.append(line)
        else:
            parts = INLINE_CODE.split(line)
            parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
            out.append("".join(parts))
    lines[:] = out


def names_as_they_are(app: Sphinx, doctree: Any) -> None:
    """Look a name up as it is: else, of several classes that are called so, any is linked."""
    for node in doctree.findall(pending_xref):
        if node.get("refdomain") == "py":
            node.attributes.pop("refspecific", None)  # that it is there counts, whatever its value


@cache
def by_last_word(domain: Any) -> dict[str, list[str]]:
    """Return the full names of all that is documented, by their last words."""
    found: dict[str, list[str]] = {}
    for name in domain.objects:
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def find_short(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Find what a docstring calls by the name under which its module imports it, else the only class of that name."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not name:
        return None
    domain = env.get_domain("py")
    first, _, rest = name.partition(".")
    found = getattr(sys.modules.get(node.get("py:module") or ""), first, None)
    if getattr(found, "__module__", None) and hasattr(found, "__qualname__"):
        whole = ".".join(filter(None, (found.__module__, found.__qualname__, rest)))
    else:
        known = by_last_word(domain).get(first, []) if first[:1].isupper() else []
        whole = ".".join(filter(None, (*known, rest))) if len(known) == 1 else name
    if whole == name:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], whole, node, contnode)


def setup(app: Sphinx) -> None:
    """Join the above to the build."""
    app.connect("source-read", link_to_repository)
    app.connect("include-read", link_included)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
    app.connect("doctree-read", names_as_they_are)
    app.connect("missing-reference", find_short)
