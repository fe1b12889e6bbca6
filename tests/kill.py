"""Runs train.py in a process of its own, kills it at a moment that is seen from outside, and tells runs' bits apart."""

import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

TRAIN = Path(__file__).parents[1] / "train.py"
TIMES = {"step_seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "seconds"}
LIMIT = 300  # seconds until a process is given up


def text(folder: Path, paragraphs: int = 60) -> Path:
    """A file of sentences of made-up words."""
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 6))) for _ in range(60)]
    path = folder / "text.txt"
    path.write_text("\n\n".join(" ".join(dice.choices(words, k=40)) + "." for _ in range(paragraphs)))
    return path


def flags(data: Path, **changed) -> list[str]:
    """The flags of a model that compiles in seconds, on 2 x 2 devices; `changed` by section__field."""
    values = {
        "mesh__attention": 2,
        "mesh__expert": 2,
        "train__steps": 9,
        "train__batch_size": 8,
        "train__log_every": 1,
        "train__eval_every": 4,
        "train__checkpoint_every": 3,
        "optimizer__learning_rate": 1e-2,
        "optimizer__warmup_steps": 2,
        "data__source": "files",
        "data__path": data,
        "data__cache": data.parent / "cache",
        "data__sequence_length": 64,
        "data__tokenizer": "bytes",
        "model__layers": 1,
        "model__d_model": 64,
        "model__heads": 4,
        "model__experts": 4,
        "model__d_ff": 128,
        "model__vocab_size": 257,
    }
    config = TRAIN.parent / "configs" / "base.py"
    return [f"--config={config}"] + [f"--config.{k.replace('__', '.')}={v}" for k, v in (values | changed).items()]


def environment() -> dict[str, str]:
    """A user's, with no cache of programs: without what the tests set for their own process."""
    own = ("JAX_NUM_CPU_DEVICES", "PJRT_NPROC", "XLA_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in own}


class Process:
    """train.py, running; what it prints goes to a file beside `workdir`."""

    def __init__(self, workdir: Path, *arguments: str, **options):
        self.workdir = workdir
        self._output = workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}.txt")
        with self._output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(TRAIN), f"--workdir={workdir}", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                **({"env": environment()} | options),
            )

    @property
    def printed(self) -> list[str]:
        return self._output.read_text().splitlines()

    @property
    def saving(self) -> bool:
        """Files of a checkpoint that is not committed."""
        # Not pathlib's glob, which fails where a folder is renamed meanwhile.
        return any(glob.iglob("checkpoints/*.orbax-checkpoint-tmp/*", root_dir=self.workdir))

    @property
    def saved(self) -> int:
        """The latest checkpoint's step; 0 where there is none."""
        return max((int(p.name) for p in self.workdir.glob("checkpoints/*") if p.name.isdigit()), default=0)

    def ended(self, limit: float = LIMIT) -> int:
        """The exit status, when it is there."""
        return self._process.wait(limit)

    def signal_when(self, moment: Callable[["Process"], bool], *numbers: int) -> bool:
        """Sends signals at a moment in which `moment` holds: it is asked again while the process is held still.

        Whether the moment was seen: a busy machine may pass over a short one, and the process ends with status 0.
        """
        try:
            seen = held_at(self._process, lambda: moment(self))
            assert seen or self._process.returncode == 0, self.printed
        except BaseException:  # no process is left behind
            self._process.kill()
            self._process.wait()
            raise
        if seen:
            for number in (*numbers, signal.SIGCONT):
                self._process.send_signal(number)
        return seen


def held_at(process: subprocess.Popen, moment: Callable[[], bool]) -> bool:
    """Holds a process still in a moment in which `moment` holds; False where it has ended before one was seen."""
    end = time.monotonic() + LIMIT
    while process.poll() is None:
        assert time.monotonic() < end, "the moment never came"
        if moment():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if process.poll() is None and moment():
                return True
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    return False


def train(workdir: Path, *arguments: str, **options) -> list[str]:
    """Trains to the end; what was printed."""
    process = Process(workdir, *arguments, **options)
    assert process.ended() == 0, process.printed
    return process.printed


def signalled(workdir: Path, moment: Callable[[Process], bool], number: int, *arguments: str) -> Process:
    """Trains until `moment` and a signal; again from where `workdir` was if the moment passed unseen."""
    before = workdir.with_name(f"{workdir.name}.before")
    if workdir.exists():
        shutil.copytree(workdir, before)
    for _ in range(5):
        process = Process(workdir, *arguments)
        if process.signal_when(moment, number):
            shutil.rmtree(before, ignore_errors=True)
            return process
        shutil.rmtree(workdir)
        if before.exists():
            shutil.copytree(before, workdir)
    raise AssertionError((moment.__name__, "was never seen", process.printed))


def killed(workdir: Path, moment: Callable[[Process], bool], *arguments: str) -> None:
    """Trains until `moment` and not further."""
    assert signalled(workdir, moment, signal.SIGKILL, *arguments).ended() == -signal.SIGKILL


def killed_after(workdir: Path, seconds: float, *arguments: str) -> bool:
    """Trains for some seconds and not further; whether it was not done by then."""
    process = Process(workdir, *arguments)
    try:
        assert process.ended(seconds) == 0, process.printed
        return False
    except subprocess.TimeoutExpired:
        process.signal_when(lambda _: True, signal.SIGKILL)
        return process.ended() == -signal.SIGKILL


def figures(workdir: Path) -> dict[tuple[int, str], dict]:
    """The rows of a run's metrics by step and split, without times. Each is there once."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    named = {(row["step"], row["split"]): {k: v for k, v in row.items() if k not in TIMES} for row in rows}
    assert len(named) == len(rows), "a step was logged twice"
    return named


def state(workdir: Path, step: int | None = None) -> dict[str, bytes]:
    """The bits of every array of a checkpoint, by default the latest."""
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    handler = ocp.PyTreeCheckpointHandler()
    folder = workdir / "checkpoints" / str(max(saved) if step is None else step) / "state"
    with ocp.Checkpointer(handler) as reader:
        wanted = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
        )
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=wanted))
    return {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
