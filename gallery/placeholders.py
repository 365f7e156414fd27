"""Marks in the docs: blocks that hold a table, and spans that hold a number. GitHub shows neither."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

BLOCK = re.compile(r"^<!-- gallery: (\S+) -->\n(.*?)\n<!-- end gallery: \1 -->$", re.M | re.S)
SPAN = re.compile(r"<!-- g:(\S+) -->(.*?)<!-- /g -->")
IMAGE = re.compile(r"""(?:\]\(|src=")(?:docs/)?images/(\w+)\.png[)"]""")
COMMENT = re.compile(r"<!--.*?-->", re.S)
# a mark that begins a line, or a list's item, begins a block of HTML: the rest of the line would not be Markdown
BEGINS = re.compile(r"^\s*(?:[-*+]\s+|\d+\.\s+|>\s*)*<!-- (?:g:|/g)", re.M)
NUMBER = re.compile(
    r"[-+]?[\d.]+\s*±\s*\d*\.?\d+"
    r"|(?<![\w.])[-+]?(?:\d*\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)(?!\d|\.\d)"  # a decimal, or 1e-8; no version
)
HIDDEN = (
    re.compile(r"^```.*?^```", re.M | re.S),  # commands and what they print
    re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*(?:\n|\Z))+"),  # equations
    re.compile(r"`[^`\n]+`"),
    re.compile(r"\]\([^)\s]*\)"),
    re.compile(r"arXiv \d{4}\.\d{5}"),
    BLOCK,
    SPAN,
    COMMENT,
)


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (name, text) of each block."""
    return [(m[1], m[2]) for m in BLOCK.finditer(text)]


def spans(text: str) -> list[tuple[str, str]]:
    """Return (key, text) of each marked number."""
    return [(m[1], m[2]) for m in SPAN.finditer(text)]


def images(text: str) -> list[str]:
    """Return the names of the pictures that a page shows or links to."""
    return IMAGE.findall(text)


def fill(text: str, tables: Mapping[str, str], numbers: Mapping[str, str]) -> str:
    """Put the manifest's texts between the marks; a mark that it does not know stays as it is."""

    def block(m: re.Match[str]) -> str:
        return f"<!-- gallery: {m[1]} -->\n{tables.get(m[1], m[2])}\n<!-- end gallery: {m[1]} -->"

    def span(m: re.Match[str]) -> str:
        return f"<!-- g:{m[1]} -->{numbers.get(m[1], m[2])}<!-- /g -->"

    return SPAN.sub(span, BLOCK.sub(block, text))


def broken(text: str) -> list[str]:
    """Return what is wrong with a page's marks themselves."""
    out = []
    rest = SPAN.sub("", BLOCK.sub("", text))
    out += [f"a mark without its other half: {m[0]}" for m in re.finditer(r"<!-- (?:g:|/g|gallery:|end g)[^>]*>", rest)]
    out += [
        f"line {line_of(text, m.end())}: a mark may not begin a line, or GitHub takes the line for HTML"
        for m in BEGINS.finditer(text)
    ]
    return out


def unmarked(text: str) -> list[tuple[int, int, str]]:
    """Return (start, end, number) of each decimal, power of ten and ± outside of marks, code and links."""
    shown = text
    for pattern in HIDDEN:
        shown = pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), shown)
    return [(m.start(), m.end(), m[0]) for m in NUMBER.finditer(shown)]


def line_of(text: str, position: int) -> int:
    """Return the line's number, from 1."""
    return text.count("\n", 0, position) + 1


def each_page(pages: Mapping[str, str], find: Callable[[str], list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    """Return (page, name, text) of what ``find`` finds in each page."""
    return [(page, name, text) for page, content in pages.items() for name, text in find(content)]
