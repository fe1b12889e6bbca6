"""Sixteen simulated devices for every test, and a cache of compiled programs; set before JAX is imported."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "16"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Sixteen devices on two cores wait for each other longer than XLA's limit.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# A folder a worker: JAX writes an entry in place, and another worker could read half of it.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maxsep" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / os.environ.get("PYTEST_XDIST_WORKER", "main")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture
def workdir(tmp_path):
    """Path of a run that does not exist yet."""
    return tmp_path / "run"
