"""Accelerators that this machine has and JAX does not find: a run would be simulated on the CPU without a word."""

import os
import sys
from pathlib import Path

DEVICES = Path("/dev")
INSTALL = {  # by the files of a driver, what lets JAX use it
    "nvidia[0-9]*": "pip install -c constraints.txt -e '.[cuda]'",
    "kfd": "JAX's plugin for ROCm",
    "accel[0-9]*": "pip install 'jax[tpu]'",
}
# What a launcher sets that gives a process GPUs, and values that give it none.
GIVEN = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
NONE = {"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS": "0", "SLURM_GPUS_ON_NODE": "0"}


def check_seen(processes: int) -> None:
    """To be called where JAX finds no accelerator. A process of its own is warned.

    Where `JAX_PLATFORMS` is set, that is what the user wants.

    Raises:
        ConfigError: this is one of several `processes`, or a launcher gave it GPUs.
    """
    if os.environ.get("JAX_PLATFORMS") or (machine := found()) is None:
        return
    from maxsep.config import ConfigError  # here, as huge_pages.py needs this file before what is slow to import

    device, install = machine
    got = f"this machine has {device}, but JAX finds no accelerator"
    takes = f"{install}, or JAX_PLATFORMS=cpu to simulate devices on the CPU"
    given = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _gives(name, value)]
    if processes > 1 or given:
        why = f"{given[0]} gives it to this process" if given else f"this is one of {processes} processes"
        raise ConfigError(f"devices: {got}, and {why}; takes {takes}")
    print(f"warning: {got}, so devices are simulated on the CPU; takes {takes}", file=sys.stderr, flush=True)


def found() -> tuple[str, str] | None:
    """The first file of an accelerator, and what lets JAX use it."""
    for pattern, install in INSTALL.items():
        for path in sorted(DEVICES.glob(pattern)):
            return str(path), install
    return None


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, as the driver gives them; [] where nvidia-smi tells of none.

    Of `CUDA_VISIBLE_DEVICES` only the number counts: a machine's GPUs are alike, or are all named.
    """
    import subprocess

    if os.environ.get("JAX_PLATFORMS", "cuda").partition(",")[0] not in ("cuda", "gpu", ""):
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    names = [line.strip() for line in told.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: sum(1 for one in visible.split(",") if one.strip() not in ("", "-1"))]


def _gives(name: str, value: str) -> bool:
    return name.startswith(GIVEN) and value.strip() not in ("", NONE.get(name))
