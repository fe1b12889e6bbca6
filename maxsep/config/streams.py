"""Standard input, output and error: never a reason to crash."""

import os
import sys


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


def lost_output() -> OSError | None:
    """Why standard output cannot be written, if so; from then on it is /dev/null.

    BrokenPipeError: its reader has gone, as `head` has when it has seen enough.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
