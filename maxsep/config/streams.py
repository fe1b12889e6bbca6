"""Standard input, output and error: never a reason to crash."""

import os
import sys
from collections.abc import Callable
from typing import TextIO


def ready() -> None:
    """Makes the three usable, however the program was started.

    One that is closed, as some supervisors start programs, becomes /dev/null: else the next file that is opened takes
    its number, and what libraries print would land in it. A character that the encoding lacks is written as its escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)


class Output:
    """Standard output, which remembers why it could not be written; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lost: OSError | None = None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._tried(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def lost(self) -> OSError | None:
        """Why it could not be written, if so: it is /dev/null from now on.

        BrokenPipeError: its reader has gone, as `head` has when it has seen enough.
        """
        error, self._lost = self._lost, None
        if error is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return error

    def _tried(self, part: Callable):
        try:
            return part()
        except OSError as error:
            self._lost = error
            raise


def lost() -> OSError | None:
    """As `Output.lost`, of standard output."""
    return sys.stdout.lost() if isinstance(sys.stdout, Output) else None
