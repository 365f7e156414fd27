"""Names that somebody else chose, as Markdown, LaTeX, a terminal and a file system show them: as themselves.

What no reader can see (line ends, control characters) is written out, see :func:`printable`. CSV needs nothing of this.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from lightning_toys.errors import printable

MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$^{}]|(?<![^\W_])_|_(?![^\W_])")
INTERVAL = re.compile(r"\[[-+.\deinfa]+, [-+.\deinfa]+\]")  # brackets around numbers are no link
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "%": r"\%",
        "#": r"\#",
        "_": r"\_",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "`": r"\textasciigrave{}",
        "'": r"\textquotesingle{}",
        "±": r"$\pm$",
    }
)
STEM_BYTES = 120  # of 255: what is set aside, or not yet whole, is called by more


def markdown_text(text: str) -> str:
    r"""Return a text that Markdown shows as it is, in a table or outside of one.

    An underscore within a word is none of Markdown's, and stays.

    >>> markdown_text("num_train=20 [/b] | _x_")
    'num_train=20 \\[/b\\] \\| \\_x\\_'
    """
    if INTERVAL.fullmatch(text):
        return text
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(text))


def latex_text(text: str) -> str:
    r"""Return a text that LaTeX sets as it is.

    >>> latex_text("50 % of a_1")
    '50 \\% of a\\_1'
    """
    escaped = printable(text).translate(LATEX)
    escaped = re.sub(r"([-,])(?=\1)", r"\1{}", escaped)  # two of them would be a dash, or a quotation mark
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped[:1] in ("[", "*") else escaped  # \\ takes them for its option


def encodable(text: str, encoding: str) -> str:
    r"""Return a text that an encoding holds; what it lacks is written out.

    >>> encodable("ü: 1 ± 2", "ascii")
    '\\xfc: 1 +/- 2'
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+/-").encode(encoding, "backslashreplace").decode(encoding)
    return text


def file_stem(name: str) -> str:
    """Return a name for a file: a name's own characters but those that file systems refuse, and not too many."""
    plain = re.sub(r'[<>:"/\\|?*]+', "_", printable(name))
    encoding = sys.getfilesystemencoding()
    plain = plain.encode(encoding, "replace")[:STEM_BYTES].decode(encoding, "ignore").replace("?", "_")
    return plain.strip(" .-") or "unnamed"


def distinct(names: Iterable[str]) -> list[str]:
    """Return names, with a number where one came before, small and capital letters being the same to some disks."""
    seen: set[str] = set()
    out = []
    for name in names:
        k, found = 2, name
        while found.casefold() in seen:
            found, k = f"{name}_{k}", k + 1
        seen.add(found.casefold())
        out.append(found)
    return out
