"""SIGTERM, SIGINT, SIGHUP: they end a run after its step, saved (a second one at once), or interrupt a command."""

import contextlib
import signal
from collections.abc import Iterator


def stopping() -> list[signal.Signals]:
    """The signals that ask a program to end. One that it was started to ignore, as by nohup, asks nothing."""
    asking = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    return [number for number in asking if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Within, each of them raises KeyboardInterrupt."""

    def interrupt(number: int, frame) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in stopping()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """While entered, `asked` is the name of the first signal that came, else None."""

    def __init__(self):
        self.asked: str | None = None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._on) for number in stopping()}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame) -> None:
        self.asked = signal.Signals(number).name
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
