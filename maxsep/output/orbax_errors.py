"""What Orbax says of errors, in pages of traceback and from threads of its own, before it raises them: kept quiet.

It is the first to tell of one in the background: between processes, raising it may wait for the others for ever.
"""

import logging
import sys
import warnings
from collections.abc import Callable

heard_by: list[Callable[[BaseException], None]] = []  # called with each error


def _not_of_orbax(record: logging.LogRecord) -> bool:
    if "/orbax/" not in record.pathname:
        return True
    if record.exc_info:
        for hear in heard_by:
            hear(record.exc_info[1])
    return False


def _unraisable(unraisable, previous=sys.unraisablehook) -> None:
    """Keeps quiet about reads and writes that were still under way when one beside them failed and was told."""
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    if str(unraisable.exc_value) != "Event loop is closed" and "/orbax/" not in getattr(code, "co_filename", ""):
        previous(unraisable)


logging.getLogger("absl").addFilter(_not_of_orbax)
# Of reads and writes beside the one that is told; nothing else here uses asyncio.
logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
sys.unraisablehook = _unraisable
