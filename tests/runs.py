"""A small run of train.py, in float64 so that meshes can be compared, and what its folder holds."""

import copy
import functools
from dataclasses import replace

import kill

from maxsep.config import Config, DataConfig, TrainConfig
from maxsep.output.metrics import MetricsWriter
from maxsep.training.run import Run

SMALL = {
    "mesh__attention": 1,
    "mesh__expert": 1,
    "train__steps": 4,
    "train__checkpoint_every": 0,
    "train__eval_every": 0,
    "optimizer__decay_steps": 4,  # whatever train.steps is: one program for all
    "data__sequence_length": 32,
    "model__d_model": 16,
    "model__d_ff": 16,
    "model__dtype": "float64",
}


def shared_run(config: Config, end_of_text: int, ids: int) -> Run:
    """A `Run` with the programs of the last one of the same model: they are traced and compiled once."""
    train, data = config.train, config.data
    model = replace(
        config,  # with its own decay_steps, a program does not know train.steps
        name="shared",
        train=TrainConfig(
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            seed=train.seed,
            nonfinite_limit=train.nonfinite_limit,
        ),
        data=DataConfig(sequence_length=data.sequence_length, cross_document_attention=data.cross_document_attention),
    )
    run = copy.copy(_compiled_once(model, end_of_text, ids))
    run.config = config
    return run


@functools.lru_cache(maxsize=16)
def _compiled_once(model: Config, end_of_text: int, ids: int) -> Run:
    run = Run(model, end_of_text, ids)
    run.compile_train_step = functools.cache(run.compile_train_step)
    return run


def snapshot(folder):
    """Every file and folder with its time and content, but who had the folder last."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
        if path.name != "lock"
    }


def steps(workdir, split):
    return [step for step, name in kill.figures(workdir) if name == split]


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def at_step(monkeypatch, step, action):
    """Does `action` when the training row of `step` is written."""
    write = MetricsWriter.write

    def written(self, at, split, values):
        if (at, split) == (step, "train"):
            action()
        return write(self, at, split, values)

    monkeypatch.setattr(MetricsWriter, "write", written)
