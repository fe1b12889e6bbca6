"""The roll call, between threads of this process."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import free_port

from maxsep.cluster import rollcall
from maxsep.cluster.process import Process
from maxsep.config import ConfigError, cli

FACTS = {"train.steps": "3", "jax": "0.12"}


def called(*callers, seconds=300.0, port=None, job="", after=None):
    """What came of roll calls of (index, count, facts) at the same time: members, or a status and an error's line."""
    port = port or free_port()

    def call(caller):
        index, count, facts = caller
        try:
            if index and after is not None:
                after.wait()
            members, connections = rollcall.call(Process(index, count, "localhost", port, job), facts, seconds)
        except (ConfigError, cli.Exit) as error:
            return f"{cli.outcome(error)[0]}: {error}"
        for connection in connections:
            connection.close()
        return [member.index for member in members]

    with ThreadPoolExecutor(len(callers)) as threads:
        return list(threads.map(call, callers))


def test_all_hear_of_all():
    assert called(*((index, 3, FACTS) for index in (2, 0, 1))) == [[0, 1, 2]] * 3


@pytest.mark.parametrize(
    "callers, starts",
    [
        ([(0, 2, FACTS), (1, 2, FACTS | {"train.steps": "4"})], "train.steps: got 4 in process 1 (pid "),
        ([(0, 2, FACTS), (1, 2, {"jax": "0.12"})], "train.steps: got None in process 1 (pid "),
        ([(0, 2, FACTS), (1, 3, FACTS)], "--num_processes: got 3 in process 1 (pid "),
        ([(0, 3, FACTS), (1, 3, FACTS), (1, 3, FACTS)], "--process_id: got 1 in two processes"),
    ],
)
def test_a_difference_is_one_line_of_the_first(callers, starts):
    told = [line for line in called(*callers) if isinstance(line, str) and line.startswith(f"2: {starts}")]
    assert len(told) == 1 and "\n" not in told[0] and "; takes " in told[0]


def test_a_port_in_use_is_told():
    with socket.create_server(("", 0)) as taken:
        (said,) = called((0, 2, FACTS), port=taken.getsockname()[1])
    assert said.startswith("2: --coordinator: cannot listen on port ") and "; takes " in said


def test_the_missing_are_named_and_may_come_another_time():
    (said,) = called((0, 4, FACTS), seconds=0.3)
    assert said.startswith(
        "71: --num_processes: got 4, but processes 1, 2, 3 did not come within 0.3 s (--join_seconds)"
    )
    (said,) = called((1, 4, FACTS), seconds=0.3)
    assert said.startswith("71: --coordinator: got localhost:") and "process 0 was not reached within 0.3 s" in said


def test_who_is_of_another_job_is_sent_away_and_not_counted():
    port = free_port()
    other_gone = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        callers = (0, 2, FACTS), (1, 2, FACTS)
        first = thread.submit(called, *callers, port=port, job="step 7.0 of Slurm", after=other_gone)
        (said,) = called((1, 2, FACTS | {"train.steps": "9"}), port=port, job="step 7.1 of Slurm")
        other_gone.set()
        assert said.startswith("71: --coordinator: process 1 (pid ")
        assert "of step 7.1 of Slurm got the port of process 0 (pid " in said and "of step 7.0 of Slurm; takes" in said
        assert first.result() == [[0, 1]] * 2


def test_a_port_that_another_job_has_may_be_free_another_time():
    with socket.create_server(("", 0)) as taken:
        (said,) = called((0, 2, FACTS), port=taken.getsockname()[1], job="step 7.1 of Slurm")
    assert said.startswith("71: --coordinator: cannot listen on port ")
    assert said.endswith("; this one follows from step 7.1 of Slurm")


def test_who_is_no_process_is_sent_away():
    port = free_port()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(called, (0, 2, FACTS), port=port)
        stranger = None
        while stranger is None and not first.done():
            try:
                stranger = socket.create_connection(("localhost", port))
            except ConnectionRefusedError:
                continue
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
        assert called((1, 2, FACTS), port=port) == [[0, 1]]
        assert first.result() == [[0, 1]]
