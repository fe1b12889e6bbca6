"""Faults of the world: what a disk or a network fails to do, and may do a moment later. No mistake of the user's.

They are waited out for `RETRY_SECONDS`, and then end the program with a status that is started again.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

RETRY_SECONDS = 30.0  # in which a file system comes back, or shows what another host has written
PAUSES = 0.2, 5.0  # seconds from one attempt to the next: the first pause, and the longest

RIGHTS = frozenset({errno.EACCES, errno.EPERM})  # which the user has to change
WORLD = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EREMOTEIO", "EUCLEAN", "EBADMSG", "ENODEV", "ENXIO", "EBUSY", "ENOMEM", "ENFILE"),
        *("ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOLINK", "ENOTCONN"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ESHUTDOWN", "EPROTO"),
    )
    if hasattr(errno, name)
)
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")
_RIEGELI = re.compile(r"\w\(\) failed: ([^;]+)")  # array_record: the system call, and what strerror says

T = TypeVar("T")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def number(error: BaseException) -> int | None:
    """The errno of the system call that an error comes from, also in a library in C++; None: it comes from none."""
    for one in chain(error):
        if isinstance(one, OSError) and one.errno is not None:
            return one.errno
        if found := _TENSORSTORE.search(str(one)):
            return int(found[1])
        if (found := _RIEGELI.search(str(one))) and found[1] in _NUMBERS:
            return _NUMBERS[found[1]]
    return None


def of_the_world(error: BaseException) -> bool:
    """Whether the same call may succeed another time, with nothing changed by the user."""
    return number(error) in WORLD


def _nobody(error: Exception) -> None:
    pass


def retried(
    read: Callable[[], T],
    final: tuple[type[BaseException], ...] = (),
    told: Callable[[Exception], None] = _nobody,
) -> T:
    """What `read` returns: it is called again for `RETRY_SECONDS` while it raises.

    Args:
        read: reads, and may be called again.
        final: errors that another call would raise again. One of `RIGHTS` is final too.
        told: called with the first error that is waited out.
    """
    end, (pause, longest) = time.monotonic() + RETRY_SECONDS, PAUSES
    while True:
        try:
            return read()
        except Exception as e:
            if isinstance(e, final) or number(e) in RIGHTS or time.monotonic() + pause > end:
                raise
            told(e)
            told = _nobody
        time.sleep(pause)
        pause = min(2 * pause, longest)
