"""What a process of a job is given time for."""

import json
import threading

import pytest

from maxsep.cluster.job import Doing, Job
from maxsep.cluster.process import Process
from maxsep.cluster.rollcall import Member


@pytest.mark.parametrize("phase, times", [("training", 1), ("saving", 1), ("compiling", 4), ("starting JAX", 4)])
def test_who_compiles_may_be_silent_for_longer_but_jax_never_ends_it_first(phase, times):
    job = Job([Member.of(Process())], Process(), heartbeat=30.0)
    assert job.silence(Doing(phase)) == times * 30 < 4 * job.heartbeat + 60  # start.py tells JAX the latter


@pytest.mark.parametrize("seconds, ended_with", [(700, None), (2700, None), (2800, "nothing came to an end in 2750 s")])
def test_a_save_is_stuck_after_its_own_limit(monkeypatch, seconds, ended_with):
    """Whatever the others do meanwhile, which wait for it."""
    ends = []
    monkeypatch.setattr(Job, "_end", lambda self, end, lost=None: ends.append(end.message))
    job = Job([Member.of(Process())], Process(), watchdog=600.0)
    job.members = job.members * 2
    job._look_for_stuck([Doing("saving", 3, seconds=seconds, limit=2750.0), Doing("training", 3, True, seconds)])
    assert [ended_with in end for end in ends] == [True] * (ended_with is not None)


class Link:
    """A connection to a process that says nothing by itself."""

    def __init__(self):
        self.sent = []

    def send_line(self, encoded):
        self.sent.append(json.loads(encoded))

    def receive(self):
        threading.Event().wait()


def test_all_processes_hear_what_process_0_makes_of_their_words():
    links = [Link(), Link()]
    job = Job([Member.of(Process())] * 3, Process(0, 3), links, heartbeat=1e9, watchdog=1e9)
    for index, word in ((2, "c"), (1, "b")):
        job._post(1, index, word)
    assert job.agree("a", reduced="".join) == "abc"
    job._post(2, 1, 4)
    job._post(2, 2, 5)
    assert job.agree(3) == [3, 4, 5]
    for link in links:
        assert [message["agreed"] for message in link.sent if "agreed" in message] == ["abc", [3, 4, 5]]
