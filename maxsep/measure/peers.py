"""Other systems that time the same training step: benchmarks/peers, each in a process and an environment of its own."""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

from maxsep.config import Config, ConfigError, paths
from maxsep.config.paths import REPOSITORY

SCRIPTS = REPOSITORY / "benchmarks" / "peers"
NAMES = ("maxtext", "transformers")


class PeerError(Exception):
    """A peer that cannot time this step: its last words, in one line."""


def installed(folder: str) -> list[str]:
    """The peers whose environments are in `folder`.

    Raises:
        ConfigError: there are none.
    """
    names = [name for name in NAMES if _python(folder, name).exists()]
    if not names or not SCRIPTS.is_dir():
        raise ConfigError(f"--peers: got {folder}, which has no peers; takes the folder that {SCRIPTS}/setup.sh made")
    return names


def check(config: Config) -> None:
    """Refuses what the peers' scripts cannot be told to do.

    Raises:
        ConfigError: the first field that differs.
    """
    model = config.model
    takes = (
        ("layout", config.layout, ("ma",)),
        ("mesh.stage", config.mesh.stage, (1,)),
        ("train.accumulation", config.train.accumulation, (1,)),
        ("data.cross_document_attention", config.data.cross_document_attention, (True,)),
        ("model.dense_layers", model.dense_layers, (0,)),
        ("model.router_score", model.router_score, ("softmax",)),
        ("model.router_bias_rate", model.router_bias_rate, (0.0,)),
        ("model.router_groups", model.router_groups, (1,)),
        ("model.router_scale", model.router_scale, (1.0,)),
        ("model.shared_experts", model.shared_experts, (0,)),
        ("model.activation", model.activation, ("swiglu",)),
        ("model.dtype", model.dtype, ("float32", "bfloat16")),
        ("model.tied_embedding", model.tied_embedding, (False,)),
        ("model.expert_dropout", model.expert_dropout, (0.0,)),
    )
    for field, got, values in takes:
        if got not in values:
            raise ConfigError(f"{field}: got {got}; takes {' or '.join(map(str, values))} with --peers")


class Peer:
    """A peer that is warm and waits for its turn. A context manager: the process ends with it.

    Args:
        name: one of `NAMES`.
        folder: the folder of environments.
        config: what to time; MaxText's tensor axis takes the place of `mesh.attention`.
        shape: the flags of the shape, by name.
        warmup: steps before the first that is timed.
        task: train or decode, the script's.
        variant: of several ways in which the peer does it.

    Raises:
        PeerError: it cannot run this.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        config: Config,
        shape: dict[str, int],
        warmup: int,
        task: str = "train",
        variant: str | None = None,
    ):
        flags = {letters.replace("_", "-"): size for letters, size in shape.items()}
        flags |= {"dtype": config.model.dtype, "warmup": warmup}
        if name == "maxtext":
            flags |= {"expert": config.mesh.expert, "tensor": config.mesh.attention}
            if task == "train":
                flags["capacity-factor"] = config.model.capacity_factor or 0
        if variant is not None:
            flags["variant"] = variant
        command = [str(_python(folder, name)), str(SCRIPTS / f"{name}_{task}.py"), "--serve"]
        command += [f"--{flag}={value}" for flag, value in flags.items()]
        self.name = name if variant is None else f"{name} {variant}"
        self._folder = tempfile.TemporaryDirectory()  # whatever the peer leaves goes with it
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"TMPDIR": self._folder.name},
            )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self, steps: int) -> dict:
        """Times `steps` steps: `seconds`, a list, and `other_cpu`."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says how
            print("go", steps, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._folder.cleanup()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        words = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(words) if line.strip()), "nothing")
        raise PeerError(f"{self.name}: ended with status {status} and said: {last}")


def _python(folder: str, name: str) -> Path:
    return paths.named("--peers", folder) / name / "bin" / "python"
