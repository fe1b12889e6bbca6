"""train.py with a planted fault: `python faulty.py FAULT MOMENT STEP`, then train.py's flags.

The fault `reading` is none: it tells which rows of a batch the process reads. With `damaged` the process reads
other bits of the checkpoint of that step than were saved.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from maxsep.config import cli

FAULTS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stuck": lambda: time.sleep(10_000),
    "raising": lambda: exec("raise RuntimeError('planted')"),
}


def plant(fault: str, moment: str, step: int) -> None:
    """Makes the step of this number, or the save after it, strike."""
    import orbax.checkpoint as ocp

    from maxsep.data.feed import host_rows
    from maxsep.output.record import Damaged
    from maxsep.output.saved_step import SavedStep
    from maxsep.training.run import Run

    strike, compile_step, save = FAULTS.get(fault), Run.compile_train_step, ocp.CheckpointManager.save

    def compiled(self):
        train_step = compile_step(self)

        def faulty(state, batch):
            if int(state.step) + 1 == step:
                strike()
            return train_step(state, batch)

        return faulty

    write = ocp.PyTreeCheckpointHandler.async_save
    saving = []

    async def faulty_write(self, *arguments, **options):
        writes = await write(self, *arguments, **options)
        return [*writes, SimpleNamespace(result=lambda timeout=None: strike())] if saving == [step] else writes

    def noted_save(self, number, *arguments, **options):
        saving[:] = [number]
        return save(self, number, *arguments, **options)

    def faulty_save(self, number, *arguments, **options):
        saved = save(self, number, *arguments, **options)
        if number == step:
            strike()  # while the files are written
        return saved

    if fault == "reading":
        train_batches = Run.train_batches

        def told(self, corpus, position):
            rows = host_rows(self.batch_shape, self.batch_sharding).tolist()
            print(f"rows {rows} of {self.config.train.batch_size}", file=sys.stderr, flush=True)
            return train_batches(self, corpus, position)

        Run.train_batches = told
    elif fault == "damaged":
        read = SavedStep.read

        def damaged(self, shapes):
            if self.step == step:
                raise Damaged("planted")
            return read(self, shapes)

        SavedStep.read = damaged
    elif moment == "step":
        Run.compile_train_step = compiled
    elif moment == "write":  # in the background
        ocp.PyTreeCheckpointHandler.async_save = faulty_write
        ocp.CheckpointManager.save = noted_save
    else:
        ocp.CheckpointManager.save = faulty_save


def main(fault: str, moment: str, step: str, *flags: str) -> int:
    start = train.start

    def started(*arguments):
        config = start(*arguments)
        plant(fault, moment, int(step))  # imports JAX, which has to wait
        return config

    train.start = started
    return cli.run(train.main, train.define, train.__doc__, "configs/tiny.py", argv=["train.py", *flags])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
