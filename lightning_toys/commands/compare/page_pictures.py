"""The pictures of a comparison within its page: as they are or smaller, so that the page stays small.

PNG with a palette: for a metric of 2 or of 50 runs it takes a third of the full-colour file, and less than the same
figure as SVG with its letters as paths. SVG without them is as large, and its labels move where the reader's font is
another.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

MOST_BYTES = 1_500_000  # of all pictures of a page; as base64 a third more
COLOURS_KEPT = 128
FULL_DPI = 150  # of the files, and here as long as there is room
LEAST_DPI = 50  # below, letters cannot be read
SHOWN_DPI = 100
STEP = 0.75  # from one size to the next


@dataclass(frozen=True)
class Embedded:
    """A picture as a page holds it.

    Attributes:
        content: a PNG file's.
        width: CSS pixels that it is shown at, 100 an inch.
        height: likewise.
        dpi: dots an inch that it has.
    """

    content: bytes
    width: int
    height: int
    dpi: float = FULL_DPI

    @property
    def uri(self) -> str:
        """The picture as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


def embed(picture: bytes, dpi: float = FULL_DPI) -> Embedded:
    """Return a picture (a PNG file of ours) with a palette, at some dots an inch.

    Example:
        >>> held = io.BytesIO()
        >>> Image.new("RGB", (600, 300), "white").save(held, "png")
        >>> (found := embed(held.getvalue(), 75)).width, found.height, len(found.content) < 400
        (400, 200, True)
    """
    with Image.open(io.BytesIO(picture)) as opened:
        whole = opened.convert("RGB")
    shown, held_size = (scaled(whole.size, x / FULL_DPI) for x in (SHOWN_DPI, dpi))
    if dpi < FULL_DPI:
        whole = whole.resize(held_size, Image.Resampling.LANCZOS)
    held = io.BytesIO()
    whole.quantize(COLOURS_KEPT, dither=Image.Dither.NONE).save(held, "png", optimize=True)
    return Embedded(held.getvalue(), *shown, dpi)


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return a size in dots, times a factor."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def embed_all(pictures: Mapping[str, bytes], most: int = MOST_BYTES) -> dict[str, Embedded | None]:
    """Return pictures that take ``most`` bytes at most, by name; None in the place of one that there is no room for.

    Where they take more, the largest is made smaller until they fit. Where they would not fit if all were as small as
    can be read, the largest is left out first.
    """
    sizes = [float(FULL_DPI)]
    while sizes[-1] * STEP >= LEAST_DPI:
        sizes.append(sizes[-1] * STEP)
    made: dict[tuple[str, int], Embedded] = {}

    def at(name: str, step: int) -> Embedded:
        """Return a picture after some steps down; each is made once."""
        if (name, step) not in made:
            made[name, step] = embed(pictures[name], sizes[step])
        return made[name, step]

    def taken(steps: Mapping[str, int]) -> int:
        return sum(len(at(name, step).content) for name, step in steps.items())

    steps = dict.fromkeys(pictures, 0)
    if taken(steps) > most:
        least = dict.fromkeys(pictures, len(sizes) - 1)
        while least and taken(least) > most:
            del least[max(least, key=lambda n: len(at(n, least[n]).content))]
        steps = dict.fromkeys(least, 0)
        while taken(steps) > most:
            shrinks = [n for n, step in steps.items() if step < len(sizes) - 1]
            steps[max(shrinks, key=lambda n: len(at(n, steps[n]).content))] += 1
    return {name: at(name, steps[name]) if name in steps else None for name in pictures}
