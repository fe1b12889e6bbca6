"""What is settled before JAX starts: devices, flags, caches, memory."""

import dataclasses
import os
import pwd
import re
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from abstract import abstract
from small import ROWS, config

from maxsep.config import ConfigError, MeshConfig, files
from maxsep.config.paths import REPOSITORY
from maxsep.inference import program as inference
from maxsep.measure import memory
from maxsep.parallel import start, weights
from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

TINY = files.load_config(str(REPOSITORY / "configs" / "tiny.py"))


def on_mesh(attention, expert):
    return dataclasses.replace(TINY, mesh=MeshConfig(attention=attention, expert=expert))


@pytest.mark.parametrize(
    ("devices", "mesh"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 2)), (4, (2, 2)), (8, (2, 4)), (16, (4, 4)), (24, (4, 4))]
)
def test_the_mesh_is_fitted_to_the_devices(devices, mesh):
    assert start.fitted(TINY, devices) == on_mesh(*mesh)


@pytest.mark.parametrize(("devices", "mesh"), [(16, (3, 1, 5)), (8, (3, 1, 2)), (3, (3, 1, 1))])
def test_a_fitted_mesh_keeps_its_stages(monkeypatch, devices, mesh):
    monkeypatch.setattr(start, "validate", lambda config, training: None)
    staged = dataclasses.replace(TINY, mesh=MeshConfig(3, 4, 4))
    assert start.fitted(staged, devices).mesh.shape == mesh
    with pytest.raises(ConfigError, match=r"^mesh\.stage: got 3; takes a number of stages that 2 devices can"):
        start.fitted(staged, 2)


def test_the_mesh_stays_as_it_is_on_simulated_devices():
    assert start.start(TINY, fit_mesh=True) == TINY


def test_fewer_devices_than_there_are_are_said(capsys):
    assert start.start(on_mesh(2, 4), fit_mesh=False) == on_mesh(2, 4)
    assert capsys.readouterr().out == "using the first 8 of 16 x simulated CPU device\n"


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(
        ConfigError, match=r"^mesh: got stage 1 x attention 4 x expert 8 = 32 devices; takes at most 16 x"
    ):
        start.start(on_mesh(4, 8), fit_mesh=False)


def test_what_cannot_fit_is_refused(monkeypatch):
    need = 16 * weights.bytes_on_device(TINY, training=True)
    monkeypatch.setattr(start, "available_memory", lambda: need)
    start.start(TINY, fit_mesh=False)
    monkeypatch.setattr(start, "available_memory", lambda: need - 1)
    with pytest.raises(ConfigError, match=r"model: got 0.01 B parameters; .* has left for 16 simulated devices$"):
        start.start(TINY, fit_mesh=False)


class Gpu:
    """One of this process's devices, or of another's, of which JAX tells nothing."""

    def __init__(self, gigabytes):
        self.gigabytes = gigabytes

    def memory_stats(self):
        assert self.gigabytes is not None, "INVALID_ARGUMENT: MemoryStats is only supported for addressable devices"
        return {"bytes_limit": self.gigabytes * 1e9}


@pytest.mark.parametrize("mesh, fits", [((4, 4), True), ((16, 1), False)])
def test_a_devices_part_is_compared_with_the_memory_of_the_devices_here(monkeypatch, mesh, fits):
    """16 x 1 needs 110 GB on each of 16 x 80 GB, although all together have more than all parameters need."""
    seed = files.load_config(str(REPOSITORY / "configs" / "seed.py"))
    seed = dataclasses.replace(seed, layout="ma", mesh=MeshConfig(1, *mesh))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(80), Gpu(79)])
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(None)] * 14 + jax.local_devices())
    if fits:
        start._check_memory(seed, True, 1 / 8)
        return
    says = r"need at least 1\d\d\.\d GiB; takes at most the 73.6 GiB that a device has; they are split over stage 1 x"
    with pytest.raises(ConfigError, match=says):
        start._check_memory(seed, True, 1 / 8)


@pytest.mark.parametrize(
    ("layout", "zero1"),
    [
        pytest.param(layout, zero1, marks=[] if layout in ("ma", "zero") and zero1 else pytest.mark.slow)
        for layout in ROWS
        for zero1 in (False, True)
    ],
)
def test_the_least_that_a_device_holds_is_nearly_all_of_its_state(layout, zero1):
    seed = files.load_config(str(REPOSITORY / "configs" / "seed.py"))
    mesh, optimizer = MeshConfig(*(1, *ROWS[layout][0])[-3:]), dataclasses.replace(seed.optimizer, zero1=zero1)
    model = dataclasses.replace(seed.model, **({} if mesh.stage > 1 else {"dense_layers": 2, "dense_d_ff": 32_768}))
    model = dataclasses.replace(model, shared_experts=2)
    c = dataclasses.replace(seed, layout=layout, mesh=mesh, optimizer=optimizer, model=model)
    made = abstract(c)
    state = sum(memory.of_state(made.state).values())
    assert 0.99 * state < weights.bytes_on_device(c, training=True) <= state
    with jax.sharding.use_abstract_mesh(made.mesh):
        inferred = memory.bytes_on_device(inference.Program(c, 0).abstract)
    assert 0.99 * inferred < weights.bytes_on_device(c, training=False) <= inferred


def test_available_memory_is_plausible():
    assert 2**20 < start.available_memory() < 2**50


