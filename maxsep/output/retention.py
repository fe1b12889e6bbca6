"""Which steps are kept: the two latest, and the one of the lowest held-out loss, which is known after it is saved."""

import math
from pathlib import Path

import orbax.checkpoint as ocp

from maxsep.config import ConfigError, faults
from maxsep.output.console import say
from maxsep.output.record import Damaged, Incomplete, read_loss, write_loss
from maxsep.output.saved_step import one_line


class Losses:
    """The held-out losses of the steps in `directory`, in nats; infinite: not evaluated, or not finite.

    `writes`: this process writes them, each into its step's folder.
    """

    def __init__(self, directory: Path, writes: bool):
        self.directory, self.writes = directory, writes
        self._known: dict[int, float] = {}
        self._unwritten: set[int] = set()  # of steps whose save may be under way

    def of(self, step: int) -> float:
        """That of a step; infinite where what is kept of it is damaged.

        Raises:
            ConfigError: it cannot be read.
        """
        if step not in self._known:
            folder, loss = self.directory / str(step), None
            try:
                loss = faults.retried(lambda: read_loss(folder), (Damaged,))
            except (Damaged, Incomplete) as e:
                say(f"warning: step {step} has no held-out loss: {e}")
            except OSError as e:
                raise ConfigError(f"the held-out loss of step {step} cannot be read: {one_line(e)}") from e
            self._known[step] = _or_infinite(loss)
        return self._known[step]

    def put(self, step: int, loss: float | None) -> None:
        """Sets that of a step; None: it is not finite."""
        if self.of(step) != _or_infinite(loss):
            self._known[step] = _or_infinite(loss)
            self._unwritten.add(step)

    def write(self) -> None:
        """Writes those of steps that are saved. Warns if one cannot be written, and tries again the next time."""
        for step in sorted(self._unwritten):
            folder = self.directory / str(step)
            try:
                if self.writes and folder.is_dir():
                    write_loss(folder, self._known[step])
            except OSError as e:
                say(f"warning: the held-out loss of step {step} was not written: {one_line(e)}")
            else:
                self._unwritten.remove(step)

    def forget_after(self, step: int) -> None:
        """Of later steps nothing is known any more."""
        self._known = {number: loss for number, loss in self._known.items() if number <= step}
        self._unwritten &= self._known.keys()


class Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax's own policy of this kind would keep the losses in files of its own."""

    def __init__(self, losses: Losses):
        self._losses = losses

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        try:
            losses = {step: self._losses.of(step) for step in steps}
        except ConfigError:  # any of them may be the best, as long as a loss cannot be read
            return [True] * len(steps)
        best = min(steps, key=lambda step: (losses[step], -step), default=None)
        kept = {*steps[-2:], *([best] if best is not None and losses[best] < math.inf else [])}
        return [step in kept for step in steps]


def _or_infinite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf
