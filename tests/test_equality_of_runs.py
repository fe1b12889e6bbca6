"""Layout never changes the result: 20 losses of `python train.py`, from metrics.jsonl, on text from a file."""

import json
import subprocess
import sys

import kill
import numpy as np
import pytest
from small import MESHES, ROWS, SEED, named

from maxsep.config.paths import REPOSITORY

DISPATCHES = {
    "dropless": {"data.sequence_length": 32},
    "drops": {"data.sequence_length": 64, "model.capacity_factor": 1.0, "model.capacity_group": 4},
}


def train(folder, arguments) -> list[dict]:
    """The training rows of a run of tiny, in a process of its own."""
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={folder}", *arguments]
    subprocess.run(command, cwd=REPOSITORY, env=kill.environment(), check=True, timeout=600)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_twenty_losses_are_the_same(tmp_path, dispatch):
    rng = np.random.default_rng(SEED)
    words = ["".join(rng.choice(list("aeimnorst"), size=n)) for n in rng.integers(2, 8, size=60)]
    text = ". ".join(" ".join(words[int(60 * r**3)] for r in rng.random(12)) for _ in range(4000))
    (tmp_path / "words.txt").write_text(text)
    flags = {
        "train.steps": 20,
        "train.log_every": 1,
        "train.seed": SEED,
        "optimizer.warmup_steps": 5,
        "optimizer.learning_rate": 1e-2,
        "data.source": "files",
        "data.path": tmp_path / "words.txt",
        "data.tokenizer": "bytes",
        "data.cache": tmp_path / "cache",
        "data.max_tokens": 60_000,
        "data.eval_max_tokens": 2_000,
        "model.dtype": "float64",
        "model.d_model": 32,
        "model.d_ff": 48,
        "model.vocab_size": 300,
        **DISPATCHES[dispatch],
    }

    def losses(mesh) -> tuple[list[float], list[float]]:
        """Of each step, and the share of choices dropped."""
        own = {"mesh.attention": mesh[0], "mesh.expert": mesh[1]}
        folder = tmp_path / named(mesh)
        arguments = [f"--config.{name}={value}" for name, value in (flags | own).items()]
        rows = train(folder, arguments)
        return [row["loss"] for row in rows], [row["dropped_fraction"] for row in rows]

    expected, dropped = losses((1, 1))
    assert len(expected) == 20
    assert expected[0] - expected[-1] >= 1
    assert (max(dropped) > 0) == (dispatch == "drops")
    for mesh in MESHES[1:]:
        found, also_dropped = losses(mesh)
        assert found == pytest.approx(expected, rel=1e-12), mesh
        assert also_dropped == dropped, mesh


@pytest.mark.slow
def test_large_products_are_right_where_every_device_is_busy(tmp_path):
    """Found at this size: the first rows of the head's gradient were wrong on as many threads as simulated devices."""
    flags = {
        "train.steps": 1,
        "train.batch_size": 64,
        "train.accumulation": 4,
        "data.source": "files",
        "data.path": kill.text(tmp_path, paragraphs=300),
        "data.tokenizer": "bytes",
        "data.cache": tmp_path / "cache",
        "data.eval_max_tokens": 2_000,
        "model.dtype": "float64",
    }

    def norm(expert: int) -> float:
        own = {"mesh.attention": 1, "mesh.expert": expert}
        (row,) = train(tmp_path / str(expert), [f"--config.{name}={value}" for name, value in (flags | own).items()])
        return row["grad_norm"]

    assert norm(2) == pytest.approx(norm(1), rel=1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_tiny_has_the_losses_of_one_device_under_every_layout(tmp_path, capacity, dropout):
    """Twelve steps on the default corpus. Each layout's two meshes take turns with ZeRO-1."""
    flags = {
        "model.layers": 4,
        "train.steps": 12,
        "train.batch_size": 64,
        "train.accumulation": 4,
        "train.log_every": 1,
        "data.eval_max_tokens": 2_000,
        "model.dtype": "float64",
        "model.expert_dropout": dropout,
        "model.capacity_factor": capacity,
        "model.capacity_group": capacity and 16,
    }

    def losses(layout: str, mesh: tuple[int, ...], zero1: bool) -> list[float]:
        stage, attention, expert = (1, *mesh)[-3:]
        own = {"layout": layout, "mesh.stage": stage, "mesh.attention": attention, "mesh.expert": expert}
        own["optimizer.zero1"] = zero1
        arguments = [f"--config.{name}={value}" for name, value in (flags | own).items()]
        return [row["loss"] for row in train(tmp_path / f"{layout}-{named(mesh)}", arguments)]

    expected = losses("ma", (1, 1), False)
    assert len(expected) == 12
    assert expected[0] - expected[-1] >= 1
    for layout, meshes in ROWS.items():
        for number, mesh in enumerate(meshes):
            zero1 = (number == 0) == (capacity is None)
            assert losses(layout, mesh, zero1) == pytest.approx(expected, rel=1e-9), (layout, mesh, zero1)
