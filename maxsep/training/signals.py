"""SIGTERM and SIGINT end a run after its current step, saved; a second signal ends it at once."""

import signal


class Stop:
    """While entered, `asked` is the name of the first signal that came, else None."""

    def __init__(self):
        self.asked: str | None = None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame) -> None:
        self.asked = signal.Signals(number).name
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
