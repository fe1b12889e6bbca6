"""Who a process is: flags, and what Slurm, Open MPI and Kubernetes say."""

import pytest
from absl import flags

from maxsep.cluster import process
from maxsep.cluster.process import Process
from maxsep.config import ConfigError

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "gpu[017-019,021]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
JOBSET = {"JAX_COORDINATOR_ADDRESS": "run-w-0-0.run:8476", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "1"}


def this(environment, *arguments):
    values = flags.FlagValues()
    process.define(values)
    values(["train.py", *arguments])
    return process.this(values, environment)


def test_one_process_is_what_nothing_says():
    assert this({}) == Process(0, 1)
    assert this({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) == Process(0, 1)  # a batch script
    assert this(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Process(0, 1)


def test_the_environment_says_who_this_is():
    first, second = this(SLURM), this(SLURM | {"SLURM_STEP_ID": "1"})
    assert (first.index, first.count, first.host, first.job) == (3, 16, "gpu017", "step 70001.0 of Slurm")
    assert second.job == "step 70001.1 of Slurm" and first.port != second.port
    assert {first.port, second.port} <= set(process.PORTS)
    assert this(JOBSET) == Process(1, 4, "run-w-0-0.run", 8476)
    here = this(OPEN_MPI)
    assert (here.index, here.count, here.host) == (2, 4, "localhost") and here.port in process.PORTS
    assert this(OPEN_MPI | {"PMIX_NAMESPACE": "1"}).port != this(OPEN_MPI | {"PMIX_NAMESPACE": "2"}).port


def test_flags_come_before_the_environment():
    assert this(SLURM, "--coordinator=[::1]:99", "--process_id=0") == Process(0, 16, "::1", 99)
    assert this(SLURM, "--coordinator=[::1]:99").address == "[::1]:99"


@pytest.mark.parametrize(
    "nodes, first",
    [("a1", "a1"), ("a1,b2", "a1"), ("a[07-09,11]", "a07"), ("a[3,5]b,c", "a3b"), ("n-1[0-1]-ib", "n-10-ib")],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert process.first_node(nodes) == first


@pytest.mark.parametrize(
    "environment, arguments, starts, takes",
    [
        ({}, ["--num_processes=2"], "--coordinator: none given beside --num_processes", "HOST:PORT"),
        ({}, ["--coordinator=a:1"], "--num_processes: none given", "the number of processes"),
        ({}, ["--coordinator=a:1", "--num_processes=2"], "--process_id: none given", "from 0"),
        ({}, ["--coordinator=a", "--num_processes=2", "--process_id=0"], "--coordinator: got 'a'", "HOST:PORT"),
        ({}, ["--coordinator=a:b", "--num_processes=2", "--process_id=0"], "--coordinator: got 'a:b'", "HOST:PORT"),
        ({}, ["--coordinator=a:70000", "--num_processes=2", "--process_id=0"], "--coordinator: got", "HOST:PORT"),
        ({}, ["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id: got 2", "0 to 1"),
        ({}, ["--coordinator=a:1", "--num_processes=2", "--process_id=-1"], "--process_id: got -1", "from 0 up"),
        ({}, ["--coordinator=a:1", "--num_processes=0", "--process_id=0"], "--num_processes: got 0", "from 1 up"),
        (SLURM | {"SLURM_PROCID": "x"}, [], "SLURM_PROCID: got x", "from 0 up"),
        (JOBSET | {"JAX_NUM_PROCESSES": "two"}, [], "JAX_NUM_PROCESSES: got two", "from 1 up"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, [], "--coordinator: none given", "HOST:PORT"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "9"}, [], "OMPI_COMM_WORLD_RANK: got 9", "0 to 3"),
    ],
)
def test_a_contradiction_is_one_line(environment, arguments, starts, takes):
    with pytest.raises(ConfigError) as error:
        this(environment, *arguments)
    line = str(error.value)
    assert line.startswith(starts) and takes in line and "\n" not in line


def test_a_command_of_one_process_refuses_more():
    process.refuse_several("prepare", {})
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS: got 16; takes 1, as prepare is one process"):
        process.refuse_several("prepare", SLURM)
