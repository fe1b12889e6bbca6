"""What long work that is no training says of how far it has come, on standard error."""

import sys
import time
from collections.abc import Callable


class Ticker:
    """Lines to a log; on a terminal, progress in one line that is written over."""

    def __init__(self):
        self._terminal = sys.stderr.isatty()
        self.progress = seldom(self._overwrite, 0.2) if self._terminal else seldom(self.line, 30)

    def _overwrite(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self._terminal else text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Makes room for what is printed elsewhere."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def seldom(log: Callable[[str], None], seconds: float) -> Callable[[str], None]:
    """Lets a line through once in so many seconds."""
    last = time.monotonic()

    def line(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            log(text)

    return line
