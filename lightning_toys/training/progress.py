"""Progress of work that is no training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


class WorkProgress:
    """Counts ``total`` equal pieces of work, with an ETA.

    Args:
        total: pieces.
        what: what is being done.
        shown: false on the ranks that stay silent.
        line_seconds: time between two lines without a terminal.
    """

    def __init__(self, total: int, what: str, shown: bool = True, line_seconds: float = 15.0) -> None:
        self.total, self.what, self.shown, self.line_seconds = total, what, shown, line_seconds
        self.done = 0
        self.begin = self.last = time.monotonic()
        self.bar = tqdm(total=total, desc=what, mininterval=0.5) if shown and sys.stderr.isatty() else None

    def __enter__(self) -> WorkProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, word: str = "", pieces: int = 1) -> None:
        """Count one piece or several; ``word`` names what it was."""
        self.done += pieces
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(word, refresh=False)
            self.bar.update(pieces)
        elif self.shown and now - self.last > self.line_seconds:
            self.last = now
            left = (now - self.begin) / self.done * (self.total - self.done)
            print(f"{self.what} {self.done}/{self.total}  {word}  {left:.0f} s left", file=sys.stderr, flush=True)
