"""What a process of a job is given time for."""

import pytest

from maxsep.cluster.job import Doing, Job
from maxsep.cluster.process import Process
from maxsep.cluster.rollcall import Member


@pytest.mark.parametrize("phase, times", [("training", 1), ("saving", 1), ("compiling", 4), ("starting JAX", 4)])
def test_who_compiles_may_be_silent_for_longer_but_jax_never_ends_it_first(phase, times):
    job = Job([Member.of(Process())], Process(), heartbeat=30.0)
    assert job.silence(Doing(phase)) == times * 30 < 4 * job.heartbeat + 60  # start.py tells JAX the latter