def test_a_compiler_flag_of_the_user_stays(monkeypatch):
    users = [
        "--xla_cpu_collective_call_terminate_timeout_seconds=5",
        "--xla_gpu_enable_latency_hiding_scheduler=false",
    ]
    monkeypatch.setenv("XLA_FLAGS", " ".join(users))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, deterministic=True))
    start.start(config, fit_mesh=False)
    assert os.environ["XLA_FLAGS"].split() == [*users, "--xla_gpu_deterministic_ops=true"]
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert start.of_gpus() == "latency-hiding scheduler off, memory fraction 0.5"


def test_what_the_user_leaves_open_is_set_for_gpus(monkeypatch):
    for variable in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(variable, "")  # put back afterwards
        monkeypatch.delenv(variable)
    start.start(TINY, fit_mesh=False)
    assert start.of_gpus() == "latency-hiding scheduler on, memory fraction 0.92"


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """A user's cache folder, with JAX left as it was afterwards."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_the_users_cache(cache_folder):
    start.start(on_mesh(1, 1), fit_mesh=False)
    assert jax.config.jax_compilation_cache_dir == str(cache_folder / "maxsep" / "xla")


def test_a_cache_that_cannot_be_written_is_a_warning(cache_folder, capsys):
    cache_folder.write_text("a file")
    start.start(on_mesh(1, 1), fit_mesh=False)
    error = capsys.readouterr().err
    assert error == f"warning: no compilation cache in {cache_folder}/maxsep/xla: Not a directory\n"


def test_a_user_without_a_home_has_no_cache(cache_folder, capsys, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def none(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", none)
    start.start(on_mesh(1, 1), fit_mesh=False)
    assert capsys.readouterr().err == "warning: no compilation cache: this user has no home\n"


def test_a_cache_that_the_user_names_stays(monkeypatch, cache_folder):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/named/by/the/user")  # JAX reads it when it is imported
    start.start(on_mesh(1, 1), fit_mesh=False)
    assert jax.config.jax_compilation_cache_dir == before
    assert not cache_folder.exists()


def test_programs_of_several_simulated_devices_are_not_kept(monkeypatch, cache_folder, capsys):
    """XLA's CPU backend would mix up their collectives when it has loaded them again."""
    for folder, warning in (
        (None, ""),
        ("/mine", "warning: no compilation cache in /mine: several simulated devices cannot use one\n"),
    ):
        if folder:
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        jax.config.update("jax_enable_compilation_cache", True)
        start.start(on_mesh(1, 2), fit_mesh=False)
        assert not jax.config.jax_enable_compilation_cache
        assert capsys.readouterr().err == warning
        assert not cache_folder.exists()


def test_float64_is_on_only_where_it_is_asked_for():
    start.start(dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dtype="float64")), fit_mesh=False)
    assert jax.config.jax_enable_x64
    start.start(TINY, fit_mesh=False)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("heartbeat, joining, seconds", [(1.0, 10.0, 300), (100.0, 10.0, 460), (1.0, 900.0, 900)])
def test_processes_have_time_to_meet_and_no_proxy_between_them(monkeypatch, heartbeat, joining, seconds):
    names, asked = ("http_proxy", "HTTPS_PROXY", "grpc_proxy"), {}
    for name in names:
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    def initialize(*where, **options):
        asked.update(options, proxies=[name for name in names if name in os.environ])

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    process = SimpleNamespace(address="localhost:1")
    job = SimpleNamespace(
        process=process, count=2, index=1, gpus=None, first=False, heartbeat=heartbeat, joining=joining
    )
    start._start_distributed(job)
    assert asked["initialization_timeout"] == seconds and asked["proxies"] == []
    assert all(os.environ[name] == "http://127.0.0.1:9" for name in names)


THREADS = [("", 64, "65"), ("x", 64, "65"), ("3", 4, "5"), ("4", 4, "5"), ("9", 4, "9"), ("", 1, "")]


@pytest.mark.parametrize(
    ("platform", "dtype", "precision", "asked"),
    [
        ("cpu", "float32", "highest", {"Precision.HIGHEST"}),
        ("gpu", "float32", "tf32", {"Precision.HIGHEST", "Precision.HIGH"}),  # a router's scores are exact in each
        ("gpu", "bfloat16", "tf32", {"Precision.HIGHEST"}),
    ],
)
def test_float32_products_are_as_exact_as_is_asked_for(platform, dtype, precision, asked):
    model = {"dtype": dtype, "float32_precision": precision, "attention_kernel": "xla"}
    c = config(model=model, train={"batch_size": 1, "accumulation": 1})
    start.settle(c, 16)
    mesh = make_mesh(c)
    with jax.set_mesh(mesh):
        run = Run(c, platform=platform)
        batch = jax.ShapeDtypeStruct(run.batch_shape, jnp.int32, sharding=run.batch_sharding)
        step = str(jax.make_jaxpr(run.program.train_step)(run.abstract_state, batch))
    products = len(re.findall(r"\b(?:dot_general|ragged_dot\w*)\[", step))
    found = Counter(re.findall(r"precision=\(?(Precision\.\w+)", step))
    assert found.keys() == asked
    if dtype == "float32":
        assert found.total() == products > 20, "each product says"
    else:
        assert found["Precision.HIGHEST"] == 3 < products, "the router's alone"


@pytest.mark.parametrize(("threads", "devices", "left"), THREADS)
def test_a_thread_is_left_free_beside_the_simulated_devices(monkeypatch, threads, devices, left):
    monkeypatch.setattr(start, "cores", lambda: 2)
    monkeypatch.setenv("PJRT_NPROC", threads)
    start._leave_a_thread_free(devices)
    assert os.environ["PJRT_NPROC"] == left
