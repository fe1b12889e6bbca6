"""A run's weights on the current mesh: its model alone, read straight into its places and dtypes."""

from pathlib import Path

from maxsep.cluster.job import ALONE, Job
from maxsep.config import ConfigError
from maxsep.inference.program import Program
from maxsep.output.checkpoint import Checkpoints, Restored
from maxsep.output.workdir import CHECKPOINTS
from maxsep.parallel.sharding import on_mesh


def load(program: Program, folder: Path, step: str, job: Job = ALONE) -> tuple[dict, int]:
    """The weights that `program` takes of the run in `folder`, and the step that they are of.

    Args and Raises: as `restored`; `program` is of the run's config, on any mesh.
    """
    variables, _, number = restored(on_mesh(program.abstract), folder, step, job)
    return program.weights(variables), number


def restored(abstract: dict[str, dict], folder: Path, step: str, job: Job = ALONE) -> Restored:
    """The `params` and `buffers` of the run in `folder`.

    Args:
        abstract: their pytrees, of jax.ShapeDtypeStructs with NamedShardings; the dtypes may be others than those that
            were saved.
        folder: of the run; nothing in it is changed.
        step: a number, `latest`, or `best` (of the lowest held-out loss).
        job: this process and the others.

    Raises:
        ConfigError: there is no such checkpoint, it cannot be read, or it is of another model.
    """
    with Checkpoints(folder / CHECKPOINTS, read_only=True, job=job) as checkpoints:
        if step == "latest":
            number = None
        elif step == "best":
            number = job.agree(checkpoints.best_step())[0]
            if number is None:
                raise ConfigError(f"--step: got best, but no checkpoint in {folder} has been evaluated")
        else:
            number = int(step)
        return checkpoints.restore_model(abstract, number, cast=True)
