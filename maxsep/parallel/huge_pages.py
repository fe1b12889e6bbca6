"""Huge pages for the memory of programs on the CPU.

XLA asks for a step's memory anew every step, and Linux gives it page by page as it is written. In pages of 4 kB that
took a seventh of the bench's step, and a quarter of that of 16 simulated devices (docs/benchmarks.md). glibc's `malloc`
asks for pages of 2 MB if a tunable says so. It reads that only when a program starts, so the program starts twice.

Only what is quick to import: this runs before all else.
"""

import os
import re
import sys
from pathlib import Path

from maxsep.parallel import accelerators

TUNABLES, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
SINCE = (2, 35)  # of glibc
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ensure() -> None:
    """Starts this program anew with huge pages, where that is of use: same process, same command.

    To be called from the file that was started. Whoever sets the tunable, to whatever value, is left alone.
    """
    tunables = os.environ.get(TUNABLES, "")
    if TUNABLE in tunables or not _useful():
        return
    os.environ[TUNABLES] = f"{tunables}:{TUNABLE}=1".lstrip(":")
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # as it is, then
        os.environ[TUNABLES] = tunables


def _useful() -> bool:
    """Whether `malloc` can ask for huge pages here, and would not get them unasked; for a program on the CPU."""
    if os.environ.get("JAX_PLATFORMS") != "cpu" and accelerators.found():
        return False
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        on_request = "[madvise]" in ENABLED.read_text()
    except (AttributeError, ValueError, OSError):  # not Linux, or another C library
        return False
    # A program that was read from standard input cannot be read again.
    from_file = bool(sys.executable) and Path(sys.argv[0]).is_file()
    return on_request and from_file and name == "glibc" and tuple(map(int, re.findall(r"\d+", version)))[:2] >= SINCE
