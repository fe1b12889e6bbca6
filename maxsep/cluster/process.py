"""Which processes make up a job: as flags say, or what Slurm, Open MPI or Kubernetes put into the environment.

Nothing here imports JAX: a command line that cannot work is answered before it.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from absl import flags

from maxsep.config import ConfigError

FLAGS = ("coordinator", "num_processes", "process_id")
NODES = "SLURM_STEP_NODELIST"
PORTS = range(61440, 65536)  # of which a job takes one by its name, where nobody names one


@dataclass(frozen=True)
class Process:
    """This process among those of its job."""

    index: int = 0  # 0 is the coordinator, which prints and writes for all
    count: int = 1
    host: str = "localhost"  # of process 0, as the others reach it
    port: int = 0
    job: str = ""  # its name, where the port follows from it: two jobs may come to the same; "": nobody knows

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def define(values: flags.FlagValues) -> None:
    """The flags of a command that runs on several processes."""

    def integer(name, text):
        flags.DEFINE_integer(name, None, text, flag_values=values)

    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, in a job of several", flag_values=values)
    integer("num_processes", "processes of this job (default: what Slurm, Open MPI or Kubernetes say, else 1)")
    integer("process_id", "number of this process, from 0")


def this(values: flags.FlagValues, environment: Mapping[str, str] = os.environ) -> Process:
    """What flags, and where they are silent the environment, say that this process is.

    Raises:
        ConfigError: it is contradictory, or something is missing.
    """
    given = {name: (f"--{name}", str(values[name].value)) for name in FLAGS if values[name].value is not None}
    told = _environment(environment) | given
    if not given and "num_processes" not in told:
        return Process()
    count = _integer(*told["num_processes"], 1) if "num_processes" in told else None
    if count == 1 and "process_id" not in given and "coordinator" not in given:
        return Process()
    for name in FLAGS:
        if name not in told:
            source = ", ".join(sorted({source for source, _ in told.values()}))
            raise ConfigError(f"--{name}: none given beside {source}; takes {_TAKES[name]}")
    host, port = _address(*told["coordinator"])
    job = told["job"][1] if told["coordinator"][0] == NODES else ""
    source, text = told["process_id"]
    index = _integer(source, text, 0)
    if index >= count:
        raise ConfigError(f"{source}: got {index}; takes 0 to {count - 1}, as there are {count} processes")
    return Process(index, count, host, port, job)


def refuse_several(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """For a command that is one process: says so where the environment has started several.

    Raises:
        ConfigError: it has.
    """
    source, count = _environment(environment).get("num_processes", ("", "1"))
    if count != "1":
        raise ConfigError(f"{source}: got {count}; takes 1, as {command} is one process")


_TAKES = {
    "coordinator": "HOST:PORT of process 0",
    "num_processes": "the number of processes",
    "process_id": "the number of this process, from 0",
}


def _environment(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What the environment says, each with the variable that says so; {} where it starts one process."""

    def read(**variables: str) -> dict[str, tuple[str, str]]:
        return {name: (variable, environment[variable]) for name, variable in variables.items()}

    told = {}
    if {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} <= environment.keys():
        told = read(num_processes="OMPI_COMM_WORLD_SIZE", process_id="OMPI_COMM_WORLD_RANK")
        if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment["OMPI_COMM_WORLD_SIZE"]:  # on one machine
            job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", "")
            told["coordinator"] = ("Open MPI", f"localhost:{_port(job)}")
    elif {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID", NODES, "SLURM_JOB_ID"} <= environment.keys():
        # Of the step that `srun` starts: in a batch script without it SLURM_NTASKS counts processes that are not there.
        told = read(num_processes="SLURM_STEP_NUM_TASKS", process_id="SLURM_PROCID")
        number = environment["SLURM_JOB_ID"]
        if number.isdecimal():
            step = f"step {number}.{environment.get('SLURM_STEP_ID', '0')} of Slurm"  # a job may run several at once
            told["job"] = ("SLURM_STEP_ID", step)
            told["coordinator"] = (NODES, f"{first_node(environment[NODES])}:{_port(step)}")
    elif {"JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"} <= environment.keys():
        told["process_id"] = ("JOB_COMPLETION_INDEX", environment["JOB_COMPLETION_INDEX"])
    own = {
        "coordinator": "JAX_COORDINATOR_ADDRESS",
        "num_processes": "JAX_NUM_PROCESSES",
        "process_id": "JAX_PROCESS_ID",
    }
    return told | read(**{name: variable for name, variable in own.items() if variable in environment})


def first_node(nodes: str) -> str:
    """The first of a Slurm list of nodes: a01 of a[01-03,07],b2."""
    match = re.match(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups())


def _port(job: str) -> int:
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def _integer(source: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{source}: got {text}; takes an integer from {least} up")
    return int(text)


def _address(source: str, text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{source}: got {text!r}; takes HOST:PORT, as node01:8476")
    return host.strip("[]"), int(port)
