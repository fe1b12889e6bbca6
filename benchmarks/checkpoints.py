"""What it costs that checkpoints notice damage: `python benchmarks/checkpoints.py`, with train.py's flags.

Prints the seconds of a step, and of the fingerprints that a save makes, for a config (default configs/bench.py); then,
in turns, of reading a state of some GB with and without comparing them. On whatever devices JAX finds.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from absl import flags

from maxsep.config import cli
from maxsep.parallel.start import start

STEPS, TURNS = 5, 5


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_float("gigabytes", 2.0, "size of the state that is read", lower_bound=0.001, flag_values=values)


def main(args: cli.Args) -> None:
    config = start(args.config, fit_mesh=args.fit_mesh)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from maxsep.output import tree
    from maxsep.output.checkpoint import Checkpoints
    from maxsep.output.console import say, table
    from maxsep.output.fingerprint import fingerprints
    from maxsep.output.saved_step import SavedStep
    from maxsep.parallel.mesh import describe, make_mesh
    from maxsep.training.run import Run

    def seconds(function, times: int) -> float:
        function()
        taken = []
        for _ in range(times):
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        run = Run(config)
        state, step = run.new_state(), run.compile_train_step()
        rows = np.random.default_rng(0).integers(0, config.model.vocab_size, run.batch_shape, np.int32)
        batch = jax.device_put(rows, run.batch_sharding)

        def one_step() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

        a_step = seconds(one_step, STEPS)
        arrays = {".".join(path): leaf for path, leaf in tree.named(state).items()}
        a_save = seconds(lambda: fingerprints(arrays), STEPS)
        size = sum(leaf.nbytes for leaf in arrays.values())
        state = arrays = None
        entries = {
            "devices": describe(list(mesh.devices.flat)),
            "a step": f"{a_step * 1e3:.2f} ms",
            "fingerprints": f"{a_save * 1e3:.2f} ms for a state of {size / 1e9:.2f} GB",
            "a save every 100 steps": f"{a_save / (100 * a_step):.3%} of the steps' time for the fingerprints",
        }
        say(table(f"saving, {config.name}", entries))

        columns = 2**14
        count = max(1, int(args.flags.gigabytes * 1e9 / 16 / 4 / columns))
        everywhere = NamedSharding(mesh, P())
        dice = np.random.default_rng(0)
        big = {
            f"w{number}": jax.device_put(dice.standard_normal((count, columns), np.float32), everywhere)
            for number in range(16)
        }
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), big)
        with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(1, big, {})
            size = sum(x.nbytes for x in big.values())
            checkpoints.wait()
            del big
            times: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(TURNS + 1):
                for compared in (True, False):
                    how = contextlib.nullcontext() if compared else mock.patch.object(SavedStep, "compare")
                    begin = time.perf_counter()
                    with how:
                        jax.block_until_ready(checkpoints.restore(shapes).state)
                    if turn:
                        times[compared].append(time.perf_counter() - begin)
        ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
        entries = {
            "compared": ", ".join(f"{t:.2f}" for t in times[True]) + " s",
            "not compared": ", ".join(f"{t:.2f}" for t in times[False]) + " s",
            "ratio": f"median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}",
        }
        say(table(f"reading {size / 1e9:.2f} GB", entries))


if __name__ == "__main__":
    sys.exit(cli.run(main, define, __doc__, default_config="configs/bench.py"))
