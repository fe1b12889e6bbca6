"""A small run of train.py, in float64 so that meshes can be compared, and what its folder holds."""

import kill

from maxsep.output.metrics import MetricsWriter

SMALL = {
    "mesh__attention": 1,
    "mesh__expert": 1,
    "train__steps": 4,
    "train__checkpoint_every": 0,
    "train__eval_every": 0,
    "data__sequence_length": 32,
    "model__d_model": 16,
    "model__d_ff": 16,
    "model__dtype": "float64",
}


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
