"""Figures against ones worked out by hand, and rows that survive a kill."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from maxsep.config import ConfigError
from maxsep.output import metrics
from maxsep.output.metrics import MetricsWriter, expert_load, read_rows


def test_perplexity():
    assert metrics.perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert metrics.perplexity(1e6) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))


def test_expert_load():
    load = expert_load(np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]]))
    assert load["expert_load_max_over_mean"] == 4.0
    assert load["layers"]["expert_load_max_over_mean"] == [1.0, 4.0, 2.0]
    assert load["layers"]["expert_load_entropy"] == pytest.approx([1.0, 0.0, 0.5])
    assert load["layers"]["experts_used"] == [1.0, 0.25, 0.5]
    assert expert_load(np.array([[7]]))["layers"]["expert_load_entropy"] == [1.0]


def test_shares_are_of_each_layers_choices():
    assert metrics.expert_shares([[3, 1], [0, 5]]) == [[0.75, 0.25], [0, 1]]


def test_memory_is_left_out_where_the_backend_does_not_tell():
    assert metrics.device_memory() == {}


def test_rows_are_strict_json(workdir):
    workdir.mkdir()
    with MetricsWriter(workdir) as writer:
        layers = {"experts_used": [1.0, math.nan]}
        returned = writer.write(1, "train", {"loss": math.nan, "grad_norm": math.inf, "mfu": None, "layers": layers})
        writer.flush()
    (line,) = (workdir / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert row == returned
    assert row == {
        "step": 1,
        "split": "train",
        "loss": None,
        "grad_norm": None,
        "mfu": None,
        "layers": {"experts_used": [1.0, None]},
    }


def test_a_resumed_run_has_each_step_once(workdir):
    workdir.mkdir()
    with MetricsWriter(workdir) as writer:
        for step in range(1, 7):
            writer.write(step, "train", {"loss": float(step)})
            if step % 3 == 0:
                writer.write(step, "eval", {"loss": float(-step)})
        writer.flush()
    with MetricsWriter(workdir, from_step=3) as writer:
        for step in range(4, 6):
            writer.write(step, "train", {"loss": 10.0 * step})
            writer.flush()
    rows = [(row["step"], row["split"], row["loss"]) for row in read_rows(workdir / "metrics.jsonl")]
    before = [(1, "train", 1.0), (2, "train", 2.0), (3, "train", 3.0), (3, "eval", -3.0)]
    assert rows == [*before, (4, "train", 40.0), (5, "train", 50.0)]


@pytest.mark.parametrize("torn", ['{"step": 3, "spl', '{"step": 3, "split": "train"}', "\0\0\0"])
def test_a_torn_last_line_is_removed(workdir, torn):
    workdir.mkdir()
    path = workdir / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}\n' + torn)
    with MetricsWriter(workdir, from_step=2) as writer:
        writer.write(3, "train", {})
        writer.flush()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    assert path.read_bytes().endswith(b"\n")


def test_a_row_is_whole_on_disk_when_flush_returns(workdir):
    workdir.mkdir()
    code = (
        "import pathlib, sys, itertools\n"
        "from maxsep.output.metrics import MetricsWriter\n"
        "writer = MetricsWriter(pathlib.Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n"
        "    writer.write(step, 'train', {'loss': 1.0, 'layers': {'experts_used': [1.0] * 50}})\n"
        "    writer.flush()\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(workdir)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "20":
            break
    process.kill()
    told = [20, *(int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n"))]
    process.wait()
    process.stdout.close()
    steps = [row["step"] for row in read_rows(workdir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= told[-1]


def test_tensorboard_has_the_same_figures(workdir):
    workdir.mkdir()
    for from_step, scale in ((0, 1.0), (2, 10.0)):
        with MetricsWriter(workdir, from_step) as writer:
            for step in range(from_step + 1, from_step + 4):
                writer.write(step, "train", {"loss": scale * step, "layers": {"experts_used": [1.0, 0.5]}})
            writer.flush()
    scalars = events(workdir)
    assert scalars["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert scalars["train_layers/experts_used/1"] == [(step, 0.5) for step in range(1, 6)]


def events(workdir):
    """Scalars by tag as TensorBoard shows them: what a later file purges is left out."""
    from tensorboardX.proto.event_pb2 import Event

    seen: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == event.session_log.START:
                seen = {tag: [v for v in values if v[0] < event.step] for tag, values in seen.items()}
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append((event.step, value.simple_value))
    return seen


def test_what_the_disk_does_not_take_is_written_when_it_does(workdir, monkeypatch):
    """Nor is a piece of a row left in the file, or a row twice."""
    workdir.mkdir()
    full = set()
    sync = os.fsync

    def fsync(descriptor):
        if any(name in os.readlink(f"/proc/self/fd/{descriptor}") for name in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with MetricsWriter(workdir) as writer:
        monkeypatch.setattr(os, "fsync", fsync)
        for step, name in enumerate(["none", "metrics.jsonl", "metrics.jsonl", "tfevents", "none"], 1):
            full = {name}
            writer.write(step, "train", {"loss": float(step)})
            if name == "none":
                writer.flush()
            else:
                with pytest.raises(OSError, match="No space left"):
                    writer.flush()
            assert (workdir / "metrics.jsonl").read_bytes()[-1:] == b"\n"
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert events(workdir)["train/loss"] == [(step, float(step)) for step in range(1, 6)]


def test_a_folder_that_has_gone_is_told_and_one_that_came_back_is_used(workdir):
    workdir.mkdir()
    with MetricsWriter(workdir) as writer:
        shutil.rmtree(workdir)
        with pytest.raises(FileNotFoundError):
            writer.flush()  # though there is nothing to write
        writer.write(1, "train", {"loss": 1.0})
        (workdir / "tensorboard").mkdir(parents=True)
        writer.flush()
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [1]
    assert "train/loss" in events(workdir)


@pytest.mark.parametrize("line", ['{"step": 2', "null", "{}", '{"step": "2", "split": "train"}', "\xff"])
def test_a_damaged_row_is_named(workdir, line):
    workdir.mkdir()
    path = workdir / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "split": "train"}}\n\n{line}\n{{"step": 3, "split": "train"}}\n', encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"^--workdir: {path}:3 is damaged"):
        read_rows(path)
