"""Sixteen simulated devices for every test; set before JAX is imported."""

import contextlib
import io
import os
import shutil
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "16"
os.environ["PJRT_NPROC"] = "17"  # a thread more than devices: parallel/start.py
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Sixteen devices on two cores wait for each other longer than XLA's limit. Most of the tests' time is LLVM's: it is
# told to optimise nothing, in this process. What runs train.py in another one (kill.py) compiles as a user does.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_backend_optimization_level=0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # programs of several simulated devices cannot be kept: parallel/start.py
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # where programs are kept, no machine is too fast for it

# After the environment is set: these import JAX.
import jax
import kill
from hypothesis import HealthCheck, settings
from jax.experimental.compilation_cache import compilation_cache
from runs import SMALL, shared_run

import infer
import train
from maxsep.config import cli, faults
from maxsep.training import trainer

# No test measures time; where CI is set, no example is drawn by chance.
settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    max_examples=30,
)
settings.load_profile("tests")


# Files with few and long tests, which come first: a worker that began one last would work alone at the end.
LONG = (
    "test_processes",
    "test_resume",
    "test_ablate",
    "test_plan",
    "test_compilation",
    "test_layouts",
    "test_equality",
    "test_program",
    "test_step",
    "test_bench",
    "test_checkpoint",
)


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


faults.RETRY_SECONDS = 0.0  # tests that plant a fault for a while set their own


@pytest.fixture(autouse=True, scope="session")
def programs_are_shared():
    """Runs of train.py in this process trace and compile the program of a model once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "Run", shared_run)
        yield


@pytest.fixture(autouse=True)
def types_as_before():
    """A run sets what its process computes in: float64, and the precision of float32 products."""
    yield
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture
def workdir(tmp_path):
    """Path of a run that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def kept_programs(tmp_path_factory):
    """A context in which compiled programs are kept, for all of pytest's workers, until the session ends.

    On one device only: parallel/start.py.
    """
    session = tmp_path_factory.getbasetemp()
    folder = str((session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "programs")

    def keep(on):
        jax.config.update("jax_enable_compilation_cache", on)
        jax.config.update("jax_compilation_cache_dir", folder if on else "")
        compilation_cache.reset_cache()

    @contextlib.contextmanager
    def kept():
        keep(True)
        try:
            yield
        finally:
            keep(False)

    return kept


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return kill.text(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(data, capsys, monkeypatch, kept_programs):
    """Calls train.py in this process: its exit status, what it printed, and its errors."""

    def call(workdir, *arguments, **changed):
        argv = ["train.py", f"--workdir={workdir}", *kill.flags(data, **SMALL | changed), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        with kept_programs():
            status = cli.run(train.main, train.define, train.__doc__, "configs/tiny.py")
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def finished_run(data, tmp_path_factory, kept_programs):
    folder = tmp_path_factory.mktemp("finished") / "run"
    argv = ["train.py", f"--workdir={folder}", *kill.flags(data, **SMALL)]
    with kept_programs():
        assert cli.run(train.main, train.define, train.__doc__, "configs/tiny.py", argv=argv) == cli.DONE
    return folder


@pytest.fixture
def finished(finished_run, workdir):
    """A run of 4 steps, to be changed."""
    shutil.copytree(finished_run, workdir)
    return workdir


@pytest.fixture
def complete(capsys, monkeypatch, kept_programs):
    """Calls infer.py: its exit status, what it printed, and its errors."""

    def complete(*arguments, given=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        with kept_programs():
            status = cli.run(infer.main, infer.define, infer.__doc__, argv=["infer.py", *arguments], found=infer.FOUND)
        return status, *capsys.readouterr()

    return complete
